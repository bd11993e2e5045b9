"""Top-5, macro-F1 and balanced accuracy as runs record them: in the row, in the files, in show and card, whatever way a ledger goes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import assert_refused, command
from helpers.small import config
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score

from flowdistill.api import Result
from flowdistill.checks import UserError
from flowdistill.data.dataset import ImageData
from flowdistill.data.splits import trained_positions
from flowdistill.ledger import Ledger, Run, exported, kept_answers
from flowdistill.ledger.merge import merge
from flowdistill.ledger.rebuild import rebuild
from flowdistill.report.card import page
from flowdistill.runner import card, evaluate, run

CPU = torch.device("cpu")
FIGURES = ("top5", "macro_f1", "balanced_accuracy")


@pytest.fixture(scope="module")
def work(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and a ledger: a full run 1 of ten classes, a holdout run 2, and run 3 of four classes."""
    folder = tmp_path_factory.mktemp("metrics")
    shutil.copy(small_npz, folder / "small.npz")
    with np.load(small_npz) as arrays:
        few = {name: arrays[name][arrays[f"y_{name[2:]}"] < 4] for name in arrays}
    np.savez(folder / "few.npz", **few)
    ledger = Ledger(folder / "runs", create=True)
    for data, split in (("small", "full"), ("small", "holdout"), ("few", "full")):
        run([config(folder / f"{data}.npz", split=split, train={"epochs": 3})], ledger, CPU)
    assert [one.status for one in ledger.runs()] == ["finished"] * 3
    ledger.close()
    return folder


@pytest.fixture
def copy(work: Path, tmp_path: Path) -> Path:
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    return tmp_path


def aged(folder: Path, no: int) -> Ledger:
    """The ledger after an older version recorded a run: without these figures, and without labels beside the answers."""
    ledger = Ledger(folder / "runs")
    path = ledger.run_folder(no) / "predictions.npz"
    with np.load(path) as arrays:
        old = {name: arrays[name] for name in ("classes", "probabilities")}
    np.savez(path, **old)
    ledger.update(no, **dict.fromkeys(FIGURES))
    return ledger


def figures(row: Run) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in FIGURES)


# The record


@pytest.mark.parametrize("no", [1, 2, 3])
def test_the_row_has_the_figures_of_its_answers(no: int, work: Path) -> None:
    ledger = Ledger(work / "runs")
    row, kept = ledger.run(no), kept_answers(ledger.run(no), ledger)
    with np.load(work / ("few.npz" if no == 3 else "small.npz")) as arrays:
        labels = arrays["y_test"]
    classes = kept.test.classes
    np.testing.assert_array_equal(kept.test.labels, labels)
    assert row.correct == (classes == labels).sum()
    assert row.macro_f1 == pytest.approx(100 * f1_score(labels, classes, average="macro"))
    assert row.balanced_accuracy == pytest.approx(100 * balanced_accuracy_score(labels, classes))
    assert row.top5 is None if no == 3 else row.correct < row.top5 <= row.images


def test_top5_is_that_of_the_shipped_network(work: Path) -> None:
    result = Result(Ledger(work / "runs").run(1), work / "runs" / "1")
    with np.load(work / "small.npz") as arrays:
        train, images, labels = (arrays[name].astype(np.float32) for name in ("x_train", "x_test", "y_test"))
    normalised = torch.from_numpy((images / 255 - (train / 255).mean()) / (train / 255).std())[:, None]
    with torch.no_grad():
        best = result.student()(normalised.contiguous(memory_format=torch.channels_last)).logits.topk(5).indices
    hits = int((best == torch.from_numpy(labels)[:, None]).any(1).sum())
    assert abs(hits - result.run.top5) <= 1  # of one image two logits may be equal but for rounding
    assert result.metrics.top5 == result.run.top5


def test_held_out_images_are_measured_apart(work: Path, data: ImageData) -> None:
    ledger = Ledger(work / "runs")
    row, kept = ledger.run(2), kept_answers(ledger.run(2), ledger)
    held_out = np.setdiff1d(np.arange(300), trained_positions(data.y_train, "holdout"))
    assert kept.holdout is not None
    np.testing.assert_array_equal(kept.holdout.labels, data.y_train[held_out])
    chosen = ledger.epochs(2)[row.epoch - 1]
    assert kept.holdout.figures[:2] == (chosen.images, chosen.correct)
    assert (len(kept.test.labels), kept.test.figures.correct) == (150, row.correct)
    assert kept_answers(ledger.run(1), ledger).holdout is None


# The ways of a ledger


def test_a_rebuilt_ledger_has_them(copy: Path) -> None:
    before = [figures(row) for row in Ledger(copy / "runs").runs()]
    (copy / "runs" / "ledger.db").unlink()
    rebuild(copy / "runs")
    assert [figures(row) for row in Ledger(copy / "runs").runs()] == before
    assert None not in before[0]


def test_a_merged_ledger_has_them_and_the_answers(copy: Path) -> None:
    merge([copy / "runs"], copy / "all")
    ledger, before = Ledger(copy / "all"), Ledger(copy / "runs")
    assert [figures(row) for row in ledger.runs()] == [figures(row) for row in before.runs()]
    assert kept_answers(ledger.run(2), ledger).holdout is not None


def test_an_export_has_them_and_one_of_an_older_version_has_none(copy: Path) -> None:
    ledger = Ledger(copy / "runs")
    (copy / "new.jsonl").write_bytes(exported.exported(ledger))
    assert [figures(row) for row in exported.read(copy / "new.jsonl").runs] == [figures(row) for row in ledger.runs()]
    entries = exported.results(ledger)
    for entry in entries:
        for name in FIGURES:
            del entry["run"][name]
    lines = [exported._line(entry) for entry in entries]
    head = {"kind": exported.KIND, "version": exported.VERSION, "sha256": exported._hash(lines)}
    (copy / "old.jsonl").write_text("".join(f"{line}\n" for line in [exported._line(head), *lines]))
    assert [figures(row) for row in exported.read(copy / "old.jsonl").runs] == [(None, None, None)] * 3


def test_a_record_of_an_older_version_is_entered_without_them(copy: Path) -> None:
    path = copy / "runs" / "1" / "run.json"
    record = {name: value for name, value in json.loads(path.read_bytes()).items() if name not in (*FIGURES, "seal", "files")}
    path.write_text(json.dumps(record))
    (copy / "runs" / "ledger.db").unlink()
    rebuild(copy / "runs")
    found = Ledger(copy / "runs").run(1)
    assert (figures(found), found.status) == ((None, None, None), "finished")


# What is shown


def test_evaluate_measures_what_was_recorded(work: Path) -> None:
    for row in Ledger(work / "runs").runs():
        measured = evaluate(work / "runs" / str(row.no) / "student.safetensors", CPU)
        assert (measured.correct, measured.macro_f1, measured.balanced_accuracy) == (row.correct, row.macro_f1, row.balanced_accuracy)
        assert measured.top5 == row.top5_accuracy


def test_show_has_figures_by_class_of_test_and_holdout(copy: Path) -> None:
    said = command(copy, "show", "2", "--format", "json")
    (shown,) = json.loads(said.out)
    ledger = Ledger(copy / "runs")
    kept = kept_answers(ledger.run(2), ledger)
    for prefix, answers in (("test", kept.test), ("holdout", kept.holdout)):
        assert [row[f"{prefix} images"] for row in shown["classes"]] == np.bincount(answers.labels, minlength=10).tolist()
        recalls = recall_score(answers.labels, answers.classes, labels=range(10), average=None, zero_division=0)
        assert [row[f"{prefix} right %"] for row in shown["classes"]] == pytest.approx(100 * recalls, abs=0.006)
    assert "holdout" not in "".join(json.loads(command(copy, "show", "1", "--format", "json").out)[0]["classes"][0])


def test_what_an_older_version_recorded_is_told_and_never_0(copy: Path) -> None:
    ledger = aged(copy, 1)
    with pytest.raises(
        UserError, match="an older version recorded run 1 without labels, so it has no figures by class; flowdistill evaluate 1"
    ):
        kept_answers(ledger.run(1), ledger)
    ledger.close()
    said = command(copy, "show", "1")
    assert said.code == 0
    assert "an older version recorded run 1 without labels" in said.err
    assert command(copy, "evaluate", "1").code == 0


@pytest.mark.parametrize(("change", "why"), [("gone", "No such file"), ("cut", "can't be read"), ("another's", "is not of run 1: ")])
def test_answers_that_are_not_the_runs_are_not_shown(change: str, why: str, copy: Path) -> None:
    ledger = Ledger(copy / "runs")
    path = ledger.run_folder(1) / "predictions.npz"
    if change == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if change == "cut" else (ledger.run_folder(3) / "predictions.npz").read_bytes())
    with pytest.raises(UserError, match=why):
        kept_answers(ledger.run(1), ledger)


def test_a_run_that_is_not_finished_has_none(copy: Path) -> None:
    ledger = Ledger(copy / "runs")
    ledger.update(1, status="failed")
    with pytest.raises(UserError, match="run 1 is failed, so it has no figures by class; a finished run has"):
        kept_answers(ledger.run(1), ledger)


@pytest.fixture(scope="module")
def cards(work: Path) -> dict[int, card.Card]:
    with pytest.MonkeyPatch.context() as patch:
        for name, passes in (("WARM_UP", 1), ("PASSES", 2), ("MIN_PASSES", 1)):
            patch.setattr(card, name, passes)
        return {no: card.measure(no, Ledger(work / "runs"), CPU, batch_size=2) for no in (1, 2, 3)}


def test_the_card_has_them_beside_accuracy(cards: dict[int, card.Card]) -> None:
    for found in cards.values():
        score, row = found.score.figures, found.run
        assert (score.top5, score.macro_f1, score.balanced_accuracy) == figures(row)
        text = page(found, "md")
        assert f"| macro-F1 | {row.macro_f1:.2f} % |" in text
        assert f"| balanced accuracy | {row.balanced_accuracy:.2f} % |" in text
        assert f"| top-5 | {'-' if row.top5 is None else f'{100 * row.top5 / 150:.2f} % ({row.top5} of 150)'} |" in text


@pytest.mark.parametrize("format_", ["md", "html"])
def test_the_card_has_the_holdouts_classes_apart(format_: str, cards: dict[int, card.Card]) -> None:
    assert ["Test and holdout by class" in page(cards[no], format_) for no in (1, 2, 3)] == [False, True, False]
    assert "holdout right %" in page(cards[2], format_)


def test_of_few_classes_the_card_has_the_matrix(cards: dict[int, card.Card]) -> None:
    matrix = cards[3].answers.matrix()
    rows = page(cards[3], "md").split("## Confusions")[1].splitlines()[4:]
    assert rows[0] == "| true class | 0 | 1 | 2 | 3 |"
    assert rows[2:6] == [f"| {name} | {' | '.join(map(str, counts))} |" for name, counts in enumerate(matrix)]


def test_of_many_classes_the_card_has_the_most_frequent_confusions_by_name(cards: dict[int, card.Card]) -> None:
    names = (*(f"kind {number}" for number in range(10)), "cat", "dog", "<b>")
    labels, said = np.array([10] * 5 + [12] * 3 + [0]), np.array([11, 11, 11, 10, 12, 11, 11, 12, 0])
    answers = dataclasses.replace(cards[1].answers, labels=labels, classes=said, num_classes=13)
    many = dataclasses.replace(cards[1], answers=answers, class_names=names, class_images=(0,) * 13)
    many = dataclasses.replace(
        many, columns=tuple(dataclasses.replace(c, score=c.score._replace(class_correct=(0,) * 13)) for c in many.columns)
    )
    text = page(many, "md").split("## Confusions")[1]
    assert "| cat taken for dog | 3 of 5 |\n| &lt;b> taken for dog | 2 of 3 |\n| cat taken for &lt;b> | 1 of 5 |" in text
    assert "<b>" not in page(many, "html")


def test_python_has_them(work: Path) -> None:
    result = Result(Ledger(work / "runs").run(2), work / "runs" / "2")
    assert result.metrics.accuracy == result.accuracy
    assert result.metrics.macro_f1 == result.run.macro_f1
    assert result.answers.holdout.num_classes == 10


def test_a_table_says_which_figure_it_shows(copy: Path) -> None:
    said = command(copy, "table", "--metric", "top5", "--dataset", "few")
    assert "top5 -: says nothing of 5 classes or fewer" in said.out
    assert " | - | 3 | 3 |" in said.out
    assert_refused(
        copy,
        ["table", "--metric", "top5", "--protocol", "best"],
        "--metric top5 --protocol best: that epoch is the best by top-1, and top-1 alone is on record of it; "
        "choose --protocol last, or --metric top1",
    )
