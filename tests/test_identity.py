"""A network is what it computes: runs whose network's code, closure, weights or library changed are other runs, and old weights are not
put into new code without a word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.small import config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flowdistill
from flowdistill.checks import UserError
from flowdistill.ledger import Ledger, Run
from flowdistill.models.cifar_resnet import CifarResNet
from flowdistill.runner import run
from flowdistill.runner.watcher import Watcher

CPU = torch.device("cpu")
NET = """
import os
import pathlib

import torch
from torch import nn

import parts

HERE = pathlib.Path(__file__).parent


class Small(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.a, self.fc = nn.Conv2d(channels, 4, 3, 2, 1), nn.Linear(4, classes)
        if (HERE / "begin.pt").exists():
            self.a.load_state_dict(torch.load(HERE / "begin.pt"))
        self.act = torch.relu if "TANH" not in os.environ else torch.tanh
        nn.init.normal_(self.fc.weight, std=float(os.environ.get("SPREAD", "0.1")))

    def forward(self, x):
        return self.fc(parts.pool(self.act(self.a(x))))
"""
PARTS = """
def pool(x):
    return x.mean((2, 3))
"""


class Heard(Watcher):
    """What was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NET)
    (tmp_path / "parts.py").write_text(PARTS)
    return tmp_path / "nets.py"


def trained(ledger: Ledger, data: Path, student: str, **keys: Any) -> tuple[Run, list[str]]:
    heard = Heard()
    given = {"method": "base", "train": {"epochs": 1}, **keys}
    return run([config(data, student=student, **given)], ledger, CPU, watcher=heard)[0], heard.lines


def change(how: str, nets: Path, patch: pytest.MonkeyPatch) -> None:
    if how == "neighbour":
        (nets.parent / "parts.py").write_text(PARTS.replace("mean", "amax"))
    elif how == "comment":
        nets.write_text(f"# another\n{NET}")
    elif how in ("TANH", "SPREAD"):  # nothing of the code changes, but what it makes
        patch.setenv(how, "0.2")


@pytest.mark.parametrize("how", ["neighbour", "comment", "TANH", "SPREAD"])
def test_another_network_under_the_same_name_is_another_run(
    nets: Path, ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    first, _ = trained(ledger, small_npz, f"{nets}:Small")
    assert trained(ledger, small_npz, f"{nets}:Small")[0].no == first.no
    change(how, nets, monkeypatch)
    other, _ = trained(ledger, small_npz, f"{nets}:Small")
    assert (other.no, other.fingerprint != first.fingerprint) == (2, True)
    assert trained(ledger, small_npz, f"{nets}:Small")[0].no == other.no


def test_first_weights_that_another_file_holds_are_seen_by_the_answers(nets: Path, ledger: Ledger, small_npz: Path) -> None:
    """No code and no attribute differs; a line says it, and each is found again."""
    begin, numbers = nets.parent / "begin.pt", []
    layer = nn.Conv2d(1, 4, 3, 2, 1)
    for factor in (1.0, 1.002, 1.0, 1.002):
        torch.save({name: factor * value for name, value in layer.state_dict().items()}, begin)
        found, lines = trained(ledger, small_npz, f"{nets}:Small")
        numbers.append((found.no, found.fingerprint))
        told = [line for line in lines if "is not what it was in run 1" in line]
        assert len(told) == (len(numbers) == 2), lines
    assert numbers[0] == numbers[2] != numbers[1] == numbers[3]
    assert numbers[0][1] != numbers[1][1]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_another_version_of_a_library_is_another_run(
    ledger: Ledger, small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    timm = pytest.importorskip("timm")
    file = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    flowdistill.training.weights.save_weights(file, net.state_dict(), {"model": "timm:resnet10t"})
    keys = {"student": "timm:resnet10t"} if role == "student" else {"student": "resnet8", "teacher": str(file), "method": "kd"}
    keys |= {"inputs": {"student": {"size": 32}, "teacher": {"size": 32, "mean": [0.5], "std": [0.5]}}}
    first, _ = trained(ledger, small_npz, **keys)
    assert trained(ledger, small_npz, **keys)[0].no == 1
    before = timm.models.resnet.ResNet.forward_features
    monkeypatch.setattr(timm.models.resnet.ResNet, "forward_features", lambda self, x: 1.01 * before(self, x))
    other, lines = trained(ledger, small_npz, **keys)
    assert (other.no, other.fingerprint != first.fingerprint) == (2, True)
    assert any(
        "timm:resnet10t is not what it was in run 1, which is another run therefore (logits in eval mode: " in line for line in lines
    )


def test_a_trained_network_of_ours_that_answers_otherwise_is_refused(
    ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As another version of torch could make it."""
    trained(ledger, small_npz, "resnet8")
    before = CifarResNet.features
    monkeypatch.setattr(CifarResNet, "features", lambda self, x: before(self, 1.01 * x))
    with pytest.raises(
        UserError, match=r"^run 1: other versions than it was trained with: another answer to a fixed batch \(logits in eval mode"
    ):
        trained(ledger, small_npz, "resnet8", teacher="1", method="kd", seed=1)
    said = command(tmp_path, "evaluate", "1", "--accept-changes", "--format", "json")
    assert said.code == 0
    assert "other versions than it was trained with" in json.loads(said.out)[0]["verdict"]


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "1"],
        ["evaluate", "runs/1/student.safetensors"],
        ["export", "1", "--to", "onnx"],
        ["card", "1"],
        ["distill", "--method", "kd", "--teacher", "1", "--student", "resnet8", "--epochs", "1"],
        ["distill", "--method", "kd", "--teacher", "runs/1/student.safetensors", "--student", "resnet8", "--epochs", "1"],
        ["train", "--model", "nets.py:Small", "--init-from", "1", "--epochs", "1"],
        ["train", "--model", "1", "--epochs", "1"],
    ],
)
@pytest.mark.parametrize("changed", ["parts.py", "nets.py"])
def test_old_weights_are_not_put_into_new_code_without_a_word(
    nets: Path, ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], changed: str
) -> None:
    monkeypatch.chdir(nets.parent)
    trained(ledger, small_npz, "nets.py:Small", seed=5)
    file = nets.parent / changed
    whole = file.read_text()
    more = ["--dataset", f"npz:{small_npz}"] if words[0] in ("distill", "train") else []
    file.write_text(whole.replace("x.mean", "2 * x.mean").replace("parts.pool(", "-parts.pool("))
    said = command(nets.parent, *words, *more)
    assert (said.code, said.out) == (2, ""), said
    assert f"{changed} changed since it was trained: another answer to a fixed batch (logits in eval mode: " in said.err
    assert said.err.count("\n") == 1
    file.write_text(f"# a comment\n{whole}")
    said = command(nets.parent, *words, *more)
    assert said.code == 0, said.err
    assert f"{changed} changed since it was trained; the answer to a fixed batch is what it was" in said.err


def test_a_file_of_the_same_name_in_another_folder_is_another_network(
    nets: Path, ledger: Ledger, small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(nets.parent)
    trained(ledger, small_npz, "nets.py:Small")
    other = tmp_path / "other"
    other.mkdir()
    (other / "nets.py").write_text(
        NET.replace("import parts", "").replace("parts.pool(", "torch.tanh(").replace("(self.a(x))))", "(self.a(x)).mean((2, 3))))")
    )
    said = command(other, "evaluate", str(nets.parent / "runs/1/student.safetensors"))
    assert said.code == 2
    assert "nets.py changed, parts.py is gone since it was trained" in said.err


def test_a_run_does_not_go_on_with_other_code(nets: Path, ledger: Ledger, small_npz: Path) -> None:
    class Stop(Watcher):
        def report(self, report: object) -> None:
            raise KeyboardInterrupt

    wanted = [config(small_npz, student=f"{nets}:Small", method="base")]
    with pytest.raises(KeyboardInterrupt):
        run(wanted, ledger, CPU, watcher=Stop())
    (nets.parent / "parts.py").write_text(PARTS.replace("mean", "amax"))
    with pytest.raises(UserError, match=r"^run 1 can't be resumed: parts\.py changed since it began; train it anew with .* and --again$"):
        flowdistill.runner.resume(ledger, CPU, no=1)
    (nets.parent / "parts.py").write_text(PARTS)
    assert flowdistill.runner.resume(ledger, CPU, no=1)[0].status == "finished"


def test_another_process_finds_the_run(nets: Path, small_npz: Path) -> None:
    words = ["train", "--model", "nets.py:Small", "--dataset", f"npz:{small_npz}", "--epochs", "1", "--precision", "fp32"]
    said = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "flowdistill", *words], cwd=nets.parent, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    assert "run 1 has it already" in said[1]


# Modules from Python


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    classes = torch.arange(60) % 3
    images = (
        classes.view(-1, 1, 1, 1).float().expand(-1, 1, 8, 8)
        - 1
        + 0.01 * torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    )
    return DataLoader(TensorDataset(images, classes), batch_size=12), DataLoader(TensorDataset(images, classes), batch_size=20)


def closed(act: Any) -> nn.Module:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(act(self.conv(x)).mean((2, 3)))

    return Small()


def told(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: closed(torch.relu), lambda: closed(torch.zeros_like)),
        (lambda: closed(lambda x: x), lambda: closed(lambda x: x.abs())),
        (lambda: told(closed(torch.relu), extra=1), lambda: told(closed(torch.relu), extra=2)),
        (lambda: closed(nn.LeakyReLU(0.1)), lambda: closed(nn.LeakyReLU(0.3))),
    ],
)
def test_a_module_with_another_closure_or_attribute_is_another_run(tmp_path: Path, one: Any, other: Any) -> None:
    keys: dict[str, Any] = {"train": {"epochs": 1, "precision": "fp32"}, "runs": tmp_path, "progress": False}
    numbers = [flowdistill.train(make(), *loaders(), **keys).run.no for make in (one, other, one, other)]
    assert numbers == [1, 2, 1, 2]


def test_a_table_does_not_compare_networks_of_one_name_and_other_code(
    nets: Path, ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(ledger, small_npz, "resnet8", seed=7)
    base = [trained(ledger, small_npz, f"{nets}:Small", seed=seed)[0] for seed in range(3)]
    same = trained(ledger, small_npz, f"{nets}:Small", method="kd", teacher="1")[0]
    (nets.parent / "parts.py").write_text(PARTS.replace("mean", "amax"))
    other = trained(ledger, small_npz, f"{nets}:Small", method="kd", teacher="1")[0]
    rows = flowdistill.report.tables.summary_rows(ledger.runs(), "last")
    by_print = {row["fingerprint"]: row["base"] for row in rows}
    assert by_print[same.fingerprint] == pytest.approx(sum(one.accuracy or 0 for one in base) / 3)
    assert by_print[other.fingerprint] is None
