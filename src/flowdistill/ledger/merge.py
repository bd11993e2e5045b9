"""Several ledgers become one: runs with their folders, under new numbers if theirs are taken."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .. import advice
from ..checks import UserError
from ..config import NETWORKS, SEAL, each_network
from ..lock import Lock, held
from . import folders, shard_plan
from .rows import DAMAGED, DEAD, RUN, Epoch, Run
from .store import Ledger

DRAFTS = ".merge-"  # beginning of the name of a folder in which a merge prepares runs
ORIGIN = "origin"  # key of a run's versions: the ledger and the number that it had there
Key = tuple[str, int]


class Merged(NamedTuple):
    """What became of a run.

    Attributes:
        run: its number in the ledger that it came from.
        into: the number of this run, or of its equal, in the ledger that it went to. None: it was left out.
        copied: whether it was not there before.
        remark: why it was not copied, or what it took the place of.
    """

    source: str
    run: int
    into: int | None
    copied: bool
    remark: str


@dataclass(frozen=True)
class _Entry:
    """A run of one of the ledgers, with its curve."""

    ledger: Ledger
    run: Run
    curve: tuple[Epoch, ...]

    @property
    def key(self) -> Key:
        """Two runs with one key should give one and the same student."""
        return self.run.fingerprint, self.run.seed

    @property
    def finished(self) -> bool:
        return self.run.status == "finished"

    @property
    def name(self) -> str:
        """As messages name it."""
        return f"run {self.run.no} in {self.ledger.folder}"

    def is_same_run(self, other: _Entry) -> bool:
        """Whether both are records of one training, perhaps at different epochs of it."""
        return self.key == other.key and self.run.started == other.run.started

    def result(self) -> list[Any]:
        """The numbers that it gave, without times."""
        columns = ("status", "epoch", "correct", "images", "best_epoch", "best_correct", "weights_hash")
        return [*(getattr(self.run, column) for column in columns), *map(_without_time, self.curve)]

    def goes_on(self, other: _Entry) -> bool:
        """Whether this curve begins with the other one."""
        return [*map(_without_time, self.curve[: len(other.curve)])] == [*map(_without_time, other.curve)]


def _without_time(epoch: Epoch) -> dict[str, Any]:
    return {name: value for name, value in vars(epoch).items() if name != "seconds"}


@dataclass
class _Plan:
    """What a merge will do, before it does it.

    Attributes:
        there: the runs of the target, and those that will be there.
        numbers: number of each run of a source in the target, by source.
        taken: new number -> the run that gets it.
        replaced: numbers whose run goes on in a source and gives way.
        last: the largest number of the target at first.
        highest: the largest number so far.
    """

    there: dict[int, _Entry]
    last: int
    highest: int
    numbers: dict[Ledger, dict[int, int]] = field(default_factory=dict)
    taken: dict[int, _Entry] = field(default_factory=dict)
    replaced: set[int] = field(default_factory=set)
    merged: list[Merged] = field(default_factory=list)

    @cached_property
    def homes(self) -> dict[tuple[Ledger, int], int]:
        """(source, first run of a cohort there) -> that of the cohort here: the same run, or if it was not taken the smallest number."""
        homes: dict[tuple[Ledger, int], int] = {}
        for no, entry in sorted(self.taken.items()):
            key = entry.ledger, entry.run.home
            if key not in homes or entry.run.no == entry.run.home:
                homes[key] = no
        return homes

    def take(self, entry: _Entry, no: int, remark: str = "") -> None:
        """Copy a run, under this number."""
        self.taken[no] = self.there[no] = entry
        self.highest = max(self.highest, no)
        self.note(entry, no, remark, copied=True)

    def note(self, entry: _Entry, no: int | None, remark: str, *, copied: bool = False) -> None:
        """Say what becomes of a run."""
        if no is not None:
            self.numbers.setdefault(entry.ledger, {})[entry.run.no] = no
        self.merged.append(Merged(str(entry.ledger.folder), entry.run.no, no, copied, remark))


def merge(sources: Sequence[Path], into: Path) -> list[Merged]:
    """Copy the runs of several ledgers, with their folders, into one.

    A run keeps its number if that is larger than all that were here. A run that is there already, with the same numbers, is taken once.
    One that was cut off is left out if another run finished what it began. The sources stay as they are.

    Returns:
        What became of each run, source by source.

    Raises:
        UserError: a source is no ledger, or is being written, or has a damaged run; two runs contradict each other; or shards are of
            different plans. Nothing was copied then.
        OSError: a file can't be copied; nothing is entered then.
    """
    resolved = [source.resolve() for source in sources]
    for place, source in zip(resolved, sources, strict=True):
        if place == into.resolve():
            raise UserError(f"{source} is the ledger that is merged into; leave it out, or name another folder with --into")
        if resolved.count(place) > 1:
            raise UserError(f"{source} is named twice; name each ledger once")
    shard_plan.refuse_different(sources)
    target = Ledger(into, create=True)
    target.refuse_unwritable()
    ledgers = [Ledger(source) for source in sources]
    return _merge([[_entry(ledger, run) for run in _sound(ledger)] for ledger in ledgers], target)


def bring(numbers: Iterable[int], source: Ledger, target: Ledger) -> None:
    """Copy some finished runs, and the runs that these learned from, into a ledger that has none. They keep their numbers.

    Raises:
        UserError: one is damaged.
    """
    wanted, open_ = set[int](), set(numbers)
    runs = {run.no: run for run in source.listing() if run.status == "finished"}  # what others train there meanwhile does not matter
    while open_:
        wanted |= open_
        open_ = {no for number in open_ for no in _referred(runs[number]) if no in runs} - wanted
    _merge([[_entry(source, runs[no]) for no in sorted(wanted)]], target)


def _merge(sources: Sequence[Sequence[_Entry]], target: Ledger) -> list[Merged]:
    plan = _planned(sources, target)
    if plan.taken:
        with _drafts(target.folder) as drafts:
            rows = {no: _copied(entry, no, plan, drafts / str(no)) for no, entry in plan.taken.items()}
            target.enter({no: (rows[no], entry.curve) for no, entry in plan.taken.items()}, drafts, plan.last, plan.replaced)
    return plan.merged


@contextmanager
def _drafts(folder: Path) -> Iterator[Path]:
    """A folder to prepare runs in, which is gone after that. What a killed merge left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{DRAFTS}*"):
        if not held(left / folders.LOCK_FILE):
            shutil.rmtree(left, ignore_errors=True)
    drafts = Path(tempfile.mkdtemp(prefix=DRAFTS, dir=folder))
    try:
        with Lock(drafts / folders.LOCK_FILE):
            yield drafts
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def _sound(ledger: Ledger) -> list[Run]:
    """The runs of a ledger.

    Raises:
        UserError: one is damaged or is being trained, or a folder has no row.
    """
    runs = ledger.listing()
    for run in runs:
        if run.status == DAMAGED:
            raise UserError(f"run {run.no} in {ledger.folder} is damaged ({run.error}); mend it first: {advice.rebuild(ledger.folder)}")
        if run.status == "running":
            raise UserError(f"run {run.no} in {ledger.folder} is being trained by another process; wait for it, or stop it")
    if unknown := ledger.strangers():
        where = ledger.run_folder(unknown[0])
        raise UserError(f"{where} is the folder of a run that its ledger lacks; enter it first: {advice.rebuild(ledger.folder)}")
    return runs


def _entry(ledger: Ledger, run: Run) -> _Entry:
    return _Entry(ledger, ledger.run(run.no), tuple(ledger.epochs(run.no)))


def _planned(sources: Sequence[Sequence[_Entry]], target: Ledger) -> _Plan:
    """Which run gets which number, and which is left out.

    Raises:
        UserError: two runs contradict each other.
    """
    there = {run.no: _entry(target, run) for run in _sound(target)}
    last = target.last_number()
    plan = _Plan(there, last, last)
    finished = {entry.key for entries in ([*there.values()], *sources) for entry in entries if entry.finished}
    for entries in sources:
        before: dict[Key, list[tuple[int, _Entry]]] = {}
        for no, entry in plan.there.items():
            before.setdefault(entry.key, []).append((no, entry))
        _refuse_contradiction(entries, before)
        for entry in entries:
            alike = before.get(entry.key, [])
            if equal := [no for no, other in alike if other.result() == entry.result()]:
                plan.note(entry, equal[-1], "is here already")
            elif earlier := [(no, other) for no, other in alike if not other.finished and entry.is_same_run(other)]:
                no, other = earlier[-1]
                if not entry.finished and len(entry.curve) <= len(other.curve):
                    plan.note(entry, no, f"is here already, at epoch {len(other.curve)}")
                else:
                    plan.replaced.add(no)
                    plan.take(entry, no, f"takes the place of what was here, at epoch {len(other.curve)}")
            elif entry.run.cut_off and entry.key in finished:
                plan.note(entry, None, "was cut off, and another run finished it")
            else:
                free = entry.run.no not in plan.there and entry.run.no > plan.last
                plan.take(entry, entry.run.no if free else plan.highest + 1)
    return plan


def _refuse_contradiction(entries: Sequence[_Entry], before: Mapping[Key, Sequence[tuple[int, _Entry]]]) -> None:
    """Refuse a ledger that has another result for a run than is there. One that repeats a run beside the result that is there does not
    contradict it.

    Raises:
        UserError: it has.
    """
    results: dict[Key, list[list[Any]]] = {}
    for entry in entries:
        if entry.finished:
            results.setdefault(entry.key, []).append(entry.result())
    for entry in entries:
        for _, other in before.get(entry.key, []):
            both = entry.finished and other.finished
            known = [one.result() for _, one in before[entry.key] if one.finished]
            if both and not any(result in known for result in results[entry.key]):
                raise UserError(f"{entry.name} and {other.name} are the same run with different results ({_apart(entry, other)}); {_CURE}")
            if entry.is_same_run(other) and not both and not (entry.goes_on(other) or other.goes_on(entry)):
                raise UserError(f"{entry.name} and {other.name} are the same run with different curves; {_CURE}")


_CURE = "leave one of the two ledgers out, or remove that run's folder from it and rebuild it"


def _apart(entry: _Entry, other: _Entry) -> str:
    """The first thing in which two results differ."""
    for column in ("correct", "images", "epoch", "weights_hash", "best_correct", "best_epoch"):
        one, two = (getattr(run, column) for run in (entry.run, other.run))
        if one != two:
            return f"{column.removesuffix('_hash')} {str(one)[:8]} and {str(two)[:8]}"
    return "their curves"


def _referred(run: Run) -> Iterator[int]:
    """The numbers of the runs that a run began with."""
    if run.teacher_run is not None:
        yield run.teacher_run
    yield from _numbers(run).values()


def _numbers(run: Run) -> dict[str, int]:
    """The references by number in a run's config; of several teachers each one's."""
    references = [one for key in NETWORKS if isinstance(named := run.config.get(key), str) for one in each_network(named)]
    return {reference: int(reference) for reference in references if re.fullmatch(r"[0-9]{1,18}", reference)}


def _copied(entry: _Entry, no: int, plan: _Plan, draft: Path) -> Run:
    """Write a run's folder under its new number, and return its row.

    Files that hold no number are linked if the file system can, else copied.

    Raises:
        UserError: its record is not what was written.
        OSError: a file can't be read or written.
    """
    source = entry.ledger.run_folder(entry.run.no)
    run = dataclasses.replace(entry.run, **_renumbered(entry, no, plan))
    draft.mkdir(parents=True)
    if source.is_dir():
        for path in source.iterdir():
            if path.is_file() and path.name not in (folders.JOURNAL, folders.RECORD, folders.LOCK_FILE) and path.name[0] != ".":
                _put(path, draft / path.name)
    _carry_checkpoint(entry, run, plan, draft)
    row = {name: getattr(run, name) for name in RUN}
    (draft / folders.JOURNAL).write_bytes(_journal(source / folders.JOURNAL, entry, row))
    if not (source / folders.RECORD).is_file():
        return run
    record = _record(source / folders.RECORD, entry)
    record |= {name: value for name, value in row.items() if name in record and name != "record_hash"}
    if SEAL not in record:  # version 0.1.0 listed no files and sealed nothing
        (draft / folders.RECORD).write_text(json.dumps(record, indent=2) + "\n")
        return run
    journal = (draft / folders.JOURNAL).read_bytes()
    listed = {"size": len(journal), "sha256": hashlib.sha256(journal).hexdigest()}
    files = {name: listed if name == folders.JOURNAL else known for name, known in folders.files_of(record).items()}
    content = folders.sealing(record | {"files": files})
    (draft / folders.RECORD).write_bytes(content)
    return dataclasses.replace(run, record_hash=hashlib.sha256(content).hexdigest())


def _journal(path: Path, entry: _Entry, row: Mapping[str, Any]) -> bytes:
    """A run's journal as it is, with the new row after it; made from the curve if there is none."""
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        before = folders.journal({"epoch": vars(epoch)} for epoch in entry.curve)
    return before + folders.journal([{"row": row}])


def _record(path: Path, entry: _Entry) -> dict[str, Any]:
    """What a run's record says.

    Raises:
        UserError: it is not what was written.
    """
    content = path.read_bytes()
    if entry.run.record_hash is None:  # version 0.1.0 kept no hash
        record = folders.sealed(path)
    else:
        record = json.loads(content) if hashlib.sha256(content).hexdigest() == entry.run.record_hash else None
    if record is None:
        raise UserError(f"{path} is not what {entry.name} wrote; {_CURE}")
    return record


def _put(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # another file system, or one without links
        shutil.copy2(path, copy)


def _carry_checkpoint(entry: _Entry, run: Run, plan: _Plan, draft: Path) -> None:
    """The checkpoint of a cohort lies with its first run. If that one was not taken, the first that was gets it."""
    home = entry.ledger.run_folder(entry.run.home)
    if run.cut_off and run.home == run.no != plan.numbers[entry.ledger].get(entry.run.home):
        for path in home.glob("checkpoint*.safetensors"):
            _put(path, draft / path.name)


def _renumbered(entry: _Entry, no: int, plan: _Plan) -> dict[str, Any]:
    """The columns of a run that hold a number, or that say where it came from."""
    run, numbers = entry.run, plan.numbers[entry.ledger]

    def new(text: re.Match[str]) -> str:
        return f"{text[1]}{numbers.get(int(text[2]), '(elsewhere)')}"

    renamed = {  # a run that is not copied has a file
        reference: str(numbers.get(old, entry.ledger.run_folder(old) / folders.STUDENT_FILE)) for reference, old in _numbers(run).items()
    }
    config = run.config | {
        key: "+".join(renamed.get(one, one) for one in each_network(named))
        for key in NETWORKS
        if isinstance(named := run.config.get(key), str)
    }
    before = run.versions.get(ORIGIN)
    origin = f"run {run.no} of {entry.ledger.folder}" + (f" ({before})" if before else "")
    return {
        "no": no,
        "status": "interrupted" if run.status == DEAD else run.status,
        "cohort": None if run.cohort is None else plan.homes[entry.ledger, run.home],
        "teacher_run": None if run.teacher_run is None else numbers.get(run.teacher_run),
        "variant": re.sub(r"(\binit=run )(\d+)\b", new, run.variant),
        "config": config,
        "versions": run.versions | {ORIGIN: origin},
    }
