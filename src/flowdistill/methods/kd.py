"""kd: soft targets.

torchdistill leaves the factor T^2 out where its alpha is 0 or it is given no labels: its loss is T^2 times smaller there. The authors of
tf_kd average over the classes too, which makes their kd K times smaller.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..types import Batch, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, divergence, register, same_shape


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(p_t || p_s) of the softened class probabilities, mean over the batch, sum over the classes.

    L = T^2/N sum_n sum_k p_t[k] (log p_t[k] - log p_s[k]) with p = softmax(z / T). Hinton, Vinyals, Dean 2015, section 2: the
    factor T^2 keeps the size of the gradient when T changes. A class for which the teacher's logit is -inf has p_t = 0, and its term is 0.
    Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.
        temperature: T.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> from flowdistill.methods.kd import kd_loss
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> kd_loss(student, teacher, temperature=4.0)
        tensor(1.7751)
    """
    same_shape(student, teacher)
    log_s = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_t = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    return divergence(log_s, log_t).mean() * temperature**2


class KDOptions(MethodOptions):
    """Options of kd."""

    T: float = Field(4.0, gt=0, strict=True)  # reference log; also RepDistiller and KD-Zoo


@register
class KD(LogitMethod):
    """The student matches the teacher's class probabilities, softened by a temperature."""

    name = "kd"
    paper = Paper(
        "G. Hinton, O. Vinyals, J. Dean",
        "Distilling the Knowledge in a Neural Network",
        "NIPS Deep Learning Workshop",
        2014,
        "https://arxiv.org/abs/1503.02531",
    )
    terms = ("kd",)
    Options = KDOptions
    options: KDOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, beside a task weight of 1: the reference log. (RepDistiller: 0.9 beside 0.1.)"""
        return {"kd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``kd``."""
        return {"kd": kd_loss(student.logits, teacher.logits, self.options.T)}
