"""Buffers of a network, which its own layers may replace, add and give another shape: observers of quantisation do in their first pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]


def shapes(module: nn.Module) -> Shapes:
    """The shapes of all buffers that are in the state dict, by name."""
    saved = module.state_dict(keep_vars=True)
    return {name: tuple(value.shape) for name, value in module.named_buffers(remove_duplicate=False) if name in saved}


def buffers(module: nn.Module) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """The shapes and the values, as bytes, of all buffers, by name."""
    values = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in module.named_buffers()}
    return {name: (tuple(value.shape), value.flatten().view(torch.uint8).numpy().tobytes()) for name, value in values.items()}


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Undo afterwards what happens to buffers inside: each tensor gets its value and shape back in place, and new buffers are removed."""
    before = [(owner, dict(owner._buffers)) for owner in module.modules()]
    values = {value: value.detach().clone() for _, buffers in before for value in buffers.values() if value is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in values.items():
                _shaped(value, old).copy_(old)
        for owner, buffers in before:
            owner._buffers.clear()
            owner._buffers.update(buffers)


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    return value if value.shape == like.shape else value.resize_(like.shape)


def shape_buffers(module: nn.Module, weights: Mapping[str, Tensor], grown: frozenset[str]) -> None:
    """Give the buffers that are named in ``grown`` the shapes that they have in a state, and make those that are not there yet."""
    for name in sorted(grown & weights.keys()):
        path, _, buffer_name = name.rpartition(".")
        owner, value = module.get_submodule(path), weights[name]
        if (existing := owner._buffers.get(buffer_name)) is None:
            device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), value.device)
            owner.register_buffer(buffer_name, torch.zeros_like(value, device=device))
        else:
            _shaped(existing, value)
