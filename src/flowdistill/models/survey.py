"""What a network that nobody prepared offers: one dry run finds its stages, stem, embedding and classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import FAILURES, pass_on_shortage
from ..randomness import seeded, states
from ..types import NetSpec, TapSpec
from .features import Pooling, pooling_of
from .head import ROUNDING, SAME, apart, candidates, find_head
from .places import settle
from .stages import attention, find_taps
from .state import buffers, kept, shapes
from .watching import IMAGES, Call, Layout, device_of, images_for, logits_of, watch

LARGE = 224  # pixels: at the data's own size the last maps of a deep network may have shrunk to one position


@dataclass
class Survey:
    """What the dry run saw.

    Attributes:
        layouts: module path -> how its output is a map, for all whose output is one.
        ends: tap name -> module path, as the dry run found them.
        stages: likewise, with the stages whose maps have a single position at this size, which are no taps.
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
        overwrites: whether it changes its input images in place.
        overwritten: paths of modules whose output is changed in place afterwards.
        unread: why its tokens are no maps, or empty if no stage is missed for it.
        pooling: how its output becomes the embedding, if it has no classifier; then ``head`` is empty and ``classes`` 0.
        channels_last: whether it takes images and weights in channels_last memory; ``view`` may not.
    """

    layouts: dict[str, Layout]
    ends: dict[str, str]
    stages: dict[str, str]
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
    unread: str = ""
    pooling: Pooling | None = None
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
        return NetSpec(
            name,
            self.taps,
            self.embedding,
            self.classes,
            self.head,
            self.overstepped,
            altered=self.altered,
            apart=self.apart,
            unread=self.unread,
        )


def survey(net: nn.Module, channels: int, height: int, width: int, classes: int | None = None, *, bare: bool = False) -> Survey:
    """Run a network on random images of this size, and once more on larger ones if it takes them: they tell stages apart best.

    Its modes and buffers stay as they were.

    Args:
        classes: the number of logits that a classifier would give here. What gives another number of values and has no classifier gives
            features. Default: the network must have a classifier.
        bare: whether its maker left its classifier out, so that whatever it gives are features, also of a linear layer.

    Raises:
        ValueError: it gives no logits [N, K], or they are not those of a linear layer on a vector, or it gives others when it is asked
            again.
        Exception: the network's own, if it can't take such images.
    """
    size = (channels, height, width)
    with _as_it_was(net) as grown:
        before = buffers(net)
        calls, output, overwrites, draws_always = watch(net, *size)
        unsettled = buffers(net) != before
    with _as_it_was(net):
        misplaced: Set[str] = frozenset() if draws_always else settle(net, calls, *size)
    pooling = pooling_of(output, calls, net, height, width) if bare else None
    head: Call | None = None
    if pooling is None:
        try:
            logits = logits_of(output)
            fitting = candidates(calls, logits)
        except ValueError:
            if classes is None or 0 < classes == _width(output):
                raise
            pooling = pooling_of(output, calls, net, height, width)
    answer_of: Callable[[Any], Tensor] = pooling.__call__ if pooling else logits_of
    with _as_it_was(net):
        _refuse_forgetful(net, size, answer_of, answer_of(output))
    altered = ""
    if pooling is None:
        with _as_it_was(net):
            head, altered = find_head(net, size, fitting, logits.shape[1])
    with _as_it_was(net) as grown_in_training:
        draws = _draws(net, size, output)
    # At the data's size the late stages of a deep network may have shrunk to one position each, and then no size tells them apart.
    larger = calls
    factor = -(-LARGE // min(height, width))
    if factor > 1:
        try:
            with _as_it_was(net):
                larger, *_ = watch(net, channels, height * factor, width * factor)
        except FAILURES as error:  # it takes one size alone
            pass_on_shortage(error)
            larger = calls
    # What attention gives has the shape of a map, and is none; so have tokens in an order that is not the image's. No stage ends there,
    # and nobody may tap it.
    for call in [*attention(calls), *attention(larger), *(call for call in larger if call.path in misplaced)]:
        call.layout = None
    layouts = {call.path: call.layout for call in calls if call.layout is not None and call.path}
    # Students and teachers see the data's size: a tap must be a map of more than one position there. The stages that are left are numbered
    # anew, without gaps.
    found = find_taps(net, larger)
    taps = {name: path for name, path in found.items() if path in layouts and layouts[path].size != (1, 1)}
    stages = [path for name, path in taps.items() if name != "stem"]
    ends = {name: path for name, path in taps.items() if name == "stem"}
    ends |= {f"stage{number}": path for number, path in enumerate(stages, 1)}
    return Survey(
        layouts,
        ends,
        found,
        head.path if head else "",
        head.inputs[0].shape[1] if head else answer_of(output).shape[1],
        logits.shape[1] if head else 0,
        named=head is not None and output is not logits,
        altered=altered,
        apart=apart(head, logits) if head else "",
        draws=draws,
        draws_always=draws_always,
        unsettled=unsettled,
        grown=frozenset(grown | grown_in_training),
        order={call.path: call.ended for call in calls},
        overstepped=_overstepped(calls),
        overwrites=overwrites,
        overwritten=frozenset(call.path for call in calls if call.overwritten),
        unread="" if stages else _unread(calls, misplaced, height, width),
        pooling=pooling,
    )


def _unread(calls: Sequence[Call], misplaced: Set[str], height: int, width: int) -> str:
    """Which tokens are no map of the image, and why; empty if there are none."""
    for call in calls:
        if call.path and isinstance(call.output, Tensor) and call.output.dim() == 3 and call.output.shape[1] > 1 and call.layout is None:
            why = "are not in the order of the positions of" if call.path in misplaced else "fill no grid of the shape of"
            return f"the {call.output.shape[1]} tokens of {call.path} {why} a {height}x{width} image"
    return ""


def _width(output: Any) -> int:
    """K of an answer [N, K]; 0 for anything else."""
    shape = _shape(output)
    return shape[1] if len(shape) == 2 else 0


@contextmanager
def _as_it_was(net: nn.Module) -> Iterator[set[str]]:
    """Put modes and buffers back afterwards. The set then holds the names of the buffers that had taken another shape."""
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
    except Exception as error:  # it took them otherwise
        pass_on_shortage(error)
        return False
    return True


@torch.no_grad()
def _refuse_forgetful(net: nn.Module, size: Sequence[int], answer_of: Callable[[Any], Tensor], answer: Tensor) -> None:
    """Ask again, in eval mode, from the same state of every generator that is known.

    Raises:
        ValueError: the answer is another one.
    """
    images = images_for(net, size)
    with seeded(0, "dry run", device=images.device):
        again = answer_of(net.eval()(images))
    largest = float(answer.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(again, answer, rtol=ROUNDING, atol=SAME * largest, equal_nan=True):
        raise ValueError(
            "in eval mode it answers the same images otherwise when it is asked again; let it draw from the global generators of torch, "
            "numpy or Python, which are seeded, and remember nothing of a pass"
        )


@torch.no_grad()
def _draws(net: nn.Module, size: Sequence[int], eval_output: Any) -> bool:
    """Whether a pass in train mode moves a global generator.

    Raises:
        ValueError: it gives something else there than in eval mode.
    """
    device = device_of(net)
    with seeded(0, "dry run", device=device):
        began = states()
        try:
            train_output = net.train()(torch.zeros(IMAGES, *size, device=device))
        except Exception as error:  # a batch that is too small for its normalisation: nobody knows
            pass_on_shortage(error)
            return True
        draws = states() != began
    if isinstance(train_output, Tensor) != isinstance(eval_output, Tensor) or _shape(train_output) != _shape(eval_output):
        description = f"logits {list(_shape(train_output))}" if isinstance(train_output, Tensor) else f"a {type(train_output).__name__}"
        cure = "switch its auxiliary heads off (such as aux_logits=False), or wrap it so that it gives logits alone"
        raise ValueError(f"in train mode it gives {description}, in eval mode logits {list(_shape(eval_output))}; {cure}")
    return draws


def _shape(output: Any) -> tuple[int, ...]:
    return tuple(getattr(getattr(output, "logits", output), "shape", ()))


def _overstepped(calls: Sequence[Call]) -> str:
    """The first convolution with a window whose stride is larger than its map; depthwise ones aside."""

    def steps_over(layer: nn.Module, inputs: Sequence[Any]) -> bool:
        if not isinstance(layer, nn.Conv2d) or max(layer.kernel_size) == 1 or layer.groups == layer.in_channels or not inputs:
            return False
        return any(stride > side for stride, side in zip(layer.stride, inputs[0].shape[-2:], strict=True))

    return next((call.path for call in calls if steps_over(call.module, call.inputs)), "")
