"""mgd: masked generative distillation. Of a part of the student's channels the teacher's whole map is generated.

The authors draw the masks from the global generator; here they are a hash of seed, epoch, image and channel
(``hashed.py``). The variant for detection, which masks positions in place of channels, is not here.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, paired_stages, register, same_shape
from .fsp import match_sizes
from .hashed import channel_mask, salt


def generation_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference, mean over the batch, sum over channels and positions: L = 1/N sum (g - t)^2.

    Yang et al. 2022, without the factor alpha, which is the term's weight. Computed in at least float32.

    Args:
        generated: [N, C, H, W], g.
        teacher: [N, C, H, W].

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(generated, teacher)
    return (at_least_float32(generated) - at_least_float32(teacher)).square().flatten(1).sum(1).mean()


class MGDOptions(MethodOptions):
    """Options of mgd. ``ratio``: the share of channels that is hidden (lambda)."""

    ratio: float = Field(0.15, ge=0, lt=1, strict=True)  # the authors' code for classification


@register
class MGD(Method):
    """What is left of the student's last stage, through a 1x1 convolution where the widths differ, must do to generate the teacher's.

    Where the two maps differ in size, the larger is average-pooled to the smaller.
    """

    name = "mgd"
    paper = Paper(
        "Z. Yang, Z. Li, M. Shao, D. Shi, Z. Yuan, C. Yuan",
        "Masked Generative Distillation",
        "ECCV",
        2022,
        "https://arxiv.org/abs/2205.01529",
    )
    version = 2  # 1 drew the same masks for every seed
    terms = ("mgd",)
    vanishes_at_match = False  # the generation stands between the two
    Options = MGDOptions
    options: MGDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.stage = paired_stages(student, teacher, self.name)[-1]
        self.needs = Needs(frozenset({self.stage}), frozenset({self.stage}))
        ours, theirs = student.tap(self.stage).channels, teacher.tap(self.stage).channels
        self.align = nn.Sequential() if ours == theirs else nn.Conv2d(ours, theirs, 1)
        self.generation = nn.Sequential(nn.Conv2d(theirs, theirs, 3, padding=1), nn.ReLU(), nn.Conv2d(theirs, theirs, 3, padding=1))
        self.hold(salt=salt())

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1.2e-3: the authors' code for CIFAR-100. (ImageNet: 7e-5.)"""
        return {"mgd": 1.2e-3}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``mgd``."""
        ours, theirs = match_sizes(at_least_float32(student.maps[self.stage]), teacher.maps[self.stage], "avg")
        mask = channel_mask(self.get_buffer("salt"), batch, theirs, self.options.ratio)
        with full_precision(ours.device):
            generated = self.generation(self.align(ours) * mask[:, :, None, None])
        return {"mgd": generation_loss(generated, theirs)}
