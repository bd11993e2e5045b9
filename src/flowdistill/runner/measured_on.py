"""The images that a run's networks are measured on, as networks take them, whether the data have a name or came from loaders."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import eval_set
from ..data.dataset import ImageData, part
from ..data.interfaces import EvalSet, First
from ..data.normalisation import Normalisation
from ..data.splits import trained_positions
from ..data.user_batches import UserLoaderSupply
from ..data.user_loaders import UserLoaderData


class MeasuredOn(NamedTuple):
    """The test images of a run.

    Attributes:
        normalisation: the one of training. That of a loader changes nothing.
        test: all of them, normalised so.
    """

    normalisation: Normalisation
    test: EvalSet

    def some(self, count: int) -> Tensor:
        """The first ``count`` images, float32 [count, C, H, W] in channels_last memory. They begin again where there are fewer."""
        images = torch.cat([images for images, _ in First(self.test, count).batches()])
        return images[torch.arange(count) % len(images)].contiguous(memory_format=torch.channels_last)


def measured_on(data: ImageData, split: str, device: torch.device) -> MeasuredOn:
    """The test images of a run of this split."""
    if isinstance(data, UserLoaderData):
        supply = UserLoaderSupply(data, device)
        return MeasuredOn(supply.normalisation, supply.test)
    positions = trained_positions(data.y_train, split)
    normalisation = Normalisation.measured(part(data.x_train, positions), data.y_train[positions])
    return MeasuredOn(normalisation, eval_set(data.x_test, data.y_test, normalisation.on(device), device))
