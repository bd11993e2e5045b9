"""What the ledger has of runs, told to trackers: while they are trained, or after that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from .. import advice
from ..checks import FAILURES, UserError, summary
from ..ledger import Ledger, Run
from ..ranks import apart
from ..report import card, matrices
from ..runner import Report, Watcher
from ..runner.card import measure
from ..runner.record import reported
from .base import TRACKERS, Tracker

T = TypeVar("T")

PICTURE = "fsp_matrices"


def refuse_running(numbers: Sequence[int], ledger: Ledger) -> None:
    """Refuse runs that are being trained, for that process may show them, too.

    Raises:
        UserError: one of them is being trained, or there is none of that number.
    """
    for no in numbers:
        if ledger.run(no).status == "running":
            raise UserError(f"run {no} is being trained by another process; log it when that has ended")


class Log(Watcher):
    """Tells trackers of runs. What a tracker raises is told in one line, and ends that tracker for that run alone.

    Args:
        names: trackers, as ``chosen`` gives them.
        device: on which the card is measured.
        say: takes each line.

    Attributes:
        failed: whether a tracker failed.
    """

    def __init__(self, names: Sequence[str], ledger: Ledger, device: torch.device, say: Callable[[str], object]) -> None:
        super().__init__()
        self.names, self.ledger, self.device, self.failed = names, ledger, device, False
        self._say = say
        self._trackers: dict[int, dict[str, Tracker]] = {}
        self._shown: dict[int, int] = {}  # the last epoch of each run

    def began(self, numbers: Sequence[int]) -> None:
        """Show these runs from their first epoch, as the ledger has them."""
        if not self._shown:
            for name in self.names:
                self._say(TRACKERS[name].told(self.ledger.folder))
        for no in numbers:
            run, folder = self.ledger.run(no), self.ledger.run_folder(no)
            if no in self._trackers:  # another worker begins it again
                self._close(run)
            self._trackers[no], self._shown[no] = {}, 0
            for name in self.names:
                with self._guard(no, name):
                    self._trackers[no][name] = TRACKERS[name].begin(run, folder)
            self._catch_up(run)

    def report(self, report: Report) -> None:
        """Show an epoch."""
        self._shown[report.run] = report.epoch
        self._each(report.run, lambda tracker: tracker.epoch(report))

    def ended(self, numbers: Sequence[int], *, cut_off: bool = False) -> None:
        """Show what else the ledger has; of a finished run its card and its FSP matrices too, unless the command is cut off."""
        for no in numbers:
            if no not in self._shown:
                if cut_off:
                    continue
                self.began([no])
            run = self.ledger.run(no)
            self._catch_up(run)
            if run.status == "finished" and not cut_off and self._trackers[no]:
                self._complete(run)
            self._close(run)

    def ended_before(self, numbers: Sequence[int]) -> None:
        """Say how those of them are shown that were not trained now."""
        if others := [no for no in numbers if no not in self._shown]:
            command = advice.command("log", *others, "--to", ",".join(self.names), runs=self.ledger.folder)
            self._say(f"not trained now, and so not logged: {command}")

    def _close(self, run: Run) -> None:
        self._each(run.no, lambda tracker: tracker.close(run))
        self._trackers[run.no] = {}

    def _catch_up(self, run: Run) -> None:
        for row in self.ledger.epochs(run.no):
            if row.epoch > self._shown[run.no]:
                self.report(reported(run.no, row, run.nepoch))

    def _complete(self, run: Run) -> None:
        """The card and the matrices. Where one can't be made, a line says why, and the trackers go on."""
        with apart():
            page = self._made(run, "card", lambda: card.page(measure(run.no, self.ledger, self.device), "md"))
            picture = self._made(run, "picture of FSP matrices", lambda: matrices.of_run(run, self.ledger, self.device))
        if picture is not None:
            self._each(run.no, lambda tracker: tracker.picture(PICTURE, picture))
        if page is not None:
            self._each(run.no, lambda tracker: tracker.card(page))

    def _made(self, run: Run, what: str, make: Callable[[], T | None]) -> T | None:
        try:
            return make()
        except FAILURES as error:
            self._say(f"run {run.no}: no {what} is logged: {summary(error)}")
            return None

    def _each(self, no: int, tell: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._trackers[no].items()):
            with self._guard(no, name):
                tell(tracker)

    @contextmanager
    def _guard(self, no: int, name: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self.failed = True
            self._trackers[no].pop(name, None)
            again = advice.command("log", no, "--to", name, runs=self.ledger.folder)
            self._say(f"run {no}: {name} failed ({summary(error)}) and is left out from here on; the whole run afterwards: {again}")
