"""Mistakes where several processes share a batch out. Signatures are those of what they replace."""

from __future__ import annotations

import test_ranks
import test_synchronised
from torch import distributed

from flowdistill.data.batches import ResidentSet
from flowdistill.ranks import Ranks
from flowdistill.runner import plan
from flowdistill.training import synchronised
from flowdistill.training.gathering import _Gathered

from .bug import bug

normalise, batches, Normalised = synchronised.batch_norm, ResidentSet.batches, synchronised._Normalised


@bug(Ranks, "mean_", test_ranks.test_a_mean_over_the_ranks_is_one)
def gradients_of_ranks_added(self, tensors):
    """all_reduce sums, and nobody divides: two processes train at twice the rate."""
    for tensor in tensors:
        distributed.all_reduce(tensor)


@bug(_Gathered, "backward", test_ranks.test_the_gradient_of_what_is_gathered_is_that_of_the_whole_batch, {"world": 2})
@staticmethod
def gathered_without_the_number_of_ranks(ctx, *gradients):
    """Each passes its rows' gradient on, and the mean over the ranks makes half of it: what a plain all_gather with autograd gives."""
    (gradient,) = gradients
    return gradient[ctx.ranks.own(0, len(gradient))], None


@bug(synchronised, "batch_norm", test_synchronised.test_ranks_normalise_as_one_process_does, {"name": "images"})
def running_variance_by_a_ranks_own_count(
    ranks, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """n / (n - 1) with the values of one process, where the variance is that of all."""
    before = running_var.clone()
    y = normalise(ranks, x, running_mean, running_var, weight, bias, training, momentum, eps)
    own, whole = x.numel() // x.shape[1], ranks.world * x.numel() // x.shape[1]
    moved = (running_var - before * (1 - momentum)) * ((whole - 1) / whole * own / (own - 1))
    running_var.copy_(before * (1 - momentum) + moved)
    return y


@bug(synchronised._Normalised, "backward", test_synchronised.test_ranks_normalise_as_one_process_does, {"name": "images"})
@staticmethod
def statistics_of_all_with_a_ranks_own_gradient(ctx, *gradients):
    """The forward pass is synchronised, the backward pass is not: losses agree, weights go elsewhere."""
    ctx.ranks = Ranks()
    return own_backward(ctx, *gradients)


own_backward = Normalised.backward


@bug(ResidentSet, "batches", test_ranks.test_every_image_is_measured_once)
def every_rank_measures_all_images(self, first=0, every=1):
    """The test set is not shared out, and the counts are put together: every image counts once for each process."""
    return batches(self)


@bug(plan, "launched", test_ranks.test_the_number_of_processes_is_covered_where_each_normalises_by_itself)
def runs_of_one_and_two_processes_as_repeats():
    """Small parts of a batch normalise otherwise than the whole, and a table averages both."""
    return Ranks()
