"""The answers that a finished run keeps beside its row: to the test images, and to the held-out ones."""

from __future__ import annotations

from .. import advice
from ..checks import UserError
from ..metrics import Kept, unpacked
from .exported import Folder
from .folders import PREDICTIONS
from .rows import Run
from .store import Ledger


def kept_answers(run: Run, ledger: Ledger) -> Kept:
    """The answers of a run's student, from its ``predictions.npz``.

    Raises:
        UserError: it has none, since it is unfinished or an older version recorded it; or the file is damaged or of another run.
    """
    path = ledger.run_folder(run.no) / PREDICTIONS
    if run.status != "finished":
        raise UserError(f"run {run.no} is {run.status}, so it has no figures by class; a finished run has")
    if run.backbone:
        raise UserError(
            f"run {run.no} left a backbone: no classifier, and so no answers and no accuracy; its features are measured by "
            f"{advice.probe(run.no, ledger.folder)}"
        )
    again = f"{advice.command('evaluate', run.no, runs=ledger.folder)} measures it again"
    try:
        kept = unpacked(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {again}") from None
    except ValueError as error:
        raise UserError(f"{path} can't be read ({error}); {again}") from None
    if kept is None:
        raise UserError(f"{path}: an older version recorded run {run.no} without labels, so it has no figures by class; {again}")
    if (figures := kept.test.figures)[:2] != (run.images, run.correct):
        raise UserError(
            f"{path} is not of run {run.no}: {figures.correct:,} of {figures.images:,} right there, {run.correct:,} in the ledger; {again}"
        )
    return kept


def class_names(run: Run, ledger: Ledger, num_classes: int) -> list[str]:
    """The names of a run's classes, from its record; numbers if the record has none."""
    labels = Folder(ledger).about(run).get("labels")
    return [*map(str, labels)] if isinstance(labels, list) and len(labels) == num_classes else [*map(str, range(num_classes))]
