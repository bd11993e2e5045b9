"""pkt: probabilistic knowledge transfer. How likely a network holds one image of a batch for a neighbour of another.

As in every published implementation the sum is divided by N^2, so that each row's divergence is divided by N once more than a mean asks.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, register, same_shape, two_dimensions


def neighbours(embedding: Tensor, eps: float = 1e-7) -> Tensor:
    """Cosine similarities of the samples of a batch as probabilities, one row per sample: [N, D] -> [N, N].

    Passalis and Tefas 2018, section 3: u = e / (||e|| + eps), k[i, j] = (<u_i, u_j> + 1) / 2 with the diagonal, and
    P[i, j] = k[i, j] / sum_j k[i, j]. Computed in at least float32.
    """
    embedding = at_least_float32(embedding)
    norm: Tensor = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
    unit = embedding / (norm + eps)
    with full_precision(unit.device):
        cosine = unit @ unit.T
    kernel = ((cosine + 1) / 2).clamp(min=0)  # rounding takes opposite samples below 0
    return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Divergence of the student's neighbourhoods from the teacher's: L = 1/N^2 sum_{i,j} P_t log((P_t + eps) / (P_s + eps)).

    Passalis and Tefas 2018, section 3, with P[i, j] of ``neighbours``.

    Args:
        student: [N, D].
        teacher: [N, D']; D' need not be D.
        eps: keeps norms and logarithms from 0.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = neighbours(student, eps), neighbours(teacher, eps)
    same_shape(ours, theirs)
    return (theirs * ((theirs + eps) / (ours + eps)).log()).mean()


class PKTOptions(MethodOptions):
    """Options of pkt."""

    eps: float = Field(1e-7, ge=1e-8, le=1e-3, strict=True)  # the authors' code, RepDistiller, mdistiller; KD-Zoo: 1e-6


@register
class PKT(Method):
    """The student's embeddings have the neighbours that the teacher's have."""

    name = "pkt"
    paper = Paper(
        "N. Passalis, A. Tefas",
        "Learning Deep Representations with Probabilistic Knowledge Transfer",
        "ECCV",
        2018,
        "https://arxiv.org/abs/1803.10837",
    )
    kind = "relations"
    terms = ("pkt",)
    vanishes_at_match = False  # the value is 0 there, but eps leaves a gradient of a millionth of the usual one
    per_sample = False
    Options = PKTOptions
    options: PKTOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        why = "and without angles between the samples nothing is learned; choose a network with a wider embedding"
        for spec in (student, teacher):
            two_dimensions(spec, self.name, why)
        self.needs = Needs(embedding=True)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """30000, beside a task weight of 1: RepDistiller, mdistiller. (The authors train on this loss alone; KD-Zoo: 10000.)"""
        return {"pkt": 30000.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``pkt``."""
        return {"pkt": pkt_loss(student.embedding, teacher.embedding, self.options.eps)}
