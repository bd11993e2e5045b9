"""Random numbers of single images: a hash of seed, epoch and image, so that a run repeats itself whatever computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Batch

WORD = 0xFFFFFFFF


def scrambled(x: Tensor) -> Tensor:
    """Integers below 2^32, bijectively and without a pattern: the finaliser of MurmurHash3 (A. Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & WORD
    return x ^ (x >> 16)


def salt() -> Tensor:
    """An integer below 2^32 that tells seeds apart. A method draws it along with its adapters and keeps it in a buffer."""
    return torch.randint(0, WORD + 1, ())


def words(salt: Tensor | int, epoch: Tensor | int, indices: Tensor, count: int) -> Tensor:
    """h(h(h(salt + epoch) + index) + j) with h = ``scrambled``, all modulo 2^32.

    Args:
        salt: integer scalar.
        epoch: integer scalar.
        indices: [N] integers that tell the images apart.
        count: how many per image, j = 0, 1, ...

    Returns:
        [N, count] integers from 0 to 2^32 - 1.
    """
    drawn = scrambled((torch.zeros_like(indices) + salt + epoch) & WORD)
    drawn = scrambled((drawn + indices) & WORD)
    return scrambled((drawn[:, None] + torch.arange(count, device=indices.device)) & WORD)


def of_batch(batch: Batch | None, images: Tensor) -> tuple[Tensor, Tensor | int]:
    """Indices and epoch of a batch. Default: the positions in the batch, and epoch 0."""
    indices = None if batch is None else batch.indices
    epoch = None if batch is None else batch.epoch
    return torch.arange(len(images), device=images.device) if indices is None else indices, 0 if epoch is None else epoch


def channel_mask(salt: Tensor | int, batch: Batch | None, features: Tensor, ratio: float) -> Tensor:
    """Which channels of each image stay: those with word / 2^32 >= ratio.

    Args:
        features: [N, C, ...].
        ratio: the share that goes.

    Returns:
        [N, C] booleans.
    """
    indices, epoch = of_batch(batch, features)
    return words(salt, epoch, indices, features.shape[1]) >= int(ratio * 2**32)
