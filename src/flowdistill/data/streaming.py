"""Batches of images that are decoded by worker processes while the device computes."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..checks import UserError, first_line
from ..device import sensible_workers
from ..randomness import generator, seeded
from .augment import boxes
from .pictures import Pictures, quiet
from .supply import BATCH

OPERATIONS = 2  # of RandAugment on an image: Cubuk et al. 2020, section 4.4 (ImageNet)
BATCH_PIXELS = BATCH << 13  # of the images that are evaluated at once, where they are large: 81 of 224x224

Decoded = tuple[Tensor, list[str]] | str


class Shot(NamedTuple):
    """An image as one epoch shows it."""

    epoch: int
    place: int


@dataclass(frozen=True)
class Decoder(Dataset[Decoded]):
    """What a worker process does: a batch of images uint8 [B, H, W, C], each a function of (seed, epoch, place) alone.

    Attributes:
        resized: a random box of the decoded image is enlarged (Inception crop); else it is shown as it is evaluated.
        randaugment: the magnitude of RandAugment's operations, 0 to 30.
    """

    pictures: Pictures
    seed: int = 0
    resized: bool = False
    randaugment: int | None = None

    def __getitem__(self, shots: Sequence[Shot]) -> Decoded:
        """The batch and the names of images that could not be decoded, or what is wrong, for an exception would come with a traceback."""
        pixels, passed = [], list[str]()
        try:
            with quiet():
                for shot in shots:
                    image, broken = self.pictures.shown(shot.place, functools.partial(self._show, shot))
                    pixels.append(image)
                    passed += broken
        except UserError as error:
            return str(error)
        return torch.from_numpy(np.stack(pixels)), passed

    def _show(self, shot: Shot, image: Image.Image) -> Image.Image:
        """Crop, then RandAugment, which follows the crop in the papers' recipes of ImageNet."""
        if not self.resized:
            image = self.pictures.middle(image)
        else:
            from torchvision.transforms.v2.functional import resized_crop

            chance = generator(self.seed, f"box {shot.place}", shot.epoch)
            box = boxes(1, (image.height, image.width), chance)[0].tolist()
            image = resized_crop(image, *box, size=list(self.pictures.sides[:2]))
        if self.randaugment is not None:
            with seeded(self.seed, f"randaugment {shot.place}", shot.epoch):
                image = _randaugment(self.randaugment)(image)
        return image


@functools.cache
def _randaugment(magnitude: int) -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms.v2 import RandAugment

    return RandAugment(OPERATIONS, magnitude)  # type: ignore[no-any-return]


class _Orders(Sampler[Sequence[Shot]]):
    """The batches of the next pass."""

    def __init__(self) -> None:
        self.batches: Sequence[Sequence[Shot]] = []

    def __iter__(self) -> Iterator[Sequence[Shot]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Workers:
    """Processes that decode ahead of the device; they are kept between passes.

    Args:
        count: of processes; 0 decodes in this one, None takes what the machine has.
        replaced: gets the names of images that could not be decoded.
    """

    def __init__(self, decoder: Decoder, device: torch.device, count: int | None, replaced: set[str]) -> None:
        self.decoder, self.device, self.replaced = decoder, device, replaced
        self.count = sensible_workers() if count is None else count
        self._orders = _Orders()
        self._loader: DataLoader[Decoded] | None = None

    def batches(self, orders: Sequence[Sequence[Shot]]) -> Iterator[Tensor]:
        """These batches, uint8 [B, H, W, C] on the device.

        Raises:
            UserError: an image can't be decoded, or a process was killed.
        """
        self._orders.batches = orders
        if self._loader is None:
            self._loader = self._start()
        for found in self._loaded(self._loader):
            if isinstance(found, str):
                raise UserError(found)
            images, passed = found
            self.replaced.update(passed)
            yield images.to(self.device, non_blocking=True)

    def close(self) -> None:
        """End the processes."""
        self._loader = None

    def _start(self) -> DataLoader[Decoded]:
        return DataLoader(
            self.decoder,
            batch_size=None,
            sampler=self._orders,
            num_workers=self.count,
            persistent_workers=self.count > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it draws a seed from the global one
        )

    def _loaded(self, loader: DataLoader[Decoded]) -> Iterator[Decoded]:
        """A process that dies is noticed where its batch is awaited, not by torch's handler, which raises wherever this process just is."""
        try:
            before = signal.getsignal(signal.SIGCHLD)
            batches = iter(loader)
            if before is not None and signal.getsignal(signal.SIGCHLD) is not before:  # None is another's, not to be put back from here
                signal.signal(signal.SIGCHLD, before)
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            what = self.decoder.pictures.what
            raise UserError(f"{what}: a process that decodes was killed ({first_line(error)}); resume with fewer --workers, or 0") from None


def _as_it_is(found: Any) -> Any:
    return found


class StreamedSet:
    """Labelled images that are decoded at every pass."""

    def __init__(self, pictures: Pictures, labels: Tensor, normalise: Callable[[Tensor], Tensor], workers: Workers) -> None:
        self.labels, self.normalise, self._workers = labels, normalise, workers
        height, width, _ = pictures.sides
        self._size = max(1, min(BATCH, BATCH_PIXELS // (height * width)))

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``Labelled`` says."""
        starts = range(0, len(self), self._size)
        orders = [[Shot(0, place) for place in range(start, min(start + self._size, len(self)))] for start in starts]
        for start, images in zip(starts, self._workers.batches(orders), strict=True):
            yield self.normalise(images), self.labels[start : start + self._size]
