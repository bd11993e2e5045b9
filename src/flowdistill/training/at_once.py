"""What every layer of a network would launch by itself in a step, done for all layers at once. The numbers are the same, bit for bit.

On a GPU a step of a small network is bound by the number of its launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..device import Precision
from ..models import Network


@contextmanager
def counted_at_once(nets: Sequence[Network]) -> Iterator[None]:
    """Batch normalisations inside do not count their batches; one operation counts them after.

    Of networks that run each layer once in a pass. Nothing but the record depends on the counters, for the momentum is fixed.
    """
    counting = [module for net in nets if net.each_once for module in net.modules() if _counts(module)]
    counters = [module.get_buffer("num_batches_tracked") for module in counting]
    for module in counting:
        module._buffers["num_batches_tracked"] = None
    try:
        yield
    finally:
        for module, counter in zip(counting, counters, strict=True):
            module._buffers["num_batches_tracked"] = counter
    if counters:
        torch._foreach_add_(counters, 1)


def _counts(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.training and module.momentum is not None and module.num_batches_tracked is not None


@contextmanager
def cast_at_once(nets: Sequence[Network], precision: Precision) -> Iterator[dict[Tensor, Tensor]]:
    """Under bf16 the weights of convolutions and linear layers are cast by one operation, where autocast would launch one for each.

    Yields what stands for each weight inside: its gradient is asked for in the weight's place. Of networks in which nothing but its own
    layer, or another that autocast casts for as well, uses such a weight.
    """
    owners = [module for net in nets if net.each_once for module in net.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    places = [(owner, name, value) for owner in owners for name, value in owner._parameters.items() if value is not None]
    if precision != "bf16" or not places:
        yield {}
        return
    weights: list[Tensor] = list(dict.fromkeys(value for _, _, value in places))
    with torch.no_grad():
        cast: list[Tensor] = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch._foreach_copy_(cast, weights)
    casts: dict[Tensor, Tensor] = {}
    for weight, value in zip(weights, cast, strict=True):
        casts[weight] = value.requires_grad_(weight.requires_grad)
    for owner, name, weight in places:
        owner._parameters[name] = casts[weight]  # type: ignore[assignment]
    try:
        yield casts
    finally:
        for owner, name, weight in places:
            owner._parameters[name] = weight


def give(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Every parameter its gradient, in its type and memory layout: SGD's fused form computes wrong updates from another, silently."""
    others: list[tuple[Tensor, Tensor]] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None or (gradient.dtype, gradient.stride()) == (parameter.dtype, parameter.stride()):
            parameter.grad = gradient
        else:
            parameter.grad = torch.empty_like(parameter, requires_grad=False)
            others.append((parameter.grad, gradient))
    if others:
        torch._foreach_copy_([place for place, _ in others], [gradient for _, gradient in others])
