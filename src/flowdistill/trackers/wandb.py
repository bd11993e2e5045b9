"""wandb: a run of Weights & Biases in ``wandb/`` of the run's folder, offline unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from ..ledger import Run
from ..runner import Report
from .base import TRACKERS, Kind, figures, results, settings, title

FOLDER, MODE, PROJECT = "wandb", "WANDB_MODE", "WANDB_PROJECT"


class WandB:
    """One run there. Its id follows from what the ledger says, so that a run that goes on is the same run there."""

    def __init__(self, run: Run, folder: Path) -> None:
        import wandb

        self.run, self._last = run, 0
        own_id = hashlib.sha256(f"{run.fingerprint} {run.seed} {run.started}".encode()).hexdigest()[:16]
        for old in (folder / FOLDER).glob(f"offline-run-*-{own_id}"):
            shutil.rmtree(old)
        self._picture: Any = wandb.Image
        self._run: Any = wandb.init(
            project=os.environ.get(PROJECT, "flowdistill"),
            dir=folder,
            id=own_id,
            name=title(run),
            config=settings(run),
            resume="allow",
            mode=_mode(),
            reinit="create_new",  # the runs of a cohort are open side by side
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True),
        )

    def epoch(self, report: Report) -> None:
        """A step, numbered as the epoch."""
        self._last = report.epoch
        self._run.log(figures(self.run, report), step=report.epoch)

    def picture(self, name: str, png: bytes) -> None:
        """A picture at the last step."""
        self._run.log({name: self._picture(Image.open(io.BytesIO(png)))}, step=self._last)

    def card(self, markdown: str) -> None:
        """The run's notes, which are Markdown."""
        self._run.notes = markdown

    def close(self, run: Run) -> None:
        """What came of it is the run's summary."""
        self._run.summary.update(results(run))
        self._run.finish(exit_code=0 if run.status == "finished" else 1)


def _mode() -> Any:
    return os.environ.get(MODE) or "offline"


def _told(runs: Path) -> str:
    if _mode() != "offline":
        return f"wandb: {MODE}={_mode()}"
    return f"wandb: offline, in {runs}/NUMBER/{FOLDER}; send it with: wandb sync {runs}/NUMBER/{FOLDER}/offline-run-*"


TRACKERS.register("wandb")(Kind(WandB, _told, "wandb"))
