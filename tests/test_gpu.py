"""On a GPU: the losses of the CPU, the same weights from every engine, one run from command to record. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.interruptions import Cut, Scissors
from helpers.small import config
from torch import nn

from flowdistill.device import resolve_precision
from flowdistill.ledger import Ledger, Run
from flowdistill.methods.fsp import FSP
from flowdistill.models.foreign import adopt
from flowdistill.runner import Watcher, evaluate, resume, run
from flowdistill.training import engine_choice

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


CUDA = torch.device("cuda")
GRID = [("base", 0), ("fsp", 0), ("at+kd", 0), ("fsp", 1), ("base", 1)]


REMEMBERING = [("crd", 0), ("dml", 0), ("nd+ofd+srrl", 0), ("mgd", 1), ("simkd", 1)]


def trained(
    small_npz: Path, folder: Path, engine: str, precision: str = "fp32", grid: list[tuple[str, int]] = GRID, **keys: object
) -> list[Run]:
    """A teacher, then the grid as one cohort of three epochs, by operations that repeat bit for bit."""
    ledger = Ledger(folder, create=True)
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 1})], ledger, torch.device("cpu"))
    recipe = {"epochs": 3, "precision": precision}
    calm = {"at+kd": {"weights": {"at": 20.0}}, "crd": {"options": {"crd": {"negatives": 50, "dim": 8}}}}
    configs = [config(small_npz, method=m, teacher="resnet14", seed=seed, train=recipe, **calm.get(m, {})) for m, seed in grid]
    done = run(configs, ledger, CUDA, engine=engine, deterministic=True, **keys)  # type: ignore[arg-type]
    ledger.close()
    return done


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_cohort_is_the_eager_one_bit_for_bit(small_npz: Path, tmp_path: Path, precision: str) -> None:
    """Epochs two and three are measured by a captured evaluation."""
    plain, captured = (trained(small_npz, tmp_path / engine, engine, precision) for engine in ("eager", "graph"))
    assert [done.engine for done in plain + captured] == ["eager"] * 5 + ["graph"] * 5
    assert [done.weights_hash for done in captured] == [done.weights_hash for done in plain]
    assert [done.correct for done in captured] == [done.correct for done in plain]


def test_what_methods_remember_is_captured_bit_for_bit(small_npz: Path, tmp_path: Path) -> None:
    """crd's banks, dml's two networks, tensors of the teacher, masks by image and epoch, a network with the teacher's classifier."""
    plain, captured = (trained(small_npz, tmp_path / engine, engine, grid=REMEMBERING) for engine in ("eager", "graph"))
    assert {done.engine for done in captured} == {"graph"}
    assert [done.weights_hash for done in captured] == [done.weights_hash for done in plain]


def test_a_captured_and_compiled_cohort_trains_alike(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(small_npz, tmp_path / "eager", "eager")
    monkeypatch.setitem(engine_choice.WORTH_COMPILING, "cuda", 0.0)
    both = trained(small_npz, tmp_path / "graph", "graph")
    assert {done.engine for done in both} == {"graph+compiled"}
    for one, other in zip(plain, both, strict=True):
        terms = [Ledger(tmp_path / name).epochs(done.no)[0].terms for name, done in (("eager", one), ("graph", other))]
        assert terms[1] == pytest.approx(terms[0], rel=1e-2)  # four steps: roundings that turn a ReLU


def test_a_method_that_waits_for_the_device_falls_back_and_is_told(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FSP.forward
    monkeypatch.setattr(
        FSP, "forward", lambda *given: {"fsp": forward(*given)["fsp"] * (1.0 if float(given[1].logits.detach().sum()) else 0.0)}
    )
    watcher = Scissors()
    done = trained(small_npz, tmp_path, "graph", watcher=watcher)
    assert [one.engine for one in done] == ["eager" if method == "fsp" else "graph" for method, _ in GRID]
    assert {one.status for one in done} == {"finished"}
    assert any("; fsp resnet8 beside it, eager: it can't be captured (" in line for line in watcher.lines)


def test_images_in_host_memory_give_the_same_weights(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(small_npz, tmp_path / "resident", "eager")
    monkeypatch.setattr("flowdistill.data.batches.free_memory", lambda device: 1000.0)
    fetched = trained(small_npz, tmp_path / "fetched", "auto")
    assert [done.weights_hash for done in fetched] == [done.weights_hash for done in plain]


def test_a_captured_run_resumes_bit_for_bit(small_npz: Path, tmp_path: Path) -> None:
    whole = trained(small_npz, tmp_path / "whole", "graph")
    with pytest.raises(Cut):
        trained(small_npz, tmp_path / "cut", "graph", watcher=Scissors(6))
    ledger = Ledger(tmp_path / "cut")
    assert [done.weights_hash for done in resume(ledger, CUDA)] == [done.weights_hash for done in whole]
    ledger.close()


def test_memory_of_a_captured_cohort_does_not_grow(small_npz: Path, tmp_path: Path) -> None:
    free: list[int] = []

    class Weighing(Watcher):
        def epoch(self, line: str) -> None:
            free.append(torch.cuda.mem_get_info(CUDA)[0])

    ledger = Ledger(tmp_path, create=True)
    run([config(small_npz, train={"epochs": 20})], ledger, CUDA, engine="graph", watcher=Weighing())
    ledger.close()
    assert free[3] - free[-1] < 1 << 20


def of_others(small_npz: Path, folder: Path, engine: str, student: str) -> Run:
    ledger = Ledger(folder, create=True)
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 1})], ledger, torch.device("cpu"))
    keys = {"method": "at+kd", "teacher": "resnet14", "weights": {"at": 20.0}, "train": {"epochs": 2, "precision": "fp32"}}
    (done,) = run([config(small_npz, student=student, **keys)], ledger, CUDA, engine=engine, deterministic=True)
    ledger.close()
    return done


def test_a_network_with_hooks_is_captured_bit_for_bit(small_npz: Path, tmp_path: Path) -> None:
    plain, captured = (of_others(small_npz, tmp_path / engine, engine, "timm:resnet10t") for engine in ("eager", "graph"))
    assert (plain.engine, captured.engine) == ("eager", "graph")
    assert plain.weights_hash == captured.weights_hash


def test_a_network_with_dropout_is_not_captured_and_repeats(small_npz: Path, tmp_path: Path) -> None:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    name = adopt(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), "dropping on a GPU")
    runs = [of_others(small_npz, tmp_path / str(turn), "graph", name) for turn in range(2)]
    assert {done.engine for done in runs} == {"eager"}
    assert len({done.weights_hash for done in runs}) == 1
