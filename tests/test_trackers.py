"""Trackers show what the ledger has, live and afterwards alike; none changes a number, and none stops a run."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import assert_refused, command
from helpers.crew import LocalCrew, ledger_of_a_teacher
from helpers.small import Interrupt, config
from helpers.tracked import curve, events, history, records, rows

import flowdistill
from flowdistill.ledger import Ledger, Run
from flowdistill.runner import Report, Watcher, resume, run
from flowdistill.runner import card as runner_card
from flowdistill.runner.remote import driver
from flowdistill.trackers import TRACKERS, Kind, Log

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WARM_UP": 1, "PASSES": 2, "MIN_PASSES": 1}.items():
        monkeypatch.setattr(runner_card, name, value)


@pytest.fixture(scope="module")
def taught(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger_of_a_teacher(small_npz, tmp_path_factory.mktemp("taught") / "runs")


class Lines(Watcher):
    """What was said, with trackers beside."""

    def __init__(self, names: Sequence[str], ledger: Ledger) -> None:
        self.lines: list[str] = []
        super().__init__(log=Log(names, ledger, CPU, self.lines.append) if names else None)


class Stop(Lines):
    """Ctrl-C after the first epoch, which the trackers were told of."""

    def report(self, report: Report) -> None:
        super().report(report)
        raise KeyboardInterrupt


def tracked(names: Sequence[str], ledger: Ledger, *configs: Any) -> tuple[list[Run], list[str]]:
    watcher = Lines(names, ledger)
    return run(configs, ledger, CPU, watcher=watcher), watcher.lines


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()[-50_000:]  # the tensors stand at its end


def shown(ledger: Ledger, no: int) -> list[tuple[int, float]]:
    return [(epoch.epoch, pytest.approx(100 * (epoch.correct or 0) / epoch.images, rel=1e-6)) for epoch in ledger.epochs(no)]


def test_csv_has_what_the_ledger_has_and_the_card(ledger: Ledger, small_npz: Path) -> None:
    (base,), lines = tracked(["csv"], ledger, config(small_npz, method="base"))
    found, folder = rows(ledger.run_folder(base.no)), ledger.run_folder(base.no)
    for row, epoch in zip(found, ledger.epochs(base.no), strict=True):
        assert (int(row["epoch"]), float(row["lr"]), float(row["seconds"])) == (epoch.epoch, epoch.lr, epoch.seconds)
        assert float(row["loss/task"]) == epoch.terms["task"]
        assert float(row["accuracy/test"]) == 100 * (epoch.correct or 0) / epoch.images
    assert (folder / "csv" / "card.md").read_text().startswith(f"# Compression card: run {base.no}, base")
    assert f"csv: {ledger.folder}/NUMBER/metrics.csv" in lines
    assert not (folder / "csv" / "fsp_matrices.png").exists()


def test_accuracy_on_held_out_images_is_not_called_test(ledger: Ledger, small_npz: Path) -> None:
    tracked(["csv"], ledger, config(small_npz, method="base", split="holdout", train={"epochs": 1}))
    (row,) = rows(ledger.run_folder(1))
    assert float(row["accuracy/holdout"]) == 100 * (ledger.epochs(1)[0].correct or 0) / ledger.epochs(1)[0].images
    assert "accuracy/test" not in row


def test_a_later_phase_has_columns_of_its_own(taught: Path, small_npz: Path, tmp_path: Path) -> None:
    ledger = copied(taught, tmp_path)
    two_stages = {"fsp": {"schedule": "two-stage", "stage_epochs": 1}}
    student = config(small_npz, method="fsp", teacher="1", student="resnet8", options=two_stages, train={"epochs": 1})
    ((fsp,), lines) = tracked(["csv", "tensorboard"], ledger, student)
    first, second = rows(ledger.run_folder(fsp.no))
    assert first["loss/fsp"]
    assert first["phase"] != second["phase"]
    assert (second["loss/fsp"], bool(second["loss/task"])) == ("", True)
    found = events(ledger.run_folder(fsp.no))
    assert found.Tags()["images"] == ["fsp_matrices"]
    assert (ledger.run_folder(fsp.no) / "csv" / "fsp_matrices.png").read_bytes().startswith(b"\x89PNG")
    assert [tag for tag in found.Tags()["tensors"] if "text" in tag] == [f"{name}/text_summary" for name in ("config", "card", "results")]
    assert not [line for line in lines if "failed" in line or " no " in line]


def copied(taught: Path, tmp_path: Path) -> Ledger:
    shutil.copytree(taught, tmp_path / "runs")
    return Ledger(tmp_path / "runs")


def test_trackers_change_no_number(small_npz: Path, tmp_path: Path) -> None:
    """Two cohorts after each other: the second begins after the first one's card."""
    cohorts = [config(small_npz, method="base", train={"epochs": epochs}) for epochs in (1, 2)]
    alone, beside = (Ledger(tmp_path / name, create=True) for name in ("alone", "beside"))
    before = torch.get_rng_state()
    tracked([], alone, *cohorts)
    tracked(["tensorboard", "csv"], beside, *cohorts)
    assert torch.equal(torch.get_rng_state(), before)
    for no in (1, 2):
        assert alone.run(no).weights_hash == beside.run(no).weights_hash
        assert weights(alone.run_folder(no)) == weights(beside.run_folder(no))
        assert [epoch.terms for epoch in alone.epochs(no)] == [epoch.terms for epoch in beside.epochs(no)]


def test_a_run_that_goes_on_is_one_curve_whose_steps_stand_once(ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on from before what was shown: its last checkpoint is older than the last epoch."""
    names = ["tensorboard", "csv"]
    with pytest.raises(KeyboardInterrupt):
        run([config(small_npz, method="base")], ledger, CPU, watcher=Stop(names, ledger))
    assert [row["epoch"] for row in rows(ledger.run_folder(1))] == ["1"]
    for checkpoint in ledger.run_folder(1).glob("checkpoint*"):
        checkpoint.unlink()
    resume(ledger, CPU, watcher=Lines(names, ledger))
    assert curve(ledger.run_folder(1), "accuracy/test") == shown(ledger, 1)
    assert [row["epoch"] for row in rows(ledger.run_folder(1))] == ["1", "2"]


def test_sent_afterwards_it_is_what_was_shown_live_and_never_doubles(ledger: Ledger, small_npz: Path) -> None:
    tracked(["csv", "tensorboard"], ledger, config(small_npz, method="base"))
    folder = ledger.run_folder(1)
    live, live_curve = (folder / "metrics.csv").read_bytes(), curve(folder, "loss/task")
    (folder / "metrics.csv").unlink()
    for _ in range(2):
        said = command(ledger.folder.parent, "log", "1", "--to", "tensorboard,csv")
        assert (said.code, said.out) == (0, "")
        assert (folder / "metrics.csv").read_bytes() == live
        assert curve(folder, "loss/task") == live_curve
    assert "tensorboard --logdir runs" in said.err


def test_tensorboard_names_each_run_and_its_config(ledger: Ledger, small_npz: Path) -> None:
    tracked(["tensorboard"], ledger, *(config(small_npz, method="base", seed=seed, train={"epochs": 1}) for seed in (3, 4)))
    assert [path.name for path in sorted(ledger.folder.glob("*/tensorboard/*"))] == ["1_base_resnet8_seed3", "2_base_resnet8_seed4"]
    config_text = events(ledger.run_folder(2)).Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| seed | 4 |" in config_text
    assert "| weights.task | 1.0 |" in config_text


def failing(where: str, error: BaseException) -> Kind:
    """A tracker that raises in one place."""

    def fails(name: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            if name == where:
                raise error

        return call

    class Failing:
        epoch, picture, card, close = (staticmethod(fails(name)) for name in ("epoch", "picture", "card", "close"))

    def begin(run_: Run, folder: Path) -> Any:
        fails("begin")()
        return Failing()

    return Kind(begin, lambda runs: "failing: somewhere")


@pytest.mark.parametrize("where", ["begin", "epoch", "picture", "card", "close"])
def test_a_tracker_that_fails_is_one_line_and_the_run_and_other_trackers_go_on(
    where: str, taught: Path, small_npz: Path, tmp_path: Path
) -> None:
    ledger = copied(taught, tmp_path)
    error = SystemExit(3) if where == "epoch" else OSError(28, "No space left on device")
    with TRACKERS.restored():
        TRACKERS.register("failing")(failing(where, error))
        student = config(small_npz, method="fsp", teacher="1", student="resnet8", train={"epochs": 2})
        ((fsp,), lines) = tracked(["failing", "csv"], ledger, student)
    assert fsp.status == "finished"
    why = "SystemExit: 3" if where == "epoch" else "OSError: [Errno 28] No space left on device"
    again = f"flowdistill log {fsp.no} --to failing --runs {ledger.folder}"
    assert [line for line in lines if line.startswith(f"run {fsp.no}: failing")] == [
        f"run {fsp.no}: failing failed ({why}) and is left out from here on; the whole run afterwards: {again}",
    ]
    assert len(rows(ledger.run_folder(fsp.no))) == 2
    assert (ledger.run_folder(fsp.no) / "csv" / "card.md").exists()


def test_a_failing_tracker_ends_flowdistill_log_with_1(ledger: Ledger, small_npz: Path) -> None:
    tracked([], ledger, config(small_npz, method="base", train={"epochs": 1}))
    (ledger.run_folder(1) / "metrics.csv").mkdir()
    said = command(ledger.folder.parent, "log", "1", "--to", "csv")
    assert said.code == 1
    assert "run 1: csv failed (IsADirectoryError" in said.err


def test_a_card_that_cannot_be_made_is_a_line(ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no card today")

    monkeypatch.setattr("flowdistill.trackers.log.measure", fails)
    _, lines = tracked(["csv"], ledger, config(small_npz, method="base", train={"epochs": 1}))
    assert "run 1: no card is logged: RuntimeError: no card today" in lines
    assert len(rows(ledger.run_folder(1))) == 1


def test_a_run_that_diverged_is_shown_as_far_as_it_came(ledger: Ledger, small_npz: Path) -> None:
    ((run_,), _) = tracked(["csv", "tensorboard"], ledger, config(small_npz, method="base", train={"lr": 1e30}))
    assert run_.status == "failed"
    assert "accuracy/test" not in rows(ledger.run_folder(1))[-1]
    results = events(ledger.run_folder(1)).Tensors("results/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| status | failed |" in results


def test_what_was_trained_before_is_told_how_it_is_logged(ledger: Ledger, small_npz: Path) -> None:
    one = config(small_npz, method="base", train={"epochs": 1})
    tracked([], ledger, one)
    keys = {"runs": str(ledger.folder), "train": one.train.model_dump(exclude_defaults=True), "progress": False}
    images = one.data.model_dump(exclude_defaults=True)
    result = flowdistill.train("resnet8", images, log="csv", **keys)
    assert result.run.no == 1
    assert not (result.folder / "metrics.csv").exists()
    _, lines = tracked(["csv"], ledger, one)
    assert lines == []  # the command line alone says it, once for all
    said = command(
        ledger.folder.parent,
        *f"train --model resnet8 --dataset npz:{small_npz} --epochs 1 --batch-size 64 --lr 0.05 --precision fp32 --log csv".split(),
        *("--set", "data.pad=0", "--set", "data.flip=false", "--set", "data.crop=shift", "--set", "data.pad=1"),
    )
    assert "not trained now, and so not logged: flowdistill log 1 --to csv\n" in said.err
    assert said.code == 0


def test_python_takes_a_list_of_trackers(small_npz: Path, tmp_path: Path) -> None:
    keys = {"runs": tmp_path / "runs", "train": {"epochs": 1, "batch_size": 64, "precision": "fp32"}, "progress": False}
    result = flowdistill.train("resnet8", f"npz:{small_npz}", log=["csv", "tensorboard"], **keys)
    assert len(rows(result.folder)) == 1
    assert len(curve(result.folder, "lr")) == 1
    with pytest.raises(flowdistill.UserError, match="log 'tensorbord' is no tracker; choose from: csv, tensorboard, wandb"):
        flowdistill.train("resnet8", f"npz:{small_npz}", log="tensorbord", **keys)


@pytest.mark.parametrize("found", [None, ModuleSpec("tensorboard", None)], ids=["nothing", "a folder of that name"])
def test_a_tracker_that_is_not_installed_is_refused_before_training(
    found: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr("flowdistill.trackers.base.find_spec", lambda name: found if name == "tensorboard" else known(name))
    line = "needs tensorboard, which is not installed; install it with: pip install 'flowdistill[tensorboard]'"
    assert_refused(tmp_path, ["train", "--dataset", "digits", "--log", "csv,tensorboard"], f"--log tensorboard {line}")
    assert_refused(tmp_path, ["log", "1", "--to", "tensorboard"], f"--to tensorboard {line}")


def test_a_run_that_another_process_trains_is_not_logged_from_here(ledger: Ledger, small_npz: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run([config(small_npz, method="base")], ledger, CPU, watcher=Interrupt())
    ledger.update(1, status="running")
    with ledger.lock(1):
        line = "run 1 is being trained by another process; log it when that has ended"
        assert command(ledger.folder.parent, "log", "1", "--to", "csv").err == f"flowdistill: {line}\n"
    ledger.update(1, status="interrupted")
    assert command(ledger.folder.parent, "log", "1", "--to", "csv").code == 0
    assert [row["epoch"] for row in rows(ledger.run_folder(1))] == ["1"]
    assert not (ledger.run_folder(1) / "csv" / "card.md").exists()


def test_the_driver_of_workers_logs(taught: Path, small_npz: Path, tmp_path: Path) -> None:
    ledger = copied(taught, tmp_path)
    watcher = Lines(["csv"], ledger)
    crew = LocalCrew()
    configs = [config(small_npz, method="kd", teacher="1", student="resnet8", seed=seed) for seed in (0, 1)]
    done = driver.run(configs, ledger, CPU, crew.gathered(tmp_path / "storage"), driver.How("eager"), watcher)
    for run_ in done:
        assert [int(row["epoch"]) for row in rows(ledger.run_folder(run_.no))] == [1, 2]
        assert [float(row["loss/kd"]) for row in rows(ledger.run_folder(run_.no))] == [e.terms["kd"] for e in ledger.epochs(run_.no)]
        assert (ledger.run_folder(run_.no) / "csv" / "card.md").exists()


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.usefixtures("_offline")
@pytest.mark.filterwarnings("default")
def test_wandb_is_offline_and_has_what_the_ledger_has_once(ledger: Ledger, small_npz: Path, tmp_path: Path) -> None:
    both = [config(small_npz, method="base", seed=seed) for seed in (0, 1)]
    plain = Ledger(tmp_path / "plain", create=True)
    tracked([], plain, *both)
    _, lines = tracked(["wandb"], ledger, *both)
    assert f"wandb sync {ledger.folder}/NUMBER/wandb/offline-run-*" in " ".join(lines)
    assert not [line for line in lines if "failed" in line]
    for again in (False, True):
        if again:
            assert command(ledger.folder.parent, "log", "2", "--to", "wandb").code == 0
        importlib.import_module("wandb").teardown()  # writes all that is not written yet, as the end of a command does
        for no in (1, 2):
            assert ledger.run(no).weights_hash == plain.run(no).weights_hash
            steps = [step for step in history(ledger.run_folder(no)) if "lr" in step]
            assert [(step["_step"], step["accuracy/test"]) for step in steps] == shown(ledger, no)
            (begun, *_) = [record.run for record in records(ledger.run_folder(no)) if record.HasField("run")]
            assert begun.display_name == f"{no}_base_resnet8_seed{no - 1}"
            assert begun.project == "flowdistill"
