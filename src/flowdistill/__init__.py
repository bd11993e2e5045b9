"""flowdistill: knowledge distillation for PyTorch image classifiers, from the FSP matrix up.

Everything here is loaded when first used, so that ``import flowdistill`` and the listing commands start at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("Windows is not supported, for it lacks the file locks of Linux and macOS; use WSL 2")

# OpenMP, which computes PyTorch's operations on a CPU, reads this once, as PyTorch is imported. A thread that waits for the others turns
# round so often before it sleeps. GCC's default of 300,000 keeps a core from the very thread that is waited for, if another process
# wants it too: a step then took four times as long. With 10,000 an idle machine is as fast as before (docs/PERFORMANCE.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
