"""Early stopping (train.patience): each student of a cohort stops by itself, ships what the holdout chose, and is on record as stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cohorts import a_cohort
from helpers.small import config

from flowdistill.checks import UserError
from flowdistill.config import RunConfig, validate
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import STUDENT_FILE, Ledger, Run, exported
from flowdistill.runner import evaluate, execute, record, resume, run
from flowdistill.runner.watcher import Report, Watcher
from flowdistill.training import checkpoint
from flowdistill.training import cohort as loop
from flowdistill.training.cohort import train
from flowdistill.training.student import Student

CPU = torch.device("cpu")
EPOCHS = 6
SCRIPT = {"base": (5, 9, 8, 9, 8, 7), "at": (1, 2, 3, 4, 5, 6), "kd": (5, 5, 5, 4, 4, 4)}
"""Method -> how many held-out images its student gets right after each epoch. By a patience of 2: base has its best at epoch 2 and stops
after 4, at goes on, kd is no better than at epoch 1 and stops after 3.
"""
STOPPED = {"base": (2, 4), "at": (6, 6), "kd": (1, 3)}  # the epoch that ships, and the last one


@pytest.fixture(autouse=True)
def _a_checkpoint_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sequence[int]]:
    """Accuracies on the held-out images are those of a table; all else is as it is."""
    script: dict[str, Sequence[int]] = dict(SCRIPT)
    measure = loop._measure

    def measured(cohort: Any, epoch: int, epochs: int) -> Mapping[Student, Any]:
        progress = measure(cohort, epoch, epochs)
        for student, figures in progress.items():
            figures.correct = script[student.resolved.name][cohort.done]
        return progress

    monkeypatch.setattr(loop, "_measure", measured)
    return script


def stops_after(correct: Sequence[int], patience: int, first: int = 1) -> int:
    """The last epoch, by a plain loop; ``first`` is the first epoch of the last phase."""
    best, since = -1, 0
    for epoch, right in enumerate(correct, 1):
        since = 0 if right > best else since + 1
        best = max(best, right)
        if epoch >= first and min(since, epoch - first + 1) >= patience:
            return epoch
    return len(correct)


def test_the_loop_says_what_the_table_does() -> None:
    assert {method: stops_after(correct, 2) for method, correct in SCRIPT.items()} == {m: last for m, (_, last) in STOPPED.items()}
    assert stops_after([0] * 9, 2, first=4) == 5


def configs(data: Path, patience: int | None = 2) -> list[RunConfig]:
    train = {"epochs": EPOCHS, "schedule": "cosine"} | ({} if patience is None else {"patience": patience})
    return [
        config(data, method=method, teacher=None if method == "base" else "1", split="holdout", limit_train=128, train=train)
        for method in SCRIPT
    ]


def with_teacher(ledger: Ledger, data: Path) -> None:
    run([config(data, seed=9, split="holdout", limit_train=128, train={"epochs": 1})], ledger, CPU)


def said(run_: Run) -> tuple[Any, ...]:
    return run_.status, run_.error, run_.epoch, run_.nepoch


# Each by itself


def test_each_student_of_a_cohort_stops_by_itself_and_ships_its_best_epoch(
    ledger: Ledger, small_npz: Path, scripted: dict[str, Sequence[int]]
) -> None:
    with_teacher(ledger, small_npz)
    whole = run(configs(small_npz, None), ledger, CPU)
    early = run(configs(small_npz), ledger, CPU)
    for method, one, other in zip(SCRIPT, early, whole, strict=True):
        chosen, last = STOPPED[method]
        note = f"stopped early at epoch {last} of {EPOCHS} (patience 2)" if last < EPOCHS else ""
        assert said(one) == ("finished", note, chosen, EPOCHS)
        assert "patience=2" in one.variant
        assert [epoch.epoch for epoch in ledger.epochs(one.no)] == [*range(1, last + 1)]
        assert one.fingerprint != other.fingerprint
        curves = [[(epoch.terms, epoch.lr) for epoch in ledger.epochs(run_.no)] for run_ in (one, other)]
        assert curves[0] == curves[1][:last], "the schedule is that of all epochs, and who goes on does not notice"
        assert one.weights_hash == other.weights_hash, "what ships is the best epoch of either"
        measured = evaluate(ledger.run_folder(one.no) / STUDENT_FILE, CPU)
        assert (measured.correct, measured.verdict) == (one.correct, "as recorded")
    assert not [*ledger.run_folder(early[0].no).glob("checkpoint*")]
    again = run(configs(small_npz), ledger, CPU)
    assert [one.no for one in again] == [one.no for one in early], "a run that stopped is done"


def test_the_message_says_that_it_stopped(ledger: Ledger, small_npz: Path, scripted: dict[str, Sequence[int]]) -> None:
    scripted["base"] = (5, 4, 3, 2, 1, 0)
    lines: list[str] = []

    class Lines(Watcher):
        def say(self, line: str) -> None:
            lines.append(line)

    run(configs(small_npz)[:1], ledger, CPU, watcher=Lines())
    assert any("epoch 1 of 6, holdout split" in line and line.endswith("; stopped early at epoch 3 of 6 (patience 2)") for line in lines)
    with pytest.raises(UserError, match=r"^run 1 is finished \(stopped early at epoch 3 of 6 \(patience 2\)\); only what was cut off"):
        resume(ledger, CPU, no=1)


def test_images_per_second_counts_the_epochs_that_were_trained(ledger: Ledger, small_npz: Path, scripted: dict[str, Sequence[int]]) -> None:
    scripted["base"] = (5, 4, 3, 2, 1, 0)
    (one,) = run(configs(small_npz)[:1], ledger, CPU)
    steps = one.images_per_second * one.train_seconds / one.batch_size  # type: ignore[operator]
    assert steps == pytest.approx(3 * round(steps / 3), rel=1e-6)
    (whole,) = run(configs(small_npz, None)[:1], ledger, CPU)
    assert whole.images_per_second * whole.train_seconds == pytest.approx(2 * steps * one.batch_size)  # type: ignore[operator]


# Cut off and gone on with


class After(Watcher):
    """Ctrl-C after an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch_to_stop_at = epoch

    def report(self, report: Report) -> None:
        if report.epoch == self.epoch_to_stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_a_cohort_that_is_cut_off_goes_on_counting(
    ledger: Ledger, small_npz: Path, scripted: dict[str, Sequence[int]], epoch: int, tmp_path: Path
) -> None:
    """Also right where one of its students is to stop, and after one has."""
    with_teacher(ledger, small_npz)
    unbroken = Ledger(tmp_path / "other", create=True)
    with_teacher(unbroken, small_npz)
    expected = run(configs(small_npz), unbroken, CPU)
    with pytest.raises(KeyboardInterrupt):
        run(configs(small_npz), ledger, CPU, watcher=After(epoch))
    done = {method: ledger.run(no).status for no, method in enumerate(SCRIPT, 2)}
    assert done == {method: "finished" if last < epoch else "interrupted" for method, (_, last) in STOPPED.items()}
    saved = checkpoint.load(ledger.run_folder(2))
    assert saved is not None
    assert saved.tensors.keys() == {"2", "3", "4"}, "who goes on elsewhere may not have the files of those that stopped"
    resume(ledger, CPU)
    for one, other in zip(ledger.runs()[1:], expected, strict=True):
        assert (*said(one), one.weights_hash, one.correct) == (*said(other), other.weights_hash, other.correct)
        assert len(ledger.epochs(one.no)) == len(unbroken.epochs(other.no))


def test_a_student_that_stops_is_not_lost_where_its_files_can_not_be_written(
    ledger: Ledger, small_npz: Path, scripted: dict[str, Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_teacher(ledger, small_npz)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record, "save_weights", full)
        with pytest.raises(OSError, match="No space"):
            run(configs(small_npz), ledger, CPU)
    assert {one.status for one in ledger.runs()[1:]} == {"interrupted"}
    resume(ledger, CPU)
    assert [(one.status, one.epoch) for one in ledger.runs()[1:]] == [("finished", chosen) for chosen, _ in STOPPED.values()]


# Phases and peers


def test_patience_counts_from_the_last_phase_on(data: ImageData, small_npz: Path, scripted: dict[str, Sequence[int]]) -> None:
    """What an earlier phase trains need not show in the accuracy."""
    train_keys = {"epochs": 5, "patience": 2}
    stages = {"fsp": {"schedule": "two-stage", "stage_epochs": 4}}
    planned = config(small_npz, method="fsp", options=stages, teacher="-", split="holdout", train=train_keys)
    cohort, (student,) = a_cohort(data, [planned], split="holdout")
    earlier = sum(cohort.phase_epochs[:-1])
    scripted["fsp"] = [7] * cohort.epochs
    stopped: list[Student] = []
    reports = list(train(cohort, on_stop=stopped.append))
    assert [report.epoch for report in reports][-1] == earlier + 2 == stops_after([7] * cohort.epochs, 2, earlier + 1)
    assert (stopped, student.chosen_epoch, cohort.students) == ([student], 1, [])


def test_two_that_teach_each_other_stop_together(ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as one gets better, the other goes on: it is taught by it."""
    measure = loop._measure

    def measured(cohort: Any, epoch: int, epochs: int) -> Mapping[Student, Any]:
        progress = measure(cohort, epoch, epochs)
        for number, figures in enumerate(progress.values()):
            figures.correct = (3, (1, 2, 3, 3, 3, 3)[cohort.done])[number]
        return progress

    monkeypatch.setattr(loop, "_measure", measured)
    keys = {"epochs": EPOCHS, "patience": 2}
    pair = run([config(small_npz, method="dml", peer="resnet8", split="holdout", train=keys)], ledger, CPU)
    assert [said(one)[1:3] for one in pair] == [(f"stopped early at epoch 5 of {EPOCHS} (patience 2)", chosen) for chosen in (1, 3)]


# What reads it


def test_a_ledger_with_a_run_that_stopped_is_exported_and_read(
    ledger: Ledger, small_npz: Path, scripted: dict[str, Sequence[int]], tmp_path: Path
) -> None:
    scripted["base"] = (5, 4, 3, 2, 1, 0)
    (one,) = run(configs(small_npz)[:1], ledger, CPU)
    curve = ledger.epochs(one.no)
    assert (len(curve), exported._contradiction(one, curve)) == (3, "")
    assert exported._contradiction(one, [curve[0], curve[2]]) == "its curve has 2 epochs, its row 6"


def test_patience_is_refused_where_nothing_is_held_out() -> None:
    with pytest.raises(UserError) as error:
        validate({"train": {"patience": 3}, "data": {"name": f"loader:{'0' * 16}"}})
    assert str(error.value) == ("train.patience=3: a loader's images are not held out, and test may not say when to stop; leave it out")
