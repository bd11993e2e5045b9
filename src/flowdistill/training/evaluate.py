"""Accuracy over every image of a set, counted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.interfaces import EvalSet
from ..device import Precision, autocast
from ..metrics import TOP, UNANSWERED, Answers
from ..models import Network
from ..models.state import kept
from ..randomness import seeded
from ..ranks import ALONE, Ranks
from ..types import Outputs


class Evaluation(NamedTuple):
    """A network's answers for a set of images.

    Attributes:
        correct: scalar, number of images whose most probable class is their label; still on the device.
        classes: [N] the most probable class.
        probabilities: [N] its probability; NaN if the image's logits are not finite, which never counts as right.
        labels: [N] the true class.
        in_top5: [N] whether the true class is among the five most probable, as ``among_top`` says; true wherever the answer is right.
    """

    correct: Tensor
    classes: Tensor
    probabilities: Tensor
    labels: Tensor
    in_top5: Tensor

    @property
    def unanswered(self) -> Tensor:
        """Scalar, number of images for which the logits are not finite; still on the device."""
        return (~self.probabilities.isfinite()).sum()

    def answers(self, num_classes: int) -> Answers:
        """The same on the CPU, of so many classes; waits for the device."""
        classes = torch.where(self.probabilities.isfinite(), self.classes, UNANSWERED)
        labels, said, probabilities, in_top5 = (tensor.cpu().numpy() for tensor in (self.labels, classes, self.probabilities, self.in_top5))
        return Answers(labels, said, probabilities, in_top5, num_classes)


def evaluate(net: Network, on: EvalSet, precision: Precision) -> Evaluation:
    """Measure a network in eval mode on all images, the last, partial batch included; its mode is put back afterwards.

    Raises:
        RuntimeError: not as many answers as images.
    """
    return evaluate_all([net], on, precision)[0]


Ask = Callable[[Network, Tensor], Outputs]
"""How a network in eval mode is asked for its outputs."""


def plainly(net: Network, images: Tensor) -> Outputs:
    """Ask a network by calling it."""
    outputs: Outputs = net(images)
    return outputs


def evaluate_all(nets: Sequence[Network], on: EvalSet, precision: Precision, ask: Ask = plainly, ranks: Ranks = ALONE) -> list[Evaluation]:
    """Measure several networks in one pass over the images. Ranks share the batches out, and each gets the answers for all images."""
    label_batches: list[Tensor] = []
    answer_batches: list[AnswerBatches] = [[] for _ in nets]
    for net_logits, labels in predict(nets, on, precision, ask, ranks):
        label_batches.append(labels)
        for answers, logits in zip(answer_batches, net_logits, strict=True):
            if len(logits) != len(labels):
                raise RuntimeError(f"evaluation gave {len(logits)} answers for a batch of {len(labels)} images")
            probabilities, classes = logits.softmax(1).max(1)
            answers.append((probabilities, classes, among_top(logits, labels)))
    if ranks.several:
        device = next(nets[0].parameters()).device
        label_batches, answer_batches = _put_together(label_batches, answer_batches, ranks, device)
    all_labels = torch.cat(label_batches)
    evaluations = []
    for answers in answer_batches:
        probabilities, classes, in_top5 = (torch.cat(parts) for parts in zip(*answers, strict=True))
        if not len(classes) == len(all_labels) == len(on):
            raise RuntimeError(f"evaluation gave {len(classes)} answers for {len(on)} images")
        answered = probabilities.isfinite()
        right = (classes == all_labels) & answered
        # Rounding may make the probabilities of classes equal whose logits are not, so that top-1 counts what the logits rank lower.
        evaluations.append(Evaluation(right.sum(), classes, probabilities, all_labels, (in_top5 & answered) | right))
    return evaluations


def among_top(logits: Tensor, labels: Tensor, top: int = TOP) -> Tensor:
    """Whether the true class is among the ``top`` most probable: bool [N], for logits [N, K] and labels [N].

    Of equally probable classes those with lower numbers come first, as in the most probable class. It does not wait for the device.
    """
    labels = labels.long()[:, None]
    own, numbers = logits.gather(1, labels), torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (numbers < labels))
    return before.sum(1) < top


AnswerBatches = list[tuple[Tensor, Tensor, Tensor]]
"""Of a network, for each batch: the most probable class's probability, that class, and whether the true one is among the five."""


def _put_together(
    labels: list[Tensor], answers: list[AnswerBatches], ranks: Ranks, device: torch.device
) -> tuple[list[Tensor], list[AnswerBatches]]:
    """The batches of all ranks in the order of the set; rank r of R has the batches r, r + R, r + 2 R and so on."""
    own = [value for turn, of_batch in enumerate(labels) for value in (of_batch, *(part for batches in answers for part in batches[turn]))]
    width = 1 + 3 * len(answers)  # tensors of a batch: its labels, and three of each network
    by_rank = [ranks.tensors_from(rank, own) for rank in range(ranks.world)]
    places = [divmod(number, ranks.world) for number in range(sum(map(len, by_rank)) // width)]
    rows = [[value.to(device) for value in by_rank[rank][turn * width : (turn + 1) * width]] for turn, rank in places]
    return [row[0] for row in rows], [[(row[at], row[at + 1], row[at + 2]) for row in rows] for at in range(1, width, 3)]


@torch.no_grad()
def predict(
    nets: Sequence[Network], on: EvalSet, precision: Precision, ask: Ask = plainly, ranks: Ranks = ALONE
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each batch: each network's logits, float32 [B, K] in eval mode, and the labels [B]. Modes are put back afterwards.

    Of several ranks each gets its own batches.

    What layers draw in eval mode is a function of the batch's number alone, so that measuring again gives the same.
    """
    modes = [net.training for net in nets]
    for net in nets:
        net.eval()
    try:
        batches = on.batches(ranks.rank, ranks.world) if ranks.several else on.batches()
        for step, (images, labels) in zip(itertools.count(ranks.rank, ranks.world), batches, strict=False):
            net_logits = []
            for net in nets:
                with answering(net, "evaluation", step, images.device), autocast(images.device, precision):
                    net_logits.append(ask(net, images).logits.float())
            yield net_logits, labels
    finally:
        for net, training in zip(nets, modes, strict=True):
            net.train(training)


@contextmanager
def answering(net: Network, purpose: str, step: int, device: torch.device, *, seed: int = 0, epoch: int = 0) -> Iterator[None]:
    """Inside, a network answers in eval mode: what it draws is a function of (seed, purpose, epoch, step) alone, and no buffer moves."""
    with contextlib.ExitStack() as stack:
        if net.draws_always:
            stack.enter_context(seeded(seed, f"{purpose} {step}", epoch, device))
        if net.unsettled:
            stack.enter_context(kept(net))
        yield
