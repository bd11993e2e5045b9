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

    A stage ends with the last map of its size. The stem is the first convolution with the normalisation and the activation that follow it;
    it is no stage's end. If all maps have one size, as those of a plain transformer have, four ends are spread over its blocks.

    Args:
        calls: all calls of its modules in one pass, in the order in which they ended.
    """
    # A map of one position tells of no stage: gates give such inside of blocks, and pooling gives it at the end.
    last_call = {call.path: call for call in calls}  # a hook on a module that is used again sees its last output alone
    maps = [call for call in calls if call.layout and call.size != (1, 1) and call.path and last_call[call.path] is call]
    level = _levels(maps)
    stem = _stem(net, maps)
    leaving = _transitions(maps, level)
    ends: list[Call] = []
    for size in dict.fromkeys(level.values()):
        # A block may widen its input at the old size before it shrinks it. The stage is therefore over as soon as such a block begins, not
        # with the last map of the size, which lies inside the block. If several modules leave the size, the last one to begin counts: the
        # others are side branches. A size that nothing leaves lasts to the end of the pass.
        until = max(
            (call.began for call in leaving if call.input_layout and level[call.input_layout.size] == size), default=maps[-1].ended + 1
        )
        # A pooling layer only hands on what was computed at the size before, so its map ends no stage.
        stage = [call for call in maps if level.get(call.size) == size and call.ended < until and not call.pools]
        # A size at which there is only the stem has no stage. A smaller map before the last end, as of a gate, is no later stage.
        since = (ends or stem)[-1].ended if ends or stem else -1
        if stage and stage[-1].ended > since:
            ends.append(_outermost(stage[-1], maps))
    # Sizes tell nothing about a network that keeps one size all the way; the numbers of its blocks do.
    if len(ends) == len(set(level.values())) == 1:
        ends = _spread(maps, ends[0])
    named = {"stem": stem[-1].path} if stem else {}
    return named | {f"stage{number}": end.path for number, end in enumerate(ends, 1)}


def _levels(maps: Sequence[Call]) -> dict[tuple[int, int], tuple[int, int]]:
    """Map size -> the level that it belongs to: the largest of the sizes that differ by a border alone. Sizes fall from first to last.

    A convolution without padding cuts a border off, and its map is still of the same stage: a stride of 2 leaves a quarter of the
    positions, a border more than half of them. Only sizes that a layer with weights gives count, since a layer without any may give what
    looks like a map and is none, such as attention between all positions.
    """
    level: dict[tuple[int, int], tuple[int, int]] = {}
    for size in sorted({call.size for call in maps if next(call.module.parameters(), None) is not None}, reverse=True):
        above = next(reversed(level.values()), size)
        level[size] = above if 2 * math.prod(size) > math.prod(above) else size
    return level


def _stem(net: nn.Module, maps: Sequence[Call]) -> list[Call]:
    """The call that ends the stem, in a list; the list is empty if there is no convolution.

    The stem begins with the first convolution. The normalisation and the activation after it belong to it, as in most networks of
    this package, whose stems are tapped after ReLU. They stand beside the convolution, below the same parent, and keep the map's shape. The
    stem is over at pooling, and at a sibling with a convolution or a linear layer in it, which is the first block.
    """
    leaves = [call for call in maps if next(call.module.children(), None) is None]
    first = next((index for index, call in enumerate(leaves) if isinstance(call.module, nn.Conv2d)), len(leaves))
    stem = leaves[first : first + 1]
    for call in leaves[first + 1 :]:
        parent = stem[0].path.rpartition(".")[0]
        if not call.path.startswith(parent) or call.pools or call.shape != stem[0].shape:
            break
        sibling = call.path[: f"{call.path}.".index(".", len(parent) + 1 if parent else 0)]  # the parent's child that this layer is in
        if any(isinstance(inner, nn.Conv2d | nn.Linear) for inner in net.get_submodule(sibling).modules()):
            break
        stem.append(call)
    return [_outermost(call, maps) for call in stem[-1:]]


def _transitions(maps: Sequence[Call], level: Mapping[tuple[int, int], tuple[int, int]]) -> list[Call]:
    """The outermost calls that are given a map of one level and give a map of another, without a third level inside.

    A whole network, or a row of several stages, passes through a third level: a call of it would hide the ends inside. Of the calls
    that are left the outermost counts, since the block as a whole leaves the size, not the layer in it that has the stride.
    """

    def simple(call: Call) -> bool:
        if call.input_layout is None:
            return False
        before, after = call.input_layout.size, call.size
        if not {before, after} <= level.keys() or level[before] == level[after]:
            return False
        # None stands for sizes without a level: no layer with weights gives them.
        inside = {level.get(inner.size) for inner in maps if call.began < inner.began and inner.ended < call.ended}
        return inside <= {level[before], level[after], None}

    transitions: list[Call] = []
    for call in sorted(maps, key=lambda call: call.began):
        if simple(call) and not any(outer.began < call.began and call.ended < outer.ended for outer in transitions):
            transitions.append(call)
    return transitions


def _spread(maps: Sequence[Call], end: Call) -> list[Call]:
    """Of the longest row of numbered modules that give maps of this size, those at the ends of equal stretches; else the end alone.

    The blocks of a transformer stand in a list, so that their names end in a number: ``blocks.0``, or ``layers.encoder_layer_0``. The
    layers inside a block make shorter rows.
    """
    rows: dict[str, list[Call]] = {}
    for call in maps:
        row, _, number = call.path.rpartition(".")
        if call.size == end.size and re.fullmatch(r"(\w*_)?\d+", number):
            rows.setdefault(row, []).append(call)
    blocks = max(rows.values(), key=len, default=[])
    count = min(STRETCHES, len(blocks))
    # Rounded up, so that the last stretch ends with the last block.
    spread = [blocks[-(-len(blocks) * part // count) - 1] for part in range(1, count + 1)]
    return [_outermost(block, maps) for block in spread] if count > 1 else [end]


def _outermost(call: Call, maps: Sequence[Call]) -> Call:
    """The last call that gave this very tensor: the whole block or stage, rather than its last layer.

    An identity or a dropout gives the tensor on in eval mode, but it may stand anywhere after the block, and a dropout changes its map in
    train mode. They do not count.
    """
    same = [other for other in maps if other.output is call.output and not isinstance(other.module, nn.Identity | nn.Dropout)]
    return (same or [call])[-1]


def attention(calls: Sequence[Call]) -> list[Call]:
    """The calls that give a number for each pair of T positions, [N, heads, T, T], inside a module that turns T positions into T.

    Such an output has the shape of a map, but its sides are not those of an image.
    """
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
    """The number of positions in a map, or of tokens, whatever their number; 0 of anything else."""
    if isinstance(value, Tensor) and value.dim() == 3:
        return value.shape[1]
    return math.prod(layout.size) if layout else 0
