"""Distillation methods by name. A method file registers itself; adding a method is one file here and one reference.

``get("fsp")`` is the class, usable in anybody's own loop; ``build("at+kd", ...)`` is what training uses.
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import METHODS, Method, MethodOptions, Needs, Phase
from .compose import OF_FEATURES, WITHOUT_LABELS, Composed, ResolvedMethod, build, get, lacking_labels, mutual_names, parts, resolve

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
METHODS.sort()

__all__ = [
    "METHODS",
    "OF_FEATURES",
    "WITHOUT_LABELS",
    "Composed",
    "Method",
    "MethodOptions",
    "Needs",
    "Phase",
    "ResolvedMethod",
    "build",
    "get",
    "lacking_labels",
    "mutual_names",
    "parts",
    "resolve",
]
