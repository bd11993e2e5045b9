"""What no GPU has run yet, for anybody's GPU: tests, captures, speed, then trainings by the full recipe, in stages of under ten minutes.

    make gpu GPU="--cifar100 npz:cifar100.npz --cifar10 npz:cifar10.npz"
    python benchmarks/gpu.py --stages 1,3           # these alone, by number or name
    python benchmarks/gpu.py --rehearse             # every step at toy size on the CPU: no measurement, only whether it goes through

Each step is a process of its own with a limit. What it gave is written to results/gpu/STAGE.md when it ends, and its figures beside that
as STEP.json or STEP.jsonl; a step that fails or runs past its limit stops no other. A training that was cut goes on when its stage is run
again. Nothing is downloaded. This process needs Python alone, so that it outlives whatever its steps do to torch and to the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flowdistill.bench.measure import Work
    from flowdistill.data.dataset import ImageData
    from flowdistill.training.engine import Engine
    from flowdistill.training.student import Student

ROOT = Path(__file__).resolve().parents[1]
GRACE = 15  # seconds to end in after SIGINT
SHOWN = 80  # lines of a step's output that its stage's file gets
UNKNOWN = 2  # exit status: asked for what there is not
REHEARSED = "**A rehearsal at toy size on the CPU: no figure here measures anything.** "


class RefusedError(Exception):
    """A mistake that the user can mend, in one line."""


@dataclass(frozen=True)
class Step:
    """A process.

    Attributes:
        limit: seconds; then it is ended.
        keeps: ``json`` or ``jsonl`` where its stdout is kept as a file of that kind; of ``json`` the stage's file shows stderr.
        environment: variables that it gets beside ours.
    """

    name: str
    limit: float
    command: Sequence[str]
    keeps: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Steps, in order; ``lacks`` says why they can't be run, where they can't."""

    name: str
    steps: Sequence[Step]
    lacks: str = ""


@dataclass(frozen=True)
class Size:
    """How large the work is; the steps are the same.

    Attributes:
        graph, both: the engines that are measured.
        methods: that are captured, each alone.
        images: of the random training images; 0 is as many as CIFAR-10 has.
        recipe: options of ``flowdistill train``: none is the full recipe.
    """

    pair: str = "resnet20:resnet20"
    deep: str = "resnet110:resnet110"
    mixed: str = "resnet20:resnet110"
    graph: str = "graph"
    both: str = "graph+compiled"
    precision: str = "bf16"
    methods: str = "all"
    batch_size: int = 128
    images: int = 0
    steps: int = 100
    rounds: int = 3
    workers: int = 8
    cohorts: str = "3,8"
    seeds: int = 8
    recipe: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


FULL = Size()
TOY = Size(
    *("resnet8:resnet8", "resnet8:resnet8", "resnet8:resnet8"),
    *("eager", "eager"),  # a CPU has no graphs, and compiling takes minutes
    precision="fp32",
    methods="dml",  # each is a process: all would take minutes
    batch_size=8,
    images=64,
    steps=1,
    rounds=1,
    workers=1,
    cohorts="2",
    seeds=2,
    recipe=("--epochs", "1", "--batch-size", "32", "--set", "data.limit_train=64"),
    environment={"TORCH_COMPILE_DISABLE": "1"},  # the strong plain loop is not compiled either
)


def stages(size: Size, device: str, out: Path, runs: Path, data: Mapping[str, str]) -> list[Stage]:
    """All there is to run; ``data`` has a ``--dataset`` for ``cifar100`` and ``cifar10``, or lacks it."""
    sizes = f"--precision {size.precision} --batch-size {size.batch_size} --images {size.images} --rounds {size.rounds}"
    shape = f"--device {device} {sizes}".split()

    def measure(name: str, limit: float, what: str, words: str = "", keeps: str = "jsonl") -> Step:
        command = [sys.executable, str(Path(__file__)), what, *words.split(), *shape]
        return Step(name, limit, command, keeps, size.environment)

    def test(name: str, limit: float, chosen: str) -> Step:
        """As ``make test`` runs them, but that a warning of another torch version is no failure."""
        quiet = ("-p", "no:cacheprovider", "-W", "default", "-rs")
        command = [sys.executable, "-m", "pytest", *quiet, str(ROOT / "tests" / "test_gpu.py"), "-k", chosen]
        # some versions of torch read this once, at the first product, so that a test would set it too late
        return Step(name, limit, command, environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})

    def bench(name: str, limit: float, pair: str, engines: str, cohorts: str = "") -> Step:
        words = f"--pair {pair} --engines {engines} --steps {size.steps} --workers {size.workers}"
        return measure(name, limit, "bench", f"{words} --cohorts {cohorts}" if cohorts else words, keeps="json")

    def trainings(name: str) -> Iterator[Stage]:
        """Teachers, then students, and those once more: what was cut goes on, what is finished is not trained again."""
        ours = ("--runs", str(runs / name))
        how = ("--dataset", data.get(name, ""), "--precision", size.precision, *size.recipe, "--device", device, *ours)
        student, teacher = size.pair.split(":")
        flowdistill = (sys.executable, "-m", "flowdistill")
        teachers = (*flowdistill, "train", "--model", teacher, "--seeds", "100,101", *how)
        pupils = ("--method", "base,fsp,at", "--student", student, "--teacher", teacher, "--seeds", "0-2")
        lacks = "" if name in data else f"give its images by --{name} npz:PATH (or {name}, which torchvision downloads)"
        yield Stage(f"{name}-teachers", [Step(f"{name}-teachers", 570, teachers)], lacks)
        students = [
            Step(f"{name}-students", 520, (*flowdistill, "distill", *pupils, *how)),
            Step(f"{name}-table", 20, (*flowdistill, "table", "--summary", *ours)),
            Step(f"{name}-export", 20, (*flowdistill, "ledger", "export", str(out / f"{name}.ledger.jsonl"), *ours)),
        ]
        yield from (Stage(f"{name}-students{end}", students, lacks) for end in ("", "-on"))

    # before torch 2.12 no capture works in a process where one has failed: what may fail is in a process of its own
    falling, remembering = "waits_for_the_device", "methods_remember"
    pair, graph, both, few = f"--pair {size.pair}", f"--engines {size.graph}", f"--engines {size.both}", f"--steps {size.steps}"
    start = [
        measure("environment", 30, "environment"),
        measure("smoke", 120, "smoke", f"{pair} --engines eager,{size.graph},{size.both} --steps 8"),
        test("tests", 260, f"not {falling} and not {remembering}"),
        test("tests-remembering", 80, remembering),
        test("tests-falling-back", 80, falling),
    ]
    kernels = [
        measure("kernels-graph", 160, "kernels", f"{pair} {graph} {few}"),
        measure("kernels-compiled", 330, "kernels", f"{pair} {both} {few}"),
    ]
    speed = [
        bench("bench", 330, size.pair, ",".join(dict.fromkeys((size.both, "eager"))), size.cohorts),
        measure("streams", 170, "streams", f"{pair} {both} {few} --seeds {size.seeds}"),
        measure("evaluation", 60, "evaluation", f"{pair} {graph}"),
    ]
    resnet110 = [
        bench("bench-resnet110-graph", 130, size.deep, size.graph, size.cohorts.split(",")[0]),
        bench("bench-resnet110-compiled", 310, size.deep, size.both),  # compiling it cold may take minutes
        bench("bench-resnet20-resnet110", 130, size.mixed, size.both),
    ]
    return [
        Stage("start", start),
        Stage("capturable", [measure("capturable", 570, "capturable", f"{pair} {graph} --methods {size.methods}")]),
        Stage("kernels", kernels),
        Stage("speed", speed),
        *trainings("cifar100"),
        *trainings("cifar10"),
        Stage("resnet110", resnet110),
    ]


STAGES = [stage.name for stage in stages(FULL, "cuda", Path(), Path(), {})]


# What is run, one process after the other


class Ended(NamedTuple):
    """How a step ended: ``passed``, ``failed`` or ``cut`` at its limit."""

    how: str
    status: int
    seconds: float


def ended(step: Step, out: int, err: int) -> Ended:
    """Run a step in a process group of its own, and leave nothing of it."""
    began, cut, environment = time.monotonic(), False, _environment(**step.environment)
    process = subprocess.Popen(step.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True)
    try:
        process.wait(step.limit)
    except subprocess.TimeoutExpired:
        cut = True
    finally:  # also where this process is to end
        if process.poll() is None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        _signal(process, signal.SIGKILL)
        process.wait()
    how = "cut" if cut else "failed" if process.returncode else "passed"
    return Ended(how, process.returncode, time.monotonic() - began)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: not permitted where all of a group has ended
        os.killpg(process.pid, number)


def perform(chosen: Sequence[Stage], out: Path, about: str) -> dict[str, Ended]:
    """Run stages, and write what each step gave when it ends; ``about`` says on what. Of a step that was run twice the last counts."""
    found: dict[str, Ended] = {}
    for stage in chosen:
        page = out / f"{stage.name}.md"
        _append(page, f"# {stage.name}, {datetime.now().astimezone().isoformat(' ', 'seconds')}\n\n{about}\n")
        for step in stage.steps:
            print(f"{stage.name}: {step.name}, at most {step.limit:g} s", file=sys.stderr, flush=True)
            with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as talk:
                found[step.name] = one = ended(step, said.fileno(), talk.fileno())
                said.seek(0)
                talk.seek(0)
                gave, told = (stream.read().decode(errors="replace") for stream in (said, talk))
            title = f"{step.name}: {one.how} (exit status {one.status}), {one.seconds:.1f} s of {step.limit:g}"
            if step.keeps and one.how == "passed":
                (out / f"{step.name}.{step.keeps}").write_text(gave)
            parts = [told if step.keeps == "json" else gave, told if one.how != "passed" and step.keeps != "json" else ""]
            shown = "".join(f"\n~~~text\n{_last(part)}\n~~~\n" for part in parts if part.strip())
            _append(page, f"\n## {title}\n\n`{shlex.join(map(str, step.command))}`\n{shown}")
            print(f"  {one.how}, {one.seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def _append(page: Path, text: str) -> None:
    with page.open("a") as file:
        file.write(text)


def _last(text: str) -> str:
    lines = text.rstrip().splitlines()
    return "\n".join([*(["..."] if len(lines) > SHOWN else []), *lines[-SHOWN:]])


# The command


def main(words: Sequence[str]) -> int:
    """The exit status: 0 where all passed, 1 where a step did not, 2 where nothing could be run."""
    told = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="gpu.py", allow_abbrev=False, **told)
    parser.add_argument("--stages", metavar="1,3", help=f"by number or name; left out, all: {', '.join(STAGES)}")
    parser.add_argument("--rehearse", action="store_true", help="every step at toy size on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the results [results/gpu; of a rehearsal a new one for passing files]")
    parser.add_argument("--runs", type=Path, help="folder of the trainings [runs in the folder of the results]")
    for name in ("cifar100", "cifar10"):
        parser.add_argument(f"--{name}", metavar="npz:PATH", help="its images, as flowdistill's --dataset takes them")
    parser.add_argument("--device", default="cuda", help="[cuda]")
    asked = parser.parse_args(words)
    size, device = (TOY, "cpu") if asked.rehearse else (FULL, asked.device)
    data = {name: given for name in ("cifar100", "cifar10") if (given := "digits" if asked.rehearse else getattr(asked, name))}
    for name, given in data.items():
        if given.startswith("npz:") and not Path(given[4:]).expanduser().is_file():
            raise RefusedError(f"--{name} {given!r}: no such file")
    names = _chosen(asked.stages)
    out = asked.out or Path(tempfile.mkdtemp(prefix="gpu-rehearsal-") if asked.rehearse else "results/gpu")
    every = {stage.name: stage for stage in stages(size, device, out, asked.runs or out / "runs", data)}
    left_out = {name: every[name].lacks for name in names if every[name].lacks}
    if left_out and asked.stages:
        raise RefusedError("; ".join(f"--stages {name}: {lacks}" for name, lacks in left_out.items()))
    machine = _machine(device, rehearsed=asked.rehearse)
    _make(out)
    about = f"{REHEARSED if asked.rehearse else ''}{machine}."
    print(f"{about} Results: {out}", file=sys.stderr, flush=True)
    try:
        found = perform([every[name] for name in names if name not in left_out], out, about)
    except OSError as error:  # a full disk
        raise RefusedError(f"{error.filename or out}: {error.strerror}") from None
    for name, lacks in left_out.items():
        print(f"left out: {name}: {lacks}")
    wrong = [f"{name} ({one.how})" for name, one in found.items() if one.how != "passed"]
    again = "; what was cut goes on when its stage is run again" if any(one.how == "cut" for one in found.values()) else ""
    print(f"{len(found)} steps, results in {out}: {'not passed: ' + ', '.join(wrong) + again if wrong else 'all passed'}")
    return int(bool(wrong))


def _chosen(given: str | None) -> list[str]:
    if given is None:
        return STAGES
    numbered = {str(number): name for number, name in enumerate(STAGES, 1)}
    found = [numbered.get(one.strip(), one.strip()) for one in given.split(",")]
    for name in found:
        if name not in STAGES:
            raise RefusedError(f"--stages {given!r}: no stage {name!r}; choose from {', '.join(map(' '.join, numbered.items()))}")
    return list(dict.fromkeys(found))


def _make(out: Path) -> None:
    """The folder, in which a file can be made: asked of the system by making one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RefusedError(f"--out {str(out)!r}: results can't be written there ({error.strerror}); name another folder") from None


def _machine(device: str, *, rehearsed: bool) -> str:
    """What a process with torch says of the device, or its refusal: this one never imports torch."""
    words = [sys.executable, __file__, "machine", "--device", device, *(["--rehearse"] if rehearsed else [])]
    done = subprocess.run(words, capture_output=True, text=True, env=_environment(), check=False)
    said, told = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
    if done.returncode:
        raise RefusedError((told or [f"--device {device!r}: it gave no answer"])[-1].removeprefix("gpu.py: "))
    return said[-1]


def _environment(**more: str) -> dict[str, str]:
    """Of every process: this checkout's code, whatever is installed."""
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **more}


# What the steps measure: each in a process of its own, a line of JSON as soon as it is known. Torch is imported here alone


def tell(**figures: object) -> None:
    """A line."""
    print(json.dumps(figures), flush=True)


def machine(asked: argparse.Namespace) -> None:
    """The device in a line, or why it can't be had."""
    import platform

    import torch

    from flowdistill.device import describe
    from flowdistill.env import circumstances

    try:
        device = torch.device(asked.device)
    except RuntimeError:
        raise RefusedError(f"--device {asked.device!r}: no device of torch; write cuda, or cuda:1 for the second GPU") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not asked.rehearse and (device.type != "cuda" or (device.index or 0) >= count):
        here = f"{count or 'no'} CUDA GPU{'' if count == 1 else 's'}"
        raise RefusedError(
            f"--device {asked.device!r}: torch {torch.__version__} finds {here} here; "
            "run this where there is one, or go through it on the CPU with --rehearse"
        )
    commit = circumstances().get("commit", "unknown (no git)")
    print(f"{describe(device)}; torch {torch.__version__}, Python {platform.python_version()}; commit {commit}")


def environment(asked: argparse.Namespace) -> None:
    """Versions, and the settings that change a figure."""
    import torch

    from flowdistill.device import settings
    from flowdistill.env import processor, versions

    tell(processor=processor(), **versions())
    tell(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), **settings(torch.device(asked.device)))
    if torch.device(asked.device).type == "cuda":
        about = torch.cuda.get_device_properties(asked.device)
        tell(gpu=about.name, capability=[about.major, about.minor], multiprocessors=about.multi_processor_count, memory=about.total_memory)
    if shutil.which("nvidia-smi"):
        wanted = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,utilization.gpu,memory.used"
        shown = subprocess.run(["nvidia-smi", f"--query-gpu={wanted}", "--format=csv"], capture_output=True, text=True, check=False)
        tell(nvidia_smi=shown.stdout.splitlines())


class Running(NamedTuple):
    """A cohort in training: its engine, an iterator that takes a step a turn, its students, and the seconds of set-up."""

    work: Work
    engine: Engine
    steps: Iterator[None]
    students: list[Student]
    setup: float


@functools.cache
def _images(most: int) -> ImageData:
    """Random ones, at most so many of each split; 0 is all."""
    from flowdistill.bench.measure import random_images

    images = random_images()
    return replace(images, **{name: getattr(images, name)[: most or None] for name in ("x_train", "y_train", "x_test", "y_test")})


def _running(asked: argparse.Namespace, engine: str, methods: Sequence[str] = ("fsp",), *, fall_back: bool = False) -> Running:
    import torch

    from flowdistill.bench.measure import Work
    from flowdistill.data.batches import DeviceData
    from flowdistill.device import synchronize
    from flowdistill.training.engine import quiet
    from flowdistill.training.engine_choice import choose

    device, images = torch.device(asked.device), _images(asked.images)
    work = Work(*asked.pair.split(":"), asked.batch_size, images, DeviceData(images, "full", device))
    seed_groups = work.seed_groups(methods, asked.seeds, asked.precision)
    began = time.perf_counter()
    with quiet():
        ready = choose(engine, device, asked.precision, pixels=0).ready(seed_groups)
    synchronize(device)
    if ready.name != engine and not fall_back:
        raise RefusedError(f"{engine} was asked for and {ready.name} came: {ready.why}")
    students = [student for seed_group in seed_groups for student in seed_group.students]

    def steps() -> Iterator[None]:
        for epoch in itertools.count():
            yield from ready.epoch(seed_groups, epoch, {student: student.rates(0, 1, seed_groups[0].batches.steps) for student in students})

    return Running(work, ready, steps(), students, time.perf_counter() - began)


def _milliseconds(asked: argparse.Namespace, running: Running) -> float:
    """A step's, the median of the rounds."""
    import statistics

    from flowdistill.device import synchronize

    device = running.work.data.device
    for _ in range(min(5, asked.steps)):
        next(running.steps)
    found = []
    for _ in range(asked.rounds):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(asked.steps):
            next(running.steps)
        synchronize(device)
        found.append(1000 * (time.perf_counter() - began) / asked.steps)
    return statistics.median(found)


def smoke(asked: argparse.Namespace) -> None:
    """A few steps by each engine from equal weights: sums of the losses, to be read beside those of the first engine."""
    for engine in asked.engines.split(","):
        running = _running(asked, engine)
        for _ in range(asked.steps):
            next(running.steps)
        sums = {name: float(value) for name, value in running.students[0].sums.items()}
        tell(engine=engine, why=running.engine.why, setup_s=round(running.setup, 2), steps=asked.steps, sums=sums)


def capturable(asked: argparse.Namespace) -> None:
    """Every method alone, each in a process of its own, a few at a time. To fall back is an answer; none at all is a failure."""
    from flowdistill.methods import METHODS

    names = list(METHODS) if asked.methods == "all" else asked.methods.split(",")
    words = [
        word
        for key in ("pair", "engines", "device", "precision", "batch_size")
        for word in (f"--{key.replace('_', '-')}", str(getattr(asked, key)))
    ]

    def answer(name: str) -> tuple[str, str]:
        command = [sys.executable, __file__, "method", "--methods", name, "--images", str(asked.images or 4096), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        except subprocess.TimeoutExpired:
            return name, "no answer in 90 s"
        return name, (done.stdout if done.returncode == 0 else done.stderr or f"exit status {done.returncode}").strip().splitlines()[-1]

    without = []
    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as pool:
        for asking in as_completed([pool.submit(answer, name) for name in names]):
            name, line = asking.result()
            try:
                tell(**json.loads(line))
            except ValueError:
                tell(method=name, failed=line)
                without.append(name)
    if without:
        raise RefusedError(f"no answer from {', '.join(without)}")


def method(asked: argparse.Namespace) -> None:
    """The engine that one method gets where a graph is asked for, and why."""
    running = _running(asked, asked.engines, [asked.methods], fall_back=True)
    for _ in range(3):
        next(running.steps)
    sums = {name: float(value) for name, value in running.students[0].sums.items()}  # waits: what a replay does wrong shows here
    tell(method=asked.methods, engine=running.engine.name, why=running.engine.why, setup_s=round(running.setup, 2), sums=sums)


def kernels(asked: argparse.Namespace) -> None:
    """A step's time, how many kernels it launches, and the longest of them; cuDNN choosing its algorithms by rule, then by trial."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from flowdistill.device import synchronize

    device, turns = torch.device(asked.device), 5
    for trial in (False, True):
        torch.backends.cudnn.benchmark = trial
        running = _running(asked, asked.engines)
        took = _milliseconds(asked, running)
        about = {"engine": running.engine.name, "cudnn_benchmark": trial, "setup_s": round(running.setup, 2)}
        tell(**about, step_ms=round(took, 4), images_per_s=round(1000 * asked.batch_size / took))
        with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as record:
            for _ in range(turns):
                next(running.steps)
            synchronize(device)
        seen: dict[str, list[float]] = {}
        for event in record.events():
            if event.device_type.name.lower() == device.type:
                seen.setdefault(event.name[:120], []).append(event.time_range.elapsed_us() / turns)
        if not seen:
            raise RefusedError("the profiler saw no kernel")
        tell(**about, kernels_a_step=sum(map(len, seen.values())) / turns, busy_us=round(sum(map(sum, seen.values())), 1))
        for name, times in sorted(seen.items(), key=lambda one: -sum(one[1]))[:25]:
            tell(us_a_step=round(sum(times), 1), times_a_step=len(times) / turns, kernel=name)


def streams(asked: argparse.Namespace) -> None:
    """Several seeds on as many streams as they take, and on fewer."""
    from flowdistill.training import graph

    for most in (graph.MAX_STREAMS, 4, 1):
        graph.MAX_STREAMS = most
        running = _running(asked, asked.engines)
        took = _milliseconds(asked, running)
        tell(seeds=asked.seeds, most_streams=most, step_ms=round(took, 4), step_ms_a_student=round(took / asked.seeds, 4))


def evaluation(asked: argparse.Namespace) -> None:
    """One student on all test images by batches of several sizes: the first pass is plain, the second captures, the others replay."""
    from flowdistill.data import batches
    from flowdistill.device import synchronize

    for batch in (500, 2000, 10_000):
        batches.at_once = lambda *_, batch=batch: batch
        running = _running(asked, asked.engines, ["base"])
        next(running.steps)
        seconds = []
        for _ in range(4):
            synchronize(running.work.data.device)
            began = time.perf_counter()
            running.engine.evaluate(running.students, running.work.data)
            synchronize(running.work.data.device)
            seconds.append(round(time.perf_counter() - began, 4))
        tell(images=len(running.work.data.epoch_images), batch=batch, first_captured_replayed_s=seconds)


def bench(asked: argparse.Namespace) -> None:
    """What ``flowdistill bench --json`` prints, of as many images as are asked for; its table goes to stderr."""
    import torch

    from flowdistill.bench import measure
    from flowdistill.report import tables

    engines, cohorts = asked.engines.split(","), [int(count) for count in asked.cohorts.split(",") if count]
    found = measure.bench(
        [asked.pair],
        ["fsp"],
        torch.device(asked.device),
        engines=engines,
        precisions=[asked.precision],
        cohorts=cohorts,
        batch_size=asked.batch_size,
        steps=asked.steps,
        rounds=asked.rounds,
        workers=asked.workers,
        images=_images(asked.images),
    )
    print(tables.as_json(found), flush=True)
    print(measure.report(found, lambda rows, columns: tables.render(rows, "md", columns)), file=sys.stderr)
    loops = [row["loop"] for one in found["pairs"] for row in one["rows"]]
    if missing := [engine for engine in engines if sum(loop.startswith(f"{engine},") for loop in loops) < 1 + len(cohorts)]:
        raise RefusedError(f"not all was timed of {', '.join(missing)}: why is said above")


MEASURES: dict[str, Callable[[argparse.Namespace], None]] = {
    one.__name__: one for one in (machine, environment, smoke, capturable, method, kernels, streams, evaluation, bench)
}


def measured(measure: Callable[[argparse.Namespace], None], asked: argparse.Namespace) -> None:
    """As training computes on this device; of a device that there is not, ``machine`` tells."""
    if measure is machine:
        machine(asked)
        return
    import torch

    from flowdistill.device import computing

    with computing(torch.device(asked.device)):
        measure(asked)


def asked_of(name: str, *words: str) -> argparse.Namespace:
    """What a step's process is asked for."""
    parser = argparse.ArgumentParser(prog=f"gpu.py {name}", allow_abbrev=False)
    for option, default in (("device", "cuda"), ("precision", "bf16"), ("pair", ""), ("engines", ""), ("methods", ""), ("cohorts", "")):
        parser.add_argument(f"--{option}", default=default)
    for option, least in (("batch-size", 128), ("images", 0), ("steps", 1), ("rounds", 1), ("workers", 0), ("seeds", 1)):
        parser.add_argument(f"--{option}", type=int, default=least)
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)  # of a process in the background SIGINT is ignored, and that is inherited
    try:
        if sys.argv[1:2] and sys.argv[1] in MEASURES:
            measured(MEASURES[sys.argv[1]], asked_of(*sys.argv[1:]))
        else:
            sys.exit(main(sys.argv[1:]))
    except RefusedError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        sys.exit(UNKNOWN)
    except KeyboardInterrupt:
        print("gpu.py: interrupted; what was written stays", file=sys.stderr)
        sys.exit(130)
