"""One step of one student: forward, named losses, backward, optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..device import Precision, autocast
from ..methods import Method
from ..randomness import seeded
from ..types import Batch, Outputs
from .at_once import cast_at_once, counted_at_once, give
from .student import PeerGroup
from .task import TASK, task_loss


def terms(method: Method, own: Outputs, teacher_outputs: Outputs | None, batch: Batch, smoothing: float) -> dict[str, Tensor]:
    """Every unweighted term of a network's outputs, float32 scalars. Without labels there is no task."""
    task = task_loss(own.logits, batch, smoothing)
    found = {} if task is None else {TASK: task}
    if teacher_outputs is not None or not method.uses_teacher:
        found |= method(own, teacher_outputs, Batch(batch.labels, batch.indices, batch.epoch, batch.peers))
    return found


class Objective(nn.Module):
    """What the students of a group minimise: their networks and methods as one module."""

    def __init__(self, group: PeerGroup) -> None:
        super().__init__()
        self.smoothing = group[0].train.label_smoothing
        self.nets = nn.ModuleList(student.net for student in group)
        self.methods = nn.ModuleList(student.method for student in group)

    def forward(self, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision) -> list[dict[str, Tensor]]:
        """Every unweighted term of each student, float32 scalars; the networks run under ``precision``, the losses never in half."""
        return self.compare(self.answer(images, precision), teacher_outputs, batch)

    def answer(self, images: Tensor, precision: Precision) -> list[Outputs]:
        """What each network gives."""
        with autocast(images.device, precision):
            return [net(images) for net in self.nets]

    def compare(self, given: Sequence[Outputs], teacher_outputs: Outputs | None, batch: Batch) -> list[dict[str, Tensor]]:
        """Every unweighted term of each student, of what all gave."""
        found = []
        for number, (own, method) in enumerate(zip(given, self.methods, strict=True)):
            assert isinstance(method, Method)
            peers = (*given[:number], *given[number + 1 :])
            told = Batch(batch.labels, batch.indices, batch.epoch, peers, batch.targets)
            found.append(terms(method, own, teacher_outputs, told, self.smoothing))
        return found


def losses(
    group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision
) -> list[dict[str, Tensor]]:
    """Every unweighted term of this phase, of each student."""
    found: list[dict[str, Tensor]] = Objective(group)(images, teacher_outputs, batch, precision)
    return found


def drawing(group: PeerGroup, epoch: int, step: int, device: torch.device) -> AbstractContextManager[None]:
    """What layers of these students draw inside, as dropout does, is a function of (seed, epoch, step) alone."""
    seeds = [student.net.layer_seed for student in group if student.net.layer_seed is not None]
    return seeded(seeds[0], f"layers {step}", epoch, device) if seeds else nullcontext()


Losses = Callable[[PeerGroup, Tensor, "Outputs | None", Batch, Precision], list[dict[str, Tensor]]]


def train_step(
    group: PeerGroup,
    images: Tensor,
    teacher_outputs: Outputs | None,
    batch: Batch,
    *,
    lr: Tensor,
    precision: Precision,
    losses: Losses = losses,
    heard: Mapping[str, Tensor] = {},
) -> None:
    """Move the students of a group by one step, and add their terms to their sums. Nothing here waits for the device.

    ``lr`` is a scalar on the device, ``heard`` says whether what the teacher said is finite. Gradients are asked for, not accumulated, so
    that a graph may hold this step on any stream. No term has a gradient for another student's weights, so that one backward pass of the
    sum serves all.
    """
    nets = [student.net for student in group]
    with counted_at_once(nets), cast_at_once(nets, precision) as casts:
        found = losses(group, images, teacher_outputs if group[0].needs_teacher else None, batch, precision)
    weighted = [student.weighted(terms) for student, terms in zip(group, found, strict=True)]
    total = functools.reduce(torch.add, weighted)
    parameters = [parameter for student in group for parameter in student.trainable_parameters()]
    asked = [casts.get(parameter, parameter) for parameter in parameters]
    give(parameters, torch.autograd.grad(total, asked, allow_unused=True))
    for student, terms in zip(group, found, strict=True):
        for param_group in student.optimizer.param_groups:
            param_group["lr"] = lr
        student.optimizer.step()
        student.tally.add({**terms, **heard})
