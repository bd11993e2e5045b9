"""MobileNetV2 of Sandler et al. 2018 in the CRD benchmark's CIFAR form: width 0.5, ReLU, a stem of stride 2, no stride in the second group.

``stage1`` to ``stage4`` are the ends of bottlenecks, which are linear: no ReLU follows, so they have no ``.pre``. ``stem`` is after ReLU.
The embedding is the mean of a 1x1 convolution with 1,280 channels after the last stage.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageNetwork, by_stage, register

EXPANSION = 6
GROUPS = (  # expansion, channels, blocks, stride
    (1, 8, 1, 1),
    (EXPANSION, 12, 2, 1),
    (EXPANSION, 16, 3, 2),
    (EXPANSION, 32, 4, 2),
    (EXPANSION, 48, 3, 1),
    (EXPANSION, 80, 3, 2),
    (EXPANSION, 160, 1, 1),
)
ENDS = {1: "stage1", 2: "stage2", 4: "stage3", 6: "stage4"}
STEM, LAST = 16, 1280


class Bottleneck(nn.Module):
    """1x1 conv-BN-ReLU, depthwise 3x3 conv-BN-ReLU, 1x1 conv-BN; plus the input if the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.depthwise = nn.Sequential(nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner))
        self.project = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and that of its first conv-BN-ReLU."""
        first = F.relu(self.expand(x))
        y = self.project(F.relu(self.depthwise(first)))
        return (x + y if self.residual else y), first


class MobileNetV2(ImageNetwork):
    """Seven groups of bottlenecks."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, STEM, 3, 2, padding=1, bias=False), nn.BatchNorm2d(STEM))
        self.groups = nn.ModuleList()
        self.paths = {"stem": "stem"}
        inputs = STEM
        for number, (expansion, outputs, count, stride) in enumerate(GROUPS):
            blocks = [Bottleneck(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1, expansion) for i in range(count)]
            self.groups.append(nn.ModuleList(blocks))
            inputs = outputs
            if number in ENDS:
                first = f"groups.{number if number < 3 else number - 1}.0.expand"
                self.paths |= {f"{ENDS[number]}.first": first, ENDS[number]: f"groups.{number}.{count - 1}"}
        self.last = nn.Sequential(nn.Conv2d(inputs, LAST, 1, bias=False), nn.BatchNorm2d(LAST))
        self.fc = nn.Linear(LAST, classes)

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the map of the last convolution."""
        x = F.relu(self.stem(images))
        maps = {"stem": x}
        first_of_stage: Tensor | None = None
        for number, group in enumerate(by_stage(*self.groups)):
            for block in group:
                x, first = block(x)
                first_of_stage = first if first_of_stage is None else first_of_stage
            if number == 0:
                first_of_stage = None
            if number in ENDS:
                assert first_of_stage is not None
                maps[f"{ENDS[number]}.first"], maps[ENDS[number]] = first_of_stage, x
                first_of_stage = None
        return maps, F.relu(self.last(x))


register("mobilenetv2", "Sandler et al. 2018, CRD's CIFAR form: width 0.5", MobileNetV2)
