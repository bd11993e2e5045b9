"""A run's folder: it holds all that the ledger says of the run, so that a ledger that is lost can be made again from the folders.

A run that began has a journal: its row, then a line for every epoch and every change. A finished one has its row in ``run.json`` too, which
lists its files, the journal among them.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import pass_on_shortage, told_by_path
from ..config import SEAL, record_seal

if TYPE_CHECKING:
    from .rows import Run

STUDENT_FILE, RECORD, PREDICTIONS = "student.safetensors", "run.json", "predictions.npz"
PROBE_FILE = "probe.safetensors"  # the classifier that was fitted on the teacher's features, where one was
JOURNAL, EXPORTS, LOCK_FILE = "journal.jsonl", "exports.json", ".lock"
_TRACES = re.compile(r"student\.safetensors|run\.json|predictions\.npz|journal\.jsonl|checkpoint.*\.safetensors")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


def own_files(run: Run) -> tuple[str, ...]:
    """What a finished run has in its folder; what is exported comes beside it. A backbone has no answers to keep."""
    return (STUDENT_FILE, *([] if run.backbone else [PREDICTIONS]), RECORD)


def numbers(folder: Path) -> list[int]:
    """The numbers that entries of a folder of runs have for names, in order. An entry may be anything, not only a run's folder."""
    try:
        return sorted(int(entry.name) for entry in os.scandir(folder) if _NUMBER.fullmatch(entry.name))
    except OSError as error:
        pass_on_shortage(error)
        return []


def runs_in(folder: Path) -> Iterator[int]:
    """The numbers of the folders in which a run left something, in order."""
    for no in numbers(folder):
        try:
            if any(_TRACES.fullmatch(name) for name in os.listdir(folder / str(no))):
                yield no
        except OSError as error:  # a file of that name, or a folder that may not be read
            pass_on_shortage(error)
            continue


def sealed(path: Path) -> dict[str, Any] | None:
    """The contents of a file that its writer sealed; None if it is not what was written. One of version 0.1.0 needs no seal.

    Raises:
        OSError: it can't be read.
    """
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or ({SEAL, "files"} & record.keys() and record.get(SEAL) != record_seal(record)):
        return None
    return record


def sealing(record: Mapping[str, Any]) -> bytes:
    """The bytes of a file that ``sealed`` reads back."""
    values = {key: value for key, value in record.items() if key != SEAL}
    return (json.dumps(values | {SEAL: record_seal(values)}, indent=2) + "\n").encode()


def files_of(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """File name -> what a record says of it. The files lie beside the record."""
    files = (record or {}).get("files")
    return {name: known for name, known in files.items() if Path(name).name == name} if isinstance(files, dict) else {}


@dataclass
class Journal:
    """What a journal says: the row with its later changes, the curve by epoch, and how many lines could not be read."""

    row: dict[str, Any] = field(default_factory=dict)
    curve: dict[int, dict[str, Any]] = field(default_factory=dict)
    unread: int = 0


def note(folder: Path, **entry: Any) -> None:
    """Add a line to a run's journal. The line break comes first: it also ends a line that a full disk cut off.

    Raises:
        OSError: it can't be written.
    """
    with told_by_path(folder / JOURNAL), open(folder / JOURNAL, "ab") as file:
        file.write(journal([entry]))


def journal(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """The lines of a journal with these entries."""
    lines = []
    for text in map(json.dumps, entries):
        lines.append(f"\n{zlib.crc32(text.encode()):08x} {text}")
    return "".join(lines).encode()


def read_journal(folder: Path) -> Journal:
    """A run's journal; an empty one if there is none or nothing of it can be read."""
    journal = Journal()
    try:
        lines = (folder / JOURNAL).read_bytes().split(b"\n")
    except OSError as error:
        pass_on_shortage(error)
        return journal
    for line in filter(None, lines):
        match _entry(line):
            case {"epoch": {"epoch": int(number)} as epoch}:
                journal.curve[number] = epoch
            case {"reopened": int(done)}:
                journal.curve = {number: epoch for number, epoch in journal.curve.items() if number <= done}
            case {"row": dict(values)}:
                journal.row |= values
            case _:
                journal.unread += 1
    return journal


def _entry(line: bytes) -> Any:
    """The entry in a line; None if it is not what was written."""
    checksum, _, text = line.partition(b" ")
    try:
        return json.loads(text) if checksum == f"{zlib.crc32(text):08x}".encode() else None
    except (ValueError, RecursionError):
        return None
