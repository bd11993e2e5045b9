"""Whether the positions of a map stand where the image's do: parts of an image are changed, and the positions that answer are looked at.

A shape does not tell. 65 tokens may be 64 positions after a class token or before one, in the order of rows, of columns or of windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import FAILURES, pass_on_shortage
from ..randomness import seeded
from .watching import Call, Layout, device_of, readings

AGREES = 0.5  # of the strongest answer: what the position of a changed part gives at least, on average
AS_GOOD = 0.75  # of the best reading: an earlier one, which is likelier, is taken before it
FAINT = 1e-3  # of the largest change: a change below it tells nothing

Cells = list[tuple[int, int]]


@torch.no_grad()
def settle(net: nn.Module, calls: Sequence[Call], channels: int, height: int, width: int) -> set[str]:
    """Choose for every module the reading of its output under which its positions answer to their own parts of the image.

    Only what can be read in several ways is asked, and what is not [N, C, H, W]. Where other positions answer, the output is no map.

    Args:
        calls: of a pass over images of this size. Their layouts are changed.

    Returns:
        Paths of the modules whose output has the shape of a map and is none.
    """
    asked: dict[str, list[Layout]] = {}
    last = {call.path: call for call in calls}  # a hook on a module that is used again sees its last output alone
    for call in last.values():
        found = [layout for layout in readings(call.output, net, height, width) if layout.size != (1, 1)]
        if len(found) > 1 or (found and found[0].kind != "nchw"):
            asked[call.path] = found
    scores: dict[tuple[str, Layout], float] = {}
    for size in {layout.size for layouts in asked.values() for layout in layouts}:
        here = {path: [layout for layout in layouts if layout.size == size] for path, layouts in asked.items()}
        try:
            scores |= _scores(net, here, channels, height, width, size)
        except FAILURES as error:  # it takes no such batch: nobody knows
            pass_on_shortage(error)
    chosen = {path: _choose(layouts, [scores.get((path, layout), 1.0) for layout in layouts]) for path, layouts in asked.items()}
    # What attention gives inside of a block answers to everything alike, and proves nothing; the block's own output does.
    for block in [path for path, layout in chosen.items() if path and layout is None]:
        chosen |= dict.fromkeys(path for path in chosen if path.startswith(f"{block}."))
    for call in calls:
        if call.path in chosen and (call is last[call.path] or chosen[call.path] is None):
            call.layout = chosen[call.path]
    return {path for path, layout in chosen.items() if layout is None}


def _choose(layouts: Sequence[Layout], scores: Sequence[float]) -> Layout | None:
    """The first reading that agrees, or is all but as good as the best that does. Convolutions mix, so [N, C, H, W] is never refused."""
    least = max(AGREES, AS_GOOD * max(scores))
    for layout, score in zip(layouts, scores, strict=True):
        if score >= (AGREES if layout.kind == "nchw" else least):
            return layout
    return next((layout for layout in layouts if layout.kind == "nchw"), None)


def _cells(height: int, width: int) -> Cells:
    """Positions that rotations, reflections, other orders and a step aside take elsewhere."""
    return [(0, width - 1), (height - 1, 0), (height // 2, width // 3), (0, 0)]


def _scores(
    net: nn.Module, asked: Mapping[str, Sequence[Layout]], channels: int, height: int, width: int, size: tuple[int, int]
) -> dict[tuple[str, Layout], float]:
    """How well each reading of a module's output agrees with a grid of this size: 1 if no position answers more than the one it should."""
    cells = _cells(*size)
    images = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0)).repeat(1 + len(cells), 1, 1, 1)
    others = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(1))[0]
    for image, (y, x) in zip(images[1:], cells, strict=True):
        part = (..., _stretch(y, size[0], height), _stretch(x, size[1], width))
        image[part] = others[part]
    scores: dict[tuple[str, Layout], float] = {}

    def look(path: str, layouts: Sequence[Layout]) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            changes = {layout.kind: _change(output, layout) for layout in layouts}
            scores.update(((path, layout), _agreement(changes[layout.kind], layout, cells)) for layout in layouts)

        return hook

    modules = dict(net.named_modules())
    handles = [modules[path].register_forward_hook(look(path, layouts)) for path, layouts in asked.items() if layouts]
    try:
        with seeded(0, "places", device=device_of(net)):
            net.eval()(images.to(device_of(net)))
    finally:
        for handle in handles:
            handle.remove()
    return scores


def _stretch(number: int, count: int, length: int) -> slice:
    """The pixels of one position of so many."""
    return slice(number * length // count, max(-(-(number + 1) * length // count), 1))


def _change(output: Tensor, layout: Layout) -> Tensor:
    """[K, T]: how much each of T positions, tokens that stand for none among them, differs between an image and K changed ones."""
    positions = output if layout.kind == "tokens" else layout.map(output).flatten(2).transpose(1, 2)  # [1 + K, T, C]
    change: Tensor = torch.linalg.vector_norm(positions[1:] - positions[:1], dim=2).double()
    return change


def _agreement(change: Tensor, layout: Layout, cells: Cells) -> float:
    """How much the positions of changed cells answer, of the strongest answer, on average.

    An answer is the change of a position against its own changes when other cells are changed: some positions answer to anything.
    """
    elsewhere = (change.sum(0) - change) / (len(cells) - 1)
    answer = change / (elsewhere + FAINT * change.max())
    at = torch.tensor([layout.prefix + y * layout.width + x for y, x in cells], device=answer.device)
    share = answer.gather(1, at[:, None])[:, 0] / answer.amax(1)
    return float(share.nan_to_num(1.0).mean())  # where nothing changes nothing is told
