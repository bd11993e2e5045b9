"""Which learning rate: a range test, in which the rate grows from step to step until training diverges.

Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, section 3.3. That the rate grows exponentially, where the test ends
and the rule are those of ``lr_find`` in the code of fastai 2 (Howard & Gugger, Information 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..checks import FAILURES, UserError, pass_on_shortage
from .cohort import Cohort
from .engine import EagerEngine, restored_after
from .student import Student

FIRST, LAST, STEPS = 1e-6, 10.0, 100
MEMORY = 0.8  # share of the running mean of losses that the next step keeps; fastai's 0.98 lags so far behind that it hides the least loss
DIVERGED = 4  # times its best smoothed loss, and the test ends, as in fastai
PLATEAU = 20  # steps at the begin, whose losses differ by their images alone
BELOW = 10  # times below the rate of the least loss is the one that is proposed, as fastai's rule 'minimum' does


class Curve(NamedTuple):
    """The loss before the step of each rate; the last may not be finite. There are fewer than all rates if training diverged."""

    rates: list[float]
    losses: list[float]


def ladder() -> list[float]:
    """The rates of a test: ``STEPS`` from ``FIRST`` to ``LAST``, each larger than the one before by one factor."""
    return [FIRST * (LAST / FIRST) ** (step / (STEPS - 1)) for step in range(STEPS)]


def range_test(cohort: Cohort, phase: int = 0) -> Curve:
    """Train the cohort by rates that grow, and take it back. The sum of its students' losses counts: peers have one rate.

    The rate alone is another than in training. The eager engine takes the steps. If an epoch has fewer, others follow it.
    """
    rates, losses = ladder(), list[float]()
    engine, students = EagerEngine(cohort.precision, "a range test reads the loss of every step"), cohort.students
    for student in students:
        student.begin_phase(phase)
    steps, device = cohort.seed_groups[0].batches.steps, cohort.data.device
    with restored_after(cohort.seed_groups):
        for epoch, start in enumerate(range(0, len(rates), steps)):
            for student in students:
                student.begin_epoch()
            part = torch.tensor(rates[start : start + steps], device=device)
            stepping = engine.epoch(cohort.seed_groups, epoch, dict.fromkeys(students, part))
            for _ in part:
                losses.append(_loss_of_next(stepping, students))
                for student in students:
                    student.tally.reset()
                if diverged(losses):
                    return Curve(rates[: len(losses)], losses)
    return Curve(rates, losses)


def _loss_of_next(stepping: Iterator[None], students: Sequence[Student]) -> float:
    """Take a step, and return the loss before it; NaN if a loss can't be computed, as one that decomposes matrices which are not finite."""
    try:
        next(stepping)
    except UserError:
        raise
    except FAILURES as error:
        pass_on_shortage(error)
        return math.nan
    return sum(float(student.weighted(student.sums)) for student in students)


def smoothed(losses: Sequence[float]) -> list[float]:
    """m_t / (1 - b^t) with m_t = b m_{t-1} + (1 - b) l_t, m_0 = 0 and b = ``MEMORY``: a mean of the losses so far, of late ones more."""
    mean, means = 0.0, list[float]()
    for step, loss in enumerate(losses, 1):
        mean += (loss - mean) * (1 - MEMORY) / (1 - MEMORY**step)  # the same, and exact of equal losses
        means.append(mean)
    return means


def diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or the smoothed one over ``DIVERGED`` times its best; of a loss below 0 as far above it."""
    means = smoothed(losses)
    best = min(means)
    return not math.isfinite(means[-1]) or means[-1] > best + (DIVERGED - 1) * abs(best)


def least(curve: Curve) -> float | None:
    """The rate of the least smoothed loss; None if that is not below all of the first ``PLATEAU`` losses, at which no rate shows yet."""
    means = smoothed(curve.losses)
    finite = [(mean, rate) for mean, rate in zip(means, curve.rates, strict=True) if math.isfinite(mean)]
    if not finite or min(finite)[0] >= min(curve.losses[:PLATEAU]):
        return None
    return min(finite)[1]
