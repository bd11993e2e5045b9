"""Python in a few lines: ``train`` a teacher, ``distill`` a student, read the result."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from torch import Tensor, nn

from . import trust
from .checks import MAX_WORKERS, Changes, UserError, did_you_mean, first_line
from .config import BASELINE, DISTILLING, validate
from .data import user_loaders
from .device import full_precision, resolve_device
from .ledger import STUDENT_FILE, Ledger, Run, kept_answers
from .metrics import Figures, Kept
from .models import Network
from .models.code import contents
from .models.foreign import adopt, tensors, uncompiled
from .report.card import page
from .report.progress import Bars
from .runner import Report, Watcher, export, load_network
from .runner import run as run_configs
from .runner.card import measure
from .runner.evaluate import weights_path
from .runner.export import FORMATS
from .runner.integrity import enlist
from .talk import unheard
from .trackers import Log, chosen
from .training.weights import hash_weights, save_weights, whole


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        run: its row in the ledger.
        folder: its files: ``student.safetensors``, ``run.json``, ``predictions.npz``.
        remarks: what this call had to tell of the data and of what it used again, such as files left out and changes accepted. Unless
            ``progress=False``, stderr has them too.
        progress: whether this object's methods write such remarks to stderr.
    """

    run: Run
    folder: Path
    remarks: tuple[str, ...] = ()
    progress: bool = True

    @property
    def accuracy(self) -> float:
        """Percent of the test images that the student gets right in ``precision``, after the last epoch or the one the holdout chose.

        Raises:
            UserError: it is a backbone without a classifier, trained without labels.
        """
        if self.run.accuracy is None:
            kept_answers(self.run, Ledger(self.folder.parent))  # refuses it
        assert self.run.accuracy is not None
        return self.run.accuracy

    @property
    def metrics(self) -> Figures:
        """Figures on test: ``correct`` of ``images``, ``top5`` (a count), ``macro_f1`` and ``balanced_accuracy`` (percent).

        Raises:
            UserError: as ``answers``.
        """
        return self.answers.test.figures

    @property
    def answers(self) -> Kept:
        """What the student answered to the ``test`` images and, in a holdout run, to the held-out ones (``holdout``, else None).

        Each has ``figures``, ``by_class`` (its ``recall``, ``precision`` and ``f1`` are [K], in percent), ``confusions(10)`` and
        ``matrix()``.

        Raises:
            UserError: an older version recorded the run, or its ``predictions.npz`` is gone or damaged.
        """
        return kept_answers(self.run, Ledger(self.folder.parent))

    @property
    def precision(self) -> str:
        """The arithmetic of training, in which ``accuracy`` was measured too: ``bf16`` or ``fp32``.

        ``student()`` and ``module()`` compute in float32. There a student of ``bf16`` may get a few images more or fewer right.
        """
        return self.run.precision

    def student(self, *, accept_changes: bool = False, trust_code: bool = False) -> Network:
        """The trained network, in eval mode on the CPU. Called on images, it gives logits, embedding and maps.

        Raises:
            UserError: the student is a module that was given from Python in another process; give it again to the call that trained it.
                Or its file is not what the run wrote, or its code answers otherwise, and ``accept_changes`` is false. Or neither this
                program nor a training of yours named its code, and ``trust_code`` is false.
        """
        changes = self._changes(accept_changes)
        path, changed = weights_path(str(self.run.no), self.folder.parent, changes)
        with trust.code(trust_code):
            network, _ = load_network(path, changes)
        network.changed = network.changed or changed
        return network

    def module(self) -> nn.Module:
        """The trained network as a plain module, of the class that was given; one of this package is itself."""
        return self.student().release()

    def card(self, format: Literal["md", "html"] = "md", *, batch_size: int = 64, device: str = "auto") -> str:
        """The compression card, as ``flowdistill card`` prints it: cost, accuracy, agreement and calibration beside the teacher and a
        student alone. It measures when it is called. Of loaders it takes the images of ``val_loader``.

        Args:
            format: ``md`` or ``html``.
            batch_size: images of the second latency; the first is of one image.
            device: as of ``distill``.

        Raises:
            UserError: as ``student``.
        """
        if format not in ("md", "html"):
            raise UserError(f"card in {format!r}: choose from: md, html")
        _refuse_number("batch_size", batch_size, 1)
        ledger = Ledger(self.folder.parent, changes=self._changes(False))
        return page(measure(self.run.no, ledger, resolve_device(device), batch_size=batch_size), format)

    def export(self, to: str, *, out: str | os.PathLike[str] | None = None, int8: bool = False) -> Path:
        """Write the network as ``onnx``, ``torch-export`` or ``safetensors`` to ``out`` and return the file's path.

        Default of ``out``: beside the run's files. Its program takes images uint8 [N, H, W, C]; of a run on loaders it takes what they
        give, float32 [N, C, H, W].

        Raises:
            UserError: as ``student``; or a package is missing, or torch.export can't trace it.
        """
        if str(to) not in FORMATS:
            raise UserError(f"export to {to!r}: {did_you_mean(str(to), FORMATS)}{FORMATS.causes}")
        changes = self._changes(False)
        path, _ = weights_path(str(self.run.no), self.folder.parent, changes)
        file = Path(export(path, to, out=None if out is None else Path(out), int8=int8, changes=changes).file)
        enlist(self.run.no, Ledger(self.folder.parent), file)
        return file

    def _changes(self, accepted: bool) -> Changes:
        return Changes(accepted) if self.progress else Changes(accepted, unheard().say)


Data = str | Mapping[str, Any] | Iterable[Any]
"""Which images: a name, a table of keys, or a loader."""

Named = str | os.PathLike[str] | int | Result | nn.Module
"""How a network is named."""


def distill(
    teacher: Named | None,
    student: Named,
    data: Data,
    val_loader: Any = None,
    *,
    method: str = DISTILLING,
    seed: int = 0,
    runs: str | os.PathLike[str] = "runs",
    device: str = "auto",
    engine: str = "auto",
    workers: int | None = None,
    progress: bool = True,
    on_epoch: Callable[[Report], object] | None = None,
    log: str | Sequence[str] = (),
    classes: int | None = None,
    again: bool = False,
    accept_changes: bool = False,
    trust_code: bool = False,
    **config: Any,
) -> Result:
    """Train a student with a teacher, record the run, and return it.

    If a run of the same config has finished, it is returned at once. If one was cut off, it goes on from its checkpoint.

    Args:
        teacher: a model name (a trained one is then chosen from ``runs``), a run's number, a Result, a weights file, or any module
            that gives logits [N, K] for images [N, C, H, W]. A module is copied and stays as it is.
        student: the same. A name starts from fresh weights, anything else from the weights it has. Parameters that are frozen in a
            module (``requires_grad``) stay frozen. ``Result.module`` gives the trained module back.
        data: ``digits``, ``cifar10``, ``cifar100``, ``fashion_mnist``, ``npz:PATH``, ``folder:PATH``, ``csv:FILE`` or ``hf:NAME``; or
            a mapping such as ``{"name": "npz:PATH", "pad": 2, "flip": False, "unlabelled": "folder:PATH"}`` (``{"unlabelled":
            "folder:PATH"}`` alone has no labels, and trains a backbone); or a loader, which is
            anything that has a length and gives (images float [B, C, H, W], labels [B]). Both networks take its images as they come.
        val_loader: if ``data`` is a loader, a second one. Accuracy is measured on its images.
        method: a method or a composition such as ``at+kd``.
        seed: decides initial weights, order and augmentation. For a loader it decides what the loader draws from torch's generators.
        runs: folder of the ledger.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        engine: ``auto``, ``eager``, ``compiled`` or ``graph``. One that can't be had here falls back to another, and says so.
        workers: number of processes that decode images, if memory does not hold them all. Default: one per core, at most eight.
        progress: write bars and remarks to stderr. If false, nothing is written there, and ``Result.remarks`` has what must be known.
        on_epoch: called with a Report after every epoch that is trained. What it raises, such as KeyboardInterrupt, comes out of this
            call. The run is then interrupted, and the same call goes on from that epoch.
        log: ``tensorboard``, ``wandb`` or ``csv``, or several of them. They show in the run's folder what ``on_epoch`` gets, and at the end
            the card and the FSP matrices. One that fails is told and left out; the run goes on. Default: none.
        classes: number of classes of loaders. Default: as many as the data set has names for (``classes``), else the largest label + 1.
        again: train it even if a run of the same config has finished or was cut off.
        accept_changes: take a teacher, or first weights, even if the file, code or library is not what was recorded.
        trust_code: run code that a file names as its network, even if neither this program nor a training of yours named it.
        config: further keys of RunConfig as nested mappings (``train={"epochs": 30}, weights={"fsp": 10.0}, split="holdout"``);
            ``init_from`` takes what ``student`` takes, or a module whose weights fit a student that is given by name.

    Raises:
        UserError: an argument can't be used; one line says what to do.
        RuntimeError: the student diverged, or an answer of the teacher is not finite; the run is recorded as failed.
    """
    if on_epoch is not None and not callable(on_epoch):
        raise UserError(f"on_epoch={on_epoch!r}: give a function that takes a Report, or leave it out")
    _refuse_number("workers", workers, 0, MAX_WORKERS)
    names = chosen(log, "log") if log else ()
    watcher = (Bars if progress else Watcher)(on_epoch)
    ledger = Ledger(Path(runs), create=True, changes=Changes(accept_changes, watcher.say))
    first_weights = {"init_from": _first_weights(config["init_from"], student, ledger)} if config.get("init_from") is not None else {}
    parsed = validate(
        {
            **config,
            **first_weights,
            **_images(data, val_loader, classes, config.get("train", {})),
            "student": _reference(student, ledger),
            "teacher": None if teacher is None else _reference(teacher, ledger),
            "method": method,
            "seed": seed,
        }
    )
    on_device = resolve_device(device)
    if names:
        watcher.log = Log(names, ledger, on_device, watcher.say)
    trust.name(*parsed.networks)
    with (  # the modes that the caller has on must not change what is trained
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision(on_device),
        trust.code(trust_code),
    ):
        run = run_configs([parsed], ledger, on_device, again=again, engine=engine, workers=workers, watcher=watcher)[0]
        watcher.ended_before([run.no])
    if run.status != "finished":
        raise RuntimeError(f"run {run.no} {run.status}: {run.error}")
    return Result(run, ledger.run_folder(run.no), tuple(ledger.changes.lines), progress)


P = ParamSpec("P")


def _signature_of(call: Callable[Concatenate[None, P], Result]) -> Callable[[Callable[..., Result]], Callable[P, Result]]:
    """Show a function with the signature of ``call``, without the teacher and the method.

    ``help()`` and notebooks read ``__signature__``. Type checkers and most editors read the annotation, which can't leave out a keyword:
    they still offer ``method``.
    """

    def shown(function: Callable[..., Result]) -> Callable[P, Result]:
        whole = inspect.signature(call)
        parameters = [parameter for name, parameter in whole.parameters.items() if name not in ("teacher", "method")]
        function.__signature__ = whole.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return shown


@_signature_of(distill)  # type: ignore[arg-type]  # mypy fears a second ``teacher`` in ``**config``
def train(student: Named, data: Data, val_loader: Any = None, **keywords: Any) -> Result:
    """Train a network on the labels alone. It takes what ``distill`` takes, but for a teacher and a method."""
    return distill(None, student, data, val_loader, method=BASELINE, **keywords)


def _images(data: Data, val_loader: Any, classes: int | None, train: Any) -> dict[str, Any]:
    """The keys of a config that say which images. For loaders these are their name and the size of their batches."""
    for argument, images in (("data", data), ("val_loader", val_loader)):
        if all(hasattr(images, name) for name in ("__getitem__", "__len__")) and not hasattr(images, "__iter__"):
            raise UserError(f"{argument}: {type(images).__name__} gives images one by one, not batches; wrap it in a DataLoader")
    if not isinstance(data, str | Mapping) and not hasattr(data, "__iter__"):
        raise UserError(f"{type(data).__name__} is no data; give a name such as digits or folder:PATH, a table of keys, or a loader")
    if isinstance(data, str | Mapping):
        for name, value in (("val_loader", val_loader), ("classes", classes)):
            if value is not None:
                raise UserError(f"{name} belongs to a train_loader; {data} has its own, leave {name} out")
        return {"data": {"name": data} if isinstance(data, str) else data}
    if val_loader is None:
        raise UserError("a train_loader needs a val_loader, whose images accuracy is measured on; give it after the train_loader")
    _refuse_number("classes", classes, 2)
    loaders = user_loaders.adopt(data, val_loader, classes)
    if not isinstance(train, Mapping):
        return {"data": {"name": loaders.name}}
    if (size := train.get("batch_size", loaders.batch_size)) != loaders.batch_size:
        raise UserError(f"train.batch_size={size}: the loader's batches have {loaders.batch_size} images; leave batch_size out")
    return {"data": {"name": loaders.name}, "train": {**train, "batch_size": loaders.batch_size}}


def _refuse_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is neither None nor an integer in this range."""
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (integer and least <= value and (most is None or value <= most)):
        allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise UserError(f"{name}={value!r}: give an integer {allowed}, or leave it out")


def _reference(network: Named, ledger: Ledger) -> str:
    """A network as a config names it. A module in memory is saved beside the runs, so that its run can be repeated."""
    network = uncompiled(network)
    if isinstance(network, str | os.PathLike):
        return os.fspath(network)
    if isinstance(network, int):
        return str(network)
    if isinstance(network, Result):
        in_ledger = network.folder.parent.resolve() == ledger.folder.resolve()
        return str(network.run.no) if in_ledger else str(network.folder / STUDENT_FILE)
    if isinstance(network, type):
        raise UserError(f"{network.__name__} is a class, not a network; call it: {network.__name__}(...)")
    if not isinstance(network, nn.Module):
        raise UserError(f"{type(network).__name__} is no network; give a model's name, a run, a weights file or an nn.Module")
    weights = tensors(network, type(network).__name__)
    if isinstance(network, Network):
        return _saved(weights, network.spec.name, network.about, ledger)
    try:
        copied = deepcopy(network).cpu()
    except Exception as error:  # of its own code, or of tensors that are computed of others, as old weight norms are
        raise UserError(
            f"{type(network).__name__}: can't be copied ({first_line(error)}); give the function that makes it by name: FILE.py:FUNCTION"
        ) from None
    return _saved(weights, adopt(copied, contents(copied)[:8]), {}, ledger)


def _first_weights(network: Named, student: Named, ledger: Ledger) -> str:
    """``init_from`` as a config names it. If the student is given by name, a module's weights are saved as those of that model."""
    network = uncompiled(network)
    if isinstance(network, nn.Module) and not isinstance(network, Network) and isinstance(student, str):
        return f"{student}@{_saved(tensors(network, type(network).__name__), student, {}, ledger)}"
    return _reference(network, ledger)


def _saved(weights: Mapping[str, Tensor], model: str, about: Mapping[str, Any], ledger: Ledger) -> str:
    """Save these weights as those of the model, if that is not done yet, and return the file's path."""
    name = hashlib.sha256(f"{model}\n{hash_weights(weights)}".encode()).hexdigest()[:16]
    path = ledger.folder / "networks" / f"{name}.safetensors"
    if not path.is_file() or not whole(path):
        save_weights(path, weights, {**about, "model": model})
    return str(path)
