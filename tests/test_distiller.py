"""Distiller: a method in one's own loop, on one's own modules."""

from __future__ import annotations

import gc
import io
import pickle
import subprocess
import sys
import weakref
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.networks import Tied
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import flowdistill
from flowdistill import Distiller, UserError, methods, models
from flowdistill.config import TrainConfig
from flowdistill.methods import resolve
from flowdistill.training.step import losses
from flowdistill.training.student import Student
from flowdistill.training.teacher import teach
from flowdistill.types import Batch, DataSpec

DATA = DataSpec("some", 100, 10, 1, 8, 8)
SIZE = (1, 8, 8)
EVERY = [name for name in methods.METHODS if name not in ("crd", "nd", "dml", "simkd")]


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SIZE, generator=chance), torch.randint(10, (n,), generator=chance)


def nets() -> tuple[models.Network, models.Network]:
    return models.build("resnet14", DATA, seed=1), models.build("resnet8", DATA, seed=2)


@pytest.mark.parametrize("name", EVERY)
def test_every_method_gives_its_terms_and_gradients(name: str) -> None:
    teacher, student = nets()
    distiller = Distiller(teacher, student, name, images=SIZE)
    before = deepcopy(teacher.state_dict())
    for number, phase in enumerate(distiller.resolved.phases):
        distiller.begin_phase(number)
        distiller.zero_grad()
        loss, terms = distiller(*batch())
        loss.backward()
        assert set(distiller.weights) <= set(terms) <= {"task", *distiller.method.terms}
        assert not any(value.requires_grad for value in terms.values())
        moved, reached = ({id(p) for p in found} for found in (distiller.trainable_parameters(), _reached(student)))
        assert (reached | {id(p) for p in _reached(distiller.method)}) & moved
        assert phase.only or reached == {id(p) for p in student.parameters()}
    if distiller.teacher is not None:
        assert _reached(teacher) == []
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def _reached(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.grad is not None]


def test_a_few_steps_are_those_of_training() -> None:
    """Same networks, same batches, same optimiser: the loop that training has, and one's own."""
    weights, resolved = {"at": 20.0}, resolve("at+kd", {}, {"at": 20.0})
    teacher, student = nets()
    method = methods.build(resolved, student=student.spec, teacher=teacher.spec, data=DATA)
    stages = teacher.spec.stages
    theirs, ours = (models.build(net, DATA, taps=stages, seed=seed) for net, seed in (("resnet14", 1), ("resnet8", 2)))
    trained = Student(ours, method, resolved, TrainConfig(lr=0.1, precision="fp32"))
    trained.begin_phase(0)
    trained.begin_epoch()
    distiller = Distiller(teacher, student, "at+kd", weights=weights, images=SIZE)
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    theirs.eval()
    for step in range(3):
        images, labels = batch(step)
        (expected,) = losses((trained,), images, teach(theirs, images, "fp32"), Batch(labels), "fp32")
        total = sum(trained.weights[term] * value for term, value in expected.items())
        loss, terms = distiller(images, labels)
        assert {term: value.item() for term, value in terms.items()} == pytest.approx({t: v.item() for t, v in expected.items()}, rel=1e-5)
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        for value, mover in ((loss, optimizer), (total, trained.optimizer)):
            mover.zero_grad()
            value.backward()
            mover.step()
    assert distiller.student is not student
    torch.testing.assert_close(student.state_dict(), ours.state_dict(), rtol=1e-4, atol=1e-5)


def test_modules_of_others_are_trained_in_place_and_left_bare() -> None:
    teacher, student = Tied(8, seed=1), Tied(seed=2).eval()
    begun = deepcopy(student.state_dict())
    distiller = Distiller(teacher, student, "fitnets", images=torch.zeros(2, *SIZE))
    assert distiller.student.body is student
    assert student.training
    assert not teacher.training
    adapters = list(distiller.method.parameters())
    assert adapters
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=0.1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} >= {id(p) for p in (*student.parameters(), *adapters)}
    kept = [parameter.detach().clone() for parameter in adapters]
    for step in range(2):
        optimizer.zero_grad()
        distiller(*batch(step))[0].backward()
        optimizer.step()
    assert any(not torch.equal(value, begun[name]) for name, value in student.state_dict().items())
    assert any(not torch.equal(now, before) for now, before in zip(adapters, kept, strict=True))
    assert any(module._forward_hooks for module in student.modules())
    distiller.close()
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())
    with pytest.raises(RuntimeError, match="closed"):
        distiller(*batch())


def test_a_distiller_that_nobody_holds_removes_its_hooks() -> None:
    teacher, student = Tied(8), Tied()
    Distiller(teacher, student, "kd", images=SIZE)
    gc.collect()
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_train_and_eval_switch_the_student_alone() -> None:
    teacher, student = nets()
    distiller = Distiller(teacher, student, "kd", images=SIZE)
    assert distiller.training
    assert all(module.training for module in student.modules())
    before = deepcopy(student.state_dict())
    with torch.no_grad():
        distiller.eval()(*batch())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not student.training
    distiller.train()
    assert student.training
    assert not any(module.training for module in teacher.modules())


def test_images_without_labels_give_no_task_term() -> None:
    distiller = Distiller(*nets(), "at+kd", images=SIZE)
    images, labels = batch()
    loss, terms = distiller(images)
    labelled, all_terms = distiller(images, labels)
    assert set(terms) == {"at", "kd"}
    weights = distiller.weights
    assert loss.item() == pytest.approx(sum(weights[term] * value.item() for term, value in terms.items()), rel=1e-5)
    assert labelled.item() == pytest.approx(loss.item() + all_terms["task"].item(), rel=1e-5)
    for name in ("base", "nkd"):
        with pytest.raises(UserError, match=f"method '{name}' learns from labels in phase 'joint'; give them"):
            Distiller(*nets(), name, images=SIZE)(images)


WANTED = "it must give (images float [B, C, H, W], labels integer [B])"


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (nn.functional.one_hot(torch.arange(8), 10), f"the loop: it gives (float32 [8, 1, 8, 8], int64 [8, 10]); {WANTED}"),
        (torch.zeros(8, 1, dtype=torch.int64), f"the loop: it gives (float32 [8, 1, 8, 8], int64 [8, 1]); {WANTED}"),
        (torch.zeros(8), f"the loop: it gives (float32 [8, 1, 8, 8], float32 [8]); {WANTED}"),
        (torch.zeros(8, dtype=torch.bool), f"the loop: it gives (float32 [8, 1, 8, 8], bool [8]); {WANTED}"),
        (torch.zeros(7, dtype=torch.int64), f"the loop: it gives (float32 [8, 1, 8, 8], int64 [7]); {WANTED}"),
        ([0] * 8, f"the loop: it gives (Tensor, list); {WANTED}"),
        (torch.arange(3, 11), "the loop gives label 10, of 10 classes; labels are 0 to 9, or -1 where an image has none"),
        (torch.full((8,), -100), "the loop gives label -100, of 10 classes; labels are 0 to 9, or -1 where an image has none"),
    ],
    ids=["one-hot", "column", "float", "bool", "short", "list", "beyond", "ignored"],
)
def test_wrong_labels_are_told_in_one_line(labels: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        Distiller(*nets(), "kd", images=SIZE)(batch()[0], labels)
    assert str(caught.value) == line


def test_labels_of_any_integer_type() -> None:
    distiller = Distiller(*nets(), "nkd", images=SIZE)
    images, labels = batch()
    expected = distiller(images, labels)[0].item()
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        assert distiller(images, labels.to(kind))[0].item() == expected


def test_an_image_without_a_label_is_not_in_the_task() -> None:
    """The method's terms are those of the whole batch, the task is that of the labelled images alone; 0 where there is none."""
    teacher, student = nets()
    distiller = Distiller(teacher, student, "at+kd", images=SIZE, label_smoothing=0.1).eval()
    images, labels = batch()
    some = labels.clone()
    some[3:] = -1
    _, terms = distiller(images, some)
    _, whole = distiller(images, labels)
    _, first = distiller(images[:3], labels[:3])
    assert terms["task"].item() == pytest.approx(first["task"].item(), rel=1e-5)
    assert (terms["at"], terms["kd"]) == (whole["at"], whole["kd"])
    loss, terms = distiller(images, torch.full_like(labels, -1))
    assert terms["task"].item() == 0
    assert loss.item() == distiller(images)[0].item()
    for name in ("nkd", "at+dkd", "base"):
        with pytest.raises(UserError) as caught:
            Distiller(*nets(), name, images=SIZE)(images, some)
        user = name.removeprefix("at+")
        cure = "choose one that does not, such as kd, or leave such images out"
        assert str(caught.value) == f"label -1: this image has none, but method '{user}' learns from labels; {cure}"


def test_the_callers_autocast_is_used_and_losses_are_float32() -> None:
    distiller = Distiller(*nets(), "fsp+kd", images=SIZE)
    plain, _ = distiller(*batch())
    seen: list[torch.dtype] = []
    distiller.student.body.get_submodule("conv1").register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = distiller(*batch())
    assert seen == [torch.bfloat16]
    assert {value.dtype for value in (loss, *terms.values())} == {torch.float32}
    assert loss.item() == pytest.approx(plain.item(), rel=0.05)
    assert loss.item() != plain.item()


@pytest.mark.parametrize("foreign", [False, True])
def test_compiled_equals_eager(foreign: bool) -> None:
    pair = (Tied(8, seed=1), Tied(seed=2)) if foreign else nets()
    distiller = Distiller(*pair, "at+kd", images=SIZE)
    compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True)
    for step in range(2):
        loss, terms = distiller(*batch(step))
        expected = torch.autograd.grad(loss, distiller.trainable_parameters())
        other, others = compiled(*batch(step))
        assert other.item() == pytest.approx(loss.item(), rel=1e-5)
        assert {term: value.item() for term, value in others.items()} == pytest.approx({t: v.item() for t, v in terms.items()}, rel=1e-5)
        for ours, theirs in zip(torch.autograd.grad(other, distiller.trainable_parameters()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_curricula_count_epochs() -> None:
    distiller = Distiller(*nets(), "dkd", images=SIZE)
    (_, late), (_, first) = distiller(*batch()), distiller(*batch(), epoch=0)
    assert first["dkd"].item() == pytest.approx(late["dkd"].item() / distiller.resolved.options["dkd"].warmup, rel=1e-5)


def test_its_state_goes_into_a_checkpoint_and_back() -> None:
    one, other = (Distiller(Tied(8, seed=1), Tied(seed=seed), "fitnets", images=SIZE, seed=seed) for seed in (2, 3))
    one(*batch())
    names = one.state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"student", "method"}
    assert "student.first.weight" in names
    other.load_state_dict(one.state_dict())
    assert other(*batch())[0].item() == one(*batch())[0].item()


def test_a_state_has_no_teacher_and_loading_one_is_strict_about_the_rest() -> None:
    distiller, teacher = Distiller(Tied(8, seed=1), Tied(seed=2), "fitnets", images=SIZE), Tied(8, seed=5)
    holder, before = nn.ModuleDict({"inside": distiller}), deepcopy(distiller.teacher.state_dict())
    state = holder.state_dict()
    assert {name.split(".")[1] for name in state} == {"student", "method"}
    of_an_earlier_version = state | {f"inside.teacher.{name}": value for name, value in teacher.state_dict().items()}
    holder.load_state_dict(of_an_earlier_version)
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    del state["inside.student.first.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "inside\.student\.[\w.]*first\.weight"\.\s*$'):
        holder.load_state_dict(state)


def test_labels_are_smoothed_and_frozen_parts_are_not_trained() -> None:
    student = Tied()
    student.stem.requires_grad_(False)
    distiller = Distiller(Tied(8), student, "kd", images=SIZE, label_smoothing=0.1)
    images, labels = batch()
    _, terms = distiller(images, labels)
    assert terms["task"].item() == pytest.approx(nn.functional.cross_entropy(student(images), labels, label_smoothing=0.1).item(), rel=1e-5)
    assert not {id(p) for p in student.stem.parameters()} & {id(p) for p in distiller.trainable_parameters()}


def test_a_distilled_student_distils_on() -> None:
    """What a Result gives back may be given here, and here may be trained what goes there."""
    net = models.build("timm:resnet18", DataSpec("", 0, 10, 3, 32, 32), seed=0)
    distiller = Distiller(net, Tied3(), "kd", images=(3, 32, 32))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert set(distiller(images, torch.tensor([1, 2]))[1]) == {"task", "kd"}


class Tied3(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.stem[0] = nn.Conv2d(3, 4, 3, padding=1)


def test_stages_are_paired_as_a_run_pairs_them() -> None:
    """The student has two stages and ResNet-18 three at this size: the last ones, counted from the classifier."""
    teacher, student = models.build("timm:resnet18", DataSpec("", 0, 10, 3, 32, 32)), Tied3()
    distiller = Distiller(teacher.release(), student, "at", images=(3, 32, 32))
    assert distiller.student.paths == {"stage1": "first", "stage2": "second"}
    assert distiller.teacher.paths == {"stage1": "layer2", "stage2": "layer3"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("crd", "method 'crd' needs the labels of all training images; use flowdistill.distill"),
        ("nd", "method 'nd' needs the class means of all training images; use flowdistill.distill"),
        ("dml", "the students of 'dml' teach each other; use flowdistill.distill"),
        ("simkd", "method 'simkd' trains another network, made of registered models; use flowdistill.distill, and name two"),
        ("fps", "unknown method 'fps': did you mean 'fsp'?"),
    ],
)
def test_methods_that_need_a_whole_run_are_refused(name: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        Distiller(*nets(), name, images=SIZE)
    assert str(caught.value) == line


def test_a_compiled_module_is_refused_with_the_cure() -> None:
    module = torch.compile(nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)))
    with pytest.raises(UserError, match=r"student is compiled; give the module itself, and compile the Distiller"):
        Distiller(None, module, "base", images=(1, 8, 8))


def test_mistakes_are_one_line() -> None:
    teacher, student = nets()
    for given, words in [
        ({"student": student, "teacher": None}, "method 'fsp' needs a teacher; give a module"),
        ({"student": student, "teacher": "resnet14"}, "teacher='resnet14' is no module; give an nn.Module"),
        ({"student": student, "teacher": student}, "teacher and student share weights; give a copy as the teacher"),
        ({"student": nn.Linear(3, 10), "teacher": teacher}, "Linear: no classifier of images of 1x8x8"),
        ({"student": student, "teacher": teacher, "images": (8, 8)}, "images=(8, 8): give a shape (channels, height, width) or a batch"),
        ({"student": student, "teacher": teacher, "images": 8}, "images=8: give a shape (channels, height, width) or a batch"),
        ({"student": student, "teacher": teacher, "images": (1.0, 8, 8)}, "images=(1.0, 8, 8): give a shape"),
        ({"student": student, "teacher": teacher, "images": torch.zeros(SIZE)}, "images=Tensor (1, 8, 8): give a shape"),
        ({"student": student, "teacher": teacher, "images": np.zeros((3, *SIZE))}, "images=ndarray (3, 1, 8, 8): give a shape"),
        (
            {"student": student, "teacher": teacher, "label_smoothing": -1.0},
            "label_smoothing=-1.0: input should be greater than or equal to 0",
        ),
        ({"student": student, "teacher": teacher, "label_smoothing": 1.0}, "label_smoothing=1.0: input should be less than 1"),
        ({"student": student, "teacher": teacher, "options": {"fps": {}}}, "options.fps: method 'fsp' has no such part"),
        ({"student": Tied(8), "teacher": Tied3(), "images": SIZE}, "Tied3: no classifier of images of 1x8x8"),
    ]:
        with pytest.raises(UserError) as caught:
            Distiller(**{"images": SIZE, **given})
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert student.training, "nothing was changed by what was refused"
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_phases_are_numbered() -> None:
    distiller = Distiller(*nets(), "fitnets", images=SIZE, options={"fitnets": {"schedule": "two-stage"}})
    with pytest.raises(UserError, match=r"phase 2: method 'fitnets' has the phases 0 \(\w+\), 1 \(task\)"):
        distiller.begin_phase(2)
    distiller.begin_phase(1)
    assert distiller.weights == {"task": 1.0}
    with pytest.raises(UserError, match="learns from labels in phase 'task'; give them"):
        distiller(batch()[0])


def test_the_package_exports_distiller() -> None:
    assert flowdistill.Distiller is Distiller
    assert "Distiller" in dir(flowdistill)


class Probabilities(Tied):
    """It answers with probabilities: always, or in one mode."""

    def __init__(self, mode: bool | None = None, width: int = 4, seed: int = 0) -> None:
        super().__init__(width, seed)
        self.mode = mode

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits.softmax(1) if self.mode in (None, self.training) else logits


GIVES = "probabilities, not the logits of its classifier fc; leave the softmax out"


@pytest.mark.parametrize("mode", [None, True, False])
def test_probabilities_are_not_taken_for_logits(mode: bool | None) -> None:
    gives = f"{'in train mode ' if mode else ''}it gives {GIVES}"
    altered = Probabilities(mode)
    for name, method in (("kd", "kd"), ("dkd", "dkd"), ("at+kd", "kd"), ("srrl", "srrl"), ("ls:kd", "ls:kd"), ("irg", "irg")):
        with pytest.raises(UserError) as caught:
            Distiller(altered, Tied(), name, images=SIZE)
        cure = "or choose a method on feature maps, such as at"
        assert str(caught.value) == f"{method}: teacher Probabilities: {gives}, {cure}"
    for name in ("base", "kd", "at"):
        with pytest.raises(UserError) as caught:
            Distiller(Tied(8), altered, name, images=SIZE)
        assert str(caught.value) == f"student Probabilities: {gives}"
    assert Distiller(altered, Tied(), "at", images=SIZE)(*batch())[1]["at"] > 0, "its maps are its maps"


def test_srrl_refuses_a_teacher_whose_classifier_alone_does_not_make_its_logits() -> None:
    class Cold(Tied):
        def forward(self, images: Tensor) -> Tensor:
            return 4 * super().forward(images)

    line = "its logits are not what the weights of its classifier fc make of the embedding, and srrl teaches by these; choose kd"
    with pytest.raises(UserError) as caught:
        Distiller(Cold(), Tied(), "srrl", images=SIZE)
    assert str(caught.value) == f"srrl: teacher Cold: {line}"
    plain, cold = (Distiller(net, Tied(seed=2), "kd", images=SIZE, options={"kd": {"T": T}}) for net, T in ((Tied(), 1.0), (Cold(), 4.0)))
    assert cold.teacher(batch()[0]).logits.tolist() == (4 * plain.teacher(batch()[0]).logits).tolist()


class Whole(nn.Module):
    """What holds student, teacher and Distiller as a LightningModule does."""

    def __init__(self, distiller: Distiller, **modules: nn.Module) -> None:
        super().__init__()
        self.distiller = distiller
        for name, module in modules.items():
            self.add_module(name, module)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_teacher_teaches_in_eval_mode_whatever_its_owner_does(foreign: bool, compiled: bool) -> None:
    teacher, student = (Tied(8, seed=1), Tied(seed=2)) if foreign else nets()
    distiller = Distiller(teacher, student, "at+kd", images=SIZE)
    call = torch.compile(distiller, backend="aot_eager", fullgraph=True) if compiled else distiller
    before = deepcopy(teacher.state_dict())
    expected = call(*batch())[1]
    part = teacher.get_submodule("stem" if foreign else "bn1")
    disturbances = [
        lambda: Whole(distiller, teacher=teacher).train(),
        lambda: distiller.train(),
        lambda: part.train(),
        lambda: distiller.teacher.train(),
        lambda: teacher.train().requires_grad_(True),
    ]
    for disturb in disturbances[: 2 if compiled else None]:  # each is compiled anew
        disturb()
        found = call(*batch())[1]
        assert {term: value.item() for term, value in found.items()} == {term: value.item() for term, value in expected.items()}
        assert not any(module.training for module in teacher.modules())
        assert all(module.training for module in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert _reached(teacher) == []


class Observing(Tied):
    """It counts its passes, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.tensor(0.0))

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(images)


def test_teaching_changes_no_state_of_the_teacher() -> None:
    teacher = Observing()
    distiller = Distiller(teacher, Tied(seed=2), "kd", images=SIZE)
    distiller(*batch())
    assert teacher.passes == 0


def _bare(module: nn.Module) -> bool:
    return not any(table for one in module.modules() for table in (one._forward_hooks, one._forward_hooks_with_kwargs))


@pytest.mark.parametrize("called", ["not", "directly", "by the Distiller", "by a Distiller that fails"])
def test_copies_are_bare(called: str) -> None:
    teacher, student = Tied(8, seed=1), Tied(seed=2)
    distiller = Distiller(teacher, student, "at+kd", images=SIZE)
    images, labels = batch()
    if called == "directly":
        student(images)
    elif called == "by the Distiller":
        distiller(images, labels)[0].backward()
    elif called == "by a Distiller that fails":
        failing = student.fc.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distiller(images, labels)
        failing.remove()
    expected = student.eval()(images)
    for module in (student, teacher, student.stem, teacher.fc):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        for made in (deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), deepcopy(copy(module))):
            assert type(made) is type(module)
            assert _bare(made)
            assert b"flowdistill" not in pickle.dumps(made).replace(b"flowdistill-", b"")
        assert b"flowdistill" not in pickle.dumps(module)
    assert torch.equal(deepcopy(student)(images), expected)
    assert not _bare(student), "the Distiller is open"
    average = AveragedModel(student)
    average.update_parameters(student)
    assert torch.equal(average.eval()(images), expected)
    distiller.train()
    assert set(distiller(images, labels)[1]) == {"task", "at", "kd"}
    distiller.close()
    assert _bare(student)
    assert type(student.fc._forward_hooks) is type(nn.Linear(1, 1)._forward_hooks)


def test_a_process_without_this_package_loads_what_was_saved_beside_it(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    distiller = Distiller(Tied(), student, "kd", images=SIZE)
    distiller(*batch())
    torch.save(student, tmp_path / "student.pt")
    load = "torch.load(sys.argv[1], weights_only=False)(torch.zeros(2, 1, 8, 8)).shape"
    code = f"import sys, torch; sys.modules['flowdistill'] = None; print({load})"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "student.pt")], capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([2, 10])\n"


@pytest.mark.parametrize("owner", ["student", "Distiller"])
def test_no_batch_is_held(owner: str) -> None:
    student = Tied(seed=2)
    distiller = Distiller(Tied(8, seed=1), student, "at+kd", images=SIZE)
    images, labels = batch()
    kept = weakref.ref(images)
    if owner == "student":
        student(images)
    else:
        distiller(images, labels)[0].backward()
    del images
    gc.collect()
    assert kept() is None
    assert distiller.student.seen == {}


def test_a_student_may_be_compiled_in_place_afterwards() -> None:
    """The compiler does not look at hooks again: what its owner called first serves the Distiller too."""
    student = Tied(seed=2)
    distiller = Distiller(Tied(8, seed=1), student, "at+kd", images=SIZE)
    expected = distiller(*batch())[0].item()
    student.compile(backend="aot_eager")
    student(batch(1)[0])
    assert distiller(*batch())[0].item() == pytest.approx(expected, rel=1e-5)
    assert distiller.student.seen == {}


def test_hooks_of_the_owner_are_left_and_obey_it() -> None:
    """Those from before and those from after, with and without a Distiller."""
    student, calls = Tied(seed=2), list[str]()
    before = student.fc.register_forward_hook(lambda *_: calls.append("before"))
    stays = student.fc.register_forward_hook(lambda *_: calls.append("stays"), with_kwargs=False)
    distiller = Distiller(Tied(8, seed=1), student, "at+kd", images=SIZE)
    other = Distiller(Tied(8, seed=1), student, "fsp", images=SIZE, options={"fsp": {"adapter": "conv1x1"}})
    after = student.fc.register_forward_hook(lambda *_: calls.append("after"))

    def called(net: nn.Module) -> list[str]:
        calls.clear()
        net(batch()[0])
        return list(calls)

    assert called(student) == called(distiller) == called(other) == called(deepcopy(student)) == ["before", "stays", "after"]
    before.remove()
    assert called(student) == called(distiller) == called(deepcopy(student)) == ["stays", "after"]
    other.close()
    distiller.close()
    assert called(student) == ["stays", "after"]
    after.remove()
    stays.remove()
    assert called(student) == []
    assert _bare(student)


def test_images_of_another_size_are_refused_where_maps_are_compared() -> None:
    """Refused where maps are compared; logits go with any size that the networks take."""
    larger = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])
    for name in ("at", "fsp", "at+kd"):
        options = {"fsp": {"adapter": "conv1x1"}} if name == "fsp" else {}
        distiller = Distiller(Tied(8), Tied(seed=2), name, images=SIZE, options=options)
        with pytest.raises(UserError) as caught:
            distiller(*larger)
        assert str(caught.value) == "images 2x1x16x16: this Distiller was made for Nx1x8x8; make another with images= of that size"
        assert Distiller(Tied(8), Tied(seed=2), name, images=larger[0], options=options)(*larger)[0] > 0
    assert Distiller(Tied(8), Tied(seed=2), "kd", images=SIZE)(*larger)[1]["kd"] > 0
    for shape in ((2, 3, 8, 8), (1, 8, 8), (2, 64)):
        with pytest.raises(UserError, match=f"images {'x'.join(map(str, shape))}: this Distiller was made for Nx1x8x8"):
            Distiller(Tied(8), Tied(seed=2), "kd", images=SIZE)(torch.zeros(shape))


class Cut(Tied):
    """Its first stage is given without a gradient."""

    def __init__(self, how: str) -> None:
        super().__init__(seed=2)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                x = self.first(self.stem(images))
        elif self.how.startswith("checkpoint"):
            x = checkpoint(lambda x: self.first(x).relu(), self.stem(images), use_reentrant="reentrant" in self.how)
        else:
            x = self.first(self.stem(images))
        x = x.detach() if self.how == "detached later" else x
        return self.fc(self.second(x.relu()).relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_arrive_or_are_refused() -> None:
    images, labels = batch()
    for how in ("no_grad", "checkpoint, reentrant"):
        student = Cut(how)
        distiller = Distiller(Tied(8), student, "at", images=SIZE)
        with pytest.raises(UserError, match=r"^tap stage1=first: Cut gives it without a gradient, though stem.0.weight before it"):
            distiller(images, labels)
        with torch.no_grad():
            assert distiller(images, labels)[1]["at"] > 0
        assert Distiller(Tied(8), student, "kd", images=SIZE)(images, labels)[0] > 0, "its logits do"
    for how in ("", "detached later", "checkpoint"):
        student = Cut(how)
        Distiller(Tied(8), student, "at", images=SIZE)(images)[0].backward()
        assert student.stem[0].weight.grad.abs().sum() > 0
    frozen = Cut("no_grad")
    frozen.stem.requires_grad_(False)
    frozen.first.weight.requires_grad_(False)
    assert Distiller(Tied(8), frozen, "at", images=SIZE)(images, labels)[0] > 0, "nothing before it is trained"


def test_gradients_of_a_checkpoint_are_those_without_it() -> None:
    """In the backward pass the hooks are called again; what is kept is of the forward pass."""
    images, labels = batch()
    found = []
    for how in ("", "checkpoint"):
        student = Cut(how)
        distiller = Distiller(Tied(8), student, "at+kd", images=SIZE)
        for _ in range(2):
            distiller.zero_grad()
            distiller(images, labels)[0].backward()
        found.append([parameter.grad for parameter in student.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Headless(Tied):
    """Its embedding is cut off from what made it."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.second(self.first(self.stem(images)).relu()).relu().mean((2, 3)).detach())


def test_an_embedding_without_a_gradient_is_refused() -> None:
    with pytest.raises(UserError, match=r"^the embedding: Headless gives it without a gradient, though stem.0.weight before it is trained"):
        Distiller(Tied(4), Headless(), "rkd", images=SIZE)(*batch())
    student = Tied()
    student.requires_grad_(False).fc.requires_grad_(True)
    assert Distiller(Tied(4, seed=1), student, "rkd", images=SIZE)(*batch())[0] > 0
