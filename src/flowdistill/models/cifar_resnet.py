"""CIFAR ResNets of He et al. 2016 ("Deep Residual Learning for Image Recognition", section 4.2): depth 6n+2.

A 3x3 stem with padding 1, three stages of n basic blocks with 16, 32 and 64 channels at full, half and quarter size, global
average pooling, one linear layer. Where a block changes shape its shortcut is a 1x1 convolution with batch normalisation (the
paper's option B; its CIFAR networks have option A, without parameters), as in the implementations whose figures are quoted here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..taps import DataSpec, NetSpec, Outputs, TapSpec
from . import MODELS, Network

WIDTHS = (16, 32, 64)
DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """conv-BN-ReLU, conv-BN, plus the shortcut, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and the output of its first conv-BN-ReLU."""
        first = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(first)) + self.downsample(x)), first


class CifarResNet(Network):
    """A CIFAR ResNet that gives the taps it was asked for.

    Taps, all after ReLU: ``stem``; ``stage1`` to ``stage3``, the last block's output; ``stage1.first`` to ``stage3.first``, the
    output of the first conv-BN-ReLU inside the stage.
    """

    def __init__(self, spec: NetSpec, depth: int, channels: int, taps: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.taps = tuple(spec.tap(name).name for name in taps)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = self._stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.fc = nn.Linear(WIDTHS[2], spec.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.ModuleList:
        return nn.ModuleList(BasicBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks))

    def forward(self, images: Tensor) -> Outputs:
        """Images [N, C, H, W] -> Outputs."""
        x = F.relu(self.bn1(self.conv1(images)))
        maps = {"stem": x}
        for number, stage in enumerate((self.layer1, self.layer2, self.layer3), 1):
            for position, block in enumerate(stage):
                x, first = block(x)
                if position == 0:
                    maps[f"stage{number}.first"] = first
            maps[f"stage{number}"] = x
        embedding = x.mean((2, 3))
        return Outputs(self.fc(embedding), embedding, {name: maps[name] for name in self.taps})


class CifarResNetFactory:
    """``resnet20`` and its sisters."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.about = f"He et al. 2016, CIFAR, {(depth - 2) // 6} basic blocks a stage, 16/32/64 channels"

    def spec(self, data: DataSpec) -> NetSpec:
        """Taps and sizes for images of the data's size."""
        height, width = data.height, data.width
        taps = [TapSpec("stem", WIDTHS[0], height, width, "bn1")]
        for number, channels in enumerate(WIDTHS, 1):
            if number > 1:
                height, width = (height + 1) // 2, (width + 1) // 2
            last = (self.depth - 2) // 6 - 1
            taps.append(TapSpec(f"stage{number}.first", channels, height, width, f"layer{number}.0.bn1"))
            taps.append(TapSpec(f"stage{number}", channels, height, width, f"layer{number}.{last}"))
        return NetSpec(f"resnet{self.depth}", tuple(taps), WIDTHS[-1], data.classes, head="fc")

    def build(self, data: DataSpec, taps: tuple[str, ...]) -> CifarResNet:
        """The network."""
        return CifarResNet(self.spec(data), self.depth, data.channels, taps)


for _depth in DEPTHS:
    MODELS.register(f"resnet{_depth}")(CifarResNetFactory(_depth))
