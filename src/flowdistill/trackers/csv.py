"""csv: ``metrics.csv`` in the run's folder, a row for each epoch. The card and the pictures lie beside it."""

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
        write_whole(self.folder / f"{name}.png", png, make_folder=False)

    def card(self, markdown: str) -> None:
        """``card.md``."""
        write_whole(self.folder / CARD, f"{markdown}\n".encode(), make_folder=False)

    def close(self, run: Run) -> None:
        """Nothing is open."""

    def _write(self) -> None:
        columns = dict.fromkeys(("epoch", "phase", *(name for row in self.rows for name in row)))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / FILE, text.getvalue().encode(), make_folder=False)


TRACKERS.register("csv")(Kind(CSV, lambda runs: f"csv: {runs}/NUMBER/{FILE}"))
