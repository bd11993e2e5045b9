"""Normalisation of pixels by the mean and std of each channel, measured on the images trained on."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dataset import Images, Labels, Pictures
from .splits import stratified

MEASURED = 10_000  # streamed images that mean and std are measured on
AT_ONCE = 256  # of these are decoded at once


@dataclass(frozen=True)
class Normalisation:
    """(pixel/255 - mean) / std, per channel. ``mean`` and ``std`` are those of the images trained on, in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def measured(cls, images: Images | Pictures, labels: Labels) -> Normalisation:
        """Statistics of all images if memory holds them, else of a fixed choice of 10,000, the same share of each class."""
        if not isinstance(images, Pictures):
            return cls.of(torch.from_numpy(images))
        chosen = stratified(labels, min(MEASURED, len(labels)), len(labels), least=1)
        parts = np.array_split(chosen, math.ceil(len(chosen) / AT_ONCE))
        return cls._counted(functools.reduce(operator.add, (_counts(torch.from_numpy(images[positions])) for positions in parts)))

    @classmethod
    def of(cls, images: Tensor) -> Normalisation:
        """Statistics of uint8 images [N, H, W, C]."""
        return cls._counted(_counts(images))

    @classmethod
    def _counted(cls, counts: Tensor) -> Normalisation:
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = counts @ values / counts.sum(1)
        variance = counts @ values.square() / counts.sum(1) - mean.square()
        std = variance.where(variance > 1e-12, 1.0).sqrt()  # a channel of one value is centred and left at that
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The function uint8 or float32 [N, H, W, C] -> float32 [N, C, H, W] in channels_last memory, with constants on the device."""
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=device)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], device=device)
        return lambda images: images.to(torch.float32, copy=True).mul_(scale).add_(shift).permute(0, 3, 1, 2)


def _counts(images: Tensor) -> Tensor:
    """How often each value is in each channel: float64 [C, 256]."""
    return torch.stack([torch.bincount(images[..., c].flatten(), minlength=256) for c in range(images.shape[-1])]).double()
