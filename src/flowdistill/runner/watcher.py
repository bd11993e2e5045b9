"""What a caller may want to see of the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """An epoch of a run, as the ledger has it.

    Attributes:
        run: its number.
        epoch, epochs: the epoch, 1-based over all phases, and how many there are.
        lr: of its last step.
        terms: the mean of each unweighted term over its steps.
        accuracy: percent of the test images, of the held-out ones in a holdout run; None where the run diverged.
        seconds: of training and measuring.
    """

    run: int
    epoch: int
    epochs: int
    phase: str
    lr: float
    terms: Mapping[str, float]
    accuracy: float | None
    seconds: float


class Watcher:
    """Sees the work while it is done. This one ignores all but what ``on_epoch`` and ``log`` take. Its methods may not wait for the device.

    Args:
        on_epoch: gets every epoch of every run.
        log: likewise, and hears of where runs begin and end.
    """

    on_epoch: Callable[[Report], object] | None = None
    log: Watcher | None = None

    def __init__(self, on_epoch: Callable[[Report], object] | None = None, log: Watcher | None = None) -> None:
        self.on_epoch, self.log = on_epoch, log

    def began(self, numbers: Sequence[int]) -> None:
        """These runs are trained from here on. The ledger has them, and the epochs that they did before."""
        if self.log is not None:
            self.log.began(numbers)

    def report(self, report: Report) -> None:
        """An epoch of a run is on record. An exception that is raised here stops the cohort, which can go on from this epoch."""
        if self.log is not None:
            self.log.report(report)
        if self.on_epoch is not None:
            self.on_epoch(report)

    def ended(self, numbers: Sequence[int], *, cut_off: bool = False) -> None:
        """The ledger has how these runs ended. ``cut_off``: the command is about to end, and wants no more work."""
        if self.log is not None:
            self.log.ended(numbers, cut_off=cut_off)

    def ended_before(self, numbers: Sequence[int]) -> None:
        """These runs are what was asked for. Some may have finished before."""
        if self.log is not None:
            self.log.ended_before(numbers)

    def say(self, line: str) -> None:
        """One line of talk."""

    def begin(self, title: str, steps: int) -> None:
        """A cohort starts, with ``steps`` steps ahead of it."""

    def step(self) -> None:
        """One step of every student is done."""

    def epoch(self, line: str) -> None:
        """An epoch is done."""

    def saved(self, done: int, runs: Sequence[int], home: int) -> None:
        """A checkpoint after ``done`` epochs of these runs lies in the folder of run ``home``."""

    def end(self) -> None:
        """The cohort is done."""
