"""Image files of real digits, and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from flowdistill.config import DataConfig, RunConfig, validate
from flowdistill.data.dataset import ImageData
from flowdistill.data.sources import load
from flowdistill.talk import Remarks

NAMES = ("ant", "bee", "cat")


def digits(n: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Real digits 0 to 2 of 8x8 and their labels, in the order in which files sorted by class are read."""
    bunch = load_digits(n_class=3)
    order = start + np.argsort(bunch.target[start : start + n], kind="stable")
    return (bunch.images * 15).astype(np.uint8)[order], bunch.target[order].astype(np.int64)


def write(folder: Path, images: np.ndarray, labels: np.ndarray, kind: str = "png") -> list[Path]:
    """``FOLDER/CLASS/0007.png`` for each image."""
    paths = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        paths.append(folder / NAMES[label] / f"{number:04}.{kind}")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(paths[-1])
    return paths


def folder_data(path: Path, **keys: Any) -> ImageData:
    return load(DataConfig.model_validate({"name": f"folder:{path}", "pad": 1} | keys), Remarks())


def csv_data(path: Path, **keys: Any) -> ImageData:
    return load(DataConfig.model_validate({"name": f"csv:{path}", "pad": 1} | keys), Remarks())


def on(name: str, **keys: Any) -> RunConfig:
    return validate(
        {
            "student": "resnet8",
            "data": {"name": name, "pad": 1, "flip": False} | keys.pop("data", {}),
            "train": {"epochs": 1, "batch_size": 30, "lr": 0.05, "precision": "fp32"},
            **keys,
        }
    )
