"""Data sets by name: scikit-learn's digits, and what torchvision downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...checks import UserError, first_line
from ..dataset import ImageData, Images
from .base import SOURCES, Source


def _read_digits(_: Path) -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images, labels = _enlarge(small, 16)[..., None], bunch.target.astype(np.int64)
    half = len(images) // 2
    return ImageData("digits", images[:half], labels[:half], images[half:], labels[half:], 10, pad=2, flip=False)


def _enlarge(images: Images, size: int) -> Images:
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images])


def _torchvision_reader(name: str, class_name: str, classes: int) -> Callable[[Path], ImageData]:
    def read(root: Path) -> ImageData:
        import torchvision.datasets

        dataset = getattr(torchvision.datasets, class_name)
        parts = []
        for train in (True, False):
            try:
                part = dataset(str(root), train=train, download=True)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{name} is not in {root} and could not be downloaded ({first_line(error)}); connect to the network, copy "
                    f"torchvision's files there, or use --dataset npz:PATH"
                ) from None
            images = np.asarray(part.data)
            parts.append((images[..., None] if images.ndim == 3 else images, np.asarray(part.targets, dtype=np.int64)))
        (x_train, y_train), (x_test, y_test) = parts
        return ImageData(name, x_train, y_train, x_test, y_test, classes)

    return read


SOURCES.register("digits")(
    Source(_read_digits, "scikit-learn's 1,797 digits, 8x8 enlarged to 16x16; first 898 train, last 899 test; offline")
)
for _name, _class, _classes, _about in (
    ("cifar10", "CIFAR10", 10, "50,000 + 10,000 colour images 32x32, torchvision's download"),
    ("cifar100", "CIFAR100", 100, "50,000 + 10,000 colour images 32x32, torchvision's download"),
    ("fashion_mnist", "FashionMNIST", 10, "60,000 + 10,000 grey images 28x28, torchvision's download"),
):
    SOURCES.register(_name)(Source(_torchvision_reader(_name, _class, _classes), _about))
