"""What decides around a CUDA graph, on a CPU: what is captured, what is trained beside it, and what becomes of a capture that fails.

The graph itself is stood in for by the step that it would hold (``StaticStep``), which the tests of engines hold to the plain one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cohorts import GRID, a_cohort, grid, train_with, weights_of
from helpers.small import config

from flowdistill.data.batches import DeviceData, SeedBatches
from flowdistill.data.dataset import ImageData
from flowdistill.methods.fsp import FSP
from flowdistill.training import engine as engines
from flowdistill.training import graph as graphs
from flowdistill.training.engine import CompiledEngine, EagerEngine
from flowdistill.training.graph import GraphEngine, StaticStep


class Recorded:
    """Stands for torch.cuda.CUDAGraph: a replay is a step of the tape that was captured into it."""

    tape: StaticStep | None = None

    def replay(self) -> None:
        assert self.tape is not None
        self.tape.step()


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Captures are stood in for; the widths that were asked for."""
    widths: list[int] = []

    def capture(self: GraphEngine, seed_groups: list, width: int) -> tuple[StaticStep, Recorded]:
        widths.append(width)
        recorded = Recorded()
        recorded.tape = StaticStep(self.inner, seed_groups)
        return recorded.tape, recorded

    @contextlib.contextmanager
    def refuses() -> Iterator[None]:
        waiting.append(True)
        try:
            yield
        finally:
            waiting.pop()

    monkeypatch.setattr(GraphEngine, "_capture", capture)
    monkeypatch.setattr(GraphEngine, "_evaluate", lambda self, student, data: self.inner.evaluate([student], data)[0])
    monkeypatch.setattr(graphs, "_waiting_refused", refuses)
    return widths


waiting: list[bool] = []
"""Not empty while an operation that waits for the device is an error."""


def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on fsp waits for the device."""
    forward = FSP.forward

    def patched(self: FSP, *given: object) -> dict[str, torch.Tensor]:
        if waiting:
            raise RuntimeError("called a synchronizing CUDA operation")
        return forward(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(FSP, "forward", patched)


def test_what_waits_is_trained_beside_the_graph_and_named(
    data: ImageData, small_npz: Path, replaying: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, plain_students = a_cohort(data, grid(small_npz))
    beside, students = a_cohort(data, grid(small_npz))
    expected = train_with(plain, EagerEngine("fp32", ""))
    waits(monkeypatch)
    found = train_with(beside, GraphEngine(EagerEngine("fp32", ""), "bound by launches"))
    for plain_student, beside_student in zip(plain_students, students, strict=True):
        assert weights_of(plain_student) == weights_of(beside_student)
        assert [epoch[plain_student] for epoch in expected] == [epoch[beside_student] for epoch in found]
    assert beside.engine.name == "graph"
    assert [beside.engine.of(student) for student in students] == ["eager" if method == "fsp" else "graph" for method, _ in GRID]
    cause = "it can't be captured (RuntimeError: called a synchronizing CUDA operation)"
    assert beside.engine.why == "; ".join(["bound by launches", *[f"fsp resnet8 beside it, eager: {cause}"] * 2])
    captured = {student.resolved.name for seed_group in beside.engine._step.seed_groups for student in seed_group.students}  # type: ignore[attr-defined]
    assert captured == {"base", "at+kd", "crd"}
    assert replaying == [len(GRID) - 2]


def test_a_cohort_that_can_not_be_captured_is_trained_by_the_inner_engine(
    data: ImageData, small_npz: Path, replaying: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits(monkeypatch)
    cohort, _ = a_cohort(data, grid(small_npz)[1:2])
    train_with(cohort, GraphEngine(EagerEngine("fp32", ""), ""))
    assert (type(cohort.engine), replaying) == (EagerEngine, [])
    assert cohort.engine.why == "it can't be captured (RuntimeError: called a synchronizing CUDA operation)"


def test_a_seed_group_without_students_does_not_hinder_the_capture(data: ImageData, small_npz: Path, replaying: list[int]) -> None:
    cohort, students = a_cohort(data, grid(small_npz))
    gone = cohort.seed_groups[0].students[:]
    cohort.seed_groups[0].students.clear()
    train_with(cohort, GraphEngine(EagerEngine("fp32", ""), ""))
    assert cohort.engine.name == "graph", cohort.engine.why
    assert replaying == [len(students) - len(gone)]


def test_streams_are_counted_by_group(data: ImageData, small_npz: Path, replaying: list[int]) -> None:
    """Two that teach each other are moved by one step, on one stream."""
    cohort, (first, second, _) = a_cohort(data, [config(small_npz), config(small_npz), config(small_npz, method="fsp", teacher="-")])
    first.peers, second.peers = (second,), (first,)
    train_with(cohort, GraphEngine(EagerEngine("fp32", ""), ""))
    assert replaying == [2]


@pytest.mark.parametrize(("memory", "width"), [(10, 4), (40, 2), (1000, 1)])
def test_as_many_compute_at_once_as_memory_holds_of_the_largest(memory: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "free_memory", lambda device: 120.0)
    trials = [graphs.Trial("", 5), graphs.Trial("", memory), graphs.Trial("it waits", 10_000), graphs.Trial("", 5), graphs.Trial("", 5)]
    assert graphs._width(trials, torch.device("cpu")) == width


class Failing:
    """Stands for torch.cuda.graph: PyTorch's own error hides the one that ended the capture."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *given: object) -> None:
        raise RuntimeError("cudaErrorStreamCaptureInvalidated")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every capture fails; the streams that were made current."""
    current: list[object] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "the stream before")
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(graphs, "_stream", lambda device: device)
    monkeypatch.setattr(GraphEngine, "spent", "")
    return current


@pytest.mark.parametrize(("version", "spent"), [("2.11.0+cu130", True), ("2.12.0", False), ("2.14.1+cu130", False)])
def test_a_capture_that_fails_tells_its_cause_and_puts_the_stream_back(
    failing: list[object], version: str, spent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ValueError, match=r"^what the model did$"), graphs.capturing(object(), torch.device("cpu")):  # type: ignore[arg-type]
        raise ValueError("what the model did")
    assert failing == ["the stream before"]
    told = (
        f"an earlier capture failed in this process (ValueError: what the model did), after which PyTorch {version} can't capture any more"
    )
    assert GraphEngine.spent == (told if spent else "")


def test_after_a_failed_capture_nothing_is_captured(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphEngine, "spent", "an earlier capture failed")
    cohort, _ = a_cohort(data, grid(small_npz)[:1])
    train_with(cohort, GraphEngine(EagerEngine("fp32", ""), ""))
    assert (type(cohort.engine), cohort.engine.why) == (EagerEngine, "an earlier capture failed")


def test_a_step_captured_before_a_failed_capture_is_still_replayed(
    data: ImageData, small_npz: Path, replaying: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture of the evaluation may fail after that of the step."""
    cohort, students = a_cohort(data, grid(small_npz)[:2])
    for student in students:
        student.begin_phase(0)
        student.begin_epoch()
    engine = GraphEngine(EagerEngine("fp32", ""), "")
    assert engine.ready(cohort.seed_groups) is engine
    monkeypatch.setattr(GraphEngine, "spent", "an earlier capture failed")
    assert engine.ready(cohort.seed_groups) is engine
    for student in students:
        student.begin_phase(0)
    assert type(engine.ready(cohort.seed_groups)) is EagerEngine, "another phase needs another capture"
    assert len(replaying) == 1


@pytest.mark.usefixtures("failing")
def test_an_evaluation_that_can_not_be_captured_is_plain(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, grid(small_npz)[:1])
    engine = GraphEngine(EagerEngine("fp32", ""), "bound by launches")
    engine.why += "; kdsvd resnet8 beside it"
    first, second, third = (engine.evaluate([student], cohort.data)[0] for _ in range(3))
    assert torch.equal(first.probabilities, second.probabilities)
    assert torch.equal(first.probabilities, third.probabilities)
    assert (
        engine.why
        == "bound by launches; kdsvd resnet8 beside it; evaluation is not captured (RuntimeError: cudaErrorStreamCaptureInvalidated)"
    )


def test_captured_evaluations_of_students_that_left_are_dropped(data: ImageData, small_npz: Path) -> None:
    _, students = a_cohort(data, grid(small_npz)[:2])
    measured = graphs.CapturedEvaluations()
    for student in students:
        assert not measured.warm(student)
        measured.graphs[student] = object()  # type: ignore[assignment]
    measured.keep(students[:1])
    assert list(measured.graphs) == students[:1]
    assert measured.warm(students[0])
    assert not measured.warm(students[1])


def test_a_compiled_evaluation_answers_as_the_plain_one(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "EVALUATION_COMPILED", ("cpu",))
    cohort, students = a_cohort(data, [config(small_npz, seed=seed) for seed in (0, 1)])
    engine = CompiledEngine("fp32", "")
    found, plain = engine.evaluate(students, cohort.data), EagerEngine("fp32", "").evaluate(students, cohort.data)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.classes, other.classes)
        assert torch.allclose(one.probabilities, other.probabilities, atol=1e-5)
    assert not torch.equal(found[0].probabilities, found[1].probabilities)
    (kept,) = engine._evaluated.values()  # one architecture, one function
    assert kept is not None


def test_an_evaluation_that_can_not_be_compiled_is_plain(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(engines, "EVALUATION_COMPILED", ("cpu",))
    monkeypatch.setattr(engines, "_compile", lambda function: refuses)
    cohort, students = a_cohort(data, grid(small_npz)[:1])
    (found,), (plain,) = CompiledEngine("fp32", "").evaluate(students, cohort.data), EagerEngine("fp32", "").evaluate(students, cohort.data)
    assert torch.equal(found.probabilities, plain.probabilities)


ALL = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "balanced": True, "class_weights": "balanced"}


@pytest.mark.parametrize(
    ("crop", "how"), [("shift", {}), ("resized", {"mixup": True}), ("shift", {"mixup": 0.2}), ("resized", ALL)], ids=str
)
def test_compiled_batches_are_the_plain_ones(data: ImageData, crop: str, how: dict[str, Any]) -> None:
    """Once for all seeds of the same images."""
    images = DeviceData(replace(data, crop=crop, pad=0 if crop == "resized" else data.pad), "full", torch.device("cpu"))
    streams = [SeedBatches(images, seed, 64, **how) for seed in (0, 1)]
    engine, shown, epoch = CompiledEngine("fp32", ""), torch.arange(64), torch.tensor(3)
    for stream in streams:
        draws = stream.draws(3)
        found, batch = engine.draw(stream, draws, shown, epoch)
        expected, known = stream.batch(draws, shown, epoch)
        assert torch.allclose(found, expected, atol=1e-5)
        assert found.stride() == expected.stride()
        assert torch.equal(batch.indices, known.indices)
        assert (batch.labels is None) == (known.labels is None)
        assert known.labels is None or torch.equal(batch.labels, known.labels)
        assert int(batch.epoch) == 3
    assert len(engine._batches) == 1


def test_weights_are_put_back_when_the_device_has_done_all_it_was_given(
    data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that raised may have work left on other streams, which would write over what was put back."""
    cohort, (student,) = a_cohort(data, grid(small_npz)[:1])
    student.begin_phase(0)
    weight = next(student.net.parameters())
    before, found = weight.detach().clone(), []
    monkeypatch.setattr(engines, "synchronize", lambda device: found.append(torch.equal(weight, before)))
    with contextlib.suppress(ValueError), engines.restored_after(cohort.seed_groups), torch.no_grad():
        weight.add_(1)
        raise ValueError
    assert found == [False]
    assert torch.equal(weight, before)
