"""The reference log by one command: which runs, how long they will take, and the document, rewritten after each setting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checks import UserError, did_you_mean, obstacle
from .config import BASELINE, RunConfig, validate
from .device import describe
from .ledger import Ledger, Run, baseline_key
from .methods import parts, resolve
from .recipes import Recipe, over, recipe
from .report import fsp_log, log, tables
from .report.progress import Bars
from .report.reference import SETTINGS, Setting
from .report.study import Study
from .runner import Duration, Watcher, estimate, finished, run
from .talk import say

STUDIES: Mapping[str, Study] = {study.name: study for study in (log.STUDY, fsp_log.STUDY)}
BASELINE_SEEDS = (0, 1)  # two, so that no student shares its teacher's initial weights
STUDENT_SEEDS = (0, 1, 2)
OPTIONS: Mapping[str, Mapping[str, Any]] = {"fsp": {"preset": "log"}, "logits": {"on": "embedding"}}
"""The reference's options of a method that are not this package's defaults."""
WEIGHTS: Mapping[str, Mapping[str, float]] = {"at+kd": {"kd": 0.9}}
"""The reference's weights of a row that are not this package's defaults. All other defaults are the reference's."""


def as_the_reference(method: str) -> dict[str, Any]:
    """The reference's options and weights of a row.

    Raises:
        UserError: no such method.
    """
    options = {cls.name: dict(OPTIONS[cls.name]) for cls in parts(method) if cls.name in OPTIONS}
    return {"options": options, "weights": dict(WEIGHTS.get(method, {}))}


@dataclass(frozen=True)
class Order:
    """What is to be reproduced.

    Attributes:
        study: whose document is written.
        settings: networks and data sets, in the log's order.
        rows: methods of the students, in the document's order.
        sources: where each of the log's data sets comes from, as ``--dataset`` takes it.
        limit_train: number of training images. None: the recipe's.
        train: keys of ``train`` that replace the recipe's.
        recipe: None: the package's default, which is the reference's.
        seeds: of the students.
        baselines: seeds of the baselines, which are also the teachers.
    """

    study: Study
    settings: tuple[Setting, ...]
    rows: tuple[str, ...]
    sources: Mapping[str, str]
    limit_train: int | None = None
    train: Mapping[str, Any] | None = None
    recipe: Recipe | None = None
    seeds: Sequence[int] = STUDENT_SEEDS
    baselines: Sequence[int] = BASELINE_SEEDS

    def teachers(self, setting: Setting) -> list[RunConfig]:
        """The baselines, which are also the teachers."""
        return [self.config(setting, BASELINE, seed) for seed in self.baselines]

    def students(self, setting: Setting) -> list[RunConfig]:
        """Students of the same architecture as their teachers, row by row."""
        return [self.config(setting, method, seed) for method in self.rows for seed in self.seeds]

    def config(self, setting: Setting, method: str, seed: int) -> RunConfig:
        """One run of a setting."""
        data = {"name": self.sources[setting.data], "limit_train": self.limit_train}
        values: dict[str, Any] = {"student": setting.model, "method": method, "seed": seed, "train": dict(self.train or {})}
        values["data"] = {key: value for key, value in data.items() if value is not None}
        if method != BASELINE:
            values |= {"teacher": setting.model} | as_the_reference(method)
        if self.recipe:
            for below in (self.recipe.of(setting.model), *self.recipe.of_run(method, setting.model, setting.model)):
                values = over(below, values)
        return validate(values)


def choose(name: str) -> Study:
    """A study by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}: {did_you_mean(name, STUDIES)}")
    return STUDIES[name]


def settings(study: Study, only: str | None) -> tuple[Setting, ...]:
    """The settings of a study, or those that ``only`` names, separated by commas.

    Raises:
        UserError: no such setting.
    """
    names = [setting.name for setting in SETTINGS]
    wanted = names if only is None else [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in names:
            raise UserError(f"--only {name!r} is no setting of {study.name}: {did_you_mean(name, names)}")
    return tuple(setting for setting in SETTINGS if setting.name in wanted)


def rows(study: Study, names: str | None) -> tuple[str, ...]:
    """The students' rows of a study, or the methods in ``names``, separated by commas: the study's in its order, then the others.

    Raises:
        UserError: a method can't be had or is named twice, or its students teach each other.
    """
    methods: list[str] = []
    for name in study.rows if names is None else names.split(","):
        resolved = resolve(name, **as_the_reference(name))
        if resolved.mutual:
            raise UserError(f"--methods {resolved.name}: its students teach each other, and a row has one teacher for each; leave it out")
        if resolved.name in methods:
            raise UserError(f"--methods {names} names {resolved.name} twice; each row is trained once")
        methods.append(resolved.name)
    study_rows = [method for method in study.rows if method in methods]
    return (*study_rows, *(method for method in methods if method not in (*study_rows, BASELINE)))


def by_recipe(name: str | None, chosen: Iterable[Setting]) -> Recipe | None:
    """The recipe of that name, for these settings; None for none.

    Raises:
        UserError: there is none of that name, or it is not for these networks or for baselines.
    """
    if name is None:
        return None
    named_recipe = recipe(name)
    if any(named_recipe.of(setting.model).get("weights", {}).get("task") == 0 for setting in chosen):
        raise UserError(f"--recipe {name}: it trains without labels, from which the baselines, the teachers, learn; choose another")
    return named_recipe


def refuse_own_teachers(seeds: Sequence[int], baselines: Sequence[int]) -> None:
    """Refuse, before anything is trained, a student whose only teacher would begin from the same initial weights.

    Raises:
        UserError: there is such a student.
    """
    for seed in seeds:
        if not set(baselines) - {seed}:
            raise UserError(
                f"--baselines {','.join(map(str, baselines))}: the student of seed {seed} would have no teacher but the one that began "
                f"from its own initial weights; name another seed"
            )


def refuse_folder(folder: Path, study: Study) -> None:
    """Refuse a folder in which the document can't be written, before days of training and not after.

    Raises:
        UserError: something is in the way.
    """
    if hindrance := obstacle(study.document(folder)):
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
    total = Duration()
    for setting in order.settings:
        duration = estimate(order.teachers(setting), ledger, device) + estimate(order.students(setting), ledger, device)
        total += duration
        say(f"{setting.name}: about {duration}")
    say(f"all: about {total} (h:mm:ss) on {describe(device)}, measured on a few steps; set-up and what the ledger has are not counted")


def reproduce(
    order: Order, ledger: Ledger, device: torch.device, folder: Path, command: str, watcher: Watcher | None = None
) -> tuple[Path, bool]:
    """Train what the ledger lacks, and write the document after each setting. Return its path, and whether every run finished.

    The document has all of the ledger's runs of these settings by this recipe, whether they were asked for now or trained before.
    """
    by_setting: dict[Setting, list[Run]] = {}
    document = order.study.document(folder)
    for setting in order.settings:
        by_setting[setting] = _train(order, setting, ledger, device, watcher or Bars())
        order.study.write(folder, by_setting, ledger, command)
        say(f"{setting.name}: written to {document}")
    return document, all(run_.status == "finished" for runs in by_setting.values() for run_ in runs)


def stages(order: Order) -> tuple[list[RunConfig], list[RunConfig]]:
    """The baselines of all settings, which are the teachers, and the students, which can be trained once those are there."""
    teachers = [config for setting in order.settings for config in order.teachers(setting)]
    return teachers, [config for setting in order.settings for config in order.students(setting)]


def in_shards(order: Order) -> list[RunConfig]:
    """What shards train: all students, whose teachers the ledger has, or all baselines if the order has no other row. They write no
    document.
    """
    teachers, students = stages(order)
    return students or teachers


def _train(order: Order, setting: Setting, ledger: Ledger, device: torch.device, watcher: Watcher) -> list[Run]:
    """Train the teachers first, then all students as one cohort. Return their runs, and what else the ledger has."""
    teachers = run(order.teachers(setting), ledger, device, watcher=watcher)
    if any(teacher.status != "finished" for teacher in teachers):
        say(f"{setting.name}: a teacher failed, so its students are left out")
        return teachers
    runs = teachers + run(order.students(setting), ledger, device, watcher=watcher)
    return runs + _others(order, setting, runs, ledger, device)


def _others(order: Order, setting: Setting, runs: Sequence[Run], ledger: Ledger, device: torch.device) -> list[Run]:
    """What else the ledger has by the recipe of these runs: other rows and other seeds than were asked for now."""
    if not order.study.free:
        return []
    key, asked = baseline_key(runs[0]), {(run_.method, run_.seed) for run_ in runs}
    alike = [run_ for run_ in ledger.runs(status="finished", student=setting.model) if baseline_key(run_) == key]
    seeds: dict[str, list[int]] = {}
    for method, seed in dict.fromkeys((run_.method, run_.seed) for run_ in alike if run_.config.get("peer") is None):
        if (method, seed) not in asked:
            seeds.setdefault(method, []).append(seed)
    others: list[Run] = []
    for method, method_seeds in seeds.items():
        with contextlib.suppress(UserError):  # of a method that this process does not know, or that it would not train so
            others += finished([order.config(setting, method, seed) for seed in method_seeds], ledger, device)
    return others
