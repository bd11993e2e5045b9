"""The reference log by one command: which runs, how long they will take, and the document, rewritten after each setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .checks import UserError, did_you_mean, obstacle
from .config import RunConfig, validate
from .device import describe
from .ledger import Ledger, Run
from .report import fsp_log, tables
from .report.fsp_log import SETTINGS, Setting
from .report.progress import Bars
from .runner import estimate, run
from .talk import say

STUDIES = ("fsp-log",)
TEACHER_SEEDS = range(2)  # two, so that no student shares its teacher's initial weights
STUDENT_SEEDS = range(3)
STUDENTS: Mapping[str, Mapping[str, Any]] = {"fsp": {"fsp": {"preset": "log"}}, "at": {}}
"""Method and options of the students; the recipe is the package's default, which is the reference's."""


@dataclass(frozen=True)
class Order:
    """What is to be reproduced.

    Attributes:
        settings: networks and data sets, in the log's order.
        sources: for each of the log's data sets where it comes from, as ``--dataset`` takes it.
        limit_train: training images, None for all.
        train: keys of ``train`` that are not to be the default.
    """

    settings: tuple[Setting, ...]
    sources: Mapping[str, str]
    limit_train: int | None
    train: Mapping[str, Any]

    def teachers(self, setting: Setting) -> list[RunConfig]:
        """The baselines, which are also the teachers."""
        return [self._config(setting, "base", seed) for seed in TEACHER_SEEDS]

    def students(self, setting: Setting) -> list[RunConfig]:
        """FSP and AT students of their teachers' own architecture."""
        return [self._config(setting, method, seed) for method in STUDENTS for seed in STUDENT_SEEDS]

    def _config(self, setting: Setting, method: str, seed: int) -> RunConfig:
        taught = {"teacher": setting.model, "options": STUDENTS[method]} if method in STUDENTS else {}
        data = {"name": self.sources[setting.data], "limit_train": self.limit_train}
        return validate({"student": setting.model, "method": method, "seed": seed, "data": data, "train": self.train, **taught})


def choose(study: str, only: str | None) -> tuple[Setting, ...]:
    """The settings of a study, or those that ``only`` names, separated by commas.

    Raises:
        UserError: no such study or setting.
    """
    if study not in STUDIES:
        raise UserError(f"unknown study {study!r}: {did_you_mean(study, STUDIES)}")
    names = [setting.name for setting in SETTINGS]
    wanted = names if only is None else [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in names:
            raise UserError(f"--only {name!r} is no setting of {study}: {did_you_mean(name, names)}")
    return tuple(setting for setting in SETTINGS if setting.name in wanted)


def refuse_folder(folder: Path) -> None:
    """Refuse a folder for the document that can't be one, before days of training and not after.

    Raises:
        UserError: something is in the way.
    """
    if hindrance := obstacle(folder / fsp_log.DOCUMENT):
        raise UserError(f"{folder}: the document cannot be written there ({hindrance}); name another folder with --out")


def plan_table(order: Order) -> str:
    """One row for each setting and method."""
    rows = []
    for setting in order.settings:
        by_method: dict[str, list[RunConfig]] = {}
        for config in order.teachers(setting) + order.students(setting):
            by_method.setdefault(config.method, []).append(config)
        for method, configs in by_method.items():
            first, seeds = configs[0], ",".join(str(config.seed) for config in configs)
            shown = {"setting": setting.name, "method": method, "student": first.student, "teacher": first.teacher or "-"}
            rows.append(shown | {"dataset": first.data.name, "seeds": seeds, "epochs": first.train.epochs})
    return tables.render(rows, "table", tuple(rows[0]))


def tell_time(order: Order, ledger: Ledger, device: torch.device) -> None:
    """Say on stderr how long each setting will take on this machine, and all of them."""
    total = 0.0
    for setting in order.settings:
        seconds = sum(estimate(part(setting), ledger, device) for part in (order.teachers, order.students))
        total += seconds
        say(f"{setting.name}: about {_clock(seconds)}")
    say(f"all: about {_clock(total)} (h:mm:ss) on {describe(device)}, measured on a few steps; what the ledger has is not counted")


def reproduce(order: Order, ledger: Ledger, device: torch.device, folder: Path) -> tuple[Path, bool]:
    """Train what the ledger has not, and write the document after each setting; its path, and whether every run finished."""
    found: dict[Setting, list[Run]] = {}
    for setting in order.settings:
        found[setting] = _train(order, setting, ledger, device)
        fsp_log.write(folder, found, ledger)
        say(f"{setting.name}: written to {folder / fsp_log.DOCUMENT}")
    return folder / fsp_log.DOCUMENT, all(run_.status == "finished" for runs in found.values() for run_ in runs)


def _train(order: Order, setting: Setting, ledger: Ledger, device: torch.device) -> list[Run]:
    """The teachers first, then all students as one cohort."""
    bars = Bars()
    teachers = run(order.teachers(setting), ledger, device, watcher=bars)
    if any(teacher.status != "finished" for teacher in teachers):
        say(f"{setting.name}: a teacher failed, so its students are left out")
        return teachers
    return teachers + run(order.students(setting), ledger, device, watcher=bars)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
