"""Mistakes with networks of others: their maps, their stages, their images, what their layers draw."""

from __future__ import annotations

from contextlib import nullcontext

import test_distiller
import test_dropout
import test_models
import test_pairing
import test_places
import test_several_teachers
import test_survey
import test_tap_table

from flowdistill import distiller
from flowdistill.ledger import merge
from flowdistill.methods import compose, fsp, per_teacher, radio
from flowdistill.models import head, hooks, input_adapter, places, stages, wide_resnet
from flowdistill.models.joined import Joined
from flowdistill.models.watching import Layout
from flowdistill.runner import pairing, references
from flowdistill.runner.pairing import Pairing
from flowdistill.training import evaluate, step
from flowdistill.types import numbered, of_number

from .bug import bug


@bug(Layout, "map", test_survey.test_tokens_keep_their_places)
def class_token_taken_for_a_position(self, output):
    """The tokens are cut off at the end, not the beginning: every position moves by one."""
    positions = output[:, : self.height * self.width].transpose(1, 2)
    return positions.reshape(-1, self.channels, self.height, self.width)


@bug(Layout, "map", test_survey.test_tokens_keep_their_places)
def columns_taken_for_rows(self, output):
    """A reshape to W x H: right for square maps of equal numbers alone."""
    positions = output[:, self.prefix :].transpose(1, 2)
    return positions.reshape(-1, self.channels, self.width, self.height).transpose(2, 3)


SQUARE = {"kind": "class token behind", "size": (56, 56)}


@bug(places, "settle", test_places.test_a_transformers_map_lies_on_a_convolutional_one, SQUARE)
def a_shape_taken_for_an_order(net, calls, channels, height, width):
    """65 tokens are 64 positions after a class token: of a network that puts it last every position moves by one."""
    return set()


@bug(places, "_choose", test_places.test_tokens_in_another_order_are_no_map, {"size": (56, 56)})
def columns_or_windows_taken_for_rows(layouts, scores):
    """Whatever fills a grid is a map: Hiera's tokens are compared with other places of the image."""
    return layouts[0]


@bug(places, "_stretch", test_places.test_a_transformers_map_lies_on_a_convolutional_one, SQUARE)
def the_whole_image_is_changed(number, count, length):
    """Every position answers to everything, so the first reading is as good as any."""
    return slice(0, length)


@bug(fsp, "pooled", test_places.test_a_transformers_map_lies_on_a_convolutional_one, {"kind": "class token", "size": (56, 88)})
def corners_taken_for_means(x, size, pool):
    """Every second position is left out: what is left lies half a position before its place."""
    return x[:, :, :: max(x.shape[2] // size[0], 1), :: max(x.shape[3] // size[1], 1)][:, :, : size[0], : size[1]]


@bug(radio, "interpolated", test_places.test_a_map_that_no_division_makes)
def corners_laid_on_corners(x, size):
    """align_corners: the middles of the outer positions are taken for the rim of the image, and maps of two sizes part from there."""
    return radio.F.interpolate(x, size, mode="bilinear", align_corners=True)


@bug(stages, "_transitions", test_survey.test_a_block_that_widens_before_it_shrinks)
def last_map_of_each_size(maps, level):
    """The last map of a size lies inside of the next block, where that widens before it shrinks: MobileNet, ResNet-50."""
    return []


@bug(stages, "_levels", test_survey.test_attention_maps_are_no_stage)
def every_square_is_an_image(maps):
    """T x T attention of each head has the shape of a map, and is larger than any."""
    return {size: size for size in sorted({call.size for call in maps}, reverse=True)}


@bug(pairing, "pair", test_pairing.test_equal_strides_are_paired)
def stages_paired_by_number(student, teacher, student_data, teacher_data, *, named=False):
    """stage1 with stage1, whatever their sizes: a network of one stage more is compared a stage too early all the way."""
    return Pairing(student, teacher)


@bug(references, "input_adapter", test_tap_table.test_a_teacher_sees_what_it_was_trained_on)
def teacher_sees_the_students_normalisation(given, own):
    """One normalisation for both: a teacher that was trained on another answers at chance level, and nobody asks."""
    return


@bug(input_adapter.InputAdapter, "forward", test_pairing.test_another_normalisation)
def shifted_before_it_is_scaled(self, images):
    """(x + shift) scale: right where both normalisations have one standard deviation."""
    return (images + self.shift) * self.scale


@bug(step, "layers_seeded", test_dropout.test_a_run_repeats_resumes_and_does_not_depend_on_its_company)
def dropout_of_the_global_generator(group, epoch, step, device):
    """Masks from whatever the generator holds: no run repeats, and each depends on who trains beside it."""
    return nullcontext()


_features = wide_resnet.WideResNet.features


@bug(
    wide_resnet.WideResNet,
    "features",
    test_models.test_the_stages_of_a_wrn_are_the_plain_sums_that_publications_compare,
    {"name": "wrn-16-1"},
)
def stages_of_a_wrn_after_the_next_relu(self, images):
    """All other networks are tapped after a ReLU; a WRN's stages end before the next layer's, and at, fsp and others compare the sums."""
    maps, last = _features(self, images)
    return {tap: maps.get(f"{tap}.post", value) for tap, value in maps.items()}, last


@bug(head, "_answered", test_distiller.test_probabilities_are_not_taken_for_logits, {"mode": None})
def the_only_layer_of_so_many_outputs_is_the_head(puts, rounding=0.0):
    """What becomes of its numbers is not asked: probabilities teach as logits do, 13 times too weakly."""
    return puts[-1].calls[-1][0]


@bug(evaluate, "answering", test_dropout.test_a_teacher_draws_by_seed_epoch_and_step)
def teacher_draws_as_it_comes(net, purpose, step, device, *, seed=0, epoch=0):
    """Dropout that is on in eval mode: two equal runs end in different weights."""
    return nullcontext()


@bug(
    distiller.Distiller,
    "_ask",
    test_distiller.test_the_teacher_teaches_in_eval_mode_whatever_its_owner_does,
    {"foreign": True, "compiled": False},
)
def teacher_in_the_mode_its_owner_put_it_in(self, teacher, images):
    """A LightningModule that holds it calls train() on all: it normalises by the batch, and its statistics move."""
    return teacher(images)


@bug(hooks.Hooks, "__deepcopy__", test_distiller.test_copies_are_bare, {"called": "directly"})
def copies_have_the_hooks_too(self, memo):
    """A copy of the student holds hooks that write into nobody's dict, and with a batch in it can't be made at all."""
    return hooks.OrderedDict(self.items())


_joined = Joined.answer


@bug(Joined, "answer", test_several_teachers.test_it_answers_by_the_weighted_mean_of_the_logits)
def shares_that_nobody_looks_at(self, images):
    """The plain mean of the logits, whatever the held-out images told."""
    outputs = _joined(self, images)
    return outputs._replace(logits=sum(net(images).logits for net in self.nets) / len(self.nets))


@bug(per_teacher.OfOne, "forward", test_several_teachers.test_every_method_has_the_terms_that_it_has_with_each_alone, {"name": "pkt"})
def each_is_given_the_embedding_of_all(self, student, teacher, batch=None):
    """The embeddings stand one after the other, and relations between images work on any width: nothing fails."""
    own_teacher = teacher._replace(maps=of_number(teacher.maps, self.number))
    terms = self.method(student._replace(maps=of_number(student.maps, self.number)), own_teacher, batch)
    return {numbered(term, self.number): value for term, value in terms.items()}


@bug(per_teacher.OfOne, "forward", test_several_teachers.test_every_method_has_the_terms_that_it_has_with_each_alone, {"name": "at"})
def both_are_taught_by_the_first(self, student, teacher, batch=None):
    """Maps of the first teacher under the number of every other."""
    maps = {name: of_number(outputs.maps, 1) for name, outputs in (("student", student), ("teacher", teacher))}
    terms = self.method(student._replace(maps=maps["student"]), teacher._replace(maps=maps["teacher"]), batch)
    return {numbered(term, self.number): value for term, value in terms.items()}


@bug(compose, "terms_of", test_several_teachers.test_weights_are_shared_or_set_for_one)
def two_teachers_weigh_twice(cls, defaults, teachers):
    """A method on features has its whole weight for each of them."""
    if teachers == 1 or cls.kind == "logits":
        return dict(defaults)
    return {numbered(term, number): weight for term, weight in defaults.items() for number in range(1, teachers + 1)}


@bug(merge, "_numbers", test_several_teachers.test_merged_they_have_their_new_numbers)
def numbers_of_another_ledger(run):
    """Runs get new numbers when ledgers are put together; a teacher of several keeps the old ones, and is another teacher."""
    references = [run.config.get(key) for key in ("student", "teacher", "init_from", "peer")]
    return {reference: int(reference) for reference in references if (reference or "").isdigit()}
