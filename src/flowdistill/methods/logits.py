"""logits: regression on the teacher's logits.

This is the mean over batch and classes, as KD-Zoo has it. The paper sums over the classes and halves: K/2 times as much. The reference log
has the name for a regression on the pooled features, which is ``on=embedding``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, mse_loss, register, same_classes


def logits_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits over batch and classes: L = 1/(N K) sum_{n,k} (z_s - z_t)^2. Takes embeddings [N, D] too.

    Ba and Caruana 2014, section 2.2, write 1/(2N) sum_n ||z_s - z_t||^2, which is K/2 times this. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return mse_loss(student, teacher)


class LogitsOptions(MethodOptions):
    """Options of logits. ``on=embedding`` compares the pooled features that feed the classifier instead of the logits.

    ``on`` is dumped only if it is not the default, so that runs recorded before it existed stay comparable.
    """

    on: Literal["logits", "embedding"] = Field("logits", exclude_if=lambda on: on == "logits")  # reference log: embedding


@register
class Logits(Method):
    """The student's logits are pulled to the teacher's."""

    name = "logits"
    kind = "logits"
    paper = Paper("J. Ba, R. Caruana", "Do Deep Nets Really Need to be Deep?", "NIPS", 2014, "https://arxiv.org/abs/1312.6184")
    terms = ("logits",)
    Options = LogitsOptions
    options: LogitsOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        if self.options.on == "logits":
            same_classes(student, teacher, self.name)
            self.needs = Needs(logits=True)
            return
        if student.embedding != teacher.embedding:
            raise ValueError(
                f"logits: the embedding of {student.name} has width {student.embedding}, that of {teacher.name} {teacher.embedding}, and "
                f"on=embedding compares them feature by feature; choose networks of equal width, or leave options.logits.on out"
            )
        self.needs = Needs(embedding=True)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1: the reference log, whose own variant regresses the pooled embedding. (KD-Zoo: 0.1 on the logits.)"""
        return {"logits": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``logits``."""
        if self.options.on == "embedding":
            return {"logits": logits_loss(student.embedding, teacher.embedding)}
        return {"logits": logits_loss(student.logits, teacher.logits)}
