"""The whole step of a cohort as one CUDA graph: gather, augmentation, teachers, students, backward, optimisers, sums, the step counter.

A graph replays the same kernels on the same memory, so everything that changes from step to step stands in tensors of fixed place: an
epoch's draws, its rates, and the number of the step, which the graph itself counts up. ``StaticStep`` is that step; it runs on any
device, and the tests hold it to the eager engine on a CPU. ``GraphEngine`` captures it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import summary
from ..data.augment import Draws
from ..data.batches import SeedBatches
from ..data.interfaces import Batches, Supply
from ..device import free_memory, synchronize
from .engine import EagerEngine, Engine, quiet, restored_after, zero_rates
from .evaluate import Evaluation
from .step import train_step
from .student import PeerGroup, SeedGroup, Student

WARM_UP = 3  # steps before a capture: libraries set up their workspaces, and compilers compile
MAX_STREAMS = 8  # 8 and 16 students at once took the same time each on a prototype
MEMORY_SHARE = 0.7  # of the free memory, for what students hold at the same time


class StaticStep:
    """One step of a cohort on memory of fixed place.

    Every peer group goes to a stream in turn. A seed group draws its batch and asks its teacher on the stream of its first peer group, so
    that seed groups compute beside each other. Peer groups of one stream follow each other and share memory.
    """

    def __init__(self, inner: Engine, seed_groups: Sequence[SeedGroup], streams: Sequence[torch.cuda.Stream] = ()) -> None:
        self.inner, self.streams = inner, streams
        self.seed_groups = [replace(seed_group, students=list(seed_group.students)) for seed_group in seed_groups if seed_group.students]
        device = seed_groups[0].batches.data.device
        self.sources = [_drawn(seed_group.batches) for seed_group in self.seed_groups]
        self.draws = [source.draws(0) for source in self.sources]
        self.rates = zero_rates(self.seed_groups)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(seed_groups[0].batches.batch_size, device=device)

    def fill(self, number: int, rates: Mapping[Student, Tensor]) -> None:
        """Wind to the start of an epoch."""
        for source, draws in zip(self.sources, self.draws, strict=True):
            drawn = source.draws(number)
            for field in fields(Draws):
                if (place := getattr(draws, field.name)) is not None:
                    place.copy_(getattr(drawn, field.name))
        for student, place in self.rates.items():
            place.copy_(rates[student])
        self.number.fill_(number)
        self.counter.zero_()

    def step(self) -> None:
        """The next step of every student."""
        shown = self.counter * len(self.places) + self.places
        alive, turn = [], 0
        for seed_group, source, draws in zip(self.seed_groups, self.sources, self.draws, strict=True):
            with self._on(turn) as own:
                images, batch = self.inner.draw(source, draws, shown, self.number)
                teacher_outputs = self.inner.teach(seed_group, images)
                heard = seed_group.heard(teacher_outputs)
            alive.append((images, batch, teacher_outputs, heard))
            for group in seed_group.peer_groups:
                with self._on(turn, after=own):
                    lr = self.rates[group[0]].index_select(0, self.counter).view(())
                    precision, losses = self.inner.precision, self.inner.losses
                    train_step(group, images, teacher_outputs, batch, lr=lr, precision=precision, losses=losses, heard=heard)
                turn += 1
        for stream in self.streams[:turn]:  # a stream that was given nothing is no part of a capture
            torch.cuda.current_stream().wait_stream(stream)
        self.counter += 1
        del alive  # not before the streams have met: their memory would be given to others

    @contextlib.contextmanager
    def _on(self, turn: int, after: torch.cuda.Stream | None = None) -> Iterator[torch.cuda.Stream | None]:
        """Inside, work goes to the stream whose turn it is, behind what ``after`` was given, or the current stream."""
        if not self.streams:
            yield None
            return
        stream = self.streams[turn % len(self.streams)]
        if stream is not after:
            stream.wait_stream(after or torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream


@dataclass
class Trial:
    """What a group of students showed in two steps of its own.

    Attributes:
        hindrance: why its step can't be captured, or empty.
        memory: bytes that a step of it takes.
    """

    hindrance: str
    memory: int = 0


class GraphEngine(Engine):
    """``StaticStep`` captured once for a phase and a set of students, and replayed. Students that can't be captured are trained beside it.

    Attributes:
        spent: why this process can capture nothing more, or empty. Before PyTorch 2.12 a capture that failed leaves the allocator so.
    """

    spent = ""

    def __init__(self, inner: Engine, why: str) -> None:
        super().__init__(inner.precision, why)
        self.inner, self._why = inner, why
        self.name = "graph" if isinstance(inner, EagerEngine) else f"graph+{inner.name}"
        self._step: StaticStep | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._beside: list[SeedGroup] = []
        self._captured: list[tuple[Student, torch.optim.SGD]] | None = None
        self._measured = Measured()

    def ready(self, seed_groups: Sequence[SeedGroup]) -> Engine:
        """Capture what is new. Groups that can't be captured, or all where none can, are trained by the engine inside."""
        if self._captured is not None and self._captured == _students(seed_groups):
            return self
        known = {group: _known_hindrance(seed_group, group) for seed_group in seed_groups for group in seed_group.peer_groups}
        if why := GraphEngine.spent or (next(iter(known.values())) if all(known.values()) else ""):
            self.inner.why = why
            return self.inner.ready(seed_groups)
        self._step = self._graph = None
        inner = self.inner.ready(seed_groups)
        if inner is not self.inner:
            self.inner, self.name, self._why = inner, "graph", f"{self._why}; {inner.why}"
        try:
            with restored_after(seed_groups), quiet():
                trials = {
                    group: Trial(why) if (why := known[group]) else self._try(seed_group, group)
                    for seed_group in seed_groups
                    for group in seed_group.peer_groups
                }
                hindered = {group: trial.hindrance for group, trial in trials.items() if trial.hindrance}
                if len(hindered) == len(trials):
                    return self._instead(next(iter(hindered.values())))
                held = [_only(seed_group, lambda group: group not in hindered) for seed_group in seed_groups]
                self._step, self._graph = self._capture(held, _width(list(trials.values()), seed_groups[0].batches.data.device))
        except Exception as error:  # whatever a model does that a graph can't hold
            return self._instead(f"it can't be captured ({summary(error)})")
        self._beside = [
            seed_group
            for seed_group in (_only(seed_group, lambda group: group in hindered) for seed_group in seed_groups)
            if seed_group.students
        ]
        self.why = "; ".join([self._why, *(f"{_named(group)} beside it, {self.inner.name}: {why}" for group, why in hindered.items())])
        self._captured = _students(seed_groups)
        return self

    def _instead(self, why: str) -> Engine:
        """The engine inside, for all."""
        self._measured = Measured()
        self.inner.why = why
        return self.inner

    def _try(self, seed_group: SeedGroup, group: PeerGroup) -> Trial:
        """Two steps of a group alone; in the second, waiting for the device is an error, as it is in a capture."""
        device = seed_group.batches.data.device
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        try:
            tape = StaticStep(self.inner, [replace(seed_group, students=list(group))])
            tape.step()  # libraries set up their workspaces, compilers compile
            tape.counter.zero_()
            with _waiting_refused():
                tape.step()
        except Exception as error:  # whatever a model does
            return Trial(f"it can't be captured ({summary(error)})")
        return Trial("", max(torch.cuda.memory_reserved(device) - before, 1))

    def _capture(self, seed_groups: Sequence[SeedGroup], width: int) -> tuple[StaticStep, torch.cuda.CUDAGraph]:
        device = seed_groups[0].batches.data.device
        tape = StaticStep(self.inner, seed_groups, [_stream(device) for _ in range(width)])
        tape.fill(0, zero_rates(seed_groups))
        aside = _stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                tape.counter.zero_()
                tape.step()
        torch.cuda.current_stream(device).wait_stream(aside)
        for seed_group in seed_groups:
            for student in seed_group.students:
                student.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, device):
            tape.step()
        return tape, graph

    def epoch(self, seed_groups: Sequence[SeedGroup], number: int, rates: Mapping[Student, Tensor]) -> Iterator[None]:
        """One replay a step, and a step of those beside it."""
        assert self._step is not None
        assert self._graph is not None
        self._step.fill(number, rates)
        beside = self.inner.epoch(self._beside, number, rates) if self._beside else itertools.repeat(None)
        for _ in range(seed_groups[0].batches.steps):
            self._graph.replay()
            next(beside)
            yield

    def of(self, student: Student) -> str:
        """That of the engine inside for those beside the graph."""
        return self.inner.name if any(student in seed_group.students for seed_group in self._beside) else self.name

    def evaluate(self, students: Sequence[Student], data: Supply) -> list[Evaluation]:
        """One by one, each captured at the second time: the first, which is plain, warms up."""
        self._measured.keep(students)
        return [self._evaluate(student, data) for student in students]

    def _evaluate(self, student: Student, data: Supply) -> Evaluation:
        measured = self._measured
        if GraphEngine.spent or measured.failed or student.net.draws_always or student.net.unsettled or not measured.warm(student):
            return self.inner.evaluate([student], data)[0]
        if student not in measured.graphs:
            try:
                graph = torch.cuda.CUDAGraph()
                with capturing(graph, data.device, measured.pool()):
                    (found,) = self.inner.evaluate([student], data)
                measured.graphs[student] = graph, found
            except Exception as error:  # no memory, or a network that waits in eval mode
                measured.give_up()
                remark = f"; evaluation is not captured ({summary(error)})"
                self.why, self._why = self.why + remark, self._why + remark
                return self.inner.evaluate([student], data)[0]
        graph, found = measured.graphs[student]
        graph.replay()
        return Evaluation(*(value.clone() for value in found))


class Measured:
    """The captured evaluations of students. They share their memory, for they are replayed one after the other."""

    def __init__(self) -> None:
        self.graphs: dict[Student, tuple[torch.cuda.CUDAGraph, Evaluation]] = {}
        self.failed = False
        self._warm: set[Student] = set()
        self._pool: Any = None

    def keep(self, students: Sequence[Student]) -> None:
        """Let go of those that left."""
        self.graphs = {student: found for student, found in self.graphs.items() if student in students}
        self._warm &= set(students)

    def warm(self, student: Student) -> bool:
        """Whether this one was measured before; from now on it was."""
        known = student in self._warm
        self._warm.add(student)
        return known

    def pool(self) -> Any:
        """Where the graphs have their memory."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return self._pool

    def give_up(self) -> None:
        """Nothing more is captured here."""
        self.graphs, self.failed = {}, True


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """What the device is given inside is captured, on a stream of that device.

    Raises:
        Exception: what ended the capture, which PyTorch's own error hides. The current stream is what it was.
    """
    before = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_stream(device)):
            yield
    except Exception as error:
        torch.cuda.set_stream(before)
        with contextlib.suppress(RuntimeError):
            synchronize(device)
        cause = error.__context__ if isinstance(error.__context__, Exception) else error
        if _version() < (2, 12):
            spent = f"after which PyTorch {torch.__version__} can't capture any more"
            GraphEngine.spent = f"an earlier capture failed in this process ({summary(cause)}), {spent}"
        raise cause from None


def _known_hindrance(seed_group: SeedGroup, group: PeerGroup) -> str:
    """Why a group's step can't be captured, as far as its networks tell; else empty."""
    if any(student.net.layer_seed is not None for student in group):
        return "a student's layers draw random numbers (dropout), which would not be those of its seed in a graph"
    teacher = seed_group.teacher.original if seed_group.teacher is not None and any(student.needs_teacher for student in group) else None
    if teacher is not None and (teacher.draws_always or teacher.unsettled):
        return "a teacher draws random numbers in eval mode, or moves its buffers, which a graph would not hold to its seed"
    if growing := next((student.net for student in group if student.net.grown), None):
        return f"buffers of {growing.spec.name} take another shape in a first pass, and a graph's have their place"
    return ""


def _students(seed_groups: Sequence[SeedGroup]) -> list[tuple[Student, torch.optim.SGD]]:
    """What a graph is captured for; every phase has optimisers of its own."""
    return [(student, student.optimizer) for seed_group in seed_groups for student in seed_group.students]


def _only(seed_group: SeedGroup, wanted: Callable[[PeerGroup], bool]) -> SeedGroup:
    """A seed group with those of its peer groups."""
    return replace(seed_group, students=[student for group in seed_group.peer_groups if wanted(group) for student in group])


def _named(group: PeerGroup) -> str:
    return f"{group[0].resolved.name} {group[0].net.spec.name}"


def _width(trials: Sequence[Trial], device: torch.device) -> int:
    """How many groups may compute at the same time: what the free memory holds of the largest."""
    held = [trial.memory for trial in trials if not trial.hindrance]
    torch.cuda.empty_cache()
    return int(max(1, min(len(held), MAX_STREAMS, MEMORY_SHARE * free_memory(device) / max(held))))


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """Inside, an operation after which the host waits for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _drawn(batches: Batches) -> SeedBatches:
    """A graph draws its batches itself, which those of images on the device allow."""
    assert isinstance(batches, SeedBatches)
    return batches


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
