"""The time that training would take: what is counted, what is measured, what stands in."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from helpers.small import config

from flowdistill import UserError
from flowdistill.config import RunConfig
from flowdistill.data.interfaces import EvalSet
from flowdistill.ledger import Epoch, Ledger, Run
from flowdistill.runner import Duration, estimate, run
from flowdistill.training import engine_choice, timing
from flowdistill.training.cohort import Cohort
from flowdistill.training.evaluate import Evaluation

CPU = torch.device("cpu")
SECONDS = 10.0  # an epoch of one student, where the clock is replaced
SLOWER = 3.0  # times as long in fp32


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Cohort]:
    """The cohorts that were measured; each student takes ``SECONDS``."""
    seen: list[Cohort] = []

    def seconds_per_epoch(cohort: Cohort) -> float:
        seen.append(cohort)
        return SECONDS * len(cohort.students) * (SLOWER if cohort.precision == "fp32" else 1)

    monkeypatch.setattr(importlib.import_module("flowdistill.runner.estimate"), "seconds_per_epoch", seconds_per_epoch)
    return seen


def base(data: Path, *seeds: int, epochs: int = 2, precision: str = "bf16") -> list[RunConfig]:
    return [config(data, seed=seed, train={"epochs": epochs, "precision": precision}) for seed in seeds]


def taught(data: Path, *seeds: int) -> list[RunConfig]:
    return [
        config(data, seed=seed, method=method, teacher="resnet8", train={"precision": "bf16"}) for method in ("fsp", "at") for seed in seeds
    ]


def test_one_seed_of_each_method_is_measured_and_scaled(ledger: Ledger, small_npz: Path, measured: list[Cohort]) -> None:
    assert estimate(base(small_npz, 0, 1, 2, epochs=5), ledger, CPU).seconds == SECONDS * 5 * 3
    assert [len(cohort.students) for cohort in measured] == [1, 1]  # in bf16, and plainly
    assert estimate(taught(small_npz, 0, 1, 2), ledger, CPU).seconds == SECONDS * 2 * 6
    assert [(len(cohort.seed_groups), len(cohort.students)) for cohort in measured[2:]] == [(1, 2), (1, 2)]


def test_the_engine_that_would_train_is_measured_beside_the_plain_one(
    ledger: Ledger, small_npz: Path, measured: list[Cohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run is compiled, and so is what is measured for it; the plain way is the eager engine in fp32."""
    short = estimate(base(small_npz, 0, 1), ledger, CPU)
    assert short == Duration(SECONDS * 4, SECONDS * 4 * SLOWER, frozenset({"eager engine, bf16"}))
    monkeypatch.setitem(engine_choice.WORTH_COMPILING, "cpu", 1.0)
    long = estimate(base(small_npz, 0, precision="fp32"), ledger, CPU)
    assert long.how == {"compiled engine, fp32"}
    plain = [(cohort.engine.name, cohort.precision) for cohort in measured]
    assert plain == [("eager", "bf16"), ("eager", "fp32"), ("compiled", "fp32"), ("eager", "fp32")]
    both = "0:01:40 by compiled engine, fp32 and eager engine, bf16; 0:03:00 by eager engine, fp32"
    assert str(short + long) == both


def test_a_plain_run_is_measured_once(ledger: Ledger, small_npz: Path, measured: list[Cohort]) -> None:
    found = estimate(base(small_npz, 0, precision="fp32"), ledger, CPU)
    assert found.seconds == found.plainly == SECONDS * 2 * SLOWER
    assert len(measured) == 1
    assert str(found) == "0:01:00 by eager engine, fp32"
    assert str(Duration()) == "0:00:00"


def test_fresh_weights_stand_in_for_teachers_to_be_trained_and_nothing_is_written(ledger: Ledger, small_npz: Path) -> None:
    with pytest.raises(UserError, match="no resnet8 was trained"):
        run(taught(small_npz, 0), ledger, CPU)
    assert estimate(taught(small_npz, 0, 1), ledger, CPU).seconds > 0
    assert not ledger.folder.exists()


def test_a_lone_teacher_that_a_student_can_not_have_is_stood_in_for(ledger: Ledger, small_npz: Path, measured: list[Cohort]) -> None:
    run(base(small_npz, 0), ledger, CPU)
    assert estimate(taught(small_npz, 0, 1), ledger, CPU).seconds == SECONDS * 2 * 4


def test_finished_runs_cost_nothing(ledger: Ledger, small_npz: Path, measured: list[Cohort]) -> None:
    run(base(small_npz, 0, 1), ledger, CPU)
    assert estimate(base(small_npz, 0, 1), ledger, CPU).seconds == 0
    assert measured == []
    assert estimate(base(small_npz, 0, 1, 2), ledger, CPU).seconds == SECONDS * 2
    run(taught(small_npz, 0, 1), ledger, CPU)
    assert estimate(taught(small_npz, 0, 1), ledger, CPU).seconds == 0
    assert estimate(taught(small_npz, 0, 1, 2), ledger, CPU).seconds == SECONDS * 2 * 2


@pytest.mark.parametrize(("status", "left"), [("running", 3), ("interrupted", 3), ("failed", 5), ("finished", 0)])
def test_a_run_that_was_cut_off_costs_its_missing_epochs(
    ledger: Ledger, small_npz: Path, measured: list[Cohort], status: str, left: int
) -> None:
    (done,) = run(base(small_npz, 0, epochs=5), ledger, CPU)
    _cut(ledger, done, 2, status)
    assert estimate(base(small_npz, 0, epochs=5), ledger, CPU).seconds == SECONDS * left


def _cut(ledger: Ledger, whole: Run, epochs: int, status: str) -> None:
    """Enter a run of the same config and seed that ended after these epochs; the whole one becomes another seed's."""
    ledger.update(whole.no, seed=99)
    (no,) = ledger.register([{name: value for name, value in vars(whole).items() if name != "no"} | {"status": status}])
    shutil.copytree(ledger.run_folder(whole.no), ledger.run_folder(no), dirs_exist_ok=True)  # else a finished one is as good as not there
    for epoch in range(1, epochs + 1):
        ledger.add_epochs({no: Epoch(epoch, "joint", 0.1, {"task": 1.0}, 10, 150, 0.5)})


def test_a_refusal_comes_before_training(ledger: Ledger, small_npz: Path) -> None:
    run([config(small_npz, seed=seed, train={"epochs": 9, "lr": 0.01 * (seed + 1)}) for seed in (0, 1)], ledger, CPU)
    with pytest.raises(UserError, match="several recipes"):
        estimate(taught(small_npz, 0), ledger, CPU)


def test_evaluation_is_measured_on_a_batch_and_counted_for_all_images(
    ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, clock = [], iter(range(1000))

    def evaluate(net: object, on: EvalSet, *rest: object) -> Evaluation:
        seen.append(len(on))
        return Evaluation(torch.tensor(0), *[torch.zeros(0)] * 4)

    monkeypatch.setattr(timing, "at_once", lambda *_: 50)
    monkeypatch.setattr(timing, "evaluate", evaluate)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    steps, images, batch = 300 // 64, 150, 50
    assert estimate(base(small_npz, 0, epochs=1, precision="fp32"), ledger, CPU).seconds == steps * 1.0 + images / batch
    assert seen == [batch, batch]
