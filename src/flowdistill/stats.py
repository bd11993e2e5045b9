"""Mean, spread and honest differences between groups of runs. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit

CONFIDENCE = 0.95
LEAST_N = 3  # below this: the values alone, no interval and no verdict


class Difference(NamedTuple):
    """Mean of one group less that of another, with its Welch interval.

    Attributes:
        value: the difference of the means.
        low, high: its 95 % interval.
        detectable: the smallest difference that this n and spread can show: one measured below it has 0 in its interval.
    """

    value: float
    low: float
    high: float
    detectable: float


def sample_std(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def welch(values: Sequence[float], reference: Sequence[float]) -> Difference | None:
    """The difference of two groups by Welch's t interval; None when a group has fewer than three values.

    Welch 1947: standard error sqrt(s1^2/n1 + s2^2/n2), degrees of freedom by Satterthwaite. ``detectable`` is
    half the interval's width.
    """
    if min(len(values), len(reference)) < LEAST_N:
        return None
    parts = [statistics.variance(group) / len(group) for group in (values, reference)]
    error = math.sqrt(sum(parts))
    value = statistics.fmean(values) - statistics.fmean(reference)
    if error == 0:
        return Difference(value, value, value, 0.0)
    freedom = error**4 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (values, reference), strict=True))
    reach = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Difference(value, value - reach, value + reach, reach)
