"""ab: activation boundaries. Which neurons of the teacher fire, not how strongly.

The paper compares maps before ReLU. The taps are after it (of a WRN after the one that follows its sums, which RepDistiller normalises): a
neuron of the teacher is above 0 there exactly where it is before. On the student's side a connector (convolution and batch normalisation),
which RepDistiller leaves out where the shapes agree, stands at every stage and gives the response that is compared. torchdistill has no
factor 3/1000; KD-Zoo averages over the elements and the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import MAX_EPOCHS
from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import (
    Method,
    Needs,
    Paper,
    Phase,
    StagedOptions,
    after_relu,
    at_least_float32,
    paired_stages,
    register,
    same_shape,
    then_the_task,
)
from .fitnets import connector
from .fsp import pooled


def boundary_loss(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """How far the student's responses are from the teacher's side of 0, by a margin m: mean over the batch, sum over the rest.

    l = (s + m)^2 where t <= 0 and s > -m, (s - m)^2 where t > 0 and s <= m, else 0. Heo et al. 2019. Computed in at least float32.

    Args:
        student: [N, C, H, W] before ReLU.
        teacher: [N, C, H, W] before or after ReLU.
        margin: m.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    s = at_least_float32(student)
    side = torch.where(teacher.isnan(), torch.nan, torch.where(teacher > 0, -s, s))  # a NaN is on no side
    return F.relu(margin + side).square().flatten(1).sum(1).mean()


def ab_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], margin: float = 1.0) -> Tensor:
    """The boundaries of n stages, each with twice the weight of the one before: 3/1000 sum_i 2^(i-n) boundary_loss_i.

    The authors' code.
    """
    losses = [boundary_loss(s, t, margin) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([loss * 2.0 ** (i - len(losses)) for i, loss in enumerate(losses, 1)]).sum() * 3e-3


class ABOptions(StagedOptions):
    """Options of ab."""

    margin: float = Field(1.0, gt=0, strict=True)  # the authors' code and RepDistiller; KD-Zoo has 2
    schedule: Literal["joint", "two-stage"] = "two-stage"  # the paper, and every source
    stage_epochs: int = Field(30, ge=1, le=MAX_EPOCHS, strict=True)  # RepDistiller; KD-Zoo has 50


@register
class AB(Method):
    """The student's neurons, through a connector at every stage, fire where the teacher's do.

    A student's map that is smaller than the teacher's is brought to its size by adaptive average pooling, which repeats.
    """

    name = "ab"
    paper = Paper(
        "B. Heo, M. Lee, S. Yun, J. Y. Choi",
        "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
        "AAAI",
        2019,
        "https://arxiv.org/abs/1811.03233",
    )
    terms = ("ab",)
    vanishes_at_match = False  # a response within the margin is wrong on either side
    Options = ABOptions
    options: ABOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        stages = paired_stages(student, teacher, self.name)
        self.ours, self.theirs = after_relu(student, stages), after_relu(teacher, stages)
        self.needs = Needs(frozenset(self.ours), frozenset(self.theirs))
        pairs = zip(self.ours, self.theirs, strict=True)
        self.connectors = nn.ModuleList(connector(student.tap(ours), teacher.tap(theirs)) for ours, theirs in pairs)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, as the factor 3/1000 is part of the authors' loss."""
        return {"ab": 1.0}

    @classmethod
    def phases(cls, options: Any) -> tuple[Phase, ...]:
        """The boundaries alone without the head and then the task (the authors' second stage has soft targets, as ab+kd has), or joint."""
        if options.schedule == "joint":
            return (Phase("joint"),)
        first = Phase("boundaries", options.stage_epochs, only=frozenset({"ab"}), head=False)
        return then_the_task(first)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``ab``."""
        theirs = [teacher.maps[tap] for tap in self.theirs]
        ours = []
        for tap, connect, wanted in zip(self.ours, self.connectors, theirs, strict=True):
            features = at_least_float32(student.maps[tap])
            with full_precision(features.device):
                response: Tensor = connect(features)
            ours.append(pooled(response, (wanted.shape[2], wanted.shape[3]), "avg"))
        return {"ab": ab_loss(ours, theirs, self.options.margin)}
