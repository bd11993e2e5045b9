"""How long training would take, from a few steps of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import RunConfig
from ..data.given_supply import GivenSupply
from ..data.loader import DeviceData, place
from ..data.supply import First
from ..ledger import Ledger
from ..training.cohort import Cohort, first_gradients, seconds_per_epoch
from .assemble import Member, assemble
from .execute import before
from .plan import Job, cohorts, plan


def estimate(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device) -> float:
    """Seconds that ``run`` would take for what the ledger has not. Writes nothing.

    Of every cohort only one run (one seed) of each method is measured, for a few steps and an evaluation batch, and scaled to the number of
    runs: seeds cost the same, and so a deep network is measured on a slow machine within a minute. Finished runs cost nothing, one that
    was cut off its missing epochs; set-up is not counted. Fresh weights stand in for teachers that are named by model and not trained yet.

    Raises:
        UserError: as ``run``, save for such teachers.
    """
    jobs = {job.key: job for job in plan(configs, ledger, device, stand_in=True)}
    missing = {key: _missing_epochs(job, ledger) for key, job in jobs.items()}
    seconds = 0.0
    for group in cohorts([job for key, job in jobs.items() if missing[key]]):
        samples = list({(job.settled.name, job.settled.variant): job for job in reversed(group)}.values())
        seconds += sum(missing[job.key] for job in group) * _epoch_seconds(samples, device) / len(samples)
    return seconds


def _missing_epochs(job: Job, ledger: Ledger) -> int:
    found = before(job, ledger)
    if found is None:
        return sum(job.phase_epochs)
    return 0 if found.status == "finished" else sum(job.phase_epochs) - len(ledger.epochs(found.no))


def _epoch_seconds(jobs: Sequence[Job], device: torch.device) -> float:
    """An epoch of these jobs as one cohort."""
    cohort, _ = unmeasured(jobs, place(jobs[0].data, jobs[0].config.split, device), device)
    first_gradients(cohort)  # what can't be trained is refused
    return seconds_per_epoch(cohort)


def unmeasured(jobs: Sequence[Job], data: DeviceData | GivenSupply, device: torch.device) -> tuple[Cohort, list[Member]]:
    """The jobs as one cohort, its teachers measured on one image alone: all images take long."""
    whole = data.curve
    data.curve = First(whole, 1)
    try:
        return assemble(jobs, data, device)
    finally:
        data.curve = whole
