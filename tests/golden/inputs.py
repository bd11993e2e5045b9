"""The formula sheet's inputs as float64 tensors."""

from __future__ import annotations

import torch

from .golden_inputs import get

INPUTS = {name: torch.from_numpy(value) for name, value in get().items()}
