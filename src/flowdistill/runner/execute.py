"""Train cohorts: what the ledger has not, each student its own run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ..config import RunConfig
from ..device import describe, determinism, reset_peak_memory
from ..ledger import Ledger, Run, newest
from ..models import Network
from ..training.cohort import Cohort, seconds_per_epoch, train
from .assemble import Member, check_start, prepare
from .plan import Job, plan
from .record import finish, now, record_epoch, row, told
from .watcher import Watcher


def run(
    configs: Sequence[RunConfig],
    ledger: Ledger,
    device: torch.device,
    *,
    deterministic: bool = False,
    again: bool = False,
    watcher: Watcher | None = None,
) -> list[Run]:
    """Train what the ledger has not, and return the run of every config, in order; those that diverged are among them, as failed.

    Raises:
        UserError: a config that can't be run; nothing was trained then.
    """
    watcher, started = watcher or Watcher(), time.perf_counter()
    jobs = plan(configs, ledger, device)
    done: dict[tuple[str, int], int] = {}
    todo = {job.key: job for job in jobs}
    for key, job in todo.items():
        finished = _finished(job, ledger)
        if finished and not again:
            done[key] = finished
            watcher.say(f"{job.label}: run {finished} has it already, skipped (--again repeats it)")
    with determinism(deterministic):
        prepared = prepare([job for key, job in todo.items() if key not in done], device)
        for cohort, members in prepared:
            check_start(cohort, members, watcher)
        for cohort, members in prepared:
            _run_cohort(cohort, members, ledger, device, watcher, time.perf_counter() - started)
            done |= {member.job.key: member.no for member in members}
            started = time.perf_counter()
    return [ledger.run(done[job.key]) for job in jobs]


def _finished(job: Job, ledger: Ledger) -> int | None:
    """The run that did this job, if any."""
    found = newest(ledger.runs(status="finished", fingerprint=job.fingerprint, seed=job.config.seed))
    return found[0].no if found else None


def dry_run(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device) -> list[dict[str, Any]]:
    """For each config what ``run`` would do: resolved, with taps, gradient ratios and an estimate of its time. Writes nothing.

    ``finished_run`` is the run that has it already, which ``run`` would skip.

    Raises:
        UserError: as ``run``.
    """
    found = []
    for cohort, members in prepare(plan(configs, ledger, device), device):
        ratios = check_start(cohort, members, Watcher())
        seconds = seconds_per_epoch(cohort)
        for member in members:
            job = member.job
            needs = member.student.method.needs
            found.append(
                {
                    "config": job.config.model_dump(mode="json"),
                    "finished_run": _finished(job, ledger),
                    "teacher": {"model": job.teacher.model, "run": job.teacher.run, "accuracy": member.teacher_accuracy}
                    if job.teacher
                    else None,
                    "taps": {
                        who: {name: net.spec.tap(name).shape for name in sorted(taps)} for who, net, taps in _tapped(member, cohort, needs)
                    },
                    "gradient_relative_to_task": ratios[member.student],
                    "device": describe(device),
                    "cohort_size": len(members),
                    "cohort_seconds": seconds * sum(job.phase_epochs),
                }
            )
    return found


def _tapped(member: Member, cohort: Cohort, needs: Any) -> list[tuple[str, Network, frozenset[str]]]:
    lane = next(lane for lane in cohort.lanes if member.student in lane.students)
    taught = [("teacher", lane.teacher.net, needs.teacher)] if lane.teacher and needs.teacher else []
    return [("student", member.student.net, needs.student), *taught]


def _run_cohort(
    cohort: Cohort, members: Sequence[Member], ledger: Ledger, device: torch.device, watcher: Watcher, setup_seconds: float
) -> None:
    reset_peak_memory(device)
    common = {"cohort_size": len(members), "device": describe(device), "setup_seconds": setup_seconds}
    numbers: list[int] = []
    watcher.begin(_title(members), cohort.steps)
    try:
        numbers = ledger.register([row(member) | common for member in members])
        for member, no in zip(members, numbers, strict=True):
            member.no = no
        for report in train(cohort, watcher.step):
            record_epoch(report, cohort, members, ledger, watcher)
        for member in members:
            if member.last is not None and not member.last.error:
                finish(member, cohort, ledger, device)
                watcher.say(told(ledger.run(member.no)))
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        for no in numbers:
            if ledger.run(no).status == "running":
                ledger.update(no, status=status, error=str(error) or type(error).__name__, finished=now())
        raise
    finally:
        watcher.end()


def _title(members: Sequence[Member]) -> str:
    methods = ",".join(dict.fromkeys(member.job.settled.name for member in members))
    seeds = ",".join(str(seed) for seed in dict.fromkeys(member.job.config.seed for member in members))
    return f"{methods} {members[0].job.student.model} {members[0].job.data.name} seed {seeds}"
