"""Several teachers as one: how far they agree, and the share of each in the mean of their logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.interfaces import EvalSet
from ..device import Precision
from ..models.joined import Joined
from .evaluate import evaluate_all, predict

STEPS = 100
DIGITS = 3  # of a share, so that no rounding of another machine changes it


class Agreement(NamedTuple):
    """What several teachers answer to the same images.

    Attributes:
        accuracies: of each alone, in percent.
        alike: the share of the images to which all give the same class, in percent.
    """

    accuracies: tuple[float, ...]
    alike: float

    def beside(self, shares: Iterable[float]) -> str:
        """What stands behind the accuracy of the mean of their logits, by these shares."""
        alone, by = ", ".join(f"{accuracy:.2f} %" for accuracy in self.accuracies), ", ".join(f"{share:.3g}" for share in shares)
        return f"by the mean of their logits (shares {by}); alone {alone}; all give the same class for {self.alike:.2f} %"


def agreement(net: Joined, on: EvalSet, precision: Precision) -> Agreement:
    """Ask each of the networks for all images; waits for the device."""
    answers = evaluate_all(net.parts, on, precision)
    classes = torch.stack([each.classes for each in answers])
    alike = int((classes == classes[0]).all(0).sum())
    return Agreement(tuple(100 * int(each.correct) / len(on) for each in answers), 100 * alike / len(on))


def chosen_shares(net: Joined, on: EvalSet, precision: Precision) -> tuple[float, ...]:
    """The shares by which the mean of the logits has the least cross-entropy on labelled images, rounded; they add up to 1.

    Args:
        on: images that none of the networks was trained on.
    """
    batches = [(torch.stack(logits).double().cpu(), labels.long().cpu()) for logits, labels in predict(net.parts, on, precision)]
    logits, labels = torch.cat([logits for logits, _ in batches], 1), torch.cat([labels for _, labels in batches])
    return _rounded(best_shares(logits, labels))


def best_shares(logits: Tensor, labels: Tensor) -> Tensor:
    """The shares [M], at least 0 with the sum 1, that minimise the mean cross-entropy of the weighted mean of logits.

    The cross-entropy is convex in the shares, so that the minimum is one. They are softmax(t), and L-BFGS looks for t from equal shares.

    Args:
        logits: [M, n, K] float64, of M networks for n images.
        labels: [n] class numbers.
    """
    free = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy((free.softmax(0)[:, None, None] * logits).sum(0), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return free.detach().softmax(0)


def _rounded(shares: Tensor) -> tuple[float, ...]:
    """Rounded so that the sum stays 1: the largest share takes what is left."""
    rounded = [round(float(share), DIGITS) for share in shares]
    largest = rounded.index(max(rounded))
    rounded[largest] = round(1 - sum(rounded[:largest]) - sum(rounded[largest + 1 :]), DIGITS)
    return tuple(rounded)
