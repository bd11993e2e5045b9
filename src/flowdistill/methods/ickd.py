"""ickd: inter-channel correlation. Which channels of the last stage are active together.

The authors' code for ImageNet, and torchdistill, divide by N once more than the authors' code for CIFAR, which is followed here. Of a WRN
it takes the last map after the ReLU that follows its sums, which feeds the classifier, and so does this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import MIN_PRODUCT_NORM, Method, Needs, Paper, after_relu, at_least_float32, paired_stages, register, same_shape, unit


def correlation(features: Tensor) -> Tensor:
    """Inner products of the channels over the image, each row L2-normalised: [N, C, H, W] -> [N, C, C]. A row of zeros stays so."""
    x = at_least_float32(features).flatten(2)
    with full_precision(x.device):
        return unit(x @ x.transpose(1, 2), 2, MIN_PRODUCT_NORM)


def ickd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the correlation matrices: L = 1/(N C) sum_n ||G_s - G_t||_F^2 with G as ``correlation`` has it.

    Liu et al. 2021, and the authors' code for CIFAR. Computed in at least float32.

    Args:
        student: [N, C, H, W].
        teacher: [N, C, H', W']; its size need not agree.

    Returns:
        A scalar.

    Raises:
        ValueError: batch or channels differ.
    """
    ours, theirs = correlation(student), correlation(teacher)
    same_shape(ours, theirs)
    return (ours - theirs).square().sum(2).mean()


@register
class ICKD(Method):
    """The channels of the student's last stage, embedded into as many as the teacher has, correlate as the teacher's do."""

    name = "ickd"
    paper = Paper(
        "L. Liu, Q. Huang, S. Lin, H. Xie, B. Wang, X. Chang, X. Liang",
        "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation",
        "ICCV",
        2021,
        "https://arxiv.org/abs/2202.03680",
    )
    terms = ("ickd",)
    vanishes_at_match = False  # the embedding stands between equal features

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        last = paired_stages(student, teacher, self.name)[-1:]
        (self.ours,), (self.theirs,) = after_relu(student, last), after_relu(teacher, last)
        self.needs = Needs(frozenset({self.ours}), frozenset({self.theirs}))
        channels = teacher.tap(self.theirs).channels
        self.convolution = nn.Conv2d(student.tap(self.ours).channels, channels, 1, bias=False)
        self.normalisation = nn.BatchNorm2d(channels)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """2.5: the authors' README and script for CIFAR-100."""
        return {"ickd": 2.5}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``ickd``."""
        features = student.maps[self.ours]
        with full_precision(features.device):
            embedded = self.normalisation(self.convolution(features.to(self.convolution.weight.dtype)))
        return {"ickd": ickd_loss(embedded, teacher.maps[self.theirs])}
