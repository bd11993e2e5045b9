"""mlkd: kd at several temperatures, with the similarities of the classes and of the samples.

This is the loss in its plain form on one view of the images. The authors' code adds a strongly augmented view, and multiplies the parts by
the shares of unsure samples and classes, which are about one half; two things in it look unmeant: the similarities of the strong view are
computed and thrown away, and its kd at temperatures 2 and 6 is that of the weak view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..device import full_precision
from ..types import Batch, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, register, same_shape
from .kd import kd_loss


def class_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """1/K ||P_t' P_t - P_s' P_s||_F^2, the similarities [K, K] of the classes over the batch; P = softmax(z / T), [N, K]."""
    return _similarity_loss(*(_probabilities(logits, temperature).T for logits in (student, teacher)))


def batch_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """1/N ||P_t P_t' - P_s P_s'||_F^2, the similarities [N, N] of the samples; P = softmax(z / T), [N, K]."""
    return _similarity_loss(*(_probabilities(logits, temperature) for logits in (student, teacher)))


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (at_least_float32(logits) / temperature).softmax(1)


def _similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    same_shape(student, teacher)
    with full_precision(student.device):  # the products would go back to half precision
        difference = teacher @ teacher.T - student @ student.T
    return difference.square().sum() / len(student)


def mlkd_loss(student: Tensor, teacher: Tensor, temperatures: Sequence[float] = (2, 3, 4, 5, 6)) -> Tensor:
    """Sum over the temperatures of kd, with its factor T^2, and of ``class_loss`` and ``batch_loss``, which have none.

    Jin et al. 2023, without the masks of the authors' code. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.
        temperatures: every T.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    levels = (kd_loss, class_loss, batch_loss)
    return torch.stack([level(student, teacher, temperature) for temperature in temperatures for level in levels]).sum()


class MLKDOptions(MethodOptions):
    """Options of mlkd. ``T``: the base temperature, beside 2, 3, 5 and 6."""

    T: float = Field(4.0, gt=0, strict=True)  # the authors' code for CIFAR-100; 1 for ImageNet


@register
class MLKD(LogitMethod):
    """The student matches the teacher's probabilities, how alike they make the classes, and how alike the samples."""

    name = "mlkd"
    paper = Paper(
        "Y. Jin, J. Wang, D. Lin",
        "Multi-Level Logit Distillation",
        "CVPR",
        2023,
        "https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html",
    )
    terms = ("mlkd",)
    per_sample = False
    Options = MLKDOptions
    options: MLKDOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """0.9: the authors' code for CIFAR-100, whose task weight is 0.1; it stays 1 here. (ImageNet: 0.5 beside 0.5.)"""
        return {"mlkd": 0.9}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``mlkd``."""
        return {"mlkd": mlkd_loss(student.logits, teacher.logits, (2, 3, self.options.T, 5, 6))}
