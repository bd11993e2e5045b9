"""What is launched once for all layers gives the numbers that each layer alone would give, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.cohorts import a_cohort, grid, train_with, weights_of
from torch.utils._python_dispatch import TorchDispatchMode

from flowdistill import models
from flowdistill.data.sources import read_npz
from flowdistill.models import MODELS, ImageNetwork
from flowdistill.training.at_once import cast_at_once, counted_at_once, set_gradients
from flowdistill.training.engine import EagerEngine
from flowdistill.types import DataSpec

SMALL = DataSpec("images", 100, 10, 1, 16, 16)
IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_the_same_bit_for_bit(small_npz: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_npz(small_npz)
    cohort, students = a_cohort(data, grid(small_npz), precision)
    terms = train_with(cohort, EagerEngine(precision, ""))
    monkeypatch.setattr(ImageNetwork, "each_once", False)
    layer_by_layer, plain_students = a_cohort(data, grid(small_npz), precision)
    expected = train_with(layer_by_layer, EagerEngine(precision, ""))
    for student, plain_student in zip(students, plain_students, strict=True):
        assert weights_of(student) == weights_of(plain_student)
        assert [epoch[student] for epoch in terms] == [epoch[plain_student] for epoch in expected]


class Casts(TorchDispatchMode):
    """How many operations change a type."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten._to_copy
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_and_put_back() -> None:
    net = models.build("resnet8", SMALL)
    with torch.no_grad(), Casts() as alone, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = net(IMAGES).logits
    weights = dict(net.named_parameters())
    cast = {value for layer in net.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) for value in layer.parameters()}
    with cast_at_once([net], "bf16") as casts:
        assert set(casts) == cast
        assert all(value.dtype == torch.bfloat16 and value.requires_grad for value in casts.values())
        with torch.no_grad(), Casts() as together, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found = net(IMAGES).logits
    assert torch.equal(found, expected)
    assert alone.count - together.count == len(casts)
    assert all(value is weights[name] for name, value in net.named_parameters())
    with cast_at_once([net], "fp32") as none:
        assert none == {}


def test_an_error_puts_weights_and_counters_back() -> None:
    net = models.build("resnet8", SMALL)
    before = dict(net.state_dict(keep_vars=True))
    with pytest.raises(ValueError, match=r"^x$"), counted_at_once([net]), cast_at_once([net], "bf16"):
        raise ValueError("x")
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_gradients_have_type_and_layout_of_their_weights() -> None:
    weights = [torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)) for _ in range(3)]
    values = torch.arange(48.0).reshape(4, 3, 2, 2)
    set_gradients(weights, [values, values.bfloat16(), None])
    for weight in weights[:2]:
        assert torch.equal(weight.grad, values)
        assert (weight.grad.dtype, weight.grad.stride()) == (torch.float32, weight.stride())
    assert weights[2].grad is None


@pytest.mark.parametrize("name", sorted(MODELS))
def test_networks_marked_each_once_run_each_layer_once(name: str) -> None:
    """So that one operation may count the batches of all their normalisations."""
    spec = DataSpec("images", 100, 10, 3, 32, 32)
    with torch.device("meta"):
        net = models.factory(name).network(spec)
    calls: dict[torch.nn.Module, int] = {}
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            calls[module] = 0
            module.register_forward_hook(lambda module, *_: calls.__setitem__(module, calls[module] + 1))
    net.features(torch.empty(2, 3, 32, 32, device="meta"))
    assert net.each_once
    assert set(calls.values()) == {1}


def test_batches_are_counted_as_each_normalisation_would() -> None:
    spec = DataSpec("images", 100, 10, 1, 16, 16)
    net, plain = (models.build("resnet8", spec) for _ in range(2))
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    frozen = next(module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))
    for one in (net, plain):
        next(module for module in one.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    for _ in range(3):
        with counted_at_once([net]):
            found = net(images)
        expected = plain(images)
    assert torch.equal(found.logits, expected.logits)
    assert {name: value.tolist() for name, value in net.state_dict().items() if "tracked" in name} == {
        name: value.tolist() for name, value in plain.state_dict().items() if "tracked" in name
    }
    assert int(frozen.num_batches_tracked) == 0
