"""Images that are decoded on demand, one by one: from files, rows of a table, or an array."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ..checks import UserError, first_line, pass_on_shortage, regular_file
from ..config import LARGEST_IMAGE

T = TypeVar("T")
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not all that Pillow knows: EPS would start another program
BATCH = 64  # images that a thread takes at once


class Broken(NamedTuple):
    """An image that can't be read, and why."""

    name: str
    why: str


class Shelf(Protocol):
    """Where images are stored, by row. It is sent to the processes that decode."""

    def name(self, row: int) -> str:
        """The name of an image in messages."""

    def identity(self, row: int) -> str:
        """A string that tells an image from others before it is decoded."""

    def image(self, row: int, channels: int) -> Image.Image:
        """The image, upright, grey or RGB. It may raise anything if it can't be read."""


class Encoded(Shelf, Protocol):
    """A shelf of image files, on disk or elsewhere."""

    def open(self, row: int) -> BinaryIO:
        """Open an image's file."""


@dataclass(frozen=True)
class Files:
    """Image files of one folder. ``names`` are relative to it, in the encoding of the file system."""

    root: str
    names: npt.NDArray[np.bytes_]  # an array, for a list would be copied into every process

    def path(self, row: int) -> Path:
        """The path of a file."""
        return Path(self.root, self.name(row))

    def name(self, row: int) -> str:  # noqa: D102
        return os.fsdecode(self.names[row])

    def identity(self, row: int) -> str:
        """Name and number of bytes."""
        return f"{self.name(row)}\0{self.path(row).stat().st_size}"

    def open(self, row: int) -> BinaryIO:  # noqa: D102
        return regular_file(self.path(row), self.name(row)).open("rb")

    def image(self, row: int, channels: int) -> Image.Image:  # noqa: D102
        with self.open(row) as file:
            return decode(file, channels)


@dataclass(frozen=True)
class Rows:
    """The images of an array uint8 [N, H, W, C], grey or RGB."""

    array: Images

    def name(self, row: int) -> str:  # noqa: D102
        return f"image {row}"

    def identity(self, row: int) -> str:  # noqa: D102
        return self.name(row)

    def image(self, row: int, channels: int) -> Image.Image:  # noqa: D102
        return Image.fromarray(self.array[row, ..., 0] if channels == 1 else self.array[row])


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images of a data set that are not held in memory. Indexing decodes them, as they are evaluated: uint8 [n, H, W, C].

    Attributes:
        source: the data set, as messages name it.
        shelf, rows: where they are stored.
        labels: [n] their classes.
        sides: (H, W, C) of an image.
        size: the short side that they are resized to before the middle is cut out; None if they are taken as they are.
        skip_broken: whether an image that can't be decoded is replaced by the next of its class. Default: it is refused.
    """

    source: str
    shelf: Shelf
    rows: Labels
    labels: Labels
    sides: tuple[int, int, int]
    size: int | None = None
    skip_broken: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H, W, C), as an array's."""
        return len(self.rows), *self.sides

    def __getitem__(self, positions: slice | npt.NDArray[np.int64]) -> Images:
        with quiet():
            chosen = np.arange(len(self))[positions].tolist()
            return np.stack(in_threads(lambda position: self.shown(position, self.middle)[0], chosen))

    def part(self, positions: Labels) -> Pictures:
        """The images at these positions; nothing is decoded."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def middle(self, image: Image.Image) -> Image.Image:
        """An image as it is evaluated."""
        return image if self.size is None else square(image, self.size)

    def shown(self, position: int, show: Callable[[Image.Image], Image.Image]) -> tuple[Images, list[str]]:
        """What ``show`` makes of the image at a position, uint8 [H, W, C], and the names of images that could not be decoded.

        With ``skip_broken``, the next of its class is shown if the image can't be decoded.

        Raises:
            UserError: the image can't be decoded, or has other sides than its header said, and none replaces it.
        """
        passed: list[Broken] = []
        for other in self._in_place_of(position):
            result = or_broken(self.shelf.name(self.rows[other]), lambda: self._pixels(self.rows[other], show))  # noqa: B023
            if not isinstance(result, Broken):
                return result, [broken.name for broken in passed]
            passed.append(result)
            if not self.skip_broken:
                break
        name, why = passed[0]
        cure = "no image of its class can be" if self.skip_broken else "mend it, or replace such images with --set data.skip_broken=true"
        raise UserError(f"{self.source}: {name} can't be decoded ({why}); {cure}")

    def _pixels(self, row: int, show: Callable[[Image.Image], Image.Image]) -> Images:
        pixels = np.asarray(show(self.shelf.image(row, self.sides[2])))
        pixels = pixels.reshape(*pixels.shape[:2], self.sides[2])
        if pixels.shape != self.sides:
            raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels where others have {self.sides[1]}x{self.sides[0]}")
        return pixels

    def _in_place_of(self, position: int) -> Iterator[int]:
        """The position of an image, then those of its class after it, and then those before it."""
        yield position
        alike = np.flatnonzero(self.labels == self.labels[position])
        yield from alike[alike > position].tolist()
        yield from alike[alike < position].tolist()


def decode(file: BinaryIO, channels: int) -> Image.Image:
    """Decode an image file: upright as its EXIF says, grey or RGB."""
    with Image.open(file, formats=FORMATS) as opened:
        return ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side of an image to ``size`` and cut out the middle: the pixels of torchvision's Resize and CenterCrop."""
    width, height = (size * side // min(image.size) for side in image.size)
    if width * height > LARGEST_IMAGE:
        raise ValueError(f"{image.width}x{image.height} pixels, too long and thin to be resized to {size}")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def or_broken(name: str, read: Callable[[], T]) -> T | Broken:
    """What is read, or why it can't be.

    Raises:
        OSError, MemoryError: the machine has no memory or descriptors left; that is no fault of the image.
    """
    try:
        return read()
    except UserError as error:  # regular_file's, which begins with the name
        return Broken(name, str(error).removeprefix(f"{name}: "))
    except UnidentifiedImageError:
        return Broken(name, "no image of a known format")
    except Exception as error:  # Pillow raises anything on junk
        pass_on_shortage(error)
        return Broken(name, first_line(error))


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore Pillow's warnings, on metadata and sizes: an image that can't be decoded is an error anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_threads(work: Callable[[int], T], numbers: Sequence[int], tell: Callable[[int], None] = lambda _: None) -> list[T]:
    """``work(number)`` of every number, in order. ``tell`` gets the count of those that are done, every ``BATCH`` of them."""
    pool, results = ThreadPoolExecutor(os.cpu_count()), list[T]()
    batches = [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
    try:
        for batch in pool.map(lambda batch: [work(number) for number in batch], batches):
            results += batch
            tell(len(results))
    finally:
        pool.shutdown(cancel_futures=True)
    return results
