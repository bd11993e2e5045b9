"""What is not finite, and whose fault that is: the teacher's, a term's or the student's; the learning rate's only if it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..checks import UserError
from ..types import Outputs
from .student import Student
from .tally import are
from .task import TASK
from .teacher import Teacher

MEND = "mend the teacher, or choose another"


class Seen(NamedTuple):
    """What was seen of a student in an epoch.

    Attributes:
        epoch: 1-based.
        steps: steps of an epoch.
        sound: how many steps each term, and each output of the teacher that its method uses, was finite for.
        weights: whether all weights are finite after the epoch.
        images: number of images that it was measured on.
        unanswered: number of these for which its logits are not finite.
    """

    epoch: int
    steps: int
    sound: Mapping[str, int]
    weights: bool
    images: int
    unanswered: int


def fault(student: Student, seen: Seen, peers: Sequence[Seen] = ()) -> str:
    """Why a student is given up, in one line; empty if it is not, or if a peer is the cause."""
    terms = student.tally.terms
    teacher_step, broken_outputs = _earliest({name: seen.sound[name] for name in student.teacher_output_names}, seen.steps)
    step, broken = _earliest({name: seen.sound[name] for name in terms}, seen.steps)
    if broken_outputs and teacher_step <= step:
        batch = f"batch {teacher_step + 1} of {seen.steps}"
        return f"stopped in epoch {seen.epoch}: the teacher's {are(broken_outputs)} not finite on {batch}; {MEND}"
    if broken:
        if TASK not in broken and any(peer.sound.get(TASK, seen.steps) <= step for peer in peers):
            return ""
        if seen.epoch == 1 and step == 0:
            return f"stopped in epoch 1: its {are(broken)} not finite on the first batch, before any step; is the student sound?"
        lower = [f"weights.{broken[-1]}", "train.lr"]
        alone = TASK in terms and TASK not in broken
        since = f"not finite from batch {step + 1} of {seen.steps} on{', where task still is' * alone}"
        return f"diverged in epoch {seen.epoch}: {are(broken)} {since}; lower {' or '.join(lower if alone else lower[::-1])}"
    if seen.weights and not seen.unanswered:
        return ""
    answers = f"its logits are not finite for {seen.unanswered:,} of {seen.images:,} images that it is measured on"
    parts = [f"its {part} is not finite" for part in student.broken_parts()] + [answers] * bool(seen.unanswered)
    return f"diverged in epoch {seen.epoch}: {', '.join(parts)}, though its losses are; lower train.lr or weights.{terms[-1]}"


def refuse_first(images: Tensor, teacher: Teacher | None, teacher_outputs: Outputs | None) -> None:
    """Look at a first batch, and at the teacher's outputs for it; waits for the device.

    Raises:
        UserError: not all of it is finite.
    """
    if bad := int((~images.isfinite().flatten(1).all(1)).sum()):
        raise UserError(f"{bad} of {len(images)} images of the first batch hold values that are not finite; mend them, or leave them out")
    if teacher is not None and teacher_outputs is not None:
        broken = [name for name, value in teacher.output_sums(teacher_outputs).items() if not value.isfinite()]
        if broken:
            raise UserError(f"teacher {teacher.name}: its {are(broken)} not finite on the first batch; {MEND}")


def _earliest(sound: Mapping[str, int], steps: int) -> tuple[int, list[str]]:
    """The first step (0-based) at which something was not finite, and what was not; ``steps`` and nothing if all was finite."""
    first = min(sound.values(), default=steps)
    return first, [name for name, count in sound.items() if count == first < steps]
