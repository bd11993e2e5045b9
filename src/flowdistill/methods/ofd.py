"""ofd: the overhaul of feature distillation. Stages before ReLU, compared only where the teacher fires or the student is above its margin.

The authors keep the teacher in train mode, so that the batch normalises its maps and moves its running statistics; here it is in eval
mode, as for every method. KD-Zoo's margin is the mean of the batch's own negative responses, and it
averages over the elements where the authors add them up: its loss is C H W times smaller, beside a weight of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, MethodContext, NetSpec, Outputs
from .base import Method, Needs, Paper, at_least_float32, before_relu, paired_stages, register, same_shape
from .fsp import match_sizes

RARE = 1e-3  # probability of a negative response up to which the margin is -3 s (the authors' code)


def margins(weight: Tensor, bias: Tensor) -> Tensor:
    """The mean negative response of every channel, as the batch normalisation before the ReLU tells it: M = E[x | x < 0].

    x is normal with mean m = bias and deviation s = |weight|: M = m - s phi(m/s) / Phi(-m/s), where phi and Phi are the standard normal
    density and distribution, and M = -3 s if Phi(-m/s) <= 0.001. If s is 0, M = min(m, 0). Heo et al. 2019, the authors' code. Computed in
    at least float32.

    Args:
        weight, bias: [C] of the batch normalisation.

    Returns:
        [C].

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(weight, bias)
    mean, deviation = at_least_float32(bias), at_least_float32(weight).abs()
    z = mean / deviation.clamp(min=torch.finfo(deviation.dtype).tiny)
    negative = torch.special.ndtr(-z)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(negative > RARE, mean - deviation * density / negative.clamp(min=RARE), -3 * deviation)


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squared distance from the teacher's responses, which are raised to the margin: mean over the batch, sum over the rest.

    l = 0 where r <= t^ <= 0, else (r - t^)^2, with t^ = max(t, M). Heo et al. 2019. Computed in at least float32.

    Args:
        student: [N, C, H, W] before ReLU, r.
        teacher: [N, C, H, W] before ReLU, t.
        margin: [C], M.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    response, target = at_least_float32(student), torch.maximum(at_least_float32(teacher), margin[:, None, None])
    below = (response <= target) & (target <= 0)  # which a NaN is not
    return torch.where(below, 0.0, response - target).square().flatten(1).sum(1).mean()


def ofd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], margin: Sequence[Tensor]) -> Tensor:
    """n stages, each with twice the weight of the one before: sum_i 2^(i-n) partial_distance_i.

    The authors' code, whose factor 1/1000 is the term's weight.
    """
    losses = [partial_distance(r, t, m) for r, t, m in zip(student, teacher, margin, strict=True)]
    return torch.stack([loss * 2.0 ** (i - len(losses)) for i, loss in enumerate(losses, 1)]).sum()


def connector(ours: int, theirs: int) -> nn.Sequential:
    """From the student's channels to the teacher's: a 1x1 convolution, normal with variance 2 / C_t, no bias; batch normalisation."""
    convolution = nn.Conv2d(ours, theirs, 1, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / theirs))
    return nn.Sequential(convolution, nn.BatchNorm2d(theirs))


@register
class OFD(Method):
    """The student's responses, through a connector at every stage, follow the teacher's where that fires, and else stay below its margin.

    Where two maps differ in size, the larger is average-pooled to the smaller.
    """

    name = "ofd"
    paper = Paper(
        "B. Heo, J. Kim, S. Yun, H. Park, N. Kwak, J. Y. Choi",
        "A Comprehensive Overhaul of Feature Distillation",
        "ICCV",
        2019,
        "https://arxiv.org/abs/1904.01866",
    )
    terms = ("ofd",)
    vanishes_at_match = False  # the connectors stand between the two

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        stages = paired_stages(student, teacher, self.name)
        self.taps = before_relu(student, stages, self.name)
        before_relu(teacher, stages, self.name)
        unknown = [repr(tap) for tap in self.taps if not teacher.tap(tap).norm]
        if unknown:
            raise ValueError(
                f"ofd: in {teacher.name} no single batch normalisation gives the tap {', '.join(unknown)}, and the margins are made of its "
                f"weight and bias; choose a teacher where one does, such as a ResNet, or a method without margins such as ab"
            )
        self.needs = Needs(frozenset(self.taps), frozenset(self.taps), context=frozenset({"norms"}))
        self.connectors = nn.ModuleList(connector(student.tap(tap).channels, teacher.tap(tap).channels) for tap in self.taps)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1e-3: the authors' code for CIFAR-100, mdistiller. (The authors for ImageNet: 1e-4, for segmentation: 1e-5.)"""
        return {"ofd": 1e-3}

    def setup(self, context: MethodContext) -> None:
        """Keep the margins of every stage."""
        self.hold(**{_margin(tap): margins(*context.norms[tap]) for tap in self.taps if tap in context.norms})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``ofd``."""
        responses, targets = [], []
        for tap, connect in zip(self.taps, self.connectors, strict=True):
            ours, theirs = match_sizes(at_least_float32(student.maps[tap]), teacher.maps[tap], "avg")
            with full_precision(ours.device):
                responses.append(connect(ours))
            targets.append(theirs)
        return {"ofd": ofd_loss(responses, targets, [self.held(_margin(tap)) for tap in self.taps])}


def _margin(tap: str) -> str:
    return f"margin_{tap.removesuffix('.pre')}"  # a buffer's name holds no dot
