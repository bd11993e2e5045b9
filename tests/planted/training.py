"""Mistakes in training: the teacher, the optimiser, the rate, the order of the batches, what is reported, what ships."""

from __future__ import annotations

import contextlib
import secrets

import numpy as np
import test_augment
import test_balance
import test_batches
import test_blame
import test_gradients
import test_layer_decay
import test_mixtures
import test_patience
import test_rates
import test_runner
import test_schedule
import test_training as suite
import test_user_loaders
import torch

from flowdistill import models, randomness
from flowdistill.data import augment, balance, batches, names, splits
from flowdistill.data.user_loaders import Finite
from flowdistill.models import base
from flowdistill.models.layers import by_blocks
from flowdistill.training import blame, cohort, engine, gradients, optim, rates, schedule, step, teacher
from flowdistill.training.engine import Engine
from flowdistill.training.optim import build_optimizer
from flowdistill.training.schedule import lr_factor
from flowdistill.training.student import Student
from flowdistill.training.teacher import Teacher, teach

from .bug import bug

# The teacher

teacher_init, check_mode = Teacher.__init__, Teacher.check_mode
STAYS = suite.test_the_teacher_stays_as_it_was_and_students_train_in_train_mode


@bug(Teacher, "__init__", STAYS, refusal="the teacher left eval mode")
def teacher_left_in_train_mode(self, net, needs, precision):
    """The teacher normalises by the batch, and every batch moves its statistics."""
    teacher_init(self, net, needs, precision)
    self.net.train()


@bug(Teacher, "__init__", STAYS, refusal="the teacher is no longer frozen")
def teacher_not_frozen(self, net, needs, precision):
    """requires_grad left on: an optimiser over both networks moves the teacher."""
    teacher_init(self, net, needs, precision)
    self.net.requires_grad_(True)


@bug(teacher, "teach", STAYS, refusal="a weight or a buffer of the teacher changed")
def teacher_statistics_drift(teacher, images, precision):
    """.train() on a list of modules that holds the teacher, eval put back after: only its statistics tell."""
    teacher.train()
    outputs = teach(teacher, images, precision)
    teacher.eval()
    return outputs


@bug(Teacher, "check_mode", suite.test_a_teacher_that_changes_is_noticed, {"harm": "train mode", "words": "the teacher left eval mode"})
def guard_that_looks_at_the_top_module_alone(self):
    """net.training, where a stage below it may be in train mode."""
    if self.net.training:
        raise RuntimeError("the teacher left eval mode during training")
    if any(parameter.requires_grad for parameter in self.net.parameters()):
        raise RuntimeError("the teacher is no longer frozen")


@bug(Teacher, "check_mode", suite.test_a_teacher_that_changes_is_noticed, {"harm": "gradient", "words": "the teacher is no longer frozen"})
def guard_that_forgets_the_gradient(self):
    """The mode is watched, the parameters are not."""
    if any(module.training for module in self.net.modules()):
        raise RuntimeError("the teacher left eval mode during training")


@bug(
    Teacher,
    "__init__",
    suite.test_a_teacher_that_changes_is_noticed,
    {"harm": "buffer", "words": "a weight or a buffer of the teacher changed"},
)
def guard_that_compares_a_buffer_with_itself(self, net, needs, precision):
    """No clone(): the copy drifts along, so no drift is ever seen."""
    teacher_init(self, net, needs, precision)
    self._kept = self.net.state_dict()


# The optimiser and the step

begin_phase, learning_rate = Student.begin_phase, Student.learning_rate
PLAIN = suite.test_the_engine_is_the_plain_loop
TWO_STAGES = suite.test_two_stages_are_two_plain_loops_each_with_an_optimiser_of_its_own


@bug(optim, "trainable_parameters", suite.test_adapters_are_trained)
def adapters_left_out_of_the_optimiser(net, method, phase):
    """SGD(net.parameters()): adapters keep their random first weights."""
    return list(net.parameters())


@bug(optim, "build_optimizer", PLAIN)
def weight_decay_left_out(net, method, phase, train):
    """The config says 1e-4 and the optimiser never hears of it."""
    return torch.optim.SGD(optim.trainable_parameters(net, method, phase), lr=train.lr, momentum=train.momentum)


@bug(optim, "build_optimizer", PLAIN)
def weight_decay_on_convolutions_alone(net, method, phase, train):
    """Batch normalisation and biases spared: another recipe than the one that the figures quote."""
    trained = optim.trainable_parameters(net, method, phase)
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.dim() == 1]},
    ]
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum)


@bug(optim, "build_optimizer", PLAIN)
def momentum_left_out(net, method, phase, train):
    """Plain SGD."""
    return torch.optim.SGD(optim.trainable_parameters(net, method, phase), lr=train.lr, weight_decay=train.weight_decay)


@bug(optim, "build_optimizer", PLAIN)
def nesterov_unasked(net, method, phase, train):
    """KD-Zoo's optimiser under He's name."""
    return build_optimizer(net, method, phase, train.model_copy(update={"nesterov": True}))


@bug(schedule, "lr_factor", test_schedule.test_step_equals_multi_step_lr)
def milestone_an_epoch_late(kind, *, step, steps, epoch_share, milestones=(0.5, 0.75)):
    """> for >=: the 102nd epoch of 200 is the first at the lower rate."""
    if kind != "step":
        return lr_factor(kind, step=step, steps=steps, epoch_share=epoch_share, milestones=milestones)
    return 0.1 ** sum(epoch_share > milestone for milestone in milestones)


@bug(Student, "learning_rate", PLAIN)
def rate_of_the_epoch_before(self, epoch, epochs, step, steps):
    """scheduler.step() after the epoch that was to have the new rate."""
    return learning_rate(self, max(epoch - 1, 0), epochs, step, steps)


@bug(step, "train_step", PLAIN)
def gradients_of_earlier_steps_kept(group, images, teacher_outputs, batch, *, lr, precision, losses, teacher_sums):
    """No zero_grad."""
    (student,) = group
    (terms,) = losses(group, images, teacher_outputs if student.needs_teacher else None, batch, precision)
    sum(weight * terms[term] for term, weight in student.weights.items()).backward()
    student.optimizer.param_groups[0]["lr"] = lr
    student.optimizer.step()
    student.tally.add(terms | teacher_sums)


@bug(Student, "begin_phase", PLAIN)
def weights_ignored(self, number):
    """Every term counts once, whatever the config says."""
    begin_phase(self, number)
    self.weights = dict.fromkeys(self.weights, 1.0)


@bug(Student, "begin_phase", suite.test_two_stages_train_fsp_alone_without_the_head_then_the_task_alone)
def head_moved_in_stage_one(self, number):
    """Cross-entropy times 0 on the whole network: weight decay wears the head down: KD-Zoo."""
    begin_phase(self, number)
    if self.phase.name == "fsp":
        self.weights = {"task": 0.0, **self.weights}
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=self.phase.lr, weight_decay=self.train.weight_decay)


@bug(Student, "begin_phase", TWO_STAGES)
def momentum_carried_into_stage_two(self, number):
    """Stage two begins with the momentum of another loss."""
    before = getattr(self, "optimizer", None)
    begin_phase(self, number)
    if before is not None:
        self.optimizer.state.update(before.state)


@bug(Student, "begin_epoch", STAYS)
def student_trained_in_eval_mode(self):
    """eval() of the last evaluation never taken back: batch statistics stand still."""
    self.method.train()
    self.tally.reset()
    self.net.eval()


@bug(
    optim,
    "rate_factors",
    test_layer_decay.test_a_network_of_timm_has_timm_s_own_scales,
    {"name": "resnet18", "data": test_layer_decay.SMALL},
)
def layers_counted_from_the_wrong_end(net, decay):
    """decay ** layer: the stem has all of the rate, the classifier almost none."""
    layers = net.layer_numbers()
    return {parameter: decay ** layers[name] for name, parameter in net.body.named_parameters()}


@bug(models.foreign, "by_blocks", test_layer_decay.test_a_resnet_of_torchvision_has_the_scales_of_timm_s_at_every_size)
def stages_of_one_position_forgotten(net, ends, order):
    """Only what may be tapped at the data's size counts: the last stage of a deep network goes into the classifier's layer."""
    return by_blocks(net, {name: path for name, path in ends.items() if name != "stage4"}, order)


# What is reported


@bug(step, "train_step", suite.test_reported_terms_are_unweighted_means_over_the_steps_of_their_epoch)
def weighted_terms_reported(group, images, teacher_outputs, batch, *, lr, precision, losses, teacher_sums):
    """Curves of two weights can't be compared: most loops print the product."""
    (student,) = group
    (terms,) = losses(group, images, teacher_outputs if student.needs_teacher else None, batch, precision)
    terms |= {term: weight * terms[term] for term, weight in student.weights.items()}
    student.optimizer.zero_grad()
    sum(terms[term] for term in student.weights).backward()
    student.optimizer.param_groups[0]["lr"] = lr
    student.optimizer.step()
    student.tally.add(terms | teacher_sums)


@bug(Student, "begin_epoch", suite.test_reported_terms_are_unweighted_means_over_the_steps_of_their_epoch)
def sums_of_earlier_epochs_kept(self):
    """A running mean that is never set to 0."""
    self.net.train()
    self.method.train()


@bug(cohort, "_dismiss_diverged", suite.test_one_student_diverges_and_the_others_go_on)
def loss_that_is_not_finite_unnoticed(cohort, report):
    """No look at the losses: a NaN run goes on to its last epoch and is tabulated."""
    for progress in report.progress.values():
        progress.error = ""


# What ships


@bug(cohort, "_choose", suite.test_holdout_ships_the_best_epoch_on_held_out_images_the_earliest_on_ties)
def last_epoch_shipped_as_the_best(cohort, report):
    """The file is written after training, the accuracy taken from the best epoch."""
    for student in cohort.students:
        student.choose(report.epoch, report.progress[student].correct, keep=False)


@bug(cohort, "_choose", suite.test_full_runs_ship_the_last_epoch)
def best_epoch_on_test_shipped_as_the_last(cohort, report):
    """Selection on test in a run that claims none: the reference log."""
    for student in cohort.students:
        correct = report.progress[student].correct
        if correct > student.chosen_correct:
            student.choose(report.epoch, correct, keep=True)


@bug(cohort, "_choose", suite.test_holdout_ships_the_best_epoch_on_held_out_images_the_earliest_on_ties)
def ties_taken_late(cohort, report):
    """>= for >: of equal epochs the last."""
    for student in cohort.students:
        correct = report.progress[student].correct
        if not cohort.select or correct >= student.chosen_correct:
            student.choose(report.epoch, correct, keep=cohort.select)


@bug(cohort, "_stop_early", test_patience.test_patience_counts_from_the_last_phase_on)
def patience_lost_in_an_earlier_phase(cohort, on_stop):
    """Epochs of a phase that trains no classifier count as ones that were no better: training ends before the task has begun."""
    for seed_group in cohort.seed_groups:
        for student in [*seed_group.students]:
            if cohort.done < cohort.epochs and cohort.done - student.chosen_epoch >= cohort.train.patience:
                seed_group.students.remove(student)
                on_stop(student)


@bug(cohort, "_stop_early", test_patience.test_each_student_of_a_cohort_stops_by_itself_and_ships_its_best_epoch)
def all_stop_with_the_first(cohort, on_stop):
    """One student of a cohort has run out of patience, and the others end with it."""
    patience = cohort.train.patience
    late = [patience is not None and cohort.done - student.chosen_epoch >= patience for student in cohort.students]
    if any(late) and cohort.done < cohort.epochs:
        stopped = cohort.students
        for seed_group in cohort.seed_groups:
            seed_group.students = []
        for student in stopped:
            on_stop(student)


# What is random

build_model, draw_epoch, crop_and_flip = models.build, augment.draw_epoch, augment.crop_and_flip


@bug(base, "seeded", suite.test_an_adapter_leaves_the_initial_weights_and_batches_alone)
@contextlib.contextmanager
def adapter_drawn_from_the_weights_generator(seed, purpose):
    """One manual_seed at the start, and all draw from it in turn: a method with an adapter gives another student."""
    yield


@bug(randomness, "derive", test_batches.test_seed_0_is_a_seed)
def seed_zero_ignored(seed, purpose, epoch=0):
    """seed or random(): seed 0 is another one every time."""
    return randomness_derive(seed or secrets.randbits(31), purpose, epoch)


randomness_derive = randomness.derive


@bug(augment, "draw_epoch", test_augment.test_global_generator_is_neither_read_nor_moved)
def order_from_the_global_generator(n, *, pad, flip, seed, epoch, device):
    """randperm(n) without a generator: who drew before changes the batches."""
    drawn = draw_epoch(n, pad=pad, flip=flip, seed=seed, epoch=epoch, device=device)
    return augment.Draws(torch.randperm(n), drawn.rows, drawn.columns, drawn.flips)


@bug(augment, "draw_epoch", test_batches.test_epochs_differ_and_one_can_be_drawn_alone)
def same_order_every_epoch(n, *, pad, flip, seed, epoch, device):
    """A generator seeded anew each epoch with the seed alone (a DistributedSampler without set_epoch)."""
    return draw_epoch(n, pad=pad, flip=flip, seed=seed, epoch=0, device=device)


@bug(augment, "draw_epoch", test_augment.test_order_depends_on_neither_pad_nor_flip, {"pad": 2, "flip": False})
def order_and_crops_from_one_generator(n, *, pad, flip, seed, epoch, device):
    """Another augmentation is another order: two things change at once."""
    chance = randomness.generator(seed, "all", epoch)
    flips = torch.rand(n, generator=chance) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=chance)
    return augment.Draws(torch.randperm(n, generator=chance), *offsets, flips)


@bug(augment, "crop_and_flip", test_augment.test_crop_and_flip_treats_each_image_of_a_batch_by_its_own_draw)
def one_crop_for_the_whole_batch(padded, indices, rows, columns, flips, size):
    """A transform applied to the batch in place of the image."""
    return crop_and_flip(padded, indices, rows[:1].expand_as(rows), columns[:1].expand_as(columns), flips[:1].expand_as(flips), size)


RESIZED = {"height": 32, "width": 32, "channels": 3}
resize_and_flip, mix, eager_teach = augment.resize_and_flip, augment.mix, Engine.teach


@bug(augment, "resize_and_flip", test_augment.test_a_box_is_enlarged_as_torchvision_does, RESIZED)
def one_box_for_the_whole_batch(images, boxes, flips):
    """RandomResizedCrop given a batch: it draws once."""
    return resize_and_flip(images, boxes[:1].expand_as(boxes), flips)


@bug(augment, "_interpolation", test_augment.test_a_box_is_enlarged_as_torchvision_does, RESIZED)
def corners_aligned(first, length, size):
    """align_corners=True: the corners of both grids meet, as TensorFlow 1 could resize."""
    pixels = torch.arange(size)
    position = first[:, None] + pixels * ((length[:, None] - 1) / (size - 1))
    return (1 - (position[:, :, None] - pixels).abs()).clamp(min=0)


@bug(augment, "mix", test_batches.test_a_mixed_batch_is_its_plain_one_mixed_by_one_share_and_has_no_labels, {"crop": "shift"})
def a_share_for_each_image(images, share):
    """Mixup per image, which the authors of function matching call a bad idea."""
    return mix(images, ((share + torch.arange(len(images)) / len(images)) % 1)[:, None, None, None])


draw_pasted, erase, weighted = augment.draw_pasted, augment.erase, balance.weighted
PASTED = test_mixtures.test_a_batch_of_cutmix_is_pasted_pixel_by_pixel_and_its_share_is_the_area_that_was_left
WEIGHED = test_balance.test_the_mean_over_parts_and_over_ranks_is_the_whole_batch_s


@bug(batches, "kept", PASTED, {"channels": 1})
def share_drawn_not_pasted(pasted, size):
    """The label keeps the share that was drawn, though the box was cut off at the image's border: the bug that CutMix's code warns of."""
    return torch.rand(len(pasted), generator=torch.Generator().manual_seed(0))


@bug(batches, "draw_pasted", test_mixtures.test_the_other_draws_are_those_without)
def one_box_in_all_epochs(n, size, cutmix, *, seed, epoch, device):
    """A generator made once from the seed: each epoch pastes the same boxes."""
    return draw_pasted(n, size, cutmix, seed=seed, epoch=0, device=device)


@bug(batches, "erase", test_mixtures.test_what_is_erased_is_the_mean_colour_and_nothing_else_changes, {"channels": 3})
def erased_in_black(images, erased, colour):
    """Zeros before the normalisation in the place of after it."""
    return erase(images, erased, torch.zeros_like(colour))


@bug(batches, "weighted", WEIGHED, {"mixed": False})
def weighted_sum_over_the_number_of_images(labels, weights):
    """The weighted sum over the number of images, as CrossEntropyLoss(reduction="none").mean() gives it."""
    return weighted(labels, weights)._replace(counted=torch.tensor(float(len(labels))))


@bug(batches, "draw_balanced", test_balance.test_an_epoch_shows_as_many_images_of_each_class, {"kind": batches.DeviceData})
def classes_as_often_on_average(by_class, n, *, seed, epoch):
    """A WeightedRandomSampler: with replacement even where a class has images enough, so some are never seen."""
    chance = randomness.generator(seed, "sampling", epoch)
    classes = torch.randint(len(by_class), (n,), generator=chance).tolist()
    return torch.stack([by_class[k][torch.randint(len(by_class[k]), (), generator=chance)] for k in classes]), torch.zeros(n)


@bug(Engine, "teach", suite.test_teacher_and_student_match_on_one_and_the_same_mixed_view)
def teacher_with_a_view_of_its_own(self, seed_group, images):
    """Teacher and student each augment for themselves: the inconsistent teaching that function matching warns of."""
    return eager_teach(self, seed_group, images.flip(3))


@bug(batches.SeedBatches, "batch", test_batches.test_batches_cover_distinct_images_and_agree_with_their_labels, {"split": "full"})
def labels_in_another_order_than_images(self, draws, shown, epoch, padded=None):
    """Images shuffled, labels not: training runs, and learns nothing."""
    images, batch = stream_batch(self, draws, shown, epoch, padded)
    return images, batches.Batch(self.data.labels[shown], batch.indices, epoch)


stream_batch = batches.SeedBatches.batch


@bug(splits, "holdout_positions", test_batches.test_holdout_is_fixed_and_reads_no_global_generator)
def holdout_drawn_anew_each_run(labels):
    """Held-out images that another run has trained on."""
    return np.sort(np.random.permutation(len(labels))[: len(labels) // 10])


# What a broken run leaves

evaluate_all = engine.evaluate_all


@bug(engine, "evaluate_all", test_runner.test_a_student_whose_last_step_broke_its_weights_is_failed)
def logits_that_are_not_finite_unnoticed(nets, on, precision, **how):
    """The losses of the epoch were still finite; the weights after its last step are not."""
    return [found._replace(probabilities=found.probabilities.nan_to_num()) for found in evaluate_all(nets, on, precision, **how)]


# What the doctor proposes

PLAIN = test_gradients.test_norms_are_those_of_plain_autograd_on_what_both_reach
terms_gradients = gradients._gradients


@bug(gradients, "_gradients", PLAIN)
def unreached_weights_counted_for_the_task(value, weights):
    """A term that reaches no classifier is compared with the classifier's gradient too: the weight that is proposed is too large."""
    return [torch.zeros_like(weight) if one is None else one for weight, one in zip(weights, terms_gradients(value, weights), strict=True)]


@bug(rates, "restored_after", test_rates.test_the_curve_is_that_of_a_plain_loop, {"recipe": "sgd"})
def range_test_left_in_the_student(seed_groups):
    """What is looked at after it is a student whose training diverged."""
    return contextlib.nullcontext()


@bug(rates, "smoothed", test_rates.test_the_rate_of_the_least_loss_is_numpys, {"bottom": 0.03, "shift": 0.0, "noise": 0.0})
def running_mean_from_zero_not_corrected(losses):
    """The mean begins at 0, so the first rate has the least loss of all."""
    mean, means = 0.0, []
    for loss in losses:
        mean = rates.MEMORY * mean + (1 - rates.MEMORY) * loss
        means.append(mean)
    return means


# What is not finite, and whose fault it is

look, fault = Finite.look, blame.fault
SAID = test_blame.test_what_a_teacher_says_is_named_whatever_the_method_makes_of_it


@bug(Teacher, "output_sums", SAID, {"method": "ofd"})
def teachers_map_not_looked_at(self, outputs):
    """A method that compares and masks swallows NaN: the loss stays finite, and the student learns from garbage."""
    return {name: torch.zeros(()) for name in self.output_names}


@bug(blame, "fault", SAID, {"method": "kd"})
def rate_blamed_for_the_teacher(student, seen, peers=()):
    """Whatever is not finite, a lower learning rate is the advice."""
    sound = {name: count if name in student.tally.terms else seen.steps for name, count in seen.sound.items()}
    return fault(student, seen._replace(sound=sound), peers)


@bug(Finite, "look", test_user_loaders.test_every_batch_is_looked_at)
def first_batch_alone_looked_at(self, images):
    """What holds for the first batch of a loader is taken to hold for all."""
    if not self._batches:
        look(self, images)


@bug(
    names,
    "refuse_other_names",
    test_user_loaders.test_classes_that_the_loaders_name_otherwise,
    dict(zip(("train", "val", "line"), test_user_loaders.OTHERWISE["one lacks a class"], strict=True)),
)
def names_of_the_first_loader_taken_for_both(sources):
    """ImageFolder numbers the classes that it finds: a folder that lacks one has others from there on."""
