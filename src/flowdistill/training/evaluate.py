"""Accuracy over every image of a set, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.loader import Labelled
from ..device import Precision
from ..models import Network
from ..taps import Outputs
from .step import autocast

BATCH = 500  # images a forward pass


class Evaluation(NamedTuple):
    """What a network says of a set of images.

    Attributes:
        correct: scalar, images whose most probable class is their label; still on the device.
        classes: [N] most probable class.
        probabilities: [N] its probability; NaN where the network gave no finite logits.
    """

    correct: Tensor
    classes: Tensor
    probabilities: Tensor


@torch.no_grad()
def evaluate(net: Network, on: Labelled, normalise: Callable[[Tensor], Tensor], precision: Precision) -> Evaluation:
    """Measure a network in eval mode on all images, the last partial batch included; its mode is put back after.

    Raises:
        RuntimeError: not as many answers as images.
    """
    training = net.training
    net.eval()
    found = []
    try:
        for start in range(0, len(on.images), BATCH):
            images = normalise(on.images[start : start + BATCH])
            with autocast(images.device, precision):
                outputs: Outputs = net(images)
            found.append(outputs.logits.float().softmax(1).max(1))
    finally:
        net.train(training)
    probabilities = torch.cat([top.values for top in found])
    classes = torch.cat([top.indices for top in found])
    if len(classes) != len(on.labels):
        raise RuntimeError(f"evaluation gave {len(classes)} answers for {len(on.labels)} images")
    return Evaluation((classes == on.labels).sum(), classes, probabilities)
