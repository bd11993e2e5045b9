"""cosine: the student's embedding points where the teacher's does."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flowdistill import Batch, NetSpec, Outputs
from flowdistill.methods.base import Method, Needs, Paper, at_least_float32, register


@register
class Cosine(Method):
    """1 minus the cosine of the two embeddings, on average."""

    name = "cosine"
    paper = Paper("N. Obody", "An Example of a Package", "none", 2026, "https://example.org")
    version = 1  # raise it when the number changes
    terms = ("cosine",)

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        if student.embedding != teacher.embedding:
            raise ValueError(f"cosine: embeddings of {student.embedding} and {teacher.embedding}; choose networks of equal width")
        self.needs = Needs(embedding=True)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, as an example."""
        return {"cosine": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``cosine``."""
        ours, theirs = at_least_float32(student.embedding), at_least_float32(teacher.embedding)
        return {"cosine": (1 - F.cosine_similarity(ours, theirs)).mean()}
