"""On a GPU: the same losses as on the CPU, one run from command to record. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import config

from flowdistill.device import resolve_precision
from flowdistill.ledger import Ledger
from flowdistill.runner import evaluate, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_epoch_is_that_of_the_cpu(small_npz: Path, tmp_path: Path, precision: str) -> None:
    curves = {}
    for device in ("cpu", "cuda"):
        ledger = Ledger(tmp_path / device, create=True)
        teacher = config(small_npz, student="resnet14", seed=9, train={"epochs": 1, "precision": "fp32"})
        run([teacher], ledger, torch.device("cpu"))
        student = config(small_npz, method="fsp", teacher="resnet14", train={"epochs": 1, "precision": precision})
        (done,) = run([student], ledger, torch.device(device))
        curves[device] = ledger.epochs(done.no)[0].terms
        ledger.close()
    for term, value in curves["cpu"].items():
        assert curves["cuda"][term] == pytest.approx(value, rel=1e-2 if precision == "fp32" else 0.1), term  # four steps of SGD


def test_auto_is_bf16_and_a_student_is_measured_again(small_npz: Path, ledger: Ledger) -> None:
    cuda = torch.device("cuda")
    assert resolve_precision("auto", cuda) == "bf16"
    (done,) = run([config(small_npz)], ledger, cuda)
    assert done.precision == "bf16"
    assert evaluate(ledger.run_folder(done.no) / "student.safetensors", cuda).correct == done.correct
