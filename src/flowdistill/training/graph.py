"""The whole step of a cohort as one CUDA graph: gather, augmentation, teachers, students, backward, optimisers, sums, the step counter.

A graph replays the same kernels on the same memory, so everything that changes from step to step stands in tensors of fixed place: an
epoch's draws, its rates, and the number of the step, which the graph itself counts up. ``Tape`` is that step; it runs on any device, and
the tests hold it to the eager engine on a CPU. ``Graph`` captures it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..checks import summary
from ..data.augment import Draws
from ..data.loader import Stream
from ..data.supply import Batches, Supply
from ..device import free_memory
from .engine import Eager, Lane, quiet, standing_still, taken_back
from .evaluate import Evaluation
from .step import Student, train_step

WARM_UP = 3  # steps before a capture: libraries set up their workspaces, and compilers compile
MOST_STREAMS = 8  # 8 and 16 students at once took the same time each on a prototype
MEMORY_SHARE = 0.7  # of the free memory, for what students hold at the same time


class Tape:
    """One step of a cohort on memory of fixed place."""

    def __init__(self, inner: Eager, lanes: Sequence[Lane], streams: Sequence[torch.cuda.Stream] = ()) -> None:
        self.inner, self.lanes, self.streams = inner, [replace(lane, students=list(lane.students)) for lane in lanes], streams
        device = lanes[0].stream.data.device
        self.sources = [_drawn(lane.stream) for lane in lanes]
        self.draws = [stream.draws(0) for stream in self.sources]
        self.rates = standing_still(lanes)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(lanes[0].stream.batch_size, device=device)

    def fill(self, number: int, rates: Mapping[Student, Tensor]) -> None:
        """Wind to the start of an epoch."""
        for source, draws in zip(self.sources, self.draws, strict=True):
            drawn = source.draws(number)
            for field in fields(Draws):
                if (place := getattr(draws, field.name)) is not None:
                    place.copy_(getattr(drawn, field.name))
        for student, rate in rates.items():
            self.rates[student].copy_(rate)
        self.number.fill_(number)
        self.counter.zero_()

    def step(self) -> None:
        """The next step of every student. Students go to the streams in turn; those of one stream follow each other and share memory."""
        shown = self.counter * len(self.places) + self.places
        alive, turn = [], 0
        for lane, source, draws in zip(self.lanes, self.sources, self.draws, strict=True):
            images, batch = source.batch(draws, shown, self.number)
            taught = self.inner.teach(lane, images)
            heard = lane.heard(taught)
            alive.append((images, batch, taught, heard))
            for group in lane.groups:
                with self._beside(turn):
                    lr = self.rates[group[0]].index_select(0, self.counter).view(())
                    precision, losses = self.inner.precision, self.inner.losses
                    train_step(group, images, taught, batch, lr=lr, precision=precision, losses=losses, heard=heard)
                turn += 1
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)
        self.counter += 1
        del alive  # not before the streams have met: their memory would be given to others

    @contextlib.contextmanager
    def _beside(self, turn: int) -> Iterator[None]:
        if not self.streams:
            yield
            return
        stream = self.streams[turn % len(self.streams)]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


class Graph(Eager):
    """``Tape`` captured once for a phase and a set of students, and replayed."""

    def __init__(self, inner: Eager, why: str) -> None:
        super().__init__(inner.precision, why)
        self.inner = inner
        self.name = "graph" if type(inner) is Eager else f"graph+{inner.name}"
        self._tape: Tape | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._key: object = None
        self._warm: set[Student] = set()
        self._measured: dict[Student, tuple[torch.cuda.CUDAGraph, Evaluation]] = {}

    def ready(self, lanes: Sequence[Lane]) -> Eager:
        """Capture what is new; what can't be captured is trained by the engine inside."""
        if any(student.net.draws_from is not None for lane in lanes for student in lane.students):
            self.inner.why = "a student's layers draw random numbers (dropout), which would not be those of its seed in a graph"
            return self.inner.ready(lanes)
        taught_by = [lane.teacher.given for lane in lanes if lane.taught and lane.teacher is not None]
        if any(teacher.draws_always or teacher.unsettled for teacher in taught_by):
            self.inner.why = "a teacher draws random numbers in eval mode, or moves its buffers, which a graph would not hold to its seed"
            return self.inner.ready(lanes)
        key = [(student, student.optimizer) for lane in lanes for student in lane.students]
        if key == self._key:
            return self
        self._tape = self._graph = None
        inner = self.inner.ready(lanes)
        if inner is not self.inner:
            self.inner, self.name, self.why = inner, "graph", f"{self.why}; {inner.why}"
        try:
            with taken_back(lanes), quiet():
                self._tape, self._graph = self._capture(lanes)
        except Exception as error:  # whatever a model does that a graph can't hold
            self.inner.why = f"it can't be captured ({summary(error)})"
            return self.inner
        self._key = key
        return self

    def _capture(self, lanes: Sequence[Lane]) -> tuple[Tape, torch.cuda.CUDAGraph]:
        device = lanes[0].stream.data.device
        if growing := next((student.net for lane in lanes for student in lane.students if student.net.grown), None):
            raise ValueError(f"buffers of {growing.spec.name} take another shape in a first pass, and a graph's have their place")
        tape = Tape(self.inner, lanes, [_stream(device) for _ in range(self._width(lanes))])
        tape.fill(0, standing_still(lanes))
        aside = _stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                tape.counter.zero_()
                tape.step()
        torch.cuda.current_stream(device).wait_stream(aside)
        for lane in lanes:
            for student in lane.students:
                student.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tape.step()
        return tape, graph

    def _width(self, lanes: Sequence[Lane]) -> int:
        """How many students may compute at the same time: what the free memory holds, by a step of the first."""
        device, count = lanes[0].stream.data.device, sum(len(lane.students) for lane in lanes)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        first = replace(lanes[0], students=lanes[0].students[:1])
        tape = Tape(self.inner, [first])
        tape.step()
        needed = max(torch.cuda.max_memory_allocated(device) - before, 1)
        return max(1, min(count, MOST_STREAMS, int(MEMORY_SHARE * free_memory(device) / needed)))

    def epoch(self, lanes: Sequence[Lane], number: int, rates: Mapping[Student, Tensor]) -> Iterator[None]:
        """One replay a step: the host does nothing else."""
        assert self._tape is not None
        assert self._graph is not None
        self._tape.fill(number, rates)
        for _ in range(lanes[0].stream.steps):
            self._graph.replay()
            yield

    def evaluate(self, students: Sequence[Student], data: Supply) -> list[Evaluation]:
        """One by one."""
        return [self._evaluate(student, data) for student in students]

    def _evaluate(self, student: Student, data: Supply) -> Evaluation:
        """Captured at the second time: the first, which is plain, warms up."""
        if student not in self._warm or student.net.draws_always or student.net.unsettled:
            self._warm.add(student)
            return super().evaluate([student], data)[0]
        if student not in self._measured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                (found,) = super().evaluate([student], data)
            self._measured[student] = graph, found
        graph, found = self._measured[student]
        graph.replay()
        return Evaluation(*(value.clone() for value in found))


def _drawn(batches: Batches) -> Stream:
    """A graph draws its batches itself, which those of images on the device allow."""
    assert isinstance(batches, Stream)
    return batches


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
