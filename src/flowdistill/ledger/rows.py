"""The rows of both tables: how they are written and read, and what is wrong with a damaged one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..config import NO_LABELS

STATUSES = ("running", "finished", "failed", "interrupted")  # as they are recorded
DEAD, DAMAGED = "dead", "damaged"  # as they are read: running by nobody; a row that does not say what a row must


@dataclass(frozen=True)
class Run:
    """A row of the ledger. ``schema.py`` explains its columns."""

    no: int
    status: str
    error: str
    method: str
    variant: str
    dataset: str
    data_hash: str
    student: str
    student_fingerprint: str
    teacher: str
    teacher_run: int | None
    teacher_fingerprint: str
    teacher_accuracy: float | None
    seed: int
    split: str
    fingerprint: str
    config: dict[str, Any]
    nepoch: int
    lr: float
    batch_size: int
    precision: str
    device: str
    engine: str
    deterministic: int
    cohort_size: int
    init_hash: str
    parameters: int
    versions: dict[str, str]
    started: str
    finished: str | None
    epoch: int | None
    correct: int | None
    images: int | None
    best_epoch: int | None
    best_correct: int | None
    setup_seconds: float | None
    train_seconds: float | None
    eval_seconds: float | None
    images_per_second: float | None
    peak_memory: int | None
    weights_hash: str | None
    cohort: int | None
    threads: int | None
    resumed: int
    networks: dict[str, Any] | None
    record_hash: str | None
    top5: int | None
    macro_f1: float | None
    balanced_accuracy: float | None

    @property
    def accuracy(self) -> float | None:
        """Percent of the test images that the shipped weights get right."""
        return None if self.correct is None or not self.images else 100 * self.correct / self.images

    @property
    def backbone(self) -> bool:
        """Whether it finished without a label: it left a network without a classifier, which has no accuracy."""
        return self.status == "finished" and self.config.get("data", {}).get("name") == NO_LABELS

    @property
    def top5_accuracy(self) -> float | None:
        """Percent of the test images whose class is among the five most probable."""
        return None if self.top5 is None or not self.images else 100 * self.top5 / self.images

    @property
    def home(self) -> int:
        """The run in whose folder its cohort's lock and checkpoint lie."""
        return self.cohort or self.no

    @property
    def cut_off(self) -> bool:
        """Whether it was stopped from outside, and can be taken up again."""
        return self.status in (DEAD, "interrupted")


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run."""

    epoch: int
    phase: str
    lr: float
    terms: dict[str, float]
    correct: int | None
    images: int
    seconds: float


JSON_OBJECT = "dict"
STORED: Mapping[str, tuple[str, tuple[type, ...], str]] = {
    "int": ("'integer'", (int,), "a whole number"),
    "float": ("'real', 'integer'", (float, int), "a number"),
    "str": ("'text'", (str,), "text"),
    JSON_OBJECT: ("'text'", (str,), "a JSON object"),
}
"""Annotation -> how its value is stored: SQLite's types, Python's types, and in words."""
_NETWORK = {"key": str, "number": int, "answers": dict}  # what of a network later runs are held against


def _kinds(row: type) -> dict[str, tuple[str, bool]]:
    """Column -> (what it holds, whether it may be NULL), read from its annotation."""
    return {field.name: (str(field.type).split("[")[0].split(" ")[0], "None" in str(field.type)) for field in fields(row)}


RUN, EPOCH = _kinds(Run), _kinds(Epoch)
COLUMNS = tuple(RUN)


def sound_sql() -> str:
    """An SQL expression that is true for sound rows of ``runs``, and for the few that are damaged deep inside a network's answers. If it
    is not true, the row is read whole, and Python decides.
    """
    inside = {"config": " AND json_type(config, '$.train') = 'object'"}
    inside["networks"] = " AND coalesce(json_type(networks, '$.student'), 'object') = 'object'"
    tests = [f"status IN ({', '.join(map(repr, STATUSES))})"]
    for name, (kind, null) in RUN.items():
        test = f"typeof({name}) IN ({STORED[kind][0]})"
        if kind == JSON_OBJECT:  # within CASE, since what is no JSON must not be looked into
            test += f" AND CASE WHEN json_valid({name}) THEN json_type({name}) = 'object'{inside.get(name, '')} END"
        tests.append(f"({name} IS NULL OR {test})" if null else test)
    return " AND ".join(tests)


def run_of(row: Mapping[str, Any] | sqlite3.Row) -> Run:
    """A run from its row. A damaged row gives the status ``damaged``, an error that says how, and None for unreadable columns."""
    values, wrong = _decoded(row, RUN)
    if not wrong:
        wrong = _wrong_inside(values)
    if wrong:
        values |= {"status": DAMAGED, "error": wrong}
    return Run(**values)


def epoch_of(row: Mapping[str, Any] | sqlite3.Row) -> Epoch:
    """An epoch from its row.

    Raises:
        ValueError: it is damaged; the message says how.
    """
    values, wrong = _decoded(row, EPOCH)
    if not wrong and not all(isinstance(mean, int | float) for mean in values["terms"].values()):
        wrong = "terms: one is no number"
    if wrong:
        raise ValueError(wrong)
    return Epoch(**values)


def _decoded(row: Mapping[str, Any] | sqlite3.Row, kinds: Mapping[str, tuple[str, bool]]) -> tuple[dict[str, Any], str]:
    values: dict[str, Any] = {}
    wrong = ""
    for name, (kind, null) in kinds.items():
        try:
            values[name] = _value(row[name], kind, null)
        except ValueError as error:
            values[name] = None
            wrong = wrong or f"{name}: {error}"
    return values, wrong


def _value(value: Any, kind: str, null: bool) -> Any:
    """What a cell holds.

    Raises:
        ValueError: it is not what the column is for.
    """
    if value is None and null:
        return None
    _, types, words = STORED[kind]
    if type(value) not in types:
        raise ValueError(f"{'nothing' if value is None else repr(value)[:40]} is not {words}")
    if kind == "str" and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{value[:40]!r} is not text")
    if kind != JSON_OBJECT:
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"{value[:40]!r} is not {words}")
    return parsed


def _wrong_inside(values: Mapping[str, Any]) -> str:
    if values["status"] not in STATUSES:
        return f"status: {values['status'][:40]!r} is none"
    if not isinstance(values["config"].get("train"), dict):
        return "config: it has no table 'train'"
    for role, network in (values["networks"] or {}).items():
        if not isinstance(network, dict) or not all(isinstance(network.get(key), kind) for key, kind in _NETWORK.items()):
            return f"networks: {role[:40]!r} is no network"
    return ""


class Brief(Run):
    """A run of a long list: it holds what lists and tables show, and reads the rest from the ledger when somebody asks for it."""

    def __init__(self, row: sqlite3.Row, whole: Callable[[int], Run]) -> None:
        self.__dict__.update(zip(BRIEF, row, strict=False), _whole=whole)

    def __getattr__(self, name: str) -> Any:
        if name not in COLUMNS:
            raise AttributeError(name)
        for column, value in vars(self._whole(self.no)).items():
            self.__dict__.setdefault(column, value)
        return self.__dict__[name]


BRIEF = (
    *("no", "status", "error", "method", "variant", "dataset", "student", "teacher", "teacher_run", "seed", "split", "fingerprint"),
    *("nepoch", "lr", "batch_size", "precision", "started", "epoch", "correct", "images", "best_epoch", "best_correct", "cohort"),
    *("top5", "macro_f1", "balanced_accuracy"),
)
"""The columns that lists and tables show of every run."""


def encoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as SQLite takes them. JSON keeps a name that is not UTF-8 as it is, so that its file is found again; a column has escapes."""
    cells = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: stored(value) if isinstance(value, str) else value for key, value in cells.items()}


def stored(name: str) -> str:
    """A name as a column has it: bytes that are not UTF-8 become escapes."""
    return name.encode(errors="backslashreplace").decode()


def insert(table: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An INSERT statement and its values."""
    names = ", ".join(values)
    return f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in values)})", encoded(values)
