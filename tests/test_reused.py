"""A student that ships with its teacher's classifier: what it is made of, that it is trained so, and that its file is enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.networks import TWO_STAGE_NET, Tied
from helpers.small import config

import flowdistill
from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.ledger import Ledger
from flowdistill.models.reused import Reused
from flowdistill.runner import evaluate, resume, run
from flowdistill.runner.cohorts import prepare
from flowdistill.runner.plan import plan
from flowdistill.training.weights import load_weights
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
CIFAR = DataSpec("cifar100", 50_000, 100, 3, 32, 32)
NAME = "reused(resnet8,resnet14,2)"


@pytest.fixture
def taught(ledger: Ledger, small_npz: Path) -> Ledger:
    run([config(small_npz, student="resnet14", seed=7)], ledger, CPU)
    return ledger


def test_a_reused_network_has_the_parameters_of_its_parts() -> None:
    net = models.build("reused(resnet20,resnet56,2)", CIFAR)
    body = 278_324 - 65 * 100  # ResNet-20 on 100 classes without its classifier
    projector = 64 * 32 + 2 * 32 + 32 * 32 * 9 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(p.numel() for p in net.parameters()) == body + projector + 65 * 100
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == 65 * 100


@pytest.mark.parametrize(("student", "teacher"), [("resnet8x4", "wrn-40-2"), ("vgg8", "resnet50"), ("shufflenetv2", "resnet32x4")])
def test_declared_sizes_are_the_real_ones(student: str, teacher: str) -> None:
    spec = models.spec(f"reused({student},{teacher},4)", CIFAR)
    net = models.build(spec.name, CIFAR, taps=tuple(tap.name for tap in spec.taps)).eval()
    with torch.no_grad():
        out = net(torch.randn(2, 3, 32, 32))
    assert {tap.name: (tap.channels, tap.height, tap.width) for tap in spec.taps} == {
        tap: tuple(m.shape[1:]) for tap, m in out.maps.items()
    }
    assert spec.embedding == models.spec(teacher, CIFAR).embedding
    torch.testing.assert_close(out.maps["projected"].mean((2, 3)), out.embedding)
    torch.testing.assert_close(net.get_submodule(spec.head)(out.embedding), out.logits)


@pytest.mark.parametrize("name", ["reused(resnet8)", "reused(resnet8,resnet14,0)", "reused(reused(resnet8,resnet14,2),resnet14,2)"])
def test_a_name_that_is_written_otherwise_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^model 'reused.*': write reused\(STUDENT,TEACHER,FACTOR\) with registered models, such as "):
        models.canonical(name)
    with pytest.raises(UserError, match=r"^unknown model 'resnet9': "):
        models.canonical("reused(resnet9,resnet14,2)")


def test_simkd_trains_body_and_projector_and_leaves_the_teachers_classifier(taught: Ledger, small_npz: Path) -> None:
    (one,) = run([config(small_npz, method="simkd", teacher="1")], taught, CPU)
    weights, about = load_weights(taught.run_folder(one.no) / "student.safetensors")
    teacher, _ = load_weights(taught.run_folder(1) / "student.safetensors")
    assert about["model"] == NAME
    assert (one.student, one.variant) == ("resnet8", f"ships {NAME}")
    assert torch.equal(weights["classifier.weight"], teacher["fc.weight"])
    assert torch.equal(weights["classifier.bias"], teacher["fc.bias"])
    began = models.build("resnet8", DataSpec("small", 0, 4, 3, 8, 8))
    assert not any(name.startswith("student.fc") for name in weights)
    assert not torch.equal(weights["student.conv1.weight"], began.state_dict()["conv1.weight"])
    record = json.loads((taught.run_folder(one.no) / "run.json").read_text())
    assert (record["student"], record["about"]["model"]) == ("resnet8", NAME)
    assert record["parameters"] == sum(
        value.numel() for name, value in weights.items() if "running" not in name and "num_batches" not in name
    )


@pytest.mark.parametrize(
    ("student", "teacher", "foreign"),
    [
        ("timm:resnet18", "1", "timm:resnet18"),
        ("resnet8", "timm:resnet18", "timm:resnet18"),
        ("nets.py:Tiny", "1", "nets.py:Tiny"),
        ("resnet8", "nets.py:Tiny", "nets.py:Tiny"),
    ],
)
def test_networks_of_others_are_refused(
    student: str, teacher: str, foreign: str, taught: Ledger, small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(TWO_STAGE_NET)
    with pytest.raises(UserError) as caught:
        plan([config(small_npz, method="simkd", student=student, teacher=teacher)], taught, CPU, stand_in=True)
    cure = "name two that flowdistill models lists, or choose another method"
    assert str(caught.value) == f"simkd needs registered models as student and teacher, {foreign} is none; {cure}"


def test_simkd_refuses_modules(small_npz: Path, tmp_path: Path) -> None:
    modules = Tied(8, seed=1), Tied(seed=2)
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=r"^simkd needs registered models as student and teacher, module:Tied-[0-9a-f]{8} is none; "):
        flowdistill.distill(*modules, f"npz:{small_npz}", method="simkd", runs=runs)
    assert not (runs / "ledger.db").exists()


def test_the_body_begins_with_the_weights_of_the_plain_student(small_npz: Path, taught: Ledger) -> None:
    jobs = plan([config(small_npz, method=method, teacher="1", seed=3) for method in ("simkd", "kd")], taught, CPU)
    ((_, (reused, plain)),) = prepare(jobs, CPU)
    reused_net, plain_net = reused.student.net, plain.student.net
    assert isinstance(reused_net, Reused)
    own = {name: value for name, value in plain_net.state_dict().items() if not name.startswith("fc.")}
    found = reused_net.student.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert jobs[0].init_hash == jobs[1].init_hash


def test_its_file_is_enough_to_measure_it_again_and_to_go_on_from_it(taught: Ledger, small_npz: Path) -> None:
    (one,) = run([config(small_npz, method="simkd", teacher="1")], taught, CPU)
    measured = evaluate(taught.run_folder(one.no) / "student.safetensors", CPU)
    assert (measured.model, measured.correct) == (NAME, one.correct)
    taught_by_it, gone_on = run(
        [config(small_npz, method="kd", teacher=str(one.no), seed=1), config(small_npz, student=str(one.no), seed=1)], taught, CPU
    )
    assert taught_by_it.teacher_accuracy == pytest.approx(one.accuracy)
    assert (taught_by_it.status, gone_on.status, gone_on.student) == ("finished", "finished", NAME)


def test_a_second_classifier_is_refused(taught: Ledger, small_npz: Path) -> None:
    (one,) = run([config(small_npz, method="simkd", teacher="1")], taught, CPU)
    with pytest.raises(UserError, match=r"^model 'reused\(reused"):
        run([config(small_npz, method="simkd", student=str(one.no), teacher="1", seed=1)], taught, CPU)
    assert resume(taught, CPU) == []
