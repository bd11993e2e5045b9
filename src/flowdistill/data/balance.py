"""Classes of unequal size: what each weighs in the task, and an order that draws each equally often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..checks import UserError, some
from ..config import ClassWeights
from ..randomness import generator
from ..types import NO_LABEL, Targets
from .dataset import Labels


def weights_of(asked: ClassWeights, labels: Tensor, classes: int) -> Tensor | None:
    """The weight of each class, float32 [K] where the labels [n] are; None if all weigh the same.

    ``balanced`` is n / (K count_k), as scikit-learn's compute_class_weight: the mean over the n images is 1.
    """
    if asked == "none":
        return None
    each = len(labels) / (classes * labels.bincount(minlength=classes).double()) if asked == "balanced" else torch.tensor(asked)
    return each.float().to(labels.device)


def weighted(labels: Tensor, weights: Tensor) -> Targets:
    """The task's targets of images [N] that are not mixed, for classes of these weights [K]."""
    counted = torch.where(labels == NO_LABEL, 0.0, weights[labels.clamp(min=0)]).sum()
    return Targets(labels, counted.where(counted > 0, 1.0), weights=weights)


def refuse_empty(key: str, labels: Labels, names: tuple[str, ...], classes: int) -> None:
    """Refuse to make up for the size of a class that has no image. ``key``: what asks for it, as messages name it.

    Raises:
        UserError: there is such a class.
    """
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(missing):
        which = some([names[number] if names else str(number) for number in missing])
        raise UserError(f"{key}: no image to train on has class {which}; add some, or leave it out")


def draw_balanced(by_class: Sequence[Tensor], n: int, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw the order of an epoch of ``n`` images in which each class comes equally often: a function of (seed, epoch) alone.

    Every class has n // K places; the n % K that are left go to as many classes, drawn at random. A class with fewer images than places
    shows all of them before one comes again.

    Args:
        by_class: the positions of each class's images.

    Returns:
        [n] positions, and [n] how many times the image was drawn before.
    """
    chance = generator(seed, "sampling", epoch)
    places = torch.full((len(by_class),), n // len(by_class))
    places[torch.randperm(len(by_class), generator=chance)[: n % len(by_class)]] += 1
    drawn, before = [], []
    for positions, count in zip(by_class, places.tolist(), strict=True):
        times = -(-count // len(positions))
        drawn.append(positions[torch.rand(times, len(positions), generator=chance).argsort(1).flatten()[:count]])
        before.append(torch.arange(times).repeat_interleave(len(positions))[:count])
    order = torch.randperm(n, generator=chance)
    return torch.cat(drawn)[order], torch.cat(before)[order]
