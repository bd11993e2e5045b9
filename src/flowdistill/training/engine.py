"""How the steps of a cohort are computed: plainly or compiled. ``graph.py`` has the third way, ``engine_choice.py`` chooses."""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checks import summary
from ..data.augment import Draws
from ..data.batches import SeedBatches
from ..data.interfaces import Supply
from ..device import Precision, autocast, synchronize
from ..models import Network
from ..models.state import kept
from ..ranks import current
from ..types import Batch, Outputs
from .evaluate import Evaluation, evaluate_all, plainly
from .optim import memory
from .step import Objective, layers_seeded, losses, train_step
from .student import PeerGroup, SeedGroup, Student
from .synchronised import needed, together
from .teacher import Teacher

EVALUATION_COMPILED = ("cuda",)  # kinds of devices on which evaluation is compiled if training is


class Engine:
    """How the steps of a cohort are computed: operation by operation, unless a subclass does a part otherwise.

    Attributes:
        name: its name in a run's record.
        why: why it was chosen, as the user is told.
    """

    name: str

    def __init__(self, precision: Precision, why: str) -> None:
        self.precision, self.why = precision, why

    def ready(self, seed_groups: Sequence[SeedGroup]) -> Engine:  # noqa: ARG002 (the others look)
        """Set up what the phase and the students need, before an epoch.

        Returns the engine to use: itself, or the one that it falls back to, whose ``why`` says why.
        """
        return self

    def epoch(self, seed_groups: Sequence[SeedGroup], number: int, rates: Mapping[Student, Tensor]) -> Generator[None, None, None]:
        """Train every student for one epoch (0-based ``number`` over all phases), a step at a time."""
        for step, batches in enumerate(zip(*(seed_group.batches.epoch(number) for seed_group in seed_groups), strict=True)):
            for seed_group, (images, batch) in zip(seed_groups, batches, strict=True):
                with seed_group.teaching(number, step):
                    teacher_outputs = self.teach(seed_group, images)
                sums = seed_group.teacher_sums(teacher_outputs)
                for group in seed_group.peer_groups:
                    lr, precision, losses = rates[group[0]][step], self.precision, self.losses
                    with layers_seeded(group, number, step, images.device):
                        train_step(group, images, teacher_outputs, batch, lr=lr, precision=precision, losses=losses, teacher_sums=sums)
            yield

    def of(self, student: Student) -> str:  # noqa: ARG002 (a graph looks)
        """The name of the engine that trains a student, for its record."""
        return self.name

    def draw(self, batches: SeedBatches, draws: Draws, shown: Tensor, epoch: Tensor) -> tuple[Tensor, Batch]:
        """The batch of a graph's step: the images at positions ``shown`` [B] of the epoch's order, augmented as ``draws`` has it."""
        return batches.batch(draws, shown, epoch)

    def teach(self, seed_group: SeedGroup, images: Tensor) -> Outputs | None:
        """The teacher's outputs for a batch, computed once for all students of the seed group; None if no student needs them."""
        if seed_group.teacher is None or not seed_group.needs_teacher:
            return None
        with together(needed(seed_group.students[0].train, current())):  # a teacher without statistics normalises by the batch
            return self.ask(seed_group.teacher, images)

    def ask(self, teacher: Teacher, images: Tensor) -> Outputs:
        """Compute a teacher's outputs."""
        return teacher.teach(images)

    def losses(
        self, group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision
    ) -> list[dict[str, Tensor]]:
        """Compute each student's unweighted terms on a batch."""
        return losses(group, images, teacher_outputs, batch, precision)

    def evaluate(self, students: Sequence[Student], data: Supply) -> list[Evaluation]:
        """Measure the students on the epoch's images, which the ranks share out."""
        return evaluate_all([student.net for student in students], data.epoch_images, self.precision, ranks=current())


class EagerEngine(Engine):
    """Operation by operation in all parts: the plain, readable engine that the others are held to."""

    name = "eager"


class CompiledEngine(Engine):
    """Teacher, forward pass and losses run by torch.compile, with static shapes: one compiled function per architecture and method."""

    name = "compiled"

    def __init__(self, precision: Precision, why: str) -> None:
        super().__init__(precision, why)
        self._losses: dict[Any, Callable[..., list[dict[str, Tensor]]]] = {}
        self._forwards: dict[Any, Callable[[dict[str, Tensor], Tensor], Outputs]] = {}
        self._teachers: dict[Teacher, Callable[[Tensor], Outputs]] = {}
        self._batches: dict[Any, Callable[[Draws, Tensor, Tensor], tuple[Tensor, Batch]]] = {}
        self._evaluated: dict[Any, Callable[[dict[str, Tensor], Tensor], Outputs] | None] = {}
        self._tried: set[Any] = set()

    def ready(self, seed_groups: Sequence[SeedGroup]) -> Engine:
        """Compile what is new, by one step that is taken back: compiling happens at the first call."""
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

    def draw(self, batches: SeedBatches, draws: Draws, shown: Tensor, epoch: Tensor) -> tuple[Tensor, Batch]:
        """Compiled once for all seed batches of the same images: gather, crop, flip and normalisation in a few kernels."""
        kind = batches.kind
        if kind not in self._batches:
            self._batches[kind] = _compile(_batch_function(batches))
        return self._batches[kind](draws, shown, epoch)

    def ask(self, teacher: Teacher, images: Tensor) -> Outputs:
        """Compiled once per teacher."""
        if teacher not in self._teachers:
            self._teachers[teacher] = _compile(_teacher_function(teacher))
        return self._teachers[teacher](images)

    def losses(
        self, group: PeerGroup, images: Tensor, teacher_outputs: Outputs | None, batch: Batch, precision: Precision
    ) -> list[dict[str, Tensor]]:
        """Compiled once per kind of student; a student's weights and statistics are inputs of the function.

        Where ranks put the batch together between the networks and the methods, the networks alone are compiled.
        """
        kind, objective = _kind(group), Objective(group)
        if objective.gathers:
            with autocast(images.device, precision):
                outputs = [self._forward(student.net, images) for student in group]
            return objective.compare(outputs, teacher_outputs, batch)
        if kind not in self._losses:
            self._losses[kind] = _compile(_losses_function(group, precision))
        tensors = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
        return self._losses[kind](tensors, images, teacher_outputs, batch)

    def _forward(self, net: Network, images: Tensor) -> Outputs:
        """A network's outputs in train mode, compiled once per architecture."""
        kind = (type(net), net.spec, net.taps)
        if kind not in self._forwards:
            self._forwards[kind] = _compile(_net_function(net))
        return self._forwards[kind]({**dict(net.named_parameters()), **dict(net.named_buffers())}, images)

    def evaluate(self, students: Sequence[Student], data: Supply) -> list[Evaluation]:
        """Compiled on a GPU, where launches bound plain passes; plain on a CPU, where compiling costs more than it saves."""
        ask = self._answer if data.device.type in EVALUATION_COMPILED else plainly
        return evaluate_all([student.net for student in students], data.epoch_images, self.precision, ask, current())

    def _answer(self, net: Network, images: Tensor) -> Outputs:
        """Compiled once per architecture; computed plainly if it can't be compiled."""
        kind = (type(net), net.spec, net.taps)
        if kind not in self._evaluated:
            self._evaluated[kind] = None if net.draws_always or net.unsettled else _compile(_net_function(net))
        compiled = self._evaluated[kind]
        if compiled is not None:
            try:
                with quiet():
                    return compiled({**dict(net.named_parameters()), **dict(net.named_buffers())}, images)
            except Exception:  # what trains may still not compile in eval mode
                self._evaluated[kind] = None
        return plainly(net, images)


def _kind(group: PeerGroup) -> tuple[Any, ...]:
    """What students must agree on to share a compiled function."""
    options = tuple((name, repr(option)) for name, option in group[0].resolved.options.items())
    networks = tuple((type(student.net), student.net.spec, student.net.taps) for student in group)
    return networks, options, group[0].needs_teacher


def _losses_function(group: PeerGroup, precision: Precision) -> Callable[..., list[dict[str, Tensor]]]:
    """``losses`` as a function that also takes the students' tensors, so that all groups of this kind can use it."""
    objective = _hollow(Objective(group), {})

    def compute(tensors: dict[str, Tensor], images: Tensor, teacher_outputs: Outputs | None, batch: Batch) -> list[dict[str, Tensor]]:
        student_terms: list[dict[str, Tensor]] = functional_call(objective, tensors, (images, teacher_outputs, batch, precision))
        return student_terms

    return compute


def _net_function(net: Network) -> Callable[[dict[str, Tensor], Tensor], Outputs]:
    """The network as a function that also takes its tensors, so that all networks of this architecture can use it."""
    hollow = _hollow(net, {})

    def answer(tensors: dict[str, Tensor], images: Tensor) -> Outputs:
        outputs: Outputs = functional_call(hollow, tensors, (images,))
        return outputs

    return answer


def _hollow(module: nn.Module, made: dict[Any, Any]) -> nn.Module:
    """A copy of a module whose tensors hold no values; hooks are shared with ``module``, and what is shared inside it stays shared.

    The copy is what a compiled function closes over; the values come as inputs. If it closed over the first student's own module, that
    student's tensors would be both inside the function and among its inputs, and the compiler would make one version for that student
    and another for the rest.

    Args:
        made: the copy of each module and tensor that was met so far; empty at first.
    """

    def without_values(value: Tensor | None) -> Tensor | None:
        if value is not None and value not in made:
            empty = torch.empty_like(value, device="meta", requires_grad=False)
            made[value] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        return None if value is None else made[value]

    if module not in made:
        made[module] = hollow = copy.copy(module)
        for tensors in ("_parameters", "_buffers"):
            setattr(hollow, tensors, {name: without_values(value) for name, value in getattr(module, tensors).items()})
        hollow._modules = {name: None if inner is None else _hollow(inner, made) for name, inner in module._modules.items()}
    copied: nn.Module = made[module]
    return copied


def _batch_function(batches: SeedBatches) -> Callable[[Draws, Tensor, Tensor], tuple[Tensor, Batch]]:
    def draw(draws: Draws, shown: Tensor, epoch: Tensor) -> tuple[Tensor, Batch]:
        return batches.batch(draws, shown, epoch)

    return draw


def _teacher_function(teacher: Teacher) -> Callable[[Tensor], Outputs]:
    def teach(images: Tensor) -> Outputs:
        return teacher.teach(images)

    return teach


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a copy of a function that has its own code object.

    The compiler counts compiled versions per code object, and gives up after eight. All functions that one factory above makes share a
    code object, so that without the copy the ninth kind of student would not be compiled.
    """
    copied = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    return torch.compile(copied, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def restored_after(seed_groups: Sequence[SeedGroup]) -> Iterator[None]:
    """Training inside leaves no trace: every tensor gets its value back in place, and every buffer its shape.

    Compiling and capturing take real steps; a run must be the same with them as without. Values are copied into the same tensors because
    a captured graph holds their addresses.
    """
    students = [student for seed_group in seed_groups for student in seed_group.students]
    modules = nn.ModuleList(module for student in students for module in (student.net, student.method))
    memories = [value for student in students for value in memory(student.optimizer).values()]
    memories += [value for student in students if student.average is not None for value in student.average.state().values()]
    sums = [value for student in students for value in student.tally.tensors]
    before = [(value, value.detach().clone()) for value in (*modules.parameters(), *memories, *sums)]
    try:
        with kept(modules):
            yield
    finally:
        synchronize(seed_groups[0].batches.data.device)  # streams beside this one may still write
        with torch.no_grad():
            for value, old in before:
                value.copy_(old)


def zero_rates(seed_groups: Sequence[SeedGroup]) -> dict[Student, Tensor]:
    """Learning rates of 0 for every step of an epoch: for steps that are taken back."""
    return {
        student: torch.zeros(seed_group.batches.steps, device=seed_group.batches.data.device)
        for seed_group in seed_groups
        for student in seed_group.students
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings are not shown: what the compiler remarks is of no use to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
