"""Pictures: every point and interval in them is the ledger's, and what can't be drawn is refused in one line."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.command import assert_refused, command
from helpers.rows import row

from flowdistill.ledger import Epoch, Ledger, Run, exported
from flowdistill.report import plots, tables

EPOCHS = 3


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    return fill(ledger)


def fill(ledger: Ledger) -> Ledger:
    """Three baselines, three fsp students and one of another split, with their curves."""
    rows: list[dict[str, Any]] = [
        row(method="base", nepoch=EPOCHS, seed=seed, correct=9000 + 20 * seed, best_correct=9000 + 20 * seed) for seed in range(3)
    ]
    rows += [row(nepoch=EPOCHS, seed=seed, correct=9200 + 10 * seed, best_correct=9200 + 10 * seed) for seed in range(3)]
    rows += [row(nepoch=EPOCHS, seed=7, split="holdout", correct=9100, best_correct=None, best_epoch=None)]
    ledger.register(rows)
    for run in ledger.runs():
        for epoch in range(1, EPOCHS + 1):
            terms = {"task": 3.0 / epoch} | ({"fsp": 0.5 / epoch} if run.method == "fsp" else {})
            right = run.correct if epoch == EPOCHS else 5000 + epoch
            seconds = ((run.train_seconds or 0.0) + (run.eval_seconds or 0.0)) * run.cohort_size / EPOCHS
            ledger.add_epochs({run.no: Epoch(epoch, "joint", 0.1, terms, right, 10_000, seconds)})
    return ledger


def labels(picture: Path) -> list[str]:
    """What the marks and titles of an SVG say to a screen reader."""
    return [html.unescape(text).replace("\u2212", "-") for text in re.findall(r'aria-label="([^"]*)"', picture.read_text())]


def points(picture: Path, run: Run) -> list[tuple[int, float]]:
    """Epoch and value of every dot of a run, panel after panel."""
    name = f"; run: run {run.no}: {run.method} {run.student}, seed {run.seed}"
    marks = [re.fullmatch(rf"epoch: (\d+); value: ([\d.]+){re.escape(name)}", label) for label in labels(picture)]
    return [(int(mark[1]), float(mark[2])) for mark in marks if mark]


def panels(picture: Path) -> list[str]:
    return [match[1] for label in labels(picture) if (match := re.fullmatch(r"Title text '(.*)'", label))]


def test_a_run_s_curves_are_the_ledger_s(filled: Ledger, tmp_path: Path) -> None:
    shown, picture = filled.run(4), tmp_path / "curves.svg"
    said = command(filled.folder.parent, "show", "4", "--plot", str(picture))
    assert (said.code, said.err.splitlines()[0]) == (0, f"drawn: {picture}")
    assert "resnet20" in said.out, "the page is printed as without"
    assert panels(picture) == ["accuracy, % of the test images", "task, mean over the epoch", "fsp, mean over the epoch"]
    drawn = points(picture, shown)
    for panel in ([50.01, 50.02, 92.0], [3.0, 1.5, 1.0], [0.5, 0.25, 0.5 / 3]):
        for epoch, value in enumerate(panel, 1):
            assert any(at == epoch and there == pytest.approx(value) for at, there in drawn)


def test_a_table_s_curves_are_those_of_its_runs(filled: Ledger, tmp_path: Path) -> None:
    picture, file = tmp_path / "curves.svg", tmp_path / "export.jsonl"
    file.write_bytes(exported.exported(filled))
    for source in (filled.folder, file):
        assert command(tmp_path, "table", "--method", "fsp", "--runs", str(source), "--plot", str(picture)).code == 0
        assert {run.no for run in filled.runs() if points(picture, run)} == {4, 5, 6}, "those of the holdout are of another protocol"


def test_accuracy_on_held_out_images_is_not_called_test(ledger: Ledger, tmp_path: Path) -> None:
    filled = fill(ledger)
    both = [(run, filled.epochs(run.no)) for run in (filled.run(7), filled.run(1))]
    plots.draw_curves(tmp_path / "held.svg", both[:1])
    plots.draw_curves(tmp_path / "both.svg", both)
    assert panels(tmp_path / "held.svg")[0] == "accuracy, % of the held-out images"
    assert panels(tmp_path / "both.svg")[0] == "accuracy, % of the held-out or test images"


def test_a_run_without_labels_has_its_terms(ledger: Ledger, tmp_path: Path) -> None:
    ledger.register([row(nepoch=1)])
    shown = ledger.run(1)
    plots.draw_curves(tmp_path / "terms.svg", [(shown, [Epoch(1, "joint", 0.1, {"radio": 0.25}, None, 100, 1.0)])])
    assert panels(tmp_path / "terms.svg") == ["radio, mean over the epoch"]
    assert (1, 0.25) in points(tmp_path / "terms.svg", shown)


def test_a_summary_has_every_run_each_mean_and_welch_s_interval(filled: Ledger, tmp_path: Path) -> None:
    picture = tmp_path / "summary.svg"
    assert command(filled.folder.parent, "table", "--summary", "--plot", str(picture)).code == 0
    (fsp,) = (found for found in tables.summary_rows(filled.runs(), "last") if found["method"] == "fsp")
    text = labels(picture)
    of_fsp = [re.match(r"acc, %: ([\d.]+); row: fsp", label) for label in text]
    assert sorted(float(mark[1]) for mark in of_fsp if mark) == pytest.approx([92.0, 92.1, 92.1, 92.2]), "the mean is the second 92.1"
    (interval,) = (
        mark for label in text if (mark := re.match(r"difference to base, points: ([-\d.]+); row: fsp.*; high: ([-\d.]+)", label))
    )
    assert [float(interval[1]), float(interval[2])] == pytest.approx([fsp["difference"].low, fsp["difference"].high])
    assert any("nothing is selected" in label for label in text), "the protocol stands on it"


def test_under_three_runs_there_is_no_interval(filled: Ledger, tmp_path: Path) -> None:
    few = [run for run in filled.runs() if run.no in (1, 2, 4, 5)]
    plots.draw_summary(tmp_path / "few.svg", tables.summary_rows(few, "last"))
    assert not any("difference" in label for label in labels(tmp_path / "few.svg"))


def test_rows_of_one_method_and_pair_have_names_of_their_own(ledger: Ledger, tmp_path: Path) -> None:
    ledger.register([row(correct=9000, config={"train": {"lr": 0.05}}), row(correct=9100), row(correct=9200, nepoch=100)])
    plots.draw_summary(tmp_path / "three.svg", tables.summary_rows(ledger.runs(), "last"))
    names = {label.partition("; row: ")[2] for label in labels(tmp_path / "three.svg") if "; row: " in label}
    assert len(names) == 3


def test_a_png_is_a_png(filled: Ledger, tmp_path: Path) -> None:
    assert command(filled.folder.parent, "show", "1", "--plot", str(tmp_path / "it.PNG")).code == 0
    assert (tmp_path / "it.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [("show", "1"), ("table",), ("table", "--summary")], ids=" ".join)
def test_what_is_no_picture_is_refused_and_nothing_is_printed(filled: Ledger, words: Sequence[str]) -> None:
    work = filled.folder.parent
    assert_refused(work, [*words, "--plot", "curves.pdf"], "--plot curves.pdf: the name must end in .svg or .png")
    (work / "folder.svg").mkdir()
    line = "--plot folder.svg: it cannot be written there (it is not a file); name another file"
    assert_refused(work, [*words, "--plot", "folder.svg"], line)


def test_more_curves_than_colours_are_refused(filled: Ledger, tmp_path: Path) -> None:
    run, epochs = filled.run(1), filled.epochs(1)
    with pytest.raises(plots.UserError, match=r"21 curves; at most 20 can be told apart; choose by --method, --student$"):
        plots.draw_curves(tmp_path / "many.svg", [(run, epochs)] * 21)
    assert not (tmp_path / "many.svg").exists()


def test_a_run_without_an_epoch_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    ledger.register([row(nepoch=1)])
    with pytest.raises(plots.UserError, match="no run here has an epoch to draw"):
        plots.draw_curves(tmp_path / "none.svg", [(ledger.run(1), [])])
