"""Make a ledger again from the folders of its runs and from what can still be read of the old one, which is kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import UserError, first_line, pass_on_shortage
from ..config import SEAL
from ..lock import held
from . import folders
from .rows import DAMAGED, RUN, Epoch, Run, encoded, epoch_of, insert, run_of
from .schema import migrate
from .store import COMPANIONS, NAME, connect, snapshot

SINCE = {"resumed": 0}  # columns that older records lack, and whose value was not None


class Entered(NamedTuple):
    """What became of a run.

    Attributes:
        status: as the ledger has it now; ``left alone``: nothing says what the run was.
        source: where its row comes from.
        remark: what is missing, or why.
    """

    run: int
    status: str
    source: str
    remark: str = ""


@dataclass(frozen=True)
class _Known:
    """A run that can be entered."""

    run: Run
    curve: tuple[Epoch, ...]
    source: str
    remark: str = ""


def rebuild(folder: Path) -> tuple[list[Entered], Path | None]:
    """Make the ledger of a folder again.

    What a run's folder says wins over the old ledger, which is asked for runs whose folder says nothing and for curves that a folder lacks.

    Returns:
        What became of each run, and where the old ledger is kept; None if there was none.

    Raises:
        UserError: a process trains there, or there is nothing to make a ledger of, or a newer version made the old one.
        OSError: it can't be written.
    """
    path = folder / NAME
    numbers = folders.numbers(folder)
    for no in numbers:
        if held(folder / str(no) / folders.LOCK_FILE):
            raise UserError(
                f"run {no} in {folder} is being trained by another process; wait for it, or stop it, and give the command again"
            )
    old, unread = _old(path, numbers)
    merged = [_merged(folder, no, old.get(no), unread) for no in sorted({*old, *folders.runs_in(folder)})]
    known = [entry for entry in merged if isinstance(entry, _Known)]
    if not known:
        raise UserError(f"no folder in {folder} says what its run was; there is nothing to make a ledger of")
    kept = _put(path, known)
    entered = [
        entry if isinstance(entry, Entered) else Entered(entry.run.no, entry.run.status, entry.source, entry.remark) for entry in merged
    ]
    return entered, kept


def _merged(folder: Path, no: int, old: _Known | None, unread: str) -> _Known | Entered:
    """What is known of a run: by its folder, or else by the old ledger."""
    try:
        in_folder = _of_folder(folder / str(no), no)
    except (OSError, ValueError) as error:
        pass_on_shortage(error)
        why = getattr(error, "strerror", None) or first_line(error)
        if old is None:
            return Entered(no, "left alone", "", f"{why}{'; the old ledger: ' + unread if unread else ''}")
        return replace(old, remark=f"{why}")
    if old is None:
        return in_folder
    if _identity(old.run) != _identity(in_folder.run):
        return replace(in_folder, remark="; ".join(filter(None, [in_folder.remark, "the old ledger had another run under this number"])))
    if not in_folder.curve and old.curve:
        return replace(in_folder, curve=old.curve, remark="its curve is the old ledger's")
    return in_folder


def _identity(run: Run) -> tuple[str, int, str]:
    return run.fingerprint, run.seed, run.started


def _of_folder(folder: Path, no: int) -> _Known:
    """What a run's folder says of it. If the run was taken up again after it had finished, its journal is newer than its record.

    Raises:
        OSError: it can't be read.
        ValueError: it does not say what the run was; the message says why.
    """
    journal = folders.read_journal(folder)
    remarks = [f"{journal.unread} lines of {folders.JOURNAL} can't be read"] * bool(journal.unread)
    curve = tuple(_epochs(journal.curve.values(), remarks))
    why, begun = f"there is no {folders.RECORD} and no {folders.JOURNAL} that says what it was", None
    if journal.row:
        begun = run_of(encoded(_complete(journal.row)))
        why = begun.error if begun.status == DAMAGED else _misplaced(begun, no, folders.JOURNAL)
        begun = None if why else begun
    if (folder / folders.RECORD).is_file():
        done, fault = _recorded(folder / folders.RECORD)
        why = _misplaced(done, no, folders.RECORD) if done else fault
        if done and not why and (begun is None or begun.resumed <= done.resumed):
            if not journal.row:
                remarks.append(f"no curve: an older version wrote it, without {folders.JOURNAL}")
            return _Known(done, curve, folders.RECORD, "; ".join(remarks))
    if begun is None:
        raise ValueError(why)
    if len(curve) != max((epoch.epoch for epoch in curve), default=0):
        remarks.append("epochs are missing")
    return _Known(begun, curve, folders.JOURNAL, "; ".join(remarks))


def _recorded(path: Path) -> tuple[Run | None, str]:
    """The finished run of a ``run.json``, or why the file can't be believed."""
    record = folders.sealed(path)
    if record is None:
        return None, f"{path.name} is not what was written"
    content = path.read_bytes()
    hashed = hashlib.sha256(content).hexdigest() if SEAL in record else None
    run = run_of(encoded(_complete(record) | {"record_hash": hashed}))
    return (None, f"{path.name}: {run.error}") if run.status == DAMAGED else (run, "")


def _misplaced(run: Run, no: int, name: str) -> str:
    return "" if run.no == no else f"its {name} is of run {run.no}"


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row with every column. One without a value gets that of ``SINCE``, else None."""
    return {name: values.get(name, SINCE.get(name)) for name in RUN}


def _epochs(rows: Iterable[Mapping[str, Any]], remarks: list[str]) -> Iterator[Epoch]:
    for row in rows:
        try:
            yield epoch_of(encoded({name: row.get(name) for name in Epoch.__dataclass_fields__}))
        except ValueError as error:
            remarks.append(f"an epoch is left out ({error})")


def _old(path: Path, numbers: Iterable[int]) -> tuple[dict[int, _Known], str]:
    """The runs that can be read from the old ledger, by number, and why not all. A file that holds more than a ledger is not read.

    Raises:
        UserError: a newer version made it.
    """
    if not path.is_file() or not path.stat().st_size:
        return {}, ""
    try:
        db = snapshot(path)
    except (sqlite3.Error, OSError) as error:
        pass_on_shortage(error)
        return {}, str(error)
    with closing(db):
        recorded, why = _numbers(db)
        return {no: known for no in sorted({*numbers, *recorded}) if (known := _of_old(db, no))}, why


def _numbers(db: sqlite3.Connection) -> tuple[list[int], str]:
    numbers = []
    try:
        for (no,) in db.execute("SELECT no FROM runs"):
            numbers.append(no)
    except sqlite3.Error as error:
        return numbers, str(error)
    return numbers, ""


def _of_old(db: sqlite3.Connection, no: int) -> _Known | None:
    try:
        row = db.execute("SELECT * FROM runs WHERE no = ?", (no,)).fetchone()
        if row is None or (run := run_of(row)).status == DAMAGED:
            return None
    except sqlite3.Error:
        return None
    curve: list[Epoch] = []
    with contextlib.suppress(sqlite3.Error, ValueError):
        curve += map(epoch_of, db.execute("SELECT * FROM epochs WHERE run = ? ORDER BY epoch", (no,)))
    return _Known(run, tuple(curve), "the old ledger")


def _put(path: Path, known: Iterable[_Known]) -> Path | None:
    """Write the new ledger whole, then put it in place of the old one. Returns where that is kept; None if there was none."""
    draft = path.with_name(f".{NAME}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        with closing(connect(draft)) as db:
            db.execute("BEGIN")
            migrate(db)
            for entry in known:
                db.execute(*insert("runs", vars(entry.run)))
                for epoch in entry.curve:
                    db.execute(*insert("epochs", {"run": entry.run.no, **vars(epoch)}))
            db.execute("COMMIT")
        kept = _kept(path)
        for end in (*COMPANIONS[1:], COMPANIONS[0]):
            if kept and os.path.lexists(f"{path}{end}"):
                Path(f"{path}{end}").rename(f"{kept}{end}")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return kept


def _kept(path: Path) -> Path | None:
    """A free name for the old ledger; None if there is no ledger to keep."""
    if not any(os.path.lexists(f"{path}{end}") for end in COMPANIONS):
        return None
    names = (path.with_name(f"{NAME}.old{f'-{again}' if again else ''}") for again in range(1_000_000))
    return next(name for name in names if not any(os.path.lexists(f"{name}{end}") for end in COMPANIONS))
