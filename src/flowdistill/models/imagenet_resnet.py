"""ResNet-18, 34 and 50 of He et al. 2016 with the stem that CIFAR images need: a 3x3 convolution of stride 1, no pooling."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageNetwork, register, stage_by_stage
from .cifar_resnet import BasicBlock, shortcut

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)


class Bottleneck(nn.Module):
    """1x1 conv-BN-ReLU, 3x3 conv-BN-ReLU, 1x1 conv-BN to four times the width, plus the shortcut; the caller applies the last ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output before ReLU, and the output of its first conv-BN-ReLU."""
        first = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(first))))) + self.downsample(x), first


class ResNet(ImageNetwork):
    """Four stages at full, half, quarter and eighth size."""

    def __init__(self, depth: int, channels: int, classes: int) -> None:
        super().__init__()
        block, factor = (Bottleneck, 4) if depth >= 50 else (BasicBlock, 1)
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.layers = nn.ModuleList()
        self.paths, self.norms = {"stem": "bn1"}, {}
        inputs = 64
        for number, (width, count) in enumerate(zip(WIDTHS, BLOCKS[depth], strict=True)):
            outputs = width * factor
            blocks = [block(inputs if i == 0 else outputs, outputs, 2 if i == 0 and number > 0 else 1) for i in range(count)]
            self.layers.append(nn.ModuleList(blocks))
            inputs = outputs
            stage, end = f"stage{number + 1}", f"layers.{number}.{count - 1}"
            self.paths |= {f"{stage}.first": f"layers.{number}.0.bn1", f"{stage}.pre": end, stage: end}
            self.norms |= {f"{stage}.pre": f"{end}.bn3" if block is Bottleneck else f"{end}.bn2"}
        self.fc = nn.Linear(inputs, classes)

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the last map."""
        x = F.relu(self.bn1(self.conv1(images)))
        maps = {"stem": x, **stage_by_stage(x, *self.layers)}
        return maps, maps["stage4"]


for _depth in BLOCKS:
    register(
        f"resnet{_depth}",
        f"He et al. 2016 with a CIFAR stem, {'/'.join(map(str, BLOCKS[_depth]))} blocks, 64 to 512 channels",
        partial(ResNet, _depth),
    )
