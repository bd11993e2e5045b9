"""wttm: weighted transformed teacher matching. ttm, with more weight on the samples whose teacher is less sure."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..types import Batch, Outputs
from .base import LogitMethod, at_least_float32, register
from .ttm import PAPER, TTMOptions, divergences


def power_sum(teacher: Tensor, temperature: float) -> Tensor:
    """U = sum_k p[k]^(1/T) with p = softmax(z): [N, K] logits -> [N], from 1 for a sure teacher to K^(1 - 1/T) for one without a clue.

    Zheng and Yang 2024, section 4. Computed in at least float32.
    """
    return (F.log_softmax(at_least_float32(teacher), dim=1) / temperature).logsumexp(1).exp()


def wttm_loss(student: Tensor, teacher: Tensor, temperature: float = 5.0) -> Tensor:
    """``ttm_loss`` with a weight per sample, the teacher's ``power_sum``: L = 1/N sum_n U_n KL(p_T || q)_n.

    Zheng and Yang 2024, section 4 and algorithm 1. The weights are not normalised. Arguments and errors are those of ``ttm_loss``.
    """
    return (power_sum(teacher, temperature) * divergences(student, teacher, temperature)).mean()


@register
class WTTM(LogitMethod):
    """The student, at temperature 1, matches the softened teacher, above all where the teacher is unsure."""

    name = "wttm"
    paper = PAPER
    terms = ("wttm",)
    vanishes_at_match = False
    Options = TTMOptions
    options: TTMOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """2, beside a task weight of 1: the paper, for resnet110-resnet20. Tuned a pair (tables 8, 9): 1.4 to 16; on ImageNet 1.6, 3.5."""
        return {"wttm": 2.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``wttm``."""
        return {"wttm": wttm_loss(student.logits, teacher.logits, self.options.T)}
