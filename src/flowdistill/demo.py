"""The main job, small and whole: a teacher, students alone, with AT and with FSP, on real handwritten digits."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from .config import RunConfig, validate
from .device import resolve_device
from .ledger import Ledger, Run
from .report import tables
from .report.progress import Bars
from .runner import run
from .talk import say

SEEDS = range(3)
BATCH_SIZE = 32  # 898 images: 28 steps an epoch
TEACHER = {"student": "resnet20", "train": {"epochs": 30, "batch_size": BATCH_SIZE, "precision": "fp32"}}
STUDENT = {"student": "resnet8", "teacher": "resnet20", "train": {"epochs": 6, "batch_size": BATCH_SIZE, "precision": "fp32"}}
WEIGHTS = {"base": {}, "at": {"at": 20.0}, "fsp": {"fsp": 1.0}}  # chosen on the holdout split: docs/LOG.md


def demo(folder: Path | None, format_: str) -> str:
    """Train what the folder's ledger has not, and return the log table and the summary."""
    started, ledger_folder = time.perf_counter(), folder or Path(tempfile.mkdtemp(prefix="flowdistill-demo-"))
    ledger = Ledger(ledger_folder, create=True)
    runs = train_all(ledger)
    log, summary = (make(runs, "last", format_) for make in (tables.log_table, tables.summary_table))
    ledger.close()
    if folder is None:  # only here: the folder of a demo that is stopped before stays, and it can be gone on with
        shutil.rmtree(ledger_folder)
    if format_ in ("csv", "json"):
        return summary
    say(f"demo: {time.perf_counter() - started:.0f} s on this machine")
    return f"{log}\n\n### Summary: a short budget of {STUDENT['train']['epochs']} epochs, the paper's fast optimisation\n\n{summary}"  # type: ignore[index]


def train_all(ledger: Ledger) -> list[Run]:
    """The teacher first, then all students as one cohort."""
    device, bars = resolve_device("auto"), Bars()
    teacher = run([_config(TEACHER, "base", {}, 100)], ledger, device, watcher=bars)
    students = [_config(STUDENT, method, weights, seed) for method, weights in WEIGHTS.items() for seed in SEEDS]
    return teacher + run(students, ledger, device, watcher=bars)


def _config(common: dict[str, Any], method: str, weights: dict[str, float], seed: int) -> RunConfig:
    return validate({**common, "data": {"name": "digits"}, "method": method, "weights": weights, "seed": seed})
