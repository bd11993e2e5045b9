"""The learning rate as a pure function of the step's number, so that training can go on from any step."""

from __future__ import annotations

import math
from collections.abc import Sequence

WARMUP = 0.1  # the factor in warm-up epochs


def lr_factor(kind: str, *, step: int, steps: int, epoch_share: float, milestones: Sequence[float] = (0.5, 0.75)) -> float:
    """The factor on the base learning rate.

    Args:
        kind: ``step`` (tenfold lower at each milestone), ``cosine`` (to 0) or ``one-cycle`` (from 1/25 up to 1 over the first 30 %,
            then down to 1/250,000; both on a cosine, as torch's OneCycleLR).
        step, steps: 0-based step of the phase, and the phase's number of steps.
        epoch_share: completed epochs over the phase's epochs, by which the kind ``step`` goes: it changes only between epochs.
        milestones: shares of the phase, for the kind ``step``. Default: a half and three quarters.
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
