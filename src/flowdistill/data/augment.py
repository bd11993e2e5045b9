"""Random crop, flip, erasing, mixup and CutMix of a whole batch at once, from images that stay on the device.

An epoch's draws are made before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..randomness import derive, generator

AREA = (0.05, 1.0)  # of the image, Beyer et al. 2022, the authors' code; Szegedy et al. 2015, section 6: from 0.08
ASPECT = (3 / 4, 4 / 3)  # width to height; Szegedy et al. 2015, section 6
TRIES = 10  # torchvision's RandomResizedCrop and RandomErasing
ERASED_AREA = (0.02, 0.33)  # of the image; torchvision's RandomErasing (Zhong et al. 2020, section 4.3: 0.02 to 0.4)
ERASED_ASPECT = (0.3, 3.3)  # height to width; torchvision's RandomErasing (Zhong et al.: 0.3 to 1/0.3)
SWITCH = 0.5  # chance of CutMix in the place of mixup where both are on; timm, and so Touvron et al. 2021


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
        shares: [n] the share of each image's label in its mixture, if a batch begins at this position; None if nothing is mixed.
        pasted: [n, 4] top, left, height and width of the box that comes from each image's partner, if a batch begins at this position; of
            height and width 0 if the batch is mixed evenly. None without CutMix.
        erased: [n, 4] the box of each image that is erased; of height and width 0 for none. None if nothing is erased.
        times: [n] how many times the image was drawn before in this epoch; None if each comes once.
    """

    order: Tensor
    rows: Tensor
    columns: Tensor
    flips: Tensor
    boxes: Tensor | None = None
    shares: Tensor | None = None
    pasted: Tensor | None = None
    erased: Tensor | None = None
    times: Tensor | None = None


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
    area, aspect = _areas(n, size, AREA, ASPECT, chance)
    sides, whole = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1).round(), torch.tensor(size, dtype=torch.float64)
    return _placed(_first(sides, ((sides >= 1) & (sides <= whole)).all(-1), whole), whole, chance)


def _uniform(low: float, high: float, *shape: int, chance: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=chance, dtype=torch.float64)


def _areas(
    n: int, size: tuple[int, int], area: tuple[float, float], aspect: tuple[float, float], chance: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``TRIES`` areas in pixels and aspect ratios of n boxes: uniform in ``area``, and by the logarithm in ``aspect``; [TRIES, n] each."""
    areas = math.prod(size) * _uniform(*area, TRIES, n, chance=chance)
    return areas, _uniform(math.log(aspect[0]), math.log(aspect[1]), TRIES, n, chance=chance).exp()


def _first(sides: Tensor, fits: Tensor, otherwise: Tensor) -> Tensor:
    """[n, 2] the first of the sides [TRIES, n, 2] that fits; ``otherwise`` [2] if none does."""
    first = sides[fits.int().argmax(0), torch.arange(sides.shape[1])]
    return first.where(fits.any(0)[:, None], otherwise)


def _placed(sides: Tensor, whole: Tensor, chance: torch.Generator) -> Tensor:
    """Boxes of these sides anywhere in the image: int64 [n, 4]."""
    corners = (_uniform(0, 1, *sides.shape, chance=chance) * (whole - sides + 1)).floor()
    return torch.cat([corners, sides], 1).long()


def draw_erased(n: int, size: tuple[int, int], probability: float, *, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Draw what random erasing (Zhong et al. 2020) takes out of the images of one epoch: int64 [n, 4] top, left, height and width.

    An image is erased with ``probability``. Its box has the distribution of torchvision's RandomErasing: the first of ten tries that is
    smaller than the image in height and width, and none if no try is. A box that is not there has height and width 0.
    """
    chance = generator(seed, "erasing", epoch)
    area, aspect = _areas(n, size, ERASED_AREA, ERASED_ASPECT, chance)
    sides, whole = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1).round(), torch.tensor(size, dtype=torch.float64)
    drawn = _placed(_first(sides, (sides < whole).all(-1), torch.zeros_like(whole)), whole, chance)
    hit = torch.rand(n, generator=chance, dtype=torch.float64) < probability
    return drawn.where(hit[:, None], 0).to(device)


def draw_shares(n: int, mixup: float, *, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Draw the mixup shares of one epoch, float32 [n]: one for every position at which a batch may begin.

    If ``mixup`` is True they are uniform in [0, 1), if it is a number alpha they are Beta(alpha, alpha): Zhang et al., ICLR 2018.
    """
    if mixup is True:
        return torch.rand(n, generator=generator(seed, "mixup", epoch)).to(device)
    shares = np.random.default_rng(derive(seed, "mixup", epoch)).beta(mixup, mixup, n)
    return torch.from_numpy(shares).float().to(device)


def draw_pasted(n: int, size: tuple[int, int], cutmix: float, *, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Draw the boxes of CutMix of one epoch: int64 [n, 4] top, left, height and width; one for every position at which a batch may begin.

    Yun et al. 2019, section 3.1: sides of sqrt(1 - l) of the image's, rounded down, where l is Beta(alpha, alpha) and alpha is ``cutmix``;
    the middle is uniform, and what lies outside of the image is cut off. As timm has it, whose sides may be odd; in the authors' code they
    are rounded down to even numbers.
    """
    chance, whole = np.random.default_rng(derive(seed, "cutmix", epoch)), np.array(size)
    sides = (whole * np.sqrt(1 - chance.beta(cutmix, cutmix, n))[:, None]).astype(np.int64)
    middle = chance.integers(0, whole, (n, 2))
    first, end = (middle - sides // 2).clip(0, whole), (middle + (sides + 1) // 2).clip(0, whole)
    return torch.from_numpy(np.concatenate([first, end - first], 1)).to(device)


def draw_switches(n: int, *, seed: int, epoch: int, device: torch.device) -> Tensor:
    """Draw whether CutMix stands in the place of mixup, bool [n]: one for every position at which a batch may begin."""
    return (torch.rand(n, generator=generator(seed, "switch", epoch)) < SWITCH).to(device)


def kept(pasted: Tensor, size: tuple[int, int]) -> Tensor:
    """The share of an image [n] that boxes [n, 4] from its partner leave of it, float32."""
    return 1 - pasted[:, 2:].prod(1).float() / math.prod(size)


def partners(values: Tensor) -> Tensor:
    """The partner of each image in mixup and CutMix: the image before it in the batch; that of the first is the last."""
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
        share: float32 [1], 0 to 1; or of each pixel [1, H, W, 1].

    Returns:
        float32 [B, H, W, C].
    """
    pixels = images.float()
    return partners(pixels).lerp(pixels, share)


def cut_and_mix(images: Tensor, share: Tensor, pasted: Tensor) -> Tensor:
    """Put a box of each image's partner into it (CutMix: Yun et al. 2019). Where the box is empty, the whole is mixed by ``share``.

    Args:
        images: uint8 or float32 [B, H, W, C].
        share: float32 [1], 0 to 1.
        pasted: [1, 4] top, left, height and width.

    Returns:
        float32 [B, H, W, C].
    """
    outside = torch.where(pasted[:, 2:].prod(1) > 0, 1.0, share)
    return mix(images, torch.where(_inside(pasted, images), 0.0, outside))


def erase(images: Tensor, erased: Tensor, colour: Tensor) -> Tensor:
    """Fill the box [B, 4] of each image with a colour [C]: uint8 or float32 [B, H, W, C] -> float32 of that shape."""
    return torch.where(_inside(erased, images), colour, images.float())


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Whether each pixel of images [.., H, W, C] lies in a box [n, 4]: bool [n, H, W, 1]."""
    top, left, height, width = boxes[:, :, None].unbind(1)
    down, across = (torch.arange(side, device=boxes.device) for side in images.shape[1:3])
    rows, columns = (down >= top) & (down < top + height), (across >= left) & (across < left + width)
    return (rows[:, :, None] & columns[:, None])[..., None]
