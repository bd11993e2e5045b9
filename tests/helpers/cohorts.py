"""Cohorts of students beside a teacher, without a ledger, and what engines make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from flowdistill import methods, models
from flowdistill.config import RunConfig
from flowdistill.data.batches import DeviceData
from flowdistill.data.dataset import ImageData
from flowdistill.methods import Needs
from flowdistill.randomness import seeded
from flowdistill.training.cohort import Cohort, train
from flowdistill.training.engine import EagerEngine, Engine
from flowdistill.training.graph import StaticStep
from flowdistill.training.method_context import gather
from flowdistill.training.student import SeedGroup, Student
from flowdistill.training.teacher import Teacher
from flowdistill.training.weights import hash_weights
from helpers.small import config

CPU = torch.device("cpu")


def a_teacher(data: DeviceData, precision: str = "fp32") -> Teacher:
    net = models.build(
        "resnet14", data.spec, taps=("stem", "stage1", "stage2", "stage3", "stage1.first", "stage2.first", "stage3.first"), seed=9
    )
    with torch.no_grad():  # batch statistics as of a trained network
        for _ in range(3):
            net(data.normalise(data.test.images))
    return Teacher(net, Needs(teacher=frozenset(net.taps), logits=True, embedding=True), precision)


def a_student(run: RunConfig, data: DeviceData, wider: int = 0) -> Student:
    """For a teacher whose maps are ``wider`` channels wider than a ResNet's."""
    resolved = methods.resolve(run.method, run.options, run.weights)
    student, teacher = models.spec(run.student, data.spec), models.spec("resnet14", data.spec)
    teacher = replace(teacher, taps=tuple(replace(tap, channels=tap.channels + wider) for tap in teacher.taps))
    with seeded(run.seed, "adapters"):
        method = methods.build(resolved, student=student, teacher=teacher, data=data.spec)
    method.setup(gather(method.needs, None, data, "fp32"))
    return Student(models.build(run.student, data.spec, taps=tuple(method.needs.student), seed=run.seed), method, resolved, run.train)


def a_cohort(data: ImageData, runs: list[RunConfig], precision: str = "fp32", split: str = "full") -> tuple[Cohort, list[Student]]:
    on_device = DeviceData(data, split, CPU)
    seed_groups: dict[int, SeedGroup] = {}
    students = []
    for run in runs:
        stream = on_device.seed_batches(run.seed, run.train)
        seed_group = seed_groups.setdefault(run.seed, SeedGroup(stream, a_teacher(on_device, precision), []))
        seed_group.students.append(a_student(run, on_device))
        students.append(seed_group.students[-1])
    phases = [phase.epochs or runs[0].train.epochs for phase in students[0].resolved.phases]
    return Cohort(on_device, list(seed_groups.values()), runs[0].train, phases, EagerEngine(precision, ""), split == "holdout"), students  # type: ignore[arg-type]


def weights_of(student: Student) -> str:
    return hash_weights(student.net.state_dict())


GRID = [("base", 0), ("fsp", 0), ("at+kd", 0), ("fsp", 1), ("base", 1), ("crd", 0)]


def grid(small_npz: Path, grid: list[tuple[str, int]] = GRID) -> list:
    calm = {"at+kd": {"weights": {"at": 20.0}}, "crd": {"options": {"crd": {"negatives": 50, "dim": 8}}}}  # what suits maps of 8x8
    return [config(small_npz, method=method, teacher="-", seed=seed, **calm.get(method, {})) for method, seed in grid]


class Taped(EagerEngine):
    """What a CUDA graph would replay, run step by step."""

    name = "taped"

    def epoch(self, seed_groups, number, rates):
        tape = StaticStep(self, seed_groups)
        tape.fill(number, rates)
        for _ in range(seed_groups[0].batches.steps):
            tape.step()
            yield


def train_with(cohort: Cohort, engine: Engine) -> list[dict[Student, dict[str, float]]]:
    """The terms of every epoch of a training by this engine."""
    cohort.engine = engine
    return [{student: progress.terms for student, progress in report.progress.items()} for report in train(cohort)]
