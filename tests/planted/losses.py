"""Mistakes in the losses. Every mistake replaces one function of the package and has its signature."""

from __future__ import annotations

import math

import test_fsp
import test_golden
import test_limits
import test_method_context
import test_methods as suite
import torch
import torch.nn.functional as F

from flowdistill.methods import (
    METHODS,
    Method,
    ab,
    attention,
    base,
    cat_kd,
    cc,
    compose,
    ctkd,
    cwd,
    dist,
    dkd,
    fitnets,
    fsp,
    ft,
    ickd,
    irg,
    itrd,
    kd,
    kdsvd,
    logits,
    mgd,
    mlkd,
    nd,
    nkd,
    nst,
    ofd,
    pkt,
    radio,
    reviewkd,
    rkd,
    sp,
    srd,
    standardise,
    tf_kd,
    ttm,
    vid,
    wsld,
    wttm,
)
from flowdistill.methods.ab import boundary_loss
from flowdistill.methods.attention import AT, attention_loss
from flowdistill.methods.base import at_least_float32
from flowdistill.methods.dist import relations
from flowdistill.methods.dkd import other_logits
from flowdistill.methods.fsp import FSP, fsp_loss, fsp_matrix, match_sizes
from flowdistill.methods.ft import ft_loss
from flowdistill.methods.ickd import ickd_loss
from flowdistill.methods.itrd import mutual_loss
from flowdistill.methods.kd import kd_loss
from flowdistill.methods.logits import logits_loss
from flowdistill.methods.nst import nst_loss
from flowdistill.methods.pefd import PEFD
from flowdistill.methods.reviewkd import hierarchical_context_loss
from flowdistill.methods.srd import log_sum_loss, normalised
from flowdistill.methods.srrl import SRRL
from flowdistill.methods.tf_kd import tf_kd_loss
from flowdistill.methods.ttm import ttm_loss
from flowdistill.methods.vid import vid_loss
from flowdistill.training import teacher

from .bug import bug


def formula(name, **options):
    """A method, with these options of its cases, on networks of one shape."""
    return {"name": name, "options": options, "pair": "even"}


def option_set(name, **options):
    """The same, for a check that tries one pair."""
    return {"name": name, "options": options}


# kd

KD = {"name": "kd", "options": {}}
KD_FORMULA = {**KD, "pair": "even"}


def wrong(name, number=0):
    """A pair that a method must refuse."""
    return dict(zip(suite.WRONG_NAMES, [case for case in suite.WRONG if case[0] == name][number], strict=True))


@bug(kd, "kd_loss", suite.test_formula_equals_the_reference, KD_FORMULA)
def kd_without_t_squared(student, teacher, temperature=4.0):
    """No factor T^2: torchdistill where targets are None, the keras.io example, distiller before issue 122."""
    log_s, log_t = ((at_least_float32(z) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


@bug(kd, "kd_loss", suite.test_formula_equals_the_reference, KD_FORMULA)
def kd_direction_reversed(student, teacher, temperature=4.0):
    """KL(p_s || p_t): the two arguments of kl_div changed over."""
    log_s, log_t = ((at_least_float32(z) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_t, log_s, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_formula_equals_the_reference, KD_FORMULA)
def kd_mean_over_elements(student, teacher, temperature=4.0):
    """nn.KLDivLoss() at its default, K times smaller: Tf-KD."""
    log_s, log_t = ((at_least_float32(z) / temperature).log_softmax(1) for z in (student, teacher))
    return torch.nn.KLDivLoss(reduction="none", log_target=True)(log_s, log_t).mean() * temperature**2


@bug(kd, "kd_loss", suite.test_promise_per_sample, KD)
def kd_summed_over_the_batch(student, teacher, temperature=4.0):
    """reduction="sum" without the division by N: the loss grows with the batch."""
    log_s, log_t = ((at_least_float32(z) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_promise_per_sample, KD)
def kd_softmax_over_the_batch(student, teacher, temperature=4.0):
    """dim=0 for dim=1: the images of a batch compete, not the classes."""
    log_s, log_t = ((at_least_float32(z) / temperature).log_softmax(0) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_extremes_stay_finite, {**KD, "extreme": "logits x 1e3"})
def kd_log_of_softmax(student, teacher, temperature=4.0):
    """log(softmax(z)) for log_softmax(z): -inf as soon as a probability is 0."""
    p_s, p_t = ((at_least_float32(z) / temperature).softmax(1) for z in (student, teacher))
    return (p_t * (p_t.log() - p_s.log())).sum(1).mean() * temperature**2


@bug(kd, "kd_loss", suite.test_promise_vanishes_at_match, KD)
def kd_cross_entropy_sold_as_kl(student, teacher, temperature=4.0):
    """-sum p_t log p_s: the same gradient, but not 0 at a perfect match: cls_KD."""
    return F.cross_entropy(at_least_float32(student) / temperature, (at_least_float32(teacher) / temperature).softmax(1)) * temperature**2


@bug(kd, "kd_loss", suite.test_promise_vanishes_at_match, KD)
def kd_temperature_on_one_side(student, teacher, temperature=4.0):
    """The student's logits are not divided by T: Tf-KD's loss_kd_regularization."""
    log_s, log_t = at_least_float32(student).log_softmax(1), (at_least_float32(teacher) / temperature).log_softmax(1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_half_is_for_storage_and_never_for_arithmetic, {**KD_FORMULA, "dtype": torch.bfloat16})
def kd_computed_in_half(student, teacher, temperature=4.0):
    """Softmax and sum in the dtype that comes in, the result made float32 at the end."""
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True).float() * temperature**2


@bug(kd, "kd_loss", suite.test_inputs_are_left_as_they_were, KD)
def kd_divides_its_inputs_in_place(student, teacher, temperature=4.0):
    """div_ for /: the cross-entropy that comes after sees logits over T."""
    log_s, log_t = (at_least_float32(z).div_(temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_gradient_reaches_what_is_requested_and_the_adapters_alone, KD_FORMULA)
def kd_student_detached(student, teacher, temperature=4.0):
    """.data on the wrong side: the loss is printed and trains nothing."""
    log_s, log_t = ((at_least_float32(z.data) / temperature).log_softmax(1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


@bug(kd, "kd_loss", suite.test_compiled_equals_eager, KD, refusal="Data-dependent")
def kd_reads_its_loss_back(student, teacher, temperature=4.0):
    """A branch on the loss's value: waits for the device at every step and can't be compiled whole."""
    log_s, log_t = ((at_least_float32(z) / temperature).log_softmax(1) for z in (student, teacher))
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
    return (at_least_float32(student) - at_least_float32(teacher)).square().sum(1).mean()


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
    return at_least_float32(features).square().mean(1).flatten(1)


@bug(attention, "attention_map", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_normalises_each_channel(features):
    """Every channel map normalised in place of their mean: sseung0703's TensorFlow port."""
    return F.normalize(at_least_float32(features).flatten(2), dim=2).square().mean(1)


@bug(attention, "attention_map", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_absolute_value_for_square(features):
    """Exponent 1 for 2."""
    return F.normalize(at_least_float32(features).abs().mean(1).flatten(1), dim=1)


@bug(attention, "attention_map", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_l1_normalised(features):
    """normalize(v, 1): the 1 lands in p, not in dim (torchdistill does so in its SP loss)."""
    return F.normalize(at_least_float32(features).square().mean(1).flatten(1), 1)


@bug(attention, "attention_loss", suite.test_formula_equals_the_reference, {**AT_FORMULA, "pair": "uneven"})
def at_pools_the_attention_map(student, teacher, mode="code"):
    """Squares first and pools then; the published codes pool the feature map."""
    size = [min(ours, theirs) for ours, theirs in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    energies = [F.adaptive_avg_pool2d(at_least_float32(x).square().mean(1, keepdim=True), size) for x in (student, teacher)]
    return attention_loss(*(energy.sqrt() for energy in energies), mode)


@bug(AT, "forward", suite.test_formula_equals_the_reference, AT_FORMULA)
def at_averaged_over_the_stages(self, student, teacher, batch=None):
    """A third of the authors' sum, at the sum's weight: KD-Zoo."""
    losses = [attention_loss(student.maps[stage], teacher.maps[stage], self.options.mode) for stage in self.stages]
    return {"at": torch.stack(losses).mean()}


@bug(attention, "attention_map", suite.test_extremes_stay_finite, {**AT_CODE, "extreme": "student's maps zero"})
def at_divides_by_a_norm_of_zero(features):
    """v / ||v|| with nothing that keeps the norm from 0: NaN for a dead map."""
    energy = at_least_float32(features).square().mean(1).flatten(1)
    return energy / torch.linalg.vector_norm(energy, dim=1, keepdim=True)


@bug(attention, "attention_map", suite.test_gradcheck, AT_CODE)
def at_norm_taken_for_a_constant(features):
    """The norm detached: the right value, the wrong gradient."""
    energy = at_least_float32(features).square().mean(1).flatten(1)
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
    return at_least_float32(first).flatten(2) @ at_least_float32(second).flatten(2).transpose(1, 2)


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
    first, second = at_least_float32(first).flatten(2), at_least_float32(second).flatten(2)
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


# dkd, dist, nkd, mlkd, wsld, tf_kd, ctkd, ls


@bug(dkd, "decoupled", suite.test_extremes_stay_finite, {**option_set("dkd"), "extreme": "logits x 1e3"})
def dkd_logarithms_of_probabilities(student, teacher, labels, temperature=4.0):
    """log of the probabilities of the target and of all others: NaN as soon as one of them is 0: mdistiller."""
    scaled = [at_least_float32(z) / temperature for z in (student, teacher)]
    target_s, target_t = (z.softmax(1).gather(1, labels[:, None]) for z in scaled)
    b_s, b_t = (torch.cat([p, 1 - p], 1) for p in (target_s, target_t))
    log_q_s, log_q_t = (other_logits(z, labels).log_softmax(1) for z in scaled)
    target, others = b_t * (b_t.log() - b_s.log()), log_q_t.exp() * (log_q_t - log_q_s)
    return dkd.Decoupled(target.sum(1) * temperature**2, others.sum(1) * temperature**2)


@bug(dist, "dist_loss", suite.test_formula_equals_the_reference, formula("dist"))
def dist_without_t_squared(student, teacher, temperature=4.0, beta=1.0, gamma=1.0):
    """The appendix of the paper under the name of the authors' code: 16 times smaller at T = 4."""
    found = relations(student, teacher, temperature)
    return beta * found.inter + gamma * found.intra


@bug(nkd, "nkd_loss", suite.test_formula_equals_the_reference, formula("nkd"))
def nkd_others_not_normalised(student, teacher, labels, temperature=3.0, gamma=3.5):
    """The other classes with the probabilities that the whole softmax gives them: the N of nkd left out."""
    ours, theirs = at_least_float32(student), at_least_float32(teacher)
    target = theirs.softmax(1).gather(1, labels[:, None]) * ours.log_softmax(1).gather(1, labels[:, None])
    soft = (theirs / temperature).softmax(1) * (ours / temperature).log_softmax(1)
    others = soft.sum(1) - soft.gather(1, labels[:, None]).squeeze(1)
    return -(target.squeeze(1) + gamma * temperature**2 * others).mean()


@bug(mlkd, "_similarity_loss", suite.test_autocast_does_not_bring_half_back, option_set("mlkd"))
def mlkd_similarities_in_half(student, teacher):
    """Products of probabilities that autocast takes back to bf16."""
    return (teacher @ teacher.T - student @ student.T).square().sum() / len(student)


@bug(wsld, "wsld_loss", suite.test_gradcheck, option_set("wsld"))
def wsld_learns_its_own_weight(student, teacher, labels, temperature=2.0):
    """No detach: the student lowers the loss by lowering what it counts for."""
    ours, theirs = at_least_float32(student), at_least_float32(teacher)
    error_s, error_t = (F.cross_entropy(z, labels, reduction="none") for z in (ours, theirs))
    soft = F.cross_entropy(ours / temperature, (theirs / temperature).softmax(1), reduction="none")
    return ((1 - (-error_s / (error_t + 1e-7)).exp()) * soft).mean() * temperature**2


@bug(tf_kd, "tf_kd_loss", suite.test_formula_equals_the_reference, formula("tf_kd"))
def tf_kd_summed_over_the_classes(student, labels, temperature=20.0, sure=0.99, mode="code"):
    """batchmean at the weight of the authors' mean over batch and classes: K times the loss."""
    return tf_kd_loss(student, labels, temperature, sure, mode) * (student.shape[1] if mode == "code" else 1)


@bug(ctkd, "scaled_gradient", test_golden.test_value_is_met, {"key": "ctkd/theta_grad_epoch5"})
def ctkd_temperature_learns_with_the_student(x, factor):
    """No reversal of the gradient: the temperature makes the loss small, not hard."""
    return x


@bug(standardise, "standardise", suite.test_formula_equals_the_reference, formula("ls:kd"))
def ls_divided_by_all_classes(logits):
    """The standard deviation divided by K, as numpy and layer normalisation have it, not by K - 1."""
    values = at_least_float32(logits)
    return (values - values.mean(1, keepdim=True)) / (values.std(1, correction=0, keepdim=True) + 1e-7)


# fitnets, cwd, mgd, ickd, ft, nst, vid, reviewkd, pefd, radio, kdsvd, ab


@bug(fitnets, "hint_loss", suite.test_formula_equals_the_reference, formula("fitnets"))
def fitnets_half_the_squared_norm(student, teacher):
    """The paper's 1/2 ||r - t||^2, C H W / 2 times larger, at the weight of the mean."""
    return (at_least_float32(student) - at_least_float32(teacher)).square().flatten(1).sum(1).mean() / 2


@bug(cwd, "cwd_loss", suite.test_formula_equals_the_reference, formula("cwd"))
def cwd_softmax_over_the_channels(student, teacher, tau=4.0):
    """dim=1 of a map: which channel is active at a place, not at which place a channel is."""
    log_s, log_t = ((at_least_float32(x) / tau).log_softmax(1) for x in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * tau**2 / log_s[:, :, 0, 0].numel()


@bug(mgd, "generation_loss", suite.test_formula_equals_the_reference, formula("mgd"))
def mgd_mean_over_the_map(generated, teacher):
    """nn.MSELoss() at its default, C H W times smaller, at the weight of the sum."""
    return F.mse_loss(at_least_float32(generated), at_least_float32(teacher))


@bug(ickd, "ickd_loss", suite.test_promise_per_sample, option_set("ickd"))
def ickd_divided_by_the_batch_once_more(student, teacher):
    """The loss falls with the batch: the authors' code for ImageNet, torchdistill."""
    return ickd_loss(student, teacher) / len(student)


@bug(ft, "ft_loss", suite.test_formula_equals_the_reference, formula("ft", p=2))
def ft_norm_not_squared(student, teacher, p=1):
    """p = 2 taken for the norm of the difference, not its mean square: torchdistill."""
    if p == 1:
        return ft_loss(student, teacher, p)
    ours, theirs = (F.normalize(at_least_float32(x).flatten(1), dim=1) for x in (student, teacher))
    return torch.linalg.vector_norm(ours - theirs, dim=1).mean()


@bug(nst, "nst_loss", suite.test_promise_vanishes_at_match, option_set("nst"))
def nst_without_the_teachers_term(student, teacher):
    """The constant left out, so that the value is negative and 0 is no match: the authors' code."""
    theirs = F.normalize(at_least_float32(teacher).flatten(2), dim=2)
    return nst_loss(student, teacher) - (theirs @ theirs.transpose(1, 2)).square().mean()


@bug(vid, "vid_loss", suite.test_gradient_reaches_what_is_requested_and_the_adapters_alone, formula("vid"))
def vid_variance_stays_at_its_start(mean, teacher, variance):
    """A variance that nothing trains: mdistiller, whose optimiser does not get it."""
    return vid_loss(mean, teacher, variance.detach())


@bug(reviewkd, "hierarchical_context_loss", suite.test_formula_equals_the_reference, formula("reviewkd"))
def reviewkd_weights_not_divided_by_their_sum(fused, teacher):
    """The grids added to the map: up to 1.9 times the loss."""
    grids = sum(0.5**i for i, size in enumerate((4, 2, 1), 1) if size < fused.shape[2])
    return hierarchical_context_loss(fused, teacher) * (1 + grids)


original_pefd = PEFD.__init__


@bug(PEFD, "__init__", suite.test_gradient_reaches_what_is_requested_and_the_adapters_alone, formula("pefd"))
def pefd_with_a_projector_that_nobody_uses(self, *args, **networks):
    """One projector more than the loss takes, which weight decay alone moves: the authors' code."""
    original_pefd(self, *args, **networks)
    self.spare = torch.nn.Linear(2, 2)


@bug(radio, "vectors", suite.test_formula_equals_the_reference, formula("radio"))
def radio_one_cosine_for_the_whole_map(x):
    """The map flattened to one vector per image: Theia's cosine."""
    return x.flatten(1)


STRETCHED = {"name": "radio", "options": {"features": "dense", "stages": "all", "dense_l1": 0.6}, "pair": "uneven"}


@bug(radio, "interpolated", suite.test_formula_equals_the_reference, STRETCHED)
def radio_corners_aligned(x, size):
    """The outermost positions of both maps taken for the same place, which moves all others by up to half a position."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


@bug(kdsvd, "_aligned", suite.test_formula_equals_the_reference, formula("kdsvd"))
def kdsvd_signs_left_to_lapack(vectors, wanted):
    """The nearest singular vector, whichever way it points: a decomposition's whim moves the loss."""
    nearest = (wanted.transpose(1, 2) @ vectors).abs().argmax(2, keepdim=True)
    return vectors.gather(2, nearest.transpose(1, 2).expand_as(wanted))


@bug(ab, "ab_loss", suite.test_formula_equals_the_reference, formula("ab"))
def ab_without_its_thousandths(student, teacher, margin=1.0):
    """No factor 3/1000: torchdistill."""
    losses = [boundary_loss(s, t, margin) for s, t in zip(student, teacher, strict=True)]
    return sum(loss * 2.0 ** (i - len(losses)) for i, loss in enumerate(losses, 1))


# sp, pkt, rkd, cc, irg


@bug(sp, "similarity", suite.test_formula_equals_the_reference, formula("sp"))
def sp_rows_divided_by_their_sum(features):
    """normalize(G, 1): the 1 lands in p, not in dim: torchdistill."""
    flat = at_least_float32(features).flatten(1)
    return F.normalize(flat @ flat.T, 1)


@bug(pkt, "pkt_loss", suite.test_formula_equals_the_reference, formula("pkt"))
def pkt_divided_by_the_batch_once(student, teacher, eps=1e-7):
    """batchmean, as the divergence of rows asks, where every published code has the mean over N^2."""
    ours, theirs = pkt.neighbours(student, eps), pkt.neighbours(teacher, eps)
    return (theirs * ((theirs + eps) / (ours + eps)).log()).sum(1).mean()


@bug(rkd, "distances", suite.test_promise_per_sample, option_set("rkd"))
def rkd_distances_from_a_gram_matrix(embedding):
    """Kept from 0 by 1e-12 before the root, so that equal samples are apart and count in the mean: the authors' code."""
    gram = at_least_float32(embedding) @ at_least_float32(embedding).T
    square = gram.diagonal()
    apart = (square[:, None] + square - 2 * gram).clamp(min=1e-12).sqrt()
    return apart * (1 - torch.eye(len(apart), dtype=apart.dtype))


@bug(cc, "correlation", suite.test_formula_equals_the_reference, formula("cc"))
def cc_without_the_normalisation(embedding, gamma=0.4, order=2):
    """The Taylor series of a Gaussian kernel, which holds for unit vectors, on embeddings as they are: torchdistill."""
    inner = at_least_float32(embedding) @ at_least_float32(embedding).T
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    return sum(factor * inner**p for p, factor in enumerate(factors))


@bug(irg, "_by_largest", suite.test_gradcheck, option_set("irg"))
def irg_largest_held_constant(values):
    """The maximum detached: the right value, the wrong gradient: the authors' Caffe code."""
    largest = values.amax().detach()
    return values / largest.where(largest > 0, 1)


# ttm, wttm


@bug(ttm, "ttm_loss", suite.test_formula_equals_the_reference, formula("ttm"))
def ttm_temperature_on_both_sides(student, teacher, temperature=5.0):
    """The student softened too: kd, at ttm's weight."""
    return kd_loss(student, teacher, temperature)


@bug(ttm, "ttm_loss", suite.test_formula_equals_the_reference, formula("ttm"))
def ttm_with_t_squared(student, teacher, temperature=5.0):
    """kd's factor T^2, though no gradient shrank: 25 times the loss at T = 5."""
    return ttm_loss(student, teacher, temperature) * temperature**2


@bug(wttm, "power_sum", suite.test_formula_equals_the_reference, formula("wttm"))
def wttm_power_sum_after_the_normalisation(teacher, temperature):
    """The weights are summed from p_T, which sums to 1: ttm under wttm's name."""
    return (at_least_float32(teacher) / temperature).softmax(1).sum(1)


@bug(wttm, "power_sum", suite.test_extremes_stay_finite, {**option_set("wttm"), "extreme": "logits x 1e3"})
def wttm_power_sum_of_the_logits(teacher, temperature):
    """exp(z / T) summed without the softmax before it: the weight is inf for large logits."""
    return (at_least_float32(teacher) / temperature).exp().sum(1)


# srd, itrd


@bug(srd, "log_sum_loss", suite.test_formula_equals_the_reference, formula("srd"))
def srd_without_the_logarithm(projected, teacher, alpha=4.0):
    """The sum of fourth powers itself, thousands at the logarithm's weight."""
    return (normalised(projected) - normalised(teacher)).abs().pow(alpha).sum()


@bug(srd, "log_sum_loss", suite.test_formula_equals_the_reference, formula("srd"))
def srd_exponent_one(projected, teacher, alpha=4.0):
    """The exponent left at a default of 1: torchdistill's class."""
    return log_sum_loss(projected, teacher, 1.0)


@bug(srd, "log_sum_loss", suite.test_extremes_stay_finite, {**option_set("srd"), "extreme": "a batch of one"})
def srd_logarithm_of_zero(projected, teacher, alpha=4.0):
    """Nothing that keeps the sum from 0, so -inf where both sides are normalised to zeros: the authors' code for ResNets."""
    return (normalised(projected) - normalised(teacher)).abs().pow(alpha).sum().log()


@bug(itrd, "mutual_loss", suite.test_formula_equals_the_reference, formula("itrd", correlation=0.5, mutual=20.0))
def itrd_gram_not_divided_by_its_trace(student, teacher):
    """Gram matrices as they are: N^2 times the loss."""
    ours = itrd.cosines(student)
    return (ours.square() - (ours * itrd.cosines(teacher)).square()).sum()


@bug(itrd, "mutual_loss", suite.test_formula_equals_the_reference, formula("itrd"))
def itrd_mutual_information_minimised(student, teacher):
    """The sign reversed, so that training unlearns what the two share: a port for medical images."""
    return -mutual_loss(student, teacher)


@bug(itrd, "correlation_loss", suite.test_extremes_stay_finite, {**option_set("itrd"), "extreme": "a batch of one"})
def itrd_divides_by_a_deviation_of_zero(projected, teacher, alpha=1.01):
    """(x - mean) / std with nothing that keeps std from 0: NaN for a constant dimension or a batch of one: the authors' code."""
    ours, theirs = (
        (at_least_float32(x) - at_least_float32(x).mean(0)) / at_least_float32(x).std(0, correction=0) for x in (projected, teacher)
    )
    return (1 - (1 - 1 / len(projected)) * (ours * theirs).mean(0)).pow(2 * alpha).sum().log2()


# what is told of the teacher

HEAD_BIAS = dict(zip(("name", "kept", "told"), test_method_context.TOLD[1], strict=True))


@bug(ofd, "partial_distance", suite.test_formula_equals_the_reference, {"name": "ofd", "options": {}, "pair": "even"})
def ofd_pulled_up_to_the_margin(student, teacher, margin):
    """The distance counts everywhere: a silent neuron is pulled up to the margin, which it may stay below."""
    target = torch.maximum(at_least_float32(teacher), margin[:, None, None])
    return (at_least_float32(student) - target).square().flatten(1).sum(1).mean()


@bug(SRRL, "setup", test_method_context.test_what_is_told_is_kept_and_not_trained, HEAD_BIAS)
def srrl_without_the_bias_of_the_head(self, context):
    """features @ head.weight.T: the teacher's classifier without its bias."""
    self.hold(head_weight=context.head[0], head_bias=torch.zeros_like(context.head[1]))


@bug(cat_kd, "class_attention", suite.test_formula_equals_the_reference, {"name": "cat_kd", "options": {}, "pair": "even"})
def cat_kd_normalised_over_the_classes(cam, r=2, *, normalise=True):
    """normalize() at its default, dim=1: at every position the classes share a norm, in place of each class's positions."""
    attention = fsp.pooled(at_least_float32(cam), (r, r), "avg").flatten(2)
    return F.normalize(attention, eps=1e-6) if normalise else attention


@bug(nd, "nd_loss", suite.test_formula_equals_the_reference, {"name": "nd", "options": {}, "pair": "even"})
def nd_blind_to_the_norm(student, teacher, means):
    """Divided by ||e_s|| alone, a cosine: nothing makes the student's embedding as long as the teacher's."""
    return 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(means), dim=1).mean()


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


@bug(teacher, "teach", suite.test_real_networks_learn_and_the_teacher_stays, {"name": "fsp", "options": {}})
def teacher_gets_gradients(teacher, images, precision):
    """No no_grad around the teacher: twice the memory, and a teacher that an optimiser can reach."""
    return teacher(images)


@bug(base, "divergence", test_limits.test_kd_of_a_masked_class_by_hand)
def zero_times_minus_infinity(log_q, log_p):
    """F.kl_div of logarithms, as kd is written everywhere: a class that the teacher never says gives NaN."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


CLOSE_ANGLES = {"spread": 1e-4}


@bug(rkd, "angles", test_limits.test_angles_of_wide_embeddings_nearly_alike, CLOSE_ANGLES)
def angles_from_a_gram_matrix(embedding):
    """Inner products of differences as differences of inner products: of two images nearly alike the rounding is left."""
    centred = at_least_float32(embedding) - at_least_float32(embedding).mean(0)
    gram = centred @ centred.T
    inner = gram - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    apart = rkd.distances(embedding)
    scale = torch.where(apart > 0, 1 / apart.where(apart > 0, 1), 0)
    return inner * scale[:, :, None] * scale[:, None, :]


@bug(base, "unit", test_limits.test_the_scale_of_a_map_is_nothing_to_what_compares_directions, {"name": "sp", "factor": 1e-4})
def norms_kept_from_zero_by_a_millionth(x, dim, min_norm=1e-12):
    """1e-6 on the norm of a Gram matrix's row, which is the map's scale squared: small maps have small directions."""
    return F.normalize(x, dim=dim, eps=1e-6)


@bug(dist, "varies", test_limits.test_what_is_no_number_is_not_hidden, {"name": "dist", "options": {}})
def nan_taken_for_a_constant(x, dim):
    """A comparison with NaN is false: a class that is NaN in one image counts as one that never changes, and the loss stays finite."""
    return x.amax(dim) > x.amin(dim)


@bug(
    fitnets.FitNets,
    "__init__",
    test_limits.test_the_hint_is_the_second_stage_or_the_only_one,
    {"count": 4, "stage": "stage2", "version": 2},
)
def hint_in_the_middle(self, options=None, *, student, teacher, **_):
    """The middle of the stages is the third of four, where every source of the weight takes the second."""
    Method.__init__(self, options)
    self.stage = student.stages[len(student.stages) // 2]
    self.needs = base.Needs(frozenset({self.stage}), frozenset({self.stage}))
    self.regressor = torch.nn.Sequential()
