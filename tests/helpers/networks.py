"""Networks that users could have written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TWO_STAGE_NET = """
from torch import nn
class Tiny(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.out = nn.Linear(8, classes)
    def forward(self, x):
        return self.out(self.b(self.a(x).relu()).relu().mean((2, 3)))
"""
"""A file of code with a network that halves its maps twice."""

NET = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.a, self.fc = nn.Conv2d(channels, 4, 3, 2, 1), nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.a(x)).mean((2, 3)))
"""
"""A file of code with a network that a step takes milliseconds."""


class Tied(nn.Module):
    """A network for 8x8 digits whose two inner convolutions have one weight."""

    def __init__(self, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            self.first, self.second = (nn.Conv2d(width, width, 3, 2, 1, bias=False) for _ in range(2))
            self.second.weight = self.first.weight
            self.fc = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.second(self.first(self.stem(images)).relu()).relu().mean((2, 3)))
