"""What a tracker is, and what all of them show under the same names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .. import advice
from ..checks import UserError
from ..ledger import Run, flattened
from ..registry import Registry
from ..runner import Report


class Tracker(Protocol):
    """Shows one run. Whatever its methods raise ends this tracker for this run, and nothing else."""

    def epoch(self, report: Report) -> None:
        """The next epoch is on record. It is what ``on_epoch`` gets."""

    def picture(self, name: str, png: bytes) -> None:
        """A picture of the finished run."""

    def card(self, markdown: str) -> None:
        """The compression card of the finished run."""

    def close(self, run: Run) -> None:
        """Nothing more comes. ``run`` says how it ended."""


class Kind(NamedTuple):
    """A kind of tracker.

    Attributes:
        begin: (run, its folder) -> its tracker. What this kind showed of the run before is replaced.
        told: folder of the runs -> where it shows them, in a line.
        package: what must be installed, which is the name of the extra too. Default: nothing.
    """

    begin: Callable[[Run, Path], Tracker]
    told: Callable[[Path], str]
    package: str = ""


TRACKERS: Registry[Kind] = Registry("tracker", "flowdistill.trackers")


def chosen(names: str | Sequence[str], option: str) -> tuple[str, ...]:
    """The trackers that are named, in a text with commas or one by one. ``option`` is what named them.

    Raises:
        UserError: there is none of a name, a name stands twice, or its package is not installed.
    """
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in listed:
        if name not in TRACKERS:
            raise UserError(f"{option} {name!r} is no tracker; choose from: {', '.join(TRACKERS)}{TRACKERS.causes}")
        if listed.count(name) > 1:
            raise UserError(f"{option} names {name} twice; name each once")
        package = TRACKERS[name].package
        if package and not _installed(package):
            install = advice.options("pip", "install", f"flowdistill[{package}]")
            raise UserError(f"{option} {name} needs {package}, which is not installed; install it with: {install}")
    return tuple(listed)


def _installed(package: str) -> bool:
    """Whether a package is there. A folder of its name, as W&B leaves one where it ran, is none."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def title(run: Run) -> str:
    """A run's name: number, method, student, teacher, seed. It can be the name of a folder."""
    pair = run.student if run.teacher == "-" else f"{run.student}-{run.teacher}"
    return re.sub(r"[^\w.+-]+", "-", f"{run.no}_{run.method}_{pair}_seed{run.seed}")


def accuracy_name(run: Run) -> str:
    """Of the images that every epoch is measured on."""
    return "accuracy/test" if run.split == "full" else "accuracy/holdout"


def figures(run: Run, report: Report) -> dict[str, float]:
    """An epoch's figures: unweighted terms, the rate, seconds of training and measuring, accuracy in percent where it is known."""
    values = {f"loss/{term}": mean for term, mean in report.terms.items()} | {"lr": report.lr, "seconds": report.seconds}
    return values if report.accuracy is None else values | {accuracy_name(run): report.accuracy}


def settings(run: Run) -> dict[str, Any]:
    """What a run was trained by: its config as one flat table, the weights of its terms among them."""
    return flattened(run.config)


def results(run: Run) -> dict[str, Any]:
    """What came of a run, as far as it is on record. ``accuracy`` is that of the student that ships, in percent of the test images."""
    known: Mapping[str, Any] = {
        "status": run.status,
        "error": run.error or None,
        "accuracy": run.accuracy,
        "epoch": run.epoch,
        "parameters": run.parameters,
        "teacher_accuracy": run.teacher_accuracy,
        "train_seconds": run.train_seconds,
        "images_per_second": run.images_per_second,
        "peak_memory": run.peak_memory,
        "device": run.device,
    }
    return {name: value for name, value in known.items() if value is not None}
