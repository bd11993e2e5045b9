"""One step of one student: forward, named losses, backward, optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import FAILURES, UserError, shortage, summary
from ..config import TrainConfig
from ..device import Precision, autocast
from ..methods import Method, Phase, Settled
from ..methods.base import full
from ..models import Network
from ..models.state import kept
from ..randomness import seeded
from ..taps import NO_LABEL, Batch, Outputs
from .at_once import cast_at_once, counted_at_once, give
from .freeze import freeze
from .optim import build_optimizer, trained_parameters
from .said import looked_at
from .schedule import WARMUP, lr_factor
from .tally import Tally, are

TASK = "task"  # the cross-entropy with the labels


class Student:
    """A network in training: its weights, its method, its optimiser, and the sums of its losses over the epoch.

    Attributes:
        peers: the students that it teaches and is taught by, where its method is mutual.
    """

    def __init__(self, net: Network, method: Method, settled: Settled, train: TrainConfig) -> None:
        self.net, self.method, self.settled, self.train = net, method, settled, train
        self._still = freeze(net, train.freeze)
        for phase in settled.phases:
            if not trained_parameters(net, method, phase):
                raise UserError(f"{self._frozen} leaves nothing to train in phase {phase.name!r}; freeze less")
        self.optimizer: torch.optim.SGD
        self.weights: dict[str, float] = {}
        self.tally = Tally((), (), next(net.parameters()).device)
        self.peers: tuple[Student, ...] = ()
        self.chosen_epoch = 0
        self.chosen_correct = -1
        self._chosen: dict[str, Tensor] | None = None

    @property
    def _frozen(self) -> str:
        """What holds parts of it, as messages name it."""
        return f"train.freeze={','.join(self.train.freeze)}" if self.train.freeze else f"requires_grad=False in {self.net.spec.name}"

    def refuse_idle(self, terms: Mapping[str, Tensor]) -> None:
        """Look at a batch's terms with their gradients.

        Raises:
            UserError: a phase none of whose terms depends on anything that is trained.
        """
        for phase in self.settled.phases:
            if not any(terms[term].requires_grad for term in self.settled.counted(phase) if term in terms):
                raise UserError(f"{self._frozen} leaves nothing to train that a loss of phase {phase.name!r} depends on; freeze less")

    def refuse_broken(self, own: Outputs, terms: Mapping[str, Tensor]) -> None:
        """Look at its weights before any step, at its outputs of a batch that is finite, and at the terms; waits for the device.

        Raises:
            UserError: something is not finite, though the teacher's outputs are.
        """
        name, when = self.net.spec.name, "on the first batch, before any step"
        if not self.sound():
            raise UserError(f"student {name}: its {self.broken_parts()[0]} is not finite; is its file whole?")
        if not own.logits.detach().amax(1).isfinite().all():  # one may rule classes out by -inf
            raise UserError(f"student {name}: its logits are not finite {when}, though its weights are; mend it, or choose another")
        if broken := [term for term, value in terms.items() if not value.isfinite()]:
            whose = "what teacher and student give is" if self.method.uses_teacher else "its logits are"
            cure = f"give {self.settled.name} other options, or choose another method or student"
            raise UserError(f"{self.settled.name} {name}: {are(broken)} not finite {when}, though {whose}; {cure}")

    def choose(self, epoch: int, correct: int, *, keep: bool) -> None:
        """This epoch's weights are to ship; with ``keep`` a copy outlives the epochs to come."""
        self.chosen_epoch, self.chosen_correct = epoch, correct
        self._chosen = {name: value.clone() for name, value in self.net.state_dict().items()} if keep else None

    def restore_chosen(self) -> None:
        """Put the chosen weights back."""
        if self._chosen is not None:
            self.net.take(self._chosen)

    def begin_phase(self, number: int) -> None:
        """A fresh optimiser, and the weights of the terms that count."""
        self.phase: Phase = self.settled.phases[number]
        self.optimizer = build_optimizer(self.net, self.method, self.phase, self.train)
        self.weights = self.settled.counted(self.phase)
        self._factors = torch.tensor([*self.weights.values()], device=next(self.net.parameters()).device)
        task = () if self.train.mixup is True else (TASK,)
        terms = (*task, *self.method.terms) if self.taught or not self.method.uses_teacher else task
        self.tally = Tally(terms, self.looks_at, next(self.net.parameters()).device)

    @property
    def looks_at(self) -> tuple[str, ...]:
        """What of the teacher's outputs its method looks at in this phase."""
        return looked_at(self.method.needs) if self.taught else ()

    @property
    def sums(self) -> dict[str, Tensor]:
        """Each unweighted term's sum over the epoch; scalars on the device."""
        return dict(zip(self.tally.names, self.tally.totals, strict=False))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that the epochs to come depend on, between two epochs: tensors and counters. The tensors are not copies."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        tensors |= {f"chosen.{name}": value for name, value in (self._chosen or {}).items()}
        for number, parameter in enumerate(self.trained()):
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{number}"] = momentum
        return tensors, {"chosen_epoch": self.chosen_epoch, "chosen_correct": self.chosen_correct}

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int], *, phase: int | None) -> None:
        """Put a state back. ``phase`` is the one that it was taken in the midst of, None between two phases.

        A momentum takes the memory layout of its parameter: SGD's fused form computes wrong updates from another, silently.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.net.take(part("net."))
        self.method.load_state_dict(part("method."))
        self.chosen_epoch, self.chosen_correct = counters["chosen_epoch"], counters["chosen_correct"]
        chosen, device = part("chosen."), next(self.net.parameters()).device
        self._chosen = {name: value.to(device) for name, value in chosen.items()} or None
        if phase is None:
            return
        self.begin_phase(phase)
        for number, parameter in enumerate(self.trained()):
            if f"momentum.{number}" in tensors:
                momentum = torch.empty_like(parameter, requires_grad=False)
                self.optimizer.state[parameter]["momentum_buffer"] = momentum.copy_(tensors[f"momentum.{number}"])

    def sound(self) -> Tensor:
        """Whether its weights are finite: a broken one need not show in the logits, behind a ReLU. A scalar that stays on the device."""
        return torch.stack([parameter.detach().isfinite().all() for parameter in self.net.parameters()]).all()

    def broken_parts(self) -> list[str]:
        """Its first weight and its first buffer that are not finite, as messages name them; a buffer may mask by -inf.

        Waits for the device.
        """
        places = (self.net.body, self.net)  # the names of the body are the user's own
        weights = (f"weight {name}" for it in places for name, value in it.named_parameters() if not value.isfinite().all())
        buffers = (f"buffer {name}" for it in places for name, value in it.named_buffers() if not (value < torch.inf).all())
        return [found for found in (next(weights, ""), next(buffers, "")) if found]

    def trained(self) -> list[nn.Parameter]:
        """What the optimiser moves in this phase."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def taught(self) -> bool:
        """Whether the teacher is needed in this phase."""
        return self.method.uses_teacher and any(term != TASK for term in self.weights)

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """What it minimises: the weighted sum of the terms that count, a scalar."""
        return torch.dot(torch.stack([terms[term] for term in self.weights]), self._factors)

    def begin_epoch(self) -> None:
        """Train mode, but for what is frozen, and sums at zero."""
        self.net.train()
        for module in self._still:
            module.eval()
        self.method.train()
        self.tally.reset()

    def learning_rate(self, epoch: int, epochs: int, step: int, steps: int) -> float:
        """The rate of a step; ``epoch`` and ``step`` are 0-based within the phase and the epoch."""
        if epoch < self.train.warmup_epochs and not self.phase.milestones:
            return (self.phase.lr or self.train.lr) * WARMUP
        kind = "step" if self.phase.milestones else self.train.schedule
        milestones = self.phase.milestones or self.train.milestones
        factor = lr_factor(kind, step=epoch * steps + step, steps=epochs * steps, epoch_share=epoch / epochs, milestones=milestones)
        return (self.phase.lr or self.train.lr) * factor

    def rates(self, epoch: int, epochs: int, steps: int) -> Tensor:
        """[steps] the rate of every step of an epoch, on the student's device."""
        rates = [self.learning_rate(epoch, epochs, step, steps) for step in range(steps)]
        return torch.tensor(rates, device=next(self.net.parameters()).device)


Group = tuple[Student, ...]
"""Students that one step moves: a single one, or those that teach each other."""


def task_loss(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor | None:
    """The cross-entropy of logits [N, K] with the labels: L(y) = -mean_n sum_k q_nk log p_nk, q_nk = (1 - e) [k = y_n] + e / K.

    e is ``smoothing``: label smoothing, Szegedy et al. 2016 (Rethinking the Inception Architecture), section 7, with uniform u(k). Of mixed
    images with targets: share L(own) + (1 - share) L(partner's), Zhang et al., ICLR 2018, the authors' code. The mean is over the images
    that have a label, 0 where none of the batch has one; None where the step knows no labels at all. Computed in at least float32.
    """

    def summed(labels: Tensor, reduction: str = "sum") -> Tensor:
        return F.cross_entropy(full(logits), labels, ignore_index=NO_LABEL, label_smoothing=smoothing, reduction=reduction)

    if batch.targets is None:
        return None if batch.labels is None else summed(batch.labels, "mean")
    own, counted, other, share = batch.targets
    total = summed(own)
    if other is not None and share is not None:
        total = (share * total + (1 - share) * summed(other)).squeeze()
    return total / counted


def terms(method: Method, own: Outputs, taught: Outputs | None, batch: Batch, smoothing: float) -> dict[str, Tensor]:
    """Every unweighted term of a network's outputs, float32 scalars. Without labels there is no task."""
    task = task_loss(own.logits, batch, smoothing)
    found = {} if task is None else {TASK: task}
    if taught is not None or not method.uses_teacher:
        found |= method(own, taught, Batch(batch.labels, batch.indices, batch.epoch, batch.peers))
    return found


class Objective(nn.Module):
    """What the students of a group minimise: their networks and methods as one module."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.smoothing = group[0].train.label_smoothing
        self.nets = nn.ModuleList(student.net for student in group)
        self.methods = nn.ModuleList(student.method for student in group)

    def forward(self, images: Tensor, taught: Outputs | None, batch: Batch, precision: Precision) -> list[dict[str, Tensor]]:
        """Every unweighted term of each student, float32 scalars; the networks run under ``precision``, the losses never in half."""
        return self.compare(self.answer(images, precision), taught, batch)

    def answer(self, images: Tensor, precision: Precision) -> list[Outputs]:
        """What each network gives."""
        with autocast(images.device, precision):
            return [net(images) for net in self.nets]

    def compare(self, given: Sequence[Outputs], taught: Outputs | None, batch: Batch) -> list[dict[str, Tensor]]:
        """Every unweighted term of each student, of what all gave."""
        found = []
        for number, (own, method) in enumerate(zip(given, self.methods, strict=True)):
            assert isinstance(method, Method)
            peers = (*given[:number], *given[number + 1 :])
            told = Batch(batch.labels, batch.indices, batch.epoch, peers, batch.targets)
            found.append(terms(method, own, taught, told, self.smoothing))
        return found


def losses(group: Group, images: Tensor, taught: Outputs | None, batch: Batch, precision: Precision) -> list[dict[str, Tensor]]:
    """Every unweighted term of this phase, of each student."""
    found: list[dict[str, Tensor]] = Objective(group)(images, taught, batch, precision)
    return found


def drawing(group: Group, epoch: int, step: int, device: torch.device) -> AbstractContextManager[None]:
    """What layers of these students draw inside, as dropout does, is a function of (seed, epoch, step) alone."""
    seeds = [student.net.draws_from for student in group if student.net.draws_from is not None]
    return seeded(seeds[0], f"layers {step}", epoch, device) if seeds else nullcontext()


Losses = Callable[[Group, Tensor, "Outputs | None", Batch, Precision], list[dict[str, Tensor]]]


def train_step(
    group: Group,
    images: Tensor,
    taught: Outputs | None,
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
        found = losses(group, images, taught if group[0].taught else None, batch, precision)
    weighted = [student.weighted(terms) for student, terms in zip(group, found, strict=True)]
    total = functools.reduce(torch.add, weighted)
    trained = [parameter for student in group for parameter in student.trained()]
    asked = [casts.get(parameter, parameter) for parameter in trained]
    give(trained, torch.autograd.grad(total, asked, allow_unused=True))
    for student, terms in zip(group, found, strict=True):
        for parameters in student.optimizer.param_groups:
            parameters["lr"] = lr
        student.optimizer.step()
        student.tally.add({**terms, **heard})


def gradient_ratios(
    group: Group, images: Tensor, taught: Outputs | None, batch: Batch, precision: Precision
) -> dict[Student, dict[str, float]]:
    """The norm of each weighted term's gradient on its network's weights, relative to that of the task at weight 1.

    Leaves the students as they were, batch statistics and what their methods remember included.

    Raises:
        UserError: a network's own code fails in train mode, something is not finite, or nothing that is trained has a gradient.
    """
    objective = Objective(group)
    for student in group:
        student.begin_epoch()
    with kept(objective), drawing(group, 0, 0, images.device):
        with _failures_of(group, images):
            given = objective.answer(images, precision)
        for student, outputs in zip(group, given, strict=True):
            student.net.refuse_cut(outputs, embedding=student.method.needs.embedding)
        found = objective.compare(given, taught, batch)
        for student, outputs, terms in zip(group, given, found, strict=True):
            student.refuse_broken(outputs, terms)
        return _ratios(group, images, found)


def _ratios(group: Group, images: Tensor, found: Sequence[dict[str, Tensor]]) -> dict[Student, dict[str, float]]:
    """See ``gradient_ratios``, from the terms of each student."""

    def norm(value: Tensor, weights: list[nn.Parameter]) -> float:
        if not value.requires_grad:
            return 0.0  # it looks at frozen parts alone
        with _failures_of(group, images):
            gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0  # a term may train the method's own parts alone

    ratios = {}
    for student, terms in zip(group, found, strict=True):
        student.refuse_idle(terms)
        weights = [parameter for parameter in student.net.parameters() if parameter.requires_grad]
        task = max(norm(terms.pop(TASK), weights), 1e-30)
        ratios[student] = {term: norm(student.settled.weights[term] * value, weights) / task for term, value in terms.items()}
    return ratios


def refuse_short(group: Group, images: Tensor, taught: Outputs | None, batch: Batch, precision: Precision, count: int) -> None:
    """Compute the terms of the first ``count`` images of a batch, as many as the smallest batch to come will have; changes nothing.

    Raises:
        UserError: the students' layers or methods can't take so few.
    """

    def few(value: Tensor | None) -> Any:
        return None if value is None else value[:count]

    short = Batch(few(batch.labels), few(batch.indices), batch.epoch)
    if taught is not None:
        taught = Outputs(few(taught.logits), few(taught.embedding), {name: few(value) for name, value in taught.maps.items()})
    objective = Objective(group)
    try:
        with torch.no_grad(), kept(objective), drawing(group, 0, 0, images.device), _failures_of(group, images[:count]):
            objective(images[:count], taught, short, precision)
    except UserError as error:
        raise UserError(f"{error}; so few images has the smallest batch: let the loader drop its last one (drop_last=True)") from None


@contextmanager
def _failures_of(group: Group, images: Tensor) -> Iterator[None]:
    """What the networks' own code raises, in one line."""
    try:
        yield
    except UserError:
        raise
    except FAILURES as error:
        names = ", ".join(dict.fromkeys(student.net.spec.name for student in group))
        cure = f"; {shortage(error)}" if shortage(error) else ""
        raise UserError(f"student {names} can't be trained on a batch of {len(images)}: {summary(error)}{cure}") from None
