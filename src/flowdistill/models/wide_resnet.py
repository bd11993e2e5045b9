"""Wide ResNets of Zagoruyko and Komodakis 2016 (arXiv 1605.07146), without dropout: depth 6n+4, width k.

Blocks begin with batch normalisation and ReLU. A stage therefore ends in a plain sum, and ``stage1`` is that: the map that the authors of
attention transfer, the CRD benchmark's code and mdistiller compare. ``stage1.pre`` is the sum after the next layer's normalisation, and
``stage1.post`` is after its ReLU too. In the same way ``stem`` is the plain first convolution, and ``stem.post`` is after the normalisation
and ReLU of the first block. ``stage3.post`` is the map whose mean is the embedding.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageNetwork, by_stage, register

SIZES = ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10))


class PreActivationBlock(nn.Module):
    """conv-BN-ReLU-conv, plus the shortcut. Its input has passed ``bn1`` and ReLU already: the network applies them and taps the map."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and the output of the first convolution after its normalisation and ReLU."""
        first = F.relu(self.bn2(self.conv1(activated)))
        return self.conv2(first) + (x if self.shortcut is None else self.shortcut(activated)), first


class WideResNet(ImageNetwork):
    """Three stages of 16k, 32k and 64k channels at full, half and quarter size."""

    taps_version = 2  # 1 had ``stage1.post`` under the name of ``stage1``, and ``stem.post`` under that of ``stem``

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.layer1 = self._stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = self._stage(widths[2], widths[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        self.paths, self.norms = {"stem": "conv1", "stem.post": "layer1.0.bn1"}, {}
        for stage in (1, 2, 3):
            end = f"layer{stage + 1}.0.bn1" if stage < 3 else "bn1"
            self.paths |= {f"stage{stage}.first": f"layer{stage}.0.bn2", f"stage{stage}": f"layer{stage}.{blocks - 1}"}
            self.paths |= {f"stage{stage}.pre": end, f"stage{stage}.post": end}
            self.norms |= {f"stage{stage}.pre": end}

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.ModuleList:
        return nn.ModuleList(PreActivationBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks))

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the last map."""
        stages = by_stage(self.layer1, self.layer2, self.layer3)
        x = self.conv1(images)
        activated = F.relu(stages[0][0].bn1(x))
        maps = {"stem": x, "stem.post": activated}
        for number, stage in enumerate(stages, 1):
            for position, block in enumerate(stage):
                x, first = block(x, activated)
                last = position + 1 == len(stage)
                after = stage[position + 1].bn1 if not last else stages[number][0].bn1 if number < 3 else self.bn1
                normalised = after(x)
                activated = F.relu(normalised)
                if position == 0:
                    maps[f"stage{number}.first"] = first
                if last:
                    maps |= {f"stage{number}": x, f"stage{number}.pre": normalised, f"stage{number}.post": activated}
        return maps, activated


for _depth, _width in SIZES:
    register(
        f"wrn-{_depth}-{_width}",
        f"Zagoruyko and Komodakis 2016, depth {_depth}, width {_width}",
        partial(WideResNet, _depth, _width),
    )
