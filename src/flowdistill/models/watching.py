"""A pass through a network that watches every module: its inputs and its output, and which outputs are maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..randomness import seeded, states

IMAGES = 2  # of the dry run: with one, a batch could be taken for something else
MOST_EXTRA = 5  # tokens beside those of the positions: class, distillation, registers


class Layout(NamedTuple):
    """How a module's output is a map: [N, C, H, W], [N, H, W, C], or tokens [N, T, C]: ``prefix`` others, H W positions, and the rest."""

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
        positions = output[:, self.prefix : self.prefix + self.height * self.width].transpose(1, 2)
        return positions.reshape(-1, self.channels, self.height, self.width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass
class Call:
    """A call of a module in the dry run.

    Attributes:
        path: the module's path in the network, empty for the network itself.
        began, ended: its turn among the beginnings and ends of all calls.
        inputs: positional inputs, then those by keyword.
        input_layout: how the first input is a map, or None.
        layout: how the output is a map, or None.
        version: of the output as the module gave it; operations in place count it up.
    """

    path: str
    module: nn.Module
    began: int
    inputs: tuple[Any, ...]
    input_layout: Layout | None
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


class Watched(NamedTuple):
    """A pass in eval mode.

    Attributes:
        calls: every call of a module in the order in which they ended.
        output: what the network gave.
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

    def first_layout(inputs: tuple[Any, ...]) -> Layout | None:
        return layout_of(inputs[0], net, height, width) if inputs else None

    def begin(path: str) -> Any:
        def open_call(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = (*inputs, *named.values())
            open_.append(Call(path, module, next(clock), inputs, first_layout(inputs)))

        return open_call

    def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
        call = open_.pop()
        call.ended, call.output = next(clock), output
        call.layout = layout_of(output, net, height, width)
        call.version = output._version if isinstance(output, Tensor) else 0
        calls.append(call)

    handles = [handle for path, module in net.named_modules() for handle in _hooked(module, begin(path), end)]
    images = images_for(net, (channels, height, width))
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


def images_for(net: nn.Module, size: Sequence[int], seed: int = 0) -> Tensor:
    """Random images, where the network is."""
    return torch.rand(IMAGES, *size, generator=torch.Generator().manual_seed(seed)).to(device_of(net))


def device_of(net: nn.Module) -> torch.device:
    """Where its parameters are."""
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
        description = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"it gives {description}, not logits [N, classes]")
    return logits


def layout_of(output: Any, net: nn.Module, height: int, width: int) -> Layout | None:
    """How an output is a map of images of this size, if nothing but its shape is asked: the first of its readings, or None."""
    return next(iter(readings(output, net, height, width)), None)


def readings(output: Any, net: nn.Module, height: int, width: int) -> list[Layout]:
    """Every way in which an output of the dry run may be a map of images of this size, by its shape; the likeliest is first."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4) or output.shape[0] != IMAGES:
        return []

    def fits(h: int, w: int) -> bool:
        """Whether both sides shrank alike, up to rounding."""
        return 0 < h <= height and 0 < w <= width and abs(h * width - w * height) < max(height, width)

    _, *sides = output.shape
    if len(sides) == 3:
        layouts = [Layout("nchw", sides[0], *sides[1:]), Layout("nhwc", sides[2], *sides[:2])]
        return [layout for layout in layouts if fits(*layout.size)]
    return [
        Layout("tokens", sides[1], positions // w, w, prefix)
        for prefix, suffix in _extras(net)
        if (positions := sides[0] - prefix - suffix) > 0
        for w in range(1, width + 1)
        if positions % w == 0 and fits(positions // w, w)
    ]


def _extras(net: nn.Module) -> list[tuple[int, int]]:
    """Numbers of tokens before and behind those of the positions: what timm's networks declare, few before, some behind."""
    pairs = [(prefix, suffix) for suffix in range(MOST_EXTRA + 1) for prefix in range(MOST_EXTRA + 1 - suffix)]
    declared = (getattr(module, "num_prefix_tokens", None) for module in net.modules())
    prefix = next((value for value in declared if isinstance(value, int)), 0)
    return [(prefix, 0), *(pair for pair in pairs if pair != (prefix, 0))]
