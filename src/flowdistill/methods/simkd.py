"""simkd: the reused teacher classifier. The student learns the map that feeds the teacher's classifier, and answers through that.

There is no cross-entropy and no loss on logits. What ships is the student's body, a projector and the teacher's classifier (the model
``reused(STUDENT,TEACHER,FACTOR)``): accuracy, file and count of parameters are those of the whole.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, after_relu, at_least_float32, register, same_classes, same_shape
from .fsp import match_sizes


def projection_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference, mean over batch, channels and positions: L = 1/(N C H W) sum (p - t)^2.

    Chen et al. 2022, equation 4. Computed in at least float32.

    Args:
        projected: [N, C, H, W], p.
        teacher: [N, C, H, W].

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(projected, teacher)
    return (at_least_float32(projected) - at_least_float32(teacher)).square().mean()


class SimKDOptions(MethodOptions):
    """Options of simkd. ``factor``: how much narrower the projector is than the teacher's map."""

    factor: int = Field(2, ge=1, le=64, strict=True)  # the authors' code; 4 and 8 are cheaper


@register
class SimKD(Method):
    """The student's last map, projected, is pulled to the teacher's; of two sizes the larger is average-pooled."""

    name = "simkd"
    paper = Paper(
        "D. Chen, J.-P. Mei, H. Zhang, C. Wang, Y. Feng, C. Chen",
        "Knowledge Distillation with the Reused Teacher Classifier",
        "CVPR",
        2022,
        "https://arxiv.org/abs/2203.14001",
    )
    terms = ("simkd",)
    Options = SimKDOptions
    options: SimKDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        same_classes(student, teacher, self.name)
        last = teacher.tap(*after_relu(teacher, teacher.stages[-1:])) if teacher.stages else None
        if last is None or last.channels != teacher.embedding:
            raise ValueError(
                f"simkd: the embedding of {teacher.name} ({teacher.embedding} wide) is not the mean of a stage, whose map the student "
                f"could learn; choose a teacher whose last stage feeds its classifier, such as a ResNet, WRN or VGG"
            )
        if student.tap("projected").channels != last.channels:
            raise ValueError(
                f"simkd: tap 'projected' of {student.name} is {student.tap('projected').shape}, {last.name!r} of {teacher.name} "
                f"{last.shape}; choose the student that was built for this teacher"
            )
        self.stage = last.name
        self.needs = Needs(frozenset({"projected"}), frozenset({self.stage}))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1 alone: the authors' code, without the labels' cross-entropy (task 0)."""
        return {"task": 0.0, "simkd": 1.0}

    @classmethod
    def shipped_model(cls, options: Any, student: str, teacher: str) -> str:
        """The student with a projector and the teacher's classifier."""
        return f"reused({student},{teacher},{options.factor})"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``simkd``."""
        return {"simkd": projection_loss(*match_sizes(student.maps["projected"], teacher.maps[self.stage], "avg"))}
