"""What a teacher says of a batch, looked at: whether each output that methods see is finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..methods import Needs
from ..types import Outputs

ANSWER, EMBEDDING, MAP = "answer (logits)", "embedding", "map "


def looked_at(needs: Needs, taps: Iterable[str] | None = None) -> tuple[str, ...]:
    """What of a teacher's outputs these needs name, as messages name it: its maps in the order of ``taps``, its embedding, its answer."""
    maps = [f"{MAP}{tap}" for tap in (sorted(needs.teacher) if taps is None else taps) if tap in needs.teacher]
    return (*maps, *[EMBEDDING] * needs.embedding, *[ANSWER] * needs.logits)


def measure(outputs: Outputs, names: Iterable[str]) -> dict[str, Tensor]:
    """The sum of each output's values, the cheapest look at them all: not finite where one is not, or where all are beyond reason (1e32).

    Logits of -inf rule classes out: of an image all but one may. Nothing waits for the device.
    """
    return {name: _values(outputs, name).detach().sum(dtype=torch.float32) for name in names}


def _values(outputs: Outputs, name: str) -> Tensor:
    if name == ANSWER:
        return outputs.logits.amax(1)
    return outputs.embedding if name == EMBEDDING else outputs.maps[name.removeprefix(MAP)]
