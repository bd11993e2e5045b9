"""VGG of Simonyan and Zisserman 2015 with batch normalisation, as the CRD benchmark has it for CIFAR.

Five groups of convolutions with 2x2 max-pooling between them, except between the last two, which have equal size; then the mean and one
linear layer. ``stem`` is the end of the first group, ``stage1`` to ``stage4`` those of the others.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageNetwork, by_stage, register

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(ImageNetwork):
    """Five groups of convolutions; ``convolutions`` has their number in each group."""

    def __init__(self, convolutions: tuple[int, ...], channels: int, classes: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        self.paths, self.norms = {}, {}
        for number, (width, count) in enumerate(zip(WIDTHS, convolutions, strict=True)):
            inputs = channels if number == 0 else WIDTHS[number - 1]
            layers = [
                nn.Sequential(nn.Conv2d(inputs if i == 0 else width, width, 3, padding=1), nn.BatchNorm2d(width)) for i in range(count)
            ]
            self.groups.append(nn.ModuleList(layers))
            end = f"groups.{number}.{count - 1}"
            stage = f"stage{number}"
            self.paths |= {f"{stage}.first": f"groups.{number}.0", f"{stage}.pre": end, stage: end} if number else {"stem": end}
            self.norms |= {f"{stage}.pre": f"{end}.1"} if number else {}
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the last map."""
        maps: dict[str, Tensor] = {}
        x = images
        for number, group in enumerate(by_stage(*self.groups)):
            if number in (1, 2, 3):
                x = F.max_pool2d(x, 2)
            for position, layer in enumerate(group):
                before = layer(x)
                x = F.relu(before)
                if position == 0:
                    maps[f"stage{number}.first"] = x
            maps[f"stage{number}.pre"], maps[f"stage{number}" if number else "stem"] = before, x
        return maps, x


for _depth, _convolutions in CONVOLUTIONS.items():
    register(
        f"vgg{_depth}",
        f"Simonyan and Zisserman 2015 with BN, CRD's CIFAR form, {sum(_convolutions)} convolutions",
        partial(VGG, _convolutions),
    )
