"""What every source gives: labelled images, in memory or decoded on demand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Crop
from ..types import DataSpec
from .lazy_images import Images, Labels, Pictures, in_threads

__all__ = ["ImageData", "Images", "Labels", "Pictures", "Unlabelled", "digest", "part"]


def digest(*arrays: npt.NDArray[Any] | Pictures) -> str:
    """SHA-256 over types, shapes and values.

    Streamed images are covered by the name and the number of bytes of every file (of a table's rows also by the last 64 bytes) and by
    the size that they are resized to, not by their pixels.
    """
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(f"{getattr(array, 'dtype', 'streamed')}{array.shape}".encode())
        if isinstance(array, Pictures):
            files = in_threads(array.shelf.identity, array.rows.tolist())
            hasher.update("\n".join(files).encode("utf-8", "surrogateescape"))
        else:
            hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Unlabelled:
    """Images uint8 [N, H, W, C] without labels, and their name as tables print it."""

    name: str
    images: Images

    @cached_property
    def hash(self) -> str:
        """SHA-256 over every image."""
        return digest(self.images)


@dataclass(frozen=True)
class ImageData:
    """A classification data set.

    Attributes:
        name: as tables print it.
        x_train, x_test: uint8 [N, H, W, C], or ``Pictures`` that give them when indexed.
        y_train, y_test: int64 [N], classes 0 to K-1; without labels ``NO_LABEL`` each, and no test image.
        classes: K; 0 if nothing has a label.
        pad: width in pixels of the reflected border that the random crop moves in.
        flip: whether training images are mirrored at random.
        crop: how training images are cropped: ``shift`` moves them in the border, ``resized`` enlarges a box of them.
        class_names: K names in the order of the labels; empty if the source has none.
        unlabelled: further images to train on, of the same size.
        randaugment: the magnitude of RandAugment's operations on training images, 0 to 30; None for none.
    """

    name: str
    x_train: Images | Pictures
    y_train: Labels
    x_test: Images | Pictures
    y_test: Labels
    classes: int
    pad: int = 4
    flip: bool = True
    crop: Crop = "shift"
    class_names: tuple[str, ...] = ()
    unlabelled: Unlabelled | None = None
    randaugment: int | None = None

    @property
    def spec(self) -> DataSpec:
        """The sizes, without the images."""
        n, height, width, channels = self.x_train.shape
        return DataSpec(self.name, n, self.classes, channels, height, width)

    @property
    def streamed(self) -> bool:
        """Whether images are decoded batch by batch because memory does not hold them."""
        return isinstance(self.x_train, Pictures)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over every labelled image and label: two runs with one hash have the same data set."""
        return digest(self.x_train, self.y_train, self.x_test, self.y_test)


def part(images: Images | Pictures, positions: Labels) -> Images | Pictures:
    """The images at these positions; nothing is decoded."""
    return images.part(positions) if isinstance(images, Pictures) else images[positions]
