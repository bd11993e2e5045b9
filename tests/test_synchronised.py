"""Batch normalisation by all ranks: each rank gets what torch computes of the whole batch, and nothing else is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.threads import by_ranks
from torch import Tensor, nn

from flowdistill import ranks
from flowdistill.config import TrainConfig, validate
from flowdistill.ranks import Ranks
from flowdistill.training.engine_choice import choose
from flowdistill.training.synchronised import _Together, needed, normalises_apart

WORLD, ROWS, CHANNELS = 3, 4, 5
SYNCHRONISED = TrainConfig(batch_norm="synchronised")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) * 3 + 7


LAYERS = {
    "rows": (nn.BatchNorm1d(CHANNELS), ()),
    "sequences": (nn.BatchNorm1d(CHANNELS), (6,)),
    "images": (nn.BatchNorm2d(CHANNELS), (3, 2)),
    "volumes": (nn.BatchNorm3d(CHANNELS), (2, 3, 2)),
    "no weights": (nn.BatchNorm2d(CHANNELS, affine=False), (3, 2)),
    "no statistics": (nn.BatchNorm2d(CHANNELS, track_running_stats=False), (3, 2)),
    "all steps count alike": (nn.BatchNorm2d(CHANNELS, momentum=None), (3, 2)),
    "another eps": (nn.BatchNorm2d(CHANNELS, eps=0.5, momentum=0.7), (3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_ranks_normalise_as_one_process_does(name: str) -> None:
    """Two steps of another factor for every value: result, gradients, running statistics and counters."""
    made, size = LAYERS[name]
    layer = copy.deepcopy(made).double()
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), (drawn(CHANNELS), drawn(1, CHANNELS)[0]), strict=False):
            parameter.copy_(value)
    x, factors = drawn(WORLD * ROWS, CHANNELS, *size), drawn(2, WORLD * ROWS, CHANNELS, *size)

    def taken(normalise: nn.Module, images: Tensor, factor: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Each image's results and gradients, then the gradients of the weights of both steps."""
        images, of_images, of_weights = images.clone().requires_grad_(), [], []
        for step in range(2):
            y = normalise(images * (step + 1))
            first, *others = torch.autograd.grad((y * factor[step]).sum() / len(images), [images, *normalise.parameters()])
            of_images += [y.detach(), first]
            of_weights += others
        return of_images, of_weights

    def of_rank(rank: Ranks) -> Any:
        own, mine = rank.own(0, len(x)), copy.deepcopy(layer)
        with _Together(rank):
            return *taken(mine, x[own], factors[:, own]), dict(mine.named_buffers())

    found = by_ranks(of_rank, WORLD)
    of_images, of_weights = taken(layer, x, factors)
    for number, expected in enumerate(of_images):
        # A rank passes on the gradient of the sum of the ranks' losses, whose means travel as float32.
        scale, rounding = (WORLD, 1e-6) if number % 2 else (1, 1e-10)
        close(torch.cat([images[number] for images, _, _ in found]), expected * scale, rounding)
    for number, expected in enumerate(of_weights):
        close(torch.stack([weights[number] for _, weights, _ in found]).mean(0), expected)
    for _, _, buffers in found:
        assert buffers.keys() == dict(layer.named_buffers()).keys()
        for name_, expected in layer.named_buffers():
            close(buffers[name_], expected)


def close(found: Tensor, expected: Tensor, rounding: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def test_sums_of_half_precision_are_not_in_half_precision() -> None:
    x = drawn(WORLD * ROWS, CHANNELS, 16, 16).bfloat16()
    layer = nn.BatchNorm2d(CHANNELS)
    expected = copy.deepcopy(layer)

    def of_rank(rank: Ranks) -> Any:
        mine = copy.deepcopy(layer)
        with _Together(rank):
            return mine(x[rank.own(0, len(x))]), mine.running_mean, mine.running_var

    found = by_ranks(of_rank, WORLD)
    assert {y.dtype for y, _, _ in found} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat([y for y, _, _ in found]), expected(x.float()).bfloat16())
    for _, mean, variance in found:
        torch.testing.assert_close(mean, expected.running_mean)
        torch.testing.assert_close(variance, expected.running_var)


def test_a_frozen_normalisation_asks_nobody() -> None:
    layer, x = nn.BatchNorm2d(CHANNELS).eval(), drawn(ROWS, CHANNELS, 2, 2).float()
    with _Together(Ranks(0, 2)):  # there is no other, and nobody is asked
        assert torch.equal(layer(x), F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias))


def test_a_library_s_own_layers_are_synchronised() -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    x, layer = drawn(WORLD * ROWS, CHANNELS, 2, 2), norm_act.BatchNormAct2d(CHANNELS).double()
    expected = copy.deepcopy(layer)(x)

    def of_rank(rank: Ranks) -> Any:
        mine = copy.deepcopy(layer)
        with _Together(rank):
            return mine(x[rank.own(0, len(x))])

    close(torch.cat(by_ranks(of_rank, WORLD)), expected)


def test_it_is_for_several_ranks_that_want_it() -> None:
    assert needed(SYNCHRONISED, Ranks(0, 2))
    assert not needed(SYNCHRONISED, Ranks(0, 2, apart=True))
    assert not needed(SYNCHRONISED, ranks.ALONE)
    assert not needed(TrainConfig(), Ranks(0, 2))
    assert validate({"train": {"batch_norm": "local"}}) == validate({})
    assert "batch_norm" not in validate({}).train.model_dump()


class Kept(nn.Module):
    """A normalisation of somebody's own, with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(1))


@pytest.mark.parametrize(
    ("part", "local", "together"),
    [
        (nn.BatchNorm2d(1), True, False),
        (nn.BatchNorm1d(1).eval(), False, False),
        (nn.BatchNorm3d(1, track_running_stats=False).eval(), True, False),
        (nn.GroupNorm(1, 1), False, False),
        (nn.LayerNorm(1), False, False),
        (nn.InstanceNorm2d(1, track_running_stats=True), False, False),
        (Kept(), True, True),
        (Kept().eval(), False, False),
    ],
)
def test_what_normalises_a_rank_s_own_images_is_known(part: nn.Module, local: bool, together: bool) -> None:
    net = nn.Sequential(nn.Sequential(part))
    net.training = True
    assert (normalises_apart(net, TrainConfig()), normalises_apart(net, SYNCHRONISED)) == (local, together)


def test_it_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_current", Ranks(0, 2))
    for wanted, why in (("compiled", "compiled was asked for, but"), ("auto", "not compiled, for")):
        engine = choose(wanted, torch.device("cpu"), "fp32", pixels=1e12, synchronised=True)
        assert (engine.name, engine.why) == ("eager", f"{why} synchronised batch normalisations are not compiled")
    monkeypatch.setattr(ranks, "_current", ranks.ALONE)
    assert choose("eager", torch.device("cpu"), "fp32", pixels=1.0, synchronised=True).why == "asked for"
