"""Random crop, flip and mixup of a whole batch at once, from images that stay on the device. An epoch's draws are made before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..randomness import derive, generator

AREA = (0.05, 1.0)  # of the image, Beyer et al. 2022, the authors' code; Szegedy et al. 2015, section 6: from 0.08
ASPECT = (3 / 4, 4 / 3)  # width to height; Szegedy et al. 2015, section 6
TRIES = 10  # torchvision's RandomResizedCrop


def reflect_pad(images: Tensor, pad: int) -> Tensor:
    """Add a reflected border: uint8 [N, H, W, C] -> [N, H+2p, W+2p, C]. The edge pixel is not repeated."""

    def source(size: int) -> Tensor:
        position = torch.arange(-pad, size + pad, device=images.device).abs()
        return torch.where(position < size, position, 2 * (size - 1) - position)

    return images[:, source(images.shape[1])][:, :, source(images.shape[2])]


@dataclass(frozen=True)
class Draws:
    """All that is random in one epoch, on the device that holds the images.

    Attributes:
        order: [n] indices of the images, in the order in which they are shown. The other draws are in this order too.
        rows, columns: [n] crop offsets in pixels, 0 to 2*pad.
        flips: [n] bool, whether the image is mirrored.
        boxes: [n, 4] top, left, height and width of the box that is enlarged; None if the crop is shifted.
        shares: [n] the share of each image in its mixture, if a batch begins at this position; None if nothing is mixed.
    """

    order: Tensor
    rows: Tensor
    columns: Tensor
    flips: Tensor
    boxes: Tensor | None = None
    shares: Tensor | None = None


def draw_epoch(n: int, *, pad: int, flip: bool, seed: int, epoch: int, device: torch.device) -> Draws:
    """Draw the order, offsets and flips of one epoch: a function of (seed, epoch) alone. They are drawn on the CPU and moved once."""
    order = torch.randperm(n, generator=generator(seed, "order", epoch))
    chance = generator(seed, "augment", epoch)
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=chance)
    flips = torch.rand(n, generator=chance) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    return Draws(order.to(device), offsets[0].to(device), offsets[1].to(device), flips.to(device))


def draw_boxes(n: int, size: tuple[int, int], *, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Draw the Inception crops of one epoch: int64 [n, 4] top, left, height and width of boxes in images of ``size`` (H, W).

    The area is uniform in ``AREA`` (Szegedy et al. 2015), the logarithm of the aspect ratio uniform in that of ``ASPECT``, and the
    position uniform. This is the distribution of torchvision's RandomResizedCrop, which takes the first of ten tries that fits. If none
    fits, the box is the whole image. (In the code of Beyer et al. 2022 TensorFlow draws the height uniformly, not the area: their boxes
    are smaller on average.)
    """
    return boxes(n, size, generator(seed, "boxes", epoch)).to(device)


def boxes(n: int, size: tuple[int, int], chance: torch.Generator) -> Tensor:
    """Draw ``n`` boxes from ``chance``, as ``draw_boxes`` describes: int64 [n, 4]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=chance, dtype=torch.float64)

    area = math.prod(size) * uniform(*AREA, TRIES, n)
    aspect = uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), TRIES, n).exp()
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1).round()
    whole = torch.tensor(size, dtype=torch.float64)
    fits = ((sides >= 1) & (sides <= whole)).all(-1)
    first = sides[fits.int().argmax(0), torch.arange(n)]
    sides = first.where(fits.any(0)[:, None], whole)
    corners = (uniform(0, 1, n, 2) * (whole - sides + 1)).floor()
    return torch.cat([corners, sides], 1).long()


def draw_shares(n: int, mixup: float, *, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Draw the mixup shares of one epoch, float32 [n]: one for every position at which a batch may begin.

    If ``mixup`` is True they are uniform in [0, 1), if it is a number alpha they are Beta(alpha, alpha): Zhang et al., ICLR 2018.
    """
    if mixup is True:
        return torch.rand(n, generator=generator(seed, "mixup", epoch)).to(device)
    shares = np.random.default_rng(derive(seed, "mixup", epoch)).beta(mixup, mixup, n)
    return torch.from_numpy(shares).float().to(device)


def partners(values: Tensor) -> Tensor:
    """The partner of each image in mixup: the image before it in the batch; that of the first is the last."""
    return values.roll(1, 0)


def crop_and_flip(padded: Tensor, indices: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut crops of ``size`` out of ``padded[indices]`` at the given offsets, and mirror those that ``flips`` marks.

    Args:
        padded: uint8 [N, H+2p, W+2p, C].
        indices, rows, columns, flips: [B]; rows and columns in pixels.
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


def resize_and_flip(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Enlarge the box of each image to the whole by bilinear interpolation, and mirror those that ``flips`` marks.

    Pixels are points in the middle of their squares and the box ends at its own edge, as in ``interpolate`` without ``align_corners``.

    Args:
        images: uint8 [B, H, W, C].
        boxes: [B, 4] top, left, height, width.
        flips: [B].

    Returns:
        float32 [B, H, W, C], 0 to 255, not rounded.
    """
    top, left, height, width = boxes.unbind(1)
    down, across = _interpolation(top, height, images.shape[1]), _interpolation(left, width, images.shape[2])
    across = torch.where(flips[:, None, None], across.flip(1), across)
    rows = torch.einsum("nhy,nyxc->nhxc", down, images.float())
    return torch.einsum("nwx,nhxc->nhwc", across, rows).contiguous()


def _interpolation(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Weight [B, size, size] of each pixel of a side (last axis) in each pixel of the enlarged stretch: 1 at distance 0, 0 from 1 on."""
    pixels = torch.arange(size, device=first.device)
    position = ((pixels + 0.5) * (length[:, None] / size) - 0.5).clamp(min=0).minimum(length[:, None] - 1)
    return (1 - (first[:, None, None] + position[:, :, None] - pixels).abs()).clamp(min=0)


def mix(images: Tensor, share: Tensor) -> Tensor:
    """Mix images: share x_i + (1 - share) x_(i-1), where the image before the first of a batch is its last. Zhang et al., ICLR 2018.

    The whole batch has one share, as in both papers' code. The partner is that of Beyer et al. 2022, the authors' code (Zhang et al.
    shuffle the batch, which is in a random order here). In that code the image itself gets the larger share; without labels this makes
    no difference.

    Args:
        images: uint8 or float32 [B, H, W, C].
        share: float32 [1], 0 to 1.

    Returns:
        float32 [B, H, W, C].
    """
    pixels = images.float()
    return partners(pixels).lerp(pixels, share)
