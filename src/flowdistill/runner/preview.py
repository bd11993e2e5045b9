"""What ``run`` would do, before it does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..config import RunConfig, TrainConfig
from ..device import computing, describe
from ..ledger import Ledger
from ..ledger.shard_plan import ShardPlan
from ..ranks import launched
from ..training.cohort import Cohort
from ..types import NetSpec
from .cohorts import Member, check_start, prepare
from .due import before
from .estimate import Duration, by, epoch_of
from .partition import part
from .plan import plan
from .watcher import Watcher


def dry_run(
    configs: Sequence[RunConfig],
    ledger: Ledger,
    device: torch.device,
    engine: str = "auto",
    workers: int | None = None,
    shard: ShardPlan | None = None,
) -> list[dict[str, Any]]:
    """For each config what ``run`` would do: resolved, with taps, gradient ratios and an estimate of its time. Writes nothing.

    ``finished_run`` is the run that has it already, which ``run`` would skip.

    Raises:
        UserError: as ``run``.
    """
    with computing(device):
        jobs = plan(configs, ledger, device)
        prepared = prepare(jobs if shard is None else part(jobs, shard), device, engine, workers)
        return [preview for cohort, members in prepared for preview in _of_cohort(cohort, members, ledger, device)]


def duration(previews: Sequence[Mapping[str, Any]]) -> Duration:
    """How long these runs take. Each has its share of its cohort's time."""
    total = Duration()
    for preview in previews:
        how = by(preview["engine"]["name"], preview["config"]["train"]["precision"])
        total += Duration(preview["cohort_seconds"], preview["cohort_seconds_eager_fp32"], how) * (1 / preview["cohort_size"])
    return total


def _of_cohort(cohort: Cohort, members: Sequence[Member], ledger: Ledger, device: torch.device) -> Iterator[dict[str, Any]]:
    ratios = check_start(cohort, members, Watcher())
    epoch = epoch_of(cohort, members)
    for member in members:
        job = member.job
        previous = before(job, ledger)
        teacher = (
            {"model": job.teacher.model, "run": job.teacher.run, "accuracy": member.teacher.accuracy}
            if job.teacher and member.teacher
            else None
        )
        yield {
            "config": job.config.model_dump(mode="json"),
            "finished_run": previous.no if previous and previous.status == "finished" else None,
            "teacher": teacher,
            "taps": {role: {name: spec.tap(name).shape for name in sorted(taps)} for role, spec, taps in _tapped(member)},
            "gradient_relative_to_task" if member.student.has_classifier else "gradient": ratios[member.student],
            **_parts(job.config.train),
            "device": describe(device),
            "engine": {"name": cohort.engine.name, "why": cohort.engine.why},
            "cohort_size": len(members),
            "cohort_seconds": epoch.seconds * cohort.epochs,
            "cohort_seconds_eager_fp32": epoch.plainly * cohort.epochs,
        }


def _parts(train: TrainConfig) -> dict[str, str]:
    """How a batch is computed, if not at once."""
    if train.accumulate == 1:
        return {}
    share = train.batch_size // launched().world // train.accumulate
    return {"batch": f"{train.batch_size} images, in parts of {share} one after the other"}


def _tapped(member: Member) -> list[tuple[str, NetSpec, frozenset[str]]]:
    needs, pairing = member.student.method.needs, member.job.pairing
    teacher_taps = [("teacher", pairing.teacher, needs.teacher)] if pairing and needs.teacher else []
    return [("student", member.student.net.spec, needs.student), *teacher_taps]
