"""Mean, spread and honest differences between groups of runs; calibration and agreement of predictions. Torch-free."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

CONFIDENCE = 0.95
MIN_N = 3  # below this: the values alone, no interval and no verdict
BINS = 15  # of confidence; Guo et al. 2017

Classes = npt.NDArray[np.integer]
Values = npt.NDArray[np.floating]


class Difference(NamedTuple):
    """Mean of one group minus that of another, with its Welch interval.

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


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean; None for fewer than three values."""
    if len(values) < MIN_N:
        return None
    reach = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


_variance = functools.lru_cache(maxsize=10_000)(statistics.variance)  # exact, so slow, and one reference is compared with many


def welch(values: Sequence[float], reference: Sequence[float]) -> Difference | None:
    """The difference of two groups by Welch's t interval; None when a group has fewer than three values.

    Welch 1947: standard error sqrt(s1^2/n1 + s2^2/n2), degrees of freedom by Satterthwaite. ``detectable`` is
    half the interval's width.
    """
    if min(len(values), len(reference)) < MIN_N:
        return None
    parts = [_variance(tuple(group)) / len(group) for group in (values, reference)]
    error = math.sqrt(sum(parts))
    value = statistics.fmean(values) - statistics.fmean(reference)
    if error == 0:
        return Difference(value, value, value, 0.0)
    freedom = error**4 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (values, reference), strict=True))
    reach = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Difference(value, value - reach, value + reach, reach)


def calibration_error(confidences: Values, correct: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error, a share from 0 to 1, with 15 bins of equal width.

    Guo et al. 2017, "On Calibration of Modern Neural Networks": the mean over all images of the gap between accuracy and mean confidence of
    the image's bin. Bin m holds the confidences in ((m-1)/15, m/15].

    Args:
        confidences: [N] probability of the predicted class.
        correct: [N] whether that class is the label.
    """
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidences, side="left")
    gaps = np.bincount(bins, weights=correct - np.asarray(confidences, np.float64), minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def negative_log_likelihood(log_probabilities: Values, labels: Classes) -> float:
    """Mean over images of -log p(label), in nats, of natural log-probabilities [N, K] and labels [N]."""
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


class Agreement(NamedTuple):
    """Top-1 classes of two networks on the same images, counted.

    Attributes:
        images: all of them.
        equal: those where both say the same class.
        both_wrong: those that both get wrong.
        equal_wrong: those where both say the same wrong class.
    """

    images: int
    equal: int
    both_wrong: int
    equal_wrong: int


def agreement(first: Classes, second: Classes, labels: Classes) -> Agreement:
    """How often two networks' top-1 classes [N] are equal, over all images and over those that both get wrong; labels [N]."""
    equal, both_wrong = first == second, (first != labels) & (second != labels)
    return Agreement(len(labels), int(equal.sum()), int(both_wrong.sum()), int((equal & both_wrong).sum()))
