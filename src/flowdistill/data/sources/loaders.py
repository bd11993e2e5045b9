"""Loaders that were given from Python: ``loader:HASH`` names those of this process."""

from __future__ import annotations

from ...config import LOADER, DataConfig
from ...talk import Remarks
from ..dataset import ImageData
from .base import READERS


@READERS.register(LOADER)
def recall_loaders(config: DataConfig, _: Remarks) -> ImageData:
    """The loaders that were given under this name.

    Raises:
        UserError: this process has none of that name.
    """
    from ..user_loaders import recall  # brings torch

    return recall(config.name)
