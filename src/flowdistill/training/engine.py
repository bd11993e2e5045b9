"""How the steps of a cohort are computed: plainly, or compiled. ``graph.py`` has the third way, ``engine_choice.py`` chooses."""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checks import summary
from ..data.augment import Draws
from ..data.batches import SeedBatches
from ..data.interfaces import Supply
from ..device import Precision, synchronize
from ..models import Network
from ..models.state import kept
from ..types import Batch, Outputs
from .evaluate import Evaluation, evaluate_all, plainly
from .step import Objective, drawing, losses, train_step
from .student import PeerGroup, SeedGroup, Student
from .teacher import Teacher

EVALUATION_COMPILED = ("cuda",)  # kinds of devices on which evaluation is compiled where training is


class Engine:
    """How the steps of a cohort are computed: operation by operation, unless an engine does a part otherwise.

    Attributes:
        name: as a run's record has it.
        why: as a user is told, why it is this one.
    """

    name: str

    def __init__(self, precision: Precision, why: str) -> None:
        self.precision, self.why = precision, why

    def ready(self, seed_groups: Sequence[SeedGroup]) -> Engine:  # noqa: ARG002 (the others look)
        """Before an epoch: set up what its phase and students need. The engine to use: itself, or what it falls back to, with ``why``."""
        return self

    def epoch(self, seed_groups: Sequence[SeedGroup], number: int, rates: Mapping[Student, Tensor]) -> Iterator[None]:
        """Train every student for one epoch (0-based ``number`` over all phases), a step at a time."""
        for step, batches in enumerate(zip(*(seed_group.batches.epoch(number) for seed_group in seed_groups), strict=True)):
            for seed_group, (images, batch) in zip(seed_groups, batches, strict=True):
                with seed_group.teaching(number, step):
                    teacher_outputs = self.teach(seed_group, images)
                heard = seed_group.heard(teacher_outputs)
                for group in seed_group.peer_groups:
                    lr = rates[group[0]][step]
                    with drawing(group, number, step, images.device):
                        train_step(group, images, teacher_outputs, batch, lr=lr, precision=self.precision, losses=self.losses, heard=heard)
            yield

    def of(self, student: Student) -> str:  # noqa: ARG002 (a graph tells)
        """The name of the engine that trains a student, as its record has it."""
        return self.name

    def draw(self, source: SeedBatches, draws: Draws, shown: Tensor, epoch: Tensor) -> tuple[Tensor, Batch]:
        """The batch at the places ``shown`` of an epoch that was drawn, as a graph draws it."""
        return source.batch(draws, shown, epoch)

    def teach(self, seed_group: SeedGroup, images: Tensor) -> Outputs | None:
        """What the teacher says of a batch, once for all students of the seed group."""
        return self.ask(seed_group.teacher, images) if seed_group.teacher is not None and seed_group.needs_teacher else None

    def ask(self, teacher: Teacher, images: Tensor) -> Outputs:
        """A teacher's outputs."""
        return teacher.teach(images)

    def losses(
        self, group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision
    ) -> list[dict[str, Tensor]]:
        """Each student's terms on a batch."""
        return losses(group, images, teacher_outputs, batch, precision)

    def evaluate(self, students: Sequence[Student], data: Supply) -> list[Evaluation]:
        """Measure students on the epoch's images."""
        return evaluate_all([student.net for student in students], data.epoch_images, self.precision)


class EagerEngine(Engine):
    """Operation by operation in all parts: the plain, readable engine that the others are held to."""

    name = "eager"


class CompiledEngine(Engine):
    """Teacher, forward and losses by torch.compile, in static shapes: once for all students of one architecture and method."""

    name = "compiled"

    def __init__(self, precision: Precision, why: str) -> None:
        super().__init__(precision, why)
        self._losses: dict[Any, Callable[..., list[dict[str, Tensor]]]] = {}
        self._teachers: dict[Teacher, Callable[[Tensor], Outputs]] = {}
        self._batches: dict[Any, Callable[[Draws, Tensor, Tensor], tuple[Tensor, Batch]]] = {}
        self._evaluated: dict[Any, Callable[[dict[str, Tensor], Tensor], Outputs] | None] = {}
        self._tried: set[Any] = set()

    def ready(self, seed_groups: Sequence[SeedGroup]) -> Engine:
        """Compile what is new, by one step that is taken back."""
        new = {_kind(group) for seed_group in seed_groups for group in seed_group.peer_groups} | {
            seed_group.teacher for seed_group in seed_groups if seed_group.needs_teacher
        }
        if new <= self._tried:
            return self
        try:
            with restored_after(seed_groups), quiet():
                next(self.epoch(seed_groups, 0, zero_rates(seed_groups)))
        except Exception as error:  # a compiler that is missing, or one that can't
            return EagerEngine(self.precision, f"compiling failed ({summary(error)})")
        self._tried |= new
        return self

    def draw(self, source: SeedBatches, draws: Draws, shown: Tensor, epoch: Tensor) -> tuple[Tensor, Batch]:
        """Compiled once for all seed batches of the same images: gather, crop, flip and normalisation in a few kernels."""
        kind = (source.data, source.batch_size, source.mixup)
        if kind not in self._batches:
            self._batches[kind] = _compile(_drawing(source))
        return self._batches[kind](draws, shown, epoch)

    def ask(self, teacher: Teacher, images: Tensor) -> Outputs:
        """Compiled once a teacher."""
        if teacher not in self._teachers:
            self._teachers[teacher] = _compile(_teaching(teacher))
        return self._teachers[teacher](images)

    def losses(
        self, group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision
    ) -> list[dict[str, Tensor]]:
        """Compiled once a kind of student; weights and statistics are its inputs."""
        kind = _kind(group)
        if kind not in self._losses:
            self._losses[kind] = _compile(_computing(group, precision))
        objective = Objective(group)
        tensors = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
        return self._losses[kind](tensors, images, teacher_outputs, batch)

    def evaluate(self, students: Sequence[Student], data: Supply) -> list[Evaluation]:
        """Compiled as well on a GPU, where plain passes are bound by launches; on a CPU compiling costs more than it saves."""
        ask = self._answer if data.device.type in EVALUATION_COMPILED else plainly
        return evaluate_all([student.net for student in students], data.epoch_images, self.precision, ask)

    def _answer(self, net: Network, images: Tensor) -> Outputs:
        """Compiled once an architecture; plainly where that can't be."""
        kind = (type(net), net.spec, net.taps)
        if kind not in self._evaluated:
            self._evaluated[kind] = None if net.draws_always or net.unsettled else _compile(_answering(net))
        compiled = self._evaluated[kind]
        if compiled is not None:
            try:
                with quiet():
                    return compiled({**dict(net.named_parameters()), **dict(net.named_buffers())}, images)
            except Exception:  # what trains may still not compile in eval mode
                self._evaluated[kind] = None
        return plainly(net, images)


def _kind(group: PeerGroup) -> tuple[Any, ...]:
    """Students of one kind have one compiled function."""
    options = tuple((name, repr(option)) for name, option in group[0].resolved.options.items())
    networks = tuple((type(student.net), student.net.spec, student.net.taps) for student in group)
    return networks, options, group[0].needs_teacher


def _computing(group: PeerGroup, precision: Precision) -> Callable[..., list[dict[str, Tensor]]]:
    """``losses`` with the tensors of any students of this kind in the place of these."""
    objective = _hollow(Objective(group), {})

    def compute(tensors: dict[str, Tensor], images: Tensor, teacher_outputs: Outputs | None, batch: Batch) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = functional_call(objective, tensors, (images, teacher_outputs, batch, precision))
        return found

    return compute


def _answering(net: Network) -> Callable[[dict[str, Tensor], Tensor], Outputs]:
    """What a network gives, with the tensors of any such network in the place of its own."""
    hollow = _hollow(net, {})

    def answer(tensors: dict[str, Tensor], images: Tensor) -> Outputs:
        outputs: Outputs = functional_call(hollow, tensors, (images,))
        return outputs

    return answer


def _hollow(module: nn.Module, made: dict[Any, Any]) -> nn.Module:
    """Such modules whose own tensors hold nothing; their hooks are those of ``module``, and what is shared in it is shared.

    Of a function whose own tensors are also its inputs the compiler makes a version for the first student alone, and another for the rest.

    Args:
        made: what stands for each module and tensor that was met; empty at first.
    """

    def nothing(value: Tensor | None) -> Tensor | None:
        if value is not None and value not in made:
            empty = torch.empty_like(value, device="meta", requires_grad=False)
            made[value] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        return None if value is None else made[value]

    if module not in made:
        made[module] = hollow = copy.copy(module)
        for tensors in ("_parameters", "_buffers"):
            setattr(hollow, tensors, {name: nothing(value) for name, value in getattr(module, tensors).items()})
        hollow._modules = {name: None if inner is None else _hollow(inner, made) for name, inner in module._modules.items()}
    found: nn.Module = made[module]
    return found


def _drawing(source: SeedBatches) -> Callable[[Draws, Tensor, Tensor], tuple[Tensor, Batch]]:
    def draw(draws: Draws, shown: Tensor, epoch: Tensor) -> tuple[Tensor, Batch]:
        return source.batch(draws, shown, epoch)

    return draw


def _teaching(teacher: Teacher) -> Callable[[Tensor], Outputs]:
    def teach(images: Tensor) -> Outputs:
        return teacher.teach(images)

    return teach


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function with a code object of its own: the compiler counts its versions by that, and gives up after eight."""
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def restored_after(seed_groups: Sequence[SeedGroup]) -> Iterator[None]:
    """What is trained inside leaves no trace: every tensor gets its value back in its place, and buffers the shape that they had."""
    students = [student for seed_group in seed_groups for student in seed_group.students]
    modules = nn.ModuleList(module for student in students for module in (student.net, student.method))
    momenta = [value for student in students for name, value in student.state()[0].items() if name.startswith("momentum.")]
    sums = [value for student in students for value in student.tally.tensors]
    before = [(value, value.detach().clone()) for value in (*modules.parameters(), *momenta, *sums)]
    try:
        with kept(modules):
            yield
    finally:
        synchronize(seed_groups[0].batches.data.device)  # streams beside this one may still write
        with torch.no_grad():
            for value, old in before:
                value.copy_(old)


def zero_rates(seed_groups: Sequence[SeedGroup]) -> dict[Student, Tensor]:
    """Rates of 0 for a step or more that is taken back."""
    return {
        student: torch.zeros(seed_group.batches.steps, device=seed_group.batches.data.device)
        for seed_group in seed_groups
        for student in seed_group.students
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The compiler's remarks are not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
