"""The whole batch on every rank, for methods that compare images with each other: the parts of all ranks, put together.

Every rank then computes the same loss of the same values. Therefore a rank's gradient for its own outputs is complete without asking the
others, and what a method remembers stays the same on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..methods import Method
from ..ranks import Ranks
from ..types import Batch, Outputs


def needed(methods: Iterable[Method], ranks: Ranks) -> bool:
    """Whether one of these methods needs more than a rank's own part of the batch."""
    return ranks.several and any(method.whole_batch for method in methods)


class _Gathered(torch.autograd.Function):
    """The rows of all ranks. Only a rank's own rows pass a gradient on.

    The gradients of the weights are averaged over the ranks afterwards. A weight acts on the loss through the rows of every rank, and its
    gradient is the sum of what each rank passes on. The factor makes the mean that sum.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        """The rows of all ranks, one rank after the other."""
        ctx.ranks = ranks
        return ranks.gathered(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the own rows, times the number of ranks."""
        (gradient,), ranks = gradients, ctx.ranks
        return gradient[ranks.own(0, len(gradient))] * ranks.world, None


def whole_outputs(outputs: Outputs, ranks: Ranks) -> Outputs:
    """A network's outputs for the batch of all ranks, with their gradients. A teacher's may lack some."""
    if ranks.apart:
        return outputs

    def gather(value: Tensor) -> Tensor:
        if value is None or not value.requires_grad:
            return value if value is None else ranks.gathered(value)
        gathered: Tensor = _Gathered.apply(value, ranks)
        return gathered

    maps = {name: gather(value) for name, value in outputs.maps.items()}
    return Outputs(gather(outputs.logits), gather(outputs.embedding), maps)


def whole_batch(batch: Batch, ranks: Ranks) -> Batch:
    """What a step knows of the images of all ranks. ``Batch.peers`` stay as they are."""
    if ranks.apart:
        return batch

    def gather(value: Tensor | None) -> Tensor | None:
        return None if value is None else ranks.gathered(value)

    targets = batch.targets
    if targets is not None:
        counted = targets.counted * ranks.world  # each rank was given its share of the count
        targets = targets._replace(labels=ranks.gathered(targets.labels), counted=counted, partners=gather(targets.partners))
    return Batch(gather(batch.labels), gather(batch.indices), batch.epoch, batch.peers, targets)
