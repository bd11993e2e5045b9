"""ShuffleNetV1 (Zhang et al. 2018) and ShuffleNetV2 (Ma et al. 2018) in the CRD benchmark's CIFAR form: a 1x1 stem of 24 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageNetwork, register, stage_by_stage

STEM = 24


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels dealt out over the groups: [g, c/g] becomes [c/g, g]."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Unit(nn.Module):
    """V1: grouped 1x1 conv-BN-ReLU, shuffle, depthwise conv-BN-ReLU, grouped 1x1 conv-BN; added to the input, or put beside its mean."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        inner, self.stride = outputs // 4, stride
        self.groups = 1 if inputs == STEM else groups
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, groups=self.groups, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit's output before ReLU, and that of its first conv-BN-ReLU."""
        first = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(shuffle(first, self.groups))))))
        return (torch.cat([y, F.avg_pool2d(x, 3, 2, padding=1)], 1) if self.stride == 2 else y + x), first


class ShuffleNetV1(ImageNetwork):
    """Three groups, 240, 480 and 960 channels at half, quarter and eighth size."""

    def __init__(self, channels: int, classes: int, groups: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, STEM, 1, bias=False), nn.BatchNorm2d(STEM)
        self.layers = nn.ModuleList()
        self.paths, self.norms = {"stem": "bn1"}, {}
        inputs = STEM
        for number, (outputs, count) in enumerate(((240, 4), (480, 8), (960, 4))):
            units = [Unit(inputs, outputs - inputs, 2, groups), *(Unit(outputs, outputs, 1, groups) for _ in range(count - 1))]
            self.layers.append(nn.ModuleList(units))
            inputs = outputs
            stage, end = f"stage{number + 1}", f"layers.{number}.{count - 1}"
            self.paths |= {f"{stage}.first": f"layers.{number}.0.bn1", f"{stage}.pre": end, stage: end}
            self.norms |= {f"{stage}.pre": f"{end}.bn3"}
        self.fc = nn.Linear(inputs, classes)

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the last map."""
        x = F.relu(self.bn1(self.conv1(images)))
        maps = {"stem": x, **stage_by_stage(x, *self.layers)}
        return maps, maps["stage3"]


class Branch(nn.Module):
    """V2's right branch: 1x1 conv-BN-ReLU, depthwise conv-BN, 1x1 conv-BN."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, groups=outputs, bias=False), nn.BatchNorm2d(outputs)
        self.conv3, self.bn3 = nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The branch's output before ReLU, and that of its first conv-BN-ReLU."""
        first = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.bn2(self.conv2(first)))), first


class Split(nn.Module):
    """V2's basic unit: half of the channels pass, the others go through the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = Branch(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit's output, shuffled and before ReLU, and that of its first conv-BN-ReLU."""
        kept, sent = x.chunk(2, 1)
        y, first = self.branch(sent)
        return shuffle(torch.cat([kept, y], 1), 2), first


class Down(nn.Module):
    """V2's unit of stride 2: both branches see all channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, inputs, 3, 2, padding=1, groups=inputs, bias=False), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = nn.Conv2d(inputs, half, 1, bias=False), nn.BatchNorm2d(half)
        self.branch = Branch(inputs, half, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit's output, shuffled and before ReLU, and that of its first conv-BN-ReLU."""
        y, first = self.branch(x)
        return shuffle(torch.cat([self.bn2(self.conv2(self.bn1(self.conv1(x)))), y], 1), 2), first


class ShuffleNetV2(ImageNetwork):
    """Three groups of 116, 232 and 464 channels at half, quarter and eighth size, then a 1x1 convolution to 1,024.

    A ReLU on the half that passes changes nothing: it is non-negative already.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, STEM, 1, bias=False), nn.BatchNorm2d(STEM)
        self.layers = nn.ModuleList()
        self.paths = {"stem": "bn1"}
        inputs = STEM
        for number, (outputs, count) in enumerate(((116, 3), (232, 7), (464, 3))):
            self.layers.append(nn.ModuleList([Down(inputs, outputs), *(Split(outputs) for _ in range(count))]))
            inputs = outputs
            stage, end = f"stage{number + 1}", f"layers.{number}.{count}"
            self.paths |= {f"{stage}.first": f"layers.{number}.0.branch.bn1", f"{stage}.pre": end, stage: end}
        self.conv2, self.bn2 = nn.Conv2d(inputs, 1024, 1, bias=False), nn.BatchNorm2d(1024)
        self.fc = nn.Linear(1024, classes)

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the map of the last convolution."""
        x = F.relu(self.bn1(self.conv1(images)))
        maps = {"stem": x, **stage_by_stage(x, *self.layers)}
        return maps, F.relu(self.bn2(self.conv2(maps["stage3"])))


register("shufflenetv1", "Zhang et al. 2018, CRD's CIFAR form: 3 groups", ShuffleNetV1)
register("shufflenetv2", "Ma et al. 2018, CRD's CIFAR form: 116/232/464 channels", ShuffleNetV2)
