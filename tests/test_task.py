"""The task, term by term: labels that are smoothed or mixed, against loops over the formula, in the loss and in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cohorts import Taped, a_cohort, train_with, weights_of
from helpers.small import config
from helpers.task import STILL, answers, first_epoch, slow_task

from flowdistill.data.batches import SeedBatches
from flowdistill.data.dataset import ImageData, Unlabelled
from flowdistill.methods.kd import kd_loss
from flowdistill.training.cohort import train
from flowdistill.training.engine import CompiledEngine, EagerEngine, Engine
from flowdistill.training.gradients import first_gradients
from flowdistill.training.task import task_loss
from flowdistill.types import Batch, Targets

CPU = torch.device("cpu")


LOGITS = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
LABELS, PARTNERS = torch.tensor([0, 4, 2, 2, 1, 3, 0]), torch.tensor([0, 0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_smoothed_labels_are_szegedys(smoothing: float) -> None:
    assert float(task_loss(LOGITS, Batch(LABELS), smoothing)) == pytest.approx(
        slow_task(LOGITS.numpy(), LABELS.tolist(), smoothing), rel=1e-12
    )
    assert task_loss(LOGITS.bfloat16(), Batch(LABELS), smoothing).dtype == torch.float32


def test_training_smooths_the_task_and_no_term_of_a_method(data: ImageData, small_npz: Path) -> None:
    terms = []
    for smoothing in (0.0, 0.3):
        run = config(small_npz, method="kd+dkd", teacher="-", train={**STILL, "label_smoothing": smoothing})
        cohort, (student,) = a_cohort(data, [run])
        slow = [
            slow_task(answers(student, images), batch.labels.tolist(), smoothing)
            for images, batch in cohort.seed_groups[0].batches.epoch(0)
        ]
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
        images, batch = next(cohort.seed_groups[0].batches.epoch(0))
        assert cohort.seed_groups[0].teacher is not None
        logits, teacher_outputs = student.net.train()(images).logits, cohort.seed_groups[0].teacher.teach(images).logits
        norms = []
        for loss in (task_loss(logits, batch, smoothing), kd_loss(logits, teacher_outputs, 4.0)):
            gradients = torch.autograd.grad(loss, list(student.net.parameters()), retain_graph=True)
            norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        assert ratios[-1] == pytest.approx(student.resolved.weights["kd"] * norms[1] / norms[0], rel=1e-3)
    assert ratios[0] != pytest.approx(ratios[1], rel=0.05)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_task_of_a_mixed_batch_is_mixed_as_its_images_are(smoothing: float) -> None:
    batch = Batch(None, targets=Targets(LABELS, torch.tensor(7), PARTNERS, torch.tensor([0.3], dtype=torch.float64)))
    own, other = (slow_task(LOGITS.numpy(), labels.tolist(), smoothing) for labels in (LABELS, PARTNERS))
    found = task_loss(LOGITS, batch, smoothing)
    assert found.shape == ()
    assert float(found) == pytest.approx(0.3 * own + 0.7 * other, rel=1e-12)


def test_training_mixes_the_task_and_shows_methods_images_without_labels(data: ImageData, small_npz: Path) -> None:
    """The labels of the unmixed batch and the share, found again from the images, give the task; teacher and student see the mixture."""
    run = config(small_npz, method="kd", teacher="-", train={**STILL, "mixup": 0.4, "label_smoothing": 0.1})
    cohort, (student,) = a_cohort(data, [run])
    stream, teacher = cohort.seed_groups[0].batches, cohort.seed_groups[0].teacher
    assert teacher is not None
    plain, task, kd, shares = SeedBatches(cohort.data, run.seed, 64), [], [], []
    for (images, known), (mixture, batch) in zip(plain.epoch(0), stream.epoch(0), strict=True):
        assert batch.labels is None
        before = images.roll(1, 0)
        share = float(((mixture - before) * (images - before)).sum() / (images - before).square().sum())
        torch.testing.assert_close(mixture, share * images + (1 - share) * before, rtol=0, atol=1e-5)
        logits = answers(student, mixture)
        own, other = (slow_task(logits, labels.tolist(), 0.1) for labels in (known.labels, known.labels.roll(1)))
        task.append(share * own + (1 - share) * other)
        kd.append(float(kd_loss(torch.from_numpy(logits), teacher.teach(mixture).logits, 4.0)))
        shares.append(share)
    seen: list[Batch] = []
    student.method.register_forward_pre_hook(lambda method, given: seen.append(given[2]))
    terms = first_epoch(cohort, student)
    assert terms == pytest.approx({"task": sum(task) / len(task), "kd": sum(kd) / len(kd)}, rel=1e-4)
    assert len({round(share, 3) for share in shares}) == len(shares) == 4
    assert {(batch.labels, batch.targets) for batch in seen} == {(None, None)}


def test_training_on_the_labels_alone_mixes_them(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, train={"mixup": 1.0, "epochs": 6})])
    cohort.seed_groups[0].teacher = None
    tasks = [report.progress[student].terms for report in train(cohort)]
    assert [list(terms) for terms in tasks] == [["task"]] * 6
    assert tasks[-1]["task"] < tasks[0]["task"]


MORE = Unlabelled("more", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
KINDS: dict[str, tuple[dict[str, Any], Unlabelled | None]] = {
    "smoothed": ({"label_smoothing": 0.2}, None),
    "mixed and smoothed": ({"mixup": 0.2, "label_smoothing": 0.1}, None),
    "with unlabelled images": ({"label_smoothing": 0.1}, MORE),
    "cut, mixed, erased and weighed": ({"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "class_weights": "balanced"}, None),
    "weighed and smoothed": ({"class_weights": "balanced", "label_smoothing": 0.1}, None),
    "weighed, with unlabelled images, in parts": ({"class_weights": "balanced", "accumulate": 2}, MORE),
    "balanced": ({"sampling": "balanced", "random_erasing": 0.5}, None),
    "mixed with unlabelled images": ({"mixup": 0.2}, MORE),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [Taped, CompiledEngine])
def test_every_engine_gives_the_eager_losses(
    data: ImageData, small_npz: Path, kind: str, engine: Callable[..., Engine], request: pytest.FixtureRequest
) -> None:
    train, unlabelled = KINDS[kind]
    if kind != "mixed with unlabelled images":  # kernels are generated for the widest of them
        request.getfixturevalue("no_kernels")
    runs = [config(small_npz, method="kd", teacher="-", seed=seed, train={"lr": 1e-6, **train}) for seed in (0, 1)]
    data = replace(data, unlabelled=unlabelled)
    plain, eager_students = a_cohort(data, runs)
    other, students = a_cohort(data, runs)
    expected, found = train_with(plain, EagerEngine("fp32", "")), train_with(other, engine("fp32", ""))
    assert type(other.engine) is engine, other.engine.why
    for eager_student, student in zip(eager_students, students, strict=True):
        assert engine is CompiledEngine or weights_of(eager_student) == weights_of(student)
        for before, after in zip(expected, found, strict=True):
            assert after[student] == (pytest.approx(before[eager_student], rel=1e-5) if engine is CompiledEngine else before[eager_student])
