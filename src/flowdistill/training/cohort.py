"""The training loop: a cohort of students, epoch by epoch.

A cohort's students agree on data, split, batch size, recipe and phase boundaries. Students of one seed form a seed group: they
see the very same batches, and their teacher runs once per batch for all of them. A plain run is a cohort of one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..config import TrainConfig
from ..data.interfaces import Supply
from ..device import Precision, Stopwatch
from ..ranks import apart, current
from .blame import Seen, fault
from .engine import EagerEngine, Engine
from .evaluate import Evaluation
from .student import SeedGroup, Student


@dataclass
class Cohort:
    """Students that are trained together.

    Attributes:
        engine: how its steps are computed.
        select: whether the weights of the best epoch ship, as in a holdout run; else those of the last epoch do. Default: False.
        phase_epochs: epochs of each phase, equal for all students.
        done: epochs already trained. Default: 0.
        stopped: students that have stopped early. Checkpoints keep them, for who goes on elsewhere may not have their files.
    """

    data: Supply
    seed_groups: list[SeedGroup]
    train: TrainConfig
    phase_epochs: Sequence[int]
    engine: Engine
    select: bool = False
    done: int = 0
    stopped: list[Student] = field(default_factory=list)

    @property
    def precision(self) -> Precision:
        """The arithmetic of its networks."""
        return self.engine.precision

    @property
    def students(self) -> list[Student]:
        """All students, in the order of their seed groups."""
        return [student for seed_group in self.seed_groups for student in seed_group.students]

    @property
    def epochs(self) -> int:
        """Number of epochs of all phases."""
        return sum(self.phase_epochs)

    def trained(self, student: Student) -> int:
        """The epochs that a student has trained: all that are done, or those until its patience, and that of its peers, ran out."""
        if self.train.patience is None:
            return self.done
        best = max(sum(self.phase_epochs[:-1]), *(one.chosen_epoch for one in (student, *student.peers)))
        return min(self.done, best + self.train.patience)

    @property
    def steps(self) -> int:
        """Number of steps still to train."""
        return (self.epochs - self.done) * self.seed_groups[0].batches.steps

    @property
    def position(self) -> tuple[int, int]:
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
        lr: the rate of the epoch's last step.
        correct: number of right answers on the epoch's images.
        evaluation: None if the student diverged, or if there is no image with a label to measure it on.
        error: why it was given up, or empty.
    """

    terms: dict[str, float]
    lr: float
    correct: int = 0
    evaluation: Evaluation | None = None
    error: str = ""


@dataclass
class EpochReport:
    """One epoch of a cohort; ``epoch`` is 1-based over all phases. ``setup_seconds`` is what capturing or compiling took before it."""

    epoch: int
    phase: int
    setup_seconds: float
    train_seconds: float
    eval_seconds: float
    progress: dict[Student, Progress]


def train(
    cohort: Cohort, on_step: Callable[[], None] = lambda: None, on_stop: Callable[[Student], None] = lambda _: None
) -> Iterator[EpochReport]:
    """Train the epochs that are not done yet, and report each. Students that diverge leave the cohort, as do those whose patience has run
    out; the others go on.

    Args:
        on_step: is called after each step of all students and must not wait for the device.
        on_stop: is called with a student that stops before the last epoch.
    """
    try:
        _stop_early(cohort, on_stop)  # what was cut off may have been so right there
        while cohort.students and cohort.done < cohort.epochs:
            phase, epoch = cohort.position
            epochs = cohort.phase_epochs[phase]
            if epoch == 0:
                for student in cohort.students:
                    student.begin_phase(phase)
            setup_seconds = ready(cohort)
            watch = Stopwatch(cohort.data.device)
            train_epoch(cohort, epoch, epochs, on_step)
            _unite(cohort)
            watch.lap()
            progress = _measure(cohort, epoch, epochs)
            train_seconds, eval_seconds = watch.stop()
            report = EpochReport(cohort.done + 1, phase, setup_seconds, train_seconds, eval_seconds, progress)
            _dismiss_diverged(cohort, report)
            _choose(cohort, report)
            cohort.done += 1
            yield report
            _stop_early(cohort, on_stop)  # only now: whoever saves the cohort between two epochs has all of them
    finally:
        for seed_group in cohort.seed_groups:
            seed_group.batches.close()


def ready(cohort: Cohort) -> float:
    """Let the engine set up what is new in this phase, or fall back. Returns the seconds that this took."""
    started = time.perf_counter()
    for student in cohort.students:
        student.begin_epoch()
    with apart():  # a rank that can't compile must not leave the others waiting for it
        engine = cohort.engine.ready(cohort.seed_groups)
    if len({*current().all(engine.name)}) > 1:
        engine = EagerEngine(engine.precision, "another process of the run can't compile")
    cohort.engine = engine
    return time.perf_counter() - started


def train_epoch(cohort: Cohort, epoch: int, epochs: int, on_step: Callable[[], None]) -> None:
    """Train one epoch: the one numbered ``epoch`` (0-based) of a phase of ``epochs``."""
    for student in cohort.students:
        student.begin_epoch()
    steps = cohort.seed_groups[0].batches.steps
    rates = {student: student.rates(epoch, epochs, steps) for student in cohort.students}
    for _ in cohort.engine.epoch(cohort.seed_groups, cohort.done, rates):
        on_step()


def _unite(cohort: Cohort) -> None:
    """Give every rank the same network and the same sums after an epoch, so that all measure one network and decide alike.

    What moves by a rank's own images alone, the statistics of batch normalisations, becomes the mean over the ranks.
    """
    ranks = current()
    if ranks.several:
        modules = [module for student in cohort.students for module in (student.net, student.method)]
        buffers = [value for module in modules for value in module.buffers() if value.is_floating_point()]
        buffers += [value for student in cohort.students if student.average is not None for value in student.average.statistics]
        ranks.mean_([*buffers, *(student.tally.totals for student in cohort.students)])
        ranks.least_([student.tally.sound for student in cohort.students])


def _measure(cohort: Cohort, epoch: int, epochs: int) -> dict[Student, Progress]:
    """Evaluate every student, check the teachers, and read all figures in one transfer from the device."""
    students, steps, images = cohort.students, cohort.seed_groups[0].batches.steps, len(cohort.data.epoch_images)
    teachers = [seed_group.teacher for seed_group in cohort.seed_groups if seed_group.teacher is not None]
    with contextlib.ExitStack() as stack:
        for student in students:
            stack.enter_context(student.as_measured())
        evaluations = cohort.engine.evaluate(students, cohort.data) if images else [None] * len(students)
    # A transfer waits for the device. Therefore all figures go into one tensor, and are read back below in the order in which they went in.
    figures = [teacher.drift() for teacher in teachers]
    nothing = torch.zeros((), device=cohort.data.device)
    for student, evaluation in zip(students, evaluations, strict=True):
        counts = [evaluation.correct, evaluation.unanswered] if evaluation else [nothing, nothing]
        figures += [*counts, student.sound(), *student.tally.tensors]
    values = iter(torch.cat([figure.float().reshape(-1) for figure in figures]).tolist())
    for teacher in teachers:
        teacher.check_mode()
        if next(values):
            raise RuntimeError("a weight or a buffer of the teacher changed during training")
    progress, seen = {}, {}
    for student, evaluation in zip(students, evaluations, strict=True):
        correct, unanswered, weights = int(next(values)), int(next(values)), bool(next(values))
        means = {name: next(values) / steps for name in student.tally.names}
        # The tally does not notice -inf. The sum shows it, though not since when; it is put down to the last step.
        sound = {name: min(int(next(values)), steps if math.isfinite(mean) else steps - 1) for name, mean in means.items()}
        lr = student.learning_rate(epoch, epochs, steps - 1, steps)
        progress[student] = Progress({term: means[term] for term in student.tally.terms}, lr, correct, evaluation)
        seen[student] = Seen(cohort.done + 1, steps, sound, weights, images, unanswered)
    for student in students:
        progress[student].error = fault(student, seen[student], [seen[peer] for peer in student.peers])
    return progress


def _dismiss_diverged(cohort: Cohort, report: EpochReport) -> None:
    """Take diverged students out of the cohort, and their peers with them."""
    for seed_group in cohort.seed_groups:
        for group in seed_group.peer_groups:
            if any(report.progress[student].error for student in group):
                for student in group:
                    progress = report.progress[student]
                    progress.error = progress.error or f"its peer diverged in epoch {report.epoch}"
                    progress.evaluation = None
                    seed_group.students.remove(student)


def _choose(cohort: Cohort, report: EpochReport) -> None:
    """Choose what ships: the last epoch's weights; in a holdout run those of the best epoch on the held-out images, the first on ties."""
    for student in cohort.students:
        correct = report.progress[student].correct
        if not cohort.select or correct > student.chosen_correct:
            student.choose(report.epoch, correct, keep=cohort.select)


def _stop_early(cohort: Cohort, on_stop: Callable[[Student], None]) -> None:
    """Take students out that were no better on the held-out images for ``train.patience`` epochs of the last phase. Of those that teach
    each other none stops while another gets better.
    """
    if cohort.done == cohort.epochs or cohort.train.patience is None:
        return
    for seed_group in cohort.seed_groups:
        for group in seed_group.peer_groups:
            if cohort.done - max(sum(cohort.phase_epochs[:-1]), *(student.chosen_epoch for student in group)) >= cohort.train.patience:
                seed_group.students = [student for student in seed_group.students if student not in group]
                cohort.stopped += group
                for student in group:
                    on_stop(student)
