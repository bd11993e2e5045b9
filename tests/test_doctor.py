"""What doctor says before a training: six planted mistakes, each beside a sound control, and all else that it looks at."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.networks import TWO_STAGE_NET
from helpers.small import config
from PIL import Image
from torch import Tensor

from flowdistill import UserError, models
from flowdistill.config import RunConfig, assign
from flowdistill.data.interfaces import EvalSet
from flowdistill.ledger import Ledger
from flowdistill.runner import run
from flowdistill.runner.doctor import Finding, examine
from flowdistill.runner.teacher_diagnosis import Answers, another_order
from flowdistill.training.weights import load_weights, save_weights
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
DIGITS = DataSpec("", 1, 10, 1, 8, 8)
PIXELS = {"teacher": {"mean": [0.0], "std": [1.0]}}  # what the teacher was trained on: from 0 to 1
Look = Callable[..., list[Finding]]


@pytest.fixture(scope="module")
def trained(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of one run: a resnet14 that knows the small digits, as pixels from 0 to 1."""
    folder = tmp_path_factory.mktemp("doctor") / "runs"
    ledger = Ledger(folder, create=True)
    inputs = {"student": PIXELS["teacher"]}
    (done,) = run([config(small_npz, student="resnet14", seed=9, inputs=inputs, train={"epochs": 9, "batch_size": 16})], ledger, CPU)
    ledger.close()
    assert done.accuracy is not None
    assert done.accuracy > 70
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path


@pytest.fixture
def look(work: Path, small_npz: Path) -> Iterator[Look]:
    """What is found, kd from run 1 where nothing else is said."""
    ledger = Ledger(work / "runs")

    def found(*configs: RunConfig, data: Path = small_npz, **keys: Any) -> list[Finding]:
        return examine(configs or [config(data, **{"method": "kd", "teacher": "1", **keys})], ledger, CPU)

    yield found
    ledger.close()


@pytest.fixture
def weights(work: Path) -> dict[str, Tensor]:
    return load_weights(work / "runs" / "1" / "student.safetensors")[0]


@pytest.fixture
def folder(small_npz: Path, work: Path) -> Path:
    """The small digits as image files, of the classes d0 to d9."""
    with np.load(small_npz) as whole:
        for part in ("train", "test"):
            for number, (image, label) in enumerate(zip(whole[f"x_{part}"], whole[f"y_{part}"], strict=True)):
                path = work / "digits" / part / f"d{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    return work / "digits"


def of_folder(path: Path, teacher: str, *, stream: bool | None = None) -> RunConfig:
    """kd on image files."""
    one = config(path, method="kd", teacher=teacher)
    return one.model_copy(update={"data": one.data.model_copy(update={"name": f"folder:{path}", "stream": stream})})


def told(found: list[Finding], check: str) -> tuple[str, str]:
    """Verdict and words of one check."""
    (one,) = (finding for finding in found if finding.check == check)
    return one.verdict, one.found


def wrong(found: list[Finding]) -> list[str]:
    return [finding.check for finding in found if finding.verdict == "wrong"]


def saved(path: Path, state: dict[str, Tensor]) -> str:
    """A foreign file of a resnet14: it says nothing of classes and pixels."""
    torch.save(state, path)
    return f"resnet14@{path}"


def reordered(state: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    return state | {name: state[name][order] for name in ("fc.weight", "fc.bias")}


def cured(words: str) -> dict[str, Any]:
    """The keys that a finding's --set options give."""
    values: dict[str, Any] = {}
    for assignment in re.findall(r"--set ('[^']*'|[^\s)]+)", words):
        assign(values, *shlex.split(assignment))
    assert values
    return values


def test_a_sound_plan(look: Look) -> None:
    found = look(method="fsp")
    assert [finding.check for finding in found] == ["data", "student", "teacher", "answers", "fsp: taps", "fsp: fsp", "fsp: cost"]
    assert {finding.verdict for finding in found} == {"ok"}
    assert told(found, "data")[1] == "small: 300 training and 150 test images 1x8x8, 10 classes"
    assert "parameters, the student has 0.4" in told(found, "teacher")[1]
    assert told(found, "teacher")[1].endswith("sees 1x8x8, its own mean [0] and std [1]")
    assert re.fullmatch(r"resnet14: [789]\d\.\d% of 150 test images \(chance 1\d\.\d%\)", told(found, "answers")[1])
    assert "stage1: layer1.0 16x8x8 <- layer1.1 16x8x8" in told(found, "fsp: taps")[1]
    assert re.match(r"its gradient is [\d.]+ x the task.s \(weight 1\); --set weights.fsp=[\d.]+ would", told(found, "fsp: fsp")[1])
    assert told(found, "fsp: cost")[1].startswith("2 epochs: about 0:00:0")


# The six mistakes


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 3, 2, 1, 4, 9, 6, 7, 8, 5], ["3 it calls 1", "1 it calls 3", "9 it calls 5 and 1 more"]),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 0], ["1 it calls 0", "2 it calls 1", "3 it calls 2 and 7 more"]),
    ],
    ids=["swapped", "rotated"],
)
def test_mistake_class_order(order: list[int], words: list[str], look: Look, work: Path, weights: dict[str, Tensor]) -> None:
    verdict, said = told(look(teacher=saved(work / "it.pt", reordered(weights, order)), inputs=PIXELS), "answers")
    assert verdict == "wrong"
    assert "; wrong class order: " in said
    assert ", ".join(f"what the data calls {each}" for each in words) in said
    assert said.endswith("number the classes as its training did")
    assert wrong(look(teacher=saved(work / "it.pt", weights), inputs=PIXELS)) == []


def test_mistake_class_order_by_its_labels(look: Look, folder: Path, weights: dict[str, Tensor]) -> None:
    labels = [f"d{number}" for number in range(10)]
    for order, verdict in (([1, 0, *range(2, 10)], "wrong"), (list(range(10)), "ok")):
        about = {"model": "resnet14", "labels": [labels[number] for number in order], "input": [1, 8, 8], "mean": [0.0], "std": [1.0]}
        save_weights(folder / "it.safetensors", reordered(weights, order), about)
        found = told(look(of_folder(folder, str(folder / "it.safetensors"))), "answers")
        assert found[0] == verdict
    assert "%" in found[1]
    save_weights(folder / "it.safetensors", weights, about | {"labels": labels[::-1]})
    assert told(look(of_folder(folder, str(folder / "it.safetensors"))), "answers") == (
        "wrong",
        "resnet14: class 'd9' where the data has 'd0'; wrong class order: number the classes as its training did",
    )


@pytest.mark.parametrize(("scale", "words"), [(1.0, "pixels from 0 to 1 "), (1 / 255, "pixels from 0 to 255 ")], ids=["to 1", "to 255"])
def test_mistake_normalisation(scale: float, words: str, look: Look, work: Path, weights: dict[str, Tensor]) -> None:
    file = saved(work / "it.pt", weights | {"conv1.weight": weights["conv1.weight"] * scale})
    verdict, said = told(look(teacher=file), "answers")
    assert verdict == "wrong"
    assert "wrong normalisation" in said
    assert f"with {words}" in said
    assert wrong(look(teacher=file, **cured(said))) == []


def test_mistake_size(look: Look, work: Path, weights: dict[str, Tensor]) -> None:
    file = saved(work / "it.pt", weights)
    verdict, said = told(look(teacher=file, inputs={"teacher": {**PIXELS["teacher"], "size": 24}}), "answers")
    assert verdict == "wrong"
    found = re.search(r"resnet14: (\d+\.\d)% of 150 .*; wrong size: (\d+\.\d)% at 8x8 \(--set inputs.teacher.size=8\)$", said)
    assert found
    inputs = {"teacher": {**PIXELS["teacher"], **cured(said)["inputs"]["teacher"]}}
    sound = told(look(teacher=file, inputs=inputs), "answers")
    assert sound == ("ok", f"resnet14: {found[2]}% of 150 test images (chance {said.split('chance ')[1].split('%')[0]}%)")
    assert float(found[1]) + 10 < float(found[2])


@pytest.mark.parametrize("seed", range(5))
def test_a_weak_teacher_of_the_right_size_is_not_resized(seed: int, look: Look, work: Path, weights: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(seed)
    name = "layer3.1.conv2.weight"
    spoilt = weights[name] + 2 * weights[name].std() * torch.randn(weights[name].shape, generator=generator)
    found = look(teacher=saved(work / "it.pt", weights | {name: spoilt}), inputs=PIXELS)
    verdict, said = told(found, "answers")
    assert (verdict, "wrong" in said) == ("ok", False)
    assert float(said.split("% of")[0].split()[-1]) < 90, "so weak that others are tried"


FIXED = """
from torch import nn

def net(classes, channels, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 16), nn.ReLU(), nn.Linear(16, classes))
"""


def test_a_teacher_that_takes_one_size_is_asked_for_no_other(look: Look, work: Path) -> None:
    (work / "fixed.py").write_text(FIXED)
    model = f"{work}/fixed.py:net"
    torch.save(models.build(model, DIGITS, seed=3).state_dict(), work / "it.pt")
    verdict, said = told(look(teacher=f"{model}@{work}/it.pt"), "answers")
    assert verdict == "wrong"
    assert "size" not in said


def test_the_size_of_a_run_is_known(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.runner.teacher_diagnosis.SIZES", None)
    assert told(look(), "answers")[0] == "ok"


def test_mistake_a_teacher_that_was_not_trained(look: Look, work: Path) -> None:
    fresh = models.build("resnet14", DIGITS, seed=3).state_dict()
    verdict, said = told(look(teacher=saved(work / "it.pt", fresh)), "answers")
    assert verdict == "wrong"
    assert "chance level: not trained, or not on such images" in said


def test_mistake_a_missing_tap(look: Look) -> None:
    found = look(method="at", taps={"teacher": {"stage1": "layer9"}})
    assert wrong(found) == ["at: taps"]
    assert told(found, "at: taps")[1].startswith("resnet14 has no tap 'layer9'; it has: stem")
    assert told(found, "answers")[0] == "ok"
    taps = {role: {"stage1": "stage1", "stage2": "stage3"} for role in ("student", "teacher")}
    assert wrong(look(method="at", taps=taps)) == []


def test_mistake_a_method_that_wants_what_a_foreign_network_lacks(look: Look, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    Path("nets.py").write_text(TWO_STAGE_NET)
    torch.save(models.build("nets.py:Tiny", DIGITS).state_dict(), "tiny.pt")
    found = look(student="nets.py:Tiny", method="ofd")
    assert wrong(found) == ["ofd: taps"]
    assert ".pre'" in told(found, "ofd: taps")[1]
    assert wrong(look(student="nets.py:Tiny", method="at", weights={"at": 1.0})) == []
    foreign = look(teacher="nets.py:Tiny@tiny.pt")
    assert told(foreign, "teacher")[1].startswith("nets.py:Tiny (tiny.pt): 4")
    assert wrong(foreign) == ["answers"]


def test_mistake_mismatched_channels(look: Look) -> None:
    found = look(student="resnet8x4", method="fsp")
    assert wrong(found) == ["fsp: taps"]
    assert "channels" in told(found, "fsp: taps")[1]
    assert told(found, "teacher")[0] == "look"
    assert wrong(look(student="resnet8x4", method="fsp", options={"fsp": {"adapter": "conv1x1"}})) == []


# Answers made up


def answers(labels: np.ndarray[Any, Any], said: np.ndarray[Any, Any], classes: int) -> Answers:
    return Answers(np.eye(classes, dtype=np.float32)[said], labels)


@pytest.mark.parametrize(
    ("common", "right", "verdict"),
    [
        (75, 150, "ok"),
        (75, 149, "ok"),
        (75, 114, "ok"),
        (75, 111, "look"),
        (75, 75, "wrong"),
        (141, 150, "ok"),
        (141, 141, "wrong"),
        (148, 150, "ok"),
        (148, 148, "wrong"),
        (150, 150, "ok"),
    ],
)
def test_two_classes_of_which_one_is_common(
    common: int, right: int, verdict: str, look: Look, work: Path, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 150 test images ``common`` are of class 0; a teacher that knows ``right`` of them, the common ones first."""
    with np.load(small_npz) as whole:
        np.savez(work / "two.npz", **{**whole, "y_train": np.arange(300) % 2, "y_test": (np.arange(150) >= common) * 1})
    fresh = models.build("resnet14", DataSpec("", 1, 2, 1, 8, 8), seed=3).state_dict()

    def asked(_net: object, shown: EvalSet, _precision: str) -> Answers:
        labels = torch.cat([labels for _, labels in shown.batches()]).numpy()
        order = np.argsort(labels, kind="stable")
        said = labels.copy()
        said[order[right:]] = 1 - labels[order[right:]]
        return answers(labels, said, 2)

    monkeypatch.setattr("flowdistill.runner.doctor.ask", asked)
    found = told(look(data=work / "two.npz", teacher=saved(work / "it.pt", fresh)), "answers")
    assert found[0] == verdict
    assert ("chance level" in found[1]) == (verdict == "wrong")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "each"), [(100, 2), (100, 5), (10, 15), (10, 50), (2, 100)])
def test_a_weak_teacher_is_not_renamed(classes: int, each: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.arange(classes).repeat(each)
    for accuracy in (0.0, 0.2, 0.4, 0.8):
        said = np.where(generator.random(len(labels)) < accuracy, labels, generator.integers(classes, size=len(labels)))
        assert another_order(answers(labels, said, classes), ()) == ""


@pytest.mark.parametrize("seed", range(5))
def test_an_untrained_teacher_is_not_renamed(seed: int) -> None:
    """Images of a class get like answers even of fresh weights: here a third of each is one class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(10).repeat(50)
    said = np.where(generator.random(500) < 1 / 3, generator.integers(10, size=10)[labels], generator.integers(10, size=500))
    assert another_order(answers(labels, said, 10), ()) == ""


def test_one_answer_to_all_images_is_not_taken_for_the_commonest_class() -> None:
    labels = np.array([0] * 180 + [1] * 20)
    assert another_order(answers(labels, np.ones(200, dtype=int), 2), ()) == ""


@pytest.mark.parametrize(("classes", "each", "accuracy"), [(100, 4, 0.9), (100, 5, 0.6), (10, 20, 0.7), (2, 100, 0.95)])
@pytest.mark.parametrize("cyclic", [False, True])
def test_a_teacher_of_another_class_order_is_renamed(classes: int, each: int, accuracy: float, cyclic: bool) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(classes * each) % classes if cyclic else np.arange(classes).repeat(each)
    said = np.where(generator.random(len(labels)) < accuracy, (labels + 1) % classes, generator.integers(classes, size=len(labels)))
    names = [f"n{number}" for number in range(classes)]
    found = another_order(answers(labels, said, classes), names)
    assert f"what the data calls n{classes - 1} it calls n0" in found
    assert found.startswith("wrong class order")


@pytest.mark.parametrize(("lost", "explained"), [(2, True), (3, True), (6, False), (8, False)])
def test_an_order_that_leaves_most_errors_may_not_be_what_is_wrong(lost: int, explained: bool) -> None:
    """Two of ten classes are exchanged, and of ``lost`` others half the images are anything: 10 % and 4.5 % of errors a class."""
    labels = np.arange(10).repeat(40)
    said = np.choose(labels, [1, 0, *range(2, 10)])
    astray = (labels >= 10 - lost) & (np.arange(400) % 4 < 2)
    said[astray] = np.random.default_rng(0).integers(10, size=astray.sum())
    found = another_order(answers(labels, said, 10), ())
    doubt = "" if explained else ", or other images than it was trained on (size, channel order)"
    assert found.startswith(f"wrong class order{doubt}: ")
    cure = "number the classes" if explained else "number the classes and make the images"
    assert found.endswith(f"what the data calls 1 it calls 0, what the data calls 0 it calls 1; {cure} as its training did")


# What else is looked at


def test_weights_that_are_too_large_or_too_small(look: Look) -> None:
    for weight, verdict, words in ((1e9, "wrong", "training diverges"), (1e-6, "look", "does next to nothing")):
        found = told(look(method="at", weights={"at": weight}), "at: at")
        assert found[0] == verdict
        assert words in found[1]
        assert told(look(method="at", **cured(found[1])), "at: at")[0] == "ok"


def test_a_teacher_of_other_classes(look: Look, work: Path) -> None:
    other = models.build("resnet14", DataSpec("", 1, 7, 1, 8, 8)).state_dict()
    found = look(teacher=saved(work / "it.pt", other), method="at")
    assert told(found, "answers") == ("look", "resnet14: 7 classes, the data has 10; other classes; its accuracy can't be measured here")
    assert wrong(found) == []


def test_a_teacher_that_is_not_finite(look: Look, work: Path, weights: dict[str, Tensor]) -> None:
    found = look(teacher=saved(work / "it.pt", weights | {"fc.bias": torch.full((10,), torch.nan)}), inputs=PIXELS)
    assert told(found, "answers") == ("wrong", "resnet14: its logits are not finite; is its file whole?")
    assert told(found, "kd: start")[0] == "wrong"
    assert told(found, "kd: start")[1].startswith("teacher resnet14: its answer (logits) is not finite")


def test_a_file_that_does_not_fit(look: Look, work: Path, weights: dict[str, Tensor]) -> None:
    found = look(teacher=saved(work / "it.pt", weights | {"conv1.weight": torch.zeros(1)}))
    assert "conv1.weight is (1,)" in told(found, "teacher")[1]
    assert told(found, "student")[0] == told(found, "data")[0] == "ok"


def test_base_is_looked_at_without_a_teacher(look: Look) -> None:
    assert [finding.check for finding in look(method="base", teacher=None)] == ["data", "student", "base: cost"]


def test_the_teacher_is_looked_at_whichever_method_stands_first(look: Look, small_npz: Path) -> None:
    found = look(*(config(small_npz, method=method, teacher="1", seed=seed) for method in ("base", "kd") for seed in (0, 1)))
    assert [finding.check for finding in found] == ["data", "student", "teacher", "answers", "base: cost", "kd: kd", "kd: cost"]


def test_two_that_teach_each_other_are_sound(look: Look) -> None:
    found = look(method="dml", teacher=None)
    assert [finding.check for finding in found] == ["data", "student", "dml: dml", "dml: dml", "dml: cost"]
    assert wrong(found) == []


def test_a_teacher_that_is_still_to_be_trained(look: Look, small_npz: Path) -> None:
    found = look(*(config(small_npz, method=method, teacher="resnet20") for method in ("at", "kd", "base")))
    verdict, said = told(found, "at, kd: set-up")
    assert verdict == "wrong"
    assert f"train one: flowdistill train --model resnet20 --dataset npz:{small_npz} --seeds 100" in said
    assert wrong(found) == ["at, kd: set-up"]
    checks = [finding.check for finding in found]
    assert checks == ["data", "at, kd: set-up", "student", "teacher", "at: taps", "at: cost", "kd: cost", "base: cost"]


def test_a_missing_teacher_is_told(look: Look) -> None:
    found = look(teacher="7")
    assert [finding.check for finding in found] == ["data", "kd: set-up", "student"]
    assert told(found, "kd: set-up")[1].startswith("no run 7 in ")


def test_an_unknown_method_does_not_hide_the_findings_of_another(look: Look, small_npz: Path) -> None:
    found = look(*(config(small_npz, method=method, teacher="1") for method in ("kdd", "kd")))
    assert told(found, "kdd: set-up") == ("wrong", "unknown method 'kdd': did you mean 'kd'?")
    assert told(found, "kd: kd")[0] == "ok"


def test_nothing_is_found_without_student_or_data(look: Look, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown model 'resnt8'"):
        look(student="resnt8")
    with pytest.raises(UserError, match="no such file"):
        look(data=tmp_path / "none.npz")


def test_a_batch_of_more_than_all_images(look: Look) -> None:
    found = look(train={"batch_size": 301})
    assert told(found, "kd: start") == ("wrong", "train.batch_size=301 is more than the 300 training images; set --batch-size lower")
    assert wrong(found) == ["kd: start"]


def test_uneven_classes_are_told(look: Look, small_npz: Path, tmp_path: Path) -> None:
    with np.load(small_npz) as whole:
        kept = np.flatnonzero((whole["y_train"] == 0) | (np.arange(300) < 30))
        parts = {name: whole[name][kept] if "train" in name else whole[name] for name in whole.files}
    np.savez(tmp_path / "uneven.npz", **parts)
    verdict, said = told(look(data=tmp_path / "uneven.npz", method="base", teacher=None, train={"batch_size": 8}), "data")
    assert verdict == "look"
    assert re.search(r"10 classes; uneven: [23] to 3\d training images a class$", said)


def test_uneven_classes_by_name(look: Look, folder: Path) -> None:
    for path in sorted((folder / "train" / "d3").iterdir())[2:]:
        path.unlink()
    verdict, said = told(look(of_folder(folder, "1").model_copy(update={"method": "base", "teacher": None})), "data")
    assert verdict == "look"
    assert re.search(r"uneven: 2 \(d3\) to 3\d \(d\d\) training images a class$", said)


def test_streamed_images(look: Look, folder: Path) -> None:
    found = look(of_folder(folder, "1", stream=True))
    assert wrong(found) == []
    assert told(found, "answers")[0] == "ok"
    assert told(found, "data")[1].startswith("digits: 300 training and 150 test images 1x8x8")


def test_a_holdout_run_is_looked_at_on_what_it_holds_out(look: Look, work: Path, weights: dict[str, Tensor]) -> None:
    found = look(split="holdout", teacher=saved(work / "it.pt", weights), inputs=PIXELS)
    assert re.search(r"of 3\d held-out images", told(found, "answers")[1])


def test_the_inputs_that_a_teacher_sees_are_told(look: Look) -> None:
    found = look(teacher="resnet20", inputs={"teacher": {"channels": 3, "size": 12, "mean": [0.5] * 3, "std": [0.25] * 3}})
    assert told(found, "teacher")[1].endswith("sees 3x12x12 made of 1x8x8, its own mean [0.5,0.5,0.5] and std [0.25,0.25,0.25]")


class TestCommand:
    def test_prints_findings_tells_progress_and_writes_nothing(self, work: Path, small_npz: Path) -> None:
        words = ["doctor", "--dataset", f"npz:{small_npz}", "--student", "resnet8", "--batch-size", "64", "--set", "data.pad=1"]
        before = sorted(work.rglob("*"))
        sound = command(work, *words, "--method", "kd", "--teacher", "1", "--format", "csv")
        assert sound.code == 0
        assert sound.out.startswith("check,verdict,found\ndata,ok,")
        assert sound.err.splitlines() == ["teacher resnet14 (run 1): its answers", "kd: taps, gradients, cost"]
        unsound = command(work, *words, "--method", "kd", "--teacher", "resnet20", "--runs", "none")
        assert unsound.code == 1
        assert "train one: flowdistill train --model resnet20" in unsound.out
        assert [path for path in sorted(work.rglob("*")) if not path.name.startswith("ledger.db-")] == [
            path for path in before if not path.name.startswith("ledger.db-")
        ]
        assert len(Ledger(work / "runs").runs()) == 1


SOFTMAXED = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

class Softmaxed(Net):
    def forward(self, images):
        return super().forward(images).softmax(1)
"""


def test_probabilities_in_the_place_of_logits(look: Look, work: Path) -> None:
    (work / "nets.py").write_text(SOFTMAXED)
    altered = f"{work}/nets.py:Softmaxed"
    save_weights(work / "it.safetensors", models.build(altered, DIGITS).state_dict(), {})
    gives = "it gives probabilities, not the logits of its classifier 4; leave the softmax out"
    found = look(student=f"{work}/nets.py:Net", teacher=f"{altered}@{work}/it.safetensors")
    assert Finding("teacher", "look", f"{altered}: {gives}; methods on logits refuse it") in found
    cure = "or choose a method on feature maps, such as at"
    assert told(found, "kd: taps") == ("wrong", f"kd: teacher {altered}: {gives}, {cure}")
    found = look(student=altered)
    assert Finding("student", "wrong", f"{altered}: {gives}") in found
    assert told(found, "kd: taps") == ("wrong", f"student {altered}: {gives}")
