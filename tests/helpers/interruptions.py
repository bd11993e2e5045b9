"""Trainings that are cut off, and what a resumed one must share with one that went through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flowdistill.config import RunConfig
from flowdistill.ledger import Ledger, Run
from flowdistill.runner import Watcher, run

CPU = torch.device("cpu")
STEPS = 300 // 64
"""Of an epoch of ``small.config``."""


class Cut(BaseException):
    """What cuts a run off here; no code expects it."""


class Scissors(Watcher):
    """Listens, and cuts off at a step."""

    def __init__(self, at: int = -1) -> None:
        self.lines: list[str] = []
        self.left = at

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Cut("cut")


def cut_off(configs: list[RunConfig], ledger: Ledger, steps: int) -> list[Run]:
    """Runs that were cut off after so many steps of the cohort."""
    with pytest.raises(Cut):
        run(configs, ledger, CPU, watcher=Scissors(steps))
    return [stopped for stopped in ledger.runs() if stopped.status == "interrupted"]


def outcome(finished: Run, ledger: Ledger) -> tuple[Any, ...]:
    """All that must not depend on whether the run was cut off."""
    curve = [dataclasses.replace(epoch, seconds=0) for epoch in ledger.epochs(finished.no)]
    return finished.status, finished.correct, finished.epoch, finished.best_correct, finished.weights_hash, curve
