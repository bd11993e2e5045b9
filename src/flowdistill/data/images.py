"""What every source gives: images and labels in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Crop
from ..taps import DataSpec

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def digest(*arrays: npt.NDArray[Any]) -> str:
    """SHA-256 over types, shapes and values."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


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
    """A classification data set in memory.

    Attributes:
        name: as tables print it.
        x_train, x_test: uint8 [N, H, W, C].
        y_train, y_test: int64 [N], classes 0 to K-1.
        classes: K.
        pad: pixels of reflected border that the random crop moves in.
        flip: whether training images are mirrored at random.
        crop: how they are cropped: moved in the border, or a box of them enlarged.
        class_names: K names in the order of the labels; empty where the source has none.
        unlabelled: images to train on beside those, of the same sizes.
    """

    name: str
    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels
    classes: int
    pad: int = 4
    flip: bool = True
    crop: Crop = "shift"
    class_names: tuple[str, ...] = ()
    unlabelled: Unlabelled | None = None

    @property
    def spec(self) -> DataSpec:
        """The sizes, without the images."""
        n, height, width, channels = self.x_train.shape
        return DataSpec(self.name, n, self.classes, channels, height, width)

    def hash(self) -> str:
        """SHA-256 over every labelled image and label: two runs with one hash have the same data set."""
        return digest(self.x_train, self.y_train, self.x_test, self.y_test)
