"""fitnets: hints. The student's second stage is regressed on the teacher's.

The second is the one that RepDistiller and mdistiller take for every pair of the CRD benchmark, networks of four stages among them: vgg13's
256x8x8 for vgg8, resnet50's 512x16x16 for MobileNetV2. They have a regressor even where the shapes agree, and train in one stage; the
authors have none there, and two.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from ..config import MAX_EPOCHS
from ..device import full_precision
from ..types import Batch, NetSpec, Outputs, TapSpec
from .base import Method, Needs, Paper, Phase, StagedOptions, at_least_float32, mse_loss, paired_stages, register, then_the_task
from .fsp import match_sizes


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over batch, channels and positions: L = 1/(N C H W) sum (r - t)^2.

    Romero et al. 2015 write 1/2 ||r - t||^2, which for one sample is C H W / 2 times this. Computed in at least float32.

    Args:
        student: [N, C, H, W], r, what the regressor makes of the student's map.
        teacher: [N, C, H, W].

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return mse_loss(student, teacher)


def connector(ours: TapSpec, theirs: TapSpec) -> nn.Sequential:
    """From the student's channels and size to the teacher's: a convolution without padding, and batch normalisation.

    Its kernel is as much larger than 1x1 as the student's map is larger than the teacher's (Romero et al. 2015, section 2.2). A map
    that is smaller keeps its size.
    """
    kernel = (max(ours.height - theirs.height, 0) + 1, max(ours.width - theirs.width, 0) + 1)
    return nn.Sequential(nn.Conv2d(ours.channels, theirs.channels, kernel, bias=False), nn.BatchNorm2d(theirs.channels))


class FitNetsOptions(StagedOptions):
    """Options of fitnets."""

    schedule: Literal["joint", "two-stage"] = "joint"  # RepDistiller, mdistiller and KD-Zoo; the paper has two stages
    stage_epochs: int = Field(30, ge=1, le=MAX_EPOCHS, strict=True)  # RepDistiller's first stage of other methods; no source has its own


@register
class FitNets(Method):
    """The student's second stage, through a regressor where the shapes differ, is pulled to the teacher's.

    Where the teacher's map is larger it is average-pooled.
    """

    name = "fitnets"
    paper = Paper(
        "A. Romero, N. Ballas, S. E. Kahou, A. Chassang, C. Gatta, Y. Bengio",
        "FitNets: Hints for Thin Deep Nets",
        "ICLR",
        2015,
        "https://arxiv.org/abs/1412.6550",
    )
    version = 2  # 1 took the middle stage, of four the third
    terms = ("fitnets",)
    Options = FitNetsOptions
    options: FitNetsOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        stages = paired_stages(student, teacher, self.name)
        self.stage, middle = stages[:2][-1], stages[len(stages) // 2]
        if self.stage == middle:
            self.version = 1
        self.needs = Needs(frozenset({self.stage}), frozenset({self.stage}))
        ours, theirs = student.tap(self.stage), teacher.tap(self.stage)
        self.regressor = nn.Sequential() if ours.shape == theirs.shape else connector(ours, theirs).append(nn.ReLU())

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """100: RepDistiller and mdistiller. (KD-Zoo: 0.1 on the last stage.)"""
        return {"fitnets": 100.0}

    @classmethod
    def phases(cls, options: Any) -> tuple[Phase, ...]:
        """joint, or the layers below the hint alone and then the task (paper, algorithm 1, whose second stage is that of fitnets+kd)."""
        if options.schedule == "joint":
            return (Phase("joint"),)
        first = Phase("hint", options.stage_epochs, only=frozenset({"fitnets"}), head=False)
        return then_the_task(first)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``fitnets``."""
        features = at_least_float32(student.maps[self.stage])
        with full_precision(features.device):
            regressed = self.regressor(features)
        return {"fitnets": hint_loss(*match_sizes(regressed, teacher.maps[self.stage], "avg"))}
