"""vid: variational information distillation. A Gaussian, learned beside the student, says how likely the teacher's features are.

The variance is a parameter that is trained; mdistiller keeps it out of its optimiser, so that it stays at its start.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, paired_stages, register, same_shape
from .fsp import match_sizes

MIN_VARIANCE = 1e-5  # of the variance (RepDistiller; KD-Zoo: 1e-6)


def vid_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's map under a Gaussian with one variance per channel, less its constant.

    L = 1/(N C H W) sum 1/2 [(t - mu)^2 / v_c + log v_c]. Ahn et al. 2019. Negative where the variance is small enough.
    Computed in at least float32.

    Args:
        mean: [N, C, H, W], mu, made of the student's map.
        teacher: [N, C, H, W].
        variance: [C], above 0.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(mean, teacher)
    variance = at_least_float32(variance)[:, None, None]
    return ((at_least_float32(teacher) - at_least_float32(mean)).square() / variance + variance.log()).mean() / 2


class VIDOptions(MethodOptions):
    """Options of vid."""

    variance: float = Field(5.0, ge=1e-3, le=1e3, strict=True)  # of every channel at the start: RepDistiller, mdistiller and KD-Zoo


class Gaussian(nn.Module):
    """mu and v of one stage: three 1x1 convolutions without bias on the student's map, and a softplus of one number per channel."""

    def __init__(self, ours: int, theirs: int, variance: float) -> None:
        super().__init__()
        widths = ((ours, theirs), (theirs, theirs), (theirs, theirs))
        self.regressor = nn.ModuleList(nn.Conv2d(inputs, outputs, 1, bias=False) for inputs, outputs in widths)
        self.alpha = nn.Parameter(torch.full((theirs,), math.log(math.expm1(variance - MIN_VARIANCE))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] of the student -> mu [N, C', H, W], v [C']."""
        x = x.to(self.alpha.dtype)
        with full_precision(x.device):
            first, second, third = self.regressor
            mean: Tensor = third(F.relu(second(F.relu(first(x)))))
        return mean, F.softplus(self.alpha) + MIN_VARIANCE


@register
class VID(Method):
    """The student's stages are as informative of the teacher's as a Gaussian can tell: the sum over the stages."""

    name = "vid"
    paper = Paper(
        "S. Ahn, S. X. Hu, A. Damianou, N. D. Lawrence, Z. Dai",
        "Variational Information Distillation for Knowledge Transfer",
        "CVPR",
        2019,
        "https://arxiv.org/abs/1904.05835",
    )
    terms = ("vid",)
    vanishes_at_match = False
    Options = VIDOptions
    options: VIDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.stages = paired_stages(student, teacher, self.name)
        self.needs = Needs(frozenset(self.stages), frozenset(self.stages))
        channels = [(student.tap(stage).channels, teacher.tap(stage).channels) for stage in self.stages]
        self.gaussians = nn.ModuleList(Gaussian(ours, theirs, self.options.variance) for ours, theirs in channels)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1 on the sum over the stages: RepDistiller, mdistiller. (KD-Zoo: 1 on their mean.)"""
        return {"vid": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``vid``."""
        losses = []
        for stage, gaussian in zip(self.stages, self.gaussians, strict=True):
            ours, theirs = match_sizes(student.maps[stage], teacher.maps[stage], "avg")
            mean, variance = gaussian(ours)
            losses.append(vid_loss(mean, theirs, variance))
        return {"vid": torch.stack(losses).sum()}
