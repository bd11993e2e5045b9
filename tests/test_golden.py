"""The float64 golden values of the formula sheet, met by the package's pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden.inputs import INPUTS
from helpers.method_cases import SHEETS as FILES
from torch import Tensor

from flowdistill.methods.attention import attention_loss
from flowdistill.methods.fsp import fsp_loss
from flowdistill.methods.kd import kd_loss

SHEETS = {name: module for name, module in FILES.items() if hasattr(module, "GOLDEN")}
ABOUT = ("kd", "at", "fsp", "at+kd", *SHEETS)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
CLAIMED = {key for key, entry in GOLDEN.items() if entry["method"] in ABOUT}

OTHER_LOSSES = {key: why for module in SHEETS.values() for key, why in getattr(module, "OTHER_LOSSES", {}).items()} | {
    "at/code_p4": "attention with exponent 4; the package has F_sum^2 alone",
    "at/code_p1_preact": "attention with exponent 1 of the maps before ReLU",
    "fsp/section_l21": "torchdistill's sum of the columns' norms (L2,1) in place of squares",
}
CANCELS = {
    "identity/kd_high_T": 1e-8,  # KL is 6e-8 there, a sum of terms of 1e-4; 50 digits give 5.99613719448, the entry ends in ..188
    "ctkd/theta_grad_epoch5": 1e-7,  # 50 digits give -0.01494573166559662, the entry -0.01494573109717
}

CROSS = (("stem", "st1"), ("st1", "st2"), ("st2", "st3"))
SECTION = (("first1", "st1"), ("first2", "st2"), ("first3", "st3"))
SECTION_IN = (("first1", "st1"), ("in2", "st2"), ("in3", "st3"))


def kd(temperature: float) -> Tensor:
    return kd_loss(INPUTS["logits_s"], INPUTS["logits_t"], temperature)


def cross_entropy() -> Tensor:
    return F.cross_entropy(INPUTS["logits_s"], INPUTS["labels"])


def at(*stages: tuple[str, str], mode: str = "code") -> Tensor:
    return torch.stack([attention_loss(INPUTS[f"s_{ours}"], INPUTS[f"t_{theirs}"], mode) for ours, theirs in stages]).sum()


def same_stages(mode: str = "code") -> Tensor:
    return at(("st1", "st1"), ("st2", "st2"), ("st3", "st3"), mode=mode)


def fsp(pairs: tuple[tuple[str, str], ...], pool: str, reduction: str) -> Tensor:
    ours, theirs = ([(INPUTS[f"{who}_{a}"], INPUTS[f"{who}_{b}"]) for a, b in pairs] for who in "st")
    return fsp_loss(ours, theirs, pool=pool, reduction=reduction)


def kd_gradient() -> Tensor:
    student = INPUTS["logits_s"].clone().requires_grad_()
    return torch.autograd.grad(kd_loss(student, INPUTS["logits_t"], 4.0), student)[0].norm()


FORMULAS: dict[str, Callable[[], Tensor]] = {key: formula for module in SHEETS.values() for key, formula in module.GOLDEN.items()} | {
    "kd/T1": lambda: kd(1.0),
    "kd/T2": lambda: kd(2.0),
    "kd/T4": lambda: kd(4.0),
    "kd/T4_mixed_ce": lambda: 0.9 * kd(4.0) + 0.1 * cross_entropy(),
    "at/code_p2": same_stages,
    "at/paper_p2": lambda: same_stages("paper"),
    "at/size_mismatch": lambda: at(("st2", "big2")),
    "at/channel_mismatch": lambda: at(("st1", "wide1"), ("st2", "wide2"), ("st3", "wide3")),
    "at+kd/authors": lambda: 0.1 * cross_entropy() + 0.9 * kd(4.0) + 1000 * same_stages(),
    # the sheet sums the three pairs under `mean`, the package averages them
    "fsp/cross_avg_mean_sumpairs": lambda: 3 * fsp(CROSS, "avg", "mean"),
    "fsp/cross_avg_mean_meanpairs": lambda: fsp(CROSS, "avg", "mean"),
    "fsp/cross_avg_mean_seed": lambda: fsp(CROSS, "avg", "mean") / 3,
    "fsp/cross_avg_sum": lambda: fsp(CROSS, "avg", "sum"),
    "fsp/cross_max_sum": lambda: fsp(CROSS, "max", "sum"),
    "fsp/cross_max_mean": lambda: 3 * fsp(CROSS, "max", "mean"),
    "fsp/section_sum": lambda: fsp(SECTION, "max", "sum"),
    "fsp/section_mean": lambda: 3 * fsp(SECTION, "max", "mean"),
    "fsp/section_in_max_sum": lambda: fsp(SECTION_IN, "max", "sum"),
    "fsp/section_in_avg_mean": lambda: 3 * fsp(SECTION_IN, "avg", "mean"),
    "identity/kd_grad_l2": kd_gradient,
    "identity/kd_high_T": lambda: kd(1e4),
    "identity/fsp_sum_vs_mean": lambda: 16 * 16 * fsp(SECTION[1:2], "max", "mean"),
}


@pytest.mark.parametrize("key", FORMULAS)
def test_value_is_met(key: str, record_property: Callable[[str, object], None]) -> None:
    value, expected = FORMULAS[key](), GOLDEN[key]["value"]
    record_property("golden values", [key, f"{expected:.12g}", f"{abs(value.item() - expected) / abs(expected):.1g}"])  # conftest.py prints
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=CANCELS.get(key, 1e-9), abs=0)


@pytest.mark.parametrize("key", sorted(CLAIMED))
def test_entry_is_tested_or_listed(key: str) -> None:
    assert (key in FORMULAS) != (key in OTHER_LOSSES)


def test_the_lists_name_entries_that_exist() -> None:
    assert (set(FORMULAS) | set(OTHER_LOSSES) | set(CANCELS)) <= set(GOLDEN)
    assert set(OTHER_LOSSES) <= CLAIMED
    assert {GOLDEN[key]["method"] for key in CLAIMED} == set(ABOUT)
