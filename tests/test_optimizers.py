"""The optimisers beside SGD: AdamW in every engine, others in the eager one; what they remember, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cohorts import Taped, a_cohort, train_with, weights_of
from helpers.small import config
from torch import Tensor, nn

from flowdistill.checks import UserError
from flowdistill.config import TrainConfig, validate
from flowdistill.data.dataset import ImageData
from flowdistill.training import optim
from flowdistill.training.cohort import Cohort
from flowdistill.training.engine import EagerEngine, restored_after, zero_rates
from flowdistill.training.engine_choice import choose
from flowdistill.training.student import Student

CPU = torch.device("cpu")
ADAMW = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.05}
USABLE = ("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "sgd")


def train_config(**train: Any) -> TrainConfig:
    return validate({"train": train}).train


def cohort_of(data: ImageData, small_npz: Path, *methods: str, precision: str = "fp32", **train: Any) -> tuple[Cohort, list[Student]]:
    """Two seeds of each method; the weights of convolutions are channels_last, as in a run."""
    runs = [config(small_npz, method=method, teacher="-", seed=seed, train=train) for method in methods for seed in (0, 1)]
    cohort, students = a_cohort(data, runs, precision)
    for student in students:
        student.net.on(CPU)
    return cohort, students


# AdamW


def adamw(weight: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, betas: tuple[float, float], eps: float) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2, by its formula."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        towards = first / (1 - betas[0] ** step) / (np.sqrt(second / (1 - betas[1] ** step)) + eps)
        weight = weight - lr * (towards + decay * weight)
    return weight


@pytest.mark.parametrize("options", [{}, {"betas": [0.5, 0.8], "eps": 1e-3}])
def test_adamw_is_its_formula_whatever_the_layout_of_a_weight(data: ImageData, small_npz: Path, options: dict[str, Any]) -> None:
    """The rate is a tensor on the device, and the networks' weights are channels_last."""
    _, (student, _) = cohort_of(data, small_npz, "base", **ADAMW, optimizer_options=options)
    student.begin_phase(0)
    parameters, chance = student.trainable_parameters(), torch.Generator().manual_seed(3)
    assert any(p.ndim == 4 and not p.is_contiguous() for p in parameters)
    before = [p.detach().double().numpy().copy() for p in parameters]
    drawn = [[torch.randn(p.shape, generator=chance) for p in parameters] for _ in range(3)]
    for gradients in drawn:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optim.set_rate(student.optimizer, torch.tensor(0.01))
        student.optimizer.step()
    betas, eps = tuple(options.get("betas", (0.9, 0.999))), options.get("eps", 1e-8)
    for number, (parameter, first) in enumerate(zip(parameters, before, strict=True)):
        expected = adamw(first, [gradients[number].double().numpy() for gradients in drawn], 0.01, 0.05, betas, eps)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_s_step_of_adamw_is_the_eager_one_bit_for_bit(data: ImageData, small_npz: Path, precision: str) -> None:
    plain, students = cohort_of(data, small_npz, "base", "vid", precision=precision, **ADAMW)
    taped, taped_students = cohort_of(data, small_npz, "base", "vid", precision=precision, **ADAMW)
    train_with(plain, EagerEngine(precision, ""))
    train_with(taped, Taped(precision, ""))
    assert [weights_of(student) for student in students] == [weights_of(student) for student in taped_students]
    assert len({weights_of(student) for student in students}) == len(students)


def test_a_step_of_adamw_that_is_taken_back_leaves_no_trace(data: ImageData, small_npz: Path) -> None:
    """Before they compile and capture, engines take steps; what AdamW remembers is there from the start, and is put back in its place."""
    cohort, students = cohort_of(data, small_npz, "kd", **ADAMW, optimizer_options={"amsgrad": True})
    for student in students:
        student.begin_phase(0)
        student.begin_epoch()
    before = {name: (value, value.clone()) for name, value in students[0].state()[0].items()}
    assert {name.rpartition(".")[0] for name in before if name.startswith("optimizer.")} == {
        f"optimizer.{name}" for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    }
    with restored_after(cohort.seed_groups):
        next(EagerEngine("fp32", "").epoch(cohort.seed_groups, 0, zero_rates(cohort.seed_groups)))
        assert students[0].state()[0]["optimizer.step.0"] == 1
    after = students[0].state()[0]
    assert before.keys() == after.keys()
    assert all(after[name] is value or name.startswith(("net.", "method.")) for name, (value, _) in before.items())
    assert all(torch.equal(after[name], values) for name, (_, values) in before.items())


# What is remembered


def moved(student: Student, epochs: Cohort) -> Mapping[str, Tensor]:
    train_with(epochs, EagerEngine("fp32", ""))
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in student.state()[0].items()}


@pytest.mark.parametrize("name", USABLE)
def test_what_an_optimizer_remembers_comes_back_in_the_layout_of_the_weights(data: ImageData, small_npz: Path, name: str) -> None:
    lr = {"lr": 0.01, "optimizer": name}
    cohort, (student, *_) = cohort_of(data, small_npz, "base", **lr, epochs=1)
    saved = moved(student, cohort)
    assert any(key.startswith("optimizer.") for key in saved)
    _, (other, *_) = cohort_of(data, small_npz, "base", **lr, epochs=1)
    other.load(saved, student.state()[1], phase=0)
    again = other.state()[0]
    assert {key: value.tolist() for key, value in again.items()} == {key: value.tolist() for key, value in saved.items()}
    for parameter in other.trainable_parameters():
        laid_out = [value.stride() for value in other.optimizer.state[parameter].values() if value.shape == parameter.shape]
        assert set(laid_out) <= {parameter.stride()}
    for one in (student, other):  # and the next step is the same
        for parameter in one.trainable_parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        optim.set_rate(one.optimizer, torch.tensor(0.01))
        one.optimizer.step()
    assert weights_of(student) == weights_of(other)


def test_a_checkpoint_from_before_the_other_optimizers_still_loads(data: ImageData, small_npz: Path) -> None:
    cohort, (student, *_) = cohort_of(data, small_npz, "base", epochs=1)
    saved = moved(student, cohort)
    old = {name.replace("optimizer.momentum_buffer.", "momentum."): value for name, value in saved.items()}
    assert sum(name.startswith("momentum.") for name in old) == len(student.trainable_parameters())
    _, (other, *_) = cohort_of(data, small_npz, "base", epochs=1)
    other.load(old, student.state()[1], phase=0)
    again = other.state()[0]
    assert saved.keys() == again.keys()
    assert all(torch.equal(value, saved[name]) for name, value in again.items())


# Others of torch.optim


@pytest.mark.parametrize("name", [name for name in USABLE if name not in optim.FUSED])
def test_other_optimizers_train_as_torch_has_them(data: ImageData, small_npz: Path, name: str) -> None:
    """The step of training against torch's own, given a number as its rate."""
    _, (student, *_) = cohort_of(data, small_npz, "base", lr=0.01, weight_decay=1e-3, optimizer=name)
    student.begin_phase(0)
    ours = student.trainable_parameters()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    reference = optim.CLASSES[name](theirs, lr=0.01, weight_decay=1e-3)
    for step in range(2):
        for one, other in zip(ours, theirs, strict=True):
            one.grad, other.grad = (torch.full_like(p, 0.1 * (step + 1)) for p in (one, other))
        optim.set_rate(student.optimizer, torch.tensor(0.01, dtype=torch.float64))
        student.optimizer.step()
        reference.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_which_optimizers_can_train_is_known() -> None:
    """A class that a later torch brings is among one of the two, and this test says so."""
    refused = {name for name in optim.CLASSES if not trains(name)}
    assert (optim.CLASSES.keys() - refused, refused) == (set(USABLE), {"lbfgs", "muon", "optimizer", "rprop", "sparseadam"})


def trains(name: str) -> bool:
    try:
        optim.refuse_optimizer(train_config(lr=0.01, optimizer=name))
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("train", "line"),
    [
        ({"optimizer": "rmsprob"}, "train.optimizer=rmsprob: did you mean 'rmsprop'?"),
        (
            {"optimizer": "LBFGS"},
            "train.optimizer=lbfgs: torch.optim.LBFGS does not take a rate and a weight decay, which every optimizer is given; "
            "choose from: adadelta, adafactor, adagrad, adam, adamax, adamw, asgd, muon, nadam, radam, rmsprop, sgd",
        ),
        (
            {"optimizer": "adamw", "optimizer_options": {"beta": [0.9, 0.99]}},
            "train.optimizer_options.beta: adamw has no such option; did you mean 'betas'?",
        ),
        (
            {"optimizer": "adamw", "optimizer_options": {"fused": False}},
            "train.optimizer_options.fused: adamw has no such option; choose from: amsgrad, betas, eps",
        ),
        (
            {"optimizer": "adamw", "optimizer_options": {"betas": [0.9, 1.5]}},
            "train.optimizer=adamw: torch.optim.AdamW refuses: Invalid beta parameter at index 1: 1.5",
        ),
    ],
)
def test_what_can_not_train_is_refused(train: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        optim.refuse_optimizer(train_config(lr=0.01, **train))
    assert str(error.value) == line


def test_an_optimizer_that_is_not_fused_is_trained_by_the_eager_engine_alone() -> None:
    how = {"device": CPU, "precision": "fp32", "pixels": 1e12, "optimizer": "rmsprop"}
    chosen = choose("auto", **how)
    assert (type(chosen), chosen.why) == (EagerEngine, "train.optimizer=rmsprop is trained by the eager engine alone")
    assert choose("eager", **how).why == "asked for"
    for wanted in ("compiled", "graph", "graph+compiled"):
        with pytest.raises(UserError) as error:
            choose(wanted, **how)
        line = (
            f"--engine {wanted}: train.optimizer=rmsprop is trained by the eager engine alone; use eager or auto, or one of sgd and adamw"
        )
        assert str(error.value) == line


# The recipe's keys


def test_what_is_recorded_of_another_optimizer_is_read_back() -> None:
    train = train_config(**ADAMW, optimizer_options={"betas": [0.9, 0.98]})
    recorded = train.model_dump(mode="json")
    assert {"momentum", "nesterov"} & recorded.keys() == set()
    assert validate({"train": recorded}).train == train
    assert {"momentum", "nesterov"} <= TrainConfig().model_dump().keys()
    assert "optimizer" not in TrainConfig().model_dump()


def test_the_name_is_taken_in_any_case() -> None:
    assert train_config(optimizer="AdamW", lr=0.01) == train_config(optimizer="adamw", lr=0.01)
