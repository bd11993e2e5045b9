"""wsld: soft labels that count for as much as the student lags behind the teacher.

A cross-entropy, so the loss is not 0 where student equals teacher; its gradient is.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..types import Batch, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, expectation, register, same_shape
from .dkd import given_labels


def wsld_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 times the cross-entropy of the softened probabilities, each sample with a weight of its own, mean over the batch.

    L = T^2/N sum_n w[n] (-sum_k p_t[k] log p_s[k]) with p = softmax(z / T) and w = 1 - exp(-c_s / (c_t + 1e-7)), where c is the
    cross-entropy of the sample with its label at temperature 1. No gradient flows through w. Zhou et al. 2021. Computed in at least
    float32.

    Args:
        student, teacher: [N, K] logits.
        labels: [N] class numbers.
        temperature: T.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    ours, theirs = at_least_float32(student), at_least_float32(teacher)
    error_s, error_t = (F.cross_entropy(logits, labels, reduction="none") for logits in (ours, theirs))
    weight = -(-error_s / (error_t + 1e-7)).expm1()
    log_p_s, log_p_t = (F.log_softmax(logits / temperature, dim=1) for logits in (ours, theirs))
    soft = -expectation(log_p_t, log_p_s)
    return (weight.detach() * soft).mean() * temperature**2


class WSLDOptions(MethodOptions):
    """Options of wsld."""

    T: float = Field(2.0, gt=0, strict=True)  # the authors' code, for ImageNet; cls_KD for CIFAR-100: 4


@register
class WSLD(LogitMethod):
    """kd whose samples count the less, the better the student already knows their labels beside the teacher."""

    name = "wsld"
    paper = Paper(
        "H. Zhou, L. Song, J. Chen, Y. Zhou, G. Wang, J. Yuan, Q. Zhang",
        "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective",
        "ICLR",
        2021,
        "https://arxiv.org/abs/2102.00650",
    )
    terms = ("wsld",)
    vanishes_at_match = False
    uses_labels = True
    Options = WSLDOptions
    options: WSLDOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """2.5, beside a task weight of 1: the authors' alpha, also MMRazor. (cls_KD for CIFAR-100, at temperature 4: 2.25.)"""
        return {"wsld": 2.5}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``wsld``."""
        return {"wsld": wsld_loss(student.logits, teacher.logits, given_labels(batch, self.name), self.options.T)}
