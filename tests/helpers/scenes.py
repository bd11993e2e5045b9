"""What a step hands to a method, drawn, and what the method makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowdistill.methods import Method
from flowdistill.types import Batch, NetSpec, Outputs
from helpers.method_cases import wanted


class Scene(NamedTuple):
    """What a step hands to a method."""

    student: Outputs
    teacher: Outputs
    batch: Batch


def draw(spec: NetSpec, seed: int, n: int, *, relu: bool = True) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    after_relu = (tap for tap in spec.taps if tap.name not in ("cam", "projected") and not tap.name.endswith(".pre"))
    before = {tap.name: normal(n, tap.channels, tap.height, tap.width) + 0.3 for tap in after_relu}
    maps = {tap: m.clamp(min=0) if relu else m for tap, m in before.items()} | {f"{stage}.pre": before[stage] for stage in spec.stages}
    logits, embedding = 2 * normal(n, spec.classes), normal(n, spec.embedding)
    cam, projected, last = spec.tap("cam"), spec.tap("projected"), spec.stages[-1]
    maps["cam"] = normal(n, cam.channels, cam.height, cam.width)
    own = projected.shape == spec.tap(last).shape  # as a teacher's is
    maps["projected"] = maps[last] if own else normal(n, projected.channels, projected.height, projected.width).clamp(min=0)
    return Outputs(logits, embedding, maps)


def scene(pair: tuple[NetSpec, NetSpec], n: int = 3, *, relu: bool = True) -> Scene:
    teacher = draw(pair[1], 2, n, relu=relu)
    return Scene(draw(pair[0], 1, n, relu=relu), teacher, Batch(torch.arange(n) % 5, torch.arange(n) * 3, torch.tensor(4), (teacher,)))


def each_tensor(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    return Outputs(change(outputs.logits), change(outputs.embedding), {tap: change(m) for tap, m in outputs.maps.items()})


def both(given: Scene, change: Callable[[Tensor], Tensor]) -> Scene:
    peers = tuple(each_tensor(peer, change) for peer in given.batch.peers)
    return Scene(each_tensor(given.student, change), each_tensor(given.teacher, change), replace(given.batch, peers=peers))


def rows(given: Scene, index: list[int]) -> Scene:
    picked = both(given, lambda x: x[index])
    return picked._replace(batch=replace(picked.batch, labels=given.batch.labels[index], indices=given.batch.indices[index]))


def tensors(outputs: Outputs) -> dict[str, Tensor]:
    return {"logits": outputs.logits, "embedding": outputs.embedding, **outputs.maps}


def trainable(given: Scene) -> Scene:
    """Leaves that take gradients for the student and its peers; the teacher detached from leaves of its own, as in training."""

    def leaves(outputs: Outputs) -> Outputs:
        return each_tensor(outputs, lambda x: x.clone().requires_grad_())

    teacher = each_tensor(leaves(given.teacher), Tensor.detach)
    return Scene(leaves(given.student), teacher, replace(given.batch, peers=tuple(map(leaves, given.batch.peers))))


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def gradients(method: Method, given: Scene) -> dict[str, Tensor]:
    """Of everything that the method pulls at, and of its parameters."""
    return terms_and_gradients(method, given, method)[1]


def terms_and_gradients(
    method: Method, given: Scene, call: Callable[..., dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ``call`` gives, which stands in for the method, and the gradients of its sum."""
    given = trainable(given)
    leaves = {name: x for name, x in tensors(given.student).items() if name in wanted(method)} | dict(method.named_parameters())
    terms = call(*given)
    found = torch.autograd.grad(total(terms), list(leaves.values()))
    return {name: term.detach() for name, term in terms.items()}, dict(zip(leaves, found, strict=True))
