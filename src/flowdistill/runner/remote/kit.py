"""What travels between the driver and a worker: a cohort to train, words about it while it trains, and what came of it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Kit:
    """A cohort, as a worker needs it. Its data and the runs that it learns from come beside it, because cohorts share them.

    Attributes:
        number: of the cohort in this command, from 1.
        name: of its states in the storage; the same for the same runs.
        title: as messages name it.
        configs: of its runs, with every default filled in.
        keys: fingerprint and seed of each of them, as the driver planned them.
        storage: the folder of all states.
        engine, deterministic, decoders: as ``run`` takes them.
        device: ``cpu`` or ``cuda``.
        threads: of an operation on a CPU.
        trusted: names of networks that are code and that the driver's command line gave.
        trusts_all: whether it trusts all code.
        accepts_changes: as ``Changes`` has it.
    """

    number: int
    name: str
    title: str
    configs: Sequence[Values]
    keys: Sequence[tuple[str, int]]
    storage: str
    engine: str
    deterministic: bool
    decoders: int | None
    device: str
    threads: int
    trusted: frozenset[str]
    trusts_all: bool
    accepts_changes: bool | None


@dataclass(frozen=True)
class Began:
    """A cohort began, or goes on: its runs' rows and curves as the worker has them, by the worker's numbers."""

    rows: Mapping[int, Values]
    curves: Mapping[int, Sequence[Values]]
    remark: str = ""


@dataclass(frozen=True)
class Epochs:
    """An epoch of each run, by the worker's numbers."""

    epochs: Mapping[int, Values]


@dataclass(frozen=True)
class Changed:
    """Columns of a run that changed."""

    run: int
    values: Values


@dataclass(frozen=True)
class Said:
    """A line for the user.

    Attributes:
        early: whether it was said before training began, as it would be for each cohort of its kind.
    """

    line: str
    early: bool


@dataclass(frozen=True)
class Alive:
    """The worker lives."""


@dataclass(frozen=True)
class Word:
    """Something that a worker tells of a cohort.

    Attributes:
        cohort: the number of its kit.
        attempt: a name of this attempt at it; an earlier one's words do not count any more.
        node: the machine.
    """

    cohort: int
    attempt: str
    node: str
    told: Began | Epochs | Changed | Said | Alive


@dataclass(frozen=True)
class Finished:
    """A run as it ended: its row and curve, and its files with its record."""

    row: Values
    curve: Sequence[Values]
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Result:
    """What came of a cohort.

    Attributes:
        attempt: as of ``Word``.
        runs: by the worker's numbers.
        refused: why nothing was trained, in one line; empty if it was.
    """

    attempt: str
    node: str
    runs: Mapping[int, Finished] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Measured:
    """What a cohort takes of a machine, by a few steps of it.

    Attributes:
        memory: bytes of the process.
        device_share: of a GPU's memory, 0 on a CPU.
        seconds: of an epoch.
    """

    memory: int
    device_share: float
    seconds: float


def packed(root: Path, paths: Iterable[Path]) -> bytes:
    """Files below a folder as one archive, each with a checksum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in paths:
            archive.write(path, path.relative_to(root))
    return buffer.getvalue()


def unpack(archive: bytes, root: Path) -> None:
    """Put the files of an archive below a folder, all or none. Only what ``packed`` makes is taken: plain files with names of two parts
    at most.

    Raises:
        ValueError: it is another archive, or damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            contents = {name: opened.read(name) for name in opened.namelist()}  # checks their checksums
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    for name in contents:
        if Path(name).is_absolute() or ".." in Path(name).parts or len(Path(name).parts) > 2:
            raise ValueError(f"a file in it is named {name!r}")
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
