"""A plan in parts: each shard trains its own part into a ledger of its own, without talking to the others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..checks import Changes, UserError
from ..config import RunConfig
from ..ledger import Ledger, Run, merge, shard_plan
from ..ledger.shard_plan import ShardPlan
from .due import before, learnt_from
from .partition import part, whole
from .plan import plan

SLURM = "slurm"


def parse(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """``2/5``, or ``slurm`` for the task of a Slurm job array -> the number of a shard, from 1, and how many there are.

    Raises:
        UserError: it is neither, or there is no such shard.
    """
    if text == SLURM:
        return _within(text, *_of_array(environment))
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if not numbers:
        raise UserError(f"--shard {text!r} is no shard; write NUMBER/COUNT such as 1/5, or {SLURM} in a job array")
    return _within(text, int(numbers[1]), int(numbers[2]))


def _within(text: str, number: int, count: int) -> tuple[int, int]:
    if not 1 <= number <= count:
        allowed = f"give one of 1/{count} to {count}/{count}" if count else "give one such as 1/5"
        raise UserError(f"--shard {text}: there is no shard {number} of {count}; {allowed}")
    return number, count


def _of_array(environment: Mapping[str, str]) -> tuple[int, int]:
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT")]
    values = {name: environment.get(name, "1" if name.endswith("STEP") else "") for name in names}
    if absent := [name for name, value in values.items() if not re.fullmatch(r"\d{1,9}", value, re.ASCII)]:
        cure = "start this as a job array (sbatch --array=1-5), or give --shard NUMBER/COUNT"
        raise UserError(f"--shard {SLURM}: {absent[0]} is not set to a number; {cure}")
    task, first, step, count = map(int, values.values())
    return (task - first) // max(step, 1) + 1, count


def planned(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device, number: int, count: int) -> ShardPlan:
    """The whole plan of these configs, of which a shard has a part. Nothing is written.

    Raises:
        UserError: a config can't be run, or shards of another plan, or of another number of shards, lie below the ledger.
    """
    own = whole(plan(configs, ledger, device), number, count)
    for beside in sorted((ledger.folder / shard_plan.FOLDER).glob("*-of-*")):
        if (other := shard_plan.read(beside)) and (apart := other.difference(own)):
            raise UserError(
                f"--shard {own.name}: the plan changed since shard {other.name} ran in {beside} ({apart}); give the command that shard "
                f"was given, or merge and remove {ledger.folder / shard_plan.FOLDER}, or name another folder with --runs"
            )
    return own


def folder(runs: Path, number: int, count: int) -> Path:
    """The folder of a shard's ledger."""
    return runs / shard_plan.FOLDER / f"{number}-of-{count}"


def opened(configs: Sequence[RunConfig], runs: Path, device: torch.device, shard: ShardPlan, changes: Changes) -> Ledger:
    """The ledger of a shard. A new one gets the runs that the plan learns from, and those that the shard need not train any more.

    Raises:
        UserError: it can't be made.
    """
    own = Ledger(folder(runs, shard.number, shard.count), create=True, changes=changes)
    own.refuse_unwritable()
    if not own.count():
        source = Ledger(runs, create=True, changes=changes)
        jobs = plan(configs, source, device)
        done = [run for job in part(jobs, shard) if (run := before(job, source)) is not None and run.status == "finished"]
        shard.write(own.folder)  # first: a shard that has runs has a plan, whenever it was killed
        merge.bring({*learnt_from(jobs, source), *(run.no for run in done)}, source, own)
    return own


def told(shard: ShardPlan, done: Sequence[Run]) -> str:
    """What a shard had of the plan, in a phrase."""
    return f"shard {shard.name}: {len(done)} of the {len(shard.runs)} runs of the plan"
