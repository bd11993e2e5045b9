"""The range test of doctor --rates: its curve against a plain loop, its rule against numpy, and what it says where there is no rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from helpers.cohorts import CPU, a_cohort
from helpers.command import command
from helpers.small import a_teacher_in, config
from torch import Tensor

from flowdistill import models
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.methods import METHODS
from flowdistill.randomness import states
from flowdistill.runner import doctor
from flowdistill.runner.doctor import Finding, examine
from flowdistill.training import rates
from flowdistill.training.rates import Curve, diverged, ladder, least, range_test, smoothed

pytestmark = pytest.mark.usefixtures("own_code")

Numbers = npt.NDArray[np.float64]


# The rule


def by_numpy(losses: Numbers) -> Numbers:
    """The weighted mean of the losses so far: b^k for the one k steps ago."""
    powers = 0.8 ** np.subtract.outer(np.arange(len(losses)), np.arange(len(losses)))
    lower = np.tril(powers)
    return (lower @ losses) / lower.sum(1)


def test_the_ladder_grows_by_one_factor() -> None:
    assert ladder() == pytest.approx(np.geomspace(1e-6, 10, 100), rel=1e-12)


@pytest.mark.parametrize("bottom", [1e-3, 0.03, 0.5])
@pytest.mark.parametrize("shift", [0.0, -10.0], ids=["above 0", "below 0"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_rate_of_the_least_loss_is_numpys(bottom: float, shift: float, noise: float) -> None:
    """Loss 2.3 that falls to 0.5 at a known rate, and then rises steeply."""
    x = np.log10(np.array(ladder()) / bottom)
    losses = 2.3 - 1.8 * np.exp(-((x / 0.7) ** 2)) + np.exp(4 * (x - 1)).clip(max=1e3) + shift
    losses += noise * np.random.default_rng(0).normal(size=100)
    means = by_numpy(losses)
    assert smoothed(losses.tolist()) == pytest.approx(means.tolist(), rel=1e-9)
    found = least(Curve(ladder(), losses.tolist()))
    assert found == ladder()[int(means.argmin())]
    assert bottom <= found < 2.5 * bottom, "the mean lags behind, by less than half a decade"


@pytest.mark.parametrize("shift", [0.0, -10.0])
def test_it_has_diverged_where_the_smoothed_loss_is_four_times_its_best(shift: float) -> None:
    losses = np.full(40, 2.0) + shift
    losses[20:] += 2.0 * np.arange(20)
    means = by_numpy(losses)
    expected = [mean > means[: step + 1].min() + 3 * abs(means[: step + 1].min()) for step, mean in enumerate(means)]
    assert [diverged(losses[: step + 1].tolist()) for step in range(40)] == expected
    assert 22 < expected.index(True) < 39
    assert diverged([2.0, math.nan])
    assert diverged([math.inf])


@pytest.mark.parametrize(
    "losses",
    [[2.0] * 100, np.linspace(2, 5, 100).tolist(), [2.0, 9.0], [math.nan], [2.0] * 30 + [math.inf]],
    ids=["flat", "rises", "diverges at once", "never finite", "breaks"],
)
def test_no_rate_where_the_loss_does_not_fall(losses: list[float]) -> None:
    assert least(Curve(ladder()[: len(losses)], losses)) is None


# The curve


RECIPES: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ({"momentum": 0.9, "weight_decay": 0.01}, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.01)),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3},
        lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_curve_is_that_of_a_plain_loop(recipe: str, data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of four batches an epoch; the schedule and the warm-up of the recipe are not followed."""
    monkeypatch.setattr(rates, "STEPS", 10)
    monkeypatch.setattr(rates, "LAST", 0.5)
    train, optimizer = RECIPES[recipe]
    run = config(small_npz, method="kd", teacher="-", weights={"task": 0.5, "kd": 2.0}, train={**train, "epochs": 4})
    cohort, (student,) = a_cohort(data, [run])
    before, drawn = {name: value.clone() for name, value in student.net.state_dict().items()}, states()
    found = range_test(cohort)
    assert states() == drawn
    assert all(torch.equal(value, before[name]) for name, value in student.net.state_dict().items()), "it is taken back"
    seed_group = cohort.seed_groups[0]
    assert seed_group.teacher is not None
    plain = models.build("resnet8", cohort.data.spec, seed=run.seed).train()
    stepper = optimizer(plain.parameters())
    losses: list[float] = []
    batches = [pair for epoch in range(3) for pair in seed_group.batches.epoch(epoch)]
    for rate, (images, batch) in zip(np.geomspace(1e-6, 0.5, 10), batches, strict=False):
        ours, theirs = plain(images).logits, seed_group.teacher.teach(images).logits
        kd = 16 * F.kl_div((ours / 4).log_softmax(1), (theirs / 4).log_softmax(1), reduction="batchmean", log_target=True)
        loss = 0.5 * F.cross_entropy(ours, batch.labels) + 2 * kd
        losses.append(float(loss.detach()))
        stepper.param_groups[0]["lr"] = rate
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    assert found.rates == pytest.approx(np.geomspace(1e-6, 0.5, 10), rel=1e-9)
    assert found.losses == pytest.approx(losses, rel=2e-3)
    assert range_test(cohort) == found, "it is the same again"


def test_a_loss_that_can_not_be_computed_any_more_ends_it(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decomposed(_method: Any, student: Any, *_: Any) -> dict[str, Tensor]:
        if not student.logits.isfinite().all() or student.logits.detach().abs().max() > 1e3:
            raise torch.linalg.LinAlgError("the input matrix contains non-finite values")
        return {"kd": student.logits.square().mean()}

    monkeypatch.setattr(rates, "LAST", 1e9)
    monkeypatch.setattr(METHODS["kd"], "forward", decomposed)
    cohort, _ = a_cohort(data, [config(small_npz, method="kd", teacher="-")])
    found = range_test(cohort)
    assert 2 < len(found.losses) < 100
    assert math.isnan(found.losses[-1]) or diverged(found.losses)


def test_it_ends_where_training_diverges(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "STEPS", 20)
    monkeypatch.setattr(rates, "LAST", 1e30)
    cohort, _ = a_cohort(data, [config(small_npz)])
    found = range_test(cohort)
    assert 2 < len(found.losses) == len(found.rates) < 20
    assert diverged(found.losses)
    assert not any(diverged(found.losses[:count]) for count in range(1, len(found.losses)))


# What the doctor says


@pytest.fixture(scope="module")
def trained(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    with a_teacher_in(tmp_path_factory.mktemp("rates") / "runs", small_npz) as ledger:
        yield ledger


@pytest.fixture
def look(small_npz: Path, trained: Ledger, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """What is found of one method, with a range test of 30 steps; its time is not measured."""
    monkeypatch.setattr(doctor, "seconds_per_epoch", lambda _: 1.0)
    monkeypatch.setattr(rates, "STEPS", 30)
    monkeypatch.setattr(rates, "PLATEAU", 6)

    def found(**keys: Any) -> list[Finding]:
        before = [(one.no, one.status) for one in trained.runs()]
        said = examine([config(small_npz, **keys)], trained, CPU, find_rates=True)
        assert [(one.no, one.status) for one in trained.runs()] == before
        return said

    return found


def told(found: list[Finding], check: str) -> tuple[str, str]:
    (one,) = (finding for finding in found if finding.check == check)
    return one.verdict, one.found


PROPOSED = re.compile(
    r"--lr ([\d.e-]+), a tenth of the rate of the least loss, ([\d.e-]+); range test of (\w+), (\d+) batches, the 4 of an epoch again and "
    r"again, no schedule, [\d.]+ s; smoothed loss by rate: [\d.]+ at 1.0e-06, .*"
)


@pytest.mark.parametrize(
    "keys",
    [{}, {"method": "kd", "teacher": "1"}, {"train": {"optimizer": "adamw", "lr": 1e-3}}, {"method": "dml"}],
    ids=["base", "kd", "adamw", "dml"],
)
def test_a_rate_is_proposed(keys: dict[str, Any], look: Callable[..., list[Finding]]) -> None:
    """Over a wider range than noise is: the loss does fall in thirty steps."""
    verdict, said = told(look(**keys), f"{keys.get('method', 'base')}: rate")
    found = PROPOSED.fullmatch(said)
    assert found, said
    assert verdict == "ok"
    assert float(found[1]) == pytest.approx(float(found[2]) / 10, rel=0.06)
    assert found[3] == keys.get("train", {}).get("optimizer", "sgd")


def test_a_phase_that_has_a_rate_of_its_own_is_not_what_is_tested(look: Callable[..., list[Finding]]) -> None:
    options = {"fsp": {"schedule": "two-stage", "stage_epochs": 1}}
    said = told(look(method="fsp", teacher="1", options=options), "fsp: rate")[1]
    assert " of phase 'task', the 4 of an epoch again and again, " in said


def test_training_that_diverges_at_once(look: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "FIRST", 1e25)
    monkeypatch.setattr(rates, "LAST", 1e30)
    verdict, said = told(look(), "base: rate")
    assert verdict == "look"
    assert said.startswith(
        "the loss fell at no rate before training diverged at the rate 1.5e+25, so none can be proposed; range test of sgd, 2 b"
    )


def test_a_loss_that_never_falls(look: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "FIRST", 1e-12)
    monkeypatch.setattr(rates, "LAST", 1e-9)
    verdict, said = told(look(), "base: rate")
    assert verdict == "look"
    assert said.startswith("the loss fell at no rate up to 1e-09, so none can be proposed; range test of sgd, 30 batches, ")


def test_a_method_whose_loss_is_not_finite_is_one_line(look: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_method: Any, student: Any, *_: Any) -> dict[str, Tensor]:
        return {"kd": student.logits.sum() * math.nan}

    monkeypatch.setattr(METHODS["kd"], "forward", broken)
    found = look(method="kd", teacher="1")
    assert not [finding for finding in found if finding.check == "kd: rate"]
    verdict, said = told(found, "kd: start")
    assert verdict == "wrong"
    assert said.startswith("kd resnet8: kd is not finite on the first batch")


def test_the_command_finds_rates_where_it_is_asked(small_npz: Path, tmp_path: Path) -> None:
    words = [
        "doctor",
        "--dataset",
        f"npz:{small_npz}",
        "--student",
        "resnet8",
        "--method",
        "base",
        "--batch-size",
        "150",
        "--format",
        "csv",
    ]
    said = command(tmp_path, *words, "--rates")
    assert said.err.splitlines() == ["base: taps, gradients, rate, cost"]
    assert "\nbase: rate,ok," in said.out
    assert "base: rate" not in command(tmp_path, *words).out
