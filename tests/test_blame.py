"""What is not finite is named: images, what of the teacher, which term, the student; the learning rate only where it can be the cause."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cohorts import a_cohort
from helpers.small import config
from torch import Tensor, nn

import flowdistill
from flowdistill.checks import UserError
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.methods import METHODS
from flowdistill.runner import run
from flowdistill.runner.cohorts import prepare
from flowdistill.runner.plan import plan
from flowdistill.training.cohort import Cohort, Progress, train
from flowdistill.training.engine import CompiledEngine, EagerEngine, Engine
from flowdistill.training.evaluate import Evaluation
from flowdistill.training.gradients import first_gradients
from flowdistill.training.teacher_sums import ANSWER, EMBEDDING, MAP
from flowdistill.types import Outputs

CPU = torch.device("cpu")
FEW = {"limit_train": 48, "train": {"epochs": 1, "batch_size": 16}}  # three batches
LEARN_FROM_A_TEACHER = [name for name in METHODS if METHODS[name].uses_teacher and not METHODS[name].mutual]
OPTIONS = {"crd": {"negatives": 20, "dim": 8}}


@pytest.fixture(scope="module")
def taught(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Run 1 is a teacher."""
    ledger = Ledger(tmp_path_factory.mktemp("blame") / "runs", create=True)
    run([config(small_npz, student="resnet14", seed=9, **FEW)], ledger, CPU)
    return ledger


def prepared(taught: Ledger, small_npz: Path, method: str, **keys: Any) -> Cohort:
    options = {method: OPTIONS[method]} if method in OPTIONS else {}
    ((cohort, _),) = prepare(plan([config(small_npz, method=method, teacher="1", options=options, **FEW | keys)], taught, CPU), CPU)
    return cohort


def harmed(outputs: Outputs, name: str, value: float) -> Outputs:
    """One value of one output is another."""

    def put(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[(0,) * tensor.dim()] = value
        return tensor

    if name == ANSWER:
        return outputs._replace(logits=put(outputs.logits))
    if name == EMBEDDING:
        return outputs._replace(embedding=put(outputs.embedding))
    tap = name.removeprefix(MAP)
    return outputs._replace(maps={**outputs.maps, tap: put(outputs.maps[tap])})


def after(cohort: Cohort, name: str, value: float, batch: int) -> Progress:
    """An epoch in which one output of the teacher holds a value at one place, from a batch on."""
    (seed_group,), count = cohort.seed_groups, 0
    teacher, (student,) = seed_group.teacher, seed_group.students
    assert teacher is not None
    teach = teacher.teach

    def harm(images: Tensor) -> Outputs:
        nonlocal count
        count += 1
        return harmed(teach(images), name, value) if count == batch else teach(images)

    teacher.teach = harm  # type: ignore[method-assign]
    return next(train(cohort)).progress[student]


@pytest.mark.parametrize("method", LEARN_FROM_A_TEACHER)
def test_what_a_teacher_says_is_named_whatever_the_method_makes_of_it(taught: Ledger, small_npz: Path, method: str) -> None:
    names = prepared(taught, small_npz, method).seed_groups[0].teacher.output_names  # type: ignore[union-attr]
    for name, value in [*((name, torch.nan) for name in names), *((name, torch.inf) for name in names[:1])]:
        error = after(prepared(taught, small_npz, method), name, value, 2).error
        assert error == (f"stopped in epoch 1: the teacher's {name} is not finite on batch 2 of 3; mend the teacher, or choose another")


def test_the_first_of_several_maps_is_named_with_those_that_break_with_it(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="at+kd", teacher="-", train={"epochs": 1})])
    teacher = cohort.seed_groups[0].teacher
    assert teacher is not None
    with torch.no_grad():
        teacher.net.get_parameter("layer2.0.conv1.bias")[0] = torch.nan
    teacher._kept = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    error = next(train(cohort)).progress[student].error
    what = "map stage2, map stage3 and answer (logits) are"
    assert error.startswith(f"stopped in epoch 1: the teacher's {what} not finite on batch 1 of 4; ")


def test_students_that_do_not_use_the_broken_map_go_on(data: ImageData, small_npz: Path) -> None:
    runs = [config(small_npz, method=method, teacher="-", train={"epochs": 1}) for method in ("base", "kd", "at")]
    cohort, (base, kd, at) = a_cohort(data, runs)
    teacher = cohort.seed_groups[0].teacher
    assert teacher is not None
    teach = teacher.teach
    teacher.teach = lambda images: harmed(teach(images), f"{MAP}stage2", torch.nan)  # type: ignore[method-assign]
    progress = next(train(cohort)).progress
    assert [progress[student].error.partition(":")[0] for student in (base, kd, at)] == ["", "", "stopped in epoch 1"]
    assert cohort.students == [base, kd]


def test_a_teacher_may_rule_classes_out(taught: Ledger, small_npz: Path) -> None:
    cohort = prepared(taught, small_npz, "at")
    teacher = cohort.seed_groups[0].teacher
    assert teacher is not None
    few = Outputs(torch.tensor([[0.0, -torch.inf], [-torch.inf, 2.0]]), torch.zeros(2, 1))
    teacher.output_names = (ANSWER,)
    assert teacher.output_sums(few)[ANSWER].isfinite()
    for row in ([-torch.inf, -torch.inf], [torch.inf, 0.0], [torch.nan, -torch.inf]):
        broken = few._replace(logits=torch.cat([few.logits, torch.tensor([row])]))
        assert not teacher.output_sums(broken)[ANSWER].isfinite()


class White(nn.Module):
    """A map of it is not finite for images that are white."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Outputs:
        outputs: Outputs = self.net(images)
        hit = (images.amin((1, 2, 3)) > 1.0).view(-1, 1, 1, 1)
        return outputs._replace(maps={**outputs.maps, "stage2": outputs.maps["stage2"].masked_fill(hit, torch.nan)})


@pytest.mark.usefixtures("no_kernels")
def test_engines_name_the_same_batch(data: ImageData, small_npz: Path) -> None:
    from helpers.cohorts import Taped

    images = data.x_train.copy()
    images[17] = 255
    told = []
    for kind in (EagerEngine, Taped, CompiledEngine):
        cohort, (student,) = a_cohort(dataclasses.replace(data, x_train=images), [config(small_npz, method="at", teacher="-")])
        (seed_group,) = cohort.seed_groups
        assert seed_group.teacher is not None
        seed_group.teacher.net = White(seed_group.teacher.net).eval()
        seed_group.teacher._kept = {name: value.clone() for name, value in seed_group.teacher.net.state_dict().items()}
        cohort.engine = kind("fp32", "")
        batches = [int((images.amin((1, 2, 3)) > 1.0).any()) for images, _ in seed_group.batches.epoch(0)]
        assert sum(batches) == 1
        told.append(next(train(cohort)).progress[student].error)
        assert isinstance(cohort.engine, kind), cohort.engine.why
        assert told[-1].startswith(f"stopped in epoch 1: the teacher's map stage2 is not finite on batch {batches.index(1) + 1} of 4; ")
    assert len(set(told)) == 1


class Harmed(EagerEngine):
    """Terms of one student are not finite at one step, counted over groups and epochs."""

    def __init__(self, step: int, terms: tuple[str, ...], of: int = 0) -> None:
        super().__init__("fp32", "")
        self.step, self.terms, self.of, self.count = step, terms, of, 0

    def losses(self, *args: Any) -> list[dict[str, Tensor]]:
        self.count += 1
        found = super().losses(*args)
        if self.count == self.step:
            for term in self.terms:
                found[self.of][term] = found[self.of][term] * torch.nan
        return found


@pytest.mark.parametrize(
    ("step", "terms", "line"),
    [
        (2, ("at",), "diverged in epoch 1: at is not finite from batch 2 of 4 on, where task still is; lower weights.at or train.lr"),
        (7, ("at",), "diverged in epoch 2: at is not finite from batch 3 of 4 on, where task still is; lower weights.at or train.lr"),
        (3, ("task", "at", "kd"), "diverged in epoch 1: task, at and kd are not finite from batch 3 of 4 on; lower train.lr or weights.kd"),
        (5, ("task",), "diverged in epoch 2: task is not finite from batch 1 of 4 on; lower train.lr or weights.task"),
        (
            1,
            ("task", "kd"),
            "stopped in epoch 1: its task and kd are not finite on the first batch, before any step; is the student sound?",
        ),
    ],
)
def test_the_first_term_is_named(data: ImageData, small_npz: Path, step: int, terms: tuple[str, ...], line: str) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="at+kd", teacher="-", weights={"at": 20.0})])
    cohort.engine = Harmed(step, terms)
    *_, last = train(cohort)
    assert last.progress[student].error == line


@pytest.mark.parametrize(("harm", "what"), [("fc.bias", "weight fc.bias"), ("bn1.running_var", "buffer bn1.running_var")])
def test_a_student_that_breaks_after_finite_losses_is_named(
    data: ImageData, small_npz: Path, harm: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="base", teacher="-")])
    evaluate = Engine.evaluate

    def after_the_last_step(*args: Any) -> list[Evaluation]:
        student.net.state_dict()[harm][1] = torch.nan
        return evaluate(*args)

    monkeypatch.setattr(Engine, "evaluate", after_the_last_step)
    (report,) = train(cohort)
    what = f"its {what} is not finite, its logits are not finite for 150 of 150 images that it is measured on"
    assert report.progress[student].error == f"diverged in epoch 1: {what}, though its losses are; lower train.lr or weights.task"


def test_the_error_names_the_peer_that_broke(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.runner.cohorts.choose", lambda *_, **__: Harmed(2, ("task", "dml"), of=1))
    run([config(small_npz, method="dml", **FEW)], taught, CPU)
    one, other = [found for found in taught.runs() if found.method == "dml"]
    assert one.error == "its peer diverged in epoch 1"
    assert other.error.startswith("diverged in epoch 1: task and dml are not finite from batch 2 of 3 on; ")


# Before the first step nothing can have diverged


@pytest.mark.parametrize("method", ["base", "kd"])
def test_a_student_that_is_broken_from_the_start_is_named(data: ImageData, small_npz: Path, method: str) -> None:
    for harm, line in (
        ("layer1.0.conv1.weight", "student resnet8: its weight layer1.0.conv1.weight is not finite; is its file whole?"),
        ("", "student resnet8: its logits are not finite on the first batch, before any step, though its weights are; mend it"),
    ):
        cohort, (student,) = a_cohort(data, [config(small_npz, method=method, teacher="-")])
        if harm:
            student.net.get_parameter(harm).data.flatten()[5] = torch.inf
        else:
            student.net.fc.register_forward_hook(lambda _, __, given: given / 0)
        with pytest.raises(UserError) as caught:
            first_gradients(cohort)
        assert str(caught.value).startswith(line)


def test_a_term_that_is_broken_from_the_start_is_named(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="kd", teacher="-")])
    original = type(student.method).forward
    monkeypatch.setattr(type(student.method), "forward", lambda *args: {"kd": original(*args)["kd"] * torch.inf})
    with pytest.raises(
        UserError, match=r"^kd resnet8: kd is not finite on the first batch, before any step, though what teacher and student give is;"
    ):
        first_gradients(cohort)


def test_a_teacher_that_is_broken_from_the_start_is_named(taught: Ledger, small_npz: Path) -> None:
    cohort = prepared(taught, small_npz, "ofd")
    teacher = cohort.seed_groups[0].teacher
    assert teacher is not None
    teach, name = teacher.teach, teacher.output_names[0]
    teacher.teach = lambda images: harmed(teach(images), name, -torch.inf)  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        first_gradients(cohort)
    assert str(caught.value) == f"teacher resnet14: its {name} is not finite on the first batch; mend the teacher, or choose another"


def test_a_modules_weight_has_its_own_name(small_npz: Path, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    module.get_parameter("4.bias").data[3] = torch.nan
    with pytest.raises(UserError, match=r"^student module:Sequential-\w+: its weight 4\.bias is not finite; is its file whole\?$"):
        flowdistill.train(module, f"npz:{small_npz}", train={"epochs": 1, "batch_size": 64}, runs=tmp_path / "runs", progress=False)
