"""How long training would take, from a few steps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from ..config import RunConfig
from ..data.batches import to_device
from ..data.interfaces import First, Supply
from ..device import computing
from ..ledger import Ledger
from ..training.cohort import Cohort
from ..training.gradients import first_gradients
from ..training.timing import seconds_per_epoch
from .cohorts import Member, assemble
from .due import before
from .job import Job
from .plan import cohorts, plan


def by(engine: str, precision: str) -> frozenset[str]:
    """An engine and a precision as ``Duration.how`` has them."""
    return frozenset({f"{engine} engine, {precision}"})


PLAINLY = by("eager", "fp32")


@dataclass(frozen=True)
class Duration:
    """How long training takes, set-up not counted.

    Attributes:
        seconds: as ``run`` would train.
        plainly: seconds by the eager engine in fp32, which compiles nothing and rounds least.
        how: the engines and precisions by which ``run`` would train.
    """

    seconds: float = 0.0
    plainly: float = 0.0
    how: frozenset[str] = frozenset()

    def __add__(self, other: Duration) -> Duration:
        return Duration(self.seconds + other.seconds, self.plainly + other.plainly, self.how | other.how)

    def __mul__(self, factor: float) -> Duration:
        return replace(self, seconds=self.seconds * factor, plainly=self.plainly * factor)

    def __str__(self) -> str:
        """Both times, the second if it is another: ``4:10:00 by compiled engine, bf16; 8:35:00 by eager engine, fp32``."""
        if not self.how:
            return _clock(self.seconds)
        as_run = f"{_clock(self.seconds)} by {' and '.join(sorted(self.how))}"
        return as_run if self.how == PLAINLY else f"{as_run}; {_clock(self.plainly)} by {' and '.join(PLAINLY)}"


def estimate(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device) -> Duration:
    """How long ``run`` would take for what the ledger lacks. Writes nothing.

    Of every cohort only one run (one seed) of each method is measured, for a few steps and an evaluation batch, and scaled to the number of
    runs: seeds cost the same. A finished run costs nothing, one that was cut off its missing epochs. Set-up is not counted. If training
    would be compiled, this compiles too, which takes a minute or more for a deep network; training finds the kernels again. Fresh
    weights stand in for teachers that are named by model and not trained yet.

    Raises:
        UserError: as ``run``, but not for such teachers.
    """
    jobs = {job.key: job for job in plan(configs, ledger, device, stand_in=True)}
    missing = {key: _missing_epochs(job, ledger) for key, job in jobs.items()}
    total = Duration()
    with computing(device):
        for group in cohorts([job for key, job in jobs.items() if missing[key]]):
            samples = list({(job.resolved.name, job.resolved.variant): job for job in reversed(group)}.values())
            epochs = sum(missing[job.key] for job in group)
            total += _epoch(samples, device) * (epochs / len(samples))
    return total


def _missing_epochs(job: Job, ledger: Ledger) -> int:
    run = before(job, ledger)
    if run is None:
        return sum(job.phase_epochs)
    return 0 if run.status == "finished" else sum(job.phase_epochs) - len(ledger.epochs(run.no))


def _epoch(jobs: Sequence[Job], device: torch.device) -> Duration:
    """Measure an epoch of these jobs as one cohort."""
    cohort, members = unmeasured(jobs, to_device(jobs[0].data, jobs[0].config.split, device), device)
    first_gradients(cohort)  # what can't be trained is refused
    return epoch_of(cohort, members)


def epoch_of(cohort: Cohort, members: Sequence[Member]) -> Duration:
    """Measure an epoch of a cohort. This changes its students' weights."""
    seconds = seconds_per_epoch(cohort)
    how = by(cohort.engine.name, cohort.precision)
    if how == PLAINLY:
        return Duration(seconds, seconds, how)
    jobs = [member.job.in_precision("fp32") for member in members]
    plain, _ = unmeasured(jobs, cohort.data, cohort.data.device, "eager")
    return Duration(seconds, seconds_per_epoch(plain), how)


def unmeasured(jobs: Sequence[Job], data: Supply, device: torch.device, engine: str = "auto") -> tuple[Cohort, list[Member]]:
    """The jobs as one cohort, whose teachers are measured on one image alone, since all images take long."""
    whole = data.epoch_images
    data.epoch_images = First(whole, 1)
    try:
        return assemble(jobs, data, device, engine)
    finally:
        data.epoch_images = whole


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
