"""What first batches show before any step: how large each term's gradient is, and what can't be trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import FAILURES, UserError, shortage, summary
from ..data.interfaces import Batches
from ..device import Precision
from ..models.state import kept
from ..types import NO_LABEL, Batch, Outputs
from .blame import refuse_first
from .cohort import Cohort
from .parts import cut
from .step import Objective, layers_seeded
from .student import PeerGroup, Student
from .task import TASK


def gradient_ratios(
    group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision
) -> dict[Student, dict[str, float]]:
    """The norm of each weighted term's gradient on its network's weights, relative to that of the task at weight 1, if there is a task.

    The students stay as they were, with their batch statistics and what their methods remember.

    Raises:
        UserError: a network's own code fails in train mode, something is not finite, or nothing that is trained has a gradient.
    """
    objective = Objective(group)
    for student in group:
        student.begin_epoch()
    with kept(objective), layers_seeded(group, 0, 0, images.device):
        with _failures_of(group, images):
            student_outputs = objective.answer(images, precision)
        for student, outputs in zip(group, student_outputs, strict=True):
            student.net.refuse_cut(outputs, embedding=student.method.needs.embedding)
        student_terms = objective.compare(student_outputs, teacher_outputs, batch)
        for student, outputs, terms in zip(group, student_outputs, student_terms, strict=True):
            student.refuse_broken(outputs, terms)
        return _ratios(group, images, student_terms)


def _ratios(group: PeerGroup, images: Tensor, student_terms: Sequence[dict[str, Tensor]]) -> dict[Student, dict[str, float]]:
    """See ``gradient_ratios``, from the terms of each student."""

    def norm(value: Tensor, weights: list[nn.Parameter]) -> float:
        with _failures_of(group, images):
            return _norm([gradient for gradient in _gradients(value, weights) if gradient is not None])

    ratios = {}
    for student, terms in zip(group, student_terms, strict=True):
        student.refuse_idle(terms)
        weights = _trained(student)
        task = max(norm(terms.pop(TASK), weights), 1e-30) if TASK in terms else 1.0
        ratios[student] = {term: norm(student.resolved.weights[term] * value, weights) / task for term, value in terms.items()}
    return ratios


def _trained(student: Student) -> list[nn.Parameter]:
    """The network's weights that are not frozen. What the method trains beside it is not among them."""
    return [parameter for parameter in student.net.parameters() if parameter.requires_grad]


def _gradients(value: Tensor, weights: list[nn.Parameter]) -> list[Tensor | None]:
    """The gradient of a term on each weight, None on those that it does not reach."""
    if not value.requires_grad:
        return [None] * len(weights)  # it looks at frozen parts alone
    return list(torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True))


def _norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all together; 0 of none: a term may train the method's own parts alone."""
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm()) if gradients else 0.0


def refuse_short(group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision, count: int) -> None:
    """Compute the terms of a batch's first ``count`` images, as many as the smallest batch to come has; this changes nothing.

    Raises:
        UserError: the students' layers or methods can't take so few.
    """

    def first(value: Tensor | None) -> Any:
        return None if value is None else value[:count]

    short = Batch(first(batch.labels), first(batch.indices), batch.epoch)
    if teacher_outputs is not None:
        maps = {name: first(value) for name, value in teacher_outputs.maps.items()}
        teacher_outputs = Outputs(first(teacher_outputs.logits), first(teacher_outputs.embedding), maps)
    objective = Objective(group)
    try:
        with torch.no_grad(), kept(objective), layers_seeded(group, 0, 0, images.device), _failures_of(group, images[:count]):
            objective(images[:count], teacher_outputs, short, precision)
    except UserError as error:
        raise UserError(f"{error}; so few images has the smallest batch: let the loader drop its last one (drop_last=True)") from None


@contextmanager
def _failures_of(group: PeerGroup, images: Tensor) -> Iterator[None]:
    """Turn what the networks' own code raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except FAILURES as error:
        names = ", ".join(dict.fromkeys(student.net.spec.name for student in group))
        cure = f"; {shortage(error)}" if shortage(error) else ""
        raise UserError(f"student {names} can't be trained on a batch of {len(images)}: {summary(error)}{cure}") from None


def first_gradients(cohort: Cohort) -> dict[Student, dict[str, float]]:
    """Each student's gradient norms relative to the task's, on its first batch with a label; this changes nothing. Without labels they are
    the norms themselves.

    A batch that would be mixed without labels is not mixed, for the task needs them.

    Raises:
        UserError: images, a teacher's or a student's outputs, or a term are not finite; and what ``gradient_ratios`` refuses.
    """
    ratios: dict[Student, dict[str, float]] = {}
    for seed_group in cohort.seed_groups:
        *_, images, batch = next(_labelled(seed_group.batches.with_labels(), cohort.train.accumulate))
        with seed_group.teaching(0, 0):
            teacher_outputs = seed_group.teacher.teach(images) if seed_group.teacher else None
        refuse_first(images, seed_group.teacher, teacher_outputs)
        for group in seed_group.peer_groups:
            ratios |= gradient_ratios(group, images, teacher_outputs, batch, cohort.precision)
            if seed_group.batches.smallest_batch < len(images):
                refuse_short(group, images, teacher_outputs, batch, cohort.precision, seed_group.batches.smallest_batch)
    return ratios


def _labelled(batches: Batches, count: int) -> Iterator[tuple[int, int, Tensor, Batch]]:
    """Of every batch that has a label, epoch after epoch without end: its epoch and step, and the first of its parts that has one."""
    for epoch in itertools.count():
        for step, (every, of_every) in enumerate(batches.epoch(epoch)):
            parts = [(images, batch) for images, _, batch in cut(count, every, None, of_every)]
            known = [pair for pair in parts if (given := pair[1].targets) is None or bool((given.labels != NO_LABEL).any())]
            if known:
                yield epoch, step, *known[0]


class Pull(NamedTuple):
    """How hard a term pulls on one batch, unweighted, at the student's weights that the task pulls at too.

    Attributes:
        value: the term.
        norm, of_task: the norms of the term's gradient and of the task's, on the weights that both reach.
        reaches: whether there are such weights.
    """

    value: float
    norm: float
    of_task: float
    reaches: bool


def pulls(cohort: Cohort, count: int, epoch: int | None = None) -> dict[Student, dict[str, list[Pull]]]:
    """Each term of each student, on each of the first ``count`` batches that have a label; this changes nothing.

    No step is taken between the batches, but a method remembers what it has seen. ``first_gradients`` comes first: it refuses what can't be
    measured.

    Args:
        epoch: the methods are told that it is this one, for the strength of a term may grow with the epochs. Default: the batch's own.
    """
    found: dict[Student, dict[str, list[Pull]]] = {student: {} for student in cohort.students}
    for seed_group in cohort.seed_groups:
        with ExitStack() as stack:
            for group in seed_group.peer_groups:
                stack.enter_context(kept(Objective(group)))
                for student in group:
                    student.begin_epoch()
            batches = _labelled(seed_group.batches.with_labels(), cohort.train.accumulate)
            for drawn, step, images, batch in itertools.islice(batches, count):
                with seed_group.teaching(drawn, step):
                    teacher_outputs = seed_group.teacher.teach(images) if seed_group.teacher else None
                told = batch if epoch is None or batch.epoch is None else replace(batch, epoch=torch.full_like(batch.epoch, epoch))
                for group in seed_group.peer_groups:
                    with layers_seeded(group, drawn, step, images.device), _failures_of(group, images):
                        student_terms = Objective(group)(images, teacher_outputs, told, cohort.precision)
                        for student, terms in zip(group, student_terms, strict=True):
                            for term, pull in _pulls(student, terms).items():
                                found[student].setdefault(term, []).append(pull)
    return found


def _pulls(student: Student, terms: dict[str, Tensor]) -> dict[str, Pull]:
    """See ``pulls``, of a student's terms on one batch."""
    weights, task = _trained(student), terms.pop(TASK, None)
    of_task = [torch.zeros(()) for _ in weights] if task is None else _gradients(task, weights)  # without labels all weights are its own
    found = {}
    for term, value in terms.items():
        pairs = zip(_gradients(value, weights), of_task, strict=True)
        both = [(own, tasks) for own, tasks in pairs if own is not None and tasks is not None]
        norm, norm_of_task = _norm([own for own, _ in both]), _norm([tasks for _, tasks in both])
        found[term] = Pull(float(value.detach()), norm, norm_of_task, bool(both))
    return found
