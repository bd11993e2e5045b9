"""radio: feature matching. Through learned heads the student's features become the teacher's: the embedding, and each position of the map.

Made for teachers without a classifier. The paper has several teachers and no labels; here there is one, beside the task. Maps are those of
the last stage, as in the paper, or of all (``stages=all``), each with a head of its own, added up. Where two maps differ in size, both are
interpolated bilinearly to the larger height and width, the student's after its head. Distances are means over images, positions and, for
smooth-L1, channels. The paper's summary is the class token; here it is the embedding, whatever the network pools. Theia takes one cosine of
the whole map in the place of one for each position.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, paired_stages, register, two_dimensions
from .pefd import direction_loss


def match_loss(matched: Tensor, teacher: Tensor, smooth_l1: float) -> Tensor:
    """A mixture of cosine distance and smooth-L1: L = (1 - b) 1/N sum_n (1 - cos(m_n, t_n)) + b 1/(N D) sum_{n,d} h(m[n,d] - t[n,d]).

    h(x) = x^2/2 where |x| < 1, else |x| - 1/2. Ranzinger et al. 2024, equation 3, with alpha = 1 - b and beta = b; equation 2 with b = 0.
    Zeros, which have no direction, have the cosine 0. Computed in at least float32.

    Args:
        matched: [N, D], m, what a head makes of the student's features.
        teacher: [N, D].
        smooth_l1: b, from 0 (cosine distance alone) to 1 (smooth-L1 alone).

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    cosine = direction_loss(matched, teacher)  # refuses shapes that differ
    return (1 - smooth_l1) * cosine + smooth_l1 * F.smooth_l1_loss(at_least_float32(matched), at_least_float32(teacher))


def interpolated(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, C, H', W'] by bilinear interpolation, as ``F.interpolate`` without ``align_corners``.

    It is two matrix products, because the backward pass of ``F.interpolate`` adds up in any order on a GPU.
    """
    if x.shape[2:] == size:
        return x
    eyes = (torch.eye(length, dtype=x.dtype, device=x.device)[None] for length in x.shape[2:])
    rows, columns = (F.interpolate(eye, length, mode="linear")[0] for eye, length in zip(eyes, size, strict=True))
    return rows.T @ x @ columns


def vectors(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N H W, C]: one row for each position of each image."""
    return x.movedim(1, -1).flatten(0, 2)


class RADIOOptions(MethodOptions):
    """Options of radio. ``features``: what is matched. ``stages``: whose maps. ``head``: two layers with LayerNorm and GELU, or one.

    ``pooled_l1``, ``dense_l1``: the share of smooth-L1 in the distance of embeddings and of maps; the rest is cosine distance.
    """

    features: Literal["both", "pooled", "dense"] = "both"  # the paper, as the four that follow
    stages: Literal["last", "all"] = "last"
    pooled_l1: float = Field(0.0, ge=0, le=1, strict=True)
    dense_l1: float = Field(0.1, ge=0, le=1, strict=True)
    head: Literal["mlp", "linear"] = "mlp"

    @model_validator(mode="after")
    def _every_option_counts(self) -> Self:
        idle = {"pooled": ("stages", "dense_l1"), "dense": ("pooled_l1",)}.get(self.features, ())
        for option in idle:
            if getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} changes nothing with features={self.features}; set features=both, or leave {option} out")
        return self


@register
class RADIO(Method):
    """The student's embedding and last map, each through a head, are pulled to the teacher's."""

    name = "radio"
    paper = Paper(
        "M. Ranzinger, G. Heinrich, J. Kautz, P. Molchanov",
        "AM-RADIO: Agglomerative Vision Foundation Model - Reduce All Domains Into One",
        "CVPR",
        2024,
        "https://arxiv.org/abs/2312.06709",
    )
    terms = ("radio",)
    vanishes_at_match = False  # the heads stand between the two
    Options = RADIOOptions
    options: RADIOOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        pooled, dense = self.options.features != "dense", self.options.features != "pooled"
        if pooled:
            two_dimensions(teacher, self.name, "which leaves no direction to learn; choose a teacher with a wider embedding")
        paired = paired_stages(student, teacher, self.name) if dense else ()
        self.stages = paired if self.options.stages == "all" else paired[-1:]
        for stage in self.stages:
            if teacher.tap(stage).channels < 2:
                raise ValueError(
                    f"radio: {stage} of {teacher.name} has one channel, which leaves no direction to learn; choose a teacher with wider "
                    f"stages, or set options.radio.features=pooled"
                )
        self.needs = Needs(frozenset(self.stages), frozenset(self.stages), embedding=pooled)
        self.summary = self._head(student.embedding, teacher.embedding) if pooled else None
        self.dense = nn.ModuleList(self._head(student.tap(stage).channels, teacher.tap(stage).channels) for stage in self.stages)

    def _head(self, ours: int, theirs: int) -> nn.Module:
        """[..., ours] -> [..., theirs]. Between two layers the width is the teacher's: section 3.2, for one teacher."""
        if self.options.head == "linear":
            return nn.Linear(ours, theirs)
        return nn.Sequential(nn.Linear(ours, theirs), nn.LayerNorm(theirs), nn.GELU(), nn.Linear(theirs, theirs))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1 on the sum of both, beside a task weight of 1: the paper's lambda and gamma (section 3.4.1), which has no task."""
        return {"radio": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``radio``: the distance of the embeddings plus those of the maps."""
        losses = []
        with full_precision(student.embedding.device):
            if self.summary is not None:
                matched = self.summary(at_least_float32(student.embedding))
                losses.append(match_loss(matched, teacher.embedding, self.options.pooled_l1))
            for stage, head in zip(self.stages, self.dense, strict=True):
                ours, theirs = (at_least_float32(outputs.maps[stage]) for outputs in (student, teacher))
                ours = head(ours.movedim(1, -1)).movedim(-1, 1)
                size = (max(ours.shape[2], theirs.shape[2]), max(ours.shape[3], theirs.shape[3]))
                ours, theirs = (vectors(interpolated(x, size)) for x in (ours, theirs))
                losses.append(match_loss(ours, theirs, self.options.dense_l1))
        return {"radio": torch.stack(losses).sum()}
