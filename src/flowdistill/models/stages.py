"""Where the stages of a network end, told by the sizes of the maps that its modules give."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .watching import Call, Layout

STRETCHES = 4  # where all maps are of one size, so many taps are spread over the depth


def find_taps(net: nn.Module, calls: Sequence[Call]) -> dict[str, str]:
    """``stem``, ``stage1``, ``stage2``, ... -> module path.

    A stage ends with the last map of its size: before the outermost module that leaves for a smaller one without passing through a third,
    so that a block that widens its input before it shrinks it does not count. The stem is the first convolution with the normalisation
    and the activation that follow it, and no stage's end. Where all maps are of one size, as those of a plain transformer, four ends are
    spread over its blocks.
    """
    once = {call.path: call for call in calls}  # a hook on a module that is used again sees its last output alone
    maps = [call for call in calls if call.layout and call.size != (1, 1) and call.path and once[call.path] is call]
    level = _levels(maps)
    stem = _stem(net, maps)
    leaving = _transitions(maps, level)
    ends: list[Call] = []
    for size in dict.fromkeys(level.values()):
        left = max(
            (call.began for call in leaving if call.input_layout and level[call.input_layout.size] == size), default=maps[-1].ended + 1
        )
        before = [call for call in maps if level.get(call.size) == size and call.ended < left and not call.pools]
        after = (ends or stem)[-1].ended if ends or stem else -1
        if before and before[-1].ended > after:
            ends.append(_outermost(before[-1], maps))
    if len(ends) == len(set(level.values())) == 1:
        ends = _spread(maps, ends[0])
    named = {"stem": stem[-1].path} if stem else {}
    return named | {f"stage{number}": end.path for number, end in enumerate(ends, 1)}


def _levels(maps: Sequence[Call]) -> dict[tuple[int, int], tuple[int, int]]:
    """Map size -> the largest of those that differ from it by a border alone; of sizes that a layer with weights gives, falling."""
    level: dict[tuple[int, int], tuple[int, int]] = {}
    for size in sorted({call.size for call in maps if next(call.module.parameters(), None) is not None}, reverse=True):
        above = next(reversed(level.values()), size)
        level[size] = above if 2 * math.prod(size) > math.prod(above) else size
    return level


def _stem(net: nn.Module, maps: Sequence[Call]) -> list[Call]:
    """The last of the first convolution and the layers after it beside which it stands, until one with a convolution or a linear layer
    in it. Empty where there is no convolution.
    """
    leaves = [call for call in maps if next(call.module.children(), None) is None]
    first = next((index for index, call in enumerate(leaves) if isinstance(call.module, nn.Conv2d)), len(leaves))
    stem = leaves[first : first + 1]
    for call in leaves[first + 1 :]:
        beside = stem[0].path.rpartition(".")[0]
        if not call.path.startswith(beside) or call.pools or call.shape != stem[0].shape:
            break
        sibling = call.path[: f"{call.path}.".index(".", len(beside) + 1 if beside else 0)]
        if any(isinstance(inner, nn.Conv2d | nn.Linear) for inner in net.get_submodule(sibling).modules()):
            break
        stem.append(call)
    return [_outermost(call, maps) for call in stem[-1:]]


def _transitions(maps: Sequence[Call], level: Mapping[tuple[int, int], tuple[int, int]]) -> list[Call]:
    """The outermost calls from a map of one size to one of another, with no third inside; gates, which are of one position, aside."""

    def simple(call: Call) -> bool:
        if call.input_layout is None:
            return False
        before, after = call.input_layout.size, call.size
        if not {before, after} <= level.keys() or level[before] == level[after]:
            return False
        inside = {level.get(inner.size) for inner in maps if call.began < inner.began and inner.ended < call.ended}
        return inside <= {level[before], level[after], None}

    transitions: list[Call] = []
    for call in sorted(maps, key=lambda call: call.began):
        if simple(call) and not any(outer.began < call.began and call.ended < outer.ended for outer in transitions):
            transitions.append(call)
    return transitions


def _spread(maps: Sequence[Call], end: Call) -> list[Call]:
    """Of the longest row of numbered modules that give maps of this size, those at the ends of equal stretches; else the end alone."""
    rows: dict[str, list[Call]] = {}
    for call in maps:
        row, _, number = call.path.rpartition(".")
        if call.size == end.size and re.fullmatch(r"(\w*_)?\d+", number):
            rows.setdefault(row, []).append(call)
    blocks = max(rows.values(), key=len, default=[])
    count = min(STRETCHES, len(blocks))
    spread = [blocks[-(-len(blocks) * part // count) - 1] for part in range(1, count + 1)]
    return [_outermost(block, maps) for block in spread] if count > 1 else [end]


def _outermost(call: Call, maps: Sequence[Call]) -> Call:
    """The last call to give this very tensor, those that pass it through aside."""
    same = [other for other in maps if other.output is call.output and not isinstance(other.module, nn.Identity | nn.Dropout)]
    return (same or [call])[-1]


def attention(calls: Sequence[Call]) -> list[Call]:
    """Those that give a number for each pair of T positions, [N, heads, T, T], inside of a module that turns T positions into T."""
    around: dict[int, list[Call]] = {}
    for call in calls:
        count = _positions(call.output, call.layout)
        if count > 1 and call.inputs and count == _positions(call.inputs[0], call.input_layout):
            around.setdefault(count, []).append(call)

    def within(call: Call) -> bool:
        height, width = call.size
        return height == width and any(outer.began < call.began and call.ended < outer.ended for outer in around.get(height, []))

    return [call for call in calls if call.layout and call.layout.kind != "tokens" and within(call)]


def _positions(value: Any, layout: Layout | None) -> int:
    """How many places a map, or tokens whatever their number, have; 0 of anything else."""
    if isinstance(value, Tensor) and value.dim() == 3:
        return value.shape[1]
    return math.prod(layout.size) if layout else 0
