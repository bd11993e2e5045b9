"""ft: factor transfer. The student's translator follows what the teacher's paraphraser distils of the last stage.

RepDistiller does not compare the factors but attention maps made of them; torchdistill's p = 2 is a norm that is not squared. As in the
authors' code neither part has batch normalisation; RepDistiller's translator has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import MAX_EPOCHS
from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, Phase, at_least_float32, paired_stages, register, same_shape, unit
from .fsp import match_sizes

SLOPE = 0.1  # of every LeakyReLU


def ft_loss(student: Tensor, teacher: Tensor, p: int = 1) -> Tensor:
    """Distance of the factors, each L2-normalised per sample, mean over batch and elements: L = 1/(N M) sum |u_s - u_t|^p.

    u = vec F / ||vec F|| with M entries. Kim et al. 2018. If the factors differ in size, the larger is average-pooled to the
    smaller. Computed in at least float32.

    Args:
        student, teacher: factors [N, C, H, W]; their sizes need not agree.
        p: 1 or 2.

    Returns:
        A scalar.

    Raises:
        ValueError: batch or channels differ.
    """
    ours, theirs = (unit(at_least_float32(x).flatten(1), 1) for x in match_sizes(student, teacher, "avg"))
    same_shape(ours, theirs)
    return F.l1_loss(ours, theirs) if p == 1 else F.mse_loss(ours, theirs)


def layers(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], channels: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions with a LeakyReLU after each."""
    pairs = [(kind(inputs, outputs, 3, padding=1), nn.LeakyReLU(SLOPE)) for inputs, outputs in pairwise(channels)]
    return nn.Sequential(*(module for pair in pairs for module in pair))


class FTOptions(MethodOptions):
    """Options of ft; ``stage_epochs`` and ``stage_lr`` are the paraphraser's."""

    rate: float = Field(0.5, gt=0, le=4, strict=True)  # k, the factor's channels over the teacher's: the authors' code
    p: Literal[1, 2] = 1  # the authors' code
    stage_epochs: int = Field(30, ge=1, le=MAX_EPOCHS, strict=True)  # RepDistiller and KD-Zoo; the authors have 6
    stage_lr: float = Field(1e-2, gt=0, strict=True)  # RepDistiller for ResNets; the authors have 0.1, on the L1 distance


@register
class FT(Method):
    """The student's last stage, translated, is pulled to the factor of the teacher's; the paraphraser that makes it is trained first.

    The paraphraser is an autoencoder of the teacher's map: three convolutions, and three transposed ones back.
    """

    name = "ft"
    paper = Paper(
        "J. Kim, S. Park, N. Kwak",
        "Paraphrasing Complex Network: Network Compression via Factor Transfer",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1802.04977",
    )
    terms = ("ft", "paraphraser")
    vanishes_at_match = False  # paraphraser and translator stand between equal features
    Options = FTOptions
    options: FTOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.stage = paired_stages(student, teacher, self.name)[-1]
        self.needs = Needs(frozenset({self.stage}), frozenset({self.stage}))
        ours, theirs = student.tap(self.stage).channels, teacher.tap(self.stage).channels
        factor = max(round(theirs * self.options.rate), 1)
        self.encoder = layers(nn.Conv2d, (theirs, theirs, factor, factor))
        self.decoder = layers(nn.ConvTranspose2d, (factor, factor, theirs, theirs))
        self.translator = layers(nn.Conv2d, (ours, ours, factor, factor))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """ft: 500, the authors' code. (RepDistiller and KD-Zoo: 200.) paraphraser: 1, alone in its phase."""
        return {"ft": 500.0, "paraphraser": 1.0}

    @classmethod
    def phases(cls, options: Any) -> tuple[Phase, ...]:
        """The paraphraser alone, and then the student with the paraphraser frozen (paper)."""
        first = Phase("paraphraser", options.stage_epochs, options.stage_lr, only=frozenset({"paraphraser"}), head=False)
        return (first, Phase("transfer", without=frozenset({"paraphraser"})))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``ft``, and ``paraphraser``: the mean squared error of its reconstruction of the teacher's map."""
        ours, theirs = at_least_float32(student.maps[self.stage]), at_least_float32(teacher.maps[self.stage])
        with full_precision(ours.device):
            factor = self.encoder(theirs)
            rebuilt, translated = self.decoder(factor), self.translator(ours)
        return {"ft": ft_loss(translated, factor.detach(), self.options.p), "paraphraser": F.mse_loss(rebuilt, theirs)}
