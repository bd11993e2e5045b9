"""The networks of the table: a ResNet-20 without its classifier, trained or with random weights, and a small vision transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1
        self.downsample = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class Backbone(nn.Module):
    """ResNet-20 for small images, by the names that this package gives its weights; it gives the pooled features [N, 64]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), *[Block(32, 32, 1) for _ in range(2)])
        self.layer3 = nn.Sequential(Block(32, 64, 2), *[Block(64, 64, 1) for _ in range(2)])

    def forward(self, images: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images)))))).mean((2, 3))


def trained_backbone(channels: int) -> nn.Module:
    return Backbone(channels)


def random_backbone(channels: int) -> nn.Module:
    return Backbone(channels)


def vit(classes: int, channels: int, size: int) -> nn.Module:
    """4 blocks of width 96 over 4x4 patches of 4x4 pixels, and a class token."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=size, patch_size=4, in_chans=channels, num_classes=classes, embed_dim=96, depth=4, num_heads=4)


def vit_backbone(channels: int, size: int) -> nn.Module:
    return vit(0, channels, size)
