"""Networks by name. A model file registers itself; adding one is one file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from ..config import model_name
from ..randomness import seeded
from ..registry import Registry
from ..taps import DataSpec, NetSpec


class Network(nn.Module):
    """A network as training sees it: called on images [N, C, H, W] it gives Outputs with the taps it was built for.

    ``about`` holds what the file that it was loaded from says of it.
    """

    spec: NetSpec
    taps: tuple[str, ...]
    about: Mapping[str, Any] = {}


class Factory(Protocol):
    """How a registered model is specified and built."""

    about: str

    def spec(self, data: DataSpec) -> NetSpec:
        """What the network would offer for images of this size; builds nothing."""
        ...

    def build(self, data: DataSpec, taps: tuple[str, ...]) -> Network:
        """The network, giving just these taps."""
        ...


MODELS: Registry[Factory] = Registry("model")


def canonical(name: str) -> str:
    """The registered name of a model: ``resnet_32_20`` (the reference log's spelling) is ``resnet20``.

    Raises:
        UserError: no such model.
    """
    MODELS[model_name(name)]
    return model_name(name)


def spec(name: str, data: DataSpec) -> NetSpec:
    """What the network of that name would offer for such data; builds nothing."""
    return MODELS[canonical(name)].spec(data)


def build(name: str, data: DataSpec, *, taps: tuple[str, ...] = (), seed: int = 0) -> Network:
    """A network with fresh weights, a function of (name, seed) and the data's sizes alone."""
    with seeded(seed, "weights"):
        return MODELS[canonical(name)].build(data, taps)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
