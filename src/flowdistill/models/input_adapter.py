"""Images as the data give them, made into those that a network was made for: its own size, channels and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import UserError


@dataclass(frozen=True)
class InputSpec:
    """The images that a network sees: their channels and size, and mean and standard deviation of each channel in 0..1.

    What is None is not known, or as the data are.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def over(self, below: InputSpec) -> InputSpec:
        """What is None here is as below."""
        names = [field.name for field in fields(self)]
        return InputSpec(**{name: getattr(below if getattr(self, name) is None else self, name) for name in names})


class InputAdapter(nn.Module):
    """(x s + m - m') / s' a channel at a time, then bilinear interpolation, smoothed where the image shrinks.

    Args:
        given: how the images come: m and s.
        wanted: how the network wants them: m' and s'; nothing of it None.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: InputSpec, target: InputSpec) -> None:
        super().__init__()
        assert target.channels is not None
        assert target.height is not None
        assert target.width is not None
        self.target = target
        self.channels, self.size = target.channels, (target.height, target.width)
        self.smooth = (source.height or 0) > target.height
        source_mean, source_std = _column(source.mean), _column(source.std)
        target_mean, target_std = _column(target.mean), _column(target.std)
        self.register_buffer("scale", (source_std / target_std).float(), persistent=False)
        self.register_buffer("shift", ((source_mean - target_mean) / target_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W], normalised as they come -> [N, C', H', W'], as the network wants them; grey is repeated for 3 channels."""
        images = (images * self.scale + self.shift).expand(-1, self.channels, -1, -1)
        if images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bilinear", antialias=self.smooth)


def _column(values: Sequence[float] | None) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def input_adapter(source: InputSpec, wanted: InputSpec) -> InputAdapter | None:
    """What turns images as they come into those that a network was made for; None where they are that already.

    Raises:
        UserError: the numbers of channels, means or standard deviations do not go together.
    """
    target = wanted.over(source)
    if target == source:
        return None
    if source.channels != target.channels and source.channels != 1:
        raise UserError(
            f"the network takes {target.channels} channels, the images have {source.channels}; set data.channels={target.channels}"
        )
    for name in ("mean", "std"):
        values = getattr(target, name)
        if len(values) not in (1, target.channels):
            raise UserError(f"inputs: {name} has {len(values)} values for {target.channels} channels; give one for each")
    return InputAdapter(source, target)
