"""Measure a finished run or a weights file again, from the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import models
from ..checks import UserError
from ..config import DataConfig, parse_as
from ..data.loader import Labelled, Normalisation
from ..data.sources import load
from ..device import resolve_precision
from ..ledger import Ledger
from ..models import Network
from ..taps import DataSpec
from ..training.evaluate import evaluate as measure
from ..training.weights import fill, load_weights
from .networks import STUDENT_FILE


class Measured(NamedTuple):
    """A network's accuracy on a test set."""

    model: str
    dataset: str
    images: int
    correct: int
    accuracy: float
    recorded: float | None
    data: str


def weights_path(target: str, ledger: Ledger | None) -> Path:
    """The weights file of a run's number, or the file itself."""
    if not target.isdecimal():
        return Path(target).expanduser()
    if ledger is None:
        raise UserError(f"run {target} needs a ledger; name its folder with --runs")
    return ledger.run_folder(ledger.run(int(target)).no) / STUDENT_FILE


def load_network(path: Path) -> tuple[Network, dict[str, Any]]:
    """A student from its file alone, in eval mode, with the metadata that it carries.

    Raises:
        UserError: not a file that this package wrote, or damaged.
    """
    weights, about = load_weights(path)
    if not {"model", "input", "classes", "mean", "std", "data", "data_hash", "precision"} <= about.keys():
        raise UserError(f"weights file {path} does not say its model and data; evaluate a run's student.safetensors or a run's number")
    channels, height, width = about["input"]
    spec = DataSpec("", 0, about["classes"], channels, height, width)
    net = models.build(about["model"], spec)
    fill(net, weights, str(path))
    net.about = about
    return net.eval(), about


def evaluate(path: Path, device: torch.device, *, dataset: str | None = None, precision: str | None = None) -> Measured:
    """Accuracy on all test images, with the normalisation and, unless told otherwise, the data and precision of training.

    Raises:
        UserError: the file or the data can't be read, or the data has other sizes or classes.
    """
    net, about = load_network(path)
    data = load(parse_as(DataConfig, about["data"] | ({"name": dataset} if dataset else {})))
    shape = (data.spec.channels, data.spec.height, data.spec.width)
    if (*shape, data.classes) != (*about["input"], about["classes"]):
        raise UserError(
            f"{path} was trained on {'x'.join(map(str, about['input']))} images of {about['classes']} classes; {data.name} has "
            f"{'x'.join(map(str, shape))} of {data.classes}; choose a data set of that shape"
        )
    net = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    test = Labelled(torch.from_numpy(data.x_test).to(device), torch.from_numpy(data.y_test).to(device))
    normalise = Normalisation(tuple(about["mean"]), tuple(about["std"])).on(device)
    correct = int(measure(net, test, normalise, resolve_precision(precision or about["precision"], device)).correct)
    images = len(test.labels)
    same = data.hash() == about["data_hash"]
    return Measured(
        model=about["model"],
        dataset=data.name,
        images=images,
        correct=correct,
        accuracy=100 * correct / images,
        recorded=100 * about["correct"] / about["images"] if same else None,
        data="as trained" if same else "other than trained on",
    )
