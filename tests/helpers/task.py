"""The task's loss by loops over its formula, and what a student shows of it."""

from __future__ import annotations

import math

import numpy as np
import torch

from flowdistill.training.cohort import Cohort, train
from flowdistill.training.student import Student

STILL = {"lr": 1e-12}  # the student does not move


def slow_task(logits: np.ndarray, labels: list[int], smoothing: float = 0.0) -> float:
    """-1/N sum_n sum_k q_nk log p_nk with q = (1 - e) [k = y] + e / K over the images that have a label; 0 where none has."""
    total, counted = 0.0, 0
    for row, label in zip(logits.tolist(), labels, strict=True):
        if label < 0:
            continue
        counted += 1
        for k, value in enumerate(row):
            q = (1 - smoothing) * (k == label) + smoothing / len(row)
            total -= q * (value - math.log(sum(math.exp(other) for other in row)))
    return total / counted if counted else 0.0


@torch.no_grad()
def answers(student: Student, images: torch.Tensor) -> np.ndarray:
    """Its logits of a training batch; they depend on the batch's own statistics, not on the running ones."""
    return student.net.train()(images).logits.double().numpy()


def first_epoch(cohort: Cohort, student: Student) -> dict[str, float]:
    """The terms of an epoch."""
    return next(train(cohort)).progress[student].terms
