"""Accuracy over every image of a set, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def evaluate(net: Network, on: Labelled, normalise: Callable[[Tensor], Tensor], precision: Precision) -> Evaluation:
    """Measure a network in eval mode on all images, the last partial batch included; its mode is put back after.

    Raises:
        RuntimeError: not as many answers as images.
    """
    found = [logits.softmax(1).max(1) for logits in predict(net, on.images, normalise, precision)]
    probabilities = torch.cat([top.values for top in found])
    classes = torch.cat([top.indices for top in found])
    if len(classes) != len(on.labels):
        raise RuntimeError(f"evaluation gave {len(classes)} answers for {len(on.labels)} images")
    return Evaluation((classes == on.labels).sum(), classes, probabilities)


@torch.no_grad()
def predict(net: Network, images: Tensor, normalise: Callable[[Tensor], Tensor], precision: Precision) -> Iterator[Tensor]:
    """Logits float32 [B, K] of images uint8 [N, H, W, C] in eval mode, a batch after the other; the network's mode is put back after."""
    training = net.training
    net.eval()
    try:
        for start in range(0, len(images), BATCH):
            batch = normalise(images[start : start + BATCH])
            with autocast(batch.device, precision):
                outputs: Outputs = net(batch)
            yield outputs.logits.float()
    finally:
        net.train(training)
