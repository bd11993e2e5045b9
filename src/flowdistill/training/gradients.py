"""What a first batch shows before any step: how large each term's gradient is, and what can't be trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
        if not value.requires_grad:
            return 0.0  # it looks at frozen parts alone
        with _failures_of(group, images):
            gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0  # a term may train the method's own parts alone

    ratios = {}
    for student, terms in zip(group, student_terms, strict=True):
        student.refuse_idle(terms)
        weights = [parameter for parameter in student.net.parameters() if parameter.requires_grad]
        task = max(norm(terms.pop(TASK), weights), 1e-30) if TASK in terms else 1.0
        ratios[student] = {term: norm(student.resolved.weights[term] * value, weights) / task for term, value in terms.items()}
    return ratios


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
        images, batch = _first_labelled(seed_group.batches.with_labels(), cohort.train.accumulate)
        with seed_group.teaching(0, 0):
            teacher_outputs = seed_group.teacher.teach(images) if seed_group.teacher else None
        refuse_first(images, seed_group.teacher, teacher_outputs)
        for group in seed_group.peer_groups:
            ratios |= gradient_ratios(group, images, teacher_outputs, batch, cohort.precision)
            if seed_group.batches.smallest_batch < len(images):
                refuse_short(group, images, teacher_outputs, batch, cohort.precision, seed_group.batches.smallest_batch)
    return ratios


def _first_labelled(batches: Batches, count: int) -> tuple[Tensor, Batch]:
    """The first part of a batch that has a label."""
    whole = (pair for epoch in itertools.count() for pair in batches.epoch(epoch))
    pairs = ((images, batch) for every, of_every in whole for images, _, batch in cut(count, every, None, of_every))
    return next((images, batch) for images, batch in pairs if batch.targets is None or bool((batch.targets.labels != NO_LABEL).any()))
