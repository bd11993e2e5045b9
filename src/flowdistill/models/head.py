"""Which layer is a network's classifier, and whether the network's answer is what that layer gives.

To find out, other numbers are put in the place of what a layer gives, and the answer is compared with them. So a softmax, a cap or another
order of classes shows, however small the logits of an untrained network are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import pass_on_shortage
from ..randomness import seeded
from .state import kept
from .watching import IMAGES, Call, images_for, logits_of

ROUNDING = 5e-3  # of the largest, in numbers that were cast to half precision or to 8 bits and back
COARSE = 2e-2  # likewise, if numbers that are rounded already stay as they are
WIDE = 50.0  # what is put in the place of logits: larger than a softmax, a tanh or a cap lets pass, within what quantisers hold
MASKED = -1e4  # a logit below this is that of a class that is masked
SAME = 1e-4  # of the largest, in two answers that are one


def candidates(calls: Sequence[Call], logits: Tensor) -> list[Call]:
    """The calls of layers that may have made the logits of a vector, the last one first.

    Raises:
        ValueError: there is no such call.
    """

    def fits(call: Call) -> bool:
        layer_input = call.inputs[0] if call.inputs else None
        layer = isinstance(call.module, nn.Linear | nn.Conv2d) and isinstance(call.output, Tensor) and call.output.numel() == logits.numel()
        return layer and isinstance(layer_input, Tensor) and layer_input.flatten(1).shape[1:] == layer_input.shape[1:2]

    if fitting := [call for call in reversed(calls) if fits(call)]:
        return fitting
    raise ValueError(f"its {logits.shape[1]} logits are not those of a linear layer on a vector [N, D]")


def find_head(net: nn.Module, size: Sequence[int], fitting: Sequence[Call], classes: int) -> tuple[Call, str]:
    """The layer that gives the logits, and why the answer is not what it gives, or empty.

    If the logits are the mean of what several layers give, it is the last one. Other numbers, small and large, are put in the place of what
    the layers give. The answer must be these numbers, up to one positive factor, a shift of each image, as a log-softmax makes, rounding,
    and classes that are masked.

    Args:
        size: channels, height and width of the images.
        fitting: the ``candidates``.
        classes: the number of logits per image.

    Raises:
        ValueError: the answer depends on more than one of the layers in another way, or on more than what they give.
    """
    layers = {call.path: call.module for call in reversed(fitting)}
    largest = max(float(_centred(call.output.double().reshape(-1, classes)).abs().max()) for call in fitting)
    near = largest if SAME < largest < WIDE else 1.0

    def asked(training: bool) -> tuple[str, Put]:
        """The layer whose numbers the answer is, or empty; and what was answered to large numbers."""
        if path := _answered((mixed := _put(net, size, layers, near, WIDE, training=training)).rows):
            return path, mixed
        # A quantiser may choose one step for a whole batch, too large for small numbers: each scale gets a batch of its own.
        small, large = (_put(net, size, layers, scale, scale, training=training) for scale in (near, WIDE))
        path = _answered([small, large])
        # A coarse match may be rounding. Numbers that are rounded already stay as they are if they are put in again; a softmax moves them.
        if not path and not _answered([small], SAME) and (path := _answered([small], COARSE)):
            again = _put(net, size, layers, values=small.answer, training=training)
            path = path if bool((again.answer - small.answer).abs().max() <= SAME * near) else ""
        return path, large

    path, large = asked(training=False)
    if not path:
        path = _only(net, size, layers, large)
        altered = f"it gives {_described(large, path)}"
    else:
        try:
            train_path, large = asked(training=True)
            altered = "" if train_path else f"in train mode it gives {_described(large, path)}"
        except Exception as error:  # a batch that is too small for its normalisation: nobody knows
            pass_on_shortage(error)
            altered = ""
    return next(call for call in fitting if call.path == path), altered


class Put(NamedTuple):
    """What a network answered when other numbers stood in the place of what layers give.

    Attributes:
        calls: the path and the numbers [N, K] of each call of such a layer.
        answer: [N, K].
    """

    calls: list[tuple[str, Tensor]]
    answer: Tensor

    @property
    def rows(self) -> list[Put]:
        """The same for each image alone."""
        return [Put([(path, numbers[row, None]) for path, numbers in self.calls], self.answer[row, None]) for row in range(IMAGES)]


@torch.no_grad()
def _put(
    net: nn.Module,
    size: Sequence[int],
    layers: Mapping[str, nn.Module],
    *scales: float,
    values: Tensor | None = None,
    training: bool = False,
    redrawn: str = "",
    image_seed: int = 0,
) -> Put:
    """A pass with other numbers in the place of what layers give, after the layers' own hooks; quantisers are switched off.

    Args:
        size: channels, height and width of the images.
        layers: path -> layer.
        scales: how large the numbers are at most, one for each image.
        values: the numbers themselves. Default: drawn at random.
        training: whether the network is in train mode. Default: False.
        redrawn: the path of a layer that gets other random numbers than it gets by default.
        image_seed: the seed of the images. Default: 0.
    """
    calls: list[tuple[str, Tensor]] = []

    def putting(path: str) -> Any:
        def put(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            chance = torch.Generator().manual_seed(2 * len(calls) + (path == redrawn))
            drawn = (
                torch.tensor(scales)[:, None] * (2 * torch.rand(IMAGES, output[0].numel(), generator=chance) - 1)
                if values is None
                else values
            )
            numbers = drawn.reshape(output.shape).to(output)
            calls.append((path, numbers.reshape(IMAGES, -1).double().cpu()))
            return numbers

        return put

    handles = [layer.register_forward_hook(putting(path)) for path, layer in layers.items()]
    images = images_for(net, size, image_seed)
    try:
        with kept(net), seeded(0, "dry run", device=images.device):
            for quantiser in net.modules():
                for switch in ("fake_quant_enabled", "observer_enabled"):
                    if isinstance(value := getattr(quantiser, switch, None), Tensor):
                        value.zero_()
            answer = logits_of(net.train(training)(images))
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
    """The layer whose numbers were answered; the last one of several if it was their mean; empty if there is none."""
    paths = [path for path, _ in puts[-1].calls]
    if not paths or any([path for path, _ in put.calls] != paths for put in puts):
        return ""
    pairs = []
    for calls, answer in puts:
        counted = answer > MASKED
        if not answer.where(counted, 0).isfinite().all() or answer.isnan().any() or not bool((counted.sum(1) > 1).all()):
            return ""
        pairs.append((torch.stack([_centred(numbers, counted) for _, numbers in calls]), _centred(answer, counted)))
    # The answer as a sum of the calls' numbers, by least squares. Calls with a small share have no part in it: the others' mean is tried.
    numbers, answer = pairs[-1]
    shares = torch.linalg.lstsq(numbers.flatten(1).T, answer.reshape(-1, 1), driver="gelsd").solution[:, 0]
    meant = shares > shares.max() / 2
    factor = shares[meant].sum()
    if factor <= 0:
        return ""
    for numbers, answer in pairs:
        expected = factor * numbers[meant].mean(0)
        if not bool((expected - answer).abs().max() <= rounding * expected.abs().max()):
            return ""
    return [path for path, is_meant in zip(paths, meant.tolist(), strict=True) if is_meant][-1]


def _only(net: nn.Module, size: Sequence[int], layers: Mapping[str, nn.Module], large: Put) -> str:
    """The one layer that decides the answer, and nothing beside it.

    Raises:
        ValueError: there is none.
    """

    def moves(**changed: Any) -> bool:
        before, after = (put.answer.nan_to_num(0, 0, 0) for put in (large, _put(net, size, layers, WIDE, WIDE, **changed)))
        return not bool((after - before).abs().max() <= SAME * before.abs().max())

    deciding = [path for path in layers if moves(redrawn=path)]
    if len(deciding) == 1 and not moves(image_seed=1):
        return deciding[0]
    classes = large.answer.shape[1]
    made = f"are made of several layers' ({', '.join(layers)}), not those of one linear layer on a vector [N, D]"
    alone = "are not those of a linear layer on a vector [N, D]"
    raise ValueError(f"its {classes} logits {made if len(layers) > 1 else alone}")


def _described(large: Put, path: str) -> str:
    """In words, an answer that is not the logits of that layer, and what to do."""
    answer, logits = large.answer, f"not the logits of its classifier {path}"
    if bool(((answer >= 0) & (answer <= 1)).all()):
        if bool(((answer.sum(1) - 1).abs() < ROUNDING).all()):
            return f"probabilities, {logits}; leave the softmax out"
        return f"numbers from 0 to 1, {logits}; leave the sigmoid out"
    return f"something else than the logits of its classifier {path} (a positive factor and a shift of each image aside); let it give these"


@torch.no_grad()
def apart(head: Call, logits: Tensor) -> str:
    """Why the weights of a layer do not make the logits of its input, or empty."""
    layer: Any = head.module
    bias = None if layer.bias is None else layer.bias.double()
    made = F.linear(head.inputs[0].flatten(1).double(), layer.weight.flatten(1).double(), bias)
    if not made.isfinite().all() or bool((made - logits.double()).abs().max() <= ROUNDING * made.abs().max()):
        return ""
    return f"its logits are not what the weights of its classifier {head.path} make of the embedding"
