"""What a GPU is given, where there is none: on fake tensors nothing leaves it or waits for it, and a capture keeps CUDA's rules.

``fake_cuda.py`` is the GPU, ``fake_capture.py`` the model of the rules. Neither knows of values: ``test_gpu.py`` looks at those, on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.fake_capture import CaptureError, Machine, fake_capture
from helpers.fake_cuda import Watch, fake_cuda, fused_faults
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from flowdistill import models
from flowdistill.bench.measure import Work
from flowdistill.config import validate
from flowdistill.data.batches import DeviceData, SeedBatches
from flowdistill.data.dataset import ImageData
from flowdistill.device import computing
from flowdistill.methods import METHODS, resolve
from flowdistill.methods.fsp import FSP
from flowdistill.methods.kd import KD
from flowdistill.models import MODELS
from flowdistill.training import graph
from flowdistill.training.at_once import set_gradients
from flowdistill.training.engine import CompiledEngine, EagerEngine, Engine
from flowdistill.training.evaluate import evaluate_all
from flowdistill.training.graph import GraphEngine, StaticStep
from flowdistill.training.student import SeedGroup
from flowdistill.training.task import TASK

CPU = torch.device("cpu")
BATCH = 8
COMPOSED = "at+fsp+kd"

WAITS = {"kdsvd"}
"""Methods whose step waits for the GPU: no graph holds them. (Singular vectors, by ``eigh``.)"""


def images(**keys: Any) -> ImageData:
    chance = np.random.default_rng(0)
    x_train, x_test = (chance.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (64, 20))
    y_train, y_test = (chance.integers(0, 10, n) for n in (64, 20))
    return ImageData("random", x_train, y_train, x_test, y_test, classes=10, **keys)


def lanes_of(
    device: torch.device, names: list[str], precision: str = "fp32", *, seeds: int = 1, student: str = "resnet8", teacher: str = "resnet8"
) -> list[SeedGroup]:
    """A seed group per seed, with a student of each method."""
    held = images()
    return Work(student, teacher, BATCH, held, DeviceData(held, "full", device)).seed_groups(names, seeds, precision)


class Walk(NamedTuple):
    """What a watch saw of a step of each phase, and of an evaluation.

    Attributes:
        step, evaluation: the faults.
        launches: of the last phase.
        fused: how many parameters SGD moved in each phase.
        whole: why the teacher was not folded, or empty.
    """

    step: dict[str, int]
    evaluation: dict[str, int]
    launches: Counter[str]
    fused: list[int]
    whole: str


def walk(watch: Watch, seed_groups: list[SeedGroup], precision: str) -> Walk:
    """Of every phase the step that a graph would hold, its second; then an evaluation."""
    students = [student for seed_group in seed_groups for student in seed_group.students]
    step, fused = Counter[str](), []
    for phase in range(max(len(student.resolved.phases) for student in students)):
        for student in students:
            student.begin_phase(phase)
        tape = StaticStep(EagerEngine(precision, ""), seed_groups)
        tape.step()
        watch.forget()
        tape.step()
        step += watch.faults
        fused.append(watch.fused)
    launches = Counter(watch.launches)
    watch.forget()
    evaluate_all([student.net for student in students], seed_groups[0].batches.data.epoch_images, precision)
    return Walk(dict(step), dict(watch.faults), launches, fused, "" if seed_groups[0].teacher is None else seed_groups[0].teacher.whole)


def on_a_gpu(names: list[str], precision: str = "bf16", *, index: int = 0, **networks: str) -> Walk:
    with fake_cuda(index) as watch:
        return walk(watch, lanes_of(watch.device, names, precision, **networks), precision)


# What a step does


@pytest.mark.parametrize(("index", "precision"), [(0, "bf16"), (1, "fp32")])
@pytest.mark.parametrize("name", [*METHODS, COMPOSED])
def test_a_step_and_an_evaluation_of_every_method_stay_on_their_gpu_and_wait_for_nothing(name: str, index: int, precision: str) -> None:
    found = on_a_gpu([name], precision, index=index)
    if name in WAITS:
        assert found.step
        assert all(fault.startswith("waits for the device: ") for fault in found.step), found.step
    else:
        assert found.step == {}
    assert (found.evaluation, found.whole) == ({}, "")
    assert all(found.fused)


FAMILIES = {
    "cifar_resnet": ("resnet8", "resnet8x4"),
    "imagenet_resnet": ("resnet18",),
    "mobilenet": ("mobilenetv2",),
    "shufflenet": ("shufflenetv1", "shufflenetv2"),
    "vgg": ("vgg8",),
    "wide_resnet": ("wrn-16-1",),
}
"""The module of each family -> small members."""


def test_no_family_of_networks_is_left_out() -> None:
    modules = {MODELS[name].make(3, 10).__module__.rpartition(".")[2] for name in MODELS if name != "wrn-28-10"}  # a large one of a family
    assert modules == set(FAMILIES)


@pytest.mark.parametrize("name", [name for names in FAMILIES.values() for name in names])
def test_every_family_of_networks_learns_and_teaches_on_its_gpu(name: str) -> None:
    found = on_a_gpu(["kd"], index=1, student=name, teacher=name)
    assert (found.step, found.evaluation, found.whole) == ({}, {}, "")
    assert all(found.fused)


def test_a_network_of_another_library_learns_and_teaches_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")

    def really(make: Callable[..., Any]) -> Callable[..., Any]:
        """To survey a network, images are shown to it that are some."""

        def made(*args: Any, **keys: Any) -> Any:
            with _disable_current_modes():
                return make(*args, **keys)

        return made

    monkeypatch.setattr(models, "spec", really(models.spec))
    monkeypatch.setattr(models, "build", really(models.build))
    name = "timm:resnet10t"
    found = on_a_gpu(["at+kd"], student=name, teacher=name)
    assert (found.step, found.evaluation, found.whole) == ({}, {}, "")
    assert all(found.fused)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("crop", "mixup"), [("shift", 0.2), ("resized", False), ("resized", True)])
def test_resized_and_mixed_images_stay_on_their_gpu(crop: str, mixup: float, precision: str) -> None:
    with fake_cuda() as watch:
        held = images(crop=crop, pad=4 if crop == "shift" else 0)
        data = DeviceData(held, "full", watch.device)
        seed_groups = Work("resnet8", "resnet8", BATCH, held, data).seed_groups(["kd"], 1, precision)
        seed_groups[0].batches = SeedBatches(data, 0, BATCH, mixup=mixup)
        (student,) = seed_groups[0].students
        student.train = student.train.model_copy(update={"mixup": mixup})
        if mixup is True:  # no image has a label of its own
            student.resolved = resolve("kd", {}, {TASK: 0.0})
        found = walk(watch, seed_groups, precision)
    assert (found.step, found.evaluation, found.fused) == ({}, {}, [29])


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}])
def test_adamw_clipping_and_an_average_stay_on_their_gpu(options: dict[str, bool]) -> None:
    """The adapters of vid are moved as well, normalisations and biases without decay; each of the five layers at its own rate."""
    keys = {
        "layer_decay": 0.5,
        "optimizer": "adamw",
        "optimizer_options": options,
        "lr": 0.001,
        "decay_norm_and_bias": False,
        "clip": 1.0,
        "ema": 0.99,
    }
    with fake_cuda(1) as watch:
        seed_groups = lanes_of(watch.device, ["vid"], "bf16")
        (student,) = seed_groups[0].students
        student.train = validate({"train": keys}).train
        found = walk(watch, seed_groups, "bf16")
        moved = len(student.trainable_parameters())
    assert (found.step, found.evaluation) == ({}, {})
    assert found.fused[-1] == moved
    assert found.launches["_fused_adamw_"] == 2 * 5


MAX_LAUNCHES = 331


def launches() -> Counter[str]:
    return on_a_gpu(["fsp"], student="resnet20", teacher="resnet20").launches


def count_launches(found: Counter[str]) -> None:
    total = found.total()
    table = "\n".join(f"{count:6,d}  {name}" for name, count in found.most_common(15))
    assert total <= MAX_LAUNCHES, f"a step launches {total} operations, more than before\n{table}"
    assert total > MAX_LAUNCHES - 20, f"a step launches {total} operations, fewer than before: lower MAX_LAUNCHES\n{table}"


def test_a_step_launches_no_more_than_it_did() -> None:
    count_launches(launches())


# What the watch can see


def planted(monkeypatch: pytest.MonkeyPatch, method: type, change: Callable[[Tensor, Tensor], Tensor | None]) -> None:
    """A method that does something more with its loss and with the student's logits."""
    forward = method.forward

    def changed(self: Any, student: Any, *rest: Any) -> dict[str, Tensor]:
        terms = forward(self, student, *rest)
        name = next(iter(terms))
        more = change(terms[name], student.logits)
        return terms if more is None else {**terms, name: terms[name] + more}

    monkeypatch.setattr(method, "forward", changed)


def beside(made: Any) -> None:
    """Something is made that no loss needs."""


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda loss, logits: loss * float(loss.detach()), "waits for the device: _local_scalar_dense"),
        (lambda loss, logits: loss if loss.detach() > 1 else None, "waits for the device: _local_scalar_dense"),
        (lambda loss, logits: logits[logits > 0].mean(), "waits for the device: index"),
        (lambda loss, logits: logits.detach().argmax(1).bincount(minlength=10).sum(), "waits for the device: bincount"),
        (lambda loss, logits: logits.detach().nonzero().sum(), "waits for the device: nonzero"),
        (lambda loss, logits: loss * torch.tensor(2.0, device=loss.device), "takes from the CPU: _to_copy"),
        (lambda loss, logits: loss * torch.ones(()), "takes from the CPU: mul"),
        (lambda loss, logits: beside(torch.arange(3)), "computes on the CPU: arange"),
        (lambda loss, logits: beside(logits.detach().cpu()), "copies to the CPU: _to_copy"),
        (lambda loss, logits: beside(torch.ones((), device="cuda:1")), "on cuda:1: ones"),
    ],
)
def test_what_a_graph_can_not_hold_is_seen(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any], fault: str) -> None:
    planted(monkeypatch, KD, change)
    assert fault in on_a_gpu(["kd"]).step


def test_what_the_backward_pass_does_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float(gradient)

    planted(monkeypatch, KD, lambda loss, logits: Waiting.apply(loss))
    assert on_a_gpu(["kd"]).step == {"waits for the device: _local_scalar_dense": 1}


def test_twenty_launches_more_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def twenty(loss: Tensor, logits: Tensor) -> None:
        for _ in range(20):
            logits.detach().exp()

    planted(monkeypatch, FSP, twenty)
    with pytest.raises(AssertionError, match=r"more than before\n +\d+  convolution"):
        count_launches(launches())


def test_a_gradient_that_lies_otherwise_than_its_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def across(parameters: list[Tensor], gradients: list[Tensor]) -> None:
        set_gradients(parameters, gradients)
        for parameter in parameters:
            if parameter.dim() == 2:
                parameter.grad = parameter.grad.transpose(-1, -2).contiguous().transpose(-1, -2)

    monkeypatch.setattr("flowdistill.training.step.set_gradients", across)
    assert on_a_gpu(["kd"]).step == {"fused SGD: a gradient of another stride": 1}  # that of the classifier


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"lr": 0.1}, "the rate is no scalar on cuda:0"),
        ({"lr": torch.zeros(())}, "the rate is no scalar on cuda:0"),
        ({"lr": torch.zeros((), device="meta")}, "the rate is no scalar on cuda:0"),
        ({"momentum": {"device": "cuda:1"}}, "a momentum of another device"),
        ({"momentum": {"dtype": torch.bfloat16}}, "a momentum of another dtype"),
        ({"gradient": {"dtype": torch.bfloat16}}, "a gradient of another dtype"),
        ({"gradient": {"memory_format": torch.contiguous_format}}, "a gradient of another stride"),
        ({}, None),
    ],
)
def test_what_fused_sgd_would_compute_wrongly_is_seen(changed: dict[str, Any], fault: str | None) -> None:
    with fake_cuda() as watch:
        usual = {"device": watch.device, "dtype": torch.float32, "memory_format": torch.channels_last}
        parameter, gradient, momentum = (
            torch.empty(4, 3, 3, 3, **{**usual, **changed.get(what, {})}) for what in ("parameter", "gradient", "momentum")
        )
        lr = changed.get("lr", torch.zeros((), device=watch.device))
        found = fused_faults("SGD", watch.device, [parameter], [gradient], [momentum], lr)
    assert found == ([] if fault is None else [f"fused SGD: {fault}"])


def test_what_is_patched_is_put_back() -> None:
    there = [torch.autograd.grad, torch.nn.Module._apply, torch.cuda.Stream, torch.cuda.graph, torch.cuda.mem_get_info]

    def fails() -> None:
        with fake_cuda() as watch, fake_capture(watch.device):
            assert torch.ones(1, device="cuda").is_cuda
            assert torch.autograd.grad is not there[0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert there == [torch.autograd.grad, torch.nn.Module._apply, torch.cuda.Stream, torch.cuda.graph, torch.cuda.mem_get_info]
    assert float(torch.ones(2).sum()) == 2


# What a capture may do


class Captured(NamedTuple):
    """A graph, or what it fell back to, and how it came."""

    engine: Engine
    machine: Machine
    faults: dict[str, int]
    evaluated: int


def captured(
    names: list[str],
    *,
    seeds: int = 1,
    index: int = 0,
    warm_up: int = 0,
    evaluations: int = 0,
    prepare: Callable[[list[SeedGroup]], None] = lambda seed_groups: None,
) -> Captured:
    """A cohort that asks for a graph; every student is then measured so often. There are no libraries to warm up."""
    warm, spent = patch.object(graph, "WARM_UP", warm_up), patch.object(GraphEngine, "spent", "")
    with warm, spent, fake_cuda(index) as watch, fake_capture(watch.device) as machine:
        seed_groups = lanes_of(watch.device, names, seeds=seeds)
        prepare(seed_groups)
        engine = GraphEngine(EagerEngine("fp32", "asked for"), "").ready(seed_groups)
        students = [student for seed_group in seed_groups for student in seed_group.students]
        found = [engine.evaluate(students, seed_groups[0].batches.data) for _ in range(evaluations)]
        return Captured(engine, machine, dict(watch.faults), sum(map(len, found)))


MIX = ["base", "kd", "fsp", "at", "logits", "crd", "sp", "pkt", "cc", "nst"]


@pytest.mark.parametrize("groups", range(1, 11))
def test_a_cohort_of_one_to_ten_groups_keeps_the_rules_of_a_capture(groups: int) -> None:
    """In one seed group, or where that goes in two with half of them each."""
    seeds = 2 - groups % 2
    found = captured(MIX[: groups // seeds], seeds=seeds)
    assert isinstance(found.engine, GraphEngine), found.engine.why
    (one,) = found.machine.captures
    assert len(one.members) > 1
    assert {stream.device.index for stream in one.members} == {0}


def test_a_cohort_of_ten_seeds_keeps_the_rules_of_a_capture() -> None:
    found = captured(["base"], seeds=10, warm_up=1)
    assert isinstance(found.engine, GraphEngine), found.engine.why


@pytest.mark.parametrize(("names", "seeds"), [(["dml"], 1), (["dml"], 2), (["base", "dml"], 1)])
def test_students_that_teach_each_other_keep_the_rules_of_a_capture(names: list[str], seeds: int) -> None:
    found = captured(names, seeds=seeds)
    assert isinstance(found.engine, GraphEngine), found.engine.why


def test_an_evaluation_is_captured_at_the_second_time() -> None:
    found = captured(["base", "kd"], evaluations=3)
    assert len(found.machine.captures) == 1 + 2
    assert found.machine.replays == 2 * 2
    assert found.evaluated == 3 * 2


def test_an_evaluation_that_can_not_be_captured_is_done_plainly() -> None:
    def waiting(seed_groups: list[SeedGroup]) -> None:
        """A network that looks at its answer in eval mode."""
        (student,) = seed_groups[0].students
        student.net.register_forward_hook(lambda net, given, outputs: None if net.training else beside(float(outputs.logits.sum())))

    found = captured(["base"], evaluations=3, prepare=waiting)
    assert isinstance(found.engine, GraphEngine), found.engine.why
    assert (len(found.machine.captures), found.machine.replays, found.evaluated) == (1, 0, 3)


def test_a_method_that_waits_falls_back() -> None:
    for name in sorted(WAITS):
        found = captured([name])
        assert found.engine.name == "eager"
        assert "it can't be captured" in found.engine.why


def test_the_others_of_its_cohort_are_captured() -> None:
    found = captured(["base", *WAITS])
    assert isinstance(found.engine, GraphEngine), found.engine.why
    assert len(found.machine.captures) == 1


def test_on_the_second_gpu_all_streams_are_its_own() -> None:
    found = captured(["base", "fsp"], index=1, warm_up=3, evaluations=2)
    assert isinstance(found.engine, GraphEngine), found.engine.why
    assert {stream.device.index for stream in found.machine.streams} == {1}
    assert {one.origin.device.index for one in found.machine.captures} == {1}
    assert not [fault for fault in found.faults if fault.startswith("on cuda:")]


def test_a_run_makes_its_gpu_the_current_one() -> None:
    with fake_cuda(1) as watch, fake_capture(watch.device) as machine:
        with computing(watch.device):
            assert torch.ones(1, device="cuda").device.index == 1
            assert torch.cuda.Stream().device.index == 1
        assert machine.device == 0


# What the model of a capture can see


@pytest.fixture
def machine() -> Iterator[Machine]:
    with fake_capture(CPU) as made:
        yield made


def work() -> None:
    torch.ones(1).add_(1)


def fork(machine: Machine) -> Any:
    """A stream beside the current one, which is given something."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        work()
    return beside


def test_a_fork_that_joins_is_captured(machine: Machine) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        made = torch.ones(1)
        beside = fork(machine)
        with torch.cuda.stream(beside):
            made.add_(1)
        del made
        torch.cuda.current_stream().wait_stream(beside)
        work()
    assert [len(one.members) for one in machine.captures] == [2]
    assert machine.capture is None
    assert beside.capture is None


def unjoined(machine: Machine) -> None:
    fork(machine)


def given_more_after_it_joined(machine: Machine) -> None:
    beside = fork(machine)
    torch.cuda.current_stream().wait_stream(beside)
    with torch.cuda.stream(beside):
        work()


def frees_too_early(machine: Machine) -> None:
    beside, made = torch.cuda.Stream(), torch.ones(1)
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        made.add_(1)
    del made
    again = torch.ones(1)
    torch.cuda.current_stream().wait_stream(beside)
    del again


def waits_for_others(machine: Machine) -> None:
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())


def goes_elsewhere(machine: Machine) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        work()


def synchronizes(machine: Machine) -> None:
    torch.cuda.synchronize()


def reads_a_value(machine: Machine) -> None:
    float(torch.ones(1))


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (unjoined, "cudaErrorStreamCaptureUnjoined"),
        (given_more_after_it_joined, "cudaErrorStreamCaptureUnjoined"),
        (waits_for_others, "cudaErrorStreamCaptureIsolation"),
        (goes_elsewhere, "cudaErrorStreamCaptureImplicit"),
        (synchronizes, "cudaErrorStreamCaptureUnsupported"),
        (reads_a_value, "cudaErrorStreamCaptureUnsupported"),
        (frees_too_early, "a stream is given memory again"),
    ],
)
def test_what_cuda_refuses_is_refused(machine: Machine, mistake: Callable[[Machine], None], error: str) -> None:
    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
            mistake(machine)

    with pytest.raises(CaptureError, match=f"^{error}"):
        capture()
    assert machine.captures == []
    assert machine.capture is None


def test_an_event_of_a_capture_that_ended_is_refused(machine: Machine) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()
        event = torch.cuda.current_stream().record_event()
    with pytest.raises(CaptureError, match=r"^cudaErrorCapturedEvent: "):
        torch.cuda.current_stream().wait_event(event)


def test_the_stream_of_a_capture_is_made_once_on_the_device_that_is_current_then(machine: Machine) -> None:
    for device in (1, 0):
        with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph()):
            pass
    assert [one.origin.device.index for one in machine.captures] == [1, 1]


# What the compiler is given


def traces(monkeypatch: pytest.MonkeyPatch, names: list[str], seeds: int) -> int:
    """How often the compiler reads something."""
    traced = []

    def backend(module: Any, inputs: Any) -> Any:
        traced.append(module)
        return module.forward

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keys: compiling(function, **keys, backend=backend))
    torch._dynamo.reset()
    engine = CompiledEngine("fp32", "").ready(lanes_of(CPU, names, seeds=seeds))
    assert engine.name == "compiled", engine.why
    return len(traced)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_students_of_one_kind_are_traced_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    assert traces(monkeypatch, ["base"], count) == 1


def test_each_kind_and_the_teacher_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traces(monkeypatch, ["base", "kd"], 2) == 3


def test_another_trace_for_the_first_student_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was while the tensors of the first were in the function that all use."""
    monkeypatch.setattr("flowdistill.training.engine._hollow", lambda module, made: module)
    assert traces(monkeypatch, ["base"], 2) == 2
