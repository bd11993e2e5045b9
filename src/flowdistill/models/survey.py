"""What a network that nobody prepared offers: one dry run finds its stages, stem, embedding and classifier."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import FAILURES
from ..randomness import seeded, states
from ..taps import NetSpec, TapSpec
from .state import buffers, kept, shapes

IMAGES = 2  # of the dry run: with one, a batch could be taken for something else
LARGE = 224  # pixels: at the data's own size the last maps of a deep network may have shrunk to one position
STRETCHES = 4  # where all maps are of one size, so many taps are spread over the depth
ROUNDING = 5e-3  # of the largest, in numbers that were cast to half precision or to 8 bits and back
COARSE = 2e-2  # likewise, where what is rounded once more stays as it is
WIDE = 50.0  # what is put in the place of logits: larger than a softmax, a tanh or a cap lets pass, within what quantisers hold
MASKED = -1e4  # a logit below this is that of a class that is masked
SAME = 1e-4  # of the largest, in two answers that are one
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
        altered: why its answer is not what its classifier gives, or empty.
        apart: why the classifier's weights do not make the logits of the embedding, or empty.
        draws: whether its layers draw random numbers in train mode, as dropout does.
        draws_always: whether they do so in eval mode.
        unsettled: whether a pass in eval mode moves its buffers, as observers of quantisation do.
        grown: names of the buffers that have another shape, or are there at all, after a pass.
        order: module path -> when its last call ended, among all.
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
    altered: str
    apart: str
    draws: bool
    draws_always: bool
    unsettled: bool
    grown: frozenset[str]
    order: dict[str, int]
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
        return NetSpec(name, self.taps, self.embedding, self.classes, self.head, self.overstepped, altered=self.altered, apart=self.apart)


def survey(net: nn.Module, channels: int, height: int, width: int) -> Survey:
    """Run a network on random images of this size, and once more on larger ones where it takes them: there stages are told apart best.

    Its modes and buffers stay as they were.

    Raises:
        ValueError: it gives no logits [N, K], or they are not those of a linear layer on a vector, or others when it is asked again.
        Exception: of the network's own, where it can't take such images.
    """
    size = (channels, height, width)
    with _as_it_was(net) as grown:
        before = buffers(net)
        calls, output, overwrites, draws_always = watch(net, *size)
        unsettled = buffers(net) != before
    logits = logits_of(output)
    with _as_it_was(net):
        _refuse_forgetful(net, size, logits)
    with _as_it_was(net):
        head, altered = _head(net, size, _fitting(calls, logits), logits.shape[1])
    with _as_it_was(net) as grown_in_training:
        draws = _draws(net, size, output)
    larger = calls
    factor = -(-LARGE // min(height, width))
    if factor > 1:
        try:
            with _as_it_was(net):
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
        altered=altered,
        apart=_apart(head, logits),
        draws=draws,
        draws_always=draws_always,
        unsettled=unsettled,
        grown=frozenset(grown | grown_in_training),
        order={call.path: call.ended for call in calls},
        overstepped=_overstepped(calls),
        overwrites=overwrites,
        overwritten=frozenset(call.path for call in calls if call.overwritten),
    )


@contextmanager
def _as_it_was(net: nn.Module) -> Iterator[set[str]]:
    """Modes and buffers are put back afterwards; the names of the buffers that had another shape then."""
    modes, before, grown = {module: module.training for module in net.modules()}, shapes(net), set[str]()
    with kept(net):
        try:
            yield grown
        finally:
            grown |= {name for name, shape in shapes(net).items() if before.get(name) != shape}
            for module, mode in modes.items():
                module.training = mode


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
    """A pass in eval mode.

    Attributes:
        calls: every call of a module in the order in which they ended.
        output: what the whole gave.
        overwrites: whether the images were changed.
        draws: whether a global generator was moved.
    """

    calls: list[Call]
    output: Any
    overwrites: bool
    draws: bool


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
    images = _images(net, (channels, height, width))
    before = images.clone()
    try:
        with seeded(0, "dry run", device=images.device):
            began = states()
            output = net.eval()(images)
            draws = states() != began
    finally:
        for handle in handles:
            handle.remove()
    return Watched(calls, output, not torch.equal(images, before), draws)


def _images(net: nn.Module, size: Sequence[int], seed: int = 0) -> Tensor:
    """Random images, where the network is."""
    return torch.rand(IMAGES, *size, generator=torch.Generator().manual_seed(seed)).to(_device(net))


@torch.no_grad()
def _refuse_forgetful(net: nn.Module, size: Sequence[int], logits: Tensor) -> None:
    """Ask again, in eval mode, from the same state of every generator that is known.

    Raises:
        ValueError: the answer is another one.
    """
    images = _images(net, size)
    with seeded(0, "dry run", device=images.device):
        again = logits_of(net.eval()(images))
    largest = float(logits.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(again, logits, rtol=ROUNDING, atol=SAME * largest, equal_nan=True):
        raise ValueError(
            "in eval mode it answers the same images otherwise when it is asked again; let it draw from the global generators of torch, "
            "numpy or Python, which are seeded, and remember nothing of a pass"
        )


@torch.no_grad()
def _draws(net: nn.Module, size: Sequence[int], evaluated: Any) -> bool:
    """Whether a pass in train mode moves a global generator.

    Raises:
        ValueError: it gives something else there than in eval mode.
    """
    device = _device(net)
    with seeded(0, "dry run", device=device):
        began = states()
        try:
            trained = net.train()(torch.zeros(IMAGES, *size, device=device))
        except Exception:  # a batch that is too small for its normalisation: nobody knows
            return True
        draws = states() != began
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


def _fitting(calls: Sequence[Call], logits: Tensor) -> list[Call]:
    """The layers that may have given the logits of a vector, the last ones first.

    Raises:
        ValueError: there is none.
    """

    def fits(call: Call) -> bool:
        given = call.inputs[0] if call.inputs else None
        layer = isinstance(call.module, nn.Linear | nn.Conv2d) and isinstance(call.output, Tensor) and call.output.numel() == logits.numel()
        return layer and isinstance(given, Tensor) and given.flatten(1).shape[1:] == given.shape[1:2]

    if found := [call for call in reversed(calls) if fits(call)]:
        return found
    raise ValueError(f"its {logits.shape[1]} logits are not those of a linear layer on a vector [N, D]")


def _head(net: nn.Module, size: Sequence[int], fitting: Sequence[Call], classes: int) -> tuple[Call, str]:
    """The layer that gives the logits, of several whose mean they are the last; and why the answer is not what it gives, or empty.

    Other numbers are put in the place of what the layers give, small and large ones: the answer must be these, but for one positive
    factor, a shift of each image, as a log-softmax is, rounding, and classes that are masked.

    Raises:
        ValueError: the answer depends on more than one of the layers in another way, or on more than what they give.
    """
    layers = {call.path: call.module for call in reversed(fitting)}
    largest = max(float(_centred(call.output.double().reshape(-1, classes)).abs().max()) for call in fitting)
    near = largest if SAME < largest < WIDE else 1.0

    def asked(training: bool) -> tuple[str, Put]:
        """The layer whose numbers the answer is, or nothing; and what was answered to large numbers."""
        if path := _answered((mixed := _put(net, size, layers, near, WIDE, training=training)).rows):
            return path, mixed
        small, large = (_put(net, size, layers, scale, scale, training=training) for scale in (near, WIDE))  # quantisers look at them all
        path = _answered([small, large])
        if not path and not _answered([small], SAME) and (path := _answered([small], COARSE)):  # it rounds, perhaps
            again = _put(net, size, layers, given=small.answer, training=training)
            path = path if bool((again.answer - small.answer).abs().max() <= SAME * near) else ""
        return path, large

    path, large = asked(training=False)
    if not path:
        path = _only(net, size, layers, large)
        altered = f"it gives {_described(large, path)}"
    else:
        try:
            trained, large = asked(training=True)
            altered = "" if trained else f"in train mode it gives {_described(large, path)}"
        except Exception:  # a batch that is too small for its normalisation: nobody knows
            altered = ""
    return next(call for call in fitting if call.path == path), altered


class Put(NamedTuple):
    """What a network answered where other numbers stood in the place of what layers give.

    Attributes:
        calls: the path and the numbers [N, K] of each call of such a layer.
        answer: [N, K].
    """

    calls: list[tuple[str, Tensor]]
    answer: Tensor

    @property
    def rows(self) -> list[Put]:
        """The same, an image each."""
        return [Put([(path, numbers[row, None]) for path, numbers in self.calls], self.answer[row, None]) for row in range(IMAGES)]


@torch.no_grad()
def _put(
    net: nn.Module,
    size: Sequence[int],
    layers: Mapping[str, nn.Module],
    *scales: float,
    given: Tensor | None = None,
    training: bool = False,
    other: str = "",
    images: int = 0,
) -> Put:
    """A pass with other numbers, after the layers' own hooks; quantisers are switched off.

    Args:
        scales: how large they are at most, for each image.
        given: the numbers themselves.
        other: the layer that gets other numbers than it got without this.
        images: the seed of the images.
    """
    calls: list[tuple[str, Tensor]] = []

    def putting(path: str) -> Any:
        def put(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            chance = torch.Generator().manual_seed(2 * len(calls) + (path == other))
            drawn = (
                torch.tensor(scales)[:, None] * (2 * torch.rand(IMAGES, output[0].numel(), generator=chance) - 1)
                if given is None
                else given
            )
            numbers = drawn.reshape(output.shape).to(output)
            calls.append((path, numbers.reshape(IMAGES, -1).double().cpu()))
            return numbers

        return put

    handles = [layer.register_forward_hook(putting(path)) for path, layer in layers.items()]
    shown = _images(net, size, images)
    try:
        with kept(net), seeded(0, "dry run", device=shown.device):
            for quantiser in net.modules():
                for switch in ("fake_quant_enabled", "observer_enabled"):
                    if isinstance(value := getattr(quantiser, switch, None), Tensor):
                        value.zero_()
            answer = logits_of(net.train(training)(shown))
    finally:
        for handle in handles:
            handle.remove()
    return Put(calls, answer.double().cpu())


def _centred(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Less the mean of each image over the classes that are counted; 0 for the others."""
    counted = torch.ones_like(logits, dtype=torch.bool) if counted is None else counted
    values = logits.where(counted, 0)
    return (values - values.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)).where(counted, 0)


def _answered(puts: Sequence[Put], rounding: float = ROUNDING) -> str:
    """The layer whose numbers were answered, of several whose mean was the last; empty where there is none."""
    paths = [path for path, _ in puts[-1].calls]
    if not paths or any([path for path, _ in put.calls] != paths for put in puts):
        return ""
    pairs = []
    for calls, answer in puts:
        counted = answer > MASKED
        if not answer.where(counted, 0).isfinite().all() or answer.isnan().any() or not bool((counted.sum(1) > 1).all()):
            return ""
        pairs.append((torch.stack([_centred(numbers, counted) for _, numbers in calls]), _centred(answer, counted)))
    numbers, answer = pairs[-1]
    shares = torch.linalg.lstsq(numbers.flatten(1).T, answer.reshape(-1, 1), driver="gelsd").solution[:, 0]
    meant = shares > shares.max() / 2
    factor = shares[meant].sum()
    if factor <= 0:
        return ""
    for numbers, answer in pairs:
        told = factor * numbers[meant].mean(0)
        if not bool((told - answer).abs().max() <= rounding * told.abs().max()):
            return ""
    return [path for path, own in zip(paths, meant.tolist(), strict=True) if own][-1]


def _only(net: nn.Module, size: Sequence[int], layers: Mapping[str, nn.Module], large: Put) -> str:
    """The one layer that decides the answer, and nothing beside it.

    Raises:
        ValueError: there is none.
    """

    def moves(**changed: Any) -> bool:
        before, after = (put.answer.nan_to_num(0, 0, 0) for put in (large, _put(net, size, layers, WIDE, WIDE, **changed)))
        return not bool((after - before).abs().max() <= SAME * before.abs().max())

    deciding = [path for path in layers if moves(other=path)]
    if len(deciding) == 1 and not moves(images=1):
        return deciding[0]
    classes = large.answer.shape[1]
    made = f"are made of several layers' ({', '.join(layers)}), not those of one linear layer on a vector [N, D]"
    alone = "are not those of a linear layer on a vector [N, D]"
    raise ValueError(f"its {classes} logits {made if len(layers) > 1 else alone}")


def _described(large: Put, path: str) -> str:
    """What a network gives that are not the logits of that layer, and what to do."""
    answer, logits = large.answer, f"not the logits of its classifier {path}"
    if bool(((answer >= 0) & (answer <= 1)).all()):
        if bool(((answer.sum(1) - 1).abs() < ROUNDING).all()):
            return f"probabilities, {logits}; leave the softmax out"
        return f"numbers from 0 to 1, {logits}; leave the sigmoid out"
    return f"something else than the logits of its classifier {path} (a positive factor and a shift of each image aside); let it give these"


@torch.no_grad()
def _apart(head: Call, logits: Tensor) -> str:
    """Why the weights of a layer do not make the logits of what it was given, or empty."""
    layer: Any = head.module
    bias = None if layer.bias is None else layer.bias.double()
    made = F.linear(head.inputs[0].flatten(1).double(), layer.weight.flatten(1).double(), bias)
    if not made.isfinite().all() or bool((made - logits.double()).abs().max() <= ROUNDING * made.abs().max()):
        return ""
    return f"its logits are not what the weights of its classifier {head.path} make of the embedding"


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
