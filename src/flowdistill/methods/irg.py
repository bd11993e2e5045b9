"""irg: instance relationship graph. Logits, distances between images, and how far each image moves from one stage to the next.

This is KD-Zoo's form. The authors' Caffe code takes the edges of pooled features and transformations inside each stage, and holds the
maximum constant in the backward pass. KD-Zoo's second stage has the channels of the first or twice as many; here bins average any.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, mse_loss, paired_stages, register, same_classes


def edges(features: Tensor) -> Tensor:
    """Squared distances between the samples of a batch, divided by the largest of them: [N, ...] -> [N, N].

    d[i, j] = ||x_i - x_j||^2 / max_{i,j} ||x_i - x_j||^2 of the flattened features, from one Gram matrix of the features
    centred over the batch. Samples that are all equal give zeros. Computed in at least float32.
    """
    flat = at_least_float32(features).flatten(1)
    centred = flat - flat.mean(0)
    with full_precision(centred.device):
        gram = centred @ centred.T
    square = gram.diagonal()
    return _by_largest((square[:, None] + square - 2 * gram).clamp(min=0))


def transformation(first: Tensor, second: Tensor) -> Tensor:
    """How far each sample moves from one stage to the next, divided by the farthest: [N, C, H, W] and [N, C', H', W'] -> [N].

    r[i] = ||a_i - b_i||^2 / max_i ||a_i - b_i||^2 with a and b the two maps, averaged to the smaller channels, height and width of
    both: with 16x8x8 and 32x4x4 a is pooled 2x2, and in b the channels 2c and 2c + 1 are averaged. Computed in at least float32.
    """
    channels, height, width = (min(lengths) for lengths in zip(first.shape[1:], second.shape[1:], strict=True))
    a, b = (_average(x, channels, height, width) for x in (first, second))
    return _by_largest((a - b).square().flatten(1).sum(1))


def vertex_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits: L_V = 1/(N K) sum (z_s - z_t)^2.

    Args:
        student, teacher: [N, K] logits.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return mse_loss(student, teacher)


def edge_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the edges, mean over the pairs of samples: L_E = 1/N^2 sum_{i,j} (d_s - d_t)^2.

    Args:
        student: [N, ...].
        teacher: [N, ...]; beside the batch its shape need not agree.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = edges(student), edges(teacher)
    return mse_loss(ours, theirs)


def transformation_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Squared difference of the transformations, mean over the batch: L_T = 1/N sum_i (r_s - r_t)^2.

    Args:
        student, teacher: two maps of a network, [N, C, H, W] and [N, C', H', W'], of any size.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = transformation(*student), transformation(*teacher)
    return mse_loss(ours, theirs)


def _by_largest(values: Tensor) -> Tensor:
    largest = values.amax()
    return values / largest.where(largest > 0, 1)


def _average(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    x = at_least_float32(x)
    c, h, w = x.shape[1:]
    if c % channels == h % height == w % width == 0:  # equal to adaptive pooling, and deterministic on a GPU
        return x.reshape(-1, channels, c // channels, height, h // height, width, w // width).mean((2, 4, 6))
    return F.adaptive_avg_pool3d(x[:, None], (channels, height, width))[:, 0]


class IRGOptions(MethodOptions):
    """Options of irg: the factors of its three parts."""

    vertex: float = Field(0.1, gt=0, strict=True)  # KD-Zoo
    edge: float = Field(5.0, gt=0, strict=True)  # KD-Zoo, for the mean over the embedding and two stages
    transform: float = Field(5.0, gt=0, strict=True)  # KD-Zoo


@register
class IRG(Method):
    """Images relate to each other, and move through the last two stages, as in the teacher."""

    name = "irg"
    paper = Paper(
        "Y. Liu, J. Cao, B. Li, C. Yuan, W. Hu, Y. Li, Y. Duan",
        "Knowledge Distillation via Instance Relationship Graph",
        "CVPR",
        2019,
        "https://openaccess.thecvf.com/content_CVPR_2019/html/Liu_Knowledge_Distillation_via_Instance_Relationship_Graph_CVPR_2019_paper.html",
    )
    kind = "relations"
    terms = ("irg",)
    Options = IRGOptions
    options: IRGOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        same_classes(student, teacher, self.name)
        stages = paired_stages(student, teacher, self.name)
        if len(stages) < 2:
            raise ValueError(
                f"irg: {student.name} and {teacher.name} have {stages[0]!r} alone, and a transformation needs two stages; choose networks "
                f"with more of them, or a method on one stage such as sp"
            )
        self.first, self.second = stages[-2:]
        self.needs = Needs(frozenset(stages[-2:]), frozenset(stages[-2:]), logits=True, embedding=True)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1: the factors of the three parts are options (0.1, 5 and 5: KD-Zoo)."""
        return {"irg": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``irg``."""
        ours, theirs = ((outputs.maps[self.first], outputs.maps[self.second]) for outputs in (student, teacher))
        pairs = [(student.embedding, teacher.embedding), *zip(ours, theirs, strict=True)]
        vertex = vertex_loss(student.logits, teacher.logits)
        edge = torch.stack([edge_loss(*pair) for pair in pairs]).mean()
        transform = transformation_loss(ours, theirs)
        return {"irg": self.options.vertex * vertex + self.options.edge * edge + self.options.transform * transform}
