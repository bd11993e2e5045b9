"""Loops that take turns on the same work in one process, and the table of what they took.

Images are random (32x32, three channels, ten classes): what they show does not matter to speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from .. import methods, models
from ..checks import UserError, as_user_error, did_you_mean
from ..config import BASELINE, validate
from ..data.batches import DeviceData, SeedBatches
from ..data.dataset import ImageData
from ..device import Precision, computing, describe, keep_freed_memory, synchronize
from ..env import processor
from ..methods import Needs
from ..talk import say
from ..training.engine import Engine, quiet
from ..training.engine_choice import choose
from ..training.method_context import gather
from ..training.student import SeedGroup, Student
from ..training.teacher import Teacher
from .plain import PlainLoop
from .roofline import roofline

ENGINES = ("eager", "compiled", "graph", "graph+compiled")
PRECISIONS = get_args(Precision)
EPOCH, TEST = 50_000, 10_000  # images
WARM = 2  # steps of a loader that are not timed: its workers start
COLUMNS = (
    "loop",
    "images/s",
    "min-max",
    "step ms",
    "s/epoch",
    "evaluation s",
    "set-up s",
    "memory MiB",
    "to plain",
    "to separate",
    "over base",
    "memory over base",
)


class UnavailableError(Exception):
    """An engine can't be had here; the message says why."""


@dataclass
class Contender:
    """A loop that is timed.

    Attributes:
        start: gives an iterator that does one step per turn.
        students: how many students a step moves.
        kept: whether its iterator lives on from round to round. If not, each round starts one, whose first steps are not timed.
        evaluate: measures every student on the test images.
        separate: the contenders that do the same work one after the other.
        base: the contender that trains the same student on the labels alone.
        speeds: images/s of each round.
        memory: the most bytes that its first turn held, less what was held before.
    """

    name: str
    start: Callable[[], Iterator[None]]
    students: int = 1
    kept: bool = True
    evaluate: Callable[[], object] | None = None
    separate: Sequence[Contender] = ()
    base: Contender | None = None
    speeds: list[float] = field(default_factory=list)
    running: Iterator[None] | None = None
    setup: float = 0.0
    memory: int = 0
    evaluation: float | None = None

    @property
    def images_per_second(self) -> float:
        """Median over the rounds, all students counted."""
        return statistics.median(self.speeds)


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    student: str
    teacher: str
    batch_size: int
    images: ImageData
    data: DeviceData

    def member(self, method: str, seed: int) -> Student:
        """A fresh student."""
        config = validate({"student": self.student, "method": method, "seed": seed, "train": {"batch_size": self.batch_size}})
        resolved, spec = methods.resolve(method, {}, {}), self.data.spec
        with as_user_error():
            shipped = resolved.shipped_model(self.student, self.teacher)
            built = methods.build(resolved, student=models.spec(shipped, spec), teacher=models.spec(self.teacher, spec), data=spec)
        net = models.build(shipped, spec, taps=tuple(sorted(built.needs.student)), seed=seed)
        return Student(net.on(self.data.device), built.to(self.data.device), resolved, config.train)

    def members(self, method: str, seed: int) -> list[Student]:
        """A fresh student; if the method is mutual, also its peer."""
        student = self.member(method, seed)
        if not student.resolved.mutual:
            return [student]
        peer = self.member(method, seed + 1)
        student.peers, peer.peers = (peer,), (student,)
        return [student, peer]

    def network(self, needs: Needs) -> models.Network:
        """The teacher's network, untrained."""
        return models.build(self.teacher, self.data.spec, taps=tuple(sorted(needs.teacher)), seed=99).on(self.data.device)

    def seed_groups(self, names: Sequence[str], seeds: int, precision: Precision) -> list[SeedGroup]:
        """A seed group per seed with a student of each method, at the start of their first phase."""
        seed_groups = []
        for seed in range(seeds):
            batches = SeedBatches(self.data, seed, self.batch_size)
            students = [student for name in names for student in self.members(name, seed)]
            seed_groups.append(SeedGroup(batches, None, students))
        needs = Needs()
        for student in seed_groups[0].students:
            needs = needs | student.method.needs
        network = self.network(needs).eval()
        context = gather(needs._replace(context=needs.context - {"class_means"}), network, self.data, precision)
        means = torch.ones(network.spec.classes, network.spec.embedding, device=self.data.device)
        context = replace(context, class_means=means)  # a pass over all images is no part of a step
        teacher = Teacher(network, needs, precision)
        for seed_group in seed_groups:
            seed_group.teacher = teacher
            for student in seed_group.students:
                student.method.setup(context)
                student.begin_phase(0)
                student.begin_epoch()
        return seed_groups


def bench(
    pairs: Sequence[str],
    names: Sequence[str],
    device: torch.device,
    *,
    engines: Sequence[str] = (),
    precisions: Sequence[Precision] = ("fp32", "bf16"),
    cohorts: Sequence[int] = (),
    batch_size: int = 128,
    steps: int = 20,
    rounds: int = 5,
    workers: int = 2,
    together: bool = True,
    images: ImageData | None = None,
) -> dict[str, Any]:
    """Time every contender on every pair, in turns. The plain loops train the first method.

    Args:
        pairs: ``STUDENT:TEACHER`` each.
        names: methods; several are timed one by one, the students of a mutual one both.
        engines: of ``ENGINES``. Default: all that the device has.
        cohorts: numbers of seeds of the first method that are trained together.
        steps: the steps of a contender's turn.
        workers: those of the plain loops' DataLoader.
        together: whether several methods are also timed as a cohort with one teacher.
        images: the data. Default: random images.

    Raises:
        UserError: no such pair, method or engine, or too few images for so many steps.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"--engines {engine!r}: {did_you_mean(engine, ENGINES)}")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UserError(f"--precisions {precision!r}: {did_you_mean(precision, PRECISIONS)}")
    if any(count < 2 for count in cohorts):
        raise UserError(f"--cohorts {','.join(map(str, cohorts))}: seeds together are two or more; one alone is always timed")
    named = [_pair(pair) for pair in pairs]
    for name in names:
        methods.parts(name)
    images = images or random_images()
    if (steps + WARM) * batch_size > len(images.x_train):
        raise UserError(f"--steps {steps} of {batch_size} images: an epoch here has {len(images.x_train):,}; set --steps lower")
    data = DeviceData(images, "full", device)
    works = [Work(student, teacher, batch_size, images, data) for student, teacher in named]
    for work in works:
        for name in names:
            work.member(name, 0)  # refuses before anything is timed
    keep_freed_memory()
    engines = engines or ENGINES if device.type == "cuda" else engines or ENGINES[:2]
    tables = []
    with computing(device):
        for work in works:
            contenders = _plain_loops(work, names[0], workers)
            contenders += [
                contender
                for engine in engines
                for precision in precisions
                for contender in _engine_loops(work, names, engine, precision, cohorts, together)
            ]
            _take_turns(contenders, work, steps, rounds)
            rows = [_row(contender, contenders, batch_size) for contender in contenders]
            floor = roofline(work.seed_groups(names[:1], 1, precisions[-1]), precisions[-1])
            tables.append({"pair": f"{work.student} <- {work.teacher}", "rows": rows, "roofline": floor})
        about = {"methods": list(names), "batch_size": batch_size, "steps": steps, "rounds": rounds, "hardware": hardware(device)}
    return {**about, "pairs": tables}


def _pair(pair: str) -> tuple[str, str]:
    student, colon, teacher = pair.partition(":")
    if not colon:
        raise UserError(f"--pairs {pair!r}: write STUDENT:TEACHER, such as resnet8:resnet20")
    return models.canonical(student), models.canonical(teacher)


def random_images() -> ImageData:
    """Random images, as many as CIFAR-10 has."""
    generator = np.random.default_rng(0)
    x_train, x_test = (generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (EPOCH, TEST))
    y_train, y_test = (generator.integers(0, 10, n) for n in (EPOCH, TEST))
    return ImageData("random", x_train, y_train, x_test, y_test, classes=10, pad=4, flip=True)


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine that the figures belong to."""
    return {"cpu": processor(), "cores": os.cpu_count(), "device": describe(device), "torch": torch.__version__}


# The contenders


def _plain_loops(work: Work, method: str, workers: int) -> list[Contender]:
    def loop(number: int, *, strong: bool) -> Contender:
        member = work.member(method, 0)
        plain = PlainLoop(member, work.network(member.method.needs), work.images, work.data, number, strong=strong)
        return Contender(f"{'strong ' if strong else ''}plain loop, {number} workers: {method}", plain.steps, kept=False)

    return [*(loop(number, strong=False) for number in sorted({0, workers})), loop(workers, strong=True)]


def _engine_loops(
    work: Work, names: Sequence[str], engine: str, precision: Precision, cohorts: Sequence[int], together: bool
) -> list[Contender]:
    """Each method alone; all together; the first with several seeds. Methods evaluate alike, so the first does it for all."""
    alone = {name: _contender(work, [name], 1, engine, precision, name) for name in names}
    for contender in alone.values():
        contender.base = alone.get(BASELINE)
    for name in names[1:]:
        alone[name].evaluate = None
    grouped = [_contender(work, names, 1, engine, precision, f"{len(names)} methods together")] if together and len(names) > 1 else []
    for cohort in grouped:
        cohort.separate = list(alone.values())
    for count in cohorts:
        grouped.append(_contender(work, names[:1], count, engine, precision, f"{names[0]}, {count} seeds together"))
        grouped[-1].separate = [alone[names[0]]] * count
    return [*alone.values(), *grouped]


def _contender(work: Work, names: Sequence[str], seeds: int, engine: str, precision: Precision, label: str) -> Contender:
    seed_groups: list[SeedGroup] = []
    ready: list[Engine] = []

    def start() -> Iterator[None]:
        chosen = choose(engine, work.data.device, precision, pixels=0, resident=work.data.resident)
        seed_groups.extend(work.seed_groups(names, seeds, precision))
        with quiet():
            ready.append(chosen.ready(seed_groups))
        if ready[0].name != engine:
            raise UnavailableError(f"{engine} for {label}: {ready[0].why}")
        students = [student for seed_group in seed_groups for student in seed_group.students]
        steps = seed_groups[0].batches.steps
        for number in range(sys.maxsize):
            yield from ready[0].epoch(seed_groups, number, {student: student.rates(0, 1, steps) for student in students})

    def evaluate() -> None:
        ready[0].evaluate([student for seed_group in seed_groups for student in seed_group.students], work.data)

    return Contender(f"{engine}, {precision}: {label}", start, len(names) * seeds, evaluate=evaluate)


# The clock


def _take_turns(contenders: list[Contender], work: Work, steps: int, rounds: int) -> None:
    """Every contender has a turn in every round. One that can't be had is reported and leaves."""
    for number in range(rounds):
        for contender in list(contenders):
            say(f"bench {work.student} <- {work.teacher}: round {number + 1} of {rounds}, {contender.name}")
            try:
                _turn(contender, work, steps)
            except UnavailableError as error:
                say(f"bench: no {error}")
                contenders.remove(contender)


def _turn(contender: Contender, work: Work, steps: int) -> None:
    device, before = work.data.device, _Memory(work.data.device)
    if contender.running is None:
        started = time.perf_counter()
        contender.running = contender.start()
        next(contender.running)
        synchronize(device)
        contender.setup = contender.setup or time.perf_counter() - started
        for _ in range(WARM - 1):
            next(contender.running)
        synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        next(contender.running)
    synchronize(device)
    contender.speeds.append(steps * work.batch_size * contender.students / (time.perf_counter() - started))
    contender.memory = contender.memory or before.grown()
    if not contender.kept:
        contender.running = None  # its workers end
    if contender.evaluate and contender.evaluation is None:
        contender.evaluate()  # warms up
        contender.evaluate()  # a graph is captured
        started = time.perf_counter()
        contender.evaluate()
        synchronize(device)
        contender.evaluation = time.perf_counter() - started


class _Memory:
    """The memory that is held from here on: on a GPU by the driver's account, else by the process (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what others held and freed would hide what this one needs
            Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
        self.before = self._held()

    def _held(self) -> int:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return total - free
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return 0

    def grown(self) -> int:
        return self._held() - self.before


# The table


def _row(contender: Contender, contenders: Sequence[Contender], batch_size: int) -> dict[str, Any]:
    speed = contender.images_per_second
    best = max(other.images_per_second for other in contenders if other.name.startswith("plain"))
    seconds = contender.students / speed  # that all its students take for one image each
    separate = sum(1 / other.images_per_second for other in contender.separate)
    return {
        "loop": contender.name,
        "images/s": round(speed),
        "min-max": f"{min(contender.speeds):.0f}-{max(contender.speeds):.0f}",
        "step ms": round(1000 * batch_size * seconds, 2),
        "s/epoch": round(EPOCH * seconds, 2),
        "evaluation s": "-" if contender.evaluation is None else round(contender.evaluation, 3),
        "set-up s": round(contender.setup, 1),
        "memory MiB": contender.memory >> 20,
        "to plain": f"{speed / best:.2f} x",
        "to separate": f"{seconds / separate:.2f} x" if separate else "-",
        "over base": "-" if contender.base is None else f"{1000 * batch_size * (seconds - 1 / contender.base.images_per_second):+.1f} ms",
        "memory over base": "-" if contender.base is None else f"{(contender.memory - contender.base.memory) / 2**20:+.0f} MiB",
    }


def report(measured: Mapping[str, Any], table: Callable[[Sequence[Mapping[str, Any]], Sequence[str]], str]) -> str:
    """A table for each pair with its hardware and the floor that it stands on; ``table`` draws rows and columns."""
    machine = "{cpu}, {cores} cores; {device}; torch {torch}".format(**measured["hardware"])
    conditions = (
        f"batch {measured['batch_size']}, random 32x32 images; {measured['rounds']} rounds of {measured['steps']} steps, "
        f"alternating in one process"
    )
    parts = [f"{machine}; {conditions}."]
    for pair in measured["pairs"]:
        floor = pair["roofline"]
        parts += [
            pair["pair"],
            table(pair["rows"], COLUMNS),
            f"Roofline of a step of one {measured['methods'][0]} student, {floor['precision']}: "
            f"{floor['operations'] / 1e9:.2f} G operations at {floor['operations_per_second'] / 1e9:.0f} G/s, "
            f"{floor['bytes'] / 1e6:.0f} MB at {floor['bytes_per_second'] / 1e9:.1f} GB/s (both rates measured here): "
            f"{floor['floor_ms']:.2f} ms at least.",
        ]
    return "\n\n".join(parts)
