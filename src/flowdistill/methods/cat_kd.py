"""cat_kd: class attention transfer. Where in an image the evidence for each class lies.

The authors convert both networks, so that the logits are the means of the class activation maps; here a classifier keeps its bias, of
which the maps know nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, mse_loss, register, same_classes, unit
from .fsp import pooled


def class_attention(cam: Tensor, r: int = 2, *, normalise: bool = True) -> Tensor:
    """Class activation maps, averaged to r x r and then L2-normalised per class: [N, K, H, W] -> [N, K, r r].

    Guo et al. 2023. A map of zeros stays zeros. Computed in at least float32.
    """
    attention = pooled(at_least_float32(cam), (r, r), "avg").flatten(2)
    return unit(attention, 2) if normalise else attention


def cat_loss(student: Tensor, teacher: Tensor, r: int = 2, *, normalise: bool = True) -> Tensor:
    """Squared difference of ``class_attention``, mean over batch, classes and positions: L = 1/(N K r^2) sum (A_s - A_t)^2.

    Guo et al. 2023, the authors' code.

    Args:
        student, teacher: class activation maps [N, K, H, W], without ReLU; their sizes need not agree.
        r: rows and columns that are compared.
        normalise: whether a class's map counts by its shape alone.

    Returns:
        A scalar.

    Raises:
        ValueError: batch or classes differ.
    """
    ours, theirs = (class_attention(cam, r, normalise=normalise) for cam in (student, teacher))
    return mse_loss(ours, theirs)


class CATKDOptions(MethodOptions):
    """Options of cat_kd. ``r``: rows and columns of the maps that are compared; ``normalise``: each class's map by its norm."""

    r: int = Field(2, ge=1, le=64, strict=True)  # the authors' code; 4 for ShuffleNets
    normalise: bool = True  # the authors' code for networks of two styles; not for those of one


@register
class CATKD(Method):
    """The student's class activation maps, on a coarse grid, match the teacher's."""

    name = "cat_kd"
    paper = Paper(
        "Z. Guo, H. Yan, H. Li, X. Lin",
        "Class Attention Transfer Based Knowledge Distillation",
        "CVPR",
        2023,
        "https://arxiv.org/abs/2304.12777",
    )
    terms = ("cat_kd",)
    Options = CATKDOptions
    options: CATKDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        same_classes(student, teacher, self.name)
        for spec in (student, teacher):
            if "cam" not in {tap.name for tap in spec.taps}:
                raise ValueError(
                    f"cat_kd: {spec.name} has no tap 'cam', its classifier at every position of the last map; choose a network that has, "
                    f"or a method on logits such as kd"
                )
        self.needs = Needs(frozenset({"cam"}), frozenset({"cam"}))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """Normalised: 400, the default of the authors' code (15 to 600 by pair); else 0.7, theirs for resnet56-resnet20 (0.7 to 15)."""
        return {"cat_kd": 400.0 if options.normalise else 0.7}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``cat_kd``."""
        chosen = self.options
        return {"cat_kd": cat_loss(student.maps["cam"], teacher.maps["cam"], chosen.r, normalise=chosen.normalise)}
