"""The learning rate as a pure function of where training stands, so that any step can be taken up again from its number."""

from __future__ import annotations

import math
from collections.abc import Sequence

WARMUP = 0.1  # the factor in warm-up epochs


def lr_factor(kind: str, *, step: int, steps: int, epoch_share: float, milestones: Sequence[float] = (0.5, 0.75)) -> float:
    """The factor on the base learning rate.

    Args:
        kind: ``step`` (tenfold lower at each milestone), ``cosine`` (to 0) or ``one-cycle`` (from 1/25 up to 1 over the first 30 %,
            then down to 1/250,000; both on a cosine, as torch's OneCycleLR).
        step, steps: 0-based step of the phase, and how many it has.
        epoch_share: whole epochs done over the phase's epochs; ``step`` changes only between epochs.
        milestones: shares of the phase.
    """
    if kind == "cosine":
        return _cosine(1, 0, step / steps)
    if kind == "one-cycle":
        peak, last = 0.3 * steps - 1, steps - 1
        if step <= peak:
            return _cosine(1 / 25, 1, step / peak if peak else 1)
        return _cosine(1, 1 / 250_000, (step - peak) / (last - peak))
    return float(0.1 ** sum(epoch_share >= milestone - 1e-9 for milestone in milestones))


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
