"""base: training on the labels alone. What every student is compared with, and how teachers are made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..types import Batch, Outputs
from .base import Method, Paper, register


@register
class Supervised(Method):
    """No term of its own: the task's cross-entropy is all."""

    name = "base"
    paper = Paper(
        "K. He, X. Zhang, S. Ren, J. Sun", "Deep Residual Learning for Image Recognition", "CVPR", 2016, "https://arxiv.org/abs/1512.03385"
    )
    terms = ()
    uses_labels = True
    uses_teacher = False

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """None."""
        return {}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """Nothing."""
        return {}
