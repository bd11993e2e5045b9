"""The driver: plans as ``run`` does, hands cohorts to a crew of workers, and enters into its ledger what they tell."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch

from ... import advice, trust
from ...checks import UserError
from ...config import RunConfig
from ...data.dataset import ImageData
from ...ledger import JOURNAL, Ledger, Run, merge
from ...training import checkpoint
from ..due import Due, known, learnt_from, outstanding, unfinished
from ..execute import cut_off, refuse_shared
from ..job import Job
from ..partition import by_seed, costs
from ..plan import cohorts, recorded
from ..watcher import Watcher
from .kit import Alive, Began, Changed, Epochs, Kit, Result, Said, Word, packed
from .mirror import Mirror
from .storage import FOLDER as STORAGE
from .storage import States

__all__ = ["STORAGE", "Crew", "Gathered", "How", "Lost", "resume", "run", "title"]

TURN = 0.2  # seconds that the driver waits for results at a time
AHEAD = 2  # cohorts that are handed out for each slot, so that no worker waits for the driver
GRACE = 10.0  # seconds that workers have to stop
SILENCE = 30.0  # seconds without a sign of life after which the user is told
REPORT = 60.0  # seconds between two lines that say how far all is, where no cohort ends


@dataclass(frozen=True)
class Lost:
    """A cohort whose workers died more often than is tried again."""

    why: str


class Crew(Protocol):
    """Workers, wherever they are.

    Attributes:
        slots: cohorts that they train at the same time.
        threads: of an operation on a CPU, for each of them.
        device: ``cpu`` or ``cuda``.
        option: the words of the command line that name this crew.
    """

    slots: int
    threads: int
    device: str
    option: Sequence[str]

    def measure(self, kit: Kit, data: ImageData | None, given: bytes) -> str:
        """Find out by a few steps what a cohort takes, and so how many are trained at the same time. What was found, in a line.

        Raises:
            UserError: it can't be trained.
        """

    def begin(self, kit: Kit, data: ImageData | None, given: bytes) -> None:
        """Hand a cohort to a worker, as soon as one is free. Equal data travel once."""

    def words(self) -> Sequence[Word]:
        """What was told since the last time, in order."""

    def results(self, seconds: float) -> Mapping[int, Result | Lost]:
        """What ended within so many seconds, by the number of the cohort."""

    def remarks(self) -> Sequence[str]:
        """What is to be told of the machines, each line once."""

    def cancel(self, number: int) -> None:
        """End one cohort; nothing is wanted of it any more."""

    def stop(self, seconds: float) -> None:
        """End what is in progress, as by Ctrl-C, and wait for so long at most."""


@dataclass
class _Cohort:
    """A cohort that is to be trained.

    Attributes:
        home: the run in whose folder its lock lies, of one that was cut off.
        runs: those that go on.
        heard: when its worker gave the last sign of life.
        done: epochs that are on record.
    """

    number: int
    jobs: Sequence[Job]
    home: int | None
    cost: float
    runs: Sequence[int] = ()
    mirror: Mirror | None = None
    node: str = ""
    began: float = 0.0
    heard: float = 0.0
    silent: bool = False
    done: int = 0

    @property
    def epochs(self) -> int:
        return sum(self.jobs[0].phase_epochs)


@dataclass
class _Progress:
    """How far a plan is: cohorts, and their estimated costs."""

    total: int
    left: float
    done: int = 0
    spent: float = 0.0
    started: float = field(default_factory=time.monotonic)
    told_at: float = field(default_factory=time.monotonic)

    def ended(self, cost: float) -> None:
        """A cohort ended."""
        self.done, self.spent, self.left = self.done + 1, self.spent + cost, self.left - cost

    def told(self, in_training: int) -> str:
        """Totals, and how long the rest takes if it goes on so."""
        self.told_at = time.monotonic()
        seconds = (self.told_at - self.started) * self.left / self.spent if self.spent else 0.0
        left = f", about {timedelta(seconds=round(seconds))} (h:mm:ss) left" if seconds else ""
        return f"{self.done} of {self.total} cohorts done, {in_training} in training{left}"


@dataclass(frozen=True)
class How:
    """How cohorts are trained, as ``run`` takes it."""

    engine: str = "auto"
    deterministic: bool = False
    workers: int | None = None
    again: bool = False
    trusts_all: bool = False


Gathered = Callable[[], AbstractContextManager[Crew]]
"""Gathers a crew, once it is known that there is something to do."""


def run(
    configs: Sequence[RunConfig], ledger: Ledger, device: torch.device, gather: Gathered, storage: Path, how: How, watcher: Watcher
) -> list[Run]:
    """Train what the ledger lacks by a crew, go on with what was cut off, and return the runs that are on record, in the plan's order.

    Raises:
        UserError: a config can't be run; or a cohort was not trained, in which case the others were.
    """
    ledger.refuse_unwritable()
    refuse_shared(ledger)
    due = outstanding(configs, ledger, device, watcher, again=how.again)
    return due.runs(ledger, _trained(due, ledger, device, gather, storage, how, watcher))


def resume(
    ledger: Ledger, device: torch.device, gather: Gathered, storage: Path, how: How, watcher: Watcher, *, no: int | None = None
) -> list[Run]:
    """Go on with the cohort of one run that was cut off. Default: with all such cohorts. Return their runs as they ended.

    Raises:
        UserError: as ``runner.resume``; or a cohort was not trained, in which case the others were.
    """
    ledger.refuse_unwritable()
    refuse_shared(ledger)
    runs = [run_ for run_ in ledger.runs() if run_.cut_off] if no is None else [cut_off(ledger.run(no))]
    homes = list(dict.fromkeys(run_.home for run_ in runs))
    numbers = [run_.no for home in homes for run_ in unfinished(home, ledger)]
    _trained(Due([], [], homes, {}), ledger, device, gather, storage, how, watcher)
    return [ledger.run(number) for number in numbers]


def _trained(
    due: Due, ledger: Ledger, device: torch.device, gather: Gathered, storage: Path, how: How, watcher: Watcher
) -> Mapping[tuple[str, int], int]:
    """Train what is due. Return the numbers of the runs that were begun, by key."""
    if not due.fresh and not due.homes:
        return {}
    jobs = [*due.fresh, *(job for home in due.homes for job in recorded(unfinished(home, ledger), ledger, device))]
    given = _packed(learnt_from(jobs, ledger), ledger)
    with gather() as crew:
        driver = _Driver(ledger, device, crew, storage, how, watcher, given)
        driver.train(due)
    return driver.numbers


def _packed(numbers: Iterable[int], ledger: Ledger) -> bytes:
    """Runs with their folders as an archive that unpacks to a ledger."""
    with tempfile.TemporaryDirectory(prefix="flowdistill-") as place:
        folder = Path(place, "runs")
        if wanted := set(numbers):
            target = Ledger(folder, create=True)
            merge.bring(wanted, ledger, target)
            target.close()
        return packed(folder, sorted(path for path in folder.rglob("*") if path.is_file()))


@dataclass
class _Driver:
    ledger: Ledger
    device: torch.device
    crew: Crew
    storage: Path
    how: How
    watcher: Watcher
    given: bytes  # the runs that the cohorts learn from, as of when they were planned
    numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    _training: dict[int, _Cohort] = field(default_factory=dict)
    _kinds: set[str] = field(default_factory=set)  # of cohorts whose first lines were shown
    _progress: _Progress | None = None

    def train(self, due: Due) -> None:
        """Hand out all cohorts, a few more at a time than there are slots, and enter what comes.

        Raises:
            UserError: some were not trained.
        """
        waiting = deque(self._cohorts(due))
        self._progress = _Progress(len(waiting), sum(cohort.cost for cohort in waiting))
        if waiting:
            first = waiting[0].jobs  # the most costly one
            self.watcher.say(self.crew.measure(self._kit(waiting[0]), _sent(first), self.given))
            runs, threads = sum(len(cohort.jobs) for cohort in waiting), self.crew.threads
            at_once = f"{self.crew.slots} at a time on {self.crew.device}, each by {threads} thread{'s' if threads > 1 else ''}"
            self.watcher.say(f"{runs} runs in {len(waiting)} cohorts, {at_once}; their states are kept in {self.storage}")
        try:
            while waiting or self._training:
                while waiting and len(self._training) < AHEAD * self.crew.slots:
                    self._try_to_hand_out(waiting.popleft())
                results = self.crew.results(TURN)
                for line in self.crew.remarks():
                    self.watcher.say(line)
                for word in self.crew.words():
                    self._hear(word)
                for number, result in results.items():
                    if cohort := self._training.pop(number, None):
                        self._end(cohort, result)
                self._look_after()
        except BaseException as error:
            self.crew.stop(GRACE)
            with contextlib.suppress(Exception):
                for word in self.crew.words():
                    if not isinstance(word.told, Said):  # that it was stopped is said below
                        self._hear(word)
            self._give_up(error)
            raise
        if self.refused:
            raise UserError(f"{len(self.refused)} of {self._progress.total} cohorts were not trained: {self.refused[0]}")

    def _cohorts(self, due: Due) -> Iterator[_Cohort]:
        """The students of one seed are a cohort, since they share batches and teacher. The most costly go first."""
        units: list[tuple[Sequence[Job], int | None, Sequence[int]]] = []
        for home in due.homes:
            runs = unfinished(home, self.ledger)
            units.append((recorded(runs, self.ledger, self.device), home, [run_.no for run_ in runs]))
        units += [(unit, None, ()) for cohort in cohorts(due.fresh) for unit in by_seed(cohort)]
        estimated = costs(unit for unit, _, _ in units)
        ordered = sorted(zip(estimated, units, strict=True), key=lambda weighed: -weighed[0])
        for number, (cost, (jobs, its_home, numbers)) in enumerate(ordered, 1):
            yield _Cohort(number, jobs, its_home, cost, numbers)

    def _kit(self, cohort: _Cohort) -> Kit:
        jobs, keys, deterministic = cohort.jobs, [job.key for job in cohort.jobs], self.how.deterministic
        if cohort.home is not None:  # of its runs, those that failed were in its name
            runs = [run_ for run_ in self.ledger.runs() if run_.home == cohort.home]
            keys = [(run_.fingerprint, run_.seed) for run_ in runs]
            deterministic = deterministic or any(run_.deterministic for run_ in runs)
        return Kit(
            cohort.number,
            hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()[:16],
            title(jobs),
            [job.config.model_dump(mode="json") for job in jobs],
            [job.key for job in jobs],
            str(self.storage.absolute()),
            self.how.engine,
            deterministic,
            self.how.workers,
            self.crew.device,
            self.crew.threads,
            trust.named(),
            self.how.trusts_all,
            self.ledger.changes.accepted,
        )

    def _try_to_hand_out(self, cohort: _Cohort) -> None:
        """Hand out a cohort, unless another process was faster with it; the others are trained all the same."""
        try:
            self._hand_out(cohort)
        except UserError as error:
            if cohort.mirror is not None:
                cohort.mirror.close()
            self._refuse(cohort, f"{title(cohort.jobs)}: {error}")

    def _hand_out(self, cohort: _Cohort) -> None:
        jobs, kit = cohort.jobs, self._kit(cohort)
        if self.how.again:
            States(self.storage, kit.name, "").clear()

        def refuse_taken() -> None:
            if not self.how.again and (others := known(jobs, self.ledger)):
                other = next(iter(others.values()))
                raise UserError(f"another process began it meanwhile, as run {other.no}; wait for that")

        cohort.mirror = Mirror(kit, self.ledger, cohort.home, refuse_taken)
        if cohort.home is not None:  # its lock is held from here on
            if {run_.no for run_ in unfinished(cohort.home, self.ledger)} != set(cohort.runs):
                raise UserError(f"another process went on with it meanwhile, as run {cohort.home}")
            self._keep_local_state(kit, cohort.home)
        cohort.heard = time.monotonic()
        self._training[cohort.number] = cohort
        self.crew.begin(kit, _sent(jobs), self.given)

    def _keep_local_state(self, kit: Kit, home: int) -> None:
        """A cohort that was trained on this machine goes on from its checkpoint."""
        folder = self.ledger.run_folder(home)
        saved = checkpoint.load(folder) if (folder / checkpoint.FILE).exists() else None
        if saved is not None and saved.done:
            journals = [self.ledger.run_folder(run_.no) / JOURNAL for run_ in unfinished(home, self.ledger)]
            States(self.storage, kit.name, "here").save(saved.done, self.ledger.folder, [*journals, folder / checkpoint.FILE])

    def _hear(self, word: Word) -> None:
        cohort = self._training.get(word.cohort)
        if cohort is None or cohort.mirror is None:
            return  # it has ended
        if not cohort.mirror.listens_to(word.attempt, begins=isinstance(word.told, Began | Said)):
            return
        if cohort.silent:
            self.watcher.say(f"{cohort.mirror.kit.title}: {cohort.node} is heard again")
        cohort.heard, cohort.silent, cohort.node = time.monotonic(), False, word.node
        match word.told:
            case Began() as told:
                self._begin(cohort, word, told)
            case Epochs() as told:
                cohort.mirror.epochs(told)
                cohort.done = max(epoch["epoch"] for epoch in told.epochs.values())
            case Changed() as told:
                cohort.mirror.changed(told)
            case Said(line, early):
                self._say(cohort, line, early=early)
            case Alive():
                pass

    def _begin(self, cohort: _Cohort, word: Word, told: Began) -> None:
        assert cohort.mirror is not None
        again, cohort.began = bool(cohort.began) or cohort.home is not None, time.monotonic()
        try:
            cohort.done = cohort.mirror.began(word.attempt, told)
        except UserError as error:
            self.crew.cancel(cohort.number)
            self._end(self._training.pop(cohort.number), Lost(str(error)))
            return
        self.numbers |= cohort.mirror.numbers
        self._kinds.add(_kind(cohort.jobs))
        if told.remark:
            self.watcher.say(f"{cohort.mirror.kit.title}: {told.remark}")
        if again and cohort.done:
            self.watcher.say(f"{cohort.mirror.kit.title}: goes on on {word.node} after epoch {cohort.done} of {cohort.epochs}")
        elif again:
            where = cohort.mirror.kit.storage
            self.watcher.say(f"{cohort.mirror.kit.title}: starts again on {word.node}, since {where} has no state of it")

    def _say(self, cohort: _Cohort, line: str, *, early: bool) -> None:
        """A worker's line. What each cohort of a kind says before training is shown once."""
        assert cohort.mirror is not None
        shown = cohort.mirror.here(line)
        if shown and not (early and _kind(cohort.jobs) in self._kinds):
            self.watcher.say(shown)

    def _end(self, cohort: _Cohort, result: Result | Lost) -> None:
        assert cohort.mirror is not None
        named, refused = cohort.mirror.kit.title, ""
        try:
            if isinstance(result, Lost) or result.refused:
                why = result.why if isinstance(result, Lost) else result.refused
                cohort.mirror.stop(why)
                refused = f"{named}: {why}"
            else:
                cohort.mirror.finish(result)
                self.numbers |= cohort.mirror.numbers
                States(self.storage, cohort.mirror.kit.name, "").clear()
        except UserError as error:  # of this cohort alone; the others go on
            cohort.mirror.stop(str(error))
            refused = f"{named}: {error}"
        finally:
            cohort.mirror.close()
        if refused:
            self._refuse(cohort, refused)
        else:
            self._tell_ended(cohort)

    def _refuse(self, cohort: _Cohort, why: str) -> None:
        """Note that a cohort was not trained."""
        self.refused.append(why)
        self.watcher.say(f"not trained: {why}")
        self._tell_ended(cohort)

    def _tell_ended(self, cohort: _Cohort) -> None:
        assert self._progress is not None
        self._progress.ended(cohort.cost)
        where = f" on {cohort.node}" if cohort.node else ""
        self.watcher.say(f"{self._progress.told(self._in_training)}: {title(cohort.jobs)}{where}")

    def _look_after(self) -> None:
        """Tell of workers that are not heard any more, and now and then how far all is."""
        for cohort in self._training.values():
            if cohort.began and not cohort.silent and time.monotonic() - cohort.heard > SILENCE:
                cohort.silent = True
                assert cohort.mirror is not None
                self.watcher.say(f"{cohort.mirror.kit.title}: no sign of life from {cohort.node} for {SILENCE:.0f} s; it is waited for")
        if self._progress is not None and time.monotonic() - self._progress.told_at > REPORT:
            self.watcher.say(self._progress.told(self._in_training))

    @property
    def _in_training(self) -> int:
        return sum(1 for cohort in self._training.values() if cohort.began)

    def _give_up(self, error: BaseException) -> None:
        why, stopped = str(error) or type(error).__name__, list[int]()
        for cohort in self._training.values():
            if cohort.mirror is not None:
                with contextlib.suppress(Exception):  # what can't be recorded now shows as dead, by its free lock
                    stopped += cohort.mirror.stop(why)
                cohort.mirror.close()
        if stopped:
            command = advice.command("resume", *self.crew.option, runs=self.ledger.folder)
            self.watcher.say(f"stopped {len(stopped)} runs; go on with: {command}")


def _sent(jobs: Sequence[Job]) -> ImageData | None:
    """The images that travel to a worker. Streamed ones are read where they are wanted."""
    return None if jobs[0].data.streamed else jobs[0].data


def title(jobs: Sequence[Job]) -> str:
    """A cohort, as messages name it."""
    return f"{_kind(jobs)} seed {','.join(str(seed) for seed in dict.fromkeys(job.config.seed for job in jobs))}"


def _kind(jobs: Sequence[Job]) -> str:
    """A cohort without its seeds."""
    methods = ",".join(dict.fromkeys(job.resolved.name for job in jobs))
    return f"{methods} {jobs[0].student.model} {jobs[0].data.name}"
