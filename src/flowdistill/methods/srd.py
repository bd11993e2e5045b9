"""srd: simple recipe distillation. A linear projector, batch normalisation on both sides, and the logarithm of a sum.

The sum is over the batch, so that twice the batch adds log 2 to the value and nothing to the gradient. The projector has no bias: the
normalisation would take it out. The logarithm is kept from 0 by 1e-5, as in the authors' code for DeiT; their code for ResNets has nothing
there. Their DeiT loss sums powers of correlations, not of differences. On ImageNet they add kd at temperature 1: the composition
``kd+srd``. torchdistill's loss has exponent 1 where none is given.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, register, same_shape

EPS = 1e-4  # on the variance: the authors' code for ResNets
EPSILON = 1e-5  # on the sum: the authors' code for DeiT


def normalised(embedding: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-4) of every dimension over the batch, the variance divided by N: [N, D] -> [N, D].

    ``nn.BatchNorm1d`` without affine computes the same in training, but refuses a batch of one, which gives zeros here.
    """
    x = at_least_float32(embedding)
    variance, mean = torch.var_mean(x, 0, correction=0)
    return (x - mean) * (variance + EPS).rsqrt()


def log_sum_loss(projected: Tensor, teacher: Tensor, alpha: float = 4.0) -> Tensor:
    """Logarithm of a sum of powers over batch and dimensions: L = log(1e-5 + sum_{n,d} |s[n,d] - t[n,d]|^alpha), both ``normalised``.

    Miles and Mikolajczyk 2024, section "The soft maximum function", and the authors' code. Its least value is log 1e-5, with gradient 0.
    Computed in at least float32.

    Args:
        projected: [N, D].
        teacher: [N, D].
        alpha: the larger, the more the largest differences count.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(projected, teacher)
    difference = normalised(projected) - normalised(teacher)
    return (difference.abs().pow(alpha).sum() + EPSILON).log()


class SRDOptions(MethodOptions):
    """Options of srd."""

    alpha: float = Field(4.0, ge=1, le=10, strict=True)  # the authors' code


@register
class SRD(Method):
    """The student's embedding, projected, matches the teacher's in every dimension, up to its mean and spread over the batch."""

    name = "srd"
    paper = Paper(
        "R. Miles, K. Mikolajczyk",
        "Understanding the Role of the Projector in Knowledge Distillation",
        "AAAI",
        2024,
        "https://arxiv.org/abs/2303.11098",
    )
    terms = ("srd",)
    vanishes_at_match = False  # the projector stands between the two
    per_sample = False  # a sum over the batch, in a logarithm
    Options = SRDOptions
    options: SRDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.needs = Needs(embedding=True)
        self.projector = nn.Linear(student.embedding, teacher.embedding, bias=False)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """2, beside a task weight of 1: the authors' code on ImageNet; torchdistill."""
        return {"srd": 2.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``srd``."""
        with full_precision(student.embedding.device):
            projected = self.projector(student.embedding.to(self.projector.weight.dtype))
        return {"srd": log_sum_loss(projected, teacher.embedding, self.options.alpha)}
