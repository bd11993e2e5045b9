"""Reflect-pad, random crop, random flip for a whole batch: one gather from a padded tensor that stays on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..randomness import generator


def reflect_pad(images: Tensor, pad: int) -> Tensor:
    """uint8 [N, H, W, C] -> [N, H+2p, W+2p, C] with a reflected border, edge pixel not repeated."""

    def source(size: int) -> Tensor:
        position = torch.arange(-pad, size + pad, device=images.device).abs()
        return torch.where(position < size, position, 2 * (size - 1) - position)

    return images[:, source(images.shape[1])][:, :, source(images.shape[2])]


@dataclass(frozen=True)
class Draws:
    """All that is random in one epoch, on the device that holds the images.

    Attributes:
        order: [n] the images' positions in the order in which they are shown.
        rows, columns: [n] crop offsets in 0..2*pad, for the image shown at that place.
        flips: [n] bool, mirrored or not.
    """

    order: Tensor
    rows: Tensor
    columns: Tensor
    flips: Tensor


def draw_epoch(n: int, *, pad: int, flip: bool, seed: int, epoch: int, device: torch.device) -> Draws:
    """Order, offsets and flips of one epoch, a function of (seed, epoch) alone; drawn on the CPU and moved once."""
    order = torch.randperm(n, generator=generator(seed, "order", epoch))
    chance = generator(seed, "augment", epoch)
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=chance)
    flips = torch.rand(n, generator=chance) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    return Draws(order.to(device), offsets[0].to(device), offsets[1].to(device), flips.to(device))


def crop_and_flip(padded: Tensor, indices: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops of ``size`` from ``padded[indices]`` at the given offsets, mirrored where ``flips``.

    Args:
        padded: uint8 [N, H+2p, W+2p, C].
        indices, rows, columns, flips: [B].
        size: (H, W) of the crops.

    Returns:
        uint8 [B, H, W, C].
    """
    height, width = size
    down = torch.arange(height, device=padded.device)
    across = torch.arange(width, device=padded.device)
    y = rows[:, None] + down
    x = columns[:, None] + torch.where(flips[:, None], width - 1 - across, across)
    return padded[indices[:, None, None], y[:, :, None], x[:, None, :]]
