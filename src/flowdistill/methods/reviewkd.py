"""reviewkd: knowledge review. Every level of the teacher is learned from the student's levels at and behind it, fused on the way back.

The authors take the student's maps before ReLU on ImageNet; here, as on CIFAR-100, they are after it. Their loss also has an optional
kd term, which here is the composition reviewkd+kd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, before_relu, paired_stages, register, same_shape
from .fsp import pooled

WIDEST = 512  # of the fused maps (the authors' code)


def hierarchical_context_loss(fused: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two maps and of their averages on coarser and coarser grids, as a weighted mean.

    L = [mse(o, t) + sum_l w_l mse(pool_l(o), pool_l(t))] / (1 + sum_l w_l), where pool_l averages to l x l, l runs over those of 4, 2, 1
    below the height, and w is 1/2 for the first of them and halved for each that follows. mse is the mean over batch, channels and
    positions. Chen et al. 2021, the authors' code. Computed in at least float32.

    Args:
        fused: [N, C, H, W], o.
        teacher: [N, C, H, W].

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(fused, teacher)
    difference = at_least_float32(fused) - at_least_float32(teacher)  # averages are linear
    losses, weights = [difference.square().mean()], [1.0]
    for size in (4, 2, 1):
        if size >= difference.shape[2]:
            continue
        weights.append(weights[-1] / 2)
        losses.append(pooled(difference, (size, size), "avg").square().mean() * weights[-1])
    return torch.stack(losses).sum() / sum(weights)


def batch_normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[N, C, ...] normalised by the mean and the biased variance of the batch; each channel is then scaled and shifted.

    PyTorch refuses a single value per channel, such as the embedding of a batch of one. That value is its own mean and gives the shift.
    """
    if x.numel() == x.shape[1]:
        return (x - x.detach()) * weight.view(-1, *(1 for _ in x.shape[2:])) + bias.view(-1, *(1 for _ in x.shape[2:]))
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)


class Normalised(nn.Module):
    """A convolution without bias that keeps the size, then batch normalisation, always by the batch's own statistics."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_uniform_(self.convolution.weight, a=1)
        self.weight = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]."""
        return batch_normalised(self.convolution(x), self.weight, self.bias)


class Fusion(nn.Module):
    """One level of the review: attention decides, position by position, between the level's own map and what comes from behind."""

    def __init__(self, ours: int, middle: int, theirs: int, *, deepest: bool) -> None:
        super().__init__()
        self.squeeze = Normalised(ours, middle, 1)
        self.attention = None if deepest else nn.Conv2d(2 * middle, 2, 1)
        self.restore = Normalised(middle, theirs, 3)

    def forward(self, x: Tensor, behind: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Fuse one level with what the deeper level handed on.

        Args:
            x: [N, C, H, W] the student's map of this level.
            behind: [N, M, H', W'] what the deeper level handed on; None at the deepest.
            size: height and width of the teacher's map of this level.

        Returns:
            The fused map with the teacher's channels, and the [N, M, ...] map that is handed on; both are of ``size``.
        """
        x = self.squeeze(x)
        if self.attention is not None and behind is not None:
            behind = _resized(behind, (x.shape[2], x.shape[3]))
            # The attention is one convolution of both maps side by side. It is linear, so half of its weight on each map gives the same
            # without the copy of both.
            weight_x, weight_behind = self.attention.weight.chunk(2, 1)
            share = (F.conv2d(x, weight_x, self.attention.bias) + F.conv2d(behind, weight_behind)).sigmoid()
            x = x * share[:, :1] + behind * share[:, 1:]
        x = _resized(x, size)
        return self.restore(x), x


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")


class ReviewKDOptions(MethodOptions):
    """Options of reviewkd. ``warmup``: the epochs over which the loss grows, from 1/warmup in the first; 1 gives all of it at once."""

    warmup: int = Field(20, ge=1, strict=True)  # the authors' code, of 240 epochs on CIFAR-100; 1 for ImageNet


@register
class ReviewKD(Method):
    """The student's embedding and stages, fused from the deepest to the shallowest, match the teacher's, before ReLU, level by level."""

    name = "reviewkd"
    paper = Paper(
        "P. Chen, S. Liu, H. Zhao, J. Jia", "Distilling Knowledge via Knowledge Review", "CVPR", 2021, "https://arxiv.org/abs/2104.09044"
    )
    terms = ("reviewkd",)
    vanishes_at_match = False  # the fusions stand between the two
    Options = ReviewKDOptions
    options: ReviewKDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.stages = paired_stages(student, teacher, self.name)
        before = before_relu(teacher, self.stages, self.name)
        self.needs = Needs(frozenset(self.stages), frozenset(before), embedding=True)
        ours = [*(student.tap(stage).channels for stage in self.stages), student.embedding]
        theirs = [*(teacher.tap(tap).channels for tap in before), teacher.embedding]
        middle, last = min(WIDEST, student.embedding), len(self.stages)
        self.fusions = nn.ModuleList(Fusion(a, middle, b, deepest=i == last) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))

    @property
    def whole_batch(self) -> bool:
        """It normalises by the batch in either mode."""
        return True

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1: mdistiller. The authors' code on CIFAR-100 has a weight a pair, 0.6 (resnet56-resnet20) to 8 (resnet32x4-shufflenetv2)."""
        return {"reviewkd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``reviewkd``: the sum over the levels, times min((epoch + 1) / warmup, 1) if the batch has an epoch."""
        ours = [*(student.maps[stage] for stage in self.stages), student.embedding[:, :, None, None]]
        theirs = [*(teacher.maps[f"{stage}.pre"] for stage in self.stages), teacher.embedding[:, :, None, None]]
        losses, behind = [], None  # from the deepest level, which is the embedding, to the shallowest: each hands its map on
        with full_precision(student.embedding.device):
            for fuse, x, wanted in zip(reversed(self.fusions), reversed(ours), reversed(theirs), strict=True):
                fused, behind = fuse(at_least_float32(x), behind, (wanted.shape[2], wanted.shape[3]))
                losses.append(hierarchical_context_loss(fused, wanted))
        loss = torch.stack(losses).sum()
        if batch is not None and batch.epoch is not None:
            loss = loss * ((batch.epoch + 1).to(loss.dtype) / self.options.warmup).clamp(max=1)
        return {"reviewkd": loss}
