"""What a network that nobody prepared offers: one dry run finds its stages, stem, embedding and classifier."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import FAILURES
from ..randomness import seeded
from ..taps import NetSpec, TapSpec

IMAGES = 2  # of the dry run: with one, a batch could be taken for something else
LARGE = 224  # pixels: at the data's own size the last maps of a deep network may have shrunk to one position
STRETCHES = 4  # where all maps are of one size, so many taps are spread over the depth
ROUNDING = 1e-3  # of the largest, in numbers that were cast to half precision and back
PREFIXES = range(6)  # tokens before those of the positions: class, distillation, registers


class Layout(NamedTuple):
    """How a module's output is a map: [N, C, H, W], [N, H, W, C], or [N, prefix + H W, C] tokens."""

    kind: Literal["nchw", "nhwc", "tokens"]
    channels: int
    height: int
    width: int
    prefix: int = 0

    def map(self, output: Tensor) -> Tensor:
        """The output as [N, C, H, W]."""
        if self.kind == "nchw":
            return output
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        positions = output[:, self.prefix :].transpose(1, 2)
        return positions.reshape(-1, self.channels, self.height, self.width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass
class Call:
    """A module that was called in the dry run: when it began and ended among all, on what, and what it gave.

    Attributes:
        version: of the output as the module gave it; operations in place count it up.
    """

    path: str
    module: nn.Module
    began: int
    inputs: tuple[Any, ...]
    given: Layout | None
    ended: int = 0
    output: Any = None
    layout: Layout | None = None
    version: int = 0

    @property
    def overwritten(self) -> bool:
        """Whether its output was changed in place after it was given."""
        return isinstance(self.output, Tensor) and self.output._version != self.version

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the map that it gave."""
        assert self.layout is not None
        return self.layout.channels, *self.layout.size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map that it gave."""
        return self.shape[1:]

    @property
    def pools(self) -> bool:
        """Whether it is a pooling layer."""
        return "Pool" in type(self.module).__name__


@dataclass
class Survey:
    """What the dry run saw.

    Attributes:
        layouts: module path -> how its output is a map, for all whose output is one.
        ends: tap name -> module path, as they were found.
        head, embedding, classes: the classifier's path, its inputs and outputs.
        named: whether the network gives an object that holds the logits, not these themselves.
        draws: whether its layers draw random numbers in train mode, as dropout does.
        overstepped: path of a convolution whose stride is larger than its map, or empty.
        overwrites: whether it changes the images that it is given in place.
        overwritten: paths of modules whose output is changed in place afterwards.
        channels_last: whether it takes images and weights in channels_last memory; ``view`` may not.
    """

    layouts: dict[str, Layout]
    ends: dict[str, str]
    head: str
    embedding: int
    classes: int
    named: bool
    draws: bool
    overstepped: str
    overwrites: bool
    overwritten: frozenset[str]
    channels_last: bool = True
    taps: tuple[TapSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.taps = tuple(self.tap(name, path) for name, path in self.ends.items())

    def tap(self, name: str, path: str) -> TapSpec:
        """A tap at a module whose output is a map."""
        layout = self.layouts[path]
        return TapSpec(name, layout.channels, layout.height, layout.width, path)

    def spec(self, name: str) -> NetSpec:
        """What a network of that name offers."""
        return NetSpec(name, self.taps, self.embedding, self.classes, self.head, self.overstepped)


def survey(net: nn.Module, channels: int, height: int, width: int) -> Survey:
    """Run a network on random images of this size, and once more on larger ones where it takes them: there stages are told apart best.

    Raises:
        ValueError: it gives no logits [N, K], or they are not those of a linear layer on a vector.
        Exception: of the network's own, where it can't take such images.
    """
    calls, output, overwrites = watch(net, channels, height, width)
    logits = logits_of(output)
    head = _head(calls, logits)
    draws = _draws(net, channels, height, width, output)
    larger = calls
    factor = -(-LARGE // min(height, width))
    if factor > 1:
        try:
            larger, *_ = watch(net, channels, height * factor, width * factor)
        except FAILURES:  # it takes one size alone
            larger = calls
    for call in [*_attention(calls), *_attention(larger)]:
        call.layout = None
    layouts = {call.path: call.layout for call in calls if call.layout is not None and call.path}
    seen = {name: path for name, path in find_taps(net, larger).items() if path in layouts and layouts[path].size != (1, 1)}
    stages = [path for name, path in seen.items() if name != "stem"]
    ends = {name: path for name, path in seen.items() if name == "stem"}
    ends |= {f"stage{number}": path for number, path in enumerate(stages, 1)}
    return Survey(
        layouts,
        ends,
        head.path,
        head.inputs[0].shape[1],
        logits.shape[1],
        named=output is not logits,
        draws=draws,
        overstepped=_overstepped(calls),
        overwrites=overwrites,
        overwritten=frozenset(call.path for call in calls if call.overwritten),
    )


@torch.no_grad()
def takes_channels_last(net: nn.Module, channels: int, height: int, width: int) -> bool:
    """Whether a network takes images and weights in channels_last memory; its weights are left in that."""
    images = torch.zeros(IMAGES, channels, height, width).contiguous(memory_format=torch.channels_last)
    try:
        net.to(memory_format=torch.channels_last).eval()(images)
    except Exception:  # it took them otherwise
        return False
    return True


class Watched(NamedTuple):
    """A pass: every call of a module in the order in which they ended, what the whole gave, and whether the images were changed."""

    calls: list[Call]
    output: Any
    overwrites: bool


@torch.no_grad()
def watch(net: nn.Module, channels: int, height: int, width: int) -> Watched:
    """A pass over random images."""
    calls: list[Call] = []
    open_: list[Call] = []
    clock = iter(range(1 << 62))

    def given(inputs: tuple[Any, ...]) -> Layout | None:
        return layout_of(inputs[0], net, height, width) if inputs else None

    def begin(path: str) -> Any:
        def open_call(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = (*inputs, *named.values())
            open_.append(Call(path, module, next(clock), inputs, given(inputs)))

        return open_call

    def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
        call = open_.pop()
        call.ended, call.output = next(clock), output
        call.layout = layout_of(output, net, height, width)
        call.version = output._version if isinstance(output, Tensor) else 0
        calls.append(call)

    handles = [handle for path, module in net.named_modules() for handle in _hooked(module, begin(path), end)]
    images = torch.rand(IMAGES, channels, height, width, generator=torch.Generator().manual_seed(0)).to(_device(net))
    training = {module: module.training for module in net.modules()}
    before = images.clone()
    try:
        output = net.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return Watched(calls, output, not torch.equal(images, before))


@torch.no_grad()
def _draws(net: nn.Module, channels: int, height: int, width: int, evaluated: Any) -> bool:
    """Whether a pass in train mode moves the global generator. The network's statistics stay as they were.

    Raises:
        ValueError: it gives something else there than in eval mode.
    """
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    modes = {module: module.training for module in net.modules()}
    device = _device(net)
    with seeded(0, "dry run", device=device):
        before = torch.get_rng_state()
        try:
            trained = net.train()(torch.zeros(IMAGES, channels, height, width, device=device))
        except Exception:  # a batch that is too small for its normalisation: nobody knows
            return True
        finally:
            for module, mode in modes.items():
                module.training = mode
            for name, value in net.named_buffers():
                value.copy_(buffers[name])
        draws = not torch.equal(torch.get_rng_state(), before)
    if isinstance(trained, Tensor) != isinstance(evaluated, Tensor) or _shape(trained) != _shape(evaluated):
        what = f"logits {list(_shape(trained))}" if isinstance(trained, Tensor) else f"a {type(trained).__name__}"
        cure = "switch its auxiliary heads off (such as aux_logits=False), or wrap it so that it gives logits alone"
        raise ValueError(f"in train mode it gives {what}, in eval mode logits {list(_shape(evaluated))}; {cure}")
    return draws


def _shape(output: Any) -> tuple[int, ...]:
    return tuple(getattr(getattr(output, "logits", output), "shape", ()))


def _device(net: nn.Module) -> torch.device:
    return next((parameter.device for parameter in net.parameters()), torch.device("cpu"))


def _hooked(module: nn.Module, begin: Any, end: Any) -> Iterator[Any]:
    yield module.register_forward_pre_hook(begin, with_kwargs=True)
    yield module.register_forward_hook(end)


def logits_of(output: Any) -> Tensor:
    """The logits of what a network gives: a tensor, or an object that holds one as ``logits``.

    Raises:
        ValueError: neither.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"it gives {what}, not logits [N, classes]")
    return logits


def layout_of(output: Any, net: nn.Module, height: int, width: int) -> Layout | None:
    """How an output is a map of images of this size, or None."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4) or output.shape[0] != IMAGES:
        return None

    def fits(h: int, w: int) -> bool:
        """Whether both sides shrank alike, up to rounding."""
        return 0 < h <= height and 0 < w <= width and abs(h * width - w * height) < max(height, width)

    _, *sides = output.shape
    if len(sides) == 3:
        if fits(*sides[1:]):
            return Layout("nchw", sides[0], *sides[1:])
        return Layout("nhwc", sides[2], *sides[:2]) if fits(*sides[:2]) else None
    declared = getattr(net, "num_prefix_tokens", None)
    for prefix in [declared] if isinstance(declared, int) else PREFIXES:
        positions = sides[0] - prefix
        for w in range(1, width + 1):
            if positions % w == 0 and fits(positions // w, w):
                return Layout("tokens", sides[1], positions // w, w, prefix)
    return None


def _head(calls: Sequence[Call], logits: Tensor) -> Call:
    """The layer that gave the logits of a vector: that whose output they are, or the only one with so many outputs.

    Of several whose mean they are it is the last.
    """

    def fits(call: Call) -> bool:
        given = call.inputs[0] if call.inputs else None
        layer = isinstance(call.module, nn.Linear | nn.Conv2d) and isinstance(call.output, Tensor) and call.output.numel() == logits.numel()
        return layer and isinstance(given, Tensor) and given.flatten(1).shape[1:] == given.shape[1:2]

    fitting = [call for call in reversed(calls) if fits(call)]
    if not fitting:
        raise ValueError(f"its {logits.shape[1]} logits are not those of a linear layer on a vector [N, D]")
    outputs = [call.output.reshape(logits.shape).double() for call in fitting]
    found = [call for call in fitting if call.output is logits]
    found += [call for call, output in zip(fitting, outputs, strict=True) if _tells(output, logits)]
    if found or len(fitting) == 1 or _tells(torch.stack(outputs).mean(0), logits):
        return (found or fitting)[0]
    layers = ", ".join(dict.fromkeys(call.path for call in reversed(fitting)))
    raise ValueError(
        f"its {logits.shape[1]} logits are made of several layers' ({layers}), not those of one linear layer on a vector [N, D]"
    )


def _tells(output: Tensor, logits: Tensor) -> bool:
    """Whether logits are such an output but for their precision, one factor, and a shift of each image, as a log-softmax is."""
    one, other = (x.double() - x.double().mean(1, keepdim=True) for x in (output, logits))
    factor = (one * other).sum() / one.square().sum().clamp(min=1e-30)
    return bool((factor * one - other).abs().max() <= ROUNDING * other.abs().max())


def _overstepped(calls: Sequence[Call]) -> str:
    """The first convolution with a window whose stride is larger than its map; depthwise ones aside."""

    def steps_over(layer: nn.Module, given: Sequence[Any]) -> bool:
        if not isinstance(layer, nn.Conv2d) or max(layer.kernel_size) == 1 or layer.groups == layer.in_channels or not given:
            return False
        return any(stride > side for stride, side in zip(layer.stride, given[0].shape[-2:], strict=True))

    return next((call.path for call in calls if steps_over(call.module, call.inputs)), "")


def _attention(calls: Sequence[Call]) -> list[Call]:
    """Those that give a number for each pair of T positions, [N, heads, T, T], inside of a module that turns T positions into T."""
    around: dict[int, list[Call]] = {}
    for call in calls:
        count = _positions(call.output, call.layout)
        if count > 1 and call.inputs and count == _positions(call.inputs[0], call.given):
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
        left = max((call.began for call in leaving if call.given and level[call.given.size] == size), default=maps[-1].ended + 1)
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
    first = next((place for place, call in enumerate(leaves) if isinstance(call.module, nn.Conv2d)), len(leaves))
    found = leaves[first : first + 1]
    for call in leaves[first + 1 :]:
        beside = found[0].path.rpartition(".")[0]
        if not call.path.startswith(beside) or call.pools or call.shape != found[0].shape:
            break
        sibling = call.path[: f"{call.path}.".index(".", len(beside) + 1 if beside else 0)]
        if any(isinstance(inner, nn.Conv2d | nn.Linear) for inner in net.get_submodule(sibling).modules()):
            break
        found.append(call)
    return [_outermost(call, maps) for call in found[-1:]]


def _transitions(maps: Sequence[Call], level: Mapping[tuple[int, int], tuple[int, int]]) -> list[Call]:
    """The outermost calls from a map of one size to one of another, with no third inside; gates, which are of one position, aside."""

    def simple(call: Call) -> bool:
        if call.given is None or not {call.given.size, call.size} <= level.keys() or level[call.given.size] == level[call.size]:
            return False
        inside = {level.get(inner.size) for inner in maps if call.began < inner.began and inner.ended < call.ended}
        return inside <= {level[call.given.size], level[call.size], None}

    found: list[Call] = []
    for call in sorted(maps, key=lambda call: call.began):
        if simple(call) and not any(outer.began < call.began and call.ended < outer.ended for outer in found):
            found.append(call)
    return found


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
