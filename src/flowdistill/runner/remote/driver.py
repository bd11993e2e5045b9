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
from ...checks import UserError, first_line
from ...config import RunConfig
from ...data.dataset import ImageData
from ...ledger import JOURNAL, Ledger, Run, merge
from ...training import checkpoint
from ..due import CutOff, Due, Key, known, learnt_from, outstanding, to_resume, unfinished
from ..execute import refuse_shared, vouch
from ..job import Job
from ..partition import by_seed, costs
from ..plan import cohorts
from ..record import reported
from ..watcher import Watcher
from .kit import Alive, Began, Changed, Epochs, Kit, Result, Said, Word, packed
from .mirror import Mirror
from .storage import States

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
        storage: the folder in which they keep the states of cohorts.
        option: the words of the command line that name this crew.
    """

    slots: int
    threads: int
    device: str
    storage: Path
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


@dataclass(frozen=True)
class _Cohort:
    """A cohort that is to be trained.

    Attributes:
        cut_off: what is on record of it; None for one that nobody began.
        cost: estimated, in operations.
    """

    number: int
    jobs: Sequence[Job]
    cut_off: CutOff | None
    cost: float

    @property
    def name(self) -> str:
        """Of its states in the storage: the same for the same runs, of which some may have failed since."""
        keys = self.cut_off.keys if self.cut_off is not None else [job.key for job in self.jobs]
        return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()[:16]

    @property
    def kind(self) -> str:
        """As messages name it, without its seeds."""
        methods = ",".join(dict.fromkeys(job.resolved.name for job in self.jobs))
        return f"{methods} {self.jobs[0].student.model} {self.jobs[0].data.name}"

    @property
    def title(self) -> str:
        """As messages name it."""
        return f"{self.kind} seed {','.join(str(seed) for seed in dict.fromkeys(job.config.seed for job in self.jobs))}"

    @property
    def epochs(self) -> int:
        return sum(self.jobs[0].phase_epochs)

    @property
    def data(self) -> ImageData | None:
        """The images that travel to its worker. Streamed ones are read where they are wanted."""
        return None if self.jobs[0].data.streamed else self.jobs[0].data


@dataclass
class _Training:
    """A cohort that was handed out.

    Attributes:
        began: whether a worker has told that it began.
        heard: when its worker gave the last sign of life.
        silent: whether the user was told that it gives none.
    """

    cohort: _Cohort
    mirror: Mirror
    node: str = ""
    began: bool = False
    heard: float = field(default_factory=time.monotonic)
    silent: bool = False


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


def run(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device, gather: Gathered, how: How, watcher: Watcher) -> list[Run]:
    """Train what the ledger lacks by a crew, go on with what was cut off, and return the runs that are on record, in the plan's order.

    Raises:
        UserError: a config can't be run; or a cohort was not trained, in which case the others were.
    """
    ledger.refuse_unwritable()
    refuse_shared(ledger)
    due = outstanding(configs, ledger, device, watcher, again=how.again)
    return due.runs(ledger, train(due, ledger, gather, how, watcher))


def resume(ledger: Ledger, device: torch.device, gather: Gathered, how: How, watcher: Watcher, *, no: int | None = None) -> list[Run]:
    """Go on with the cohort of one run that was cut off. Default: with all such cohorts. Return their runs as they ended.

    Raises:
        UserError: as ``runner.resume``; or a cohort was not trained, in which case the others were.
    """
    ledger.refuse_unwritable()
    refuse_shared(ledger)
    cut_off = to_resume(ledger, device, no)
    train(Due([], [], cut_off, {}), ledger, gather, how, watcher)
    return [ledger.run(run_.no) for cohort in cut_off for run_ in cohort.runs]


def train(due: Due, ledger: Ledger, gather: Gathered, how: How, watcher: Watcher) -> Mapping[Key, int]:
    """Train what is due. Return the numbers of the runs that were begun, by key.

    Raises:
        UserError: a cohort was not trained; the others were.
    """
    jobs = [*due.fresh, *(job for cohort in due.cut_off for job in cohort.jobs)]
    if not jobs:
        return {}
    given = _packed(learnt_from(jobs, ledger), ledger)
    with gather() as crew:
        driver = _Driver(ledger, crew, how, watcher, given)
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
    crew: Crew
    how: How
    watcher: Watcher
    given: bytes  # the runs that the cohorts learn from, as of when they were planned
    numbers: dict[Key, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    _training: dict[int, _Training] = field(default_factory=dict)  # by the cohort's number
    _kinds: set[str] = field(default_factory=set)  # of cohorts whose first lines were shown
    _progress: _Progress = field(default_factory=lambda: _Progress(0, 0.0))

    def train(self, due: Due) -> None:
        """Hand out all cohorts, a few more at a time than there are slots, and enter what comes.

        Raises:
            UserError: some were not trained.
        """
        waiting = deque(self._cohorts(due))
        self._progress = _Progress(len(waiting), sum(cohort.cost for cohort in waiting))
        if waiting:
            most_costly = waiting[0]
            self.watcher.say(self.crew.measure(self._kit(most_costly), most_costly.data, self.given))
            runs, threads = sum(len(cohort.jobs) for cohort in waiting), self.crew.threads
            at_once = f"{self.crew.slots} at a time on {self.crew.device}, each by {threads} thread{'s' if threads > 1 else ''}"
            self.watcher.say(f"{runs} runs in {len(waiting)} cohorts, {at_once}; their states are kept in {self.crew.storage}")
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
                    if number in self._training:
                        self._end(number, result)
                self._look_after()
        except BaseException as error:
            self.crew.stop(GRACE)
            with contextlib.suppress(Exception):
                for word in self.crew.words():
                    if not isinstance(word.told, Said):  # that it was stopped is said below
                        self._hear(word)
            self._give_up(error)
            self.watcher.ended([*self.numbers.values()], cut_off=True)
            raise
        self.watcher.ended([*self.numbers.values()])  # only now, for what is done there must not keep words of workers waiting
        if self.refused:
            raise UserError(f"{len(self.refused)} of {self._progress.total} cohorts were not trained: {self.refused[0]}")

    def _cohorts(self, due: Due) -> Iterator[_Cohort]:
        """The students of one seed are a cohort, since they share batches and teacher. The most costly go first."""
        units: list[tuple[Sequence[Job], CutOff | None]] = [(cohort.jobs, cohort) for cohort in due.cut_off]
        units += [(unit, None) for cohort in cohorts(due.fresh) for unit in by_seed(cohort)]
        estimated = costs(jobs for jobs, _ in units)
        ordered = sorted(zip(estimated, units, strict=True), key=lambda weighed: -weighed[0])
        for number, (cost, (jobs, cut_off)) in enumerate(ordered, 1):
            yield _Cohort(number, jobs, cut_off, cost)

    def _kit(self, cohort: _Cohort) -> Kit:
        jobs = cohort.jobs
        deterministic = self.how.deterministic or bool(cohort.cut_off and cohort.cut_off.runs[0].deterministic)
        return Kit(
            cohort.number,
            cohort.name,
            cohort.title,
            [job.config.model_dump(mode="json") for job in jobs],
            [job.key for job in jobs],
            str(self.crew.storage.absolute()),
            self.how.engine,
            deterministic,
            self.how.workers,
            self.crew.device,
            self.crew.threads,
            trust.named() | {name for job in jobs for name in job.model_names},  # what was trusted here when it was planned
            self.how.trusts_all,
            self.ledger.changes.accepted,
        )

    def _try_to_hand_out(self, cohort: _Cohort) -> None:
        """Hand out a cohort, unless another process was faster with it; the others are trained all the same."""
        try:
            self._hand_out(cohort)
        except UserError as error:
            self._refuse(cohort, str(error))

    def _hand_out(self, cohort: _Cohort) -> None:
        if self.how.again:
            States(self.crew.storage, cohort.name).clear()

        def refuse_taken() -> None:
            if not self.how.again and (others := known(cohort.jobs, self.ledger)):
                other = next(iter(others.values()))
                raise UserError(f"another process began it meanwhile, as run {other.no}; wait for that")

        kit = self._kit(cohort)
        mirror = Mirror(kit, self.ledger, cohort.cut_off.home if cohort.cut_off else None, refuse_taken)
        if cohort.cut_off is not None:  # its lock is held from here on
            home, runs = cohort.cut_off.home, cohort.cut_off.runs
            if {run_.no for run_ in unfinished(home, self.ledger)} != {run_.no for run_ in runs}:
                mirror.close()
                raise UserError(f"another process went on with it meanwhile, as run {home}")
            self._keep_local_state(cohort.name, home, [run_.no for run_ in runs])
        self._training[cohort.number] = _Training(cohort, mirror)
        self.crew.begin(kit, cohort.data, self.given)

    def _keep_local_state(self, name: str, home: int, runs: Sequence[int]) -> None:
        """A cohort that was trained on this machine goes on from its checkpoint."""
        folder = self.ledger.run_folder(home)
        saved = checkpoint.load(folder) if (folder / checkpoint.FILE).exists() else None
        if saved is not None and saved.done:
            journals = [self.ledger.run_folder(no) / JOURNAL for no in runs]
            States(self.crew.storage, name, "here").save(saved.done, self.ledger.folder, [*journals, folder / checkpoint.FILE])

    def _hear(self, word: Word) -> None:
        """Enter what a worker tells. What is of a cohort that ended, or of an attempt that another took the place of, does not count."""
        training, told = self._training.get(word.cohort), word.told
        if training is None or not training.mirror.listens_to(word.attempt, begins=isinstance(told, Began | Said)):
            return
        if training.silent:
            self.watcher.say(f"{training.cohort.title}: {training.node} is heard again")
        training.heard, training.silent, training.node = time.monotonic(), False, word.node
        match told:
            case Began():
                self._begin(training, word.attempt, told)
            case Epochs():
                for no, epoch in training.mirror.epochs(told).items():
                    self.watcher.report(reported(no, epoch, training.cohort.epochs))
            case Changed():
                training.mirror.changed(told)
            case Said():
                shown = training.mirror.here(told.line)
                if shown and not (told.early and training.cohort.kind in self._kinds):
                    self.watcher.say(shown)
            case Alive():
                pass

    def _begin(self, training: _Training, attempt: str, told: Began) -> None:
        """A cohort begins. If it began before, say where it goes on."""
        cohort, again = training.cohort, training.began or training.cohort.cut_off is not None
        try:
            done = training.mirror.began(attempt, told)
        except UserError as error:
            self.crew.cancel(cohort.number)
            self._end(cohort.number, Lost(str(error)))
            return
        training.began = True
        self.watcher.began([*training.mirror.numbers.values()])
        self.numbers |= training.mirror.numbers
        self._kinds.add(cohort.kind)
        vouch({name for job in cohort.jobs for name in job.model_names}, self.ledger, self.watcher)
        if told.remark:
            self.watcher.say(f"{cohort.title}: {told.remark}")
        if again and done:
            self.watcher.say(f"{cohort.title}: goes on on {training.node} after epoch {done} of {cohort.epochs}")
        elif again:
            self.watcher.say(f"{cohort.title}: starts again on {training.node}, since {self.crew.storage} has no state of it")

    def _end(self, number: int, result: Result | Lost) -> None:
        training = self._training.pop(number)
        cohort, why = training.cohort, result.why if isinstance(result, Lost) else result.refused
        if not why and isinstance(result, Result):
            try:
                training.mirror.finish(result)
                self.numbers |= training.mirror.numbers
                States(self.crew.storage, cohort.name).clear()
            except UserError as error:  # of this cohort alone; the others go on
                why = str(error)
        if why:
            training.mirror.stop(why)
        training.mirror.close()
        if why:
            self._refuse(cohort, why, training.node)
        else:
            self._tell_ended(cohort, training.node)

    def _refuse(self, cohort: _Cohort, why: str, node: str = "") -> None:
        """Note that a cohort was not trained."""
        self.refused.append(f"{cohort.title}: {why}")
        self.watcher.say(f"not trained: {cohort.title}: {why}")
        self._tell_ended(cohort, node)

    def _tell_ended(self, cohort: _Cohort, node: str) -> None:
        self._progress.ended(cohort.cost)
        self.watcher.say(f"{self._progress.told(self._in_training)}: {cohort.title}{f' on {node}' if node else ''}")

    def _look_after(self) -> None:
        """Tell of workers that are not heard any more, and now and then how far all is."""
        for training in self._training.values():
            if training.began and not training.silent and time.monotonic() - training.heard > SILENCE:
                training.silent = True
                self.watcher.say(f"{training.cohort.title}: no sign of life from {training.node} for {SILENCE:.0f} s; it is waited for")
        if time.monotonic() - self._progress.told_at > REPORT:
            self.watcher.say(self._progress.told(self._in_training))

    @property
    def _in_training(self) -> int:
        return sum(1 for training in self._training.values() if training.began)

    def _give_up(self, error: BaseException) -> None:
        """Put on record that all was cut off, and say how it goes on."""
        stopped = list[int]()
        for training in self._training.values():
            with contextlib.suppress(Exception):  # what can't be recorded now shows as dead, by its free lock
                stopped += training.mirror.stop(first_line(error))
            training.mirror.close()
        if stopped:
            command = advice.command("resume", *self.crew.option, runs=self.ledger.folder)
            self.watcher.say(f"stopped {len(stopped)} runs; go on with: {command}")
