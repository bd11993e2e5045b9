"""The commands on small data: what goes to stdout, what is recorded, which code they end with."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import command

import flowdistill
from flowdistill.env import version
from flowdistill.ledger import Ledger
from flowdistill.report.tables import LOG_COLUMNS

SHORT = ("--epochs", "1", "--batch-size", "64", "--set", "data.pad=1")


@pytest.fixture(scope="module")
def work(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where two teachers, and two students of three methods each, were trained by the commands."""
    folder = tmp_path_factory.mktemp("work")
    dataset = ("--dataset", f"npz:{small_npz}")
    taught = command(folder, "train", "--model", "resnet_32_14", "--seeds", "0-1", *dataset, *SHORT)
    assert taught.code == 0, taught.err
    words = ("--method", "base,fsp,at+kd", "--student", "resnet8", "--teacher", "resnet14", "--seeds", "0,1")
    weights = ("--set", "weights.at=2", "--set", "options.fsp.pool=avg")
    distilled = command(folder, "distill", *words, *dataset, *SHORT, *weights)
    assert distilled.code == 0, distilled.err
    return folder


def test_every_method_and_seed_is_one_run(work: Path) -> None:
    rows = json.loads(command(work, "runs", "--format", "json").out)
    assert [(row["method"], row["student"], row["seed"]) for row in rows] == [
        *(("base", "resnet14", seed) for seed in (0, 1)),
        *((method, "resnet8", seed) for method in ("base", "fsp", "at+kd") for seed in (0, 1)),
    ]
    assert {row["status"] for row in rows} == {"finished"}


def test_options_and_weights_reach_the_methods_that_have_them(work: Path) -> None:
    runs = {run.method: run for run in Ledger(work / "runs").runs(student="resnet8")}
    assert runs["fsp"].variant == "ours, pool=avg"
    assert runs["at+kd"].config["weights"] == {"task": 1.0, "at": 2.0, "kd": 1.0}
    assert runs["base"].config["weights"] == {"task": 1.0}


def test_the_log_table_has_the_logs_columns_and_the_protocol(work: Path) -> None:
    said = command(work, "table", "--method", "fsp", "--teacher", "resnet_32_14")
    assert f"| {' | '.join(LOG_COLUMNS)} |" in said.out
    assert said.out.startswith("### ResNet14>>8/Small (")
    assert "last epoch of full runs on test; nothing is selected; 150 images; 2 teachers; fsp ours, pool=avg" in said.out


@pytest.mark.parametrize("format_", ["table", "md", "csv", "json"])
@pytest.mark.parametrize("words", [("table",), ("table", "--summary"), ("runs",), ("show", "3"), ("methods",), ("models",), ("datasets",)])
def test_every_listing_has_every_format(work: Path, words: tuple[str, ...], format_: str) -> None:
    said = command(work, *words, "--format", format_)
    assert said.code == 0
    assert said.err == ""
    if format_ == "json":
        rows = json.loads(said.out)
        assert rows
        assert all(isinstance(row, dict) for row in rows)
    elif format_ == "csv":
        rows = list(csv.DictReader(io.StringIO(said.out)))
        assert rows
        assert None not in rows[0].values()
    else:
        assert len(said.out.splitlines()) > 2


@pytest.mark.parametrize("filters", [("--method", "fsp"), ("--method", "kd+at"), ("--teacher", "resnet_32_14")])
def test_a_filtered_summary_keeps_its_baseline(work: Path, filters: tuple[str, ...]) -> None:
    rows = json.loads(command(work, "table", "--summary", "--format", "json", *filters).out)
    assert rows
    assert all(row["method"] != "base" and row["base"] is not None for row in rows)


def test_without_words_the_help_is_printed(work: Path) -> None:
    said = command(work)
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) > 10


def test_the_summary_gives_no_verdict_on_two_runs(work: Path) -> None:
    rows = json.loads(command(work, "table", "--summary", "--format", "json").out)
    fsp = next(row for row in rows if row["method"] == "fsp")
    assert (fsp["n"], fsp["low"], fsp["detectable"]) == (2, None, None)
    assert fsp["base"] is not None


def test_show_prints_config_curve_and_environment(work: Path) -> None:
    out = command(work, "show", "5").out
    assert "fingerprint" in out
    assert '"torch":' in out
    assert "epoch  phase  lr" in out


def test_evaluate_by_number_and_by_file_agree(work: Path) -> None:
    by_number, by_file = (
        json.loads(command(work, "evaluate", target, "--format", "json").out)[0] for target in ("5", "runs/5/student.safetensors")
    )
    assert by_number == by_file
    assert by_number["accuracy"] == by_number["recorded"]
    assert by_number["precision"] == "fp32"


def test_the_record_of_a_run_is_a_config_that_repeats_it(work: Path) -> None:
    said = command(work, "distill", "--config", "runs/5/run.json")
    assert said.code == 0
    assert "run 5 has it already" in said.err


def test_a_toml_file_is_overridden_by_set_and_set_by_options(work: Path, small_npz: Path) -> None:
    (work / "run.toml").write_text(
        f'student = "resnet8"\n[data]\nname = "npz:{small_npz}"\n[train]\nepochs = 9\nlr = 0.3\nbatch_size = 64\n'
    )
    words = ("--config", "run.toml", "--set", "train.epochs=8", "--set", "train.lr=0.2", "--lr", "0.1")
    (preview,) = json.loads(command(work, "train", *words, "--dry-run").out)
    assert preview["config"]["train"]["epochs"] == 8
    assert preview["config"]["train"]["lr"] == 0.1


def test_a_dry_run_tells_taps_and_time_and_writes_nothing(work: Path, small_npz: Path, tmp_path: Path) -> None:
    before = command(work, "runs").out
    words = ("--method", "fsp", "--student", "resnet8", "--teacher", "resnet14", "--dataset", f"npz:{small_npz}", *SHORT, "--dry-run")
    said = command(work, "distill", *words)
    assert "1 runs to do, about 0:00:0" in said.err
    (preview,) = json.loads(said.out)
    assert preview["finished_run"] is None
    assert preview["taps"]["student"] == {"stem": "16x8x8", "stage1": "16x8x8", "stage2": "32x4x4", "stage3": "64x2x2"}
    assert preview["teacher"]["run"] == 2
    assert 0 < preview["cohort_seconds"] == preview["cohort_seconds_eager_fp32"]
    assert said.err.rstrip().endswith(" by eager engine, fp32 (h:mm:ss) on cpu (1 threads)")
    assert preview["gradient_relative_to_task"]["fsp"] > 0
    assert command(work, "runs").out == before
    assert command(tmp_path, "train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", *SHORT, "--dry-run").code == 0
    assert list(tmp_path.iterdir()) == []


def test_version_and_the_card_of_a_method(tmp_path: Path) -> None:
    assert command(tmp_path, "--version").out.strip() == version()
    listed = {row["name"] for row in json.loads(command(tmp_path, "methods", "--format", "json").out)}
    assert {"base", "crd", "dml", "fsp", "simkd", "ls:dkd"} <= listed
    card = command(tmp_path, "methods", "fsp").out
    assert "CVPR 2017" in card
    assert "options.fsp.pairing" in card


def test_a_diverged_run_exits_with_code_1(work: Path, small_npz: Path) -> None:
    words = ("--model", "resnet8", "--dataset", f"npz:{small_npz}", *SHORT, "--lr", "1e30", "--runs", "wild")
    said = command(work, "train", *words)
    assert said.code == 1
    assert "diverged in epoch" in said.out


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_end_with_130_and_are_recorded(small_npz: Path, tmp_path: Path, sent: signal.Signals) -> None:
    words = ["train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", "--epochs", "10000", "--batch-size", "64"]
    process = subprocess.Popen([sys.executable, "-m", "flowdistill", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    curve = tmp_path / "runs" / "ledger.db"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (curve.is_file() and Ledger(tmp_path / "runs").runs()):
        time.sleep(0.005)  # the first moments are the likeliest to be missed
    os.kill(process.pid, sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("interrupted")
    assert Ledger(tmp_path / "runs").run(1).status == "interrupted"


def test_the_same_run_in_a_fresh_process_is_the_same_bit_for_bit(small_npz: Path, tmp_path: Path) -> None:
    """In the tests' own precision and number of threads: others round otherwise."""
    words = ["train", "--model", "resnet14", "--seeds", "1", "--dataset", f"npz:{small_npz}", *SHORT, "--precision", "fp32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "flowdistill", *words], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert command(tmp_path, *words, "--again").code == 0
    first, second = Ledger(tmp_path / "runs").runs()
    assert (first.threads, first.precision) == (second.threads, second.precision) == (1, "fp32")
    assert first.weights_hash == second.weights_hash is not None


def test_the_package_can_be_listed() -> None:
    assert set(flowdistill.__all__) <= set(dir(flowdistill))
