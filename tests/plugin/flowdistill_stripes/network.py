"""stripes4, stripes8: two convolutions, for images of a few pixels."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.models.base import ImageNetwork, register


class Stripes(ImageNetwork):
    """Two convolutions, the mean, one linear layer."""

    taps_version = 1  # raise it when a tap gives another map

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, classes)
        self.paths = {"stage1": "conv1", "stage2": "conv2"}

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the last map."""
        first = F.relu(self.conv1(images))
        second = F.relu(self.conv2(first))
        return {"stage1": first, "stage2": second}, second


for _width in (4, 8):
    register(f"stripes{_width}", f"an example: {_width} and 16 channels", partial(Stripes, _width))
