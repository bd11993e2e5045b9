"""tensorboard: an event file in ``tensorboard/`` of the run's folder."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import advice
from ..ledger import Run
from ..runner import Report
from .base import TRACKERS, Kind, accuracy_name, figures, results, settings, title

FOLDER = "tensorboard"


class TensorBoard:
    """One event file. It is made anew where a run goes on, for epochs after its checkpoint are trained again."""

    def __init__(self, run: Run, folder: Path) -> None:
        from torch.utils.tensorboard.summary import hparams

        self.run = run
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (folder / FOLDER).mkdir()
        self._writer = _writer(folder / FOLDER / title(run))
        values = {name: _plain(value) for name, value in settings(run).items()}
        metric = {accuracy_name(run): 0.0}  # only the name is read
        *begun, self._end = hparams(values, metric)  # type: ignore[no-untyped-call]
        for summary in begun:
            self._writer.file_writer.add_summary(summary)
        self._writer.add_text("config", _table(values))
        self._writer.flush()

    def epoch(self, report: Report) -> None:
        """A point on every curve."""
        for name, value in figures(self.run, report).items():
            self._writer.add_scalar(name, value, report.epoch)
        self._writer.flush()

    def picture(self, name: str, png: bytes) -> None:
        """Under Images."""
        self._writer.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), dataformats="HWC")

    def card(self, markdown: str) -> None:
        """Under Text."""
        self._writer.add_text("card", markdown)

    def close(self, run: Run) -> None:
        """What came of it, under Text."""
        self._writer.add_text("results", _table(results(run)))
        self._writer.file_writer.add_summary(self._end)
        self._writer.close()


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _plain(value: Any) -> bool | int | float | str:
    """A value as TensorBoard takes it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _table(values: dict[str, Any]) -> str:
    """Markdown."""
    rows = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items())
    return f"| key | value |\n| --- | --- |\n{rows}"


TRACKERS.register("tensorboard")(
    Kind(TensorBoard, lambda runs: f"tensorboard: {advice.options('tensorboard', '--logdir', runs)}", "tensorboard")
)
