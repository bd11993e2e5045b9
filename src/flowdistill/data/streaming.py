"""Batches of images that are decoded by worker processes while the device computes."""

from __future__ import annotations

import functools
import multiprocessing.queues
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..checks import UserError, first_line, shortage
from ..device import sensible_workers
from ..randomness import generator, seeded
from .augment import boxes
from .interfaces import at_once
from .lazy_images import Pictures, quiet

OPERATIONS = 2  # of RandAugment on an image: Cubuk et al. 2020, section 4.4 (ImageNet)
LOST = 74  # exit status of a process whose batch was lost: EX_IOERR


class Pixels:
    """An array that torch's DataLoader pins as it pins a tensor, in a thread of its own."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.tensor: Tensor | None = None
        self.array = array

    def pin_memory(self) -> Pixels:
        """Move the values to page-locked memory, from which a GPU copies them while it computes."""
        self.tensor = torch.from_numpy(self.array).pin_memory()
        return self

    def on(self, device: torch.device) -> Tensor:
        """The values on a device."""
        return (torch.from_numpy(self.array) if self.tensor is None else self.tensor).to(device, non_blocking=True)


class Decoded(NamedTuple):
    """A batch as a process sends it.

    It goes through a pipe, as an array. A tensor would need shared memory, of which a container has 64 MB by default, and a file
    descriptor. If either runs out, torch loses the batch in a thread of the process, and the reader waits for ever.

    Attributes:
        pixels: uint8 [B, H, W, C].
        replaced: names of images that could not be decoded.
        wrong: the error that ends the pass, else empty. An exception would come with a traceback.
    """

    pixels: Pixels
    replaced: list[str]
    wrong: str = ""


class Shot(NamedTuple):
    """The image at a position of the data set, as one epoch shows it; ``times`` counts how often the epoch drew it before."""

    epoch: int
    position: int
    times: int = 0

    @property
    def named(self) -> str:
        """What tells it from the other shots of its epoch."""
        return f"{self.position} again {self.times}" if self.times else str(self.position)


@dataclass(frozen=True)
class Decoder(Dataset[Decoded]):
    """The work of a process: it decodes batches uint8 [B, H, W, C]. Each image is a function of (seed, shot) alone.

    Attributes:
        resized: whether a random box of the image is enlarged (Inception crop). Default: it is shown as it is evaluated.
        randaugment: the magnitude of RandAugment's operations, 0 to 30.
    """

    pictures: Pictures
    seed: int = 0
    resized: bool = False
    randaugment: int | None = None

    def __getitem__(self, shots: Sequence[Shot]) -> Decoded:
        """Decode a batch."""
        pixels, passed = [], list[str]()
        try:
            with quiet():
                for shot in shots:
                    image, broken = self.pictures.shown(shot.position, functools.partial(self._show, shot))
                    pixels.append(image)
                    passed += broken
                return Decoded(Pixels(np.stack(pixels)), passed)
        except UserError as error:
            wrong = str(error)
        except (OSError, MemoryError) as error:
            wrong = f"{self.pictures.source}: {first_line(error)}; {shortage(error) or 'mend that'}"
        return Decoded(Pixels(np.empty(0, np.uint8)), [], wrong)

    def _show(self, shot: Shot, image: Image.Image) -> Image.Image:
        """Crop, then RandAugment, which follows the crop in the papers' recipes of ImageNet."""
        if not self.resized:
            image = self.pictures.middle(image)
        else:
            from torchvision.transforms.v2.functional import resized_crop

            chance = generator(self.seed, f"box {shot.named}", shot.epoch)
            box = boxes(1, (image.height, image.width), chance)[0].tolist()
            image = resized_crop(image, *box, size=list(self.pictures.sides[:2]))
        if self.randaugment is not None:
            with seeded(self.seed, f"randaugment {shot.named}", shot.epoch):
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
    """Processes that decode ahead of the device. They are kept between passes.

    Args:
        count: number of processes. 0 decodes in this process, None takes one per core, at most eight.
        replaced: gets the names of images that could not be decoded.
    """

    def __init__(self, decoder: Decoder, device: torch.device, count: int | None, replaced: set[str]) -> None:
        self.decoder, self.device, self.replaced = decoder, device, replaced
        self.count = sensible_workers() if count is None else count
        self._orders = _Orders()
        self._loader: DataLoader[Decoded] | None = None

    def batches(self, orders: Sequence[Sequence[Shot]]) -> Iterator[Tensor]:
        """Yield these batches, uint8 [B, H, W, C] on the device.

        Raises:
            UserError: an image can't be decoded, or a process was killed.
        """
        self._orders.batches = orders
        if self._loader is None:
            self._loader = self._start()
        for batch in self._loaded(self._loader):
            if batch.wrong:
                raise UserError(batch.wrong)
            self.replaced.update(batch.replaced)
            yield batch.pixels.on(self.device)

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
            worker_init_fn=_end_with_what_is_lost,
            generator=torch.Generator(),  # else it draws a seed from the global one
        )

    def _loaded(self, loader: DataLoader[Decoded]) -> Iterator[Decoded]:
        """Yield the batches. A process that dies is noticed here, not by torch's handler, which raises wherever this process just is."""
        try:
            before = signal.getsignal(signal.SIGCHLD)
            batches = self._started(loader)
            if before is not None and signal.getsignal(signal.SIGCHLD) is not before:  # None is another's, not to be put back from here
                signal.signal(signal.SIGCHLD, before)
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            source = self.decoder.pictures.source
            why = first_line(error)
            raise UserError(f"{source}: a process that decodes was killed ({why}); resume with fewer --workers, or 0") from None

    def _started(self, loader: DataLoader[Decoded]) -> Iterator[Decoded]:
        try:
            return iter(loader)
        except OSError as error:  # no descriptors, no semaphores, no processes
            self.close()
            for frame, _ in walk_tb(error.__traceback__):
                if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                    half_made._shutdown = True  # else torch ends it, finds half of it missing, and prints a traceback
            source = self.decoder.pictures.source
            raise UserError(f"{source}: processes that decode can't be started ({first_line(error)}); use fewer --workers, or 0") from None


def _as_it_is(batch: Any) -> Any:
    return batch


def _end_with_what_is_lost(_: int) -> None:
    """End a process that can't send a batch. Python would write that to stderr and go on; the reader, which waits, must know."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(_error: BaseException, _batch: object) -> None:
    os._exit(LOST)


class StreamedSet:
    """Labelled images that are decoded at every pass."""

    def __init__(self, pictures: Pictures, labels: Tensor, normalise: Callable[[Tensor], Tensor], workers: Workers) -> None:
        self.labels, self.normalise, self._workers = labels, normalise, workers
        height, width, _ = pictures.sides
        self._size = at_once(height, width, labels.device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``EvalSet`` says."""
        starts = range(0, len(self), self._size)[first::every]
        orders = [[Shot(0, position) for position in range(start, min(start + self._size, len(self)))] for start in starts]
        for start, images in zip(starts, self._workers.batches(orders), strict=True):
            yield self.normalise(images), self.labels[start : start + self._size]
