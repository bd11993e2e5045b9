"""What methods are told before training is what the teacher and the data are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.cohorts import CPU
from helpers.method_cases import make, method_context
from helpers.pairs import PAIRS
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.data.batches import DeviceData
from flowdistill.data.dataset import ImageData
from flowdistill.methods import METHODS, Needs
from flowdistill.methods.nd import nd_loss
from flowdistill.methods.ofd import margins
from flowdistill.training.method_context import gather
from flowdistill.types import MethodContext, NetSpec

SPEC = NetSpec("net", (), 4, 4)
ALL = Needs(teacher=frozenset({"stage1.pre", "stage2"}), context=frozenset({"head", "norms", "class_means", "labels"}))


def a_teacher(on_device: DeviceData) -> models.Network:
    net = models.build("resnet8", on_device.spec, seed=3)
    with torch.no_grad():
        for _ in range(3):
            net(on_device.normalise(on_device.test.images))
    return net.eval()


@pytest.mark.parametrize("split", ["full", "holdout"])
def test_class_means_are_those_of_the_images_as_they_are(data: ImageData, split: str) -> None:
    on_device = DeviceData(data, split, CPU)
    teacher = a_teacher(on_device)
    found = gather(ALL, teacher, on_device, "fp32")
    assert found.class_means is not None
    assert found.labels is on_device.labels
    plain = torch.from_numpy(data.x_train)
    if split == "holdout":
        held_out = {image.tobytes() for image in on_device.epoch_images.images.numpy()}
        plain = torch.stack([image for image in plain if image.numpy().tobytes() not in held_out])
    for k in range(data.classes):
        with torch.no_grad():
            mean = teacher(on_device.normalise(plain[on_device.labels == k])).embedding.double().mean(0)
        np.testing.assert_allclose(found.class_means[k].numpy(), mean.numpy(), rtol=1e-4, atol=1e-6)


def test_a_teacher_of_other_classes_has_its_own_head_and_the_means_of_the_datas_classes(data: ImageData) -> None:
    on_device = DeviceData(data, "full", CPU)
    teacher = models.build("resnet8", replace(on_device.spec, classes=3), seed=3).eval()
    found = gather(ALL, teacher, on_device, "fp32")
    assert found.head is not None
    assert found.class_means is not None
    assert found.head[0].shape == (3, 64)
    assert found.class_means.shape == (data.classes, 64) == (10, 64)


def test_head_and_norms_are_the_teachers_own(data: ImageData) -> None:
    on_device = DeviceData(data, "full", CPU)
    teacher = a_teacher(on_device)
    found = gather(ALL, teacher, on_device, "fp32")
    norm = teacher.get_submodule("layer1.0.bn2")
    assert found.head is not None
    assert [torch.equal(a, b) for a, b in zip(found.head, teacher.get_submodule("fc").parameters(), strict=True)] == [True, True]
    assert found.norms.keys() == {"stage1.pre"}
    assert [torch.equal(a, b) for a, b in zip(found.norms["stage1.pre"], norm.parameters(), strict=True)] == [True, True]


def test_a_head_without_a_bias_and_one_whose_weight_is_computed(data: ImageData) -> None:
    on_device = DeviceData(data, "full", CPU)
    teacher, only = a_teacher(on_device), Needs(context=frozenset({"head"}))
    teacher.add_module("fc", weight_norm(nn.Linear(64, 10, bias=False)).requires_grad_(False))
    with torch.no_grad():
        teacher.get_submodule("fc").parametrizations.weight.original0.mul_(2)
    found = gather(only, teacher, on_device, "fp32")
    assert found.head is not None
    embedding = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nn.functional.linear(embedding, *found.head), teacher.get_submodule("fc")(embedding))


def test_what_is_not_needed_is_not_gathered(data: ImageData) -> None:
    on_device = DeviceData(data, "full", CPU)
    found = gather(Needs(), a_teacher(on_device), on_device, "fp32")
    assert (found.head, found.norms, found.class_means, found.labels) == (None, {}, None, None)
    assert gather(ALL._replace(context=frozenset({"head"})), a_teacher(on_device), on_device, "fp32").norms == {}
    assert gather(ALL, None, on_device, "fp32") == MethodContext(labels=on_device.labels)


def test_a_classifier_of_several_layers_is_refused(data: ImageData) -> None:
    on_device = DeviceData(data, "full", CPU)
    teacher = a_teacher(on_device)
    teacher.add_module("fc", nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4)))
    with pytest.raises(UserError, match=r"^the classifier of resnet8 is a Sequential, not one linear layer; choose another teacher$"):
        gather(ALL, teacher, on_device, "fp32")


def test_a_method_that_was_not_told_says_so() -> None:
    method = METHODS["kd"]({}, student=SPEC, teacher=SPEC)
    method.needs = ALL
    with pytest.raises(
        RuntimeError, match=r"^kd was not told of the class_means, head, labels, norms: call setup\(MethodContext\(\.\.\.\)\) first$"
    ):
        method.held("head_weight")
    weight = torch.ones(2, requires_grad=True)
    method.hold(head_weight=weight)
    assert torch.equal(method.held("head_weight"), weight)
    assert not method.held("head_weight").requires_grad
    assert [name for name, _ in method.named_buffers()] == ["head_weight"]


TOLD: list[tuple[str, str, Callable[[MethodContext], Tensor]]] = [
    ("srrl", "head_weight", lambda method_context: method_context.head[0]),
    ("srrl", "head_bias", lambda method_context: method_context.head[1]),
    ("nd", "class_means", lambda method_context: method_context.class_means),
]


@pytest.mark.parametrize(("name", "kept", "told"), TOLD)
def test_what_is_told_is_kept_and_not_trained(name: str, kept: str, told: Callable[[MethodContext], Tensor]) -> None:
    pair = PAIRS["wide embedding"]
    method = make(name, {}, pair)
    assert torch.equal(method.held(kept), told(method_context(pair[1])))
    assert kept not in dict(method.named_parameters())
    assert kept in method.state_dict()


def mean_of_negatives(weight: float, bias: float) -> float:
    """The mean of x below 0, x normal with mean bias and deviation |weight|, as a sum over a fine grid."""
    deviation = abs(weight)
    top = min(0.0, bias + 10 * deviation)
    points = np.linspace(top - 12 * deviation, top, 400_001)
    density = np.exp(-(((points - bias) / deviation) ** 2) / 2)
    return float((points * density).sum() / density.sum())


def test_ofd_keeps_the_mean_negative_response_of_every_stage() -> None:
    pair = PAIRS["wide"]
    method, told = make("ofd", {}, pair), method_context(pair[1]).norms
    for stage in ("stage1", "stage2", "stage3"):
        found = method.held(f"margin_{stage}")
        for margin, weight, bias in zip(found.tolist(), *(x.tolist() for x in told[f"{stage}.pre"]), strict=True):
            rare = math.erfc(bias / abs(weight) / math.sqrt(2)) / 2 <= 1e-3
            assert margin == pytest.approx(-3 * abs(weight) if rare else mean_of_negatives(weight, bias), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("weight", "bias", "margin"),
    [(0, -2, -2), (0, 0, 0), (0, 2, 0), (1, 0, -math.sqrt(2 / math.pi)), (0.5, 40, -1.5), (-0.5, 40, -1.5), (1e-30, -40, -40)],
)
def test_a_margin_exists_for_every_normalisation(weight: float, bias: float, margin: float, dtype: torch.dtype) -> None:
    found = margins(torch.tensor([weight], dtype=dtype), torch.tensor([bias], dtype=dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(margin, rel=1e-6, abs=1e-12)


def test_a_class_without_images_pulls_nowhere() -> None:
    """Its mean is 0, which has no direction: the loss is 1, and its gradient 0."""
    embedding = torch.ones(1, 4, requires_grad=True)
    loss = nd_loss(embedding, torch.ones(1, 4), torch.zeros(1, 4))
    assert loss.item() == 1
    assert torch.autograd.grad(loss, embedding)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("fc.weight", "classifier"),
        ("layer1.0.bn2.weight", "batch normalisation before the ReLU of stage1"),
        ("layer3.0.conv2.weight", "mean embedding of a class"),
    ],
)
def test_what_a_teacher_tells_before_training_is_finite(data: ImageData, broken: str, what: str) -> None:
    """A margin of NaN is on neither side of a map: ofd and ab would learn from nothing without a word."""
    on_device = DeviceData(data, "full", CPU)
    teacher = a_teacher(on_device)
    needs = Needs(teacher=frozenset({"stage1.pre"}), context=frozenset({"class_means" if "mean" in what else "head", "norms"}))
    teacher.get_parameter(broken).data.view(-1)[3] = torch.nan
    with pytest.raises(UserError) as caught:
        gather(needs, teacher, on_device, "fp32")
    assert str(caught.value) == f"teacher resnet8: its {what} is not finite; mend the teacher, or choose another"
