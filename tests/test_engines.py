"""Every engine computes what the plain one computes, what can't be had falls back with its reason, and nothing grows."""

from __future__ import annotations

import gc
import platform
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.cohorts import Taped, a_cohort, grid, train_with, weights_of
from helpers.method_cases import forgetful, method_context
from helpers.small import config

from flowdistill import methods, models
from flowdistill.checks import UserError
from flowdistill.data.batches import DeviceData, SeedBatches
from flowdistill.data.dataset import ImageData
from flowdistill.device import _cpu_computes_bf16 as of_this_processor
from flowdistill.device import keep_freed_memory, resolve_precision, sensible_threads
from flowdistill.ledger import Ledger
from flowdistill.methods import METHODS, Needs
from flowdistill.runner import resume, run
from flowdistill.training import engine_choice
from flowdistill.training.cohort import Cohort, train
from flowdistill.training.engine import CompiledEngine, EagerEngine
from flowdistill.training.engine_choice import choose
from flowdistill.training.student import Student
from flowdistill.training.teacher import Teacher, fold, teach, trim
from flowdistill.types import Batch, DataSpec

CPU = torch.device("cpu")
CIFAR = DataSpec("cifar", 50_000, 10, 3, 32, 32)
TAPS = ("stem", "stage1", "stage2", "stage3")


def test_the_step_that_a_graph_holds_is_the_eager_one_bit_for_bit(data: ImageData, small_npz: Path) -> None:
    for precision in ("fp32", "bf16"):
        plain, plain_students = a_cohort(data, grid(small_npz), precision)
        taped, taped_students = a_cohort(data, grid(small_npz), precision)
        expected, found = train_with(plain, EagerEngine(precision, "")), train_with(taped, Taped(precision, ""))
        for student, taped_student in zip(plain_students, taped_students, strict=True):
            assert weights_of(student) == weights_of(taped_student)
            assert [epoch[student] for epoch in expected] == [epoch[taped_student] for epoch in found]


MIXED = {"teacher": "-", "weights": {"task": 0.0}, "train": {"mixup": True}}


def test_the_step_that_a_graph_holds_is_the_eager_one_on_resized_and_mixed_images(data: ImageData, small_npz: Path) -> None:
    cropped = replace(data, crop="resized", pad=0)
    runs = [config(small_npz, method=method, seed=seed, crop="resized", **MIXED) for method, seed in (("kd", 0), ("sp", 0), ("kd", 1))]
    plain, plain_students = a_cohort(cropped, runs)
    taped, taped_students = a_cohort(cropped, runs)
    expected, found = train_with(plain, EagerEngine("fp32", "")), train_with(taped, Taped("fp32", ""))
    for student, taped_student in zip(plain_students, taped_students, strict=True):
        assert weights_of(student) == weights_of(taped_student)
        assert [epoch[student] for epoch in expected] == [epoch[taped_student] for epoch in found]
    assert [list(terms) for terms in expected[0].values()] == [["kd"], ["sp"], ["kd"]]


@pytest.fixture(scope="module")
def compiled(data: ImageData, small_npz: Path) -> tuple[Cohort, list[Student], list, CompiledEngine]:
    cohort, students = a_cohort(data, grid(small_npz))
    engine = CompiledEngine("fp32", "")
    terms = train_with(cohort, engine)
    assert cohort.engine is engine, cohort.engine.why
    return cohort, students, terms, engine


def test_each_compiled_step_is_the_eager_one_within_rounding(data: ImageData, small_npz: Path, compiled: tuple) -> None:
    """From the same weights and momenta; over many steps a rounding that turns a ReLU grows, in eager with two threads as well."""
    plain, eager_students = a_cohort(data, grid(small_npz))
    compiled_cohort, compiled_students = a_cohort(data, grid(small_npz))
    eager, engine, steps = EagerEngine("fp32", ""), compiled[3], plain.seed_groups[0].batches.steps
    for student in (*eager_students, *compiled_students):
        student.begin_phase(0)
        student.begin_epoch()
    for epoch in range(2):
        rates = [{student: student.rates(epoch, 2, steps) for student in students} for students in (eager_students, compiled_students)]
        expected, found = eager.epoch(plain.seed_groups, epoch, rates[0]), engine.epoch(compiled_cohort.seed_groups, epoch, rates[1])
        for _ in range(steps):
            stood = {eager_student: [value.clone() for value in _moving(eager_student)] for eager_student in eager_students}
            for eager_student, compiled_student in zip(eager_students, compiled_students, strict=True):
                for value, copied in zip(_moving(eager_student), _moving(compiled_student), strict=True):
                    copied.copy_(value)
            next(expected)
            next(found)
            for eager_student, compiled_student in zip(eager_students, compiled_students, strict=True):
                for term, value in eager_student.sums.items():
                    assert float(compiled_student.sums[term]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), (epoch, term)
                for before, value, computed in zip(stood[eager_student], _moving(eager_student), _moving(compiled_student), strict=True):
                    off, moved = (computed - value).double().norm(), (value - before).double().norm()
                    assert off <= 1e-2 * moved  # 0.6 % where a rounding turns a ReLU; eager with two threads: 0.9 %


def _moving(student: Student) -> list[torch.Tensor]:
    """All that a step changes."""
    return [*(value.detach() for value in student.state()[0].values()), *student.sums.values()]


def test_students_of_one_kind_share_one_compilation(compiled: tuple) -> None:
    assert len(compiled[3]._losses) == 4  # base, fsp, at+kd and crd; the second seed of fsp and of base added none


def test_a_compiled_cohort_of_k_is_k_separate_runs_bit_for_bit(data: ImageData, small_npz: Path, compiled: tuple) -> None:
    _, students, _, engine = compiled
    for run_, student in list(zip(grid(small_npz), students, strict=True))[1:4:2]:
        alone, (single,) = a_cohort(data, [run_])
        train_with(alone, engine)
        assert weights_of(single) == weights_of(student)


def test_a_step_that_is_taken_back_leaves_no_trace(data: ImageData, small_npz: Path, compiled: tuple) -> None:
    cohort, (student,) = a_cohort(data, grid(small_npz)[1:2])
    student.begin_phase(0)
    student.begin_epoch()
    before = {name: value.clone() for name, value in student.state()[0].items()}
    engine = compiled[3]
    engine._tried.clear()
    assert engine.ready(cohort.seed_groups) is engine
    assert all(torch.equal(value, before[name]) for name, value in student.state()[0].items())
    assert all(float(value) == 0 for value in student.sums.values())


def test_what_can_not_be_compiled_is_trained_eagerly_and_told(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no such compiler\nand more")

    plain, (one,) = a_cohort(data, grid(small_npz)[1:2])
    train_with(plain, EagerEngine("fp32", ""))
    cohort, (other,) = a_cohort(data, grid(small_npz)[1:2])
    monkeypatch.setattr("flowdistill.training.engine._compile", lambda function: refuses)
    train_with(cohort, CompiledEngine("fp32", ""))
    assert (cohort.engine.name, cohort.engine.why) == ("eager", "compiling failed (RuntimeError: no such compiler)")
    assert weights_of(one) == weights_of(other)


LONG, SHORT = 200 * 50_000 * 1024, 3 * 50_000 * 1024


@pytest.mark.parametrize(
    ("wanted", "device", "pixels", "resident", "compiler", "name", "why"),
    [
        ("auto", "cpu", LONG, True, True, "compiled", "compiled, for the run is long"),
        ("auto", "cpu", SHORT, True, True, "eager", "not compiled, for the run is short"),
        ("auto", "cpu", LONG, True, False, "eager", "not compiled, for there is no C++ compiler"),
        ("auto", "cuda", LONG, True, True, "graph+compiled", "bound by launches"),
        (
            "auto",
            "cuda",
            LONG,
            True,
            False,
            "graph",
            "not compiled, for there is no C compiler (gcc, clang, or what CC names), which Triton needs",
        ),
        ("auto", "cuda", SHORT, True, True, "graph", "not compiled, for the run is short"),
        ("auto", "cuda", LONG, False, True, "compiled", "no graph: the training images do not fit on the device"),
        ("auto", "mps", LONG, True, True, "eager", "torch.compile is not used on mps"),
        ("eager", "cuda", LONG, True, True, "eager", "asked for"),
        ("compiled", "cpu", SHORT, True, True, "compiled", "asked for"),
        ("compiled", "cpu", LONG, True, False, "eager", "compiled was asked for, but there is no C++ compiler"),
        ("graph", "cpu", SHORT, True, True, "eager", "no graph: CUDA graphs need a CUDA GPU, not cpu"),
        ("graph+compiled", "cuda", SHORT, True, True, "graph+compiled", "compiled"),
    ],
)
def test_the_choice_and_its_reason(
    wanted: str, device: str, pixels: int, resident: bool, compiler: bool, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice.shutil, "which", lambda _: "/usr/bin/g++" if compiler else None)
    found = choose(wanted, torch.device(device), "fp32", pixels=pixels, resident=resident)
    assert found.name == name
    assert why in found.why


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UserError, match="engine 'compile': did you mean 'compiled'"):
        choose("compile", CPU, "fp32", pixels=LONG)


def test_a_compiled_run_is_recorded_as_such_and_resumes_bit_for_bit(small_npz: Path, tmp_path: Path) -> None:
    found = []
    for cut in (False, True):
        ledger = Ledger(tmp_path / str(cut), create=True)
        if cut:
            from helpers.interruptions import Cut, Scissors

            with pytest.raises(Cut):
                run([config(small_npz)], ledger, CPU, engine="compiled", watcher=Scissors(6))
            (done,) = resume(ledger, CPU)
        else:
            (done,) = run([config(small_npz)], ledger, CPU, engine="compiled")
        found.append((done.engine, done.status, done.weights_hash))
        ledger.close()
    assert found[0] == found[1]
    assert found[0][:2] == ("compiled", "finished")


def a_network(name: str = "resnet14", taps: tuple[str, ...] = TAPS) -> models.Network:
    """With batch statistics as of a trained one."""
    net = models.build(name, CIFAR, taps=taps, seed=3)
    with torch.no_grad():
        for seed in range(3):
            net(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(9))
EVERYTHING = Needs(teacher=frozenset(TAPS), logits=True, embedding=True)


@pytest.mark.parametrize("name", ["resnet14", "resnet8x4", "resnet18", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "wrn-16-2"])
def test_a_folded_teacher_says_the_same_with_no_normalisation_left(name: str) -> None:
    net = a_network(name)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        expected = net(IMAGES)
    teacher = Teacher(net, EVERYTHING, "fp32")
    found = teacher.teach(IMAGES)
    assert teacher.whole == ""
    left = sum(isinstance(module, torch.nn.BatchNorm2d) for module in teacher.net.modules())
    assert left == (7 if name.startswith("wrn") else 0)  # those of a WRN that stand before their convolution, behind a sum or a tap
    for name, value in expected.maps.items():
        assert torch.allclose(found.maps[name], value, rtol=1e-4, atol=1e-5), name
    assert torch.allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_folded_teacher_in_bf16_is_as_close_to_float32_as_the_whole_one() -> None:
    net = a_network()
    with torch.no_grad():
        exact = net(IMAGES)
    whole, folded = teach(net, IMAGES, "bf16"), Teacher(net, EVERYTHING, "bf16").teach(IMAGES)
    for name, value in exact.maps.items():
        off, reference = (float((maps[name].float() - value).norm() / value.norm()) for maps in (folded.maps, whole.maps))
        assert off < max(1.5 * reference, 1e-2), name


def test_a_convolution_that_is_used_otherwise_too_is_not_folded() -> None:
    class Tapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    net = Tapped().eval()
    net.bn.running_mean += 1
    assert torch.equal(fold(torch.fx.symbolic_trace(net), torch.channels_last)(IMAGES), net(IMAGES))


def test_a_teacher_runs_no_further_than_is_needed() -> None:
    net = a_network()
    names = {name for name, _ in trim(net, Needs(teacher=frozenset({"stage1"}))).named_modules()}
    assert "layer1.0.conv1" in names
    assert not any(name.startswith(("layer2", "layer3", "fc")) for name in names)
    assert "fc" not in {name for name, _ in trim(net, Needs(embedding=True)).named_modules()}
    found = Teacher(net, Needs(logits=True), "fp32").teach(IMAGES)
    assert (dict(found.maps), found.embedding) == ({}, None)


def test_a_network_that_can_not_be_traced_teaches_whole_and_says_why() -> None:
    class Branching(type(a_network())):
        def forward(self, images: torch.Tensor):
            if images.sum() > 1e9:
                images = images / 2
            return super().forward(images)

    net = a_network()
    net.__class__ = Branching
    with torch.no_grad():
        expected = net(IMAGES)
    teacher = Teacher(net, EVERYTHING, "fp32")
    assert "TraceError" in teacher.whole
    assert torch.equal(teacher.teach(IMAGES).logits, expected.logits)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "base"])
def test_a_method_wants_of_the_teacher_what_it_names_and_nothing_else(name: str) -> None:
    resolved = methods.resolve(name, {}, {})
    spec = models.spec("resnet14", CIFAR)
    trained = models.spec(resolved.shipped_model("resnet14", "resnet14"), CIFAR)
    method = methods.build(resolved, student=trained, teacher=spec, data=CIFAR)
    method.setup(method_context(spec, CIFAR.n_train))
    method = forgetful(method)
    taps = tuple(sorted({*TAPS, *method.needs.teacher}))
    net = a_network(taps=taps)
    student = a_network(trained.name, tuple(sorted(method.needs.student)))
    with torch.no_grad():
        batch = Batch(torch.arange(8), torch.arange(8), torch.tensor(0), peers=(net(IMAGES),))
        expected = method(student(IMAGES), net(IMAGES), batch)
        found = method(student(IMAGES), Teacher(a_network(taps=taps), method.needs, "fp32").teach(IMAGES), batch)
    assert {term: float(value) for term, value in found.items()} == pytest.approx(
        {term: float(value) for term, value in expected.items()}, rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_images_kept_in_host_memory_give_the_same_batches(data: ImageData, monkeypatch: pytest.MonkeyPatch, mixed: bool) -> None:
    data = replace(data, crop="resized", pad=0) if mixed else data
    resident = DeviceData(data, "full", CPU)
    monkeypatch.setattr("flowdistill.data.batches.free_memory", lambda device: 1000.0)
    fetched = DeviceData(data, "full", CPU)
    assert (resident.resident, fetched.resident) == (True, False)
    streams = [SeedBatches(images, 3, 64, mixup=mixed) for images in (resident, fetched)]
    for (resident_images, resident_batch), (fetched_images, fetched_batch) in zip(*(stream.epoch(2) for stream in streams), strict=True):
        assert torch.equal(resident_images, fetched_images)
        assert (resident_batch.labels is None, fetched_batch.labels is None) == (mixed, mixed)
        assert mixed or torch.equal(resident_batch.labels, fetched_batch.labels)
        assert torch.equal(resident_batch.indices, fetched_batch.indices)
        assert int(fetched_batch.epoch) == 2


def test_memory_does_not_grow_over_fifty_epochs(data: ImageData, small_npz: Path) -> None:
    cohort, _ = a_cohort(data, [config(small_npz, method="fsp", teacher="-", train={"epochs": 50})])
    sizes, tensors = {}, {}
    for report in train(cohort):
        if report.epoch in (10, 50):  # a look at all objects takes longer than an epoch
            gc.collect()
            sizes[report.epoch] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            tensors[report.epoch] = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    assert sizes[50] - sizes[10] < 16 * 1024, "KiB"
    assert tensors[50] <= tensors[10]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_is_freed_is_not_taken_from_the_system_again() -> None:
    keep_freed_memory()
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12 << 20)  # 48 MiB, over glibc's own limit for what it keeps: 12,288 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 1000  # one or another may find no free piece that is large enough


def test_precision_auto_is_bf16_where_the_processor_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.device._cpu_computes_bf16", of_this_processor)
    for flags, expected in (("fpu avx512_bf16 sse", "bf16"), ("fpu amx_bf16", "bf16"), ("fpu avx512f avx512bw", "fp32")):
        monkeypatch.setattr(Path, "read_text", lambda self, flags=flags: f"flags : {flags}\n")
        assert resolve_precision("auto", CPU) == expected


def test_threads_are_no_more_than_the_container_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(Path, "read_text", lambda self: "400000 100000\n")
    assert sensible_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert sensible_threads() == 64
