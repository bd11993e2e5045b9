"""Configs of runs that take a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from flowdistill import trust
from flowdistill.config import RunConfig, validate
from flowdistill.ledger import Ledger
from flowdistill.runner import run
from flowdistill.runner.watcher import Report, Watcher


class Interrupt(Watcher):
    """Ctrl-C after the first epoch."""

    def report(self, report: Report) -> None:
        raise KeyboardInterrupt


def config(data: Path, *, limit_train: int | None = None, crop: str = "shift", **keys: Any) -> RunConfig:
    """ResNet-8 on the small data, two epochs of 16 images a step; ``train`` keys are merged. The networks are named."""
    train = {"epochs": 2, "batch_size": 64, "lr": 0.05, "precision": "fp32", **keys.pop("train", {})}
    images = {"name": f"npz:{data}", "crop": crop, "pad": 1 if crop == "shift" else 0, "flip": False, "limit_train": limit_train}
    made = validate({"student": "resnet8", "data": images, "train": train, **keys})
    trust.name(*made.networks)
    return made


@contextmanager
def a_teacher_in(folder: Path, data: Path) -> Iterator[Ledger]:
    """A new ledger of one run, a resnet14 of a few steps."""
    with closing(Ledger(folder, create=True)) as ledger:
        run([config(data, student="resnet14", seed=9, train={"epochs": 1})], ledger, torch.device("cpu"))
        yield ledger
