"""CIFAR ResNets of He et al. 2016 ("Deep Residual Learning for Image Recognition", section 4.2): depth 6n+2.

A 3x3 stem with padding 1, three stages of n basic blocks with 16, 32 and 64 channels at full, half and quarter size, global
average pooling, one linear layer. If a block changes the shape, its shortcut is a 1x1 convolution with batch normalisation (the
paper's option B; its CIFAR networks have option A, without parameters), as in the implementations whose figures are quoted here.
``resnet8x4`` and its sisters are those of the CRD benchmark (Tian et al. 2020): a stem of 32 channels, stages of 64, 128 and 256.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageNetwork, register, stage_by_stage

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
WIDE_DEPTHS = (8, 14, 32)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A 1x1 convolution with batch normalisation if the block changes the shape, else the identity."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """conv-BN-ReLU, conv-BN, plus the shortcut; the caller applies the ReLU after it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output before ReLU, and the output of its first conv-BN-ReLU."""
        first = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(first)) + self.downsample(x), first


class CifarResNet(ImageNetwork):
    """``stem_width`` channels after the stem, ``widths`` in the stages."""

    def __init__(self, depth: int, channels: int, classes: int, stem_width: int = 16, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, stem_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.layer1 = self._stage(stem_width, widths[0], blocks, stride=1)
        self.layer2 = self._stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.fc = nn.Linear(widths[2], classes)
        self.paths, self.norms = {"stem": "bn1"}, {}
        for stage in (1, 2, 3):
            end = f"layer{stage}.{blocks - 1}"
            self.paths |= {f"stage{stage}.first": f"layer{stage}.0.bn1", f"stage{stage}.pre": end, f"stage{stage}": end}
            self.norms |= {f"stage{stage}.pre": f"{end}.bn2"}

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.ModuleList:
        return nn.ModuleList(BasicBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks))

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the last map."""
        x = F.relu(self.bn1(self.conv1(images)))
        maps = {"stem": x, **stage_by_stage(x, self.layer1, self.layer2, self.layer3)}
        return maps, maps["stage3"]


for _depth in DEPTHS:
    register(
        f"resnet{_depth}",
        f"He et al. 2016, CIFAR, {(_depth - 2) // 6} basic blocks a stage, 16/32/64 channels",
        partial(CifarResNet, _depth),
    )
for _depth in WIDE_DEPTHS:
    register(
        f"resnet{_depth}x4",
        f"CRD benchmark, CIFAR, {(_depth - 2) // 6} basic blocks a stage, 64/128/256 channels",
        partial(CifarResNet, _depth, stem_width=32, widths=(64, 128, 256)),
    )
