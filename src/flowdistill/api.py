"""Python in a few lines: ``train`` a teacher, ``distill`` a student, read the result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import UserError
from .config import validate
from .device import resolve_device
from .ledger import Ledger, Run
from .models import Network
from .report.progress import Bars
from .runner import Watcher, load_network
from .runner import run as run_configs
from .training.weights import hash_weights, save_weights


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        run: its row in the ledger.
        folder: its files: ``student.safetensors``, ``run.json``, ``predictions.npz``.
    """

    run: Run
    folder: Path

    @property
    def accuracy(self) -> float:
        """Percent of the test images that the student gets right: last epoch, or the epoch the holdout chose."""
        assert self.run.accuracy is not None
        return self.run.accuracy

    def student(self) -> Network:
        """The trained network, in eval mode on the CPU."""
        return load_network(self.folder / "student.safetensors")[0]


def train(
    student: str | os.PathLike[str] | int | Result | Network,
    data: str | Mapping[str, Any],
    *,
    seed: int = 0,
    runs: str | os.PathLike[str] = "runs",
    device: str = "auto",
    engine: str = "auto",
    workers: int | None = None,
    progress: bool = True,
    **config: Any,
) -> Result:
    """Train a network on the labels alone; takes what ``distill`` takes."""
    return distill(
        None,
        student,
        data,
        method="base",
        seed=seed,
        runs=runs,
        device=device,
        engine=engine,
        workers=workers,
        progress=progress,
        **config,
    )


def distill(
    teacher: str | os.PathLike[str] | int | Result | Network | None,
    student: str | os.PathLike[str] | int | Result | Network,
    data: str | Mapping[str, Any],
    *,
    method: str = "fsp",
    seed: int = 0,
    runs: str | os.PathLike[str] = "runs",
    device: str = "auto",
    engine: str = "auto",
    workers: int | None = None,
    progress: bool = True,
    **config: Any,
) -> Result:
    """Train a student with a teacher, record the run, and return it. A finished run of the same config is returned at once,
    and one that was cut off goes on from its checkpoint.

    Args:
        teacher: a model name (a trained one is then chosen from ``runs``), a run's number, a Result, a weights file, or a network
            of this package.
        student: likewise; a name starts from fresh weights, anything else from the weights it has.
        data: ``digits``, ``cifar10``, ``cifar100``, ``fashion_mnist``, ``npz:PATH``, ``folder:PATH``, ``csv:FILE`` or ``hf:NAME``; or
            a mapping such as ``{"name": "npz:PATH", "pad": 2, "flip": False, "unlabelled": "folder:PATH"}``.
        method: a method or a composition such as ``at+kd``.
        seed: decides initial weights, order and augmentation.
        runs: folder of the ledger.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        engine: ``auto``, ``eager``, ``compiled`` or ``graph``; what can't be had here falls back, and says so.
        workers: processes that decode images which memory does not hold; left out, one a core, at most eight.
        progress: bars on stderr.
        config: further keys of RunConfig as nested mappings (``train={"epochs": 30}, weights={"fsp": 10.0}, split="holdout"``);
            ``init_from`` is named as the student is.

    Raises:
        UserError: an argument that can't be used; one line that says what to do.
        RuntimeError: the student diverged; the run is recorded as failed.
    """
    ledger = Ledger(Path(runs), create=True)
    begun = {"init_from": _reference(config["init_from"], ledger)} if config.get("init_from") is not None else {}
    parsed = validate(
        {
            **config,
            **begun,
            "student": _reference(student, ledger),
            "teacher": None if teacher is None else _reference(teacher, ledger),
            "data": {"name": data} if isinstance(data, str) else data,
            "method": method,
            "seed": seed,
        }
    )
    watcher = Bars() if progress else Watcher()
    run = run_configs([parsed], ledger, resolve_device(device), engine=engine, workers=workers, watcher=watcher)[0]
    if run.status != "finished":
        raise RuntimeError(f"run {run.no} {run.status}: {run.error}")
    return Result(run, ledger.run_folder(run.no))


def _reference(network: str | os.PathLike[str] | int | Result | Network, ledger: Ledger) -> str:
    """A network as a config names it. A module in memory is put into a file beside the runs, so that its run can be repeated."""
    if isinstance(network, str | os.PathLike):
        return os.fspath(network)
    if isinstance(network, int):
        return str(network)
    if isinstance(network, Result):
        own = network.folder.parent.resolve() == ledger.folder.resolve()
        return str(network.run.no) if own else str(network.folder / "student.safetensors")
    if not isinstance(network, Network):
        raise UserError(
            f"{type(network).__name__} is no network of this package; give a model's name, a run, a weights file or such a network"
        )
    weights = network.state_dict()
    path = ledger.folder / "networks" / f"{hash_weights(weights)[:16]}.safetensors"
    if not path.is_file():
        save_weights(path, weights, {**network.about, "model": network.spec.name})
    return str(path)
