"""What a step does beside the optimiser's: decay without normalisations, clipping, and the average of the weights that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cohorts import Taped, a_cohort, train_with, weights_of
from helpers.small import config
from torch import Tensor

from flowdistill.checks import UserError
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.runner import run
from flowdistill.training.cohort import Cohort, train
from flowdistill.training.engine import EagerEngine, restored_after, zero_rates
from flowdistill.training.evaluate import evaluate
from flowdistill.training.student import Student

CPU = torch.device("cpu")
RATE = torch.tensor(0.1)


def cohort_of(data: ImageData, small_npz: Path, *methods: str, split: str = "full", **keys: Any) -> tuple[Cohort, list[Student]]:
    return a_cohort(data, [config(small_npz, method=method, teacher="-", train=keys) for method in methods], split=split)


def begun(data: ImageData, small_npz: Path, method: str = "base", **keys: Any) -> Student:
    _, (student,) = cohort_of(data, small_npz, method, **keys)
    student.begin_phase(0)
    return student


def push(student: Student, size: float) -> list[Tensor]:
    """A step along gradients of this global norm; what each parameter moved by."""
    before = [p.detach().clone() for p in student.trainable_parameters()]
    chance = torch.Generator().manual_seed(1)
    drawn = [torch.randn(p.shape, generator=chance) for p in before]
    whole = torch.cat([gradient.flatten() for gradient in drawn]).norm()
    for parameter, gradient in zip(student.trainable_parameters(), drawn, strict=True):
        parameter.grad = gradient * (size / whole)
    student.move(RATE)
    return [p.detach() - old for p, old in zip(student.trainable_parameters(), before, strict=True)]


def length(values: list[Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values]).norm())


# Decay and clipping


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("optimizer", [{"momentum": 0.0}, {"optimizer": "adamw"}])
def test_normalisations_and_biases_may_be_left_without_decay(
    data: ImageData, small_npz: Path, optimizer: dict[str, Any], decay: bool
) -> None:
    """Gradients of 0 leave the decay alone; the adapters of vid are decayed alike."""
    student = begun(data, small_npz, "vid", **optimizer, lr=0.1, weight_decay=0.5, decay_norm_and_bias=decay)
    before = [p.detach().clone() for p in student.trainable_parameters()]
    for parameter in student.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    student.move(RATE)
    names = {id(p) for p in student.method.parameters()} & {id(p) for p in student.trainable_parameters()}
    assert names, "adapters are among them"
    for parameter, old in zip(student.trainable_parameters(), before, strict=True):
        shrinks = decay or parameter.ndim > 1
        torch.testing.assert_close(parameter.detach(), old * 0.95 if shrinks else old, rtol=1e-6, atol=0)
    assert {p.ndim > 1 for p in before} == {True, False}


def test_gradients_are_clipped_by_their_global_norm(data: ImageData, small_npz: Path) -> None:
    still = {"momentum": 0.0, "weight_decay": 0.0}
    plain, clipped, short = (push(begun(data, small_npz, "vid", **still, **keys), 8.0) for keys in ({}, {"clip": 2.0}, {"clip": 9.0}))
    assert (length(plain), length(clipped)) == (pytest.approx(0.8, rel=1e-4), pytest.approx(0.2, rel=1e-4))
    for one, other in zip(plain, clipped, strict=True):
        torch.testing.assert_close(one / 4, other, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(plain, short, strict=True)), "a shorter one stays as it is"


def test_each_student_of_a_cohort_is_clipped_by_itself(data: ImageData, small_npz: Path) -> None:
    cohort, (first, second) = cohort_of(data, small_npz, "base", "at", clip=0.05)
    train_with(cohort, EagerEngine("fp32", ""))
    alone, (single,) = cohort_of(data, small_npz, "base", clip=0.05)
    train_with(alone, EagerEngine("fp32", ""))
    assert weights_of(single) == weights_of(first) != weights_of(second)
    free, (other,) = cohort_of(data, small_npz, "base")
    train_with(free, EagerEngine("fp32", ""))
    assert weights_of(other) != weights_of(first)


# The average


def test_the_average_is_its_formula(data: ImageData, small_npz: Path) -> None:
    """Step n, counted from 1: a <- d a + (1 - d) w with d = min(decay, (1 + n) / (10 + n)); statistics of normalisations alike."""
    student = begun(data, small_npz, ema=0.25)
    tracked = {**dict(student.net.named_parameters()), **{n: b for n, b in student.net.named_buffers() if "running_" in n}}
    expected = {name: value.detach().double().clone() for name, value in tracked.items()}
    for step in range(1, 5):
        for name, value in student.net.named_buffers():
            if "running_" in name:
                value.add_(0.1 * step)
        push(student, 1.0)
        decay = min(0.25, (1 + step) / (10 + step))
        assert (decay == 0.25) == (step >= 2), "both of the two occur"
        expected = {name: decay * old + (1 - decay) * tracked[name].detach().double() for name, old in expected.items()}
    weights = {name: value.detach().clone() for name, value in tracked.items()}
    with student.as_measured():
        for name, value in tracked.items():
            torch.testing.assert_close(value.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, weights[name]) for name, value in tracked.items()), "training goes on from the weights"


@pytest.mark.parametrize("split", ["full", "holdout"])
def test_the_average_is_measured_and_ships(data: ImageData, small_npz: Path, split: str) -> None:
    cohort, (student,) = cohort_of(data, small_npz, "base", split=split, ema=0.5, epochs=3)
    plain, (other,) = cohort_of(data, small_npz, "base", split=split, epochs=3)
    reports = list(train(cohort))
    list(train(plain))
    assert weights_of(student) == weights_of(other), "the weights themselves are trained as they would be"
    student.restore_chosen()
    assert weights_of(student) != weights_of(other)
    shipped = evaluate(student.net, cohort.data.epoch_images, "fp32")
    assert int(shipped.correct) == reports[student.chosen_epoch - 1].progress[student].correct
    told = reports[student.chosen_epoch - 1].progress[student].evaluation
    assert told is not None
    assert torch.equal(shipped.probabilities, told.probabilities)


def test_a_graph_s_step_keeps_the_average_bit_for_bit_and_one_that_is_taken_back_leaves_no_trace(data: ImageData, small_npz: Path) -> None:
    keys = {"ema": 0.9, "clip": 1.0, "optimizer": "adamw", "lr": 0.01}
    (plain, (student,)), (taped, (other,)) = (cohort_of(data, small_npz, "vid", **keys) for _ in range(2))
    train_with(plain, EagerEngine("fp32", ""))
    train_with(taped, Taped("fp32", ""))
    states = [one.state()[0] for one in (student, other)]
    assert any(name.startswith("average.") for name in states[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    before = {name: value.clone() for name, value in states[0].items()}
    with restored_after(plain.seed_groups):
        next(EagerEngine("fp32", "").epoch(plain.seed_groups, 0, zero_rates(plain.seed_groups)))
        assert not torch.equal(states[0]["average.steps"], before["average.steps"])
    assert all(torch.equal(value, before[name]) for name, value in student.state()[0].items())


# The runner


def test_a_warm_up_leaves_steps_to_train(ledger: Ledger, small_npz: Path) -> None:
    with pytest.raises(UserError) as error:
        run([config(small_npz, train={"warmup_steps": 10_000})], ledger, CPU)
    assert str(error.value) == "train.warmup_steps=10000 leaves nothing of 8 steps (4 an epoch); set it lower"
    assert ledger.runs() == []
