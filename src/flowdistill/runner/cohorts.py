"""Jobs on the device: a cohort's students, its teachers measured, and what its first batch tells before training."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import advice, models
from ..checks import UserError
from ..data.batches import to_device
from ..data.interfaces import Supply
from ..data.normalisation import Normalisation
from ..device import Precision, keep_freed_memory
from ..methods import Needs
from ..models import Network
from ..models.joined import Joined
from ..training import linear_probe
from ..training.cohort import Cohort, Progress
from ..training.engine_choice import choose
from ..training.evaluate import evaluate
from ..training.gradients import first_gradients
from ..training.joining import Agreement, agreement, chosen_shares
from ..training.method_context import gather
from ..training.student import SeedGroup, Student
from ..training.task import TASK
from ..training.teacher import Teacher
from ..types import MethodContext
from .job import Job, other_side, weights_seed
from .pairing import compared
from .plan import cohorts
from .references import NetworkRef
from .several import Several
from .watcher import Watcher

NO_TASK = "no image has a label: there is no task and no accuracy, and what is trained is a backbone without a classifier"
GRADIENT_LIMIT = 1000.0  # a term whose gradient is larger than this, relative to the task's, diverges
LOUD, FAINT = 10.0, 0.01  # over, the task is hardly heard; under, the term does next to nothing


@dataclass
class Member:
    """A student of a cohort with the job it does."""

    job: Job
    student: Student
    teacher: Taught | None = None
    no: int = 0
    last: Progress | None = None
    setup_seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


class Taught(NamedTuple):
    """A teacher on the device, and what was measured of it.

    Attributes:
        accuracy: percent of the images that students are measured on after each epoch; None if it has other classes than these.
        context: what it tells methods before training.
        probe: weights of the probes that were fitted for it, by name; empty without one.
        shares: of several teachers, each one's share in the mean of their logits; else empty.
        agreement: of several teachers, if their accuracy could be measured.
    """

    teacher: Teacher
    accuracy: float | None
    context: MethodContext
    probe: Mapping[str, Tensor]
    shares: tuple[float, ...] = ()
    agreement: Agreement | None = None


def prepare(
    jobs: Sequence[Job], device: torch.device, engine: str = "auto", workers: int | None = None
) -> list[tuple[Cohort, list[Member]]]:
    """Put every cohort on the device. Those of equal data and split share the images. ``workers`` processes decode streamed images."""
    on_device: dict[object, Supply] = {}
    prepared = []
    for group in cohorts(jobs):
        first = group[0]
        key = (first.config.data, first.config.split)
        if key not in on_device:
            on_device[key] = to_device(first.data, first.config.split, device, workers)
        prepared.append(assemble(group, on_device[key], device, engine))
    return prepared


def assemble(jobs: Sequence[Job], data: Supply, device: torch.device, engine: str = "auto") -> tuple[Cohort, list[Member]]:
    """Put teachers and students of one cohort on the device; measure the teachers."""
    keep_freed_memory()
    first = jobs[0]
    methods = [job.method() for job in jobs]
    needs = functools.reduce(operator.or_, (method.needs for method in methods))
    teacher_of_seed = {job.config.seed: job.teacher.origin for job in jobs if job.teacher}
    teachers: dict[str, Taught] = {}
    seed_groups: dict[tuple[int, str], SeedGroup] = {}
    members = []
    for job, method in zip(jobs, methods, strict=True):
        net = _network(job, tuple(sorted(method.needs.student)), data.normalisation).on(device)
        student = Student(net, method.to(device), job.resolved, job.config.train)
        member = Member(job, student)
        origin = job.teacher.origin if job.teacher else teacher_of_seed.get(job.config.seed, "")
        batches = data.seed_batches(job.config.seed, job.config.train)
        seed_group = seed_groups.setdefault((job.config.seed, origin), SeedGroup(batches, None, []))
        if job.teacher:
            if origin not in teachers:
                teachers[origin] = _taught(job, job.teacher, needs, data, device)
            member.teacher = teachers[origin]
            seed_group.teacher = member.teacher.teacher
            student.method.setup(member.teacher.context)
        seed_group.students.append(student)
        members.append(member)
    for member in members:
        if member.job.resolved.mutual:
            other = other_side(member.job.config)
            member.student.peers = tuple(peer.student for peer in members if peer.job.config == other)
    select = first.config.split == "holdout"
    groups = list(seed_groups.values())
    _refuse_long_warm_up(first, groups[0].batches.steps)
    pixels = sum(first.phase_epochs) * groups[0].batches.steps * groups[0].batches.batch_size * data.spec.height * data.spec.width
    chosen = choose(
        engine,
        device,
        first.precision,
        pixels=pixels,
        resident=data.resident,
        synchronised=first.config.train.batch_norm == "synchronised",
        optimizer=first.config.train.optimizer,
    )
    return Cohort(data, groups, first.config.train, first.phase_epochs, chosen, select), members


def _taught(job: Job, teacher: NetworkRef, needs: Needs, data: Supply, device: torch.device) -> Taught:
    """A teacher on the device, its probes fitted, the shares of several chosen, and its accuracy measured."""
    spec = job.pairing.teacher if job.pairing else None
    net = teacher.build(data.spec, taps=tuple(sorted(needs.teacher)), spec=spec, given=data.normalisation).on(device).eval()
    probe = linear_probe.fit_all(net, data, job.precision)
    other_classes, shares, agreed = teacher.other_classes(job.data), (), None
    if isinstance(net, Joined):
        if isinstance(teacher, Several) and teacher.shares is None and not other_classes:
            net.shares.copy_(torch.tensor(chosen_shares(net, data.epoch_images, job.precision)))
        shares = tuple(net.shares.tolist())
        agreed = None if other_classes else agreement(net, data.epoch_images, job.precision)
    accuracy = None if other_classes else _accuracy(net, data, job.precision)
    context = gather(needs, net, data, job.precision)
    return Taught(Teacher(net, needs, job.precision), accuracy, context, probe, shares, agreed)


def _refuse_long_warm_up(job: Job, steps: int) -> None:
    """Refuse a warm-up that no step comes after.

    Raises:
        UserError: a phase has no more steps than its warm-up.
    """
    warm_up, phases = job.config.train.warmup_steps, zip(job.phase_epochs, job.resolved.phases, strict=True)
    shortest = min((epochs * steps for epochs, phase in phases if not phase.milestones), default=warm_up + 1)
    if warm_up >= shortest:
        raise UserError(f"train.warmup_steps={warm_up} leaves nothing of {shortest:,} steps ({steps:,} an epoch); set it lower")


def _network(job: Job, taps: tuple[str, ...], normalisation: Normalisation) -> Network:
    """The network that a job trains: its student, or what its method builds of student and teacher."""
    spec, seed = job.data.spec, weights_seed(job.config)
    if job.shipped_model == job.student.model:
        return job.student.build(spec, taps=taps, seed=seed, spec=job.student_taps, given=normalisation)
    net = models.build(job.shipped_model, spec, taps=taps, seed=seed, spec=job.student_taps)
    assert job.teacher is not None
    net.take_over(job.student.build(spec, seed=seed), job.teacher.build(spec))
    return net


def _accuracy(net: Network, data: Supply, precision: Precision) -> float:
    """A teacher's accuracy in percent.

    Raises:
        UserError: its logits are not all finite.
    """
    counts, images = evaluate(net, data.epoch_images, precision), len(data.epoch_images)
    if broken := int(counts.unanswered):
        which = f"{broken:,} of {images:,} images that it is measured on"
        raise UserError(f"teacher {net.spec.name}: its answer (logits) is not finite for {which}; mend it, or choose another")
    return 100 * int(counts.correct) / images


def check_start(cohort: Cohort, members: Sequence[Member], watcher: Watcher) -> dict[Student, dict[str, float]]:
    """Tell what students begin from, how good the teachers are and how large each term's first gradient is.

    Returns:
        For each student by term: the size of the gradient relative to the task's; the size itself if there is no task.

    Raises:
        UserError: a gradient is not finite, or so large that training would diverge.
    """
    lines: list[tuple[str, ...]] = [(_told_of_first_weights(member.job),) for member in members if member.job.student.init]
    lines += [(_told_of_layers(member),) for member in members if member.job.config.train.layer_decay < 1]
    lines += [(_told_of_teacher(member),) for member in members if member.job.teacher]
    lines += [(NO_TASK,) for member in members if not member.student.has_classifier]
    lines += [_told_of_taps(member) for member in members]
    for line in itertools.chain(*dict.fromkeys(lines)):
        watcher.say(line)
    ratios = first_gradients(cohort)
    for member in members:
        _check_gradients(member, ratios[member.student], watcher)
    return ratios


def _told_of_first_weights(job: Job) -> str:
    student, data = job.student, job.data
    head = "its classifier included" if student.head else f"its classifier fresh ({student.other_classes(data)})"
    return f"student {student.model} begins from {student.described}, {head}"


def _told_of_layers(member: Member) -> str:
    """How the rate falls from the classifier to the images, with the first parameter of each layer."""
    net, decay = member.student.net, member.job.config.train.layer_decay
    first = {layer: name for name, layer in reversed([*net.layer_numbers().items()])}
    rates = ", ".join(f"{first[layer]} {decay ** (max(first) - layer):.3g}" for layer in sorted(first))
    return f"student {net.spec.name}: {len(first)} layers, each with its part of the rate: {rates}; adapters have all of it"


def _told_of_taps(member: Member) -> tuple[str, ...]:
    """Which maps are compared, and which adapters are trained for that beside the student."""
    method, pairing = member.student.method, member.job.pairing
    if pairing is None or not method.needs.student:
        return ()
    adapters = [f"{name} {'x'.join(map(str, value.shape))}" for name, value in method.named_parameters()]
    beside = [f"  {member.job.resolved.name} trains beside the student: {', '.join(adapters)}"] if adapters else []
    return (*compared(pairing, method.needs.student, method.needs.teacher), *beside)


def _told_of_teacher(member: Member) -> str:
    teacher, taught, split = member.job.teacher, member.teacher, member.job.config.split
    assert teacher is not None
    assert taught is not None
    named = f"teacher {teacher.model} ({teacher.described})"
    if taught.accuracy is None:
        return f"{named}: {teacher.other_classes(member.job.data)}; its accuracy can't be measured here"
    on = f"{'test' if split == 'full' else 'held-out'} images"
    told = f"{named}: {taught.accuracy:.2f} % of the {on}"
    return told if taught.agreement is None else f"{told} {taught.agreement.beside(taught.shares)}"


def _check_gradients(member: Member, ratios: Mapping[str, float], watcher: Watcher) -> None:
    weights = member.job.resolved.weights
    task = member.student.has_classifier
    for term, ratio in ratios.items():
        size = f"{ratio:.3g} x the task's" if task else f"of norm {ratio:.3g}"
        advised = f"; over {LOUD:g} x: {advice.propose_weights()}" if task and ratio > LOUD * weights[TASK] > 0 else ""
        watcher.say(f"{member.job.label}: gradient of {term} on the first batch {size} (weight {weights[term]:g}){advised}")
        if not math.isfinite(ratio):
            why = "though images, teacher, student and the term itself are"
            raise UserError(f"{member.job.label}: the gradient of {term} on the first batch is not finite, {why}; choose another method")
        if task and ratio > GRADIENT_LIMIT:
            cure = weights[term] / ratio * 10
            raise UserError(
                f"{member.job.label}: the gradient of {term} at weight {weights[term]:g} is {ratio:.3g} times the task's; over "
                f"{GRADIENT_LIMIT:g} training diverges; set a lower weight, such as --set weights.{term}={cure:.1g}"
            )
