"""ctkd: a curriculum of temperatures. The temperature of kd is learned against the student, more and more so.

The authors' variant with a temperature an image, from a small network, is not here: only its paper has it, not the code that was read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import MAX_EPOCHS
from ..types import Batch, NetSpec, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, register
from .kd import kd_loss


def curriculum(epoch: Tensor, ramp: int = 10) -> Tensor:
    """lambda = (cos(pi min(e, E) / E) - 1) / 2 with e = epoch + 1: from near 0 in the first epoch to -1 in the E-th and after.

    Li et al. 2023, the authors' code.

    Args:
        epoch: scalar, counted from 0.
        ramp: E.

    Returns:
        A scalar.
    """
    share = ((at_least_float32(epoch) + 1) / ramp).clamp(max=1)
    return ((math.pi * share).cos() - 1) / 2


def scaled_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """x, with its gradient multiplied by a factor; a negative one reverses it."""
    constant = x.detach()
    return constant + factor * (x - constant)


def softened(logits: Tensor, temperature: Tensor) -> Tensor:
    """z / T in at least float32. A logit of -inf stays so and gives the temperature no gradient, which would be 0 times infinity."""
    z = at_least_float32(logits)
    never = z == -torch.inf
    return (z.masked_fill(never, 0) / temperature).masked_fill(never, -torch.inf)


def ctkd_loss(student: Tensor, teacher: Tensor, theta: Tensor, start: float = 1.0, end: float = 20.0) -> Tensor:
    """kd with a learned temperature: T^2 KL(p_t || p_s), T = t_start + t_end sigmoid(theta), mean over the batch, sum over the classes.

    Li et al. 2023, the authors' code. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.
        theta: scalar.
        start, end: t_start and t_end, so that T lies between t_start and their sum.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    temperature = start + end * at_least_float32(theta).sigmoid()
    return kd_loss(softened(student, temperature), softened(teacher, temperature), 1.0) * temperature.square()


class CTKDOptions(MethodOptions):
    """Options of ctkd. ``ramp``: the epochs over which the reversal of theta's gradient grows to its full strength."""

    t_start: float = Field(1.0, gt=0, strict=True)  # the authors' code
    t_end: float = Field(20.0, gt=0, strict=True)  # the authors' code
    ramp: int = Field(10, ge=1, le=MAX_EPOCHS, strict=True)  # the authors' code


@register
class CTKD(LogitMethod):
    """The student matches the teacher's softened probabilities at a temperature that learns to make that hard."""

    name = "ctkd"
    paper = Paper(
        "Z. Li, X. Li, L. Yang, B. Zhao, R. Song, L. Luo, J. Li, J. Yang",
        "Curriculum Temperature for Knowledge Distillation",
        "AAAI",
        2023,
        "https://arxiv.org/abs/2211.16231",
    )
    terms = ("ctkd",)
    Options = CTKDOptions
    options: CTKDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options, student=student, teacher=teacher)
        self.theta = nn.Parameter(torch.tensor(1.0))  # the authors' code

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """0.9: the authors' code, whose task weight is 0.1; it stays 1 here."""
        return {"ctkd": 0.9}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``ctkd``. If the batch has no epoch, the gradient of theta is fully reversed."""
        chosen = self.options
        reversal = -1.0 if batch is None or batch.epoch is None else curriculum(batch.epoch.to(self.theta.dtype), chosen.ramp)
        theta = scaled_gradient(self.theta, reversal)
        return {"ctkd": ctkd_loss(student.logits, teacher.logits, theta, chosen.t_start, chosen.t_end)}
