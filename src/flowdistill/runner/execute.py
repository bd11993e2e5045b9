"""Train cohorts and keep the record: ledger rows, the student's file, its predictions."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch

from ..checks import UserError
from ..config import RunConfig
from ..data.loader import DeviceData, Stream
from ..device import Precision, describe, determinism, peak_memory, reset_peak_memory
from ..env import versions
from ..ledger import Epoch, Ledger, Run, newest
from ..models import Network
from ..training.checkpoint import hash_weights, save_weights, write_whole
from ..training.cohort import Cohort, EpochReport, Lane, Progress, Teacher, first_gradients, seconds_per_epoch, train
from ..training.evaluate import Evaluation, evaluate
from ..training.step import Student
from .networks import STUDENT_FILE
from .plan import Job, cohorts, plan

GRADIENT_LIMIT = 1000.0  # a term whose gradient is larger than this, relative to the task's, diverges


class Watcher:
    """What a caller may want to see of the work; this one is blind. Nothing here may wait for the device."""

    def say(self, line: str) -> None:
        """One line of talk."""

    def begin(self, title: str, steps: int) -> None:
        """A cohort starts."""

    def step(self) -> None:
        """One step of every student is done."""

    def epoch(self, line: str) -> None:
        """An epoch is done."""

    def end(self) -> None:
        """The cohort is done."""


@dataclass
class Member:
    """A student of a cohort with the job it does."""

    job: Job
    student: Student
    teacher_accuracy: float | None = None
    no: int = 0
    last: Progress | None = None
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


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
        prepared = _prepare([job for key, job in todo.items() if key not in done], device)
        for cohort, members in prepared:
            _check_start(cohort, members, watcher)
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
    for cohort, members in _prepare(plan(configs, ledger, device), device):
        ratios = _check_start(cohort, members, Watcher())
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


def _prepare(jobs: Sequence[Job], device: torch.device) -> list[tuple[Cohort, list[Member]]]:
    """Every cohort on the device; those of equal data and split share the images."""
    on_device: dict[object, DeviceData] = {}
    prepared = []
    for group in cohorts(jobs):
        first = group[0]
        key = (first.config.data, first.config.split)
        if key not in on_device:
            on_device[key] = DeviceData(first.data, first.config.split, device)
        prepared.append(_assemble(group, on_device[key], device))
    return prepared


def _assemble(jobs: Sequence[Job], data: DeviceData, device: torch.device) -> tuple[Cohort, list[Member]]:
    """Put teachers and students of one cohort on the device; measure the teachers."""
    first = jobs[0]
    methods = [job.method() for job in jobs]
    taught_taps = tuple(sorted({tap for method in methods for tap in method.needs.teacher}))
    taught = {job.config.seed: job.teacher.origin for job in jobs if job.teacher}
    teachers: dict[str, tuple[Teacher, float]] = {}
    lanes: dict[tuple[int, str], Lane] = {}
    members = []
    for job, method in zip(jobs, methods, strict=True):
        net = job.student.build(data.spec, taps=tuple(sorted(method.needs.student)), seed=job.config.seed)
        student = Student(_placed(net, device), method.to(device), job.settled, job.config.train)
        member = Member(job, student)
        origin = job.teacher.origin if job.teacher else taught.get(job.config.seed, "")
        lane = lanes.setdefault((job.config.seed, origin), Lane(Stream(data, job.config.seed, job.config.train.batch_size), None, []))
        if job.teacher:
            if origin not in teachers:
                teacher = Teacher(_placed(job.teacher.build(data.spec, taps=taught_taps), device))
                teachers[origin] = teacher, _accuracy(teacher.net, data, job.precision)
            lane.teacher, member.teacher_accuracy = teachers[origin]
        lane.students.append(student)
        members.append(member)
    select = first.config.split == "holdout"
    return Cohort(data, list(lanes.values()), first.config.train, first.phase_epochs, first.precision, select), members


def _placed(net: Network, device: torch.device) -> Network:
    return net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _accuracy(net: Network, data: DeviceData, precision: Precision) -> float:
    correct = evaluate(net, data.curve, data.normalise, precision).correct
    return 100 * int(correct) / len(data.curve.labels)


def _check_start(cohort: Cohort, members: Sequence[Member], watcher: Watcher) -> dict[Student, dict[str, float]]:
    """Tell how good the teachers are and how large each term's first gradient is; refuse what would diverge."""
    for line in dict.fromkeys(_told_of_teacher(member) for member in members if member.job.teacher):
        watcher.say(line)
    ratios = first_gradients(cohort)
    for member in members:
        _check_gradients(member, ratios[member.student], watcher)
    return ratios


def _run_cohort(
    cohort: Cohort, members: Sequence[Member], ledger: Ledger, device: torch.device, watcher: Watcher, setup_seconds: float
) -> None:
    reset_peak_memory(device)
    common = {"cohort_size": len(members), "device": describe(device), "setup_seconds": setup_seconds}
    numbers: list[int] = []
    watcher.begin(_title(members), cohort.steps)
    try:
        numbers = ledger.register([_row(member) | common for member in members])
        for member, no in zip(members, numbers, strict=True):
            member.no = no
        for report in train(cohort, watcher.step):
            _record_epoch(report, cohort, members, ledger, watcher)
        for member in members:
            if member.last is not None and not member.last.error:
                _finish(member, cohort, ledger, device)
                watcher.say(_told(ledger.run(member.no)))
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        for no in numbers:
            if ledger.run(no).status == "running":
                ledger.update(no, status=status, error=str(error) or type(error).__name__, finished=_now())
        raise
    finally:
        watcher.end()


def _told_of_teacher(member: Member) -> str:
    teacher, split = member.job.teacher, member.job.config.split
    assert teacher is not None
    on = "test" if split == "full" else "held-out"
    return f"teacher {teacher.model} ({teacher.origin}): {member.teacher_accuracy:.2f} % of the {on} images"


def _check_gradients(member: Member, ratios: Mapping[str, float], watcher: Watcher) -> None:
    weights = member.job.settled.weights
    for term, ratio in ratios.items():
        watcher.say(f"{member.job.label}: gradient of {term} on the first batch {ratio:.3g} x the task's (weight {weights[term]:g})")
        if not math.isfinite(ratio):
            raise UserError(f"{member.job.label}: the gradient of {term} on the first batch is not finite; is the teacher sound?")
        if ratio > GRADIENT_LIMIT:
            cure = weights[term] / ratio * 10
            raise UserError(
                f"{member.job.label}: the gradient of {term} at weight {weights[term]:g} is {ratio:.3g} times the task's; over "
                f"{GRADIENT_LIMIT:g} training diverges; set a lower weight, such as --set weights.{term}={cure:.1g}"
            )


def _title(members: Sequence[Member]) -> str:
    methods = ",".join(dict.fromkeys(member.job.settled.name for member in members))
    seeds = ",".join(str(seed) for seed in dict.fromkeys(member.job.config.seed for member in members))
    return f"{methods} {members[0].job.student.model} {members[0].job.data.name} seed {seeds}"


def _told(run: Run) -> str:
    return (
        f"run {run.no}: {run.method} {run.student} seed {run.seed}: {run.accuracy:.2f} % of {run.images:,} test images "
        f"(epoch {run.epoch} of {run.nepoch}, {run.split} split), {run.train_seconds:.1f} s of training"
    )


def _row(member: Member) -> dict[str, Any]:
    job = member.job
    return {
        "method": job.settled.name,
        "variant": job.settled.variant,
        "dataset": job.data.name,
        "data_hash": job.data_hash,
        "student": job.student.model,
        "student_fingerprint": job.student.fingerprint,
        "teacher": job.teacher.model if job.teacher else "-",
        "teacher_run": job.teacher.run if job.teacher else None,
        "teacher_fingerprint": job.teacher.fingerprint if job.teacher else "",
        "teacher_accuracy": member.teacher_accuracy,
        "seed": job.config.seed,
        "split": job.config.split,
        "fingerprint": job.fingerprint,
        "config": job.config.model_dump(mode="json"),
        "nepoch": sum(job.phase_epochs),
        "lr": job.config.train.lr,
        "batch_size": job.config.train.batch_size,
        "precision": job.precision,
        "engine": "eager",
        "deterministic": int(torch.are_deterministic_algorithms_enabled()),
        "init_hash": job.init_hash,
        "parameters": sum(p.numel() for p in member.student.net.parameters()),
        "versions": versions(),
        "started": _now(),
    }


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def _record_epoch(report: EpochReport, cohort: Cohort, members: Sequence[Member], ledger: Ledger, watcher: Watcher) -> None:
    images = len(cohort.data.curve.labels)
    present = [member for member in members if member.student in report.progress]
    rows = {}
    for member in present:
        progress = report.progress[member.student]
        member.last = progress
        member.train_seconds += report.train_seconds / len(present)
        member.eval_seconds += report.eval_seconds / len(present)
        phase = member.job.settled.phases[report.phase].name
        correct = None if progress.error else progress.correct
        seconds = report.train_seconds + report.eval_seconds
        rows[member.no] = Epoch(report.epoch, phase, progress.lr, progress.terms, correct, images, seconds)
    ledger.add_epochs(rows)
    for member in present:
        if member.last and member.last.error:
            ledger.update(member.no, status="failed", error=member.last.error, finished=_now())
            watcher.say(f"run {member.no}: {member.job.label} {member.last.error}")
    best = max((row.correct for row in rows.values() if row.correct is not None), default=0)
    watcher.epoch(f"epoch {report.epoch}/{sum(cohort.phase_epochs)}, best {100 * best / images:.2f} %")


def _finish(member: Member, cohort: Cohort, ledger: Ledger, device: torch.device) -> None:
    """The shipped weights, measured on test; then the files, then the row."""
    student, job, data = member.student, member.job, cohort.data
    student.restore_chosen()
    last = member.last.evaluation if member.last else None
    final = evaluate(student.net, data.test, data.normalise, cohort.precision) if cohort.select or last is None else last
    weights = student.net.state_dict()
    folder = ledger.run_folder(member.no)
    about = _about(job, data, int(final.correct))
    save_weights(folder / STUDENT_FILE, weights, about)
    write_whole(folder / "predictions.npz", _predictions(final))
    images = cohort.lanes[0].stream.steps * job.config.train.batch_size * sum(job.phase_epochs)
    values: dict[str, Any] = {
        "epoch": student.chosen_epoch,
        "correct": int(final.correct),
        "images": len(data.test.labels),
        "train_seconds": member.train_seconds,
        "eval_seconds": member.eval_seconds,
        "images_per_second": images / member.train_seconds,
        "peak_memory": peak_memory(device),
        "weights_hash": hash_weights(weights),
        "finished": _now(),
    }
    if not cohort.select:
        curve = ledger.epochs(member.no)
        best = max(curve, key=lambda epoch: (epoch.correct or 0, -epoch.epoch))
        values |= {"best_epoch": best.epoch, "best_correct": best.correct}
    record = dataclasses.asdict(ledger.run(member.no)) | values | {"status": "finished", "about": about}
    write_whole(folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())
    ledger.update(member.no, status="finished", **values)


def _about(job: Job, data: DeviceData, correct: int) -> dict[str, Any]:
    """What travels in the student's file: enough to build it, feed it and measure it again."""
    return {
        "model": job.student.model,
        "classes": data.spec.classes,
        "input": [data.spec.channels, data.spec.height, data.spec.width],
        "mean": data.normalisation.mean,
        "std": data.normalisation.std,
        "data": job.config.data.model_dump(mode="json"),
        "data_hash": job.data_hash,
        "split": job.config.split,
        "precision": job.precision,
        "correct": correct,
        "images": len(data.test.labels),
        "init_hash": job.init_hash,
        "fingerprint": job.fingerprint,
        "seed": job.config.seed,
    }


def _predictions(evaluation: Evaluation) -> bytes:
    """``classes`` uint16 [N] and ``probabilities`` float32 [N], the most probable class of every test image, as npz."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        classes=evaluation.classes.cpu().numpy().astype(np.uint16),
        probabilities=evaluation.probabilities.cpu().numpy().astype(np.float32),
    )
    return buffer.getvalue()
