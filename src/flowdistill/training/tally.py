"""Sums over the steps of an epoch, and since when they are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..checks import joined


class Tally:
    """Sums of a student's terms over the steps of an epoch, and how many steps went by before each was no longer finite.

    A sum that is not finite stays so, so that counting needs no number of the step. The same is counted of what it looks at of its
    teacher, whose sums mean nothing else. All is on the device, in fixed places, as a graph wants it.

    Attributes:
        names: the terms, then what is looked at.
        totals: float32, one a name.
        sound: float32, how many steps each total was finite for; of -inf it knows nothing.
    """

    def __init__(self, terms: Sequence[str], looked_at: Sequence[str], device: torch.device) -> None:
        self.terms, self.names = tuple(terms), (*terms, *looked_at)
        self.totals = torch.zeros(len(self.names), device=device)
        self.sound = torch.zeros_like(self.totals)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What a step moves."""
        return self.totals, self.sound

    def reset(self) -> None:
        """No step was taken."""
        for value in self.tensors:
            value.zero_()

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """A step's scalars."""
        if self.names:
            self.totals.add_(torch.stack([values[name] for name in self.names]))
            self.sound.add_(self.totals < torch.inf)


def are(names: Iterable[str]) -> str:
    """``task and kd are``, ``kd is``."""
    listed = [*names]
    return f"{joined(listed, 'and')} {'are' if len(listed) > 1 else 'is'}"
