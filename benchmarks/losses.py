"""What each loss takes by itself, forward and backward, on the outputs of a pair: the part of a step that belongs to the method.

Memory is what it adds to that of a student on labels alone, counted: the teacher's outputs that it looks at, what it keeps for the
backward pass beside the student's outputs, and its parameters (with gradient and momentum) and buffers.

python benchmarks/losses.py resnet20:resnet20,wrn-16-2:wrn-40-2 [METHOD ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable

import torch

from flowdistill import methods, models
from flowdistill.methods import METHODS, Needs
from flowdistill.types import Batch, DataSpec, MethodContext, Outputs

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


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def everything(outputs: Outputs, needs: Needs | None = None) -> list[torch.Tensor]:
    """All of a student's outputs, or what is needed of a teacher's."""
    maps = list(outputs.maps.values())
    return [*maps, *([outputs.logits] * (needs is None or needs.logits)), *([outputs.embedding] * (needs is None or needs.embedding))]


def cost(name: str, student: str, teacher: str) -> tuple[float, float]:
    """Milliseconds, and MiB."""
    resolved = methods.resolve(name, {}, {})
    trained = resolved.shipped_model(student, teacher)
    spec = models.spec(teacher, DATA)
    method = methods.build(resolved, student=models.spec(trained, DATA), teacher=spec, data=DATA)
    head = models.build(teacher, DATA).get_submodule(spec.head)
    norms = {tap.name: (torch.ones(tap.channels), torch.zeros(tap.channels)) for tap in spec.taps if tap.norm}
    labels = torch.arange(DATA.n_train) % DATA.classes
    method.setup(MethodContext((head.weight, head.bias), norms, torch.randn(DATA.classes, spec.embedding), labels))
    ours, theirs = outputs(trained, method.needs.student, trained=True), outputs(teacher, method.needs.teacher, trained=False)
    batch = Batch(labels[:BATCH], torch.arange(BATCH), torch.tensor(30), (theirs,))
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        sum(method(ours, theirs, batch).values()).backward()
        times.append(1000 * (time.perf_counter() - started))
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x):
        loss = sum(method(ours, theirs, batch).values())
    learned = storages(method.parameters())
    held = storages([*saved.values(), *everything(theirs, method.needs), *method.buffers()])
    own = {place: size for place, size in held.items() if place not in storages(everything(ours)) and place not in learned}
    del loss
    return statistics.median(times[1:]), (sum(own.values()) + 3 * sum(learned.values())) / 2**20


def main() -> None:
    pairs = sys.argv[1].split(",")
    print("| method |" + "".join(f" {pair.replace(':', ' <- ')}: ms | MiB |" for pair in pairs) + "\n|---|" + "---|---|" * len(pairs))
    for name in sys.argv[2:] or [name for name in METHODS if name != "base"]:
        costs = [cost(name, *pair.split(":")) for pair in pairs]
        print(f"| {name} |" + "".join(f" {took:.1f} | {memory:.1f} |" for took, memory in costs), flush=True)


main()
