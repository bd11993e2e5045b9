"""at: attention transfer. Where in the image a stage is active, not how.

The authors, RepDistiller and mdistiller add the stages up and take a WRN's as the plain sums that they end in, and so does this. KD-Zoo has
the mean over the stages, 1/3 of the sum over three.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..types import Batch, NetSpec, Outputs
from .base import MIN_PRODUCT_NORM, Method, MethodOptions, Needs, Paper, at_least_float32, paired_stages, register, same_shape, unit
from .fsp import pooled

Mode = Literal["code", "paper"]


def attention_map(features: Tensor) -> Tensor:
    """Mean of squares over the channels, flattened and L2-normalised per sample: [N, C, H, W] -> [N, H*W].

    Zagoruyko and Komodakis 2017, section 3.1, F_sum^2 up to the factor C, which the normalisation removes. A map of zeros gives
    zeros. Computed in at least float32.
    """
    return unit(at_least_float32(features).square().mean(1).flatten(1), 1, MIN_PRODUCT_NORM)


def attention_loss(student: Tensor, teacher: Tensor, mode: Mode = "code") -> Tensor:
    """Distance between the attention maps q of one stage, mean over the batch. Zagoruyko and Komodakis 2017.

    ``code`` (the authors' published code): 1/(N H W) sum (q_s - q_t)^2. ``paper`` (eq. 2): 1/N sum_n ||q_s - q_t||_2, not squared and
    without the factor beta/2. q is ``attention_map``. If the two stages differ in size, the larger feature map is average-pooled to the
    smaller. Computed in at least float32.

    Args:
        student: [N, C, H, W].
        teacher: [N, C', H', W']; its channels and size need not agree.
        mode: ``code`` or ``paper``.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.

    Example:
        >>> import torch
        >>> from flowdistill.methods.attention import attention_loss
        >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])  # active at the top left
        >>> teacher = torch.tensor([[[[0.0, 0.0], [0.0, 3.0]]]])  # at the bottom right
        >>> attention_loss(student, teacher)
        tensor(0.5000)
    """
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    maps = [pooled(x, size, "avg") for x in (student, teacher)]
    ours, theirs = (attention_map(x) for x in maps)
    same_shape(ours, theirs)
    difference = ours - theirs
    if mode == "code":
        return difference.square().mean()
    norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return norms.mean()


class ATOptions(MethodOptions):
    """Options of at."""

    mode: Mode = "code"  # the authors' code, whose weight 1000 belongs to it


@register
class AT(Method):
    """The student's stages are active where the teacher's are: the sum over the stages."""

    name = "at"
    paper = Paper(
        "S. Zagoruyko, N. Komodakis",
        "Paying More Attention to Attention: Improving the Performance of CNNs via Attention Transfer",
        "ICLR",
        2017,
        "https://arxiv.org/abs/1612.03928",
    )
    terms = ("at",)
    Options = ATOptions
    options: ATOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.stages = paired_stages(student, teacher, self.name)
        self.needs = Needs(frozenset(self.stages), frozenset(self.stages))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """code: 1000 on the sum over the stages (the authors' beta, the reference log, RepDistiller).

        paper: 0.05, which is beta/2 for the "about 0.1" that the authors give for their beta over the size of the map. The code
        form divides by H W, so on small maps 1000 is too much: 20 served 16x16 digits (docs/LOG.md).
        """
        return {"at": 1000.0 if options.mode == "code" else 0.05}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``at``."""
        losses = [attention_loss(student.maps[stage], teacher.maps[stage], self.options.mode) for stage in self.stages]
        return {"at": torch.stack(losses).sum()}
