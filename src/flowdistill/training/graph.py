"""The whole step of a cohort as one CUDA graph: gather, augmentation, teachers, students, backward, optimisers, sums, the step counter.

A graph replays the same kernels on the same memory. It can't read a Python number that changes, nor a tensor that is made anew.
Therefore all that changes from step to step is in tensors that stay where they are: an epoch's draws, its rates, and the number of the
step, which the graph itself counts up. ``StaticStep`` is that step; it runs on any device, and the tests hold it to the eager engine on
a CPU. ``GraphEngine`` captures it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
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

WARM_UP = 3  # steps before a capture: libraries set up their workspaces and compilers compile, neither of which a capture allows
MAX_STREAMS = 8  # on a prototype, 16 students at once took as long per student as 8
MEMORY_SHARE = 0.7  # of the free memory, for the students that compute at the same time


class StaticStep:
    """One step of a cohort, on memory that stays in its place.

    A small network does not fill a GPU, so that peer groups compute beside each other: each goes to a stream in turn. A seed group draws
    its batch and asks its teacher on the stream of its first peer group. Peer groups on the same stream follow each other and share
    memory.

    Attributes:
        inner: the engine that computes teacher and losses.
        streams: the streams for the peer groups; if there are none, all runs on the current stream.
        draws, rates: an epoch's, of each seed group and of each student; ``fill`` copies an epoch's values into them.
        number: scalar, the epoch.
        counter: [1] the step, which each step raises.
        positions: [B] 0, 1, ...: a batch's positions in its epoch, counted from its first image.
    """

    def __init__(self, inner: Engine, seed_groups: Sequence[SeedGroup], streams: Sequence[torch.cuda.Stream] = ()) -> None:
        self.inner, self.streams = inner, streams
        self.seed_groups = [replace(seed_group, students=list(seed_group.students)) for seed_group in seed_groups if seed_group.students]
        device = seed_groups[0].batches.data.device
        self.batches = [_seed_batches(seed_group.batches) for seed_group in self.seed_groups]
        self.draws = [batches.draws(0) for batches in self.batches]
        self.rates = zero_rates(self.seed_groups)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.arange(seed_groups[0].batches.batch_size, device=device)

    def fill(self, number: int, rates: Mapping[Student, Tensor]) -> None:
        """Go to the start of an epoch: copy its draws and rates to where the graph reads them."""
        for batches, draws in zip(self.batches, self.draws, strict=True):
            new_draws = batches.draws(number)
            for field in fields(Draws):
                if (value := getattr(draws, field.name)) is not None:
                    value.copy_(getattr(new_draws, field.name))
        for student, value in self.rates.items():
            value.copy_(rates[student])
        self.number.fill_(number)
        self.counter.zero_()

    def step(self) -> None:
        """Take the next step of every student."""
        shown = self.counter * len(self.positions) + self.positions
        alive, turn = [], 0
        for seed_group, batches, draws in zip(self.seed_groups, self.batches, self.draws, strict=True):
            with self._on(turn) as first_stream:
                images, batch = self.inner.draw(batches, draws, shown, self.number)
                teacher_outputs = self.inner.teach(seed_group, images)
                sums = seed_group.teacher_sums(teacher_outputs)
            alive.append((images, batch, teacher_outputs, sums))
            for group in seed_group.peer_groups:
                with self._on(turn, after=first_stream):
                    lr = self.rates[group[0]].index_select(0, self.counter).view(())
                    precision, losses = self.inner.precision, self.inner.losses
                    train_step(group, images, teacher_outputs, batch, lr=lr, precision=precision, losses=losses, teacher_sums=sums)
                turn += 1
        for stream in self.streams[:turn]:  # a stream without work is no part of a capture, and must not be waited for
            torch.cuda.current_stream().wait_stream(stream)
        self.counter += 1
        # What several streams read is kept until they have met. The allocator knows only the stream that asked for the memory, and would
        # give it to that stream's next tensor while another stream still reads it.
        del alive

    @contextlib.contextmanager
    def _on(self, turn: int, after: torch.cuda.Stream | None = None) -> Iterator[torch.cuda.Stream | None]:
        """Inside, work goes to the stream whose turn it is, after the work given so far to ``after``. Default: the current stream's."""
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
    """What two steps of one group showed.

    Attributes:
        hindrance: why its step can't be captured, or empty.
        memory: bytes that its step takes.
    """

    hindrance: str
    memory: int = 0


class GraphEngine(Engine):
    """``StaticStep`` captured once for a phase and a set of students, and replayed. Students that can't be captured are trained beside it.

    Attributes:
        spent: why this process can capture nothing more, or empty. Before PyTorch 2.12, a failed capture leaves the allocator unusable
            for another.
    """

    spent = ""

    def __init__(self, inner: Engine, why: str) -> None:
        super().__init__(inner.precision, why)
        self.inner, self._why = inner, why
        self.name = "graph" if isinstance(inner, EagerEngine) else f"graph+{inner.name}"
        self._step: StaticStep | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._beside: list[SeedGroup] = []
        self._captured: list[tuple[Student, torch.optim.Optimizer]] | None = None
        self._evaluations = CapturedEvaluations()

    def ready(self, seed_groups: Sequence[SeedGroup]) -> Engine:
        """Capture what is new. The inner engine trains the groups that can't be captured, or all groups if none can be."""
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
                # Each group is tried alone, outside of a capture: a capture that fails takes all groups with it, and may be the last.
                trials = {
                    group: Trial(why) if (why := known[group]) else self._try(seed_group, group)
                    for seed_group in seed_groups
                    for group in seed_group.peer_groups
                }
                hindered = {group: trial.hindrance for group, trial in trials.items() if trial.hindrance}
                if len(hindered) == len(trials):
                    return self._instead(next(iter(hindered.values())))
                capturable = [_only(seed_group, lambda group: group not in hindered) for seed_group in seed_groups]
                self._step, self._graph = self._capture(capturable, _width(list(trials.values()), seed_groups[0].batches.data.device))
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
        """Fall back to the inner engine for all groups."""
        self._evaluations = CapturedEvaluations()
        self.inner.why = why
        return self.inner

    def _try(self, seed_group: SeedGroup, group: PeerGroup) -> Trial:
        """Take two steps of one group alone: one to set up, and one in which waiting for the device is an error, as it is in a capture."""
        device = seed_group.batches.data.device
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        try:
            static = StaticStep(self.inner, [replace(seed_group, students=list(group))])
            static.step()  # libraries set up their workspaces and compilers compile, and both may wait for the device
            static.counter.zero_()
            with _waiting_refused():
                static.step()
        except Exception as error:  # whatever a model does
            return Trial(f"it can't be captured ({summary(error)})")
        return Trial("", max(torch.cuda.memory_reserved(device) - before, 1))

    def _capture(self, seed_groups: Sequence[SeedGroup], width: int) -> tuple[StaticStep, torch.cuda.CUDAGraph]:
        device = seed_groups[0].batches.data.device
        static = StaticStep(self.inner, seed_groups, [_stream(device) for _ in range(width)])
        static.fill(0, zero_rates(seed_groups))
        # A library's workspace belongs to a stream. Therefore the warm-up runs on the very streams that are captured, and it begins on a
        # side stream, as the capture does: the default stream can't be captured.
        warm_up_stream = _stream(device)
        warm_up_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(warm_up_stream):
            for _ in range(WARM_UP):
                static.counter.zero_()
                static.step()
        torch.cuda.current_stream(device).wait_stream(warm_up_stream)
        for seed_group in seed_groups:
            for student in seed_group.students:
                student.optimizer.zero_grad(set_to_none=True)  # frees the warm-up's gradients; the capture makes its own
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, device):
            static.step()
        return static, graph

    def epoch(self, seed_groups: Sequence[SeedGroup], number: int, rates: Mapping[Student, Tensor]) -> Generator[None, None, None]:
        """Replay the graph once per step, and let the inner engine take a step of the groups beside it."""
        assert self._step is not None
        assert self._graph is not None
        self._step.fill(number, rates)
        beside = self.inner.epoch(self._beside, number, rates) if self._beside else itertools.repeat(None)
        for _ in range(seed_groups[0].batches.steps):
            self._graph.replay()
            next(beside)
            yield

    def of(self, student: Student) -> str:
        """The inner engine's name for a student beside the graph, its own for the others."""
        return self.inner.name if any(student in seed_group.students for seed_group in self._beside) else self.name

    def evaluate(self, students: Sequence[Student], data: Supply) -> list[Evaluation]:
        """Measure one student after the other. Each is captured at its second evaluation; the first is plain and warms up."""
        self._evaluations.keep(students)
        return [self._evaluate(student, data) for student in students]

    def _evaluate(self, student: Student, data: Supply) -> Evaluation:
        captured = self._evaluations
        if GraphEngine.spent or captured.failed or student.net.draws_always or student.net.unsettled or not captured.warm(student):
            return self.inner.evaluate([student], data)[0]
        if student not in captured.graphs:
            try:
                graph = torch.cuda.CUDAGraph()
                with capturing(graph, data.device, captured.pool()):
                    (evaluation,) = self.inner.evaluate([student], data)
                captured.graphs[student] = graph, evaluation
            except Exception as error:  # no memory, or a network that waits in eval mode
                captured.give_up()
                remark = f"; evaluation is not captured ({summary(error)})"
                self.why, self._why = self.why + remark, self._why + remark
                return self.inner.evaluate([student], data)[0]
        graph, evaluation = captured.graphs[student]
        graph.replay()
        return Evaluation(*(value.clone() for value in evaluation))  # the next replay overwrites those of the graph


class CapturedEvaluations:
    """The captured evaluations of students. Their graphs share memory, for they are replayed one after the other."""

    def __init__(self) -> None:
        self.graphs: dict[Student, tuple[torch.cuda.CUDAGraph, Evaluation]] = {}
        self.failed = False
        self._warm: set[Student] = set()
        self._pool: Any = None

    def keep(self, students: Sequence[Student]) -> None:
        """Drop the graphs of students that are not among these."""
        self.graphs = {student: captured for student, captured in self.graphs.items() if student in students}
        self._warm &= set(students)

    def warm(self, student: Student) -> bool:
        """Whether this student was measured before; from now on it counts as measured."""
        measured_before = student in self._warm
        self._warm.add(student)
        return measured_before

    def pool(self) -> Any:
        """The memory pool that the graphs share."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return self._pool

    def give_up(self) -> None:
        """Drop all graphs, and capture no more."""
        self.graphs, self.failed = {}, True


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """Inside, work for the device is captured and not run, on a new stream of that device.

    ``torch.cuda.graph`` alone would use one stream for all its captures, which it makes on the GPU that is current at the first.

    Raises:
        Exception: what ended the capture, which PyTorch's own error hides. The current stream is put back.
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
    """Why a group's step can't be captured, as far as its networks show that; else empty."""
    if any(student.net.layer_seed is not None for student in group):
        return "a student's layers draw random numbers (dropout), which would not be those of its seed in a graph"
    teacher = seed_group.teacher.original if seed_group.teacher is not None and any(student.needs_teacher for student in group) else None
    if teacher is not None and (teacher.draws_always or teacher.unsettled):
        return "a teacher draws random numbers in eval mode, or moves its buffers, which a graph would not hold to its seed"
    if growing := next((student.net for student in group if student.net.grown), None):
        return f"buffers of {growing.spec.name} take another shape in a first pass, and a graph's have their place"
    return ""


def _students(seed_groups: Sequence[SeedGroup]) -> list[tuple[Student, torch.optim.Optimizer]]:
    """What a graph is captured for. The optimisers are part of it because every phase has new ones."""
    return [(student, student.optimizer) for seed_group in seed_groups for student in seed_group.students]


def _only(seed_group: SeedGroup, wanted: Callable[[PeerGroup], bool]) -> SeedGroup:
    """The seed group with only those peer groups that are wanted."""
    return replace(seed_group, students=[student for group in seed_group.peer_groups if wanted(group) for student in group])


def _named(group: PeerGroup) -> str:
    return f"{group[0].resolved.name} {group[0].net.spec.name}"


def _width(trials: Sequence[Trial], device: torch.device) -> int:
    """How many groups may compute at the same time: as many of the largest as the free memory holds, 1 at least."""
    memories = [trial.memory for trial in trials if not trial.hindrance]
    torch.cuda.empty_cache()
    return int(max(1, min(len(memories), MAX_STREAMS, MEMORY_SHARE * free_memory(device) / max(memories))))


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _seed_batches(batches: Batches) -> SeedBatches:
    """The same batches. A graph draws its batches itself, which only those of images on the device allow."""
    assert isinstance(batches, SeedBatches)
    return batches


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
