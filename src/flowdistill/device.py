"""Which device, precision and settings a run computes with, and what memory it took."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from .checks import UserError
from .ranks import current

Precision = Literal["bf16", "fp32"]
KINDS = ("cpu", "cuda", "mps")
MAX_DEFAULT_WORKERS = 8

# cuBLAS repeats bit for bit with this alone, and some versions of PyTorch read it once, at the first product of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
        torch.ones(1, device=device).add_(1)  # an operation, which wheels that are too new for a GPU don't have
        synchronize(device)
        known = device.type in KINDS
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # what torch raises for names and for devices it lacks
        if why := _unusable(name, error):
            raise UserError(f"--device {name}: {why}") from None
        known = False
    if not known:
        raise UserError(f"--device {name!r} is not available here; use auto, or what this machine has of {', '.join(_here())}")
    return device


def _here() -> list[str]:
    """The kinds of devices, with the GPUs of this machine one by one where it has several."""
    count = torch.cuda.device_count()
    return ["cpu", *(f"cuda:{number}" for number in range(count)), "mps"] if count > 1 else list(KINDS)


def _unusable(name: str, error: Exception) -> str:
    """Why a GPU that is there can't compute, and what to do; empty if it is not there."""
    if isinstance(error, torch.OutOfMemoryError):
        return "it has no memory left, so another process fills it; end that (nvidia-smi lists them), or use another device"
    if "no kernel image" in str(error):
        return f"{_named(name)}, which this PyTorch is not built for ({torch.__version__}); install one that is, or use --device cpu"
    return ""


def _named(name: str) -> str:
    """A GPU and its compute capability."""
    major, minor = torch.cuda.get_device_capability(name)
    return f"it is {torch.cuda.get_device_name(name)} (compute capability {major}.{minor})"


def resolve_precision(name: str, device: torch.device) -> Precision:
    """``auto`` is bf16 on a GPU or a CPU that computes it, float32 elsewhere.

    Raises:
        UserError: bf16 is wanted on a GPU that only emulates it.
    """
    if device.type == "cuda" and name != "fp32":
        with nullcontext() if device.index is None else torch.cuda.device(device):
            computes = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bf16" and not computes:
            raise UserError(f"--precision bf16: {describe(device)} does not compute bf16, which needs compute capability 8.0; use fp32")
        return "bf16" if computes else "fp32"
    if name == "auto":
        return "bf16" if device.type == "cpu" and _cpu_computes_bf16() else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def _cpu_computes_bf16() -> bool:
    """AVX512-BF16 or AMX, as Linux tells it; others are taken to have neither."""
    try:
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU has free, as its driver says; infinite for other devices, where images are in memory anyway."""
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
    """OMP_NUM_THREADS if it is set, else PyTorch's number, one per core, limited to the usable cores: in a container PyTorch sees all."""
    return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else min(torch.get_num_threads(), usable_cores())


def sensible_workers() -> int:
    """Default number of processes that decode images: one per core, at most eight per stream of batches."""
    return min(usable_cores(), MAX_DEFAULT_WORKERS)


def keep_freed_memory() -> None:
    """Keep freed memory in this process, if the C library is glibc.

    By default glibc gives the memory of every large map back to the system and takes it again a moment later, page by page: up to 30,000
    faults per step, which cost a fifth of the step (docs/PERFORMANCE.md).
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no mapping of its own for less than this


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, if the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch held on a GPU, CUDA graphs included, or the largest resident size of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # what is allocated inside a replayed graph counts as reserved alone
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def computing(device: torch.device, *, deterministic: bool = False, cores: int | None = None) -> Iterator[None]:
    """Inside, this process computes as a run does; afterwards the settings of before are back.

    A GPU becomes the current one, on which PyTorch makes streams and graphs. On it products and convolutions of float32 are IEEE float32,
    while PyTorch's own setting rounds convolutions to TF32, and cuDNN tries its algorithms and takes the fastest.

    Args:
        deterministic: only operations that repeat bit for bit; cuDNN then tries nothing.
        cores: threads of an operation on a CPU; another number sums in another order. Default: ``sensible_threads()``.
    """
    with _threads(sensible_threads() if cores is None else cores), _determinism(deterministic):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), _float32(), _trying(not deterministic):
            yield


def settings(device: torch.device) -> dict[str, str]:
    """The settings of ``computing`` that a run's record gives."""
    if device.type != "cuda":
        return {}
    return {"float32": _precision_of(_CONVOLUTIONS), "cudnn.benchmark": str(torch.backends.cudnn.benchmark).lower()}


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if not wanted or before:
        yield
        return
    torch.use_deterministic_algorithms(True)  # loads torch's compiler, which takes a second
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _trying(wanted: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


_CONVOLUTIONS, _PRODUCTS = torch.backends.cudnn, torch.backends.cuda.matmul
if hasattr(_CONVOLUTIONS, "conv"):  # PyTorch 2.9 or newer: one word says how float32 is computed, and reading the older switch may raise
    _CONVOLUTIONS = _CONVOLUTIONS.conv


@contextmanager
def _float32() -> Iterator[None]:
    before = [(backend, _precision_of(backend)) for backend in (_CONVOLUTIONS, _PRODUCTS)]
    for backend, _ in before:
        _set_precision(backend, "ieee")
    try:
        yield
    finally:
        for backend, value in before:
            _set_precision(backend, value)


def _precision_of(backend: Any) -> str:
    """``ieee`` or ``tf32``; of a newer PyTorch also ``none``, which is its own choice."""
    precision = getattr(backend, "fp32_precision", None)
    return precision if isinstance(precision, str) else ("tf32" if backend.allow_tf32 else "ieee")


def _set_precision(backend: Any, value: str) -> None:
    if isinstance(getattr(backend, "fp32_precision", None), str):
        backend.fp32_precision = value
    else:
        backend.allow_tf32 = value == "tf32"


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe(device: torch.device) -> str:
    """The device as tables and reports name it: ``cpu (2 threads)`` or the GPU's name; of several ranks ``cpu (2 ranks of 1 threads)``."""
    world, threads = current().world, torch.get_num_threads()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) + (f" ({world} ranks)" if world > 1 else "")
    return f"{device.type} ({f'{world} ranks of ' if world > 1 else ''}{threads} threads)"


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


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bf16 autocast, or nothing. No weight is cast ahead of its use: a CUDA graph would keep the cast of its first step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def full_precision(device: torch.device) -> torch.autocast:
    """No autocast, whatever the caller's: it would take matrix products and convolutions of float32 back to half precision."""
    return torch.autocast(device.type, enabled=False)
