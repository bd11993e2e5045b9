"""Progress on stderr: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..runner import Report, Watcher


class Bars(Watcher):
    """One bar a cohort, over its steps."""

    def __init__(self, on_epoch: Callable[[Report], object] | None = None) -> None:
        super().__init__(on_epoch)
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """One line."""
        self.console.print(line)

    def begin(self, title: str, steps: int) -> None:
        """A bar."""
        self._title = title
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            redirect_stdout=sys.stdout.isatty(),  # a pipe gets what the caller prints
        )
        self._task = self._bars.add_task(title, total=steps, note="")
        if self.console.is_terminal:
            self._bars.start()

    def step(self) -> None:
        """The bar moves."""
        self._bars.advance(self._task)

    def epoch(self, line: str) -> None:
        """The bar's note, or a line."""
        self._bars.update(self._task, note=line)
        if not self.console.is_terminal:
            self.console.print(f"{self._title}: {line}")

    def end(self) -> None:
        """The bar stands still."""
        self._bars.stop()
