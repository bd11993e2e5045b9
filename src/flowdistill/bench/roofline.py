"""The least that a step of one student needs on this machine: its operations and bytes, and the rates at which the machine does them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..device import Precision, synchronize
from ..training.engine import EagerEngine
from ..training.student import SeedGroup

CONTRACTIONS = ("convolution", "convolution_backward", "mm", "addmm", "bmm")


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that convolutions and matrix products read and write, as if all else were fused into them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in CONTRACTIONS:
            tensors = [tensor for tensor in (*args, *(out if isinstance(out, tuple | list) else (out,))) if isinstance(tensor, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def roofline(seed_groups: Sequence[SeedGroup], precision: Precision) -> dict[str, Any]:
    """Operations and bytes of the next eager step of these seed groups, the machine's measured rates, and the floor in ms that these give.

    The seed groups must stand at the start of an epoch. Their students move by one step at rate 0.
    """
    device = seed_groups[0].batches.data.device
    rates = {student: torch.zeros(seed_group.batches.steps, device=device) for seed_group in seed_groups for student in seed_group.students}
    with Traffic() as traffic, FlopCounterMode(display=False) as counter:
        next(EagerEngine(precision, "").epoch(seed_groups, 0, rates))
    operations, speed, bandwidth = counter.get_total_flops(), _arithmetic(device, precision), _bandwidth(device)
    return {
        "precision": precision,
        "operations": operations,
        "bytes": traffic.bytes,
        "operations_per_second": speed,
        "bytes_per_second": bandwidth,
        "floor_ms": 1000 * max(operations / speed, traffic.bytes / bandwidth),
    }


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of ten."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _arithmetic(device: torch.device, precision: Precision) -> float:
    """Operations per second of a large matrix product."""
    size = 4096 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else None) for _ in range(2))
    return float(2 * size**3 / _fastest(lambda: a @ b, device))


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.ones(1 << 26, device=device)  # 256 MiB
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _fastest(lambda: target.copy_(source), device)
