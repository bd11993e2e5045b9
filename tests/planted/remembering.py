"""Mistakes in what a method remembers, in what two students tell each other, and in what ships."""

from __future__ import annotations

import test_crd
import test_methods as suite
import test_mutual
import test_reused
import test_seed_kd
import torch

from flowdistill.methods import crd, dml, seed_kd
from flowdistill.methods.crd import CRD
from flowdistill.methods.kd import kd_loss
from flowdistill.methods.seed_kd import SEED, similarity_loss
from flowdistill.models.reused import Reused
from flowdistill.runner import plan

from .bug import bug

CASE = {"name": "crd", "options": {"negatives": 7, "dim": 6}, "pair": "even"}


@bug(crd, "nce_loss", suite.test_formula_equals_the_reference, CASE)
def crd_noise_of_the_batch(scores, images):
    """K/N with the batch for the training set: what sharded data sets give when each rank counts its own images."""
    noise = (scores.shape[1] - 1) / len(scores)
    positive, negative = scores[:, 0], scores[:, 1:]
    return -((positive / (positive + noise)).log() + (noise / (negative + noise)).log().sum(1)).mean()


@bug(CRD, "negatives", test_crd.test_negatives_are_all_images_of_other_classes_alike)
def crd_negatives_of_any_class(self, labels, indices, epoch):
    """Images of the own class among the negatives: a sampler that was given no labels."""
    return crd.words(self.held("salt"), epoch, indices, self.options.negatives) * self.images >> 32


@bug(crd, "moved", test_crd.test_a_step_moves_the_rows_of_its_images_alone_half_way_and_to_norm_1)
def crd_bank_off_the_sphere(bank, rows, latest, momentum):
    """Rows of the bank that are averaged and not brought back to norm 1."""
    return momentum * bank[rows] + (1 - momentum) * latest


@bug(crd, "similarities", suite.test_formula_equals_the_reference, CASE)
def crd_exponentials_in_half(anchors, transposed, rows, temperature):
    """exp(1 / 0.07) under autocast: three digits, and an overflow in float16."""
    half = (anchors.bfloat16() @ transposed.bfloat16()).gather(1, rows)
    return (half.to(anchors.dtype) / temperature).exp()


QUEUE = {"name": "seed_kd", "options": {"queue": 7}, "pair": "even"}


@bug(seed_kd, "similarity_loss", suite.test_formula_equals_the_reference, QUEUE)
def seed_kd_of_the_queue_alone(student, teacher, transposed, temperature, teacher_temperature):
    """The image's own embedding left out of what it is compared with."""
    log_s, log_t = (student @ transposed / temperature).log_softmax(1), (teacher @ transposed / teacher_temperature).log_softmax(1)
    return -(log_t.exp() * log_s).sum(1).mean()


SOFT = {"name": "seed_kd", "options": {"queue": 2, "T_teacher": 0.5}, "pair": "even"}  # at 0.01 these labels are hard to nine digits


@bug(seed_kd, "similarity_loss", suite.test_formula_equals_the_reference, SOFT)
def seed_kd_with_hard_labels(student, teacher, transposed, temperature, teacher_temperature):
    """The authors' code at its default temperature for the teacher, 0.0001."""
    return similarity_loss(student, teacher, transposed, temperature, 1e-4)


original_seed = SEED.forward


@bug(SEED, "forward", test_seed_kd.test_each_batch_takes_the_place_of_the_oldest_rows)
def seed_kd_writes_over_the_same_rows(self, student, teacher, batch=None):
    """A place in the queue that nobody moves on: all but the first rows stay random."""
    self.held("oldest").zero_()
    return original_seed(self, student, teacher, batch)


@bug(SEED, "forward", suite.test_formula_equals_the_reference, QUEUE)
def seed_kd_moves_its_queue_first(self, student, teacher, batch=None):
    """Each image is in the queue already when it is compared with it."""
    with torch.no_grad():
        original_seed(self, student, teacher, batch)
    return original_seed(self, student, teacher, batch)


DML = {"name": "dml", "options": {}, "pair": "even"}


@bug(dml, "mutual_loss", suite.test_gradient_reaches_what_is_requested_and_the_adapters_alone, DML)
def dml_without_detach(student, peer):
    """Each loss also moves the other network."""
    return kd_loss(student, peer, 1.0)


@bug(dml, "mutual_loss", suite.test_formula_equals_the_reference, DML)
def dml_direction_reversed(student, peer):
    """KL(q || p): the two arguments of kl_div changed over."""
    log_q, log_p = student.log_softmax(1), peer.detach().log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()


@bug(plan, "weights_seed", test_mutual.test_two_of_one_model_begin_from_different_weights_and_the_first_where_a_plain_run_does)
def dml_twins(config):
    """Both networks from one seed: they agree from the first step to the last and teach each other nothing."""
    return config.seed


original_take_over = Reused.take_over


@bug(Reused, "take_over", test_reused.test_simkd_trains_body_and_projector_and_leaves_the_teachers_classifier)
def simkd_with_a_classifier_of_its_own(self, student, teacher):
    """A frozen classifier that is not the teacher's: nothing trains it, and the accuracy is chance."""
    own = {name: value.clone() for name, value in self.classifier.state_dict().items()}
    original_take_over(self, student, teacher)
    self.classifier.load_state_dict(own)
