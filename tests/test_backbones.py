"""Teachers without a classifier: what their features are, which methods learn from them, and that nothing takes features for logits."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import hub
from helpers.command import command
from helpers.small import config
from torch import Tensor, nn

from flowdistill import methods, models
from flowdistill.checks import UserError
from flowdistill.ledger import Ledger
from flowdistill.models.features import pooling_of
from flowdistill.models.published import published
from flowdistill.runner import run
from flowdistill.runner.references import named
from flowdistill.training.weights import load_weights
from flowdistill.types import DataSpec, NetSpec, TapSpec

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
DATA = DataSpec("some", 100, 10, 1, 8, 8)
BACKBONE = """
from types import SimpleNamespace
import torch
from torch import nn

class Backbone(nn.Module):
    def __init__(self, in_chans, gives):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 4, 3, padding=1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(4, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.gives = gives

    def forward(self, images):
        maps = self.late(self.stem(images))
        tokens = maps.flatten(2).transpose(1, 2)
        first = torch.cat([tokens.amax(1, keepdim=True), tokens], 1)
        given = {
            "pooled": maps.mean((2, 3)),
            "map": maps,
            "tokens": tokens,
            "class token": first,
            "pooler": SimpleNamespace(last_hidden_state=first, pooler_output=first[:, 0].tanh()),
            "hidden": SimpleNamespace(last_hidden_state=first, pooler_output=None),
            "list": [maps],
            "table": {"features": maps},
        }
        return given[self.gives]

def make(gives):
    return lambda in_chans: Backbone(in_chans, gives)

"""
NAMES = ("pooled", "map", "tokens", "class token", "pooler", "hidden", "list", "table")
FUNCTIONS = "\n".join(f"{name.replace(' ', '_')} = make({name!r})" for name in NAMES)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("code") / "backbones.py"
    file.write_text(BACKBONE + FUNCTIONS)
    return file


@pytest.mark.parametrize("gives", ["pooled", "map", "tokens", "class_token", "pooler", "hidden"])
def test_what_its_features_are(gives: str, nets: Path) -> None:
    net = models.build(f"{nets}:{gives}", DATA, taps=("stage1",), seed=3).eval()
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        outputs, maps = net(images), net.inner.late(net.inner.stem(images))
    mean, first = maps.mean((2, 3)), maps.amax((2, 3))
    expected = {"pooled": mean, "map": mean, "tokens": mean, "class_token": first, "pooler": first.tanh(), "hidden": first}[gives]
    torch.testing.assert_close(outputs.embedding, expected)
    assert outputs.logits.shape == (5, 0)
    assert (net.spec.classes, net.spec.embedding, net.spec.head) == (0, 12, "")


@pytest.mark.parametrize("gives", ["pooled", "map", "tokens", "pooler"])
def test_whose_published_weights_have_no_class(gives: str, nets: Path) -> None:
    """The library declares 0 classes: what has no width is not taken for as many logits."""
    spec = models.spec(f"{nets}:{gives}", replace(DATA, classes=0))
    assert (spec.classes, spec.embedding) == (0, 12)


@pytest.mark.parametrize(("gives", "what"), [("list", "a list"), ("table", "a dict")])
def test_what_gives_no_features(gives: str, what: str, nets: Path) -> None:
    with pytest.raises(UserError, match=rf"it gives {what}, neither logits \[N, classes\] nor features: "):
        models.spec(f"{nets}:{gives}", DATA)


def test_a_map_that_is_no_map_of_these_images() -> None:
    with pytest.raises(ValueError, match=r"it gives a tensor \(2, 3, 5, 9\), neither"):
        pooling_of(torch.zeros(2, 3, 5, 9), [], nn.Identity(), 8, 8)
    assert pooling_of(SimpleNamespace(pooler_output=torch.zeros(2, 3)), [], nn.Identity(), 8, 8).attribute == "pooler_output"


def test_as_many_features_as_classes_are_no_features(tmp_path: Path) -> None:
    """A classifier of another kind than a linear layer is refused as ever: its answers must not be taken for features."""
    file = tmp_path / "odd.py"
    file.write_text(
        "from torch import nn\n"
        "def odd(classes, channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    with pytest.raises(UserError, match="its 10 logits are not those of a linear layer on a vector"):
        models.spec(f"{file}:odd", DATA)


def specs() -> tuple[NetSpec, NetSpec]:
    taps = tuple(TapSpec(f"stage{number}", 8 * number, 8 // number, 8 // number, f"s{number}") for number in (1, 2))
    return NetSpec("student", taps, 16, 10, "fc"), NetSpec("backbone", taps, 24, 0)


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_every_method_works_or_says_why_not(method: str) -> None:
    """With a pair of two stages: what needs logits is refused and names those that do not; the others are built as with any teacher."""
    if not methods.METHODS[method].uses_teacher or methods.METHODS[method].mutual:
        return
    student, teacher = specs()
    resolved = methods.resolve(method, {}, {})
    with_classifier = NetSpec(teacher.name, teacher.taps, teacher.embedding, 10, "fc")
    data = DataSpec("d", 100, 10, 3, 8, 8)
    needs, reason = None, ""
    try:
        needs = methods.build(resolved, student=student, teacher=with_classifier, data=data).needs
    except ValueError as error:
        reason = str(error)
    if needs is None:
        with pytest.raises(ValueError, match=re.escape(reason)):  # its reason is another than the classifier
            methods.build(resolved, student=student, teacher=teacher, data=data)
        return
    if needs.logits or "head" in needs.context:
        with pytest.raises(ValueError) as refused:
            methods.build(resolved, student=student, teacher=teacher, data=data)
        told = str(refused.value)
        assert told.startswith(
            f"{method}: teacher backbone gives features and has no classifier, and {method} uses its logits; use ab, at, "
        )
        assert not {"kd", "dkd", "dist", "srrl", "base", "dml"} & set(told.partition("; use ")[2].replace(" or ", ", ").split(", "))
    else:
        assert methods.build(resolved, student=student, teacher=teacher, data=data).needs == needs


def test_it_teaches(nets: Path, small_npz: Path, tmp_path: Path) -> None:
    """Features of an image, relations between images, and both together; the accuracy of the teacher is no number."""
    teacher = f"{nets}:pooled"
    weights = models.build(teacher, DATA, seed=5).state_dict()
    torch.save(weights, tmp_path / "backbone.pt")
    named_teacher = f"{teacher}@{tmp_path / 'backbone.pt'}"
    data = ("--dataset", f"npz:{small_npz}", "--epochs", "1", "--set", "train.precision=fp32")
    pair = ("--student", "resnet8", "--teacher", named_teacher)
    said = command(tmp_path, "distill", "--method", "rkd,pkt,fsp", "--set", "options.fsp.adapter=conv1x1", *pair, *data)
    assert said.code == 0, said.err
    assert "no classifier; its accuracy can't be measured here" in said.err
    with closing(Ledger(tmp_path / "runs")) as ledger:
        runs = ledger.runs()
        assert [(one.status, one.teacher_accuracy) for one in runs] == [("finished", None)] * 3
        terms = {one.method: ledger.epochs(one.no)[0].terms[one.method] for one in runs}
    assert all(0 < value < float("inf") for value in terms.values())
    refused = command(tmp_path, "distill", "--method", "kd", *pair, *data)
    assert refused.code == 2
    assert "gives features and has no classifier, and kd uses its logits; use " in refused.err
    assert len(refused.err.splitlines()) == 1


def test_it_is_no_student(nets: Path, small_npz: Path, tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger, pytest.raises(UserError) as error:
        run([config(small_npz, student=f"{nets}:map")], ledger, CPU)
    assert str(error.value) == f"student {nets}:map: it gives features and has no classifier; give one that gives 10 logits"


def test_the_value_that_a_method_sees(nets: Path) -> None:
    """pkt between a student and a backbone is pkt between their features."""
    student = models.build("resnet8", DATA, seed=1).eval()
    teacher = models.build(f"{nets}:class_token", DATA, seed=2).eval()
    pkt = methods.build(methods.resolve("pkt", {}, {}), student=student.spec, teacher=teacher.spec, data=DATA)
    images = torch.rand(6, 1, 8, 8)

    def similarities(features: Tensor) -> Tensor:
        unit = features / (features.norm(dim=1, keepdim=True) + 1e-7)
        matrix = (unit @ unit.T + 1) / 2
        return matrix / matrix.sum(1, keepdim=True)

    with torch.no_grad():
        ours, theirs = student(images), teacher(images)
        s, t = similarities(ours.embedding), similarities(theirs.embedding)
        expected = (t * ((t + 1e-7) / (s + 1e-7)).log()).mean()
        torch.testing.assert_close(pkt(ours, theirs)["pkt"], expected, rtol=1e-4, atol=1e-7)


@pytest.fixture
def backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A vision transformer of the hub that has no classifier, as DINOv2 has none."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    published.cache_clear()
    net = hub.network("test_vit", num_classes=0, img_size=32)
    made_for = {"input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "num_classes": 0}
    content = hub.tiny_config(architecture="test_vit", num_classes=0, pretrained_cfg=made_for)
    hub.lay(tmp_path / "hub", "me/dino", {"config.json": content, "model.safetensors": hub.weights(net)})
    return net


def test_a_published_backbone_teaches_and_is_fine_tuned(backbone: nn.Module, small_npz: Path, tmp_path: Path) -> None:
    reference = "hf-hub:me/dino"
    net = named(reference).build(DATA).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(images).embedding, backbone(images), rtol=1e-4, atol=1e-4)
    data = ("--dataset", f"npz:{small_npz}", "--epochs", "1", "--set", "train.precision=fp32")
    said = command(tmp_path, "distill", "--method", "rkd", "--student", "resnet8", "--teacher", reference, *data)
    assert said.code == 0, said.err
    said = command(tmp_path, "train", "--model", reference, *data)
    assert said.code == 0, said.err
    assert (
        f"student timm:test_vit begins from {reference}: published weights, licence not declared, its classifier fresh (no classifier)"
        in said.err
    )
    weights, about = load_weights(tmp_path / "runs" / "2" / "student.safetensors")
    assert (about["classes"], len(weights["head.bias"]), about["front"]["input"]) == (10, 10, [3, 32, 32])
