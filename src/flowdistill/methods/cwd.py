"""cwd: channel-wise distillation. Where each channel is active, as a probability over the image.

Made for dense prediction; no source has a value for CIFAR.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, paired_stages, register, same_shape
from .fsp import match_sizes


def cwd_loss(student: Tensor, teacher: Tensor, tau: float = 4.0) -> Tensor:
    """tau^2 KL(phi_t || phi_s) of each channel's softmax over the image, mean over batch and channels, sum over the positions.

    L = tau^2/(N C) sum_{n,c} sum_x phi_t[x] (log phi_t[x] - log phi_s[x]) with phi = softmax over the H W positions of f[n, c] / tau.
    Shu et al. 2021. Computed in at least float32.

    Args:
        student, teacher: [N, C, H, W].
        tau: the temperature.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    log_s, log_t = (F.log_softmax(at_least_float32(x).flatten(2) / tau, dim=2).flatten(0, 1) for x in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * tau**2


class CWDOptions(MethodOptions):
    """Options of cwd."""

    stages: Literal["last", "all"] = "last"  # the authors: the last features, or the logits of every pixel; MMRazor's detectors: each level
    tau: float = Field(4.0, gt=0, strict=True)  # the authors' README; MMRazor has 1, with weight 5 to 10


@register
class CWD(Method):
    """The student's channels are active where the teacher's are: the sum over the stages.

    Where a stage's channels differ, a 1x1 convolution maps the student's to the teacher's; where its sizes differ, the larger map is
    average-pooled to the smaller.
    """

    name = "cwd"
    paper = Paper(
        "C. Shu, Y. Liu, J. Gao, Z. Yan, C. Shen",
        "Channel-wise Knowledge Distillation for Dense Prediction",
        "ICCV",
        2021,
        "https://arxiv.org/abs/2011.13256",
    )
    terms = ("cwd",)
    Options = CWDOptions
    options: CWDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        stages = paired_stages(student, teacher, self.name)
        self.stages = stages if self.options.stages == "all" else stages[-1:]
        self.needs = Needs(frozenset(self.stages), frozenset(self.stages))
        self.adapters = nn.ModuleDict()
        for stage in self.stages:
            ours, theirs = student.tap(stage).channels, teacher.tap(stage).channels
            if ours != theirs:
                self.adapters[stage] = nn.Conv2d(ours, theirs, 1, bias=False)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """3: the authors' README, beside tau 4."""
        return {"cwd": 3.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``cwd``."""
        losses = []
        for stage in self.stages:
            ours, theirs = match_sizes(student.maps[stage], teacher.maps[stage], "avg")
            losses.append(cwd_loss(self._adapted(stage, ours), theirs, self.options.tau))
        return {"cwd": torch.stack(losses).sum()}

    def _adapted(self, stage: str, features: Tensor) -> Tensor:
        if stage not in self.adapters:
            return features
        adapter = self.adapters[stage]
        assert isinstance(adapter, nn.Conv2d)
        with full_precision(features.device):
            adapted: Tensor = adapter(features.to(adapter.weight.dtype))
        return adapted
