"""Networks that nobody prepared, from image files to a shipped file: the worked examples of docs/MODELS.md, at a tiny size."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.interruptions import cut_off, outcome
from PIL import Image

from flowdistill.config import RunConfig, validate
from flowdistill.ledger import Ledger
from flowdistill.runner import execute, run
from flowdistill.runner.cohorts import prepare
from flowdistill.runner.plan import plan
from flowdistill.training.cohort import train

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
IMAGES = 96  # half of them are trained on
BATCH = 16
EXAMPLE = Path(__file__).parents[1] / "benchmarks" / "digits_folder.py"

FILE = """
import torch.nn.functional as F
from torch import nn

class Small(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.entry, self.middle, self.exit = nn.Conv2d(channels, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 1, 1), nn.Conv2d(12, 16, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (8, 12, 16))
        self.classify = nn.Linear(16, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norms[0](self.entry(x))), 2)
        x = F.max_pool2d(F.relu(self.norms[1](self.middle(x))), 2)
        return self.classify(F.relu(self.norms[2](self.exit(x))).mean((2, 3)))

def vit(classes, channels, size):
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(size, 8, channels, classes, embed_dim=24, depth=2, num_heads=2)
"""


def write_digits(folder: Path, *words: str) -> None:
    found = importlib.util.spec_from_file_location("digits_folder", EXAMPLE)
    assert found is not None
    assert found.loader is not None
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    example.main([str(folder), *words])


@pytest.mark.parametrize(("channels", "mode"), [("1", "L"), ("3", "RGB")])
def test_the_digits_as_files(tmp_path, channels, mode):
    write_digits(tmp_path, "--size", "12", "--channels", channels, "--images", "60")
    train_, test = (sorted((tmp_path / part).rglob("*.png")) for part in ("train", "test"))
    assert [path.name for path in sorted(train_, key=lambda path: path.name)] == [f"{number:04}.png" for number in range(30)]
    assert len(test) == 30
    with Image.open(tmp_path / "train" / "0" / "0000.png") as image:  # the first digit is a nought
        assert (image.mode, image.size) == (mode, (12, 12))
        grey = image.convert("L")
        assert grey.getpixel((6, 6)) < 60 < 120 < max(grey.tobytes())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of 64x64, a file of networks, and run 1, a ResNet-10-T of timm trained on them."""
    folder = tmp_path_factory.mktemp("any")
    write_digits(folder / "digits", "--images", str(IMAGES))
    (folder / "nets.py").write_text(FILE)
    said = command(folder, "train", "--model", "timm:resnet10t", "--seeds", "100", *OPTIONS)
    assert said.code == 0, said.err
    return folder


KEYS: dict[str, Any] = {
    "data": {"name": "folder:digits", "flip": False, "pad": 2},
    "train": {"epochs": 1, "batch_size": BATCH, "lr": 0.02, "precision": "fp32"},
}
OPTIONS = ("--dataset", "folder:digits", "--set", "data.flip=false", "--set", "data.pad=2", "--epochs", "1", "--batch-size", "16")
OPTIONS = (*OPTIONS, "--lr", "0.02", "--precision", "fp32")


def keys(**changes: Any) -> RunConfig:
    return validate({**KEYS, "teacher": "1", **changes, "train": {**KEYS["train"], **changes.pop("train", {})}})


METHODS = ("base", "kd", "at", "fsp")


@pytest.fixture(scope="module")
def runs(work: Path) -> list[dict[str, Any]]:
    names = ("--student", "timm:mobilenetv3_small_050", "--teacher", "timm:resnet10t", "--method", ",".join(METHODS))
    given = (*names, *OPTIONS, "--set", "options.fsp.adapter=conv1x1", "--set", "weights.at=1")
    doctor = command(work, "doctor", *given, "--format", "json")
    findings = json.loads(doctor.out)
    assert {row["verdict"] for row in findings if row["check"] != "answers"} <= {"ok", "look"}, findings
    said = command(work, "distill", *given)
    assert said.code == 0, said.err
    assert "taps of timm:mobilenetv3_small_050 <- timm:resnet10t" in said.err
    assert "  stage2: blocks.1 16x8x8 <- layer2 128x8x8; channels 16 <- 128" in said.err
    assert "  fsp trains beside the student: adapters." in said.err
    return [row for row in json.loads(command(work, "runs", "--format", "json").out) if row["student"].startswith("timm:mobile")]


class TestLibraryToLibrary:
    """timm's ResNet-10-T -> timm's MobileNetV3, by the commands, to an int8 file."""

    def test_each_method_trains_another_student(self, runs):
        assert [row["status"] for row in runs] == ["finished"] * 4
        assert [row["method"] for row in runs] == list(METHODS)

    def test_the_summary_has_every_method(self, work, runs):
        said = command(work, "table", "--summary", "--student", "timm:mobilenetv3_small_050", "--format", "json")
        assert {row["method"] for row in json.loads(said.out)} == set(METHODS)

    def test_the_onnx_file_answers_as_the_student_does(self, work, runs):
        """Compared in fp32, then quantised; what it says of itself."""
        import onnxruntime

        said = command(work, "export", str(runs[-1]["no"]), "--to", "onnx", "--int8", "--format", "json")
        assert said.code == 0, said.err
        (written,) = json.loads(said.out)
        assert written["difference"] <= written["allowed"]
        session = onnxruntime.InferenceSession(work / written["file"])
        told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        assert (told["model"], told["classes"], told["input"]) == ("timm:mobilenetv3_small_050", 10, [3, 64, 64])
        assert told["labels"] == [str(label) for label in range(10)]
        assert told["accuracy"] == written["accuracy_int8"]
        assert written["accuracy_fp32"] == pytest.approx(float(runs[-1]["acc"]), abs=0.005)


def test_a_module_with_functions_between_its_layers(work):
    """Taught by a network of this package, measured from its file alone, and shipped as a program."""
    teacher = command(work, "train", "--model", "resnet8", "--seeds", "101", *OPTIONS)
    assert teacher.code == 0, teacher.err
    taps = json.loads(command(work, "taps", "nets.py:Small", "--size", "64", "--classes", "10", "--format", "json").out)
    assert [(row["name"], row["module"], row["size"]) for row in taps[:3]] == [
        ("stem", "norms.0", "64x64"),
        ("stage1", "norms.1", "32x32"),
        ("stage2", "norms.2", "16x16"),
    ]
    given = ("--student", "nets.py:Small", "--teacher", "resnet8", "--method", "at", "--set", "weights.at=1")
    said = command(work, "distill", *given, *OPTIONS)
    assert said.code == 0, said.err
    assert "taps of nets.py:Small <- resnet8, stages paired by stride" in said.err
    (done,) = [row for row in json.loads(command(work, "runs", "--format", "json").out) if row["student"] == "nets.py:Small"]
    (measured,) = json.loads(command(work, "evaluate", str(done["no"]), "--format", "json").out)
    assert measured["accuracy"] == measured["recorded"]
    shipped = command(work, "export", str(done["no"]), "--to", "torch-export", "--format", "json")
    assert shipped.code == 0, shipped.err
    assert torch.export.load(work / json.loads(shipped.out)[0]["file"]).module()(torch.zeros(3, 64, 64, 3).byte()).shape == (3, 10)


TRANSFORMERS = [
    ("nets.py:vit", {"method": "at+fsp+kd", "options": {"fsp": {"adapter": "conv1x1"}}, "weights": {"at": 1.0}}),
    ("timm:convnext_atto", {"method": "at+kd", "weights": {"at": 1.0}}),
]


@pytest.mark.parametrize(("student", "more"), TRANSFORMERS)
def test_other_kinds_of_networks_learn_from_a_convolutional_one(work, monkeypatch, student, more):
    monkeypatch.chdir(work)
    ledger = Ledger(work / "runs")
    (done,) = run([keys(student=student, train={"epochs": 3}, **more)], ledger, CPU)
    assert (done.status, done.teacher) == ("finished", "timm:resnet10t")
    first, *_, last = ledger.epochs(done.no)
    ledger.close()
    assert set(first.terms) == {"task", *more["method"].split("+")}
    assert sum(last.terms.values()) < sum(first.terms.values())


SMALL = {"student": "nets.py:Small", "method": "at+kd", "weights": {"at": 1.0}}
PAIRS = [
    {"student": "timm:mobilenetv3_small_050", "method": "at+kd", "weights": {"at": 1.0}},
    {"student": "nets.py:vit", "method": "fsp", "options": {"fsp": {"adapter": "conv1x1"}}},
]


@pytest.mark.parametrize("pair", [SMALL, PAIRS[1]], ids=lambda pair: pair["student"])
def test_a_compiled_step_is_the_eager_one_within_rounding(work, monkeypatch, pair):
    """One step on all images; its losses as tests/test_engines.py holds those of this package's own networks, by a quicker compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.chdir(work)
    ledger = Ledger(work / "runs")
    config = keys(**pair, train={"batch_size": IMAGES // 2, "epochs": 2})
    found = []
    for engine in ("eager", "compiled"):
        ((cohort, (member,)),) = prepare(plan([config], ledger, CPU), CPU, engine)
        found.append(next(report.progress[member.student].terms for report in train(cohort)))
        assert cohort.engine.name == engine, cohort.engine.why
    ledger.close()
    assert len(found[0]) == len(pair["method"].split("+")) + 1
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["student"])
def test_resumed_is_straight_bit_for_bit(work, monkeypatch, pair):
    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.chdir(work)
    ledger = Ledger(work / "runs")
    config, steps = keys(**pair, seed=5, train={"epochs": 3}), IMAGES // 2 // BATCH
    (interrupted,) = cut_off([config], ledger, steps + 1)
    assert len(ledger.epochs(interrupted.no)) == 1
    (resumed,) = run([config], ledger, CPU)
    assert (resumed.no, resumed.resumed) == (interrupted.no, 1)
    (straight,) = run([config], ledger, CPU, again=True)
    assert outcome(resumed, ledger) == outcome(straight, ledger)
    ledger.close()
