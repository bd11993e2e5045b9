"""The exponential moving average of a network's weights, which is measured and shipped in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..models import Network

STATISTICS = ("running_mean", "running_var")


class Average:
    """An average a of a network's weights w: after each step, a <- d a + (1 - d) w. It begins as the weights themselves.

    d is min(decay, (1 + n) / (10 + n)) in step n, counted from 1, so that the random first weights are soon forgotten (TensorFlow's
    ``ExponentialMovingAverage`` with ``num_updates``). Averaged are all parameters, and by the same rule the statistics of normalisations.
    To estimate these again would take a pass over training images before each evaluation; they are a moving average as it is. All other
    buffers are the network's own.

    Everything stays on the device and in its place, so that a graph can hold a step of it.
    """

    def __init__(self, net: Network, decay: float) -> None:
        statistics = {name: value for name, value in net.named_buffers() if name.rpartition(".")[2] in STATISTICS}
        self._live = {name: value.detach() for name, value in (*net.named_parameters(), *statistics.items())}
        self._values = {name: value.clone() for name, value in self._live.items()}
        self._statistics, self._decay = list(statistics), decay
        self._steps = torch.zeros((), device=next(net.parameters()).device)

    @torch.no_grad()
    def follow(self) -> None:
        """Take the weights in, after a step."""
        self._steps += 1
        share = (9 / (10 + self._steps)).clamp(min=1 - self._decay)  # 1 - d
        values = list(self._values.values())
        towards = torch._foreach_sub(list(self._live.values()), values)
        torch._foreach_mul_(towards, share)
        torch._foreach_add_(values, towards)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the average in the place of its weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Let the network and the average change places, in the same memory."""
        live, values = list(self._live.values()), list(self._values.values())
        held = [value.clone() for value in live]
        torch._foreach_copy_(live, values)
        torch._foreach_copy_(values, held)

    @property
    def statistics(self) -> list[Tensor]:
        """Those of normalisations, which on each of several ranks are of its own images."""
        return [self._values[name] for name in self._statistics]

    def state(self) -> dict[str, Tensor]:
        """All that it remembers. The tensors are not copies."""
        return {"steps": self._steps, **{f"of.{name}": value for name, value in self._values.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a state back, in its place."""
        for name, value in self.state().items():
            value.copy_(tensors[name])
