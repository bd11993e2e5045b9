"""ttm: transformed teacher matching. kd with the temperature on the teacher's side alone.

A softened teacher is its probabilities to the power of 1/T, normalised: the paper's gamma is 1/T. Up to a constant the loss is T times
kd's divergence less T - 1 times the student's Rényi entropy, so it is not 0 where student equals teacher.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..types import Batch, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, divergence, register, same_shape

PAPER = Paper(
    "K. Zheng, E.-H. Yang", "Knowledge Distillation Based on Transformed Teacher Matching", "ICLR", 2024, "https://arxiv.org/abs/2402.11148"
)


def divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(p_T || q) of every sample, p_T = softmax(z_t / T), q = softmax(z_s): [N, K] logits -> [N]. In at least float32."""
    same_shape(student, teacher)
    log_q = F.log_softmax(at_least_float32(student), dim=1)
    log_p = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    return divergence(log_q, log_p)


def ttm_loss(student: Tensor, teacher: Tensor, temperature: float = 5.0) -> Tensor:
    """Divergence of the student from the softened teacher, mean over the batch, sum over the classes.

    L = 1/N sum_n sum_k p_T[k] (log p_T[k] - log q[k]) with p_T = softmax(z_t / T), q = softmax(z_s). Zheng and Yang 2024, equation 2 and
    algorithm 1. Without a factor T^2: the gradient q - p_T does not shrink as T grows. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.
        temperature: T.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return divergences(student, teacher, temperature).mean()


class TTMOptions(MethodOptions):
    """Options of ttm and wttm."""

    T: float = Field(5.0, ge=1, strict=True)  # the paper, for resnet110-resnet20; it is tuned a pair: 2.5 to 10, on ImageNet 1.25, 1.43


@register
class TTM(LogitMethod):
    """The student, at temperature 1, matches the teacher's class probabilities softened by a temperature."""

    name = "ttm"
    paper = PAPER
    terms = ("ttm",)
    vanishes_at_match = False
    Options = TTMOptions
    options: TTMOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """8, beside a task weight of 1: the paper, for resnet110-resnet20. T and weight are tuned a pair (tables 8, 9).

        T=10 and 45 for vgg13-vgg8 (the authors' README), T=10 and 101 for wrn-40-2-wrn-16-2.
        """
        return {"ttm": 8.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``ttm``."""
        return {"ttm": ttm_loss(student.logits, teacher.logits, self.options.T)}
