"""The page on adding a method: its two files go through the suite as any other's."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import test_methods as suite

from flowdistill.methods import METHODS

PAGE = (Path(__file__).parent.parent / "docs" / "ADDING_A_METHOD.md").read_text()
SOURCE, REFERENCE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CHECKS = [
    suite.test_terms_are_float32_scalars_with_a_weight_each,
    suite.test_labels_count_just_where_the_method_says_so,
    suite.test_promise_vanishes_at_match,
    suite.test_promise_per_sample,
    suite.test_order_of_the_batch_changes_nothing,
    suite.test_gradcheck,
    suite.test_needs_are_taps_that_every_model_has,
    suite.test_real_networks_learn_and_the_teacher_stays,
    suite.test_inputs_are_left_as_they_were,
    suite.test_bf16_inputs_come_close_to_float32,
    suite.test_autocast_does_not_bring_half_back,
    suite.test_compiled_equals_eager,
]


def module(name: str, source: str, path: Path) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def added(tmp_path: Path) -> Iterator[None]:
    with METHODS.restored(), pytest.MonkeyPatch.context() as patch:
        module("flowdistill.methods.cosine", SOURCE, tmp_path / "cosine.py")
        patch.setitem(suite.REFERENCES, "cosine", module("reference.cosine", REFERENCE, tmp_path / "reference.py"))
        yield


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example_passes(check) -> None:
    check("cosine", {})


@pytest.mark.usefixtures("added")
def test_the_example_computes_its_formula_and_stays_finite_and_refuses_a_wrong_pair() -> None:
    suite.test_every_method_has_a_reference_with_all_that_the_suite_asks()
    for pair in suite.pairs_for("cosine", {}):
        suite.test_formula_equals_the_reference("cosine", {}, pair)
    for extreme in suite.EXTREMES:
        suite.test_extremes_stay_finite("cosine", {}, extreme)
    for wrong in suite.REFERENCES["cosine"].WRONG:
        suite.test_wrong_pair_is_refused_with_the_cure("cosine", *wrong)
