"""benchmarks/transfer.py, at a tiny size: two data sets that share no image and no class, and a row for every way."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from flowdistill.ledger import Ledger

PATH = Path(__file__).parents[1] / "benchmarks" / "transfer.py"


def test_the_example_trains_every_way_and_prints_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.spec_from_file_location("transfer", PATH)
    assert found is not None
    assert found.loader is not None
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    few = "--images 3 --batch-size 6 --seeds 0 --epochs 1 --teacher-epochs 1 --stage-epochs 1"
    example.main([str(tmp_path), *few.split()])
    many, small = (np.load(tmp_path / f"{name}.npz") for name in ("digits-0-5", "digits-6-9"))
    digits = load_digits().target
    assert len(many["y_train"]) + len(many["y_test"]) == (digits < 6).sum()
    assert (np.bincount(small["y_train"]).tolist(), np.bincount(many["y_train"]).size) == ([3, 3, 3, 3], 6)
    assert len(small["y_test"]) == sum(-(-(digits == label).sum() // 2) for label in range(6, 10))
    ledger = Ledger(tmp_path / "runs")
    runs = ledger.runs()
    ledger.close()
    assert [one.status for one in runs] == ["finished"] * 6
    assert {(one.method, one.variant, one.teacher_accuracy) for one in runs[1:]} == {
        ("base", "", None),
        ("fsp", "paper, stage_epochs=1", None),
        ("fsp", "paper, reduction=mean, stage_epochs=1, stage_lr=0.01", None),
        ("base", "init=run 1", None),
        ("base", "init=run 1, freeze=bn1,conv1,layer1", None),
    }
    assert capsys.readouterr().out.count("| digits-6-9 |") == 5
