"""From configs to jobs: everything resolved, checked and fingerprinted before any training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import methods, models
from ..checks import UserError
from ..config import DataConfig, RunConfig
from ..data.sources import ImageData, load
from ..device import Precision, resolve_precision
from ..ledger import Ledger
from ..methods import Method, Settled
from ..randomness import seeded
from ..training.weights import hash_weights
from .networks import NetworkRef, Wanted, choose_teacher, refuse_contaminated, resolve


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        config: with every default filled in.
        init_hash: of the student's initial weights.
        fingerprint: what the run's numbers depend on, without the seed.
    """

    config: RunConfig
    data: ImageData
    data_hash: str
    settled: Settled
    student: NetworkRef
    teacher: NetworkRef | None
    precision: Precision
    init_hash: str
    fingerprint: str

    @property
    def phase_epochs(self) -> tuple[int, ...]:
        """Epochs of each phase."""
        return tuple(phase.epochs or self.config.train.epochs for phase in self.settled.phases)

    @property
    def key(self) -> tuple[str, int]:
        """Two jobs with one key would give one and the same student."""
        return self.fingerprint, self.config.seed

    @property
    def label(self) -> str:
        """As messages name it."""
        pair = f"{self.student.model} <- {self.teacher.model}" if self.teacher else self.student.model
        return f"{self.settled.name} {pair} seed {self.config.seed}"

    def method(self) -> Method:
        """The method's module, its adapters drawn from the seed.

        Raises:
            UserError: student and teacher can't be paired.
        """
        spec = self.data.spec
        try:
            with seeded(self.config.seed, "adapters"):
                return methods.build(
                    self.settled,
                    student=models.spec(self.student.model, spec),
                    teacher=models.spec(self.teacher.model, spec) if self.teacher else None,
                    data=spec,
                )
        except ValueError as error:
            raise UserError(str(error)) from None


def plan(configs: Iterable[RunConfig], ledger: Ledger, device: torch.device) -> list[Job]:
    """Resolve every config; nothing is trained or written.

    Raises:
        UserError: the first config that can't be run.
    """
    configs = list(configs)
    for config in configs:  # what is cheap to refuse comes before the data, which may have to be downloaded
        methods.settle(config.method, config.options, config.weights)
    for student in {config.student for config in configs}:
        resolve(student, ledger)
    loaded: dict[DataConfig, tuple[ImageData, str]] = {}
    jobs = []
    for config in configs:
        if config.data not in loaded:
            data = load(config.data)
            loaded[config.data] = data, data.hash()
        jobs.append(_job(config, *loaded[config.data], ledger, device))
    return jobs


def _job(config: RunConfig, data: ImageData, data_hash: str, ledger: Ledger, device: torch.device) -> Job:
    settled = methods.settle(config.method, config.options, config.weights)
    if settled.uses_teacher and config.teacher is None:
        raise UserError(f"method {settled.name!r} needs a teacher: --teacher MODEL, RUN or FILE")
    student = resolve(config.student, ledger)
    refuse_contaminated(student, config.split, data_hash)
    init_hash = hash_weights(student.build(data.spec, seed=config.seed).state_dict())
    precision = resolve_precision(config.train.precision, device)
    train = config.train.model_copy(update={"precision": precision})
    teacher = None
    if settled.uses_teacher and config.teacher is not None:
        recipe = train.model_dump(mode="json")
        wanted = Wanted(config.data.name, data_hash, config.split, config.seed, init_hash, recipe, str(ledger.folder))
        teacher = choose_teacher(config.teacher, wanted, ledger)
    resolved = config.model_copy(
        update={
            "method": settled.name,
            "teacher": config.teacher if settled.uses_teacher else None,
            "data": config.data.model_copy(update={"pad": data.pad, "flip": data.flip}),
            "train": train,
            "options": {name: options.model_dump() for name, options in settled.options.items()},
            "weights": settled.weights,
        }
    )
    fingerprint = _fingerprint(resolved, settled, student, teacher, data_hash)
    job = Job(resolved, data, data_hash, settled, student, teacher, precision, init_hash, fingerprint)
    job.method()  # refuses a pair that can't work
    return job


def _fingerprint(config: RunConfig, settled: Settled, student: NetworkRef, teacher: NetworkRef | None, data_hash: str) -> str:
    covered: dict[str, Any] = {
        "student": [student.model, student.fingerprint],
        "teacher": [teacher.model, teacher.fingerprint] if teacher else None,
        "data": [data_hash, config.data.pad, config.data.flip],
        "method": settled.versions,
        "options": config.options,
        "weights": config.weights,
        "train": config.train.model_dump(),
        "split": config.split,
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def cohorts(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can be trained together: equal data, split, recipe, precision, phase boundaries, and teacher model or none."""
    shared = [(job.data_hash, job.config.data, job.config.split, job.config.train, job.phase_epochs) for job in jobs]
    taught_by = {key: job.teacher.model for key, job in zip(shared, jobs, strict=True) if job.teacher}
    groups: dict[object, list[Job]] = {}
    for key, job in zip(shared, jobs, strict=True):
        groups.setdefault((key, job.teacher.model if job.teacher else taught_by.get(key)), []).append(job)
    return list(groups.values())
