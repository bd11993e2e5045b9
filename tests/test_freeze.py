"""Frozen parts: not a bit of them moves, statistics included, in any engine and over a resume; and what can't be frozen is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.cohorts import Taped, a_cohort, a_student, train_with
from helpers.command import command
from helpers.interruptions import cut_off
from helpers.small import config
from torch import Tensor, nn

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.config import RunConfig, validate
from flowdistill.data.batches import DeviceData
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.models.foreign import adopt
from flowdistill.runner import execute, resume, run
from flowdistill.training.cohort import Cohort
from flowdistill.training.engine import CompiledEngine, EagerEngine, Engine
from flowdistill.training.freeze import freeze
from flowdistill.training.gradients import first_gradients
from flowdistill.training.student import Student
from flowdistill.training.weights import load_weights
from flowdistill.types import DataSpec

CPU = torch.device("cpu")
DATA = DataSpec("tiny", 30, 4, 1, 8, 8)
FRONT = "conv1,bn1,layer1"
NONE = "nothing in resnet8 is so named; it has: conv1, bn1, layer1, layer2, layer3, fc, and names below these"


def frozen(small_npz: Path, names: str = FRONT, **keys) -> RunConfig:
    return config(small_npz, **{"teacher": "-", "method": "fsp", **keys}, train={"freeze": names, "weight_decay": 0.01})


def state(student: Student) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.net.state_dict().items()}


def assert_the_front_stays_and_the_rest_moves(cohort: Cohort, students: list[Student], engine: Engine) -> None:
    before = [state(student) for student in students]
    train_with(cohort, engine)
    assert type(cohort.engine) is type(engine), cohort.engine.why
    for then, student in zip(before, students, strict=True):
        for name, value in student.net.state_dict().items():
            assert torch.equal(value, then[name]) == name.startswith(("conv1.", "bn1.", "layer1.")), name


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("engine", [EagerEngine, Taped, CompiledEngine])
def test_what_is_frozen_stays_to_the_bit_and_all_else_moves(engine: type[Engine], data: ImageData, small_npz: Path) -> None:
    cohort, students = a_cohort(data, [frozen(small_npz), frozen(small_npz, method="base", seed=1)])
    assert_the_front_stays_and_the_rest_moves(cohort, students, engine("fp32", ""))


def test_frozen_parts_get_no_gradient_and_no_momentum(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [frozen(small_npz, method="base", teacher=None)])
    train_with(cohort, EagerEngine("fp32", ""))
    still = [p for name, p in student.net.named_parameters() if name.startswith(("conv1.", "bn1.", "layer1."))]
    assert still
    assert all(p.grad is None and p not in student.optimizer.state for p in still)
    assert {id(p) for p in student.trainable_parameters()} == {id(p) for p in student.net.parameters()} - {id(p) for p in still}


def test_the_step_that_a_graph_holds_is_the_eager_one(data: ImageData, small_npz: Path) -> None:
    runs = [frozen(small_npz), frozen(small_npz, method="base", seed=1)]
    ends = []
    for engine in (EagerEngine, Taped):
        cohort, students = a_cohort(data, runs)
        train_with(cohort, engine("fp32", ""))
        ends.append([state(student) for student in students])
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_resumed_is_the_straight_run(ledger: Ledger, small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)
    given = [frozen(small_npz, method="base", teacher=None, seed=seed) for seed in (0, 1)]
    straight = run(given, Ledger(tmp_path / "straight", create=True), CPU)
    cut_off(given, ledger, 300 // 64 + 1)
    resumed = resume(ledger, CPU)
    assert [one.weights_hash for one in resumed] == [one.weights_hash for one in straight]
    assert straight[0].variant == "freeze=bn1,conv1,layer1"
    weights, _ = load_weights(ledger.run_folder(1) / "student.safetensors")
    fresh = models.build("resnet8", DataSpec("small", 300, 10, 1, 8, 8), seed=0).state_dict()
    assert torch.equal(weights["layer1.0.bn1.running_mean"], fresh["layer1.0.bn1.running_mean"])
    assert not torch.equal(weights["layer2.0.bn1.running_mean"], fresh["layer2.0.bn1.running_mean"])


def test_freezing_changes_the_fingerprint_and_the_order_of_names_does_not(ledger: Ledger, small_npz: Path) -> None:
    plain = config(small_npz, train={"weight_decay": 0.01})
    first, second = run([plain, frozen(small_npz, method="base", teacher=None)], ledger, CPU)
    assert first.fingerprint != second.fingerprint
    assert "freeze" not in first.config["train"]
    assert validate({"train": {"freeze": "bn1, layer1,conv1,bn1"}}).train.freeze == ("bn1", "conv1", "layer1")
    assert validate(second.config).train.freeze == ("bn1", "conv1", "layer1")


@pytest.mark.parametrize(
    ("names", "still", "left"),
    [
        (["conv1"], {""}, {"bn1.weight", "bn1.bias", "fc.weight"}),
        (["bn1"], {"bn1"}, {"conv1.weight", "layer1.0.bn1.weight"}),
        (["bn1.weight"], {""}, {"bn1.bias"}),
        (["*running_mean"], {"bn1", "layer1.0.bn1"}, {"bn1.weight", "bn1.bias"}),
        (["layer[12]"], {"layer1.0.bn1", "layer2.0.downsample.1"}, {"layer3.0.bn1.weight"}),
        (["layer1.*", "layer?.0.conv1"], {"layer1.0.bn1"}, {"layer2.0.bn1.weight"}),
    ],
)
def test_a_name_is_a_module_a_parameter_or_a_pattern_of_either(names: list[str], still: set[str], left: set[str]) -> None:
    net = models.build("resnet8", DATA)
    paths = {module: path for path, module in net.named_modules()}
    assert still - {""} <= {paths[module] for module in freeze(net, names)}
    assert left <= {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert any(not parameter.requires_grad for parameter in net.parameters()) == (names != ["*running_mean"])


def test_evaluation_and_the_first_gradients_leave_statistics_where_they_are(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [frozen(small_npz)])
    before = state(student)
    ratios = first_gradients(cohort)
    assert all(torch.equal(value, before[name]) for name, value in student.net.state_dict().items())
    whole, (other,) = a_cohort(data, [frozen(small_npz, names="layer3")])
    assert ratios[student] != first_gradients(whole)[other]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ("layr1", f"train.freeze=layr1: {NONE}"),
        ("conv1,stage1", f"train.freeze=stage1: {NONE}"),
        ("*", "train.freeze=* is all of resnet8; leave a part to train, such as its classifier fc"),
        ("conv1,,bn1", "train.freeze='conv1,,bn1': a name is empty; write names with commas between them, such as conv1,bn1,layer1"),
    ],
)
def test_what_can_not_be_frozen_is_told_and_nothing_is_recorded(names: str, line: str, small_npz: Path, tmp_path: Path) -> None:
    words = ("train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", "--set", "data.pad=1", "--batch-size", "64", "--epochs", "1")
    said = command(tmp_path, *words, "--freeze", names)
    assert (said.code, said.out, said.err) == (2, "", f"flowdistill: {line}\n")
    assert not (tmp_path / "runs" / "1").exists()


def test_a_stage_with_nothing_to_train_is_refused(data: ImageData, small_npz: Path) -> None:
    two_stages = {"options": {"fsp": {"schedule": "two-stage"}}}
    with pytest.raises(UserError, match=r"^train\.freeze=bn1,conv1,layer\* leaves nothing to train in phase 'fsp'; freeze less$"):
        a_student(frozen(small_npz, names="conv1,bn1,layer*", **two_stages), DeviceData(data, "full", CPU))


def test_students_of_a_wider_teacher_train_their_adapters_all_the_same(data: ImageData, small_npz: Path) -> None:
    adapted = {"options": {"fsp": {"adapter": "conv1x1"}}}
    student = a_student(frozen(small_npz, **adapted), DeviceData(data, "full", CPU), wider=1)
    student.begin_phase(0)
    assert {id(p) for p in student.method.parameters()} <= {id(p) for p in student.trainable_parameters()}


def test_a_network_of_others_is_frozen_by_its_own_names() -> None:
    net = models.build("timm:resnet10t", DATA)
    held = freeze(net, ("conv1*", "layer1.*"))
    names = {name for name, parameter in net.body.named_parameters() if not parameter.requires_grad}
    assert names
    assert all(name.startswith(("conv1.", "layer1.")) for name in names)
    assert net.body.layer1[0].bn1 in held
    with pytest.raises(UserError, match="nothing in timm:resnet10t is so named; it has: conv1, bn1, "):
        freeze(net, ("inner",))


class Tied(nn.Module):
    """A convolution and a normalisation that have two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.again, self.third, self.fc = self.norm, nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
        self.third.weight = self.second.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.third(self.again(self.second(self.norm(self.first(images))))).mean((2, 3)))


@pytest.mark.parametrize("name", ["second.weight", "third.weight", "third"])
def test_a_tied_weight_is_held_by_each_of_its_names(name: str) -> None:
    net = models.build(adopt(Tied(), "tied"), DATA)
    assert freeze(net, (name,)) == []
    assert not net.body.second.weight.requires_grad
    assert net.body.second.bias.requires_grad


@pytest.mark.parametrize("names", [("norm",), ("again",), ("norm", "again")])
def test_a_shared_normalisation_is_held_by_each_of_its_names(names: tuple[str, ...]) -> None:
    net = models.build(adopt(Tied(), "tied"), DATA)
    assert freeze(net, names) == [net.body.norm]
    assert not net.body.norm.weight.requires_grad
