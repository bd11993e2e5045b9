"""Progress on stderr: a bar on a terminal, a line per epoch elsewhere. In a notebook one line per cohort, which is rewritten in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .. import talk
from ..runner import Report, Watcher
from ..talk import printable

REDRAWN = 0.5  # seconds between two drawings in a notebook, at least


class Bars(Watcher):
    """One bar per cohort, over its steps."""

    def __init__(self, on_epoch: Callable[[Report], object] | None = None) -> None:
        super().__init__(on_epoch)
        self.console = talk.console()

    def say(self, line: str) -> None:
        """One line."""
        self.console.print(printable(line))

    def begin(self, title: str, steps: int) -> None:
        """A bar."""
        self._title = printable(title)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            redirect_stdout=talk.answers_a_terminal(),  # a pipe gets what the caller prints
        )
        self._task = self._bars.add_task(self._title, total=steps, note="")
        self._cell = Cell(self._line()) if self.console.is_jupyter else None
        if self._drawn:
            self._bars.start()

    def step(self) -> None:
        """The bar moves."""
        self._bars.advance(self._task)
        if self._cell and self._cell.due:
            self._cell.write(self._line())

    def epoch(self, line: str) -> None:
        """The bar's note, or a line."""
        self._bars.update(self._task, note=line)
        if self._cell:
            self._cell.write(self._line())
        elif not self._drawn:
            self.console.print(f"{self._title}: {line}")

    def end(self) -> None:
        """The bar stands still."""
        if self._drawn:
            self._bars.stop()

    @property
    def _drawn(self) -> bool:
        """Whether the bar can be redrawn in place, which a dumb terminal can't do."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def _line(self) -> str:
        """The bar in words."""
        task = self._bars.tasks[0]
        left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
        return f"{self._title}: {task.percentage:.0f} %{left} {task.fields['note']}".rstrip()


class Cell:
    """A line below a notebook's cell that can be rewritten. It needs IPython alone, while rich's own bars want ipywidgets."""

    def __init__(self, line: str) -> None:
        from IPython.display import display  # type: ignore[import-not-found]

        self._handle: Any = display({"text/plain": line}, raw=True, display_id=True)
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the line is old."""
        return time.monotonic() - self._written >= REDRAWN

    def write(self, line: str) -> None:
        """Another line in its place."""
        self._handle.update({"text/plain": line}, raw=True)
        self._written = time.monotonic()
