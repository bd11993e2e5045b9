"""Rates that fall from the classifier to the images (train.layer_decay): the order of a network's layers, and what a step does with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.optim
import torch
from helpers.cohorts import Taped, a_cohort, train_with, weights_of
from helpers.small import config
from torch import Tensor, nn

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.models.foreign import adopt
from flowdistill.runner import run
from flowdistill.runner.watcher import Watcher
from flowdistill.training.engine import EagerEngine
from flowdistill.training.optim import rate_factors
from flowdistill.training.student import Student
from flowdistill.types import DataSpec

CPU = torch.device("cpu")
DECAY = 0.75
SMALL, MIDDLE = DataSpec("images", 100, 10, 3, 32, 32), DataSpec("images", 100, 10, 3, 64, 64)
OWN = [*models.MODELS, "reused(resnet8,resnet20,2)"]


def factors(net: models.Network) -> dict[str, float]:
    by_parameter = rate_factors(net, DECAY)
    return {name: by_parameter[parameter] for name, parameter in net.body.named_parameters()}


def timm_s(net: nn.Module) -> dict[str, float]:
    """The scales of ``timm.optim.param_groups_layer_decay``."""
    groups = timm.optim.param_groups_layer_decay(net, layer_decay=DECAY)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    return {name: scale[id(parameter)] for name, parameter in net.named_parameters()}


# The order of layers


@pytest.mark.parametrize(("name", "data"), [("vit_tiny_patch16_224", SMALL), ("resnet18", SMALL), ("convnext_atto", MIDDLE)])
def test_a_network_of_timm_has_timm_s_own_scales(name: str, data: DataSpec) -> None:
    net = models.build(f"timm:{name}", data)
    expected = timm_s(net.body)
    assert factors(net) == expected
    assert (len(set(expected.values())), max(expected.values())) == ({"v": 14, "r": 10, "c": 14}[name[0]], 1)
    assert expected[f"{net.spec.head}.weight"] == 1


def test_a_resnet_of_torchvision_has_the_scales_of_timm_s_at_every_size() -> None:
    """At 32x32 its last stage is one position, which is no tap; its names are timm's."""
    expected = timm_s(timm.create_model("resnet18", num_classes=10))
    for data in (SMALL, MIDDLE):
        assert factors(models.build("torchvision:resnet18", data)) == expected


@pytest.mark.parametrize("depth", [8, 20, 32])
def test_a_resnet_has_a_layer_for_stem_each_block_and_classifier(depth: int) -> None:
    blocks = (depth - 2) // 6
    scales = DECAY ** np.arange(3 * blocks + 1, -1, -1, dtype=np.float64)

    def expected(name: str) -> float:
        if block := re.match(r"layer(\d)\.(\d+)\.", name):
            return float(scales[1 + (int(block[1]) - 1) * blocks + int(block[2])])
        return float(scales[-1 if name.startswith("fc.") else 0])

    found = factors(models.build(f"resnet{depth}", SMALL))
    assert found == pytest.approx({name: expected(name) for name in found}, rel=1e-12)
    assert {name.partition(".")[0] for name in found} == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


@pytest.mark.parametrize("name", OWN)
def test_layers_of_our_networks_are_numbered_in_the_order_in_which_they_are_called(name: str) -> None:
    """And without gaps, the classifier in the last."""
    with torch.device("meta"):
        net = models.build(name, SMALL).eval()
    numbers, called = net.layer_numbers(), []
    for path, module in net.named_modules():
        if next(module.children(), None) is None and next(module.parameters(), None) is not None:
            parameter = next(f"{path}.{inner}" for inner, _ in module.named_parameters())
            module.register_forward_hook(lambda *_, parameter=parameter: called.append(numbers[parameter]))
    net(torch.empty(2, 3, 32, 32, device="meta"))
    assert called == sorted(called)
    assert sorted(set(numbers.values())) == [*range(max(called) + 1)]
    assert numbers.keys() == {parameter for parameter, _ in net.named_parameters()}
    assert numbers[f"{net.spec.head}.weight"] == max(called) >= 4


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Backwards(nn.Module):
    """Its modules stand in another order than they are called in; it has a parameter of its own, and a stage of it ends outside of
    the row of blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)
        self.rows = nn.ModuleList([block(4, 16, 2), block(4, 4, 1), block(4, 4, 1)])
        self.between = nn.Conv2d(4, 4, 1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.rows[1](torch.relu(self.stem(images + self.shift)))
        x = self.rows[0](self.between(self.rows[2](x)))
        return self.fc(x.mean((2, 3)))


def test_a_network_of_one_s_own_is_ordered_by_its_calls() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.build(adopt(Backwards(), "backwards"), SMALL)
    layers = {name.removesuffix(".weight"): number for name, number in net.layer_numbers().items() if not name.endswith("bias")}
    assert layers == {
        **dict.fromkeys(("shift", "stem"), 0),
        **dict.fromkeys(("rows.1.0", "rows.1.1"), 1),
        **dict.fromkeys(("rows.2.0", "rows.2.1"), 2),
        "between": 3,
        **dict.fromkeys(("rows.0.0", "rows.0.1"), 4),
        "fc": 5,
    }


def test_a_network_without_order_is_refused_before_anything_is_trained(data: ImageData, small_npz: Path, tmp_path: Path) -> None:
    flat = adopt(nn.Sequential(nn.Flatten(), nn.Linear(data.spec.channels * 64, 32), nn.ReLU(), nn.Linear(32, data.classes)), "flat")
    ledger = Ledger(tmp_path / "runs", create=True)
    with pytest.raises(UserError) as error:
        run([config(small_npz, student=flat, method="base", train={"layer_decay": 0.75})], ledger, CPU)
    assert str(error.value) == (
        f"train.layer_decay=0.75: nothing says in which order the layers of {flat} stand, for it has neither stages nor timm's "
        f"group_matcher; leave layer_decay out, or choose another student"
    )
    assert not ledger.runs()


def test_a_group_matcher_that_fails_is_said_in_one_line() -> None:
    class Odd(Backwards):
        def group_matcher(self, coarse: bool) -> dict[str, str]:
            return {"stem": "(" if not coarse else "stem"}

    name = adopt(Odd(), "odd")
    with pytest.raises(UserError, match=rf"^{name}: its group_matcher does not group its parameters as timm's do: .*unterminated") as error:
        models.build(name, SMALL).layer_numbers()
    assert "\n" not in str(error.value)


# What a step does


def begun(data: ImageData, small_npz: Path, method: str, **train: Any) -> Student:
    _, (student,) = a_cohort(data, [config(small_npz, method=method, teacher="-", train=train)])
    student.begin_phase(0)
    return student


@pytest.mark.parametrize(
    "train",
    [
        {"momentum": 0.0, "weight_decay": 0.0},
        {"momentum": 0.0, "weight_decay": 0.0, "decay_norm_and_bias": False},
        {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.5},
        {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": False},
        {"optimizer": "rmsprop", "lr": 0.1, "weight_decay": 0.0},
    ],
)
def test_each_layer_moves_by_its_part_of_the_rate(data: ImageData, small_npz: Path, train: dict[str, Any]) -> None:
    """Against the step without it, decay of the weights included; adapters move by all of it."""
    decayed, plain = (begun(data, small_npz, "vid", **train, layer_decay=decay) for decay in (DECAY, 1.0))

    def moved(student: Student) -> Mapping[str, Tensor]:
        named = {**dict(student.net.named_parameters()), **{f"method.{n}": p for n, p in student.method.named_parameters()}}
        taken = {id(p) for p in student.trainable_parameters()}
        before = {name: value.detach().clone() for name, value in named.items() if id(value) in taken}
        for name in before:
            named[name].grad = torch.full_like(named[name], 0.5)
        student.move(torch.tensor(0.1))
        return {name: named[name].detach() - old for name, old in before.items()}

    all_of_it, part = moved(plain), moved(decayed)
    expected = factors(decayed.net)
    assert all_of_it.keys() == part.keys() > expected.keys()
    for name, whole in all_of_it.items():
        torch.testing.assert_close(part[name], whole * expected.get(name, 1.0), rtol=1e-4, atol=1e-7)
    assert sorted(set(expected.values())) == pytest.approx([DECAY**power for power in (4, 3, 2, 1, 0)])


@pytest.mark.parametrize("train", [{}, {"optimizer": "adamw", "lr": 0.01, "decay_norm_and_bias": False}])
def test_a_graph_s_step_is_the_eager_one_bit_for_bit(data: ImageData, small_npz: Path, train: dict[str, Any]) -> None:
    """In a cohort of several students, whose methods and adapters differ; and the factors do count."""
    kinds = [(method, seed) for method in ("base", "vid") for seed in (0, 1)]
    runs = [config(small_npz, method=method, teacher="-", seed=seed, train={**train, "layer_decay": 0.5}) for method, seed in kinds]
    (eager, students), (taped, others) = (a_cohort(data, runs) for _ in range(2))
    train_with(eager, EagerEngine("fp32", ""))
    train_with(taped, Taped("fp32", ""))
    assert [weights_of(student) for student in students] == [weights_of(student) for student in others]
    alone, (single,) = a_cohort(data, [config(small_npz, method="base", teacher="-", train=train)])
    train_with(alone, EagerEngine("fp32", ""))
    assert weights_of(single) != weights_of(students[0])


def test_the_rates_of_the_layers_are_said(small_npz: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Lines(Watcher):
        def say(self, line: str) -> None:
            said.append(line)

    run(
        [config(small_npz, method="base", train={"layer_decay": 0.5, "epochs": 1})],
        Ledger(tmp_path / "runs", create=True),
        CPU,
        watcher=Lines(),
    )
    rates = "conv1.weight 0.0625, layer1.0.conv1.weight 0.125, layer2.0.conv1.weight 0.25, layer3.0.conv1.weight 0.5, fc.weight 1"
    assert f"student resnet8: 5 layers, each with its part of the rate: {rates}; adapters have all of it" in said
