"""Turn the data's images into those that a network was made for: their size, channels and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import UserError


@dataclass(frozen=True)
class InputSpec:
    """The images that a network sees: their channels and size, mean and standard deviation of each channel in 0..1, and how images of
    another size are resized to these (``bilinear``, ``bicubic``).

    A field that is None is not known, or is as in the data; of ``interpolation`` it means bilinear.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None

    def over(self, below: InputSpec) -> InputSpec:
        """This spec, with the values of ``below`` in the fields that are None here."""
        names = [field.name for field in fields(self)]
        return InputSpec(**{name: getattr(below if getattr(self, name) is None else self, name) for name in names})


class InputAdapter(nn.Module):
    """(x s + m - m') / s' for each channel, then interpolation, with antialiasing if the image shrinks.

    Args:
        source: the images as the data give them; m and s are its mean and std.
        target: the images as the network wants them; m' and s' are its mean and std. No field but ``interpolation`` is None.
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
        """Images [N, C, H, W] as the data give them -> [N, C', H', W'] as the network wants them; grey is repeated for 3 channels."""
        images = (images * self.scale + self.shift).expand(-1, self.channels, -1, -1)
        if images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode=self.target.interpolation or "bilinear", antialias=self.smooth)


def _column(values: Sequence[float] | None) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def input_adapter(source: InputSpec, wanted: InputSpec) -> InputAdapter | None:
    """The adapter from the data's images to those that a network was made for; None if they are such already.

    Args:
        source: the images as the data give them.
        wanted: the images that the network was made for; a field that is None is as in the data.

    Raises:
        UserError: the numbers of channels, means or standard deviations do not go together.
    """
    target = wanted.over(source)
    if replace(target, interpolation=source.interpolation) == source:
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
