"""cc: correlation congruence. The kernel between the images of a batch.

Deviations: RepDistiller's "cc" is another loss (products of differences on neighbouring rows, behind two learned projections).
torchdistill leaves out the L2 normalisation and takes the norm, not its square, over N^2. The paper adds instance distillation: ``cc+kd``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, mse_loss, register, two_dimensions, unit


def cosines(embedding: Tensor) -> Tensor:
    """Cosines between the samples of a batch, 0 with a sample of zeros: [N, D] -> [N, N], in at least float32."""
    directions = unit(at_least_float32(embedding), 1)
    with full_precision(directions.device):
        return directions @ directions.T


def correlation(embedding: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """The Gaussian kernel of L2-normalised embeddings by its Taylor series: [N, D] -> [N, N].

    Peng et al. 2019, section 3.3: C[i, j] = sum_{p=0..P} exp(-2 gamma) (2 gamma)^p / p! <u_i, u_j>^p with u = e / ||e||. A sample of
    zeros has u = 0. Computed in at least float32.
    """
    cosine = cosines(embedding)
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    kernel = torch.full_like(cosine, factors[order])
    for factor in reversed(factors[:order]):
        kernel = kernel * cosine + factor
    return kernel


def correlation_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Squared distance of the kernels, mean over the pairs of samples: L = 1/N^2 sum_{i,j} (C_s - C_t)^2.

    Peng et al. 2019, section 3.2, without its factor for the instance term.

    Args:
        student: [N, D].
        teacher: [N, D']; D' need not be D.
        gamma: of the Gaussian kernel exp(-gamma ||u_i - u_j||^2).
        order: P, where the Taylor series ends.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = (correlation(x, gamma, order) for x in (student, teacher))
    return mse_loss(ours, theirs)


class CCOptions(MethodOptions):
    """Options of cc."""

    gamma: float = Field(0.4, gt=0, le=10, strict=True)  # KD-Zoo, torchdistill
    order: int = Field(2, ge=1, le=20, strict=True)  # KD-Zoo, torchdistill


@register
class CC(Method):
    """The student's embeddings correlate within a batch as the teacher's do."""

    name = "cc"
    paper = Paper(
        "B. Peng, X. Jin, J. Liu, D. Li, Y. Wu, Y. Liu, S. Zhou, Z. Zhang",
        "Correlation Congruence for Knowledge Distillation",
        "ICCV",
        2019,
        "https://arxiv.org/abs/1904.01802",
    )
    kind = "relations"
    terms = ("cc",)
    Options = CCOptions
    options: CCOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        why = "and without angles between the samples nothing is learned; choose a network with a wider embedding"
        for spec in (student, teacher):
            two_dimensions(spec, self.name, why)
        self.needs = Needs(embedding=True)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """100: KD-Zoo, for this kernel and this mean. (RepDistiller's 0.02 and torchdistill's 0.003 belong to other losses.)"""
        return {"cc": 100.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``cc``."""
        return {"cc": correlation_loss(student.embedding, teacher.embedding, self.options.gamma, self.options.order)}
