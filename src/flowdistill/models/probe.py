"""A network's answers to a fixed batch, in a few numbers: whether it still computes what it did."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..checks import FAILURES, pass_on_shortage
from ..randomness import seeded
from ..types import Outputs
from .base import Network

Answers = Mapping[str, Sequence[float]]
"""What was looked at -> its norm and three fixed projections of it. JSON can hold it."""

TOLERANCES = {"eval": 1e-4, "train": 1e-3, "buffers": 1e-3, "gradient": 1e-2}
"""How far two answers may differ, relative to the larger norm: processors, threads and versions of torch round differently. In train mode
batch normalisations divide by the spread of a few images, and a rounding may turn a ReLU's gradient."""
PIXELS = 8 * 64 * 64  # of a probe batch, if that leaves it two images or more
IMAGES = (2, 8)  # at least and at most
SECONDS = 0.5  # of processor time for the answer in eval mode; a slower network is asked for nothing else
LONGEST = 1 << 14  # numbers of one tensor that are projected
FLAT = 1e-2  # of the largest gradient's norm: the norm of a smaller one counts as so much
GRADIENTS = 8  # parameters whose gradients are looked at, spread over the depth


def probe(net: Network, channels: int, height: int, width: int, *, trains: bool) -> dict[str, list[float]]:
    """A network's answers to a fixed batch, in fp32 on the CPU: logits and taps in eval mode.

    If it ``trains``, also logits and taps in train mode, its buffers after that, and gradients. If its code fails, the answers until then.
    The network is of no use afterwards: its batch statistics moved.

    Args:
        channels, height, width: of the images that the network itself takes, without its input adapter.
        trains: whether it will be trained.
    """
    count = min(max(PIXELS // (height * width), IMAGES[0]), IMAGES[1])
    answers: dict[str, list[float]] = {}
    with seeded(0, "probe"), torch.device("cpu"), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        images = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))
        started = time.process_time()
        try:
            answers |= _signatures("eval", net.eval().answer(images), net.spec.version)
            if trains and time.process_time() - started <= SECONDS:
                answers |= _in_training(net, images)
        except FAILURES as error:  # of its own code, which can't take such images or such a batch
            pass_on_shortage(error)
    return answers


def _in_training(net: Network, images: Tensor) -> Iterator[tuple[str, list[float]]]:
    outputs = net.train().answer(images)
    yield from _signatures("train", outputs, net.spec.version).items()
    moved = [value.detach().double().flatten() for _, value in sorted(net.named_buffers()) if value.is_floating_point()]
    yield "buffers", _signature(torch.cat(moved)) if moved else [0.0]
    weights = [(name, parameter) for name, parameter in net.body.named_parameters() if parameter.requires_grad]
    answer = outputs.logits if outputs.logits.shape[1] else outputs.embedding
    if answer.requires_grad:
        direction = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((answer * direction).sum(), [weight for _, weight in weights], allow_unused=True)
        for index in sorted({round(index * (len(weights) - 1) / (GRADIENTS - 1)) for index in range(GRADIENTS)}):
            gradient = gradients[index]
            yield f"gradient {weights[index][0]}", _signature(torch.zeros(1) if gradient is None else gradient)


def _signatures(mode: str, outputs: Outputs, version: int) -> dict[str, list[float]]:
    """The signature of each output; the names of taps say the version of what they give, from 2 on."""
    again = f" (version {version})" if version > 1 else ""
    maps = {f"{mode} {name}{again}": _signature(value) for name, value in sorted(outputs.maps.items())}
    if not outputs.logits.shape[1]:  # it has no classifier
        return {f"{mode} features": _signature(outputs.embedding)} | maps
    return {f"{mode} logits": _signature(outputs.logits)} | maps


def _signature(value: Tensor) -> list[float]:
    """The norm, and three projections of evenly spread numbers on fixed directions of norm 1; -inf counts as 0."""
    flat = value.detach().double().flatten()
    flat = flat.where(flat != -math.inf, 0.0)
    spread = flat[:: -(-len(flat) // LONGEST) or 1]
    return [float(f"{number:.7g}") for number in (flat.norm().item(), *(_directions(len(spread)) @ spread).tolist())]


@functools.lru_cache(maxsize=64)
def _directions(size: int) -> Tensor:
    """[3, size]"""
    rates = torch.tensor([1.0, 2.3, 0.7], dtype=torch.float64)
    return torch.cos(rates[:, None] * torch.arange(size, dtype=torch.float64)) / math.sqrt(max(size, 1) / 2)


def difference(then: Answers, now: Answers) -> str:
    """How two answers of one network differ, if they do by more than rounding; else empty. What only one of them has is not compared.

    A small gradient is compared relative to the largest: that of a bias before a normalisation is nothing but rounding.
    """
    both = [name for name in then if name in now]
    steepest = max((answers[name][0] for name in both for answers in (then, now) if name.startswith("gradient")), default=0.0)
    for name in both:
        kind, _, subject = name.partition(" ")
        size = max(then[name][0], now[name][0], FLAT * steepest if kind == "gradient" else 0.0, 1e-30)
        distance = max(_apart(old, new) for old, new in zip(then[name], now[name], strict=False))
        if distance and not distance / size <= TOLERANCES[kind]:
            labels = {"eval": f"{subject} in eval mode", "train": f"{subject} in train mode", "gradient": f"the gradient of {subject}"}
            return (
                f"{labels.get(kind, 'batch statistics')}: {distance / size:.2g} of its size apart, up to {TOLERANCES[kind]:g} is rounding"
            )
    return ""


def _apart(then: float, now: float) -> float:
    if then == now or (math.isnan(then) and math.isnan(now)):
        return 0.0
    return abs(then - now) if math.isfinite(then) and math.isfinite(now) else math.inf
