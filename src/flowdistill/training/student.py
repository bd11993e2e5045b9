"""What is trained: a student, the peers that one step moves together, and the group of students that share a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import UserError
from ..config import TrainConfig
from ..data.interfaces import Batches
from ..methods import Method, Phase, ResolvedMethod
from ..models import Network
from ..types import Outputs
from .average import Average
from .evaluate import answering
from .freeze import freeze
from .optim import build_optimizer, clip, memory, parameters_of, rate_factors, remember, set_rate, trainable_parameters
from .schedule import WARMUP, lr_factor
from .tally import Tally, are
from .task import TASK
from .teacher import Teacher
from .teacher_sums import output_names


class Student:
    """A network in training: its weights, its method, its optimiser, and the sums of its losses over the epoch.

    Attributes:
        peers: the students that it teaches and is taught by, if its method is mutual.
    """

    def __init__(self, net: Network, method: Method, resolved: ResolvedMethod, train: TrainConfig) -> None:
        self.net, self.method, self.resolved, self.train = net, method, resolved, train
        self._still = freeze(net, train.freeze)
        for phase in resolved.phases:
            if not trainable_parameters(net, method, phase):
                raise UserError(f"{self._frozen} leaves nothing to train in phase {phase.name!r}; freeze less")
        rate_factors(net, train.layer_decay)  # before anything is trained
        self.optimizer: torch.optim.Optimizer
        self.average: Average | None = None
        self.weights = {}
        self.tally = Tally((), (), next(net.parameters()).device)
        self.peers: tuple[Student, ...] = ()
        self.chosen_epoch = 0
        self.chosen_correct = -1
        self._chosen: dict[str, Tensor] | None = None

    @property
    def _frozen(self) -> str:
        """Why parts of it are not trained, as messages say it."""
        return f"train.freeze={','.join(self.train.freeze)}" if self.train.freeze else f"requires_grad=False in {self.net.spec.name}"

    def refuse_idle(self, terms: Mapping[str, Tensor]) -> None:
        """Look at a batch's terms with their gradients.

        Raises:
            UserError: a phase none of whose terms depends on anything that is trained.
        """
        for phase in self.resolved.phases:
            if not any(terms[term].requires_grad for term in self.resolved.counted(phase) if term in terms):
                raise UserError(f"{self._frozen} leaves nothing to train that a loss of phase {phase.name!r} depends on; freeze less")

    def refuse_broken(self, outputs: Outputs, terms: Mapping[str, Tensor]) -> None:
        """Look at its weights before any step, at its outputs for a batch that is finite, and at the terms; waits for the device.

        Raises:
            UserError: something is not finite, though the teacher's outputs are.
        """
        name, when = self.net.spec.name, "on the first batch, before any step"
        if not self.sound():
            raise UserError(f"student {name}: its {self.broken_parts()[0]} is not finite; is its file whole?")
        answer, its = (outputs.logits, "its logits are") if self.has_classifier else (outputs.embedding, "its features are")
        if not answer.detach().amax(1).isfinite().all():  # one may rule classes out by -inf
            raise UserError(f"student {name}: {its} not finite {when}, though its weights are; mend it, or choose another")
        if broken := [term for term, value in terms.items() if not value.isfinite()]:
            whose = "what teacher and student give is" if self.method.uses_teacher else its
            cure = f"give {self.resolved.name} other options, or choose another method or student"
            raise UserError(f"{self.resolved.name} {name}: {are(broken)} not finite {when}, though {whose}; {cure}")

    def choose(self, epoch: int, correct: int, *, keep: bool) -> None:
        """Choose this epoch's weights to ship. With ``keep``, a copy of them outlives the epochs to come."""
        self.chosen_epoch, self.chosen_correct = epoch, correct
        with self.as_measured():
            self._chosen = {name: value.clone() for name, value in self.net.state_dict().items()} if keep else None

    def restore_chosen(self) -> None:
        """Put what ships into the network: the chosen weights, or the average of the last ones. No step can follow."""
        if self._chosen is not None:
            self.net.take(self._chosen)
        elif self.average is not None:
            self.average.exchange()

    def as_measured(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has what is measured and ships: its weights, or with ``train.ema`` their average."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def move(self, lr: Tensor) -> None:
        """Take a step along the gradients by this rate, a scalar; nothing waits for the device."""
        clip(self.trainable_parameters(), self.train.clip)
        set_rate(self.optimizer, lr)
        self.optimizer.step()
        if self.average is not None:
            self.average.follow()

    def begin_phase(self, number: int) -> None:
        """Start a phase: a fresh optimiser, a fresh average, and the weights of the terms that count in it."""
        self.phase: Phase = self.resolved.phases[number]
        self.optimizer = build_optimizer(self.net, self.method, self.phase, self.train)
        self.average = None if self.train.ema is None else Average(self.net, self.train.ema)
        self.weights = self.resolved.counted(self.phase)
        task = () if self.train.mixup is True or not self.has_classifier else (TASK,)
        terms = (*task, *self.method.terms) if self.needs_teacher or not self.method.uses_teacher else task
        self.tally = Tally(terms, self.teacher_output_names, next(self.net.parameters()).device)

    @property
    def has_classifier(self) -> bool:
        """Whether it gives logits. Without them it is a backbone, which no labels teach."""
        return self.net.spec.classes > 0

    @property
    def teacher_output_names(self) -> tuple[str, ...]:
        """Names of the teacher's outputs that its method uses in this phase."""
        return output_names(self.method.needs) if self.needs_teacher else ()

    @property
    def sums(self) -> dict[str, Tensor]:
        """Each unweighted term's sum over the epoch; scalars on the device."""
        return dict(zip(self.tally.names, self.tally.totals, strict=False))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that the epochs to come depend on: tensors and counters, to be read between two epochs. The tensors are not copies."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        tensors |= {f"chosen.{name}": value for name, value in (self._chosen or {}).items()}
        tensors |= {f"optimizer.{name}": value for name, value in memory(self.optimizer).items()}
        tensors |= {f"average.{name}": value for name, value in (self.average.state() if self.average else {}).items()}
        return tensors, {"chosen_epoch": self.chosen_epoch, "chosen_correct": self.chosen_correct}

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int], *, phase: int | None) -> None:
        """Put a state back. ``phase`` is the phase in whose midst it was taken, None if between two phases."""

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
        before_other_optimizers = {f"momentum_buffer.{number}": value for number, value in part("momentum.").items()}
        remember(self.optimizer, before_other_optimizers | part("optimizer."))
        if self.average is not None:
            self.average.load(part("average."))

    def sound(self) -> Tensor:
        """Whether its weights are finite; a scalar that stays on the device. Behind a ReLU, a broken weight may not show in the logits."""
        return torch.stack([parameter.detach().isfinite().all() for parameter in self.net.parameters()]).all()

    def broken_parts(self) -> list[str]:
        """Its first weight and its first buffer that are not finite, as messages name them; a buffer may mask by -inf.

        Waits for the device.
        """
        modules = (self.net.body, self.net)  # the body first: its names are the user's own
        weights = (f"weight {name}" for module in modules for name, value in module.named_parameters() if not value.isfinite().all())
        buffers = (f"buffer {name}" for module in modules for name, value in module.named_buffers() if not (value < torch.inf).all())
        return [part for part in (next(weights, ""), next(buffers, "")) if part]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser moves in this phase."""
        return parameters_of(self.optimizer)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is needed in this phase."""
        return self.method.uses_teacher and any(term != TASK for term in self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that counts in this phase."""
        return self._weights

    @weights.setter
    def weights(self, values: dict[str, float]) -> None:
        self._weights = values
        self._factors = torch.tensor([*values.values()], device=next(self.net.parameters()).device)

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Its loss: the weighted sum of the terms that count, a scalar."""
        return torch.dot(torch.stack([terms[term] for term in self.weights]), self._factors)

    def begin_epoch(self) -> None:
        """Start an epoch: train mode, except for frozen modules, and sums at 0."""
        self.net.train()
        for module in self._still:
            module.eval()
        self.method.train()
        self.tally.reset()

    def learning_rate(self, epoch: int, epochs: int, step: int, steps: int) -> float:
        """The rate of a step; ``epoch`` counts from 0 within the phase, ``step`` from 0 within the epoch."""
        done, warm_up = epoch * steps + step, self.train.warmup_steps
        if not self.phase.milestones and (epoch < self.train.warmup_epochs or done < warm_up):
            return (self.phase.lr or self.train.lr) * ((done + 1) / warm_up if warm_up else WARMUP)
        kind = "step" if self.phase.milestones else self.train.schedule
        milestones = self.phase.milestones or self.train.milestones
        factor = lr_factor(kind, step=done, steps=epochs * steps, epoch_share=epoch / epochs, milestones=milestones)
        return (self.phase.lr or self.train.lr) * factor

    def rates(self, epoch: int, epochs: int, steps: int) -> Tensor:
        """[steps] the rate of every step of an epoch, on the student's device."""
        rates = [self.learning_rate(epoch, epochs, step, steps) for step in range(steps)]
        return torch.tensor(rates, device=next(self.net.parameters()).device)


PeerGroup = tuple[Student, ...]
"""Students that one step moves together: a single one, or those that teach each other."""


@dataclass
class SeedGroup:
    """The students of one seed: they share its batches and its teacher."""

    batches: Batches
    teacher: Teacher | None
    students: list[Student]

    @property
    def peer_groups(self) -> list[PeerGroup]:
        """The students in groups: those that teach each other are one group, any other student is alone in one."""
        groups: dict[Student, PeerGroup] = {}
        for student in self.students:
            if student not in groups:
                group = (student, *student.peers)
                groups |= dict.fromkeys(group, group)
        return list(dict.fromkeys(groups.values()))

    @property
    def needs_teacher(self) -> bool:
        """Whether a student needs the teacher in this phase."""
        return self.teacher is not None and any(student.needs_teacher for student in self.students)

    def teacher_sums(self, teacher_outputs: Outputs | None) -> dict[str, Tensor]:
        """The sum of each of the teacher's outputs, once for all students; it is not finite if the output is not."""
        return {} if teacher_outputs is None or self.teacher is None else self.teacher.output_sums(teacher_outputs)

    def teaching(self, epoch: int, step: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the teacher answers: what it draws is a function of (seed, epoch, step) alone, and no buffer of it moves."""
        if self.teacher is None:
            return contextlib.nullcontext()
        return answering(self.teacher.original, "teacher", step, self.batches.data.device, seed=self.batches.seed, epoch=epoch)
