"""How long an epoch takes, from a few steps of it."""

from __future__ import annotations

import contextlib
import statistics
import time

from ..data.interfaces import First, at_once
from ..device import synchronize
from .cohort import Cohort, ready, train_epoch
from .evaluate import evaluate


def seconds_per_epoch(cohort: Cohort, steps: int = 5) -> float:
    """An epoch's time by the cohort's engine, from the median of a few steps and one evaluation batch per student.

    The students' weights move. The engine's set-up and the first step are not counted. If there are several phases, the first is measured.
    """
    for student in cohort.students:
        student.begin_phase(0)
    ready(cohort)
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

    try:
        with contextlib.suppress(StopIteration):
            train_epoch(cohort, 0, 1, on_step)
        return statistics.median(times[1:] or times) * cohort.seed_groups[0].batches.steps + _evaluation_seconds(cohort)
    finally:
        for seed_group in cohort.seed_groups:
            seed_group.batches.close()


def _evaluation_seconds(cohort: Cohort) -> float:
    """Seconds to evaluate every student on all images, from its second batch; the first warms up."""
    data, started = cohort.data, 0.0
    if not len(data.epoch_images):
        return 0.0
    part = First(data.epoch_images, at_once(data.spec.height, data.spec.width, data.device))
    for _ in range(2):
        started = time.perf_counter()
        for student in cohort.students:
            evaluate(student.net, part, cohort.precision)
        synchronize(data.device)
    return (time.perf_counter() - started) * len(data.epoch_images) / len(part)
