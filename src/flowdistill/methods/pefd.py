"""pefd: projector ensemble. The direction of the embedding, seen through several projectors.

The authors' code divides by norms that can be 0, and builds one projector more than it uses; here neither.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, register, same_shape, two_dimensions, unit


def ensemble(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean over the projectors: g = 1/Q sum_q ReLU(W_q e + b_q), as one matrix product.

    Chen et al. 2022, section 3. Computed in the type of the weights.

    Args:
        embedding: [N, D].
        weight: [Q, D', D].
        bias: [Q, D'].

    Returns:
        [N, D'].
    """
    with full_precision(embedding.device):
        projected = F.linear(embedding.to(weight.dtype), weight.flatten(0, 1), bias.flatten())
    return projected.relu().view(-1, *bias.shape).mean(1)


def direction_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """1 less the cosine, mean over the batch: L = 1/N sum_n (1 - <g_n, e_n> / (||g_n|| ||e_n||)).

    Chen et al. 2022, section 3. Zeros, which have no direction, give the loss 1. Computed in at least float32.

    Args:
        projected: [N, D'] from ``ensemble``.
        teacher: [N, D'].

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(projected, teacher)
    ours, theirs = (unit(at_least_float32(x), 1) for x in (projected, teacher))
    return 1 - (ours * theirs).sum(1).mean()


class PEFDOptions(MethodOptions):
    """Options of pefd."""

    projectors: int = Field(3, ge=1, le=16, strict=True)  # the authors' code


@register
class PEFD(Method):
    """The student's embedding points, through an ensemble of projectors, where the teacher's points."""

    name = "pefd"
    paper = Paper(
        "Y. Chen, S. Wang, J. Liu, X. Xu, F. de Hoog, Z. Huang",
        "Improved Feature Distillation via Projector Ensemble",
        "NeurIPS",
        2022,
        "https://arxiv.org/abs/2210.15274",
    )
    terms = ("pefd",)
    vanishes_at_match = False  # the projectors stand between the two
    Options = PEFDOptions
    options: PEFDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        two_dimensions(teacher, self.name, "which leaves no direction to learn; choose a teacher with a wider embedding")
        self.needs = Needs(embedding=True)
        self.projectors = nn.Linear(student.embedding, self.options.projectors * teacher.embedding)  # one block of rows per projector

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """25, beside a task weight of 1: the authors' code, on CIFAR-100 and ImageNet."""
        return {"pefd": 25.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``pefd``."""
        bias = self.projectors.bias.view(self.options.projectors, -1)
        weight = self.projectors.weight.view(*bias.shape, -1)
        return {"pefd": direction_loss(ensemble(student.embedding, weight, bias), teacher.embedding)}
