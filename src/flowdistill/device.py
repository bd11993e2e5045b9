"""Which device and which precision a run uses, and what memory it took."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from .checks import UserError

Precision = Literal["bf16", "fp32"]
KINDS = ("cpu", "cuda", "mps")
MOST_WORKERS = 8


def resolve_device(name: str) -> torch.device:
    """``auto`` -> the best device of this machine; a name -> that device.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        known = device.type in KINDS
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):  # what torch raises for names and for devices it lacks
        known = False
    if not known:
        raise UserError(f"--device {name!r} is not available here; use auto, or what this machine has of {', '.join(KINDS)}")
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """``auto`` is bf16 on a GPU or a CPU that computes it, float32 elsewhere."""
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return "bf16" if device.type == "cpu" and _cpu_computes_bf16() else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def _cpu_computes_bf16() -> bool:
    """AVX512-BF16 or AMX, as Linux tells it; others are taken to have neither."""
    try:
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU has left, as its driver says; without end elsewhere, where images are in memory anyway."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def usable_cores() -> int:
    """Cores that this process may use: what the scheduler and the container's quota leave it."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        granted = math.inf if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        granted = math.inf
    scheduled = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(min(scheduled, granted))


def sensible_threads() -> int:
    """PyTorch's own number (OMP_NUM_THREADS, else a thread a core), never more than there are cores to use: in a container it sees all."""
    return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else min(torch.get_num_threads(), usable_cores())


def sensible_workers() -> int:
    """Processes that decode images where nobody says how many: one a core, at most eight for each stream of batches."""
    return min(usable_cores(), MOST_WORKERS)


def keep_freed_memory() -> None:
    """What is freed stays with this process, where the C library is glibc.

    Left alone, it gives the memory of every large map back to the system and takes it again a moment later, page by page: up to 30,000
    faults in a step, which cost a fifth of it (docs/PERFORMANCE.md).
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no mapping of its own for less than this


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch held on a GPU, CUDA graphs included, or the largest resident size of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # what is allocated inside a replayed graph counts as reserved alone
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, only operations that repeat bit for bit, where wanted; PyTorch's own setting comes back after."""
    before = torch.are_deterministic_algorithms_enabled()
    if not wanted or before:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without it
    torch.use_deterministic_algorithms(True)  # loads torch's compiler, which takes a second
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, so many threads for an operation on a CPU; another number sums in another order, and rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe(device: torch.device) -> str:
    """The device as tables and reports name it: ``cpu (2 threads)`` or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


class Stopwatch:
    """Two laps in seconds. On a GPU they are taken by events, so that nothing waits for the device until ``stop``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def lap(self) -> None:
        """The first lap ends."""
        self._marks.append(self._mark())

    def stop(self) -> tuple[float, float]:
        """The second lap ends; both in seconds."""
        self.lap()
        synchronize(self._device)
        first, second = (_between(a, b) for a, b in pairwise(self._marks))
        return first, second


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start
