"""Which of the teacher's outputs methods use, and a sum of each, which tells whether it is finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..methods import Needs
from ..types import Outputs

ANSWER, EMBEDDING, MAP = "answer (logits)", "embedding", "map "


def output_names(needs: Needs, taps: Iterable[str] | None = None) -> tuple[str, ...]:
    """The teacher's outputs that ``needs`` name, as messages name them: its maps in the order of ``taps``, its embedding, its answer."""
    maps = [f"{MAP}{tap}" for tap in (sorted(needs.teacher) if taps is None else taps) if tap in needs.teacher]
    return (*maps, *[EMBEDDING] * needs.embedding, *[ANSWER] * needs.logits)


def output_sums(outputs: Outputs, names: Iterable[str]) -> dict[str, Tensor]:
    """The sum of each output's values, a float32 scalar: not finite if one of them is not, or if all are beyond reason (1e32).

    A sum is the cheapest look at all values, and nothing waits for the device. Logits of -inf rule classes out: all but one of an image's
    may be so.
    """
    return {name: _values(outputs, name).detach().sum(dtype=torch.float32) for name in names}


def _values(outputs: Outputs, name: str) -> Tensor:
    if name == ANSWER:
        return outputs.logits.amax(1)
    return outputs.embedding if name == EMBEDDING else outputs.maps[name.removeprefix(MAP)]
