"""nd: norm and direction. The student's embedding grows to the teacher's norm and turns to the teacher's mean for the image's class.

The authors' kd++ is the composition kd+nd; their kd grows over 20 epochs, which here it does not. They draw the dropout of the embedder
from the global generator; here it is a hash of seed, epoch, image and channel (``hashed.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, MethodContext, NetSpec, Outputs
from .base import MIN_NORM, Method, Needs, Paper, at_least_float32, register, same_shape, two_dimensions, unit
from .dkd import given_labels
from .hashed import channel_mask, salt
from .reviewkd import batch_normalised

DROPOUT = 0.5  # the authors' code


def nd_loss(student: Tensor, teacher: Tensor, means: Tensor) -> Tensor:
    """How far the student falls short, in the class's direction, of the longer of the two norms.

    L = 1/N sum_n (1 - <e_s, c> / (||c|| max(||e_s||, ||e_t||))). Wang et al. 2023. Zeros have no direction: the loss is 1. It is
    not 0 if the student equals the teacher. Computed in at least float32.

    Args:
        student: [N, D], e_s.
        teacher: [N, D], e_t.
        means: [N, D], c, the teacher's mean embedding of each image's class.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    same_shape(student, means)
    ours, theirs = at_least_float32(student), at_least_float32(teacher)
    longer = torch.maximum(torch.linalg.vector_norm(ours, dim=1), torch.linalg.vector_norm(theirs, dim=1))
    along = (ours * unit(at_least_float32(means), 1)).sum(1)
    return 1 - (along / torch.where(longer <= MIN_NORM, torch.inf, longer)).mean()


class Embedder(nn.Module):
    """From the student's width to the teacher's: batch normalisation, always by the batch's own statistics, dropout and a linear layer."""

    def __init__(self, ours: int, theirs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(ours)), nn.Parameter(torch.zeros(ours))
        self.linear = nn.Linear(ours, theirs)
        self.register_buffer("salt", salt())

    def forward(self, embedding: Tensor, batch: Batch | None) -> Tensor:
        """[N, D] -> [N, D']."""
        embedding = batch_normalised(at_least_float32(embedding), self.weight, self.bias)
        kept = embedding * channel_mask(self.get_buffer("salt"), batch, embedding, DROPOUT) / (1 - DROPOUT)
        with full_precision(embedding.device):
            embedded: Tensor = self.linear(kept)
        return embedded


@register
class ND(Method):
    """The student's embedding, through an embedder where the widths differ, has the norm of the teacher's and its class's direction."""

    name = "nd"
    paper = Paper(
        "Y. Wang, L. Cheng, M. Duan, Y. Wang, Z. Feng, S. Kong",
        "Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
        "arXiv",
        2023,
        "https://arxiv.org/abs/2305.17007",
    )
    terms = ("nd",)
    vanishes_at_match = False  # the class's mean is not the image's embedding
    uses_labels = True

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        two_dimensions(teacher, self.name, "which leaves no direction to learn; choose a teacher with a wider embedding")
        self.needs = Needs(embedding=True, context=frozenset({"class_means"}))
        self.embedder = None if student.embedding == teacher.embedding else Embedder(student.embedding, teacher.embedding)

    @property
    def whole_batch(self) -> bool:
        """Its embedder, where it has one, normalises by the batch in either mode."""
        return self.embedder is not None

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """2: the authors' code for resnet56-resnet20 (0.5 to 2 by pair), with kd beside it."""
        return {"nd": 2.0}

    def setup(self, context: MethodContext) -> None:
        """Keep the class means."""
        if context.class_means is not None:
            self.hold(class_means=context.class_means)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``nd``."""
        labels = given_labels(batch, self.name)
        embedding = student.embedding if self.embedder is None else self.embedder(student.embedding, batch)
        return {"nd": nd_loss(embedding, teacher.embedding, self.held("class_means")[labels])}
