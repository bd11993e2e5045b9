"""Networks by name. A model file registers itself; adding one is one file."""

from __future__ import annotations

import importlib
import pkgutil

from .base import (
    CAM,
    FORMS,
    MODELS,
    Factory,
    ImageFactory,
    ImageNetwork,
    Network,
    build,
    by_stage,
    canonical,
    declared_input_spec,
    factory,
    from_python,
    made_of,
    own_code,
    register,
    spec,
    stage_by_stage,
)

__all__ = [
    "CAM",
    "FORMS",
    "MODELS",
    "Factory",
    "ImageFactory",
    "ImageNetwork",
    "Network",
    "build",
    "by_stage",
    "canonical",
    "declared_input_spec",
    "factory",
    "from_python",
    "made_of",
    "own_code",
    "register",
    "spec",
    "stage_by_stage",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
