"""What training asks of images, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..types import Batch, DataSpec
from .normalisation import Normalisation

BATCH = 500  # images of a forward pass where a network is measured on a CPU
BATCH_GPU = 2000  # on a GPU, which 500 small ones leave idle
BATCH_PIXELS = BATCH << 13  # where they are large: 81 of 224x224


def at_once(height: int, width: int, device: torch.device) -> int:
    """Images of this size that a network is measured on in one pass."""
    most = BATCH if device.type != "cuda" else BATCH_GPU
    return max(1, min(most, BATCH_PIXELS // (height * width)))


class EvalSet(Protocol):
    """Labelled images that a network is measured on: the same in the same order at every pass, neither cropped nor mirrored at random."""

    def __len__(self) -> int:
        """How many there are."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 [B, C, H, W] as networks take them, and labels [B], on the device; the last batch may be smaller."""


class Supply(Protocol):
    """One data set under one split: shared by all batches of a cohort.

    Attributes:
        epoch_images: what every epoch is measured on: ``test`` of a full run, the held-out tenth of a holdout run.
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
        """What was done to the pixels; it travels in the student's file."""

    @property
    def labels(self) -> Tensor:
        """[n] of the training images, in the order of ``Batch.indices``; ``NO_LABEL`` for those that have none."""

    @property
    def train_eval(self) -> EvalSet:
        """The training images that have a label, as they are."""

    @property
    def test(self) -> EvalSet:
        """The test images."""

    def seed_batches(self, seed: int, batch_size: int, mixup: float = False) -> Batches:
        """The batches of one seed."""

    def remarks(self) -> list[str]:
        """What is to be told of the images when they were trained on, a line each."""


class Batches(Protocol):
    """The batches of one seed: every student of that seed sees the same images in the same order, cropped and mixed alike.

    Attributes:
        smallest_batch: images of the smallest batch, as far as it is known before an epoch.
    """

    seed: int
    steps: int
    batch_size: int
    smallest_batch: int

    @property
    def data(self) -> Supply:
        """Where they come from."""

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Batch]]:
        """The epoch's batches, a function of (seed, epoch) alone: images float32 [B, C, H, W] and what the step knows beside them."""

    def with_labels(self) -> Batches:
        """The same batches, but for those that are mixed without labels: these as they were before."""

    def close(self) -> None:
        """Let go of what is kept between epochs; the next epoch makes it anew."""


class First:
    """The first few images of others."""

    def __init__(self, whole: EvalSet, count: int) -> None:
        self.whole, self.count = whole, min(count, len(whole))

    def __len__(self) -> int:
        return self.count

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``EvalSet`` says."""
        left = self.count
        for images, labels in self.whole.batches():
            yield images[:left], labels[:left]
            left -= len(labels)
            if left <= 0:
                return
