"""The task's loss: what a student learns from the labels, beside what its teacher says. Another task has its loss here."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..methods.base import at_least_float32
from ..types import NO_LABEL, Batch

TASK = "task"  # the cross-entropy with the labels


def task_loss(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor | None:
    """The cross-entropy of logits [N, K] with the labels: L(y) = -mean_n sum_k q_nk log p_nk, q_nk = (1 - e) [k = y_n] + e / K.

    e is ``smoothing``: label smoothing, Szegedy et al. 2016 (Rethinking the Inception Architecture), section 7, with uniform u(k). For
    mixed images with targets it is share L(own) + (1 - share) L(partner's), Zhang et al., ICLR 2018, the authors' code. The mean is over
    the images that have a label; it is 0 if none of the batch has one. None if the step knows no labels at all. Computed in at least
    float32.

    With weights w of the classes it is torch's weighted cross-entropy: sum_n sum_k w_k q_nk (-log p_nk), divided by sum_n w_(y_n). For
    mixed images, where q is no class but a distribution, it is divided by the number of images, as torch does for probabilities.
    """

    def summed(labels: Tensor, reduction: str = "sum") -> Tensor:
        values, weights = at_least_float32(logits), None if batch.targets is None else batch.targets.weights
        weights = None if weights is None else weights.to(values.dtype)
        return F.cross_entropy(values, labels, weights, ignore_index=NO_LABEL, label_smoothing=smoothing, reduction=reduction)

    if batch.targets is None:
        return None if batch.labels is None else summed(batch.labels, "mean")
    labels, counted, partners, share, _ = batch.targets
    total = summed(labels)
    if partners is not None and share is not None:
        total = (share * total + (1 - share) * summed(partners)).squeeze()
    return total / counted
