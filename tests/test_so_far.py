"""A run that was cut off leaves its student: evaluate and export take it from the checkpoint, and the run can still be gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.small import Interrupt, config

from flowdistill.checks import Changes, UserError
from flowdistill.ledger import Ledger
from flowdistill.runner import evaluate, resume, run
from flowdistill.runner.evaluate import weights_path
from flowdistill.training import checkpoint
from flowdistill.training.weights import load_weights

CPU = torch.device("cpu")


def cut_off(ledger: Ledger, small_npz: Path, **keys: Any) -> None:
    """A teacher, and two students that were stopped after their first epoch."""
    run([config(small_npz, seed=9, limit_train=128, train={"epochs": 1}, split=keys.get("split", "full"))], ledger, CPU)
    runs = [config(small_npz, method=method, limit_train=128, teacher=teacher, **keys) for method, teacher in (("base", None), ("kd", "1"))]
    with pytest.raises(KeyboardInterrupt):
        run(runs, ledger, CPU, watcher=Interrupt())
    assert [one.status for one in ledger.runs()] == ["finished", "interrupted", "interrupted"]


@pytest.mark.parametrize(("keys", "state"), [({}, "net."), ({"train": {"ema": 0.5}}, "average.of."), ({"split": "holdout"}, "chosen.")])
def test_it_is_what_the_run_would_ship_after_that_epoch(ledger: Ledger, small_npz: Path, keys: dict[str, Any], state: str) -> None:
    cut_off(ledger, small_npz, **keys)
    before = [vars(one) for one in ledger.runs()]
    saved = checkpoint.load(ledger.run_folder(2))
    assert saved is not None
    lines: list[str] = []
    for no in (2, 3):
        path, changed = weights_path(str(no), ledger.folder, Changes(say=lines.append))
        assert (path, changed) == (ledger.run_folder(no) / "student.epoch1.safetensors", "")
        weights, metadata = load_weights(path)
        for name, value in weights.items():
            key = f"{state}{name}" if f"{state}{name}" in saved.tensors[str(no)] else f"net.{name}"
            assert torch.equal(value, saved.tensors[str(no)][key]), name
        measured = evaluate(path, CPU)
        assert (measured.correct, measured.verdict) == (metadata["correct"], "as recorded")
    whose = ", its weights those of epoch 1" if "split" in keys else ""
    assert (
        lines[0]
        == f"run 2 is interrupted at epoch 1 of 2{whose}: its student so far is in {ledger.run_folder(2)}/student.epoch1.safetensors"
    )
    assert [vars(one) for one in ledger.runs()] == before, "the ledger has no result of it"


def test_the_run_goes_on_as_if_nobody_had_looked(ledger: Ledger, small_npz: Path, tmp_path: Path) -> None:
    cut_off(ledger, small_npz)
    other = Ledger(tmp_path / "other", create=True)
    cut_off(other, small_npz)
    weights_path("3", ledger.folder, Changes(say=lambda _: None))
    for one in (ledger, other):
        resume(one, CPU)
    assert [one.weights_hash for one in ledger.runs()] == [one.weights_hash for one in other.runs()]


def test_the_commands_take_it_by_the_run_s_number(ledger: Ledger, small_npz: Path, tmp_path: Path) -> None:
    cut_off(ledger, small_npz)
    said = command(tmp_path, "evaluate", "3", "--format", "json", "--device", "cpu", "--runs", str(ledger.folder))
    assert (said.code, json.loads(said.out)[0]["verdict"]) == (0, "as recorded")
    assert "run 3 is interrupted at epoch 1 of 2: its student so far is in" in said.err
    written = ["export", "3", "--to", "safetensors", "--out", str(tmp_path / "far.safetensors"), "--runs", str(ledger.folder)]
    assert command(tmp_path, *written).code == 0
    assert (tmp_path / "far.safetensors").is_file()


def test_without_a_checkpoint_there_is_none(ledger: Ledger, small_npz: Path) -> None:
    cut_off(ledger, small_npz)
    checkpoint.clear(ledger.run_folder(2))
    with pytest.raises(
        UserError, match=r"^run 2 is interrupted, and has no checkpoint that holds its student; go on with: flowdistill resume 2"
    ):
        weights_path("2", ledger.folder)
