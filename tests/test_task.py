"""The task, term by term: smoothed labels against loops over Szegedy's formula, in the loss, in training and in the gradient ratios."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small import config
from test_engines import Taped, trained
from test_training import a_cohort, weights_of

from flowdistill.data.images import ImageData
from flowdistill.data.sources import read_npz
from flowdistill.methods.kd import kd_loss
from flowdistill.training.cohort import Cohort, first_gradients, train
from flowdistill.training.engine import Compiled, Eager
from flowdistill.training.step import Student, task_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(small_npz: Path) -> ImageData:
    return read_npz(small_npz)


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


STILL = {"lr": 1e-12}  # the student does not move


@torch.no_grad()
def answers(student: Student, images: torch.Tensor) -> np.ndarray:
    """Its logits of a training batch; they depend on the batch's own statistics, not on the running ones."""
    return student.net.train()(images).logits.double().numpy()


def first_epoch(cohort: Cohort, student: Student) -> dict[str, float]:
    """The terms of an epoch."""
    return next(train(cohort)).progress[student].terms


LOGITS = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_smoothed_labels_are_szegedys(smoothing: float) -> None:
    assert float(task_loss(LOGITS, LABELS, smoothing)) == pytest.approx(slow_task(LOGITS.numpy(), LABELS.tolist(), smoothing), rel=1e-12)
    assert task_loss(LOGITS.bfloat16(), LABELS, smoothing).dtype == torch.float32


def test_training_smooths_the_task_and_no_term_of_a_method(data: ImageData, small_npz: Path) -> None:
    terms = []
    for smoothing in (0.0, 0.3):
        run = config(small_npz, method="kd+dkd", teacher="-", train={**STILL, "label_smoothing": smoothing})
        cohort, (student,) = a_cohort(data, [run])
        slow = [slow_task(answers(student, images), batch.labels.tolist(), smoothing) for images, batch in cohort.lanes[0].stream.epoch(0)]
        terms.append(first_epoch(cohort, student))
        assert terms[-1]["task"] == pytest.approx(sum(slow) / len(slow), rel=1e-6)
    assert terms[0]["task"] != pytest.approx(terms[1]["task"], rel=1e-5)
    assert [terms[0][term] for term in ("kd", "dkd")] == [terms[1][term] for term in ("kd", "dkd")]


def test_gradients_are_told_relative_to_the_smoothed_task(data: ImageData, small_npz: Path) -> None:
    ratios = []
    for smoothing in (0.0, 0.5):
        cohort, (student,) = a_cohort(data, [config(small_npz, method="kd", teacher="-", train={"label_smoothing": smoothing})])
        student.begin_phase(0)
        ratios.append(first_gradients(cohort)[student]["kd"])
        images, batch = next(cohort.lanes[0].stream.epoch(0))
        assert cohort.lanes[0].teacher is not None
        logits, taught = student.net.train()(images).logits, cohort.lanes[0].teacher.teach(images).logits
        norms = []
        for loss in (task_loss(logits, batch.labels, smoothing), kd_loss(logits, taught, 4.0)):
            gradients = torch.autograd.grad(loss, list(student.net.parameters()), retain_graph=True)
            norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        assert ratios[-1] == pytest.approx(student.settled.weights["kd"] * norms[1] / norms[0], rel=1e-3)
    assert ratios[0] != pytest.approx(ratios[1], rel=0.05)


KINDS = {"smoothed": {"label_smoothing": 0.2}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [Taped, Compiled])
def test_every_engine_gives_the_eager_losses(data: ImageData, small_npz: Path, kind: str, engine: Callable[..., Eager]) -> None:
    runs = [config(small_npz, method="kd", teacher="-", seed=seed, train={"lr": 1e-6, **KINDS[kind]}) for seed in (0, 1)]
    plain, ours = a_cohort(data, runs)
    other, theirs = a_cohort(data, runs)
    expected, found = trained(plain, Eager("fp32", "")), trained(other, engine("fp32", ""))
    assert type(other.engine) is engine, other.engine.why
    for one, again in zip(ours, theirs, strict=True):
        assert engine is Compiled or weights_of(one) == weights_of(again)
        for before, after in zip(expected, found, strict=True):
            assert after[again] == (pytest.approx(before[one], rel=1e-5) if engine is Compiled else before[one])
