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
    """Inside, batch normalisations do not count their batches; after it, one operation counts for all.

    It is for networks that run each layer once in a pass. Only the record depends on the counters, for the momentum is fixed.
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
    """Under bf16, one operation casts the weights of all convolutions and linear layers; autocast would launch one for each.

    Yields the cast weight that stands for each weight inside: ask for its gradient instead of the weight's. It is for
    networks in which only a weight's own layer, or another that autocast casts for as well, uses the weight.
    """
    owners = [module for net in nets if net.each_once for module in net.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    uses = [(owner, name, value) for owner in owners for name, value in owner._parameters.items() if value is not None]
    if precision != "bf16" or not uses:
        yield {}
        return
    weights: list[Tensor] = list(dict.fromkeys(value for _, _, value in uses))
    with torch.no_grad():
        cast: list[Tensor] = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch._foreach_copy_(cast, weights)
    casts: dict[Tensor, Tensor] = {}
    for weight, value in zip(weights, cast, strict=True):
        casts[weight] = value.requires_grad_(weight.requires_grad)
    for owner, name, weight in uses:
        owner._parameters[name] = casts[weight]  # type: ignore[assignment]
    try:
        yield casts
    finally:
        for owner, name, weight in uses:
            owner._parameters[name] = weight


def set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Give every parameter its gradient in the parameter's own type and memory layout.

    From a gradient in another layout, the fused forms of SGD and AdamW compute wrong updates, silently.
    """
    converted: list[tuple[Tensor, Tensor]] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None or (gradient.dtype, gradient.stride()) == (parameter.dtype, parameter.stride()):
            parameter.grad = gradient
        else:
            parameter.grad = torch.empty_like(parameter, requires_grad=False)
            converted.append((parameter.grad, gradient))
    if converted:
        torch._foreach_copy_([copy for copy, _ in converted], [gradient for _, gradient in converted])
