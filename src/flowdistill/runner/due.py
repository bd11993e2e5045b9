"""What of a plan is still to be trained: what nobody began, and what was cut off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..checks import UserError
from ..config import BASELINE, RunConfig
from ..ledger import Ledger, Run
from ..ledger.shard_plan import ShardPlan
from .integrity import missing
from .job import Job, other_side
from .partition import part
from .plan import plan, recorded
from .watcher import Watcher

Key = tuple[str, int]


@dataclass(frozen=True)
class CutOff:
    """A cohort that was cut off.

    Attributes:
        home: the run in whose folder its lock and its checkpoint lie.
        runs: those that go on.
        jobs: what these are to do, in the same order.
        keys: of all its runs, of those that failed, too.
    """

    home: int
    runs: Sequence[Run]
    jobs: Sequence[Job]
    keys: Sequence[Key]


@dataclass(frozen=True)
class Due:
    """A plan, and what of it is to be done.

    Attributes:
        jobs: the whole plan, in order.
        fresh: the jobs that nobody began, each once.
        cut_off: the cohorts that go on.
        known: the runs that are skipped or gone on with, by key.
    """

    jobs: Sequence[Job]
    fresh: Sequence[Job]
    cut_off: Sequence[CutOff]
    known: Mapping[Key, Run]

    def runs(self, ledger: Ledger, begun: Mapping[Key, int]) -> list[Run]:
        """The run of every job that is on record, in the order of the plan. ``begun`` are the numbers of those that were begun now."""
        numbers = {key: previous.no for key, previous in self.known.items()} | dict(begun)
        return [ledger.run(numbers[job.key]) for job in self.jobs if job.key in numbers]


def outstanding(
    configs: Sequence[RunConfig], ledger: Ledger, device: torch.device, watcher: Watcher, *, again: bool, shard: ShardPlan | None = None
) -> Due:
    """Look up what the ledger has of a plan, and say what of it counts and what does not. Nothing is trained or written.

    Raises:
        UserError: a config can't be run, another process trains one, or what was cut off can't be gone on with.
    """
    jobs = plan(configs, ledger, device)
    if shard is not None:
        jobs = part(jobs, shard)
    todo = {job.key: job for job in jobs}
    for line in dict.fromkeys(network.remark for job in jobs for network in job.networks.values() if network.remark):
        watcher.say(line)
    there = {} if again else known(jobs, ledger)
    for line in [] if again else dict.fromkeys(_lost(job, ledger) for job in jobs if job.key not in there):
        if line:
            watcher.say(line)
    for key, previous in there.items():
        if previous.status == "running":
            raise UserError(f"{todo[key].label}: another process trains it as run {previous.no}; wait for that, or repeat it with --again")
        if previous.status == "finished":
            watcher.say(f"{todo[key].label}: run {previous.no} has it already, skipped (--again repeats it, in Python again=True)")
    cut_off = _cut_off([previous.home for previous in there.values() if previous.cut_off], ledger, device)
    return Due(jobs, [job for key, job in todo.items() if key not in there], cut_off, there)


def to_resume(ledger: Ledger, device: torch.device, no: int | None = None) -> list[CutOff]:
    """The cohort of a run that was cut off. Default: all such cohorts.

    Raises:
        UserError: that run is not cut off, or something that its numbers depend on has changed since.
    """
    runs = [run for run in ledger.runs() if run.cut_off] if no is None else [ledger.run(no)]
    for run in runs:
        if run.status == "running":
            raise UserError(f"run {run.no} is being trained by another process; there is nothing to resume")
        if not run.cut_off:
            why = f" ({run.error})" if run.error else ""
            raise UserError(f"run {run.no} is {run.status}{why}; only what was cut off can be resumed, to repeat it use --again")
    return _cut_off([run.home for run in runs], ledger, device)


def _cut_off(homes: Iterable[int], ledger: Ledger, device: torch.device) -> list[CutOff]:
    """These cohorts, each once. Their data are read once.

    Raises:
        UserError: as ``recorded``.
    """
    by_home: dict[int, list[Run]] = {home: [] for home in homes}
    for run in ledger.runs():
        if run.home in by_home:
            by_home[run.home].append(run)
    going_on = {home: [run for run in runs if _goes_on(run)] for home, runs in by_home.items()}
    jobs = iter(recorded([run for runs in going_on.values() for run in runs], ledger, device))
    return [
        CutOff(home, runs, [next(jobs) for _ in runs], [(run.fingerprint, run.seed) for run in by_home[home]])
        for home, runs in going_on.items()
    ]


def before(job: Job, ledger: Ledger) -> Run | None:
    """The newest run that finished this job, or else the newest that began it.

    A failed run does not count, nor does a finished one whose files are gone or are not those that it wrote.
    """
    runs = ledger.runs(fingerprint=job.fingerprint, seed=job.config.seed)
    done = [run_ for run_ in runs if run_.status == "finished" and not missing(run_, ledger)]
    ranked = done or [run_ for run_ in runs if run_.status not in ("failed", "finished")]
    return ranked[-1] if ranked else None


def finished(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device) -> list[Run]:
    """The finished runs of these configs, which ``run`` would skip. Nothing is trained.

    Raises:
        UserError: a config can't be run.
    """
    runs = (before(job, ledger) for job in plan(configs, ledger, device))
    return [run_ for run_ in runs if run_ is not None and run_.status == "finished"]


def _lost(job: Job, ledger: Ledger) -> str:
    """Which run finished this job and why that does not count; empty if none did."""
    done = ledger.runs(fingerprint=job.fingerprint, seed=job.config.seed, status="finished")
    return f"run {done[-1].no} finished, but its {missing(done[-1], ledger)}: trained anew" if done else ""


def known(jobs: Sequence[Job], ledger: Ledger) -> dict[tuple[str, int], Run]:
    """The runs that are skipped or gone on with, by key. Of two students that teach each other it has both or none."""
    known = {job.key: run_ for job in jobs if (run_ := before(job, ledger))}
    for job in jobs:
        if job.resolved.mutual:
            pair = [other.key for other in jobs if other.config in (job.config, other_side(job.config))]
            if not known.keys() >= set(pair):
                known = {key: run_ for key, run_ in known.items() if key not in pair}
    return known


def unfinished(home: int, ledger: Ledger) -> list[Run]:
    """The runs of a cohort that are to be gone on with. A student that diverged stays failed."""
    return [run_ for run_ in ledger.runs() if run_.home == home and _goes_on(run_)]


def _goes_on(run: Run) -> bool:
    return run.status not in ("finished", "failed")


def learnt_from(jobs: Iterable[Job], ledger: Ledger) -> set[int]:
    """The runs that these jobs begin with, and those among which a teacher that is named by its model is chosen."""
    numbers: set[int] = set()
    for model, data_hash in {(one.model, job.data_hash) for job in jobs if job.teacher is not None for one in job.teacher.each}:
        numbers |= {run.no for run in ledger.runs(status="finished", method=BASELINE, student=model, data_hash=data_hash)}
    networks = [one for job in jobs for network in (job.student, job.teacher) if network is not None for one in network.each]
    return numbers | {network.run for network in networks if network.run is not None}
