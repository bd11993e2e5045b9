"""csv: ``metrics.csv`` in the run's folder, a row for each epoch. The card and the pictures lie in ``csv/`` there."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ..ledger import Run
from ..runner import Report
from ..training.weights import write_whole
from .base import TRACKERS, Kind, figures

FILE, CARD = "metrics.csv", "card.md"
FOLDER = "csv"  # of what names the run's number: a ledger that is merged, and so renumbered, takes no folders along


class CSV:
    """The file is written anew after each epoch, for a later phase may have other terms, and so other columns."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.rows: list[dict[str, Any]] = []
        self._write()

    def epoch(self, report: Report) -> None:
        """A row."""
        self.rows.append({"epoch": report.epoch, "phase": report.phase, **figures(self.run, report)})
        self._write()

    def picture(self, name: str, png: bytes) -> None:
        """A PNG of this name."""
        self._write_beside(f"{name}.png", png)

    def card(self, markdown: str) -> None:
        """``card.md``."""
        self._write_beside(CARD, f"{markdown}\n".encode())

    def close(self, run: Run) -> None:
        """Nothing is open."""

    def _write_beside(self, name: str, content: bytes) -> None:
        (self.folder / FOLDER).mkdir(exist_ok=True)
        write_whole(self.folder / FOLDER / name, content, make_folder=False)

    def _write(self) -> None:
        columns = dict.fromkeys(("epoch", "phase", *(name for row in self.rows for name in row)))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / FILE, text.getvalue().encode(), make_folder=False)


TRACKERS.register("csv")(Kind(CSV, lambda runs: f"csv: {runs}/NUMBER/{FILE}"))
