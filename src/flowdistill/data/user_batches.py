"""User loaders given from Python, as training and measuring see them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import UserError
from ..config import TrainConfig
from ..types import Batch
from .balance import weighted, weights_of
from .interfaces import EvalSet
from .normalisation import Normalisation
from .user_loaders import EVERY_PASS, TRAIN, VAL, Finite, UserLoaderData, checked, drawn, refuse_other_labels, refuse_other_sizes, smallest

WHOLE = "which a loader does not tell; choose another method, or give the data by name"


class UserLoaderSet:
    """The images of a loader, to measure networks on."""

    def __init__(self, data: UserLoaderData, device: torch.device) -> None:
        self.data, self.device = data, device

    def __len__(self) -> int:
        return self.data.counts[1]

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``EvalSet`` says; every batch is drawn all the same.

        Raises:
            UserError: the number of images differs from the first pass, or a value is not finite.
        """
        return itertools.islice(self._all(), first, None, every)

    def _all(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, finite = 0, Finite(VAL)
        for batch in drawn(self.data.val, 0, VAL, 0):
            images, labels = _placed(checked(batch, VAL), self.data, self.device, finite)
            count += len(labels)
            yield images, labels
        finite.end()
        if count != len(self):
            raise UserError(f"{VAL}: it gave {len(self)} images on its first pass and {count} on another; it must {EVERY_PASS}")


class UserLoaderSupply:
    """Two loaders as training sees them."""

    resident = False

    def __init__(self, data: UserLoaderData, device: torch.device) -> None:
        self.data, self.spec, self.device = data, data.spec, device
        channels = data.size[0]
        self.normalisation = Normalisation((0.0,) * channels, (1.0,) * channels)
        self.test = UserLoaderSet(data, device)
        self.epoch_images: EvalSet = self.test

    @property
    def labels(self) -> Tensor:
        """Unknown.

        Raises:
            UserError: always.
        """
        raise UserError(f"this method needs the labels of all training images, {WHOLE}")

    @property
    def train_eval(self) -> UserLoaderSet:
        """Unknown.

        Raises:
            UserError: always.
        """
        raise UserError(f"this method needs all training images as they are, {WHOLE}")

    def seed_batches(self, seed: int, train: TrainConfig) -> UserBatches:
        """The batches of one seed; all but the weights of the classes is the loader's own."""
        assert train.class_weights != "balanced", "the config was validated"
        unknown = torch.empty(0, dtype=torch.int64, device=self.device)
        return UserBatches(self, seed, weights_of(train.class_weights, unknown, self.spec.classes))

    def remarks(self) -> list[str]:
        """Nothing."""
        return []


class UserBatches:
    """The batches of a loader. The index of an image is its position in the epoch. ``weights``: what each class weighs, [K]."""

    def __init__(self, data: UserLoaderSupply, seed: int, weights: Tensor | None = None) -> None:
        self.data, self.seed, self.weights = data, seed, weights
        self.steps, self.batch_size = len(data.data.train), data.data.batch_size
        self.smallest_batch = smallest(data.data.train, self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the epoch's batches.

        Raises:
            UserError: a batch has images of another size or labels beyond the classes, a value is not finite, or the number of batches is
                not the loader's length.
        """
        device, loaders, finite = self.data.device, self.data.data, Finite(TRAIN, epoch)
        number, step, start = torch.tensor(epoch, device=device), 0, 0
        for step, batch in enumerate(drawn(loaders.train, self.seed, TRAIN, epoch), 1):
            if step > self.steps:
                break
            images, labels = _placed(checked(batch, TRAIN), loaders, device, finite)
            targets = None if self.weights is None else weighted(labels, self.weights)
            yield images, Batch(labels, torch.arange(start, start + len(labels), device=device), number, targets=targets)
            start += len(labels)
        finite.end()
        if step != self.steps:
            count = "more" if step > self.steps else f"{step}"
            cure = f"give it the right length; it must {EVERY_PASS}"
            raise UserError(f"{TRAIN}: it gave {count} batches in epoch {epoch + 1}, its length is {self.steps}; {cure}")

    def with_labels(self) -> UserBatches:
        """As ``Batches`` says."""
        return self

    def close(self) -> None:
        """Nothing is kept."""


def _placed(batch: tuple[Tensor, Tensor], data: UserLoaderData, device: torch.device, finite: Finite) -> tuple[Tensor, Tensor]:
    """A batch on the device, float32 in channels_last memory."""
    images, labels = batch
    refuse_other_sizes(images, data.size)
    finite.look(images)
    refuse_other_labels(labels, data.classes)
    on_device = images.to(device, torch.float32, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return on_device, labels.to(device, torch.int64, non_blocking=True)
