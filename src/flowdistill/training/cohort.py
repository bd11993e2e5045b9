"""Training, whole: a cohort of students, epoch by epoch.

A cohort's students agree on data, split, batch size, recipe and phase boundaries. Students of one seed sit in one lane: they see
the very same batches, and their teacher runs once a batch for all of them. A plain run is a cohort of one.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data.loader import DeviceData, Stream
from ..device import Precision, Stopwatch, synchronize
from ..models import Network
from .evaluate import Evaluation, evaluate
from .step import Student, gradient_ratios, teach, train_step


class Teacher:
    """A frozen network in eval mode whose buffers are known, so that a drift can't pass unseen."""

    def __init__(self, net: Network) -> None:
        self.net = net.eval().requires_grad_(False)
        self._buffers = {name: value.clone() for name, value in net.named_buffers()}

    def check_mode(self) -> None:
        """Raise RuntimeError if the teacher left eval mode or is no longer frozen."""
        if any(module.training for module in self.net.modules()):
            raise RuntimeError("the teacher left eval mode during training")
        if any(parameter.requires_grad for parameter in self.net.parameters()):
            raise RuntimeError("the teacher is no longer frozen")

    def drift(self) -> Tensor:
        """How many buffers changed; a scalar that stays on the device."""
        changed = [(value != self._buffers[name]).any() for name, value in self.net.named_buffers()]
        return torch.stack(changed).sum() if changed else torch.zeros((), device=next(self.net.parameters()).device)


@dataclass
class Lane:
    """One seed: its stream of batches, its teacher, and the students that share both."""

    stream: Stream
    teacher: Teacher | None
    students: list[Student]


@dataclass
class Cohort:
    """Students that are trained together.

    Attributes:
        select: a holdout run keeps the weights of its best epoch; else the last epoch's stand.
        phase_epochs: epochs of each phase, equal for all students.
        done: epochs that are behind it.
    """

    data: DeviceData
    lanes: list[Lane]
    train: TrainConfig
    phase_epochs: Sequence[int]
    precision: Precision
    select: bool = False
    done: int = 0

    @property
    def students(self) -> list[Student]:
        """All students, in lane order."""
        return [student for lane in self.lanes for student in lane.students]

    @property
    def epochs(self) -> int:
        """Epochs of all phases."""
        return sum(self.phase_epochs)

    @property
    def steps(self) -> int:
        """Steps that are ahead of it."""
        return (self.epochs - self.done) * self.lanes[0].stream.steps

    @property
    def place(self) -> tuple[int, int]:
        """The phase of the next epoch, and how many epochs of that phase are done."""
        phase, epoch = 0, self.done
        while epoch >= self.phase_epochs[phase] and phase + 1 < len(self.phase_epochs):
            epoch -= self.phase_epochs[phase]
            phase += 1
        return phase, epoch


@dataclass
class Progress:
    """How one student fared in one epoch.

    Attributes:
        terms: mean of each unweighted term over the epoch's steps.
        evaluation: None when the student diverged.
        correct: right answers on the curve's images.
        error: why it was given up, or empty.
    """

    terms: dict[str, float]
    lr: float
    correct: int = 0
    evaluation: Evaluation | None = None
    error: str = ""


@dataclass
class EpochReport:
    """One epoch of a cohort; ``epoch`` is 1-based over all phases."""

    epoch: int
    phase: int
    train_seconds: float
    eval_seconds: float
    progress: dict[Student, Progress] = field(default_factory=dict)


def train(cohort: Cohort, on_step: Callable[[], None] = lambda: None) -> Iterator[EpochReport]:
    """Train from where the cohort stands, and report every epoch. Students that diverge leave the cohort; the others go on.

    ``on_step`` is called after each step of all students and must not wait for the device.
    """
    while cohort.students and cohort.done < cohort.epochs:
        phase, epoch = cohort.place
        if epoch == 0:
            for student in cohort.students:
                student.begin_phase(phase)
        watch = Stopwatch(cohort.data.device)
        _train_epoch(cohort, epoch, cohort.phase_epochs[phase], on_step)
        watch.lap()
        report = EpochReport(cohort.done + 1, phase, 0.0, 0.0)
        report.progress = _measure(cohort, epoch, cohort.phase_epochs[phase])
        report.train_seconds, report.eval_seconds = watch.stop()
        _dismiss_diverged(cohort, report)
        _choose(cohort, report)
        cohort.done += 1
        yield report


def _train_epoch(cohort: Cohort, epoch: int, epochs: int, on_step: Callable[[], None]) -> None:
    """``epoch`` epochs of this phase of ``epochs`` are done."""
    for student in cohort.students:
        student.begin_epoch()
    steps = cohort.lanes[0].stream.steps
    for step, batches in enumerate(zip(*(lane.stream.epoch(cohort.done) for lane in cohort.lanes), strict=True)):
        for lane, (images, batch) in zip(cohort.lanes, batches, strict=True):
            needed = lane.teacher is not None and any(student.taught for student in lane.students)
            taught = teach(lane.teacher.net, images, cohort.precision) if lane.teacher is not None and needed else None
            for student in lane.students:
                lr = student.learning_rate(epoch, epochs, step, steps)
                train_step(student, images, taught, batch, lr=lr, precision=cohort.precision)
        on_step()


def seconds_per_epoch(cohort: Cohort, steps: int = 3) -> float:
    """An epoch's time, from the median of a few steps and one evaluation a student. The students' weights move."""
    for student in cohort.students:
        student.begin_phase(0)
    times: list[float] = []
    last = time.perf_counter()

    def on_step() -> None:
        nonlocal last
        synchronize(cohort.data.device)
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if len(times) > steps:
            raise StopIteration

    with contextlib.suppress(StopIteration):
        _train_epoch(cohort, 0, 1, on_step)
    started = time.perf_counter()
    _measure(cohort, 0, 1)
    return statistics.median(times[1:] or times) * cohort.lanes[0].stream.steps + time.perf_counter() - started


def _measure(cohort: Cohort, epoch: int, epochs: int) -> dict[Student, Progress]:
    """Evaluate every student, check the teachers, and read all figures in one transfer from the device."""
    students, steps = cohort.students, cohort.lanes[0].stream.steps
    teachers = [lane.teacher for lane in cohort.lanes if lane.teacher is not None]
    found = [evaluate(student.net, cohort.data.curve, cohort.data.normalise, cohort.precision) for student in students]
    figures = [teacher.drift() for teacher in teachers]
    for student, evaluation in zip(students, found, strict=True):
        figures += [evaluation.correct, evaluation.probabilities.isfinite().all(), *student.sums.values()]
    values = iter(torch.stack([figure.float() for figure in figures]).tolist())
    for teacher in teachers:
        teacher.check_mode()
        if next(values):
            raise RuntimeError("a buffer of the teacher changed during training")
    progress = {}
    for student, evaluation in zip(students, found, strict=True):
        correct, sound = int(next(values)), bool(next(values))
        terms = {term: next(values) / steps for term in student.sums}
        lr = student.learning_rate(epoch, epochs, steps - 1, steps)
        progress[student] = Progress(terms, lr, correct, evaluation, "" if sound else "its logits are not finite")
    return progress


def _dismiss_diverged(cohort: Cohort, report: EpochReport) -> None:
    for lane in cohort.lanes:
        for student in list(lane.students):
            progress = report.progress[student]
            broken = [term for term, value in progress.terms.items() if not math.isfinite(value)]
            if broken or progress.error:
                what = f"{', '.join(broken)} is not finite" if broken else progress.error
                progress.error = f"diverged in epoch {report.epoch}: {what}; lower train.lr or weights.{[*progress.terms][-1]}"
                progress.evaluation = None
                lane.students.remove(student)


def _choose(cohort: Cohort, report: EpochReport) -> None:
    """The last epoch's weights ship; in a holdout run those of the best epoch on the held-out images, the earliest on ties."""
    for student in cohort.students:
        correct = report.progress[student].correct
        if not cohort.select or correct > student.chosen_correct:
            student.choose(report.epoch, correct, keep=cohort.select)


def first_gradients(cohort: Cohort) -> dict[Student, dict[str, float]]:
    """Each student's gradient norms relative to the task's, on its first batch; changes nothing."""
    found = {}
    for lane in cohort.lanes:
        images, batch = next(lane.stream.epoch(0))
        taught = teach(lane.teacher.net, images, cohort.precision) if lane.teacher else None
        for student in lane.students:
            found[student] = gradient_ratios(student, images, taught, batch, cohort.precision)
    return found
