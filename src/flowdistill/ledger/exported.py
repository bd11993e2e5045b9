"""A ledger's results in one text file that is kept beside tables: rows and curves, no weights.

The first line says what the file is and holds the SHA-256 of all lines after it. Each line after it is a run that finished or failed: its
row, its curve, and what its record says of the student's file. The answers of its networks are left out, since they are many numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import advice
from ..checks import UserError, regular_file, short
from . import folders
from .compare import flattened
from .rows import DAMAGED, RUN, Epoch, Run, encoded, epoch_of, run_of
from .store import Ledger

KIND, VERSION = "ledger-export", 1
RESULTS = ("finished", "failed")
ROUNDING = 1e-6  # of sums of seconds, relative


@dataclass(frozen=True)
class Export:
    """The contents of such a file. Tables read it as they read a ``Folder``."""

    path: Path
    runs: Sequence[Run]
    curves: Mapping[int, Sequence[Epoch]]
    records: Mapping[int, Mapping[str, Any]]

    def listing(self) -> list[Run]:
        """Every run, by number."""
        return list(self.runs)

    def curve(self, run: Run) -> Sequence[Epoch]:
        """A run's epochs, in order."""
        return self.curves[run.no]

    def about(self, run: Run) -> Mapping[str, Any]:
        """What a run's record says of its student's file; empty if it says nothing."""
        return self.records[run.no]


@dataclass(frozen=True)
class Folder:
    """The ledger of a folder of runs."""

    ledger: Ledger

    def listing(self) -> list[Run]:
        """Every run, by number."""
        return self.ledger.listing()

    def curve(self, run: Run) -> Sequence[Epoch]:
        """A run's epochs, in order."""
        return self.ledger.epochs(run.no)

    def about(self, run: Run) -> Mapping[str, Any]:
        """What a run's record says of its student's file; empty if it says nothing, is gone, or is not what was written."""
        try:
            record = folders.sealed(self.ledger.run_folder(run.no) / folders.RECORD)
        except FileNotFoundError:
            return {}
        about = (record or {}).get("about")
        return about if isinstance(about, dict) else {}


def opened(path: Path) -> Folder | Export:
    """Open what tables read: the ledger of a folder, or a file that ``exported`` gave.

    Raises:
        UserError: it is neither.
    """
    return read(path) if path.is_file() else Folder(Ledger(path))


def exported(ledger: Ledger) -> bytes:
    """The bytes of a file with a ledger's results. The same ledger always gives the same bytes.

    Raises:
        UserError: a row or a curve is damaged.
    """
    lines = [_line(entry) for entry in results(ledger)]
    head = {"kind": KIND, "version": VERSION, "sha256": _hash(lines)}
    return "".join(f"{line}\n" for line in [_line(head), *lines]).encode()


def results(ledger: Ledger) -> list[dict[str, Any]]:
    """One entry for each run that finished or failed: its row, its curve, and what its record says of the student's file.

    Raises:
        UserError: a row or a curve is damaged.
    """
    folder, entries = Folder(ledger), []
    for listed in ledger.listing():
        if listed.status in (*RESULTS, DAMAGED):
            run = ledger.run(listed.no)  # refuses a damaged one
            networks = {role: {**network, "answers": {}} for role, network in (run.networks or {}).items()}
            row = {name: getattr(run, name) for name in RUN} | {"networks": networks if run.networks is not None else None}
            about = {key: value for key, value in folder.about(run).items() if key in ("processor", "input")}
            entries.append({"run": row, "about": about, "curve": [asdict(epoch) for epoch in ledger.epochs(run.no)]})
    return entries


def read(path: Path) -> Export:
    """Read a file that ``exported`` gave.

    Raises:
        UserError: it is no such file, it was changed since, or its figures contradict each other.
    """
    lines = _lines(path)
    runs, curves, records = [], {}, {}
    for line in lines:
        try:
            values = json.loads(line)
            run = run_of(encoded({name: values["run"].get(name) for name in RUN}))
            curve = [epoch_of(encoded(epoch)) for epoch in values["curve"]]
            records[run.no] = dict(values["about"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: a line of it is no run; {_cure(path)}") from None
        if why := run.error if run.status == DAMAGED else _contradiction(run, curve):
            raise UserError(f"{path}: run {run.no}: {why}; {_cure(path)}")
        runs.append(run)
        curves[run.no] = curve
    return Export(path, runs, curves, records)


def _lines(path: Path) -> list[str]:
    """The lines after the first, as they were written."""
    text = regular_file(path, str(path)).read_text(encoding="utf-8", errors="replace")
    first, *lines = text.split("\n")[:-1] or [text]
    try:
        head = json.loads(first)
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict) or head.get("kind") != KIND:
        raise UserError(f"{path} is no ledger's export; name a folder of runs, or a file that {_written(path)} wrote")
    if head.get("version") != VERSION:
        raise UserError(f"{path} was written by a newer flowdistill; upgrade this one")
    if head.get("sha256") != _hash(lines) or not text.endswith("\n"):
        raise UserError(f"{path} is not what was written: its lines do not fit their SHA-256; {_cure(path)}")
    return lines


def _contradiction(run: Run, curve: Sequence[Epoch]) -> str:
    """How a row and its curve contradict each other; empty if they agree. A run of an old ledger may have no curve."""
    if run.status not in RESULTS:
        return f"status {run.status!r} is none of {', '.join(RESULTS)}"
    if not curve or run.status != "finished":
        return ""
    early = run.config["train"].get("patience") is not None and len(curve) < run.nepoch
    if [epoch.epoch for epoch in curve] != list(range(1, (len(curve) if early else run.nepoch) + 1)):
        return f"its curve has {len(curve)} epochs, its row {run.nepoch}"
    if run.split == "full":
        correct_after = {epoch.epoch: epoch.correct for epoch in curve}
        for epoch, correct in ((run.epoch, run.correct), (run.best_epoch, run.best_correct)):
            if epoch is not None and correct_after.get(epoch) != correct:
                return f"{correct:,} right after epoch {epoch} in its row, {correct_after.get(epoch)} in its curve"
    curve_seconds, row_seconds = sum(epoch.seconds for epoch in curve), (run.train_seconds or 0.0) + (run.eval_seconds or 0.0)
    if not curve_seconds / run.cohort_size * (1 - ROUNDING) <= row_seconds <= curve_seconds * (1 + ROUNDING):
        return f"{row_seconds:.1f} s in its row, {curve_seconds:.1f} s of {run.cohort_size} students in its curve"
    return ""


def refuse_other(path: Path, ledger: Ledger) -> None:
    """Refuse a file that differs from what a ledger gives now.

    Raises:
        UserError: it differs; the message names the first run that does, and how. Also as ``read``.
    """
    read(path)
    in_file, in_ledger = ({entry["run"]["no"]: entry for entry in entries} for entries in (map(json.loads, _lines(path)), results(ledger)))
    for no in sorted({*in_file, *in_ledger}):
        if why := _difference(in_file.get(no), in_ledger.get(no)):
            raise UserError(f"{path} does not fit {ledger.path}: run {no}{why}; {_cure(path)}")


def _difference(in_file: Mapping[str, Any] | None, in_ledger: Mapping[str, Any] | None) -> str:
    """How a run in a file differs from the one in the ledger, as the end of a phrase; empty if they are equal."""
    if in_file is None or in_ledger is None:
        return f" is in {'the ledger' if in_file is None else 'the file'} alone"
    file_values, ledger_values = _flat(in_file), _flat(in_ledger)
    for key in sorted({*file_values, *ledger_values}):
        values = [_line(side.get(key)) for side in (file_values, ledger_values)]
        if values[0] != values[1]:
            return ": {key} is {} in the file, {} in the ledger".format(*map(short, values), key=key)
    return ""


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    epochs = {f"epoch {epoch['epoch']}": epoch for epoch in entry["curve"]}
    return flattened(entry["run"]) | flattened(entry["about"], "about.") | flattened(epochs)


def _cure(path: Path) -> str:
    return f"write it again with {_written(path)}"


def _written(path: Path) -> str:
    return advice.command("ledger", "export", path)


def _line(value: Any) -> str:
    """A value as Python's JSON, which writes a term that was not finite as NaN or Infinity."""
    return json.dumps(value, sort_keys=True)


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
