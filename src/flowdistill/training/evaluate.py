"""Accuracy over every image of a set, counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.interfaces import EvalSet
from ..device import Precision, autocast
from ..models import Network
from ..models.state import kept
from ..randomness import seeded
from ..types import Outputs


class Evaluation(NamedTuple):
    """What a network says of a set of images.

    Attributes:
        correct: scalar, images whose most probable class is their label; still on the device.
        classes: [N] most probable class.
        probabilities: [N] its probability; NaN where the network gave no finite logits, which is never right.
    """

    correct: Tensor
    classes: Tensor
    probabilities: Tensor

    @property
    def unanswered(self) -> Tensor:
        """Scalar, images for which the logits are not finite; still on the device."""
        return (~self.probabilities.isfinite()).sum()


def evaluate(net: Network, on: EvalSet, precision: Precision) -> Evaluation:
    """Measure a network in eval mode on all images, the last partial batch included; its mode is put back after.

    Raises:
        RuntimeError: not as many answers as images.
    """
    return evaluate_all([net], on, precision)[0]


Ask = Callable[[Network, Tensor], Outputs]
"""How a network in eval mode is asked for its outputs."""


def plainly(net: Network, images: Tensor) -> Outputs:
    """By calling it."""
    outputs: Outputs = net(images)
    return outputs


def evaluate_all(nets: Sequence[Network], on: EvalSet, precision: Precision, ask: Ask = plainly) -> list[Evaluation]:
    """Measure several networks in one pass over the images."""
    known: list[Tensor] = []
    tops: list[list[tuple[Tensor, Tensor]]] = [[] for _ in nets]
    for answers, labels in predict(nets, on, precision, ask):
        known.append(labels)
        for top, logits in zip(tops, answers, strict=True):
            probabilities, classes = logits.softmax(1).max(1)
            top.append((probabilities, classes))
    truth = torch.cat(known)
    found = []
    for top in tops:
        probabilities, classes = (torch.cat(parts) for parts in zip(*top, strict=True))
        if not len(classes) == len(truth) == len(on):
            raise RuntimeError(f"evaluation gave {len(classes)} answers for {len(on)} images")
        right = (classes == truth) & probabilities.isfinite()
        found.append(Evaluation(right.sum(), classes, probabilities))
    return found


@torch.no_grad()
def predict(nets: Sequence[Network], on: EvalSet, precision: Precision, ask: Ask = plainly) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Logits float32 [B, K] of each network in eval mode and labels [B], a batch after the other; their modes are put back after.

    What layers draw in eval mode is a function of the batch's number alone: to be measured again gives the same.
    """
    modes = [net.training for net in nets]
    for net in nets:
        net.eval()
    try:
        for step, (images, labels) in enumerate(on.batches()):
            answers = []
            for net in nets:
                with answering(net, "evaluation", step, images.device), autocast(images.device, precision):
                    answers.append(ask(net, images).logits.float())
            yield answers, labels
    finally:
        for net, training in zip(nets, modes, strict=True):
            net.train(training)


@contextmanager
def answering(net: Network, purpose: str, step: int, device: torch.device, *, seed: int = 0, epoch: int = 0) -> Iterator[None]:
    """A network in eval mode answers inside: what it draws is a function of (seed, purpose, epoch, step) alone, and no buffer moves."""
    with contextlib.ExitStack() as stack:
        if net.draws_always:
            stack.enter_context(seeded(seed, f"{purpose} {step}", epoch, device))
        if net.unsettled:
            stack.enter_context(kept(net))
        yield
