"""Which network is meant: a model name, a run's number, a weights file, or MODEL@FILE; and which teacher a student gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import models
from ..checks import UserError
from ..ledger import Ledger, Run, newest
from ..models import Network
from ..taps import DataSpec
from ..training.checkpoint import fill, hash_weights, load_weights

STUDENT_FILE = "student.safetensors"


@dataclass(frozen=True)
class NetworkRef:
    """A network that was named.

    Attributes:
        model: its registered name.
        weights: None for fresh ones.
        run: the run it came from, if any.
        fingerprint: what its numbers depend on. Of a file the hash of its weights; of a run that was named that run's, with its seed; of
            a teacher that was chosen by model name that of all it was chosen from; empty for fresh weights.
        init_hash: of the weights it began with, where known.
        origin: as messages name it.
    """

    model: str
    weights: dict[str, Tensor] | None = None
    run: int | None = None
    fingerprint: str = ""
    init_hash: str = ""
    origin: str = ""

    def build(self, data: DataSpec, *, taps: tuple[str, ...] = (), seed: int = 0) -> Network:
        """The network with its weights, or with fresh ones from the seed.

        Raises:
            UserError: the weights do not fit the model on this data.
        """
        net = models.build(self.model, data, taps=taps, seed=seed)
        if self.weights is not None:
            fill(net, self.weights, self.origin)
        return net


def resolve(reference: str, ledger: Ledger) -> NetworkRef:
    """What a reference means.

    Raises:
        UserError: no such model, run or file, an unfinished run, or a file that does not say its model.
    """
    if reference.isdecimal():
        run = ledger.run(int(reference))
        return _of_run(run, ledger, f"{run.fingerprint}/{run.seed}")
    model, at, path = reference.partition("@")
    if at:
        return _from_file(Path(path), models.canonical(model))
    if "/" in reference or Path(reference).suffix in (".safetensors", ".pt", ".pth"):
        return _from_file(Path(reference), None)
    return NetworkRef(models.canonical(reference))


def _from_file(path: Path, model: str | None) -> NetworkRef:
    weights, about = load_weights(path.expanduser())
    named = model or about.get("model")
    if not named:
        raise UserError(f"weights file {path} does not say its model; write MODEL@{path} with one of: {', '.join(models.MODELS)}")
    return NetworkRef(models.canonical(named), weights, None, f"file:{hash_weights(weights)}", about.get("init_hash", ""), str(path))


def _of_run(run: Run, ledger: Ledger, fingerprint: str) -> NetworkRef:
    if run.status != "finished":
        raise UserError(f"run {run.no} is {run.status}, not finished; choose a finished one (flowdistill runs)")
    weights, _ = load_weights(ledger.run_folder(run.no) / STUDENT_FILE)
    return NetworkRef(run.student, weights, run.no, fingerprint, run.init_hash, f"run {run.no}")


@dataclass(frozen=True)
class Wanted:
    """What the choice of a teacher looks at; test accuracy is not among it."""

    dataset: str
    data_hash: str
    split: str
    seed: int
    student_init: str


def choose_teacher(reference: str, wanted: Wanted, ledger: Ledger) -> NetworkRef:
    """The teacher of one student.

    A model name means the finished ``base`` runs of that model, data and split with the most epochs (of these, those of the newest
    one's fingerprint), in order of seed: m of them. The student of seed k takes number (k+1) mod m, or the next that did not begin
    from the student's own initial weights. Anything else names the teacher itself.

    Raises:
        UserError: none was trained, every one began where the student begins, or a full run is to teach a holdout run.
    """
    if reference.isdecimal() or "@" in reference or "/" in reference or "." in reference:
        return _named_teacher(reference, wanted, ledger)
    model = models.canonical(reference)
    found = _trained(model, wanted, ledger)
    if not found:
        cure = _train_command(model, wanted, 0)
        raise UserError(f"no {model} was trained on {wanted.dataset} ({wanted.split} split) yet; train one: {cure}")
    for offset in range(len(found)):
        run = found[(wanted.seed + 1 + offset) % len(found)]
        if run.init_hash != wanted.student_init:
            return _of_run(run, ledger, run.fingerprint)
    spare = wanted.seed + 1
    raise UserError(
        f"the only trained {model} (run {found[0].no}) began from the initial weights of the student of seed {wanted.seed}, which "
        f"flatters it; train another teacher: {_train_command(model, wanted, spare)}"
    )


def _named_teacher(reference: str, wanted: Wanted, ledger: Ledger) -> NetworkRef:
    teacher = resolve(reference, ledger)
    if teacher.init_hash and teacher.init_hash == wanted.student_init:
        raise UserError(
            f"teacher {reference} began from the initial weights of the student of seed {wanted.seed}, which flatters it; use another "
            f"--seeds or another teacher"
        )
    if teacher.run is not None and wanted.split == "holdout" and ledger.run(teacher.run).split != "holdout":
        raise UserError(
            f"run {teacher.run} was trained on all of train, the held-out images among them; teach a holdout run by a holdout run "
            f"({_train_command(teacher.model, wanted, 0)})"
        )
    return teacher


def _trained(model: str, wanted: Wanted, ledger: Ledger) -> list[Run]:
    runs = newest(ledger.runs(status="finished", method="base", student=model, data_hash=wanted.data_hash, split=wanted.split))
    if not runs:
        return []
    most = max(run.nepoch for run in runs)
    longest = [run for run in runs if run.nepoch == most]
    return sorted((run for run in longest if run.fingerprint == longest[-1].fingerprint), key=lambda run: run.seed)


def _train_command(model: str, wanted: Wanted, seed: int) -> str:
    holdout = " --holdout" if wanted.split == "holdout" else ""
    return f"flowdistill train --model {model} --dataset {wanted.dataset} --seeds {seed}{holdout}"
