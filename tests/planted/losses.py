"""Mistakes in the losses. Every mistake replaces one function of the package and has its signature."""

from __future__ import annotations

import test_facts
import test_fsp
import test_methods as suite
import torch
import torch.nn.functional as F

from flowdistill.methods import METHODS, Method, attention, base, cat_kd, compose, fsp, kd, logits, nd, ofd
from flowdistill.methods.attention import AT, attention_loss
from flowdistill.methods.base import full
from flowdistill.methods.fsp import FSP, fsp_loss, fsp_matrix, match_sizes
from flowdistill.methods.logits import logits_loss
from flowdistill.methods.srrl import SRRL
from flowdistill.training import step

from .bug import bug

# kd

KD = {"name": "kd", "options": {}}
KD_FORMULA = {**KD, "pair": "even"}


def wrong(name, number=0):
    """A pair that a method must refuse."""
    return dict(zip(suite.WRONG_NAMES, [case for case in suite.WRONG if case[0] == name][number], strict=True))


@bug(kd, "kd_loss", suite.test_formula_equals_the_reference, KD_FORMULA)
def kd_without_t_squared(student, teacher, temperature=4.0):
    """No factor T^2: torchdistill where targets are None, the keras.io example, distiller before issue 122."""
    log_s, log_t = ((full(z) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


@bug(kd, "kd_loss", suite.test_formula_equals_the_reference, KD_FORMULA)
def kd_direction_reversed(student, teacher, temperature=4.0):
    """KL(p_s || p_t): the two arguments of kl_div changed over."""
    log_s, log_t = ((full(z) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_t, log_s, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_formula_equals_the_reference, KD_FORMULA)
def kd_mean_over_elements(student, teacher, temperature=4.0):
    """nn.KLDivLoss() at its default, K times smaller: Tf-KD."""
    log_s, log_t = ((full(z) / temperature).log_softmax(1) for z in (student, teacher))
    return torch.nn.KLDivLoss(reduction="none", log_target=True)(log_s, log_t).mean() * temperature**2


@bug(kd, "kd_loss", suite.test_promise_per_sample, KD)
def kd_summed_over_the_batch(student, teacher, temperature=4.0):
    """reduction="sum" without the division by N: the loss grows with the batch."""
    log_s, log_t = ((full(z) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_promise_per_sample, KD)
def kd_softmax_over_the_batch(student, teacher, temperature=4.0):
    """dim=0 for dim=1: the images of a batch compete, not the classes."""
    log_s, log_t = ((full(z) / temperature).log_softmax(0) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_extremes_stay_finite, {**KD, "extreme": "logits x 1e3"})
def kd_log_of_softmax(student, teacher, temperature=4.0):
    """log(softmax(z)) for log_softmax(z): -inf as soon as a probability is 0."""
    p_s, p_t = ((full(z) / temperature).softmax(1) for z in (student, teacher))
    return (p_t * (p_t.log() - p_s.log())).sum(1).mean() * temperature**2


@bug(kd, "kd_loss", suite.test_promise_vanishes_at_match, KD)
def kd_cross_entropy_sold_as_kl(student, teacher, temperature=4.0):
    """-sum p_t log p_s: the same gradient, but not 0 at a perfect match: cls_KD."""
    return F.cross_entropy(full(student) / temperature, (full(teacher) / temperature).softmax(1)) * temperature**2


@bug(kd, "kd_loss", suite.test_promise_vanishes_at_match, KD)
def kd_temperature_on_one_side(student, teacher, temperature=4.0):
    """The student's logits are not divided by T: Tf-KD's loss_kd_regularization."""
    log_s, log_t = full(student).log_softmax(1), (full(teacher) / temperature).log_softmax(1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_half_is_for_storage_and_never_for_arithmetic, {**KD_FORMULA, "dtype": torch.bfloat16})
def kd_computed_in_half(student, teacher, temperature=4.0):
    """Softmax and sum in the dtype that comes in, the result made float32 at the end."""
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True).float() * temperature**2


@bug(kd, "kd_loss", suite.test_inputs_are_left_as_they_were, KD)
def kd_divides_its_inputs_in_place(student, teacher, temperature=4.0):
    """div_ for /: the cross-entropy that comes after sees logits over T."""
    log_s, log_t = (full(z).div_(temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_gradient_reaches_what_is_requested_and_the_adapters_alone, KD_FORMULA)
def kd_student_detached(student, teacher, temperature=4.0):
    """.data on the wrong side: the loss is printed and trains nothing."""
    log_s, log_t = ((full(z.data) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_compiled_equals_eager, KD, refusal="Data-dependent")
def kd_reads_its_loss_back(student, teacher, temperature=4.0):
    """A branch on the loss's value: waits for the device at every step and can't be compiled whole."""
    log_s, log_t = ((full(z) / temperature).log_softmax(1) for z in (student, teacher))
    loss = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2
    return loss if loss > 1e-8 else loss * 0


@bug(base, "same_classes", suite.test_wrong_pair_is_refused_with_the_cure, wrong("kd"))
def kd_accepts_other_classes(student, teacher, method):
    """No look at the pair before training: a crash in the first step, or class k taught by another class k."""


# logits


@bug(logits.Logits, "forward", suite.test_formula_equals_the_reference, {"name": "logits", "options": {}, "pair": "even"})
def logits_on_the_embedding(self, student, teacher, batch=None):
    """The pooled features in place of the logits: the reference log's "Logits"."""
    return {"logits": logits_loss(student.embedding, teacher.embedding)}


@bug(logits, "logits_loss", suite.test_formula_equals_the_reference, {"name": "logits", "options": {}, "pair": "even"})
def logits_summed_over_the_classes(student, teacher):
    """The square summed over the classes, K times larger, under the mean's name."""
    return (full(student) - full(teacher)).square().sum(1).mean()


# at

AT_CODE = {"name": "at", "options": {}}
AT_FORMULA = {**AT_CODE, "pair": "even"}


@bug(attention, "attention_loss", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_norm_not_squared_sold_as_the_code_form(student, teacher, mode="code"):
    """The paper's form under the code form's name and weight of 1000."""
    return attention_loss(student, teacher, "paper")


@bug(attention, "attention_loss", suite.test_formula_equals_the_reference, {**AT_FORMULA, "options": {"mode": "paper"}})
def at_mean_square_sold_as_the_paper(student, teacher, mode="code"):
    """The authors' code under the paper's name; the two differ (issue 34 of their repository)."""
    return attention_loss(student, teacher, "code")


@bug(attention, "attention_map", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_not_normalised(features):
    """The map's size is matched, not its shape."""
    return full(features).square().mean(1).flatten(1)


@bug(attention, "attention_map", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_normalises_each_channel(features):
    """Every channel map normalised in place of their mean: sseung0703's TensorFlow port."""
    return F.normalize(full(features).flatten(2), dim=2).square().mean(1)


@bug(attention, "attention_map", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_absolute_value_for_square(features):
    """Exponent 1 for 2."""
    return F.normalize(full(features).abs().mean(1).flatten(1), dim=1)


@bug(attention, "attention_map", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_l1_normalised(features):
    """normalize(v, 1): the 1 lands in p, not in dim (torchdistill does so in its SP loss)."""
    return F.normalize(full(features).square().mean(1).flatten(1), 1)


@bug(attention, "attention_loss", suite.test_formula_equals_the_reference, {**AT_FORMULA, "pair": "uneven"})
def at_pools_the_attention_map(student, teacher, mode="code"):
    """Squares first and pools then; the published codes pool the feature map."""
    size = [min(ours, theirs) for ours, theirs in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    energies = [F.adaptive_avg_pool2d(full(x).square().mean(1, keepdim=True), size) for x in (student, teacher)]
    return attention_loss(*(energy.sqrt() for energy in energies), mode)


@bug(AT, "forward", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_averaged_over_the_stages(self, student, teacher, batch=None):
    """A third of the authors' sum, at the sum's weight: KD-Zoo."""
    losses = [attention_loss(student.maps[stage], teacher.maps[stage], self.options.mode) for stage in self.stages]
    return {"at": torch.stack(losses).mean()}


@bug(attention, "attention_map", suite.test_extremes_stay_finite, {**AT_CODE, "extreme": "student's maps zero"})
def at_divides_by_a_norm_of_zero(features):
    """v / ||v|| with nothing that keeps the norm from 0: NaN for a dead map."""
    energy = full(features).square().mean(1).flatten(1)
    return energy / torch.linalg.vector_norm(energy, dim=1, keepdim=True)


@bug(attention, "attention_map", suite.test_gradcheck, AT_CODE)
def at_norm_taken_for_a_constant(features):
    """The norm detached: the right value, the wrong gradient."""
    energy = full(features).square().mean(1).flatten(1)
    return energy / torch.linalg.vector_norm(energy, dim=1, keepdim=True).detach().clamp(min=1e-12)


@bug(attention, "attention_map", suite.test_terms_are_float32_scalars_with_a_weight_each, AT_CODE)
def at_stuck_in_half(features):
    """No float32 anywhere: the loss itself comes out in bf16."""
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


@bug(base, "paired_stages", suite.test_wrong_pair_is_refused_with_the_cure, wrong("at"))
def at_takes_the_stages_it_finds(student, teacher, method):
    """zip() of two lists of unequal length: the missing stage is dropped in silence."""
    return tuple(stage for stage, _ in zip(student.stages, teacher.stages, strict=False))


# fsp

OURS = {"name": "fsp", "options": {}}
FSP_FORMULA = {**OURS, "pair": "even"}


def matrices(pairs, pool):
    return [fsp_matrix(*match_sizes(*pair, pool)) for pair in pairs]


@bug(fsp, "fsp_loss", suite.test_formula_equals_the_reference, {**FSP_FORMULA, "options": {"preset": "log"}})
def fsp_divided_by_three_twice(student, teacher, *, pool="max", reduction="mean"):
    """The mean over three pairs divided by 3 again: the reference log."""
    return fsp_loss(student, teacher, pool=pool, reduction=reduction) / 3


@bug(FSP, "default_weights", test_fsp.test_preset_log_is_the_logs_sum_over_nine)
def fsp_log_at_the_weight_of_ours(options):
    """preset=log with weight 1: three times the loss that the reference log minimised."""
    return {"fsp": 1e-3 if options.reduction == "sum" else 1.0}


@bug(fsp, "match_sizes", suite.test_formula_equals_the_reference, FSP_FORMULA)
def fsp_average_for_maximum(first, second, pool="max"):
    """Average pooling where the paper has maximum: the reference log, KD-Zoo."""
    return match_sizes(first, second, "avg")


@bug(fsp, "fsp_loss", suite.test_formula_equals_the_reference, {**FSP_FORMULA, "options": {"preset": "paper"}})
def fsp_columns_norms_for_squares(student, teacher, *, pool="max", reduction="mean"):
    """L2,1, the sum of the columns' norms, for the sum of squares: torchdistill."""
    pairs = zip(matrices(student, pool), matrices(teacher, pool), strict=True)
    return sum(torch.linalg.vector_norm(theirs - ours, dim=1).sum(1).mean() for ours, theirs in pairs)


@bug(fsp, "fsp_matrix", suite.test_formula_equals_the_reference, FSP_FORMULA)
def fsp_without_h_w(first, second):
    """G not divided by H W: larger by the fourth power of the image's side in the loss."""
    return full(first).flatten(2) @ full(second).flatten(2).transpose(1, 2)


@bug(fsp, "fsp_matrix", suite.test_promise_per_sample, OURS)
def fsp_divided_by_the_batch_once_more(first, second):
    """G over B as well, so that the loss falls with B squared: sseung0703's TensorFlow port."""
    return fsp_matrix(first, second) / len(first)


@bug(fsp, "fsp_loss", suite.test_promise_per_sample, {**OURS, "options": {"reduction": "sum"}})
def fsp_summed_over_the_batch(student, teacher, *, pool="max", reduction="mean"):
    """The squared norm of the whole batch, not its mean over the images."""
    pairs = zip(matrices(student, pool), matrices(teacher, pool), strict=True)
    return sum((theirs - ours).square().sum() for ours, theirs in pairs)


@bug(fsp, "fsp_loss", test_fsp.test_pairs_are_averaged_under_mean_and_added_under_sum)
def fsp_pairs_summed_under_mean(student, teacher, *, pool="max", reduction="mean"):
    """Pairs added whatever the reduction: RepDistiller; three times the loss at the weight of the mean."""
    singles = [fsp_loss([ours], [theirs], pool=pool, reduction=reduction) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(singles).sum()


@bug(fsp, "match_sizes", test_fsp.test_larger_map_is_pooled_to_the_smaller)
def fsp_pools_the_first_map_alone(first, second, pool="max"):
    """A pair whose second map is the larger stays uneven: the reference log, KD-Zoo."""
    return (match_sizes(first, second, pool)[0], second) if first.shape[2] > second.shape[2] else (first, second)


@bug(base, "same_shape", test_fsp.test_loss_refuses_a_teacher_that_would_broadcast, {"channels": 1, "batch": 3})
def fsp_broadcasts_one_channel(student, teacher):
    """A teacher of one channel is compared with every channel of the student, in silence: KD-Zoo."""


@bug(fsp, "fsp_matrix", test_fsp.test_half_precision_maps_of_40_do_not_overflow, {"dtype": torch.float16, "reduction": "mean"})
def fsp_overflows_in_float16(first, second):
    """Divided after the product, in half: inf from activations of about 40 on: KD-Zoo, torchdistill."""
    first, second = first.flatten(2), second.flatten(2)
    return (first @ second.transpose(1, 2) / first.shape[2]).float()


@bug(fsp, "fsp_matrix", suite.test_autocast_does_not_bring_half_back, OURS)
def fsp_brought_back_to_half_by_autocast(first, second):
    """float() before a product that autocast runs in bf16 all the same."""
    first, second = full(first).flatten(2), full(second).flatten(2)
    return (first / first.shape[2]) @ second.transpose(1, 2)


@bug(fsp, "fsp_loss", suite.test_promise_vanishes_at_match, {**OURS, "options": {"pairing": "section"}})
def fsp_one_matrix_transposed(student, teacher, *, pool="max", reduction="mean"):
    """One network's G from first to second, the other's from second to first: equal shapes hide it."""
    swapped = [(second, first) for first, second in teacher]
    return fsp_loss(student, swapped, pool=pool, reduction=reduction)


@bug(fsp, "_same_tensor", suite.test_wrong_pair_is_refused_with_the_cure, wrong("fsp", 3))
def fsp_flow_of_a_layer_to_itself(a, b):
    """A stage of one block has one tensor for both ends; nothing says that its flow is none."""
    return False


original_init = FSP.__init__


@bug(
    FSP,
    "__init__",
    suite.test_gradient_reaches_what_is_requested_and_the_adapters_alone,
    {**OURS, "options": {"adapter": "conv1x1"}, "pair": "wide"},
)
def adapter_in_a_plain_dict(self, *args, **networks):
    """Adapters that the module does not know: no optimiser, device or precision finds them."""
    original_init(self, *args, **networks)
    hidden = dict(self.adapters.items())
    del self.adapters
    self.adapters = hidden


# what is told of the teacher

HEAD_BIAS = dict(zip(("name", "kept", "told"), test_facts.TOLD[1], strict=True))


@bug(ofd, "partial_distance", suite.test_formula_equals_the_reference, {"name": "ofd", "options": {}, "pair": "even"})
def ofd_pulled_up_to_the_margin(student, teacher, margin):
    """The distance counts everywhere: a silent neuron is pulled up to the margin, which it may stay below."""
    target = torch.maximum(full(teacher), margin[:, None, None])
    return (full(student) - target).square().flatten(1).sum(1).mean()


@bug(SRRL, "know", test_facts.test_what_is_told_is_kept_and_not_trained, HEAD_BIAS)
def srrl_without_the_bias_of_the_head(self, facts):
    """features @ head.weight.T: the teacher's classifier without its bias."""
    self.keep(head_weight=facts.head[0], head_bias=torch.zeros_like(facts.head[1]))


@bug(cat_kd, "class_attention", suite.test_formula_equals_the_reference, {"name": "cat_kd", "options": {}, "pair": "even"})
def cat_kd_normalised_over_the_classes(cam, r=2, *, normalise=True):
    """normalize() at its default, dim=1: at every position the classes share a norm, in place of each class's positions."""
    attention = fsp.pooled(full(cam), (r, r), "avg").flatten(2)
    return F.normalize(attention, eps=1e-6) if normalise else attention


@bug(nd, "nd_loss", suite.test_formula_equals_the_reference, {"name": "nd", "options": {}, "pair": "even"})
def nd_blind_to_the_norm(student, teacher, means):
    """Divided by ||e_s|| alone, a cosine: nothing makes the student's embedding as long as the teacher's."""
    return 1 - F.cosine_similarity(full(student), full(means), dim=1).mean()


# composition and registry


@bug(compose.Composed, "forward", suite.test_composition_is_its_parts)
def composition_drops_a_part(self, student, teacher, batch=None):
    """The last part's terms in place of all."""
    found = {}
    for method in self.methods:
        found = method(student, teacher, batch)
    return found


@bug(METHODS._entries, "sobolev", suite.test_every_method_has_a_reference_with_all_that_the_suite_asks)
class method_without_a_reference(Method):  # noqa: N801 (the bug's name)
    """A new method that nobody wrote a formula for."""

    name = "sobolev"


# the teacher's pass


@bug(step, "teach", suite.test_real_networks_learn_and_the_teacher_stays, {"name": "fsp", "options": {}})
def teacher_gets_gradients(teacher, images, precision):
    """No no_grad around the teacher: twice the memory, and a teacher that an optimiser can reach."""
    return teacher(images)
