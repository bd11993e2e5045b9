"""Which engine trains: the best that works on this device for this length of run, and why."""

from __future__ import annotations

import os
import shutil
from typing import get_args

import torch

from ..checks import UserError, did_you_mean
from ..config import EngineName
from ..device import Precision
from ..ranks import current
from .engine import CompiledEngine, EagerEngine, Engine
from .graph import GraphEngine
from .optim import FUSED

ENGINES = get_args(EngineName)
WORTH_COMPILING = {"cpu": 1e9, "cuda": 7e9}
"""Pixels that a student must be shown before compiling pays (docs/PERFORMANCE.md). CPU: ten epochs of CIFAR save what compiling costs,
and this is twenty. GPU: on a prototype compiling took 40 seconds and saved 0.3 per CIFAR epoch."""


def choose(
    wanted: str,
    device: torch.device,
    precision: Precision,
    *,
    pixels: float,
    resident: bool = True,
    synchronised: bool = False,
    optimizer: str = "sgd",
) -> Engine:
    """The engine that is wanted, or for ``auto`` the best one. If it can't be had, another takes its place, and ``why`` says so.

    The choice depends on the device, on what is installed and on the length of the run, never on a clock: a repeated run gets the same.

    Args:
        wanted: ``auto``, ``eager``, ``compiled``, ``graph``, or ``graph+compiled`` as a ledger has it.
        pixels: height x width x images that each student will be shown.
        resident: whether the device holds the training images.
        synchronised: whether several ranks would normalise a batch together.
        optimizer: the one that moves the students. Default: ``sgd``.

    Raises:
        UserError: no such engine, a graph for several ranks, or another engine than the eager one for an optimizer that is not fused.
    """
    if wanted not in (*ENGINES, "graph+compiled"):
        raise UserError(f"engine {wanted!r}: {did_you_mean(wanted, ENGINES)}")
    several = current().several
    if several and wanted.startswith("graph"):
        raise UserError(f"--engine {wanted}: a CUDA graph holds the steps of one process, not of {current().world}; use compiled or eager")
    alone = "" if optimizer in FUSED else f"train.optimizer={optimizer} is trained by the eager engine alone"
    if alone and wanted not in ("auto", "eager"):
        raise UserError(f"--engine {wanted}: {alone}; use eager or auto, or one of {' and '.join(FUSED)}")
    if wanted == "eager" or alone:
        return EagerEngine(precision, "asked for" if wanted == "eager" else alone)
    lacks = "synchronised batch normalisations are not compiled" if several and synchronised else _lacks_compiler(device)
    if wanted == "compiled":
        return EagerEngine(precision, f"compiled was asked for, but {lacks}") if lacks else CompiledEngine(precision, "asked for")
    long = pixels >= WORTH_COMPILING.get(device.type, float("inf"))
    compiling = not lacks and (long or wanted == "graph+compiled")
    length = "compiled, for the run is long" if compiling else f"not compiled, for {lacks or 'the run is short'}"
    cannot = "" if device.type == "cuda" else f"CUDA graphs need a CUDA GPU, not {device.type}"
    cannot = cannot or (f"a CUDA graph holds the steps of one process, not of {current().world}" if several else "")
    cannot = cannot or ("" if resident else "the training images do not fit on the device")
    if not cannot:
        inner = CompiledEngine(precision, length) if compiling else EagerEngine(precision, length)
        return GraphEngine(inner, f"a step is bound by launches on a GPU; {length}")
    why = length if wanted == "auto" and device.type != "cuda" else f"no graph: {cannot}; {length}"
    return CompiledEngine(precision, why) if compiling else EagerEngine(precision, why)


def _lacks_compiler(device: torch.device) -> str:
    """Why torch.compile can't work here, or empty.

    On a CPU it needs a C++ compiler. On a GPU it uses Triton, which comes with PyTorch and builds its launchers with a C compiler.
    """
    if device.type == "mps":
        return "torch.compile is not used on mps"
    if device.type == "cuda":
        has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang"))
        return "" if has_compiler else "there is no C compiler (gcc, clang, or what CC names), which Triton needs"
    if any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        return ""
    return "there is no C++ compiler (g++, clang++, or what CXX names)"
