"""One step of a student, or of peers: forward, named losses, backward, optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..device import Precision, autocast
from ..methods import Method
from ..randomness import seeded
from ..ranks import current
from ..types import Batch, Outputs
from . import gathering, synchronised
from .at_once import cast_at_once, counted_at_once, set_gradients
from .gathering import whole_batch, whole_outputs
from .parts import Computed, cut, mean
from .student import PeerGroup
from .synchronised import together
from .task import TASK, task_loss


def loss_terms(method: Method, outputs: Outputs, teacher_outputs: Outputs | None, batch: Batch, smoothing: float) -> dict[str, Tensor]:
    """Every unweighted loss term of a network's outputs, float32 scalars by name. Without labels there is no task."""
    task = task_loss(outputs.logits, batch, smoothing)
    terms = {} if task is None else {TASK: task}
    if teacher_outputs is not None or not method.uses_teacher:
        # A method gets the batch without ``targets``: those are for the task alone.
        terms |= method(outputs, teacher_outputs, Batch(batch.labels, batch.indices, batch.epoch, batch.peers))
    return terms


class Objective(nn.Module):
    """What the students of a group minimise: their networks and methods as one module.

    Attributes:
        gathers: whether the ranks put the batch together again before it is compared.
        synchronises: whether they normalise it together.
    """

    def __init__(self, group: PeerGroup) -> None:
        super().__init__()
        self.smoothing = group[0].train.label_smoothing
        self.nets = nn.ModuleList(student.net for student in group)
        self.methods = nn.ModuleList(student.method for student in group)
        self.gathers = gathering.needed((student.method for student in group), current())
        self.synchronises = synchronised.needed(group[0].train, current())

    def forward(self, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision) -> list[dict[str, Tensor]]:
        """Every unweighted term of each student, float32 scalars; the networks run under ``precision``, the losses never in half."""
        return self.compare(self.answer(images, precision), teacher_outputs, batch)

    def answer(self, images: Tensor, precision: Precision) -> list[Outputs]:
        """Each network's outputs."""
        with autocast(images.device, precision), together(self.synchronises):
            return [net(images) for net in self.nets]

    def compare(self, outputs: Sequence[Outputs], teacher_outputs: Outputs | None, batch: Batch) -> list[dict[str, Tensor]]:
        """Every unweighted term of each student, computed from the outputs of all."""
        if self.gathers:
            ranks = current()
            outputs, batch = [whole_outputs(student_outputs, ranks) for student_outputs in outputs], whole_batch(batch, ranks)
            teacher_outputs = None if teacher_outputs is None else whole_outputs(teacher_outputs, ranks)
        student_terms = []
        for number, (student_outputs, method) in enumerate(zip(outputs, self.methods, strict=True)):
            assert isinstance(method, Method)
            peers = (*outputs[:number], *outputs[number + 1 :])
            student_batch = Batch(batch.labels, batch.indices, batch.epoch, peers, batch.targets)
            with together(self.synchronises and not self.gathers):  # what is gathered is the whole batch already
                student_terms.append(loss_terms(method, student_outputs, teacher_outputs, student_batch, self.smoothing))
        return student_terms


def losses(
    group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision
) -> list[dict[str, Tensor]]:
    """Every unweighted term of each student in this phase."""
    student_terms: list[dict[str, Tensor]] = Objective(group)(images, teacher_outputs, batch, precision)
    return student_terms


def layers_seeded(group: PeerGroup, epoch: int, step: int, device: torch.device) -> AbstractContextManager[None]:
    """Inside, what layers of these students draw (dropout) is a function of (seed, epoch, step) alone, on each rank another."""
    seeds = [student.net.layer_seed for student in group if student.net.layer_seed is not None]
    rank = "" if current().leads else f" of rank {current().rank}"
    return seeded(seeds[0], f"layers {step}{rank}", epoch, device) if seeds else nullcontext()


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
    teacher_sums: Mapping[str, Tensor] = {},
) -> None:
    """Move the students of a group by one step, and add their terms to their sums. Nothing here waits for the device.

    Args:
        group: a single student, or peers that teach each other.
        lr: scalar on the device, so that a captured step can read another rate at each replay.
        losses: computes the terms; an engine may pass a compiled function.
        teacher_sums: of each of the teacher's outputs, not finite if the output is not. The tally counts them beside the terms.
    """
    parameters, count = [parameter for student in group for parameter in student.trainable_parameters()], group[0].train.accumulate
    parts = cut(count, images, teacher_outputs if group[0].needs_teacher else None, batch)
    computed = (_computed(group, parameters, *part, precision, losses) for part in parts)
    gradients, student_terms = mean(parameters, computed, count)
    set_gradients(parameters, gradients)

    # Ranks that share the batch out take the mean of their gradients here: all of them are there, and no optimiser has moved yet. Each
    # has equally many images, so that the mean of their means is that of the whole batch. Without a gradient here, there is none anywhere.
    current().mean_([parameter.grad for parameter in parameters if parameter.grad is not None])

    # Optimiser.
    for student, terms in zip(group, student_terms, strict=True):
        student.move(lr)
        student.tally.add({**terms, **teacher_sums})


def _computed(
    group: PeerGroup,
    parameters: Sequence[nn.Parameter],
    images: Tensor,
    teacher_outputs: Outputs | None,
    batch: Batch,
    precision: Precision,
    losses: Losses,
) -> Computed:
    """The gradients of a part of the batch, and each student's unweighted terms."""
    # Forward: each student's outputs, and from these its named losses.
    nets = [student.net for student in group]
    with counted_at_once(nets), cast_at_once(nets, precision) as casts:
        student_terms = losses(group, images, teacher_outputs, batch, precision)

    # One backward pass of the sum serves all peers, because no student's terms have a gradient for another student's weights.
    loss = functools.reduce(torch.add, [student.weighted(terms) for student, terms in zip(group, student_terms, strict=True)])

    # Backward. ``loss.backward()`` would accumulate into ``.grad``, which belongs to the stream that made it; ``autograd.grad`` returns new
    # gradients, so that a graph may hold this step on any stream, and nothing has to be set to zero before.
    used = [casts.get(parameter, parameter) for parameter in parameters]  # under bf16 the forward pass used a cast weight
    return list(torch.autograd.grad(loss, used, allow_unused=True)), [
        {name: value.detach() for name, value in terms.items()} for terms in student_terms
    ]
