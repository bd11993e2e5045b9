"""The order of a network's layers, for rates that fall with the distance from the classifier.

A network of timm says it itself (``group_matcher``). Of any other network a layer is a block: a module with parts of its own that stands in
the row (``nn.Sequential``, ``nn.ModuleList``) in which a stage ends. Where a stage ends outside of such a row, a layer ends as well. Before
the first block is the stem, one layer; after the last one are a final normalisation and the classifier, one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..checks import FAILURES, UserError, summary


def by_timm(net: Any, name: str) -> dict[str, int]:
    """Parameter -> its layer, counted from 0 at the images' side, as timm groups them; empty if the network is not of timm's kind.

    Raises:
        UserError: its own grouping fails.
    """
    if not hasattr(net, "group_matcher"):
        return {}
    try:
        from timm.models import group_parameters

        layers: dict[str, int] = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    except FAILURES as error:  # of the network's own code
        raise UserError(f"{name}: its group_matcher does not group its parameters as timm's do: {summary(error)}") from None
    return layers


def by_blocks(net: nn.Module, ends: Mapping[str, str], order: Mapping[str, int]) -> dict[str, int]:
    """Parameter -> its layer, counted from 0 at the images' side; empty if the network has no stages.

    Args:
        ends: tap name -> module path, of which ``stem``, ``stage1``, ``stage2``, ... count.
        order: module path -> when its last call ended.
    """
    stages = [path for name, path in ends.items() if name.removeprefix("stage").isdigit()]
    called = {path: times for path in dict.fromkeys(block for end in stages for block in _row(net, end)) if (times := _times(path, order))}
    if not called:
        return {}
    first = min(called, key=lambda path: called[path][-1])
    stem = called[first][0] - 0.5 if first not in stages or "stem" not in ends else order[ends["stem"]]
    borders = [stem, *(times[-1] for times in called.values())]

    def layer(owner: str) -> int:
        """What ended before a module; the stem where the network uses the parameters beside the calls of modules."""
        while owner not in order:
            owner = owner.rpartition(".")[0]
        around = any(_within(path, owner) for path in called if path != owner)
        return 0 if around else sum(border < order[owner] for border in borders)

    layers = {name: layer(name.rpartition(".")[0]) for name, _ in net.named_parameters()}
    rank = {number: place for place, number in enumerate(sorted(set(layers.values())))}  # a layer without parameters is none
    return {name: rank[number] for name, number in layers.items()}


def order_of(net: nn.Module) -> dict[str, int]:
    """Module path -> when its call ends, of a network whose modules stand in the order in which they are called."""

    def ended(path: str, module: nn.Module) -> Iterator[str]:
        for name, inner in module.named_children():
            yield from ended(f"{path}.{name}" if path else name, inner)
        yield path

    return {path: time for time, path in enumerate(ended("", net))}


def _row(net: nn.Module, end: str) -> list[str]:
    """The blocks of the outermost row that a stage's end stands in, or ends; the end itself if there is none."""
    parts = end.split(".")
    for count in range(len(parts) + 1):
        path = ".".join(parts[:count])
        if _is_row(net.get_submodule(path)):
            return [*_blocks(net, path)]
    return [end]


def _blocks(net: nn.Module, path: str) -> Iterator[str]:
    for name, inner in net.get_submodule(path).named_children():
        below = f"{path}.{name}" if path else name
        if _is_row(inner):
            yield from _blocks(net, below)
        elif next(inner.children(), None) is not None:
            yield below


def _is_row(module: nn.Module) -> bool:
    """Whether it holds modules that have parts of their own. A row of bare operations, such as a convolution and a ReLU, is one block."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and any(next(inner.children(), None) is not None for inner in module)


def _times(path: str, order: Mapping[str, int]) -> list[int]:
    """When the calls in a module ended, in order."""
    return sorted(time for inner, time in order.items() if _within(inner, path))


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.") or not outer
