"""Mistakes in what a method remembers from step to step."""

from __future__ import annotations

import test_crd
import test_methods as suite

from flowdistill.methods import crd
from flowdistill.methods.crd import CRD

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
    return crd.words(self.kept("salt"), epoch, indices, self.options.negatives) * self.images >> 32


@bug(crd, "moved", test_crd.test_a_step_moves_the_rows_of_its_images_alone_half_way_and_to_norm_1)
def crd_bank_off_the_sphere(bank, places, latest, momentum):
    """Rows of the bank that are averaged and not brought back to norm 1."""
    return momentum * bank[places] + (1 - momentum) * latest


@bug(crd, "similarities", suite.test_formula_equals_the_reference, CASE)
def crd_exponentials_in_half(anchors, turned, places, temperature):
    """exp(1 / 0.07) under autocast: three digits, and an overflow in float16."""
    half = (anchors.bfloat16() @ turned.bfloat16()).gather(1, places)
    return (half.to(anchors.dtype) / temperature).exp()
