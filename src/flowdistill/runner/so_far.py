"""The student of a run that was cut off, as its checkpoint has it. The run itself stays as it is, and can be gone on with."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import advice
from ..checks import UserError
from ..device import computing
from ..ledger import Ledger, Run
from ..talk import Remarks
from ..training import checkpoint
from ..training.evaluate import evaluate
from ..training.weights import save_weights
from .cohorts import prepare
from .execute import put_back
from .plan import recorded
from .record import metadata_of

CPU = torch.device("cpu")


def student_so_far(run: Run, ledger: Ledger, remarks: Remarks) -> Path:
    """Write what the run would ship if its last checkpoint were its end: the weights of that epoch, or of the best one that the held-out
    images have chosen so far, or their average. Its file says how many test images they get right,
    if it has a classifier.

    Raises:
        UserError: another process trains it, it has no checkpoint, or what it learns from is not what it began with.
    """
    folder = ledger.run_folder(run.home)
    with ledger.lock(run.home):
        saved = checkpoint.load(folder)
        if saved is None or not saved.done:
            cure = f"go on with: {advice.resume(run.no, ledger.folder)}"
            raise UserError(f"run {run.no} is {run.status}, and has no checkpoint that holds its student; {cure}")
        with computing(CPU):
            ((cohort, members),) = prepare(recorded([run], ledger, CPU), CPU, "eager")
            member = next(member for member in members if member.job.key == (run.fingerprint, run.seed))
            member.no = run.no
            put_back(saved, cohort, [member], folder)
            student = member.student
            student.restore_chosen()
            measured = evaluate(student.net, cohort.data.test, cohort.precision) if student.has_classifier else None
            correct = None if measured is None else int(measured.correct)
        about = metadata_of(member.job, student.net, cohort.data, correct, CPU).record
        path = ledger.run_folder(run.no) / f"student.epoch{saved.done}.safetensors"
        save_weights(path, student.net.state_dict(), about, make_folder=False)
    chosen = f", its weights those of epoch {student.chosen_epoch}" if cohort.select else ""
    remarks.tell(f"run {run.no} is {run.status} at epoch {saved.done} of {run.nepoch}{chosen}: its student so far is in {path}")
    return path
