"""The interfaces through which training sees images, wherever they come from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..config import TrainConfig
from ..types import Batch, DataSpec
from .normalisation import Normalisation

BATCH = 500  # images per forward pass when a network is measured on a CPU
BATCH_GPU = 2000  # on a GPU, which 500 small ones leave idle
BATCH_PIXELS = BATCH << 13  # fewer images if they are large: 81 of 224x224


def at_once(height: int, width: int, device: torch.device) -> int:
    """How many images of this size a network is measured on in one pass."""
    most = BATCH if device.type != "cuda" else BATCH_GPU
    return max(1, min(most, BATCH_PIXELS // (height * width)))


class EvalSet(Protocol):
    """Labelled images that a network is measured on: at every pass the same in the same order, neither cropped nor mirrored at random."""

    def __len__(self) -> int:
        """How many there are."""

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images float32 [B, C, H, W], as networks take them, and labels [B], on the device. The last batch may be smaller.

        Of all batches those numbered ``first``, ``first + every`` and so on are given: the part of one of several ranks.
        """


class Supply(Protocol):
    """One data set under one split, shared by all batches of a cohort.

    Attributes:
        epoch_images: the images that every epoch is measured on: ``test`` of a full run, the held-out tenth of a holdout run.
    """

    epoch_images: EvalSet

    @property
    def spec(self) -> DataSpec:
        """The sizes."""

    @property
    def device(self) -> torch.device:
        """Where batches are."""

    @property
    def resident(self) -> bool:
        """Whether the device holds all training images; a CUDA graph needs that."""

    @property
    def normalisation(self) -> Normalisation:
        """The normalisation of the pixels; it is saved in the student's file."""

    @property
    def labels(self) -> Tensor:
        """The labels [n] of the training images, indexed by ``Batch.indices``; ``NO_LABEL`` for those that have none."""

    @property
    def train_eval(self) -> EvalSet:
        """The labelled training images, neither cropped nor mirrored."""

    @property
    def test(self) -> EvalSet:
        """The test images."""

    def seed_batches(self, seed: int, train: TrainConfig) -> Batches:
        """The batches of one seed, as a recipe has them."""

    def remarks(self) -> list[str]:
        """Remarks on the images, one per line, for the user after training."""


class Batches(Protocol):
    """The batches of one seed: every student of that seed sees the same images in the same order, cropped and mixed alike.

    Attributes:
        steps: batches per epoch.
        smallest_batch: images in the smallest batch, as far as it is known before an epoch.
    """

    seed: int
    steps: int
    batch_size: int
    smallest_batch: int

    @property
    def data(self) -> Supply:
        """Where they come from."""

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the epoch's batches, a function of (seed, epoch) alone: images float32 [B, C, H, W], and their ``Batch``."""

    def with_labels(self) -> Batches:
        """The same batches with their labels: not mixed, if mixing takes the labels away."""

    def close(self) -> None:
        """Free what is kept between epochs. The next epoch makes it anew."""


class First:
    """The first ``count`` images of a set."""

    def __init__(self, whole: EvalSet, count: int) -> None:
        self.whole, self.count = whole, min(count, len(whole))

    def __len__(self) -> int:
        return self.count

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``EvalSet`` says."""
        return itertools.islice(self._all(), first, None, every)

    def _all(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.count
        for images, labels in self.whole.batches():
            yield images[:left], labels[:left]
            left -= len(labels)
            if left <= 0:
                return
