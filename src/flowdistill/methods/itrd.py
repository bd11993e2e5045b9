"""itrd: information theoretic representation distillation. Correlation of every dimension, and mutual information of the batch.

After the authors' code. Its correlation is divided by N, its standard deviations by N - 1, so that the correlation ends at 1 - 1/N and the
logarithm is never of 0. Its mutual information has no logarithm and leaves out the teacher's own entropy, a constant. It divides by
standard deviations that can be 0; here such a dimension has correlation 0. The projector has a bias only where the mutual information sees
it: from the correlation it drops out. There are ports with the sign of the mutual information reversed.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, register, same_shape, two_dimensions, unit
from .cc import cosines
from .dist import varies


def correlation_loss(projected: Tensor, teacher: Tensor, alpha: float = 1.01) -> Tensor:
    """Logarithm of a sum of powers over the dimensions: L = log2 sum_d (1 - v_d)^(2 alpha), v_d = (1 - 1/N) r_d.

    r_d is the correlation of dimension d of the two over the batch. It is 0 without gradient if one of the two is constant, so that a batch
    of one gives log2 D. Miles et al. 2022, the authors' code. Computed in at least float32.

    Args:
        projected: [N, D].
        teacher: [N, D].
        alpha: the order of Rényi's entropy.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(projected, teacher)
    ours, theirs = (unit(x - x.mean(0), 0) for x in (at_least_float32(projected), at_least_float32(teacher)))
    correlation = torch.where(varies(projected, 0) & varies(teacher, 0), (ours * theirs).sum(0), 0.0)
    v = (1 - 1 / len(projected)) * correlation
    return (1 - v).pow(2 * alpha).sum().log2()


def mutual_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """What the student's relations have that the teacher's do not: L = ||G_s||_F^2 - ||G_st||_F^2.

    G_s is the matrix of the cosines between the student's samples, G_st its product with the teacher's, entry by entry, each divided by its
    trace (by 1 where the trace is below 1). 0 or more, and 0 for a batch of one. Miles et al. 2022, the authors' code. Computed in at least
    float32.

    Args:
        student: [N, D].
        teacher: [N, D']; D' need not be D.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = cosines(student), cosines(teacher)
    same_shape(ours, theirs)
    alone, joint = (gram / gram.trace().clamp(min=1) for gram in (ours, ours * theirs))
    return (alone.square() - joint.square()).sum()


class ITRDOptions(MethodOptions):
    """Options of itrd: the factors of the two parts, and the order of the first. ``mutual=0`` leaves the second out."""

    correlation: float = Field(2.0, gt=0, strict=True)  # the authors' README
    mutual: float = Field(1.0, ge=0, strict=True)  # the authors' README; 0.05 where their script is given none
    alpha: float = Field(1.01, gt=0, le=10, strict=True)  # the authors' README, for networks of one family; 1.5 for others


@register
class ITRD(Method):
    """The student's embedding correlates with the teacher's dimension by dimension, and relates the images as the teacher's does."""

    name = "itrd"
    paper = Paper(
        "R. Miles, A. Lopez Rodriguez, K. Mikolajczyk",
        "Information Theoretic Representation Distillation",
        "BMVC",
        2022,
        "https://arxiv.org/abs/2112.00459",
    )
    kind = "relations"
    terms = ("itrd",)
    vanishes_at_match = False  # the projector stands between the two, and the mutual information has its least elsewhere
    per_sample = False  # the correlation ends at 1 - 1/N
    Options = ITRDOptions
    options: ITRDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        if self.options.mutual:
            why = (
                "and without angles between the samples they have no mutual information; set options.itrd.mutual=0 or choose a teacher "
                "with a wider embedding"
            )
            two_dimensions(teacher, self.name, why)
        self.needs = Needs(embedding=True)
        self.widens = student.embedding != teacher.embedding
        self.projector = nn.Linear(student.embedding, teacher.embedding, bias=self.widens and self.options.mutual > 0)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, beside a task weight of 1: the authors' README. The factors of the two parts are options (2 and 1)."""
        return {"itrd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``itrd``: the correlation through the projector, the mutual information without it where the widths agree."""
        embedding = student.embedding
        with full_precision(embedding.device):
            projected = self.projector(embedding.to(self.projector.weight.dtype))
        loss = self.options.correlation * correlation_loss(projected, teacher.embedding, self.options.alpha)
        if self.options.mutual:
            loss = loss + self.options.mutual * mutual_loss(projected if self.widens else embedding, teacher.embedding)
        return {"itrd": loss}
