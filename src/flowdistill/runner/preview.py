"""What ``run`` would do, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import RunConfig
from ..device import describe
from ..ledger import Ledger
from ..taps import NetSpec
from ..training.cohort import seconds_per_epoch
from .assemble import Member, check_start, prepare
from .execute import before
from .plan import plan
from .watcher import Watcher


def dry_run(
    configs: Sequence[RunConfig], ledger: Ledger, device: torch.device, engine: str = "auto", workers: int | None = None
) -> list[dict[str, Any]]:
    """For each config what ``run`` would do: resolved, with taps, gradient ratios and an estimate of its time. Writes nothing.

    ``finished_run`` is the run that has it already, which ``run`` would skip.

    Raises:
        UserError: as ``run``.
    """
    found = []
    for cohort, members in prepare(plan(configs, ledger, device), device, engine, workers):
        chosen = cohort.engine
        ratios = check_start(cohort, members, Watcher())
        seconds = seconds_per_epoch(cohort)
        for member in members:
            job = member.job
            done = before(job, ledger)
            found.append(
                {
                    "config": job.config.model_dump(mode="json"),
                    "finished_run": done.no if done and done.status == "finished" else None,
                    "teacher": {"model": job.teacher.model, "run": job.teacher.run, "accuracy": member.teacher_accuracy}
                    if job.teacher
                    else None,
                    "taps": {who: {name: spec.tap(name).shape for name in sorted(taps)} for who, spec, taps in _tapped(member)},
                    "gradient_relative_to_task": ratios[member.student],
                    "device": describe(device),
                    "engine": {"name": chosen.name, "why": chosen.why},
                    "cohort_size": len(members),
                    "cohort_seconds": seconds * sum(job.phase_epochs),
                }
            )
    return found


def _tapped(member: Member) -> list[tuple[str, NetSpec, frozenset[str]]]:
    needs, pairing = member.student.method.needs, member.job.pairing
    taught = [("teacher", pairing.teacher, needs.teacher)] if pairing and needs.teacher else []
    return [("student", member.student.net.spec, needs.student), *taught]
