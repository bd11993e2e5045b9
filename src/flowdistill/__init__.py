"""flowdistill: knowledge distillation for PyTorch image classifiers, from the FSP matrix up.

Everything here is loaded when first used, so that ``import flowdistill`` and the listing commands start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import methods, models
    from .api import Result, distill, train
    from .checks import UserError
    from .distiller import Distiller
    from .methods.fsp import fsp_loss, fsp_matrix
    from .runner import Report
    from .types import Batch, NetSpec, Outputs

_HOMES = {
    "Report": "runner",
    "Result": "api",
    "distill": "api",
    "train": "api",
    "UserError": "checks",
    "Distiller": "distiller",
    "fsp_loss": "methods.fsp",
    "fsp_matrix": "methods.fsp",
    "Batch": "types",
    "NetSpec": "types",
    "Outputs": "types",
}

__all__ = [
    "Batch",
    "Distiller",
    "NetSpec",
    "Outputs",
    "Report",
    "Result",
    "UserError",
    "distill",
    "fsp_loss",
    "fsp_matrix",
    "methods",
    "models",
    "train",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("methods", "models"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'flowdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
