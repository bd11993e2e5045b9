"""fsp: numbers by hand, presets, adapters, half precision, and its refusals. Its formula is checked in test_methods.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowdistill import UserError, fsp_loss, fsp_matrix
from flowdistill.methods import Phase, ResolvedMethod, get
from flowdistill.methods import resolve as resolve_method
from flowdistill.methods.fsp import FSPOptions, match_sizes
from flowdistill.types import NetSpec, Outputs, TapSpec


def resolve(**options: Any) -> ResolvedMethod:
    return resolve_method("fsp", {"fsp": options}, {})


def variant(**options: Any) -> str:
    return resolve(**options).variant


def network(name: str = "net", channels: tuple[int, int, int, int] = (2, 2, 3, 4)) -> NetSpec:
    taps = [TapSpec("stem", channels[0], 4, 4, "stem")]
    for number, (width, size) in enumerate(zip(channels[1:], (4, 2, 1), strict=True), 1):
        taps.append(TapSpec(f"stage{number}.first", width, size, size, f"layer{number}.0"))
        taps.append(TapSpec(f"stage{number}", width, size, size, f"layer{number}.1"))
    return NetSpec(name, tuple(taps), channels[-1], 3)


def outputs(spec: NetSpec, seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = {tap.name: torch.rand(2, tap.channels, tap.height, tap.width, generator=generator) for tap in spec.taps}
    return Outputs(torch.zeros(2, 3), torch.zeros(2, spec.embedding), maps)


def maps(seed: int, *channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, c, 4, 4, generator=generator, dtype=torch.float64) for c in channels]


def test_matrix_by_hand() -> None:
    first = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    second = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 4.0], [0.0, 0.0]]]])
    # (1*2 + 4*2) / 4 = 2.5, (1+2+3+4) / 4 = 2.5, 2*4 / 4 = 2;  0, (1+1) / 4 = 0.5, 1*4 / 4 = 1
    assert torch.equal(fsp_matrix(first, second), torch.tensor([[[2.5, 2.5, 2.0], [0.0, 0.5, 1.0]]]))


def test_loss_by_hand() -> None:
    ones = torch.ones(1, 1, 2, 2)
    student, teacher = [(ones, 3 * ones), (ones, ones)], [(ones, ones), (ones, 2 * ones)]
    # one 1x1 matrix a pair: (1 - 3)^2 = 4 and (2 - 1)^2 = 1
    assert fsp_loss(student, teacher, reduction="sum").item() == 5
    assert fsp_loss(student, teacher, reduction="mean").item() == 2.5


def test_matrix_has_a_row_for_each_first_and_a_column_for_each_second_channel() -> None:
    assert fsp_matrix(torch.rand(5, 3, 4, 4), torch.rand(5, 7, 4, 4)).shape == (5, 3, 7)


def test_matrix_refuses_maps_of_two_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 3, 2, 2\); match_sizes"):
        fsp_matrix(torch.rand(1, 2, 4, 4), torch.rand(1, 3, 2, 2))


def test_larger_map_is_pooled_to_the_smaller() -> None:
    large, small = torch.arange(16.0).reshape(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)
    assert torch.equal(match_sizes(large, small, "max")[0], torch.tensor([[[[5.0, 7.0], [13.0, 15.0]]]]))
    assert torch.equal(match_sizes(small, large, "avg")[1], torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))


def test_sum_is_mean_times_the_entries_of_the_matrix() -> None:
    student, teacher = tuple(maps(1, 5, 7)), tuple(maps(2, 5, 7))
    mean = fsp_loss([student], [teacher], reduction="mean").item()
    assert fsp_loss([student], [teacher], reduction="sum").item() == pytest.approx(5 * 7 * mean, rel=1e-12)


def test_pairs_are_averaged_under_mean_and_added_under_sum() -> None:
    student, teacher = maps(1, 5, 7, 2), maps(2, 5, 7, 2)
    ours, theirs = ([(m[0], m[1]), (m[1], m[2])] for m in (student, teacher))
    for reduction, share in (("mean", 0.5), ("sum", 1.0)):
        single = [fsp_loss([a], [b], reduction=reduction).item() for a, b in zip(ours, theirs, strict=True)]
        assert fsp_loss(ours, theirs, reduction=reduction).item() == pytest.approx(share * sum(single), rel=1e-12)


@pytest.mark.parametrize(("channels", "batch"), [(1, 3), (3, 1)], ids=["channels", "batch"])
def test_loss_refuses_a_teacher_that_would_broadcast(channels: int, batch: int) -> None:
    student = (torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4))
    with pytest.raises((ValueError, RuntimeError)):
        fsp_loss([student], [(torch.rand(batch, channels, 4, 4), torch.rand(batch, 3, 4, 4))])


def test_loss_refuses_lists_of_two_lengths() -> None:
    pair = (torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4))
    with pytest.raises(ValueError):
        fsp_loss([pair, pair], [pair])


JOINT = (Phase("joint"),)
PRESETS: list[tuple[str, dict[str, str], float, tuple[Phase, ...]]] = [
    ("ours", {"pairing": "cross", "pool": "max", "reduction": "mean", "schedule": "joint"}, 1.0, JOINT),
    ("log", {"pairing": "cross", "pool": "avg", "reduction": "mean", "schedule": "joint"}, 1 / 3, JOINT),
    (
        "kd-zoo",
        {"pairing": "cross", "pool": "avg", "reduction": "mean", "schedule": "two-stage"},
        1.0,
        (Phase("fsp", 50, 1e-2, (0.6, 0.8), frozenset({"fsp"}), head=False), Phase("task", without=frozenset({"fsp"}))),
    ),
    (
        "paper",
        {"pairing": "section", "pool": "max", "reduction": "sum", "schedule": "two-stage"},
        1e-3,
        (Phase("fsp", 54, 1e-3, (11 / 21, 16 / 21), frozenset({"fsp"}), head=False), Phase("task", without=frozenset({"fsp"}))),
    ),
]


@pytest.mark.parametrize(("preset", "options", "weight", "phases"), PRESETS, ids=[p[0] for p in PRESETS])
def test_a_preset_sets_options_weight_and_phases(preset: str, options: dict[str, str], weight: float, phases: tuple[Phase, ...]) -> None:
    resolved = resolve(preset=preset)
    dumped = resolved.options["fsp"].model_dump()
    assert {key: dumped[key] for key in options} == options
    assert dumped["adapter"] == "none"
    assert resolved.weights == {"task": 1.0, "fsp": weight}
    assert resolved.phases == phases


def test_the_default_preset_is_ours() -> None:
    assert resolve().options == resolve(preset="ours").options


def test_preset_log_is_the_logs_sum_over_nine() -> None:
    """The reference log divides the sum over three pairs by 9; the package averages the pairs and weighs with 1/3."""
    spec = network()
    student, teacher = outputs(spec, 1), outputs(spec, 2)
    resolved = resolve(preset="log")
    loss = get("fsp")(resolved.options["fsp"], student=spec, teacher=spec)(student, teacher)["fsp"].item()
    pairs = (("stem", "stage1"), ("stage1", "stage2"), ("stage2", "stage3"))
    single = [fsp_loss([(student.maps[a], student.maps[b])], [(teacher.maps[a], teacher.maps[b])], pool="avg").item() for a, b in pairs]
    assert resolved.weights["fsp"] * loss == pytest.approx(sum(single) / 9, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "epochs", "lr", "milestones", "weight"),
    [
        ({"schedule": "two-stage"}, 54, 1e-2, (11 / 21, 16 / 21), 1.0),
        ({"preset": "paper", "reduction": "mean"}, 54, 1e-2, (11 / 21, 16 / 21), 1.0),
        ({"preset": "kd-zoo", "reduction": "sum"}, 50, 1e-3, (0.6, 0.8), 1e-3),
        ({"preset": "log", "reduction": "sum", "schedule": "two-stage"}, 54, 1e-3, (11 / 21, 16 / 21), 1e-3),
        ({"preset": "paper", "stage_epochs": 2, "stage_lr": 0.5}, 2, 0.5, (11 / 21, 16 / 21), 1e-3),
    ],
)
def test_rate_and_weight_follow_the_reduction(
    options: dict[str, Any], epochs: int, lr: float, milestones: tuple[float, ...], weight: float
) -> None:
    resolved = resolve(**options)
    first = resolved.phases[0]
    assert (first.epochs, first.lr, first.milestones) == (epochs, lr, milestones)
    assert resolved.weights["fsp"] == weight


def test_variant_names_the_preset_and_what_differs_from_it() -> None:
    assert [variant(preset=preset[0]) for preset in PRESETS] == ["ours", "log", "kd-zoo", "paper"]
    assert variant() == "ours"
    assert variant(pool="max") == "ours"
    assert variant(pool="avg") == "ours, pool=avg"
    assert variant(preset="paper", pairing="cross") == "paper, pairing=cross"
    assert variant(adapter="conv1x1") == "ours, adapter=conv1x1"
    assert variant(preset="paper", reduction="mean") == "paper, reduction=mean, stage_lr=0.01"
    assert variant(preset="kd-zoo", stage_epochs=3) == "kd-zoo, stage_epochs=3"
    assert resolve_method("fsp", {}, {"fsp": 30}).variant == "ours, weights.fsp=30"


def test_options_that_went_through_json_are_the_same() -> None:
    for preset in PRESETS:
        options = FSPOptions(preset=preset[0])
        assert FSPOptions(**options.model_dump()) == options


def test_pairs_are_those_of_the_pairing() -> None:
    def taps(**options: Any) -> list[tuple[str, str]]:
        return get("fsp")(options, student=network(), teacher=network()).pairs

    assert taps(pairing="cross") == [("stem", "stage1"), ("stage1", "stage2"), ("stage2", "stage3")]
    assert taps(pairing="section") == [("stage1.first", "stage1"), ("stage2.first", "stage2"), ("stage3.first", "stage3")]


def test_pairs_follow_the_depth_and_not_the_order_of_a_dict() -> None:
    maps = outputs(network(), 1).maps
    shuffled = Outputs(torch.zeros(2, 3), torch.zeros(2, 4), {tap: maps[tap] for tap in ("stage3", "stage1", "stem", "stage2")})
    spec = NetSpec.of(shuffled)
    assert get("fsp")(student=spec, teacher=spec).pairs == [("stem", "stage1"), ("stage1", "stage2"), ("stage2", "stage3")]


@pytest.mark.parametrize("one_tensor", ["student", "teacher"])
def test_section_is_refused_where_both_taps_are_one_tensor(one_tensor: str) -> None:
    thin = replace(network("thin"), taps=tuple(replace(tap, module=tap.name.removesuffix(".first")) for tap in network().taps))
    pair = {"student": network(), "teacher": network(), one_tensor: thin}
    with pytest.raises(ValueError, match=r"thin .*'stage1.first' and 'stage1' \(2x4x4\) are one tensor.*set options.fsp.pairing=cross"):
        get("fsp")({"pairing": "section"}, **pair)
    get("fsp")({"pairing": "cross"}, **pair)


def test_taps_of_unknown_modules_are_not_taken_for_one_tensor() -> None:
    blank = replace(network(), taps=tuple(replace(tap, module="") for tap in network().taps))
    get("fsp")({"pairing": "section"}, student=blank, teacher=blank)


def test_adapter_makes_a_loss_between_widths() -> None:
    student, teacher = network("small", (2, 2, 3, 4)), network("big", (5, 2, 6, 4))
    with pytest.raises(ValueError, match=r"tap 'stage2' is 3x2x2 in small and 6x2x2 in big.*set options.fsp.adapter=conv1x1"):
        get("fsp")(student=student, teacher=teacher)
    method = get("fsp")({"adapter": "conv1x1"}, student=student, teacher=teacher)
    assert {name: tuple(p.shape) for name, p in method.named_parameters()} == {
        "adapters.stage2.weight": (6, 3, 1, 1),
        "adapters.stem.weight": (5, 2, 1, 1),
    }
    loss = method(outputs(student, 1), outputs(teacher, 2))["fsp"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(p.grad.norm() > 0 for p in method.parameters())


def test_no_adapter_between_equal_widths() -> None:
    assert list(get("fsp")({"adapter": "conv1x1"}, student=network(), teacher=network()).parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_precision_maps_of_40_do_not_overflow(dtype: torch.dtype, reduction: str) -> None:
    student, teacher = ([tuple(40 * m.to(dtype).repeat(1, 1, 4, 4) for m in maps(seed, 5, 7))] for seed in (1, 2))
    assert max(torch.einsum("nchw,ndhw->ncd", *(m.double() for m in pair)).max() for pair in (student[0], teacher[0])) > 65504
    loss = fsp_loss(student, teacher, reduction=reduction)
    exact = fsp_loss([tuple(m.double() for m in student[0])], [tuple(m.double() for m in teacher[0])], reduction=reduction)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pol": "avg"}, ["options.fsp.pol", "did you mean 'pool'?"]),
        ({"zzz": 1}, ["options.fsp.zzz", "choose from:", "pairing"]),
        ({"pool": "median"}, ["options.fsp.pool", "'median'", "'max' or 'avg'"]),
        ({"preset": "our"}, ["options.fsp.preset", "'our'", "'ours', 'log', 'kd-zoo' or 'paper'"]),
        ({"preset": ["ours"]}, ["options.fsp.preset", "'ours', 'log', 'kd-zoo' or 'paper'"]),
        ({"schedule": "two-stage", "stage_epochs": 0}, ["options.fsp.stage_epochs", "0", "greater than or equal to 1"]),
        ({"schedule": "two-stage", "stage_lr": 0}, ["options.fsp.stage_lr", "0", "greater than 0"]),
        ({"stage_epochs": 3}, ["options.fsp: stage_epochs belongs to schedule=two-stage"]),
        ({"schedule": "two-stage", "stage_lr": float("inf")}, ["options.fsp.stage_lr", "inf", "finite"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_option_is_one_line(options: dict[str, Any], words: list[str]) -> None:
    for attempt in (lambda: resolve(**options), lambda: get("fsp")(options, student=network(), teacher=network())):
        with pytest.raises(UserError) as mistake:
            attempt()
        line = str(mistake.value)
        assert "\n" not in line
        assert [word for word in words if word not in line] == []
