"""Where data come from: named data sets, and readers of what ``SCHEME:WHERE`` names. Every file beside this one registers its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...config import DataConfig
from ...registry import Registry
from ...talk import Remarks
from ..dataset import ImageData, Unlabelled


@dataclass(frozen=True)
class Source:
    """A named data set that can be loaded: ``read(root)`` gives the images, ``about`` is one line for listings."""

    read: Callable[[Path], ImageData]
    about: str


SOURCES: Registry[Source] = Registry("data set", "flowdistill.data")

READERS: Registry[Callable[[DataConfig, Remarks], ImageData]] = Registry("data scheme", "flowdistill.data")
"""Scheme -> what reads such data; ``config.SCHEMES`` has a row for each."""

UNLABELLED_READERS: Registry[Callable[[DataConfig, Remarks], Unlabelled]] = Registry("scheme of unlabelled data", "flowdistill.data")
"""Scheme -> what reads unlabelled images; the config's ``name`` is theirs."""
