"""Spread and differences against scipy, and what ``detectable`` promises, and coverage by simulation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as scipy_stats

from flowdistill.stats import MIN_N, Difference, interval, sample_std, welch

LOG = {
    "C10": [91.95713, 91.89703, 92.28766],
    "C100": [68.00881, 67.96875, 68.11899],
    "R110": [92.19752, 92.47797, 93.46955],
}
GROUPS = [
    (LOG["C10"], LOG["R110"]),
    (LOG["C100"], LOG["C10"]),
    ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    ([92.1, 92.5, 91.8, 92.9, 92.2], LOG["C10"]),
    ([0.0, 100.0, 50.0, 3.0], [49.9, 50.0, 50.1, 50.05, 49.95, 50.2]),
    ([92.5, 92.5, 92.5], [91.0, 92.0, 93.0]),
    ([92.1, 92.5, 91.8], [91.0, 91.0, 91.0, 91.0]),
    ([1e-6, 2e-6, 4e-6], [1e6, 1.1e6, 1.3e6]),
    (list(np.random.default_rng(3).normal(70, 2, 40)), list(np.random.default_rng(4).normal(69, 0.2, 7))),
]


@pytest.mark.filterwarnings("ignore:Precision loss occurred:RuntimeWarning")  # scipy's, of a group whose values are all the same
@pytest.mark.parametrize(("values", "reference"), GROUPS)
def test_welch_is_scipys_interval(values: Sequence[float], reference: Sequence[float]) -> None:
    difference = welch(values, reference)
    scipys = scipy_stats.ttest_ind(values, reference, equal_var=False).confidence_interval(0.95)
    assert difference is not None
    assert difference.value == pytest.approx(statistics.fmean(values) - statistics.fmean(reference), rel=1e-12, abs=1e-12)
    assert difference.low == pytest.approx(scipys.low, rel=1e-9, abs=1e-9)
    assert difference.high == pytest.approx(scipys.high, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("values", "reference"), GROUPS)
def test_welch_turns_its_sign_with_the_groups(values: Sequence[float], reference: Sequence[float]) -> None:
    there, back = welch(values, reference), welch(reference, values)
    assert there is not None
    assert back is not None
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low), rel=1e-12)
    assert back.detectable == pytest.approx(there.detectable, rel=1e-12)


@pytest.mark.parametrize(("values", "reference"), [([1.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([], []), ([1.0], [2.0])])
def test_no_verdict_below_three(values: list[float], reference: list[float]) -> None:
    assert MIN_N == 3
    assert welch(values, reference) is None


def test_identical_values_give_an_interval_of_no_width() -> None:
    assert welch([92.1] * 3, [91.6] * 4) == pytest.approx(Difference(0.5, 0.5, 0.5, 0.0))
    assert welch([0.1] * 3, [0.1] * 3) == Difference(0.0, 0.0, 0.0, 0.0)


def test_a_difference_that_is_seen_and_one_that_is_not() -> None:
    seen, unseen = welch([92.0, 92.1, 92.2], [90.0, 90.1, 90.2]), welch([92.0, 92.1, 92.2], [92.0, 92.2, 92.3])
    assert seen is not None
    assert unseen is not None
    assert seen.low > 0
    assert unseen.low < 0 < unseen.high


@pytest.mark.parametrize("values", [values for group in GROUPS for values in group if statistics.stdev(values)])
def test_the_interval_of_a_mean_is_scipys(values: Sequence[float]) -> None:
    expected = scipy_stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert interval(values) == pytest.approx(expected, rel=1e-9)


def test_there_is_no_interval_of_a_mean_below_three() -> None:
    assert interval([92.0, 92.5]) is interval([]) is None
    assert interval([92.0] * 3) == (92.0, 92.0)


def test_sample_std_divides_by_n_less_one() -> None:
    values = [92.0, 93.0, 95.0]
    assert sample_std(values) == pytest.approx(float(np.std(values, ddof=1)))
    assert sample_std(values) != pytest.approx(float(np.std(values)))
    assert sample_std([1.0, 2.0]) == pytest.approx(math.sqrt(0.5))
    assert sample_std([5.0, 5.0]) == 0


@pytest.mark.parametrize("values", [[], [92.0]])
def test_no_std_of_fewer_than_two(values: list[float]) -> None:
    assert sample_std(values) is None


def with_spread(n: int, std: float) -> list[float]:
    """n values whose mean is 0 and whose sample standard deviation is just ``std``: the truth, put in place of an estimate."""
    values = np.arange(n) - (n - 1) / 2
    return list(values / values.std(ddof=1) * std)


DRAWS = 4_000


@pytest.mark.parametrize(("n", "m", "ratio"), [(3, 3, 1.0), (5, 10, 2.0)])
def test_detectable_is_the_smallest_difference_whose_interval_leaves_out_zero(n: int, m: int, ratio: float) -> None:
    ours, theirs = with_spread(n, 1.0), with_spread(m, ratio)
    level = welch(ours, theirs)
    assert level is not None
    for factor, shown in ((1.001, True), (0.999, False)):
        moved = [value - level.value + factor * level.detectable for value in ours]
        difference = welch(moved, theirs)
        assert difference is not None
        assert difference.value == pytest.approx(factor * level.detectable)
        assert (difference.low > 0) == shown


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(1)
    pairs = zip(chance.normal(1.0, 1.0, (DRAWS, 5)).tolist(), chance.normal(0.0, 2.0, (DRAWS, 8)).tolist(), strict=True)
    found = [welch(ours, theirs) for ours, theirs in pairs]
    covered = sum(1 for difference in found if difference is not None and difference.low <= 1.0 <= difference.high)
    # binomial standard deviation sqrt(0.95 x 0.05 / 4000) = 0.0034; four of them, and 0.005 for Welch's approximation
    assert covered / DRAWS == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / DRAWS) + 0.005)
