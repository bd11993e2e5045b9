"""srrl: softmax regression representation learning. The student's features must do for the teacher's own classifier.

The authors connect the map whose mean is the student's embedding; here it is the student's last stage after its ReLU, which in MobileNetV2
and ShuffleNetV2 comes one convolution before it. Other code connects the embedding, which the ReLU makes another loss.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, MethodContext, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, after_relu, at_least_float32, mse_loss, register


def srrl_loss(student: Tensor, teacher: Tensor, student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Feature matching, and regression of the logits that the teacher's classifier gives: 1/(N D) sum (g - e)^2 + beta/(N K) sum (h - z)^2.

    Yang et al. 2021. Computed in at least float32.

    Args:
        student: [N, D], g, the connected features of the student, mean over the positions.
        teacher: [N, D], e, the teacher's embedding.
        student_logits: [N, K], h, what the teacher's classifier makes of g.
        teacher_logits: [N, K], z.
        beta: the weight of the logits against the features.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return mse_loss(student, teacher) + beta * mse_loss(student_logits, teacher_logits)


class SRRLOptions(MethodOptions):
    """Options of srrl. ``beta``: the weight of the logits against the features."""

    beta: float = Field(1.0, ge=0, strict=True)  # the authors' code; cls_KD has 5 for CIFAR-100


@register
class SRRL(Method):
    """The student's last stage, connected to the teacher's width, matches the teacher's embedding and, through its classifier, its logits.

    The classifier is the teacher's, frozen.
    """

    name = "srrl"
    paper = Paper(
        "J. Yang, B. Martinez, A. Bulat, G. Tzimiropoulos",
        "Knowledge Distillation via Softmax Regression Representation Learning",
        "ICLR",
        2021,
        "https://openreview.net/forum?id=ZzwDy_wiWv",
    )
    terms = ("srrl",)
    vanishes_at_match = False  # the connector stands between the two
    Options = SRRLOptions
    options: SRRLOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        if not student.stages:
            raise ValueError(f"srrl: {student.name} has no stages, and its last one is connected; choose a student that has, or kd")
        (self.stage,) = after_relu(student, student.stages[-1:])
        self.needs = Needs(frozenset({self.stage}), logits=True, embedding=True, context=frozenset({"head"}))
        convolution = nn.Conv2d(student.tap(self.stage).channels, teacher.embedding, 1, bias=False)
        self.connector = nn.Sequential(convolution, nn.BatchNorm2d(teacher.embedding), nn.ReLU())

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, beside a task weight of 1: the authors' code."""
        return {"srrl": 1.0}

    def setup(self, context: MethodContext) -> None:
        """Keep the teacher's classifier."""
        if context.head is not None:
            self.hold(head_weight=context.head[0], head_bias=context.head[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``srrl``."""
        features = at_least_float32(student.maps[self.stage])
        with full_precision(features.device):
            connected: Tensor = self.connector(features).mean((2, 3))
            logits = F.linear(connected, self.held("head_weight"), self.held("head_bias"))
        return {"srrl": srrl_loss(connected, teacher.embedding, logits, teacher.logits, self.options.beta)}
