"""What each loss takes by itself, forward and backward, on the outputs of a pair: the part of a step that belongs to the method.

python benchmarks/losses.py resnet20:resnet20 [METHOD ...]
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from flowdistill import methods, models
from flowdistill.methods import METHODS
from flowdistill.taps import Batch, DataSpec, Facts, Outputs

BATCH, ROUNDS = 128, 7
DATA = DataSpec("random", 50_000, 10, 3, 32, 32)


def leaves(outputs: Outputs, *, trained: bool) -> Outputs:
    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone().requires_grad_(trained)

    return Outputs(leaf(outputs.logits), leaf(outputs.embedding), {name: leaf(m) for name, m in outputs.maps.items()})


def outputs(model: str, taps: frozenset[str], *, trained: bool) -> Outputs:
    net = models.build(model, DATA, taps=tuple(sorted(taps)), seed=int(trained))
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return leaves(net.to(memory_format=torch.channels_last)(images), trained=trained)


def milliseconds(name: str, student: str, teacher: str) -> float:
    settled = methods.settle(name, {}, {})
    trained = settled.trained_model(student, teacher)
    spec = models.spec(teacher, DATA)
    method = methods.build(settled, student=models.spec(trained, DATA), teacher=spec, data=DATA)
    head = models.build(teacher, DATA).get_submodule(spec.head)
    norms = {tap.name: (torch.ones(tap.channels), torch.zeros(tap.channels)) for tap in spec.taps if tap.norm}
    labels = torch.arange(DATA.n_train) % DATA.classes
    method.know(Facts((head.weight, head.bias), norms, torch.randn(DATA.classes, spec.embedding), labels))
    ours, theirs = outputs(trained, method.needs.student, trained=True), outputs(teacher, method.needs.teacher, trained=False)
    batch = Batch(labels[:BATCH], torch.arange(BATCH), torch.tensor(30), (theirs,))
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        sum(method(ours, theirs, batch).values()).backward()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def main() -> None:
    student, _, teacher = sys.argv[1].partition(":")
    names = sys.argv[2:] or [name for name in METHODS if name != "base"]
    for took, name in sorted(((milliseconds(name, student, teacher), name) for name in names), reverse=True):
        print(f"| {name} | {took:.1f} |", flush=True)


main()
