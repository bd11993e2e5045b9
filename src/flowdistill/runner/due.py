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
class Due:
    """A plan, and what of it is to be done.

    Attributes:
        jobs: the whole plan, in order.
        fresh: the jobs that nobody began, each once.
        homes: the cohorts that were cut off, by the run in whose folder their checkpoint lies.
        known: the runs that are skipped or gone on with, by key.
    """

    jobs: Sequence[Job]
    fresh: Sequence[Job]
    homes: Sequence[int]
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
    homes = list(dict.fromkeys(previous.home for previous in there.values() if previous.cut_off))
    for home in homes:
        recorded(unfinished(home, ledger), ledger, device)  # refuses before anything is trained
    return Due(jobs, [job for key, job in todo.items() if key not in there], homes, there)


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
    return [run_ for run_ in ledger.runs() if run_.home == home and run_.status not in ("finished", "failed")]


def learnt_from(jobs: Iterable[Job], ledger: Ledger) -> set[int]:
    """The runs that these jobs begin with, and those among which a teacher that is named by its model is chosen."""
    numbers: set[int] = set()
    for model, data_hash in {(job.teacher.model, job.data_hash) for job in jobs if job.teacher is not None}:
        numbers |= {run.no for run in ledger.runs(status="finished", method=BASELINE, student=model, data_hash=data_hash)}
    networks = [network for job in jobs for network in (job.student, job.teacher) if network is not None]
    return numbers | {network.run for network in networks if network.run is not None}
