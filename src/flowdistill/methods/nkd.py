"""nkd: the teacher's soft target, and its other classes normalised to probabilities of their own.

Two cross-entropies, so the loss is not 0 where student equals teacher, and its first part still pulls the student to the label there.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..types import Batch, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, expectation, register, same_shape
from .dkd import given_labels, log_others, other_logits


def nkd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 3.0, gamma: float = 3.5) -> Tensor:
    """Cross-entropies of the target and of the other classes, mean over the batch.

    L = -1/N sum_n p_t[y] log p_s[y] - gamma T^2/N sum_n sum_{k != y} q_t[k] log q_s[k], with p = softmax(z), always at temperature 1, and
    q = softmax over the classes k != y of z / T. Yang et al. 2023. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.
        labels: [N] class numbers.
        temperature: T.
        gamma: the weight of the other classes.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    ours, theirs = at_least_float32(student), at_least_float32(teacher)
    log_p_s, log_p_t = (F.log_softmax(logits, dim=1).gather(1, labels[:, None]) for logits in (ours, theirs))
    log_q_s, log_q_t = (log_others(other_logits(logits / temperature, labels)) for logits in (ours, theirs))
    target, others = expectation(log_p_t, log_p_s), expectation(log_q_t, log_q_s)
    return -(target + gamma * temperature**2 * others).mean()


class NKDOptions(MethodOptions):
    """Options of nkd."""

    T: float = Field(3.0, gt=0, strict=True)  # the authors' code for CIFAR-100; 1 for ImageNet
    gamma: float = Field(3.5, ge=0, strict=True)  # the authors' code for CIFAR-100; 1.5 for ImageNet


@register
class NKD(LogitMethod):
    """The student learns the target as surely as the teacher does, and what the teacher thinks of the other classes."""

    name = "nkd"
    paper = Paper(
        "Z. Yang, A. Zeng, Z. Li, T. Zhang, C. Yuan, Y. Li",
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels",
        "ICCV",
        2023,
        "https://arxiv.org/abs/2303.13005",
    )
    terms = ("nkd",)
    vanishes_at_match = False
    uses_labels = True
    Options = NKDOptions
    options: NKDOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, beside a task weight of 1: the authors' code. What balances the parts is ``gamma``."""
        return {"nkd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``nkd``."""
        labels = given_labels(batch, self.name)
        return {"nkd": nkd_loss(student.logits, teacher.logits, labels, self.options.T, self.options.gamma)}
