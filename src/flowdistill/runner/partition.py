"""The part of a plan that one shard trains: whole seeds, balanced by estimated cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..checks import UserError
from ..ledger.shard_plan import ShardPlan
from ..types import DataSpec
from .job import Job
from .plan import cohorts
from .references import NetworkRef

BACKWARD = 2  # operations of a backward pass for one of the forward pass


def whole(jobs: Iterable[Job], number: int, count: int) -> ShardPlan:
    """The plan of these jobs, as a shard keeps it."""
    return ShardPlan(number, count, tuple((job.label, job.fingerprint, job.config.seed) for job in jobs))


def part(jobs: Sequence[Job], shard: ShardPlan) -> list[Job]:
    """The jobs of a shard, in the order of the plan.

    The students of one seed stay together, because they share batches and teacher. The parts are balanced by estimated cost: the most
    costly seed goes first, always to the shard that has the least so far.

    Raises:
        UserError: the jobs are not those of the shard's plan.
    """
    if apart := shard.difference(whole(jobs, shard.number, shard.count)):
        raise UserError(f"shard {shard.name}: the plan changed since it began ({apart}); name another folder with --runs")
    units = [unit for cohort in cohorts(jobs) for unit in by_seed(cohort)]
    loads = [0] * shard.count
    own: set[tuple[str, int]] = set()
    for cost, unit in sorted(zip(costs(units), units, strict=True), key=lambda weighed: -weighed[0]):
        lightest = loads.index(min(loads))
        loads[lightest] += cost
        if lightest == shard.number - 1:
            own |= {job.key for job in unit}
    return [job for job in jobs if job.key in own]


def by_seed(cohort: Iterable[Job]) -> list[list[Job]]:
    """A cohort in parts that can be trained apart: the students of one seed, who share batches and teacher."""
    seeds: dict[int, list[Job]] = {}
    for job in cohort:
        seeds.setdefault(job.config.seed, []).append(job)
    return list(seeds.values())


def costs(units: Iterable[Sequence[Job]]) -> list[int]:
    """The estimated cost of each unit of jobs, in operations."""
    counting = _Costs()
    return [counting.of(unit) for unit in units]


class _Costs:
    """Estimated costs, equal on every machine: operations of the networks, counted and not timed. What a method adds is not counted."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, DataSpec], int] = {}

    def of(self, unit: Sequence[Job]) -> int:
        """Operations of the students' training, and of each teacher once for each epoch."""
        images = len(unit[0].data.y_train)
        each = [(one, sum(job.phase_epochs)) for job in unit if job.teacher is not None for one in job.teacher.each]
        teachers = {teacher.origin: (teacher, epochs) for teacher, epochs in each}
        students = sum((1 + BACKWARD) * self._forward(job.student, job.data.spec) * sum(job.phase_epochs) for job in unit)
        return images * (students + sum(self._forward(teacher, unit[0].data.spec) * epochs for teacher, epochs in teachers.values()))

    def _forward(self, network: NetworkRef, data: DataSpec) -> int:
        """Operations of one image's forward pass."""
        seen = network.seen(data)
        key = network.model, seen
        if key not in self._counted:
            net = network.build(data).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net(torch.zeros(1, seen.channels, seen.height, seen.width))
            self._counted[key] = max(1, int(counter.get_total_flops()))
        return self._counted[key]
