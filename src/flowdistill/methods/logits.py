"""logits: regression on the teacher's logits.

This is the mean over batch and classes, as KD-Zoo has it. The paper sums over the classes and halves: K/2 times as much.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..taps import Batch, Outputs
from .base import LogitMethod, Paper, full, register, same_shape


def logits_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits over batch and classes: L = 1/(N K) sum_{n,k} (z_s - z_t)^2.

    Ba and Caruana 2014, section 2.2, write 1/(2N) sum_n ||z_s - z_t||^2, which is K/2 times this. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    return F.mse_loss(full(student), full(teacher))


@register
class Logits(LogitMethod):
    """The student's logits are pulled to the teacher's."""

    name = "logits"
    paper = Paper("J. Ba, R. Caruana", "Do Deep Nets Really Need to be Deep?", "NIPS", 2014, "https://arxiv.org/abs/1312.6184")
    terms = ("logits",)
    probabilities = False

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1: the reference log, whose own variant regresses the pooled embedding. (KD-Zoo: 0.1 on the logits.)"""
        return {"logits": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``logits``."""
        return {"logits": logits_loss(student.logits, teacher.logits)}
