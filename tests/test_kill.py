"""No run is lost: processes are really killed, and what they go on to is bit for bit the run that went through."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowdistill.ledger import Ledger, Run
from flowdistill.training.weights import load_weights

KILL = Path(__file__).parent / "helpers" / "kill.py"
RANDOM_KILLS = 20
MOMENTS = 18


def killed(data: Path, folder: Path, *how: str) -> tuple[dict[str, int], str]:
    done = subprocess.run([sys.executable, KILL, data, folder, *how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *log, codes = done.stdout.splitlines()
    return json.loads(codes), "\n".join(log)


def outcome(folder: Path, run: Run) -> tuple[object, ...]:
    """Everything that must not depend on whether the run was cut off: weights, curve, predictions, figures."""
    ledger = Ledger(folder / "runs")
    curve = [dataclasses.replace(epoch, seconds=0.0) for epoch in ledger.epochs(run.no)]
    ledger.close()
    files = folder / "runs" / str(run.no)
    figures = (run.status, run.error, run.correct, run.epoch, run.best_correct, run.best_epoch, run.weights_hash)
    figures += (run.top5, run.macro_f1, run.balanced_accuracy)
    weights, about = load_weights(files / "student.safetensors")
    return *figures, curve, (files / "predictions.npz").read_bytes(), about, {name: value.tolist() for name, value in weights.items()}


def runs_of(folder: Path) -> list[Run]:
    ledger = Ledger(folder / "runs")
    found = ledger.runs(method="fsp")
    ledger.close()
    return found


def assert_as_if_never_killed(folder: Path, straight: Path) -> None:
    wanted = {run.seed: outcome(straight, run) for run in runs_of(straight)}
    assert len(wanted) == 2
    for run in runs_of(folder):
        assert outcome(folder, run) == wanted[run.seed]
    left = {path.name for path in folder.glob("runs/*/*checkpoint*")}
    assert bool(left) == (folder.name == "before the checkpoint is cleared")


@pytest.mark.long
def test_killed_at_every_named_moment_and_resumed(small_npz: Path, tmp_path: Path) -> None:
    codes, log = killed(small_npz, tmp_path, "moments")
    print(log)
    assert len(codes) == 1 + MOMENTS
    assert set(codes.values()) == {0}
    for moment in codes:
        assert_as_if_never_killed(tmp_path / moment, tmp_path / "straight")


@pytest.mark.long
def test_killed_at_twenty_random_moments_of_its_life(small_npz: Path, tmp_path: Path) -> None:
    codes, log = killed(small_npz, tmp_path, "random", str(RANDOM_KILLS))
    print(log)
    assert log.count(". killed ") == RANDOM_KILLS
    assert codes == {"straight": 0, "killed": 0}
    assert sum(run.resumed for run in runs_of(tmp_path / "killed")) >= RANDOM_KILLS
    assert_as_if_never_killed(tmp_path / "killed", tmp_path / "straight")


def test_from_the_shell_as_a_user_does(small_npz: Path, tmp_path: Path) -> None:
    """Fresh processes, the checkpoint's own pace: killed, shown as dead, resumed by its number."""
    words = ("train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", "--batch-size", "64", "--epochs", "150", "--deterministic")

    def flowdistill(folder: str, *given: str) -> subprocess.Popen[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "flowdistill", *given]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=tmp_path / folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    straight = flowdistill("straight", *words)
    with flowdistill("killed", *words) as doomed:
        until = time.monotonic() + 60
        while not (tmp_path / "killed" / "runs" / "1" / "checkpoint.safetensors").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        doomed.kill()
    assert doomed.returncode == -signal.SIGKILL
    assert flowdistill("killed", "runs").communicate()[0].splitlines()[1].startswith("1   dead")
    out, err = flowdistill("killed", "resume", "1").communicate()
    assert "run 1: resumed after epoch" in err
    assert out.splitlines()[1].startswith("1   finished")
    assert straight.communicate()[0].splitlines()[1].startswith("1   finished")
    outcomes = []
    for folder in ("straight", "killed"):
        ledger = Ledger(tmp_path / folder / "runs")
        outcomes.append(outcome(tmp_path / folder, ledger.run(1)))
        ledger.close()
    assert outcomes[0] == outcomes[1]
