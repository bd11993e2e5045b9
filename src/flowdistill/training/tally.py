"""Sums over the steps of an epoch, and since when they are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..checks import joined


class Tally:
    """Sums of a student's terms over the steps of an epoch, and how many steps went by before each was no longer finite.

    A sum that is not finite stays so; therefore counting needs no step number. The sums of the teacher's outputs are counted in the same
    way, and mean nothing else. All tensors are on the device and keep their memory, as a graph needs it.

    Attributes:
        terms: names of the loss terms.
        names: the terms, then the teacher's outputs.
        totals: float32 [names], the sum of each.
        sound: float32 [names], how many steps each total was finite for; it does not notice -inf.
    """

    def __init__(self, terms: Sequence[str], output_names: Sequence[str], device: torch.device) -> None:
        self.terms, self.names = tuple(terms), (*terms, *output_names)
        self.totals = torch.zeros(len(self.names), device=device)
        self.sound = torch.zeros_like(self.totals)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What a step changes."""
        return self.totals, self.sound

    def reset(self) -> None:
        """Start an epoch: all sums and counts are 0."""
        for value in self.tensors:
            value.zero_()

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a step's scalars."""
        if self.names:
            self.totals.add_(torch.stack([values[name] for name in self.names]))
            self.sound.add_(self.totals < torch.inf)


def are(names: Iterable[str]) -> str:
    """``task and kd are``, ``kd is``."""
    listed = [*names]
    return f"{joined(listed, 'and')} {'are' if len(listed) > 1 else 'is'}"
