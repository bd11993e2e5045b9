"""dist: the student's class probabilities correlate with the teacher's, along the classes and along the batch.

The factor T^2 is in the authors' code and not in their paper's appendix, whose loss is T^2 times smaller; torchdistill keeps each norm
above 1e-8 where the authors add 1e-8 to the product of both. For that 1e-8 the loss is not exactly 0 where student equals teacher, nor
exactly the same where the batch is repeated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..types import Batch, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, register, same_shape


def varies(x: Tensor, dim: int) -> Tensor:
    """Whether x varies along a dimension; NaN does. x less its mean can't tell: of a constant it is 0 or the rounding of the mean."""
    return x.amax(dim) != x.amin(dim)


def correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along a dimension: <a, b> / (||a|| ||b|| + 1e-8), a and b less their means.

    If either is constant, this is 0 without gradient: its mean is rounded, and the gradient would be that rounding over 1e-8.
    """
    a, b = first - first.mean(dim, keepdim=True), second - second.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return torch.where(varies(first, dim) & varies(second, dim), (a * b).sum(dim) / (norms + 1e-8), 0)


class Relations(NamedTuple):
    """How far the two relations are from the teacher's, scalars."""

    inter: Tensor
    intra: Tensor


def relations(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Relations:
    """1 less the mean correlation of the probabilities P = softmax(z / T): of each sample along the classes, of each class along the batch.

    inter = 1 - 1/N sum_n rho(P_s[n, :], P_t[n, :]), intra = 1 - 1/K sum_k rho(P_s[:, k], P_t[:, k]). Huang et al. 2022, section 4. intra of
    a batch of one is 1, without gradient. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.
        temperature: T.

    Returns:
        ``inter`` and ``intra``, scalars.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    ours, theirs = ((at_least_float32(logits) / temperature).softmax(1) for logits in (student, teacher))
    return Relations(1 - correlation(ours, theirs, 1).mean(), 1 - correlation(ours, theirs, 0).mean())


def dist_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """T^2 (beta inter + gamma intra), of ``relations``.

    Args:
        student, teacher: [N, K] logits.
        temperature: T.
        beta, gamma: the weights of the relation along the classes and of that along the batch.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    distances = relations(student, teacher, temperature)
    return temperature**2 * (beta * distances.inter + gamma * distances.intra)


class DISTOptions(MethodOptions):
    """Options of dist."""

    T: float = Field(4.0, gt=0, strict=True)  # the authors' code for CIFAR-100; 1 for ImageNet
    beta: float = Field(1.0, ge=0, strict=True)  # the authors' code
    gamma: float = Field(1.0, ge=0, strict=True)  # the authors' code


@register
class DIST(LogitMethod):
    """The student ranks the classes of a sample, and the samples of a class, as the teacher does."""

    name = "dist"
    paper = Paper(
        "T. Huang, S. You, F. Wang, C. Qian, C. Xu",
        "Knowledge Distillation from A Stronger Teacher",
        "NeurIPS",
        2022,
        "https://arxiv.org/abs/2205.10536",
    )
    terms = ("dist",)
    vanishes_at_match = False
    per_sample = False
    Options = DISTOptions
    options: DISTOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """2, beside a task weight of 1: the authors' code, also MMRazor and torchdistill."""
        return {"dist": 2.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``dist``."""
        return {"dist": dist_loss(student.logits, teacher.logits, self.options.T, self.options.beta, self.options.gamma)}
