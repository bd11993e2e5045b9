"""Train cohorts: what the ledger lacks and what was cut off, each student its own run."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import advice, models, trust
from ..checks import UserError, first_line
from ..config import RunConfig
from ..device import computing, describe, reset_peak_memory, settings
from ..env import circumstances, versions
from ..ledger import Ledger, Run, network_file_system, shard_plan
from ..ledger.shard_plan import ShardPlan
from ..models.foreign import own_place
from ..ranks import apart, current, refuse_unjoined
from ..training import checkpoint
from ..training.cohort import Cohort, train
from ..training.student import Student
from .cohorts import Member, check_start, prepare
from .due import known, outstanding, to_resume, unfinished
from .follow import announce
from .follow import told as told_of_ranks
from .plan import recorded
from .record import finish, now, of_ranks, record_epoch, row, told
from .watcher import Watcher

CHECKPOINT_SECONDS = 10.0  # between two checkpoints of a cohort, at least


def run(
    configs: Sequence[RunConfig],
    ledger: Ledger,
    device: torch.device,
    *,
    deterministic: bool = False,
    again: bool = False,
    engine: str = "auto",
    workers: int | None = None,
    shard: ShardPlan | None = None,
    watcher: Watcher | None = None,
) -> list[Run]:
    """Train what the ledger lacks, go on with what was cut off, and return the run of every config, in order.

    Runs that diverged are among them, as failed. With ``shard`` only that part of the plan is trained and returned.

    Raises:
        UserError: a config can't be run; nothing was trained then.
    """
    refuse_unjoined()
    ledger.refuse_unwritable()
    refuse_shared(ledger)
    watcher, started = watcher or Watcher(), time.perf_counter()
    due = outstanding(configs, ledger, device, watcher, again=again, shard=shard)
    with computing(device, deterministic=deterministic):
        prepared = prepare(due.fresh, device, engine, workers)
        for cohort, members in prepared:
            with apart():  # the other ranks are not there yet
                check_start(cohort, members, watcher)
    for cut_off in due.cut_off:
        _resume_cohort(cut_off.home, ledger, device, watcher, workers)
    try:
        with computing(device, deterministic=deterministic):
            for cohort, members in prepared:
                _begin_cohort(cohort, members, ledger, device, watcher, time.perf_counter() - started, again=again)
                started = time.perf_counter()
    except _TakenError:  # another process began one meanwhile: what it trains is refused, what it finished is skipped
        how: dict[str, Any] = {"deterministic": deterministic, "engine": engine, "workers": workers, "shard": shard, "watcher": watcher}
        return run(configs, ledger, device, **how)
    return due.runs(ledger, {member.job.key: member.no for _, members in prepared for member in members})


def refuse_shared(ledger: Ledger) -> None:
    """Refuse to train into a ledger on a network file system, unless it is a shard's, which one process writes.

    Raises:
        UserError: that is so.
    """
    if (kind := network_file_system.kind(ledger.folder)) and not (ledger.folder / shard_plan.FILE).exists():
        raise UserError(
            f"--runs {ledger.folder} lies on {kind}, which several machines share; SQLite can't keep a ledger there that more than one "
            f"process writes. Name a folder on a local disk, or train shards, each with a ledger of its own (--shard 1/1 for a single "
            f"one), and put them together with: {advice.merge(ledger.folder / shard_plan.FOLDER, ledger.folder)}"
        )


class _TakenError(Exception):
    """Since the plan was made, another process has begun what is about to begin."""


def resume(
    ledger: Ledger, device: torch.device, *, no: int | None = None, workers: int | None = None, watcher: Watcher | None = None
) -> list[Run]:
    """Go on with the cohort of one run that was cut off. Default: with all such cohorts. Return their runs as they ended.

    Raises:
        UserError: that run is not cut off, or something that its numbers depend on has changed since.
    """
    refuse_unjoined()
    ledger.refuse_unwritable()
    refuse_shared(ledger)
    watcher = watcher or Watcher()
    cohorts = to_resume(ledger, device, no)
    for cohort in cohorts:
        _resume_cohort(cohort.home, ledger, device, watcher, workers)
    return [ledger.run(run_.no) for cohort in cohorts for run_ in cohort.runs]


def _begin_cohort(
    cohort: Cohort,
    members: Sequence[Member],
    ledger: Ledger,
    device: torch.device,
    watcher: Watcher,
    setup_seconds: float,
    *,
    again: bool,
) -> None:
    """Register a cohort and train it.

    Raises:
        _TakenError: another process registered one of its runs since they were planned.
    """
    common = {"cohort_size": len(members), "device": describe(device), "threads": torch.get_num_threads(), "setup_seconds": setup_seconds}
    common |= {"engine": cohort.engine.name}
    made_with = versions() | circumstances() | settings(device)
    with contextlib.ExitStack() as stack:

        def refuse_taken() -> None:
            if not again and known([member.job for member in members], ledger):
                raise _TakenError

        def claim(numbers: Sequence[int]) -> None:
            stack.enter_context(ledger.lock(numbers[0]))
            stack.enter_context(_stops_on_record(members, ledger, watcher))
            for member, no in zip(members, numbers, strict=True):
                member.no = no

        home, *_ = ledger.register(
            [row(member) | common | {"versions": made_with | of_ranks(member.job)} for member in members], claim, refuse_taken
        )
        _train(cohort, members, ledger, device, watcher, home)
    watcher.ended([member.no for member in members])


def vouch(models_named: Iterable[str], ledger: Ledger, watcher: Watcher) -> None:
    """Record that the user's code in this training may run again when its runs are used."""
    try:
        for name in sorted(set(models_named)):
            if location := own_place(name):
                trust.record(name, location, models.own_code(name), ledger.folder)
    except OSError as error:
        watcher.say(f"{trust.state_folder()}: {error.strerror}; a later command that uses these runs needs --trust-code")


def _resume_cohort(home: int, ledger: Ledger, device: torch.device, watcher: Watcher, workers: int | None) -> None:
    """Go on with a cohort from its checkpoint, or from the start if there is none, with as many threads as it began with."""
    with ledger.lock(home):
        runs = unfinished(home, ledger)
        if not runs:
            return  # another process was faster
        cores = runs[0].threads or torch.get_num_threads()
        with computing(device, deterministic=bool(runs[0].deterministic), cores=cores):
            (cohort, members), *others = prepare(recorded(runs, ledger, device), device, _engine(runs[0]), workers)
            assert not others, "runs of one cohort stay together"
            for member, run_ in zip(members, runs, strict=True):
                member.no = run_.no
            _restore(cohort, members, ledger.run_folder(home), watcher)
            with _stops_on_record(members, ledger, watcher):
                ledger.reopen([member.no for member in members], cohort.done)
                _tell_what_changed(runs, members, ledger, device, watcher)
                _train(cohort, members, ledger, device, watcher, home)
    watcher.ended([member.no for member in members])


def _engine(run_: Run) -> str:
    """The engine that a run began with; of a graph what it was of, where several ranks go on with it."""
    plain = "compiled" if run_.engine.endswith("compiled") else "eager"
    return plain if current().several and run_.engine.startswith("graph") else run_.engine


def _restore(cohort: Cohort, members: Sequence[Member], folder: Path, watcher: Watcher) -> None:
    saved = checkpoint.load(folder)
    if saved is not None and saved.damage:
        watcher.say(f"{saved.damage}; {'the one before it is used' if saved.done else 'there is no other, so it starts again'}")
        (folder / checkpoint.FILE).unlink(missing_ok=True)  # else the next save would keep it as the one before
    if saved is not None and saved.done:
        put_back(saved, cohort, members, folder)
    watcher.say(f"{_numbers(members)}: resumed after epoch {cohort.done} of {cohort.epochs}")


def put_back(saved: checkpoint.Checkpoint, cohort: Cohort, members: Sequence[Member], folder: Path) -> None:
    """Put these members into the state that the checkpoint of a folder has of them.

    Raises:
        UserError: it does not have one of them.
    """
    keys = {}
    for member in members:  # by what it trains, for a run that came from another ledger had another number there
        known = next((key for key, about in saved.about.items() if about["key"] == list(member.job.key)), None)
        if known is None:
            raise UserError(f"the checkpoint in {folder} is not of run {member.no}; remove it, and resume starts that run again")
        keys[member.student] = known
        member.train_seconds, member.eval_seconds = saved.about[known]["seconds"]
    checkpoint.restore(cohort, keys, saved)


def _tell_what_changed(runs: Sequence[Run], members: Sequence[Member], ledger: Ledger, device: torch.device, watcher: Watcher) -> None:
    """Say that another machine, version or number of processes does not go on as this one would have, and record the new machine and
    version. The number of processes with which a run began stays on record, as it does in its fingerprint.
    """
    began = {**runs[0].versions, "device": runs[0].device}
    goes_on = {**versions(), "device": describe(device)}
    changed = [f"{name} {began.get(name)} -> {value}" for name, value in goes_on.items() if began.get(name) != value]
    if changed:
        watcher.say(f"not bit for bit what it would have been: it began with other versions or another device ({', '.join(changed)})")
        for run_ in runs:
            stays = {key: run_.versions[key] for key in ("ranks", "batch_normalisation") if key in run_.versions}
            ledger.update(run_.no, device=describe(device), versions=versions() | circumstances() | settings(device) | stays)
    world = current().world
    if other := [member.job.ranks for member in members if member.job.ranks != world and member.job.normalises_apart]:
        watcher.say(
            f"{_numbers(members)}: begun by {_processes(other[0])}, goes on by {_processes(world)}: batch normalisation sees other parts "
            f"of a batch now, so it does not go on as it would have"
        )


def _processes(count: int) -> str:
    return f"{count} processes" if count > 1 else "1 process"


def _train(cohort: Cohort, members: Sequence[Member], ledger: Ledger, device: torch.device, watcher: Watcher, home: int) -> None:
    """Train epoch by epoch. Each goes into the ledger first and into the checkpoint after that, so that the ledger is never behind.

    A resumed run forgets the ledger's epochs after its checkpoint and trains them again. So a checkpoint every ``CHECKPOINT_SECONDS`` is
    enough, unless training stops right after an epoch.
    """
    reset_peak_memory(device)
    vouch((name for member in members for name in member.job.model_names), ledger, watcher)
    folder, last_save = ledger.run_folder(home), -math.inf
    name, why = cohort.engine.name, cohort.engine.why
    watcher.say(f"{_numbers(members)}: {name} engine, {cohort.precision}: {why}")
    if current().several:
        watcher.say(f"{_numbers(members)}: {told_of_ranks(cohort, members)}")
    announce(cohort, members)
    watcher.began([member.no for member in members])
    watcher.begin(_title(members), cohort.steps)
    by_student = {member.student: member for member in members}

    def complete(student: Student) -> None:
        finish(by_student[student], cohort, ledger, device)
        watcher.say(told(ledger.run(by_student[student].no)))

    try:
        for report in train(cohort, watcher.step, complete):
            if (cohort.engine.name, cohort.engine.why) != (name, why):  # it fell back as it set up this phase
                instead = " instead" if cohort.engine.name != name else ""
                name, why = cohort.engine.name, cohort.engine.why
                watcher.say(f"{_numbers(members)}: {name} engine{instead}: {why}")
            try:
                reports = record_epoch(report, cohort, members, ledger, watcher)
            except (UserError, sqlite3.Error):  # the ledger fails, but the folders have the epoch, and resuming enters it
                _save(cohort, members, folder, watcher)
                raise
            due = time.monotonic() - last_save >= CHECKPOINT_SECONDS
            if due:
                _save(cohort, members, folder, watcher)
                last_save = time.monotonic()
            try:
                for run_report in reports:
                    watcher.report(run_report)
            except BaseException:  # on_epoch may stop training, and is promised that it goes on from this epoch
                if not due:
                    _save(cohort, members, folder, watcher)
                raise
        for member in members:
            if member.student in cohort.students:  # the others diverged, and are recorded as failed, or had stopped early
                complete(member.student)
        checkpoint.clear(folder)  # only now: a cohort that is cut off while it finishes still needs it
    finally:
        watcher.end()
        for line in cohort.data.remarks():
            watcher.say(f"{_numbers(members)}: {line}")


def _save(cohort: Cohort, members: Sequence[Member], folder: Path, watcher: Watcher) -> None:
    """Write a checkpoint. If the disk can't take it, training goes on, and the checkpoint before stands."""
    saved = (*cohort.students, *cohort.stopped)
    about = {str(m.no): {"key": m.job.key, "seconds": (m.train_seconds, m.eval_seconds)} for m in members if m.student in saved}
    try:
        checkpoint.save(folder, cohort, _keys(members), about)
    except OSError as error:
        watcher.say(f"{_numbers(members)}: no checkpoint of epoch {cohort.done} ({error.strerror}); training goes on with the one before")
    else:
        watcher.saved(cohort.done, [member.no for member in members], int(folder.name))


@contextlib.contextmanager
def _stops_on_record(members: Sequence[Member], ledger: Ledger, watcher: Watcher) -> Iterator[None]:
    """Inside, whatever stops the runs is recorded as an interruption. If even that can't be written, the free lock tells."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError, sqlite3.Error, UserError):
            for member in members:
                if ledger.run(member.no).status == "running":
                    ledger.update(member.no, status="interrupted", error=first_line(error), finished=now())
        watcher.say(f"{_numbers(members)}: stopped; go on with: {advice.resume(members[0].no, ledger.folder)}")
        watcher.ended([member.no for member in members], cut_off=True)
        raise


def _keys(members: Sequence[Member]) -> dict[Student, str]:
    return {member.student: str(member.no) for member in members}


def _numbers(members: Sequence[Member]) -> str:
    return f"run{'s' if len(members) > 1 else ''} {', '.join(str(member.no) for member in members)}"


def _title(members: Sequence[Member]) -> str:
    methods = ",".join(dict.fromkeys(member.job.resolved.name for member in members))
    seeds = ",".join(str(seed) for seed in dict.fromkeys(member.job.config.seed for member in members))
    return f"{methods} {members[0].job.student.model} {members[0].job.data.name} seed {seeds}"
