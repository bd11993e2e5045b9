"""What a step of AdamW costs beside one of SGD: the whole training step (``base``, batch 128 of 32x32), the optimiser's own, and that of
torch's fused kernels alone, on all parameters as one vector: less than that ratio nobody reaches who uses them.

OMP_NUM_THREADS=1 python benchmarks/optimizers.py [MODEL] [ROUNDS]      # by default resnet20, 30

The two take turns in one process. Times are of the processor, not of the clock, so that other processes disturb little; give one thread.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from flowdistill import methods, models
from flowdistill.config import validate
from flowdistill.device import computing
from flowdistill.training.step import train_step
from flowdistill.training.student import Student
from flowdistill.types import Batch, DataSpec

RECIPES: dict[str, dict[str, Any]] = {"sgd": {"lr": 0.1}, "adamw": {"lr": 0.001, "optimizer": "adamw"}}
CIFAR = DataSpec("random", 50_000, 10, 3, 32, 32)
CPU = torch.device("cpu")


def student(model: str, train: dict[str, Any]) -> Student:
    """A student of the labels, ready for its first step."""
    resolved, spec = methods.resolve("base", {}, {}), models.spec(model, CIFAR)
    method = methods.build(resolved, student=spec, teacher=None, data=CIFAR)
    made = Student(models.build(model, CIFAR, seed=0).on(CPU), method, resolved, validate({"train": train}).train)
    made.begin_phase(0)
    made.begin_epoch()
    return made


def kernels(numbers: int) -> dict[str, torch.optim.Optimizer]:
    """torch's fused optimizers, each with one parameter of so many numbers."""
    each = {name: torch.randn(numbers, requires_grad=True) for name in RECIPES}
    for parameter in each.values():
        parameter.grad = torch.randn(numbers)
    sgd = torch.optim.SGD([each["sgd"]], lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    return {"sgd": sgd, "adamw": torch.optim.AdamW([each["adamw"]], lr=0.001, fused=True)}


def milliseconds(work: Callable[[], object], times: int) -> float:
    """Processor time of one of so many."""
    began = time.process_time()
    for _ in range(times):
        work()
    return 1000 * (time.process_time() - began) / times


def main(model: str = "resnet20", rounds: str = "30") -> None:
    """Print both times of both, and the ratios of the medians."""
    images, batch = torch.randn(128, 3, 32, 32), Batch(torch.randint(0, 10, (128,)), torch.arange(128), torch.tensor(0))
    students = {name: student(model, train) for name, train in RECIPES.items()}
    rates = {name: torch.tensor(train["lr"]) for name, train in RECIPES.items()}
    alone = kernels(sum(parameter.numel() for parameter in students["sgd"].net.parameters()))
    kinds: dict[str, tuple[Callable[[str], object], int]] = {
        "training step": (lambda name: train_step((students[name],), images, None, batch, lr=rates[name], precision="fp32"), 1),
        "optimiser's step": (lambda name: students[name].move(rates[name]), 20),
        "torch's kernel on one vector": (lambda name: alone[name].step(), 20),
    }
    with computing(CPU, cores=1):
        for kind, (work, times) in kinds.items():
            found: dict[str, list[float]] = {name: [] for name in students}
            for _ in range(int(rounds) + 1):
                for name, measured in found.items():
                    measured.append(milliseconds(functools.partial(work, name), times))
            sgd, adamw = (statistics.median(found[name][1:]) for name in RECIPES)  # the first warms up
            print(f"{model}, {kind}: SGD {sgd:.3f} ms, AdamW {adamw:.3f} ms, ratio {adamw / sgd:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
