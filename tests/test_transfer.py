"""A teacher and first weights of other classes than the data's: what works, what is said, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.interruptions import cut_off
from helpers.small import config
from torch import Tensor

from flowdistill import UserError, distill, models, train
from flowdistill.data.sources import load
from flowdistill.ledger import Ledger, Run
from flowdistill.report import tables
from flowdistill.report.card import page
from flowdistill.runner import Watcher, dry_run, execute, resume, run
from flowdistill.runner import card as runner_card
from flowdistill.runner.plan import plan
from flowdistill.runner.references import resolve
from flowdistill.training.weights import hash_weights, load_weights, save_weights
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
BODY, HEAD = "layer2.0.conv1.weight", "fc.weight"


class Listening(Watcher):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def few(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits 6 to 9 of the small data, as classes 0 to 3."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(small_npz) as whole:
        parts: dict[str, Any] = {}
        for part in ("train", "test"):
            chosen = whole[f"y_{part}"] >= 6
            parts |= {f"x_{part}": whole[f"x_{part}"][chosen], f"y_{part}": whole[f"y_{part}"][chosen] - 6}
    np.savez(path, **parts)
    return path


@pytest.fixture(scope="module")
def work(small_npz: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of run 1, a resnet8 of ten classes, and 2, a resnet14 of ten."""
    folder = tmp_path_factory.mktemp("work")
    ledger = Ledger(folder / "runs", create=True)
    run([config(small_npz, seed=9), config(small_npz, student="resnet14", seed=9)], ledger, CPU)
    ledger.close()
    return folder


@pytest.fixture
def taught(work: Path, tmp_path: Path) -> Iterator[Ledger]:
    shutil.copytree(work / "runs", tmp_path / "runs")
    ledger = Ledger(tmp_path / "runs")
    yield ledger
    ledger.close()


def weights(one: Run, ledger: Ledger) -> dict[str, Tensor]:
    return load_weights(ledger.run_folder(one.no) / "student.safetensors")[0]


def first(*configs: Any, ledger: Ledger) -> list[dict[str, Tensor]]:
    """What each run begins with."""
    return [dict(job.student.build(job.data.spec, seed=job.config.seed).state_dict()) for job in plan(configs, ledger, CPU)]


def refusal(one: Any, ledger: Ledger) -> str:
    with pytest.raises(UserError) as error:
        run([one], ledger, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


# A teacher


def test_a_network_is_built_for_its_own_classes(taught: Ledger, few: Path, tmp_path: Path) -> None:
    data = DataSpec("few", 100, 4, 1, 8, 8)
    foreign = tmp_path / "foreign.pt"
    torch.save(models.build("vgg8", DataSpec("", 1, 7, 1, 8, 8)).state_dict(), foreign)
    for reference, classes in (("2", 10), (f"vgg8@{foreign}", 7), ("resnet20", 4)):
        ref = resolve(reference, taught)
        assert ref.seen(data).classes == ref.spec(data).classes == ref.build(data).spec.classes == classes


def test_first_weights_of_a_file_that_does_not_say_its_model(taught: Ledger, few: Path, tmp_path: Path) -> None:
    """They are of the student's model, whatever makes that; a file that says another model is refused."""
    (tmp_path / "heads.py").write_text(HEADS)
    for model in (f"{tmp_path}/heads.py:convolution", "timm:resnet10t", "resnet8"):
        net = models.build(model, DataSpec("few", 100, 4, 1, 8, 8), seed=7)
        torch.save({"net": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "begin")
        (job,) = plan([config(few, student=model, init_from=str(tmp_path / "begin"), train={"batch_size": 32})], taught, CPU)
        assert (job.student.model, job.student.init) == (model, f"file:{hash_weights(net.state_dict())}")
        begun = job.student.build(job.data.spec, seed=3).state_dict()
        assert [name for name, value in net.state_dict().items() if not torch.equal(value, begun[name])] == []
    one = config(few, student="resnet14", init_from=str(taught.run_folder(1) / "student.safetensors"))
    assert refusal(one, taught).endswith("is a resnet8, the student a resnet14; begin from a resnet14, or train a resnet8")


HEADS = """
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

class Net(nn.Module):
    def __init__(self, classes, head):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), head(classes)

    def forward(self, images):
        return self.fc(self.pool(self.conv(images))).flatten(1)

def parametrised(classes):
    return Net(classes, lambda classes: nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(6, classes))))

def spectral(classes):
    return Net(classes, lambda classes: nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(6, classes, bias=False))))

def old(classes):
    return Net(classes, lambda classes: nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(6, classes))))

def convolution(classes):
    return Net(classes, lambda classes: nn.Conv2d(6, classes, 1))
"""


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("head", ["parametrised", "spectral", "old", "convolution"])
def test_any_kind_of_head_tells_its_classes(head: str, taught: Ledger, tmp_path: Path) -> None:
    """And a fresh one of other classes takes its place."""
    data, model = DataSpec("few", 100, 4, 1, 8, 8), f"{tmp_path}/heads.py:{head}"
    (tmp_path / "heads.py").write_text(HEADS)
    torch.save(models.build(model, replace(data, classes=7)).state_dict(), tmp_path / "it.pt")
    ref = resolve(f"{model}@{tmp_path / 'it.pt'}", taught)
    assert ref.seen(data).classes == ref.spec(data).classes == ref.build(data).spec.classes == 7
    fresh = replace(ref, head=False).build(data)
    assert fresh.spec.classes == 4
    assert torch.equal(fresh.state_dict()["conv.weight"], ref.weights["conv.weight"])


def test_a_head_that_can_not_be_the_models_says_nothing_of_classes(taught: Ledger, tmp_path: Path) -> None:
    """However many rows it claims."""
    state = models.build("resnet8", DataSpec("", 1, 4, 1, 8, 8)).state_dict()
    torch.save(state | {HEAD: torch.zeros(1 << 40, 0)}, tmp_path / "it.pt")
    ref = resolve(f"resnet8@{tmp_path / 'it.pt'}", taught)
    with pytest.raises(UserError, match=r"fc\.weight is \(1099511627776, 0\), needs \(4, 64\)"):
        ref.build(DataSpec("few", 100, 4, 1, 8, 8))


@pytest.mark.parametrize(("method", "options"), [("fsp", {"fsp": {"preset": "paper", "stage_epochs": 1}}), ("nd+srrl", {})])
def test_a_teacher_of_other_classes_teaches_by_its_features(method: str, options: Any, taught: Ledger, few: Path) -> None:
    watcher = Listening()
    one = config(few, method=method, options=options, teacher="2", train={"batch_size": 32})
    (done,) = run([one], taught, CPU, watcher=watcher)
    assert (done.status, done.teacher, done.teacher_run, done.teacher_accuracy) == ("finished", "resnet14", 2, None)
    assert "teacher resnet14 (run 2): 10 classes, the data has 4; its accuracy can't be measured here" in watcher.lines
    assert weights(done, taught)[HEAD].shape == (4, 64)
    assert tables.summary_rows(taught.runs(), "last")[-1]["teachers"] == "one teacher"
    (previewed,) = dry_run([one], taught, CPU)
    assert previewed["teacher"] == {"model": "resnet14", "run": 2, "accuracy": None}


@pytest.mark.parametrize("method", ["kd", "simkd", "cat_kd", "at+kd"])
def test_a_method_that_compares_classes_refuses_a_teacher_of_others(method: str, taught: Ledger, few: Path) -> None:
    line = refusal(config(few, method=method, teacher="2"), taught)
    assert "4 classes, resnet14 10" in line
    assert len(taught.runs()) == 2


def test_the_card_compares_only_the_cost_with_a_teacher_of_other_classes(
    taught: Ledger, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_card, "WARM_UP", 1)
    monkeypatch.setattr(runner_card, "PASSES", 2)
    run([config(few, train={"batch_size": 32}), config(few, method="fsp", teacher="2", train={"batch_size": 32})], taught, CPU)
    found = runner_card.measure(4, taught, CPU, batch_size=2)
    teacher, student, alone = found.columns
    assert (teacher.score, teacher.other_classes) == (None, "10 classes, the data has 4")
    assert teacher.macs > student.macs > 0
    assert student.score is not None
    assert alone.score is not None
    assert (student.score.correct, student.score.agreement) == (taught.run(4).correct, None)
    for format_ in ("md", "html"):
        text = page(found, format_)
        assert "teacher resnet14: 10 classes, the data has 4; its cost alone is compared." in text
        assert "same answer as the teacher" not in text
        assert "points to the student alone" in text
        assert "points to the teacher" not in text
        assert "to teacher" not in text


def test_other_names_of_as_many_classes_are_told(taught: Ledger, few: Path, tmp_path: Path) -> None:
    """The names are in both files: those of the data come with folders of images."""
    net = models.build("resnet14", DataSpec("few", 100, 4, 1, 8, 8), seed=3)
    save_weights(tmp_path / "it.safetensors", net.state_dict(), {"model": "resnet14", "labels": ["six", "seven", "eight", "nine"]})
    (job,) = plan([config(few, method="fsp", teacher=str(tmp_path / "it.safetensors"))], taught, CPU)
    assert job.teacher is not None
    for names, told in [
        ((), ""),
        (("six", "seven", "eight", "nine"), ""),
        (("six", "seven", "9", "nine"), "class 'eight' where the data has '9'"),
    ]:
        named = replace(job.data, class_names=names)
        assert job.teacher.other_classes(named) == told
        assert replace(job.teacher, init="so it begins").on(named).head == (not told)


@pytest.mark.parametrize("method", ["kd", "simkd", "cat_kd", "at+kd", "fsp"])
def test_methods_that_compare_classes_refuse_another_order_of_them(
    method: str, taught: Ledger, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in whose training the classes were numbered otherwise; one that was trained on the data themselves knows them by any name."""
    net = models.build("resnet14", DataSpec("few", 100, 4, 1, 8, 8), seed=3)
    names = ("six", "seven", "eight", "nine")
    monkeypatch.setattr("flowdistill.runner.plan.load", lambda asked, told: replace(load(asked, told), class_names=names))
    about: dict[str, Any] = {"model": "resnet14", "labels": ["six", "eight", "seven", "nine"], "data": {"name": "few"}, "split": "full"}
    one = config(few, method=method, teacher=str(tmp_path / "it.safetensors"), train={"batch_size": 32})
    save_weights(tmp_path / "it.safetensors", net.state_dict(), about | {"data_hash": load(one.data).hash})
    assert len(plan([one], taught, CPU)) == 1
    save_weights(tmp_path / "it.safetensors", net.state_dict(), about)
    if method == "fsp":
        assert len(plan([one], taught, CPU)) == 1
    else:
        assert "is 'seven', of resnet14 'eight'; logits are compared class by class, so train both on the same" in refusal(one, taught)


# First weights


def test_the_body_is_taken_and_the_head_of_other_classes_is_that_of_the_seed(taught: Ledger, few: Path) -> None:
    begun, fresh, other = first(config(few, init_from="1"), config(few), config(few, init_from="1", seed=1), ledger=taught)
    source = weights(taught.run(1), taught)
    assert begun.keys() == fresh.keys()
    for name, value in begun.items():
        assert torch.equal(value, (fresh if name.startswith("fc.") else source)[name]), name
    assert not torch.equal(begun[HEAD], other[HEAD])


def test_the_head_of_the_same_classes_is_kept(taught: Ledger, small_npz: Path) -> None:
    (begun,) = first(config(small_npz, init_from=1), ledger=taught)
    assert all(torch.equal(value, begun[name]) for name, value in weights(taught.run(1), taught).items())


def test_first_weights_are_told_shown_and_part_of_the_fingerprint(taught: Ledger, few: Path, small_npz: Path, tmp_path: Path) -> None:
    shutil.copy(taught.run_folder(1) / "student.safetensors", tmp_path / "it.safetensors")
    watcher = Listening()
    keys: dict[str, Any] = {"train": {"batch_size": 32}}
    given = [config(few, init_from="1", **keys), config(few, init_from=str(tmp_path / "it.safetensors"), **keys), config(few, **keys)]
    found = run([*given, config(small_npz, init_from="1")], taught, CPU, watcher=watcher)
    assert "student resnet8 begins from run 1, its classifier fresh (10 classes, the data has 4)" in watcher.lines
    assert "student resnet8 begins from run 1, its classifier included" in watcher.lines
    assert [one.variant for one in found] == ["init=run 1", f"init={tmp_path / 'it.safetensors'}", "", "init=run 1"]
    assert len({one.fingerprint for one in found}) == 4
    assert found[0].init_hash == found[1].init_hash != found[2].init_hash
    assert found[0].weights_hash == found[1].weights_hash
    record = json.loads((taught.run_folder(3) / "run.json").read_text())
    assert record["config"]["init_from"] == "1"
    assert run(given[:1], taught, CPU)[0].no == found[0].no


def test_a_table_compares_it_with_the_student_of_fresh_weights(taught: Ledger, few: Path) -> None:
    keys: dict[str, Any] = {"train": {"batch_size": 32, "epochs": 1}}
    frozen = {"batch_size": 32, "epochs": 1, "freeze": "conv1"}
    run([config(few, **keys), config(few, init_from="1", **keys), config(few, init_from="1", train=frozen)], taught, CPU)
    plain, begun, held = [row for row in tables.summary_rows(taught.runs(), "last") if row["dataset"] == "few"]
    assert plain["base"] is None
    assert begun["base"] == held["base"] == plain["mean"]
    assert (begun["variant"], held["variant"]) == ("init=run 1", "init=run 1, freeze=conv1")


def test_a_student_of_given_weights_teaches_only_if_it_is_named(taught: Ledger, small_npz: Path) -> None:
    run([config(small_npz, init_from="1", train={"epochs": 5})], taught, CPU)
    (job,) = plan([config(small_npz, method="fsp", teacher="resnet8")], taught, CPU)
    assert job.teacher is not None
    assert job.teacher.run == 1


def test_resumed_is_the_straight_run(taught: Ledger, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)
    one = config(few, init_from="1", method="fsp", teacher="2", train={"batch_size": 32, "freeze": "conv1,bn1"})
    (cut,) = cut_off([one], taught, 4)
    (resumed,) = resume(taught, CPU)
    (straight,) = run([one], taught, CPU, again=True)
    assert (cut.no, resumed.no) == (3, 3)
    assert straight.weights_hash == resumed.weights_hash


def test_a_holdout_run_does_not_begin_from_what_saw_its_images(taught: Ledger, few: Path, small_npz: Path) -> None:
    assert refusal(config(small_npz, init_from="1", split="holdout"), taught) == (
        "run 1 was trained on all of train, the held-out images among them; a holdout run takes networks of holdout runs (train one with "
        "--holdout)"
    )
    (done,) = run([config(few, init_from="1", split="holdout", train={"batch_size": 32})], taught, CPU)
    assert done.status == "finished"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"init_from": "2"}, "init_from=2 is a resnet14, the student a resnet8; begin from a resnet8, or train a resnet14"),
        ({"init_from": "resnet8"}, "init_from=resnet8: a model's name has no weights; name a run or a weights file"),
        ({"init_from": "1", "student": "1"}, "init_from=1: student=1 has weights of its own; name its model alone: --student resnet8"),
        ({"init_from": "7"}, "no run 7 in"),
        ({"init_from": "1", "method": "dml"}, "init_from=1: the students of 'dml' would both begin from it, alike; leave it out"),
        ({"student": "1"}, "student resnet8 (run 1): 10 classes, the data has 4; begin from its weights with a fresh classifier: --student "
         "resnet8 --init-from 1"),
    ],
)  # fmt: skip
def test_wrong_first_weights_are_refused(keys: dict[str, Any], line: str, taught: Ledger, few: Path) -> None:
    assert refusal(config(few, **keys), taught).startswith(line)


def test_first_weights_are_given_by_command_and_in_python(taught: Ledger, few: Path, tmp_path: Path) -> None:
    common = ("--dataset", f"npz:{few}", "--set", "data.pad=1", "--batch-size", "32", "--epochs", "1", "--precision", "fp32")
    said = command(tmp_path, "train", "--model", "resnet8", *common, "--init-from", "1", "--freeze", "conv1,bn1")
    assert said.code == 0, said.err
    assert "begins from run 1, its classifier fresh (10 classes, the data has 4)" in said.err
    assert taught.run(3).variant == "init=run 1, freeze=bn1,conv1"
    keys: dict[str, Any] = {"runs": tmp_path / "runs", "progress": False, "train": {"epochs": 1, "batch_size": 32, "precision": "fp32"}}
    data = {"name": f"npz:{few}", "pad": 1}
    teacher = train("resnet8", data, seed=5, **keys)
    result = distill(2, "resnet8", data, method="fsp", init_from=teacher, **keys)
    assert (result.run.teacher_accuracy, result.run.variant) == (None, f"ours, init=run {teacher.run.no}")
