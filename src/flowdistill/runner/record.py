"""What stays of a run: its row and curve in the ledger, the student's file, its predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import torch

from ..data.interfaces import Supply
from ..device import describe, peak_memory
from ..env import processor
from ..ledger import JOURNAL, LOCAL, PREDICTIONS, PROBE_FILE, STUDENT_FILE, Epoch, Ledger, Run
from ..metrics import Kept, packed
from ..models import Network
from ..models.input_adapter import InputSpec
from ..ranks import current
from ..training.cohort import Cohort, EpochReport
from ..training.evaluate import evaluate
from ..training.student_file import InputImages, StudentMetadata
from ..training.weights import hash_weights, save_weights, write_whole
from .cohorts import Member
from .integrity import listed, made_with, write_record
from .job import Job
from .several import SHARE, roles
from .watcher import Report, Watcher


def row(member: Member) -> dict[str, Any]:
    """What is known of a run when it begins, by column."""
    job = member.job
    return {
        "method": job.resolved.name,
        "variant": job.variant,
        "dataset": job.data.name,
        "data_hash": job.data_hash,
        "student": job.student.model,
        "student_fingerprint": job.student.fingerprint,
        "teacher": job.teacher.model if job.teacher else "-",
        "teacher_run": job.teacher.run if job.teacher else None,
        "teacher_fingerprint": job.teacher.fingerprint if job.teacher else "",
        "teacher_accuracy": member.teacher.accuracy if member.teacher else None,
        "seed": job.config.seed,
        "split": job.config.split,
        "fingerprint": job.fingerprint,
        "config": job.config.model_dump(mode="json"),
        "nepoch": sum(job.phase_epochs),
        "lr": job.config.train.lr,
        "batch_size": job.config.train.batch_size,
        "precision": job.precision,
        "deterministic": int(torch.are_deterministic_algorithms_enabled()),
        "init_hash": job.init_hash,
        "networks": _networks(member),
        "parameters": sum(p.numel() for p in member.student.net.parameters()),
        "started": now(),
    }


def _networks(member: Member) -> dict[str, Any]:
    """What its networks are, by role; of several teachers with the share of each in the mean of their logits."""
    shares = member.teacher.shares if member.teacher else ()
    of_teachers = {role: {SHARE: share} for role, share in zip(roles(len(shares)), shares, strict=True)} if shares else {}
    return {role: network.record | of_teachers.get(role, {}) for role, network in member.job.networks.items()}


def of_ranks(job: Job) -> dict[str, str]:
    """What a run's record says of the processes with which it begins, and how they normalise batches; empty where there is one."""
    if not current().several:
        return {}
    together = "synchronised" if job.config.train.batch_norm == "synchronised" else "none"
    return {"ranks": str(current().world), "batch_normalisation": LOCAL if job.ranks > 1 else together}


def now() -> str:
    """Local time, to the second."""
    return datetime.now().isoformat(timespec="seconds")


def record_epoch(report: EpochReport, cohort: Cohort, members: Sequence[Member], ledger: Ledger, watcher: Watcher) -> list[Report]:
    """An epoch of every student, in one transaction; those that diverged are failed. What is to be reported of it."""
    images = len(cohort.data.epoch_images)
    present = [member for member in members if member.student in report.progress]
    rows = {}
    for member in present:
        progress = report.progress[member.student]
        member.last = progress
        member.setup_seconds += report.setup_seconds / len(present)
        member.train_seconds += report.train_seconds / len(present)
        member.eval_seconds += report.eval_seconds / len(present)
        phase = member.job.resolved.phases[report.phase].name
        correct = None if progress.error or not images else progress.correct
        seconds = report.train_seconds + report.eval_seconds
        rows[member.no] = Epoch(report.epoch, phase, progress.lr, progress.terms, correct, images, seconds)
    ledger.add_epochs(rows)
    for member in present:
        if member.last and member.last.error:
            ledger.update(member.no, status="failed", error=member.last.error, finished=now())
            watcher.say(f"run {member.no}: {member.job.label} {member.last.error}")
    best = max((row.correct for row in rows.values() if row.correct is not None), default=0)
    watcher.epoch(f"epoch {report.epoch}/{cohort.epochs}" + (f", best {100 * best / images:.2f} %" if images else ""))
    return [reported(no, row, cohort.epochs) for no, row in rows.items()]


def reported(no: int, row: Epoch, epochs: int) -> Report:
    """An epoch of run ``no``, which has ``epochs`` of them, as it is reported."""
    accuracy = None if row.correct is None else 100 * row.correct / row.images
    return Report(no, row.epoch, epochs, row.phase, row.lr, row.terms, accuracy, row.seconds)


def finish(member: Member, cohort: Cohort, ledger: Ledger, device: torch.device) -> None:
    """The shipped weights, measured on test, and on the held-out images if they were chosen by those; then the files, then the row."""
    student, job, data = member.student, member.job, cohort.data
    student.restore_chosen()
    kept = _answers(member, cohort) if student.has_classifier else None
    weights = student.net.state_dict()
    folder = ledger.run_folder(member.no)
    about = metadata_of(job, student.net, data, kept.test.figures.correct if kept else None, device).record
    save_weights(folder / STUDENT_FILE, weights, about, make_folder=False)
    files = [STUDENT_FILE, JOURNAL]
    if kept is not None:
        write_whole(folder / PREDICTIONS, packed(kept), make_folder=False)
        files.insert(1, PREDICTIONS)
    if member.teacher and member.teacher.probe:
        save_weights(folder / PROBE_FILE, member.teacher.probe, {"accuracy": member.teacher.accuracy}, make_folder=False)
        files.append(PROBE_FILE)
    trained = cohort.trained(student)
    images = cohort.seed_groups[0].batches.steps * job.config.train.batch_size * trained
    patience = job.config.train.patience
    values: dict[str, Any] = {
        "error": f"stopped early at epoch {trained} of {cohort.epochs} (patience {patience})" if trained < cohort.epochs else "",
        "epoch": student.chosen_epoch,
        **(kept.test.figures._asdict() if kept else {}),
        "train_seconds": member.train_seconds,
        "eval_seconds": member.eval_seconds,
        "images_per_second": images / member.train_seconds,
        "engine": cohort.engine.of(student),
        "setup_seconds": (ledger.run(member.no).setup_seconds or 0.0) + member.setup_seconds,
        "peak_memory": peak_memory(device),
        "weights_hash": hash_weights(weights),
        "finished": now(),
    }
    if not cohort.select:
        curve = ledger.epochs(member.no)
        best = max(curve, key=lambda epoch: (epoch.correct or 0, -epoch.epoch))
        values |= {"best_epoch": best.epoch if kept else student.chosen_epoch, "best_correct": best.correct}
    record = dataclasses.asdict(ledger.run(member.no)) | values | {"status": "finished", "about": about}
    record |= {"files": listed(folder, files)}
    del record["record_hash"]
    ledger.write_record(member.no, lambda: write_record(folder, record), status="finished", **values)


def _answers(member: Member, cohort: Cohort) -> Kept:
    """What the shipped student answers to the test images and, if it was chosen by them, to the held-out ones."""
    student, data = member.student, cohort.data
    last = member.last.evaluation if member.last else None
    final = evaluate(student.net, data.test, cohort.precision) if cohort.select or last is None else last
    held_out = evaluate(student.net, data.epoch_images, cohort.precision) if cohort.select else None
    return Kept(final.answers(data.spec.classes), held_out.answers(data.spec.classes) if held_out else None)


def told(run: Run) -> str:
    """A finished run in one line."""
    figures = "a backbone without a classifier" if run.accuracy is None else f"{run.accuracy:.2f} % of {run.images:,} test images"
    return (
        f"run {run.no}: {run.method} {run.student} seed {run.seed}: {figures} "
        f"in {run.precision} (epoch {run.epoch} of {run.nepoch}, {run.split} split), {run.train_seconds:.1f} s of training"
        f"{f'; {run.error}' if run.error else ''}"
    )


def metadata_of(job: Job, net: Network, data: Supply, correct: int | None, device: torch.device) -> StudentMetadata:
    """What travels in the student's file."""
    adapter = net.input_adapter
    metadata = StudentMetadata(
        model=job.shipped_model,
        classes=data.spec.classes,
        labels=job.data.class_names,
        input=(data.spec.channels, data.spec.height, data.spec.width),
        mean=data.normalisation.mean,
        std=data.normalisation.std,
        data=job.config.data.without_unlabelled,
        data_hash=job.data_hash,
        split=job.config.split,
        precision=job.precision,
        correct=correct,
        images=len(data.test),
        init_hash=job.init_hash,
        fingerprint=job.fingerprint,
        seed=job.config.seed,
        front=None if adapter is None else _images_of(adapter.target),
        device=describe(device),
        processor=processor(),
    )
    return metadata.model_copy(update={"network": made_with(job.shipped_model, metadata.sizes, net.state_dict())})


def _images_of(spec: InputSpec) -> InputImages:
    """The images that the network itself takes, where they are not the data's."""
    return InputImages(input=(spec.channels, spec.height, spec.width), mean=spec.mean, std=spec.std, interpolation=spec.interpolation)
