"""The compression card: its formulas against figures computed by hand, its counts, its columns, its pages."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import assert_refused, command
from helpers.small import config

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.ledger import Ledger
from flowdistill.report.card import page
from flowdistill.runner import card as runner_card
from flowdistill.runner import run
from flowdistill.runner.card import Card, baseline, count_macs, measure
from flowdistill.stats import agreement, calibration_error, negative_log_likelihood
from flowdistill.training.weights import load_weights
from flowdistill.types import DataSpec

CPU = torch.device("cpu")


# The formulas


def test_calibration_error_by_hand() -> None:
    """Bins of a fifteenth: 0.95, 0.97 and 1 share the last, where 2 of 3 are right; 0.5 stands alone in (7/15, 8/15] and is right."""
    confidences = np.array([0.95, 0.97, 1.0, 0.5])
    correct = np.array([True, False, True, True])
    last, middle = abs(2 / 3 - (0.95 + 0.97 + 1.0) / 3), abs(1 - 0.5)
    assert calibration_error(confidences, correct) == pytest.approx(3 / 4 * last + 1 / 4 * middle, abs=1e-12)


def test_gaps_of_one_bin_cancel_and_those_of_two_do_not() -> None:
    half_right = np.array([True, False])
    assert calibration_error(np.array([0.5, 0.5]), half_right) == 0
    assert calibration_error(np.array([0.5, 0.6]), half_right) == pytest.approx((0.5 + 0.6) / 2)


def test_a_bin_holds_its_upper_edge() -> None:
    """1/15 is in the first bin with 0.01, not in the second with 0.07."""
    right = np.array([True, False])
    assert calibration_error(np.array([1 / 15, 0.01]), right) == pytest.approx((1 - 1 / 15 - 0.01) / 2)
    assert calibration_error(np.array([1 / 15, 0.07]), right) == pytest.approx((1 - 1 / 15 + 0.07) / 2)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not() -> None:
    assert calibration_error(np.ones(3), np.array([True] * 3)) == 0
    assert calibration_error(np.ones(3), np.array([False] * 3)) == 1


def test_negative_log_likelihood_by_hand() -> None:
    log_probabilities = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    assert negative_log_likelihood(log_probabilities, np.array([0, 1])) == pytest.approx((math.log(2) + math.log(10)) / 2)


def test_negative_log_likelihood_of_even_odds_is_log_of_the_classes() -> None:
    assert negative_log_likelihood(np.full((4, 10), -math.log(10)), np.arange(4)) == pytest.approx(math.log(10))


def test_agreement_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    first, second = np.array([0, 1, 1, 0, 0, 2]), np.array([0, 1, 0, 2, 0, 0])
    assert agreement(first, second, labels) == (6, 3, 3, 2)
    assert agreement(second, first, labels) == (6, 3, 3, 2)
    assert agreement(labels, labels, labels) == (6, 6, 0, 0)


def test_macs_of_resnet8_by_hand() -> None:
    """Grey images of 16x16: the stem, a block of two convolutions a stage at 16, 8 and 4 pixels, two 1x1 shortcuts, the classifier."""
    net = models.build("resnet8", DataSpec("some", 1, 10, 1, 16, 16)).eval()
    convolutions = 256 * 9 * (1 * 16 + 16 * 16 + 16 * 16) + 64 * 9 * (16 * 32 + 32 * 32) + 16 * 9 * (32 * 64 + 64 * 64)
    by_hand = convolutions + 64 * 16 * 32 + 16 * 32 * 64 + 64 * 10
    assert count_macs(net, torch.zeros(1, 1, 16, 16)) == by_hand
    assert count_macs(net, torch.zeros(3, 1, 16, 16)) == 3 * by_hand


def test_macs_of_grouped_convolutions_count_their_own_channels_alone() -> None:
    net = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count_macs(net, torch.zeros(1, 8, 5, 5)) == 5 * 5 * 9 * 8


# The card of a run


@pytest.fixture(scope="module")
def work(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its data and a ledger: teacher 1, students alone 2 and 3, fsp 4, at+kd 5, dml 6 and 7, kd 8 by another recipe."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copy(small_npz, folder / "small.npz")
    ledger = Ledger(folder / "runs", create=True)
    data = folder / "small.npz"
    run([config(data, student="resnet14", seed=9)], ledger, CPU)
    for seed in (0, 1):
        run([config(data, seed=seed)], ledger, CPU)
    run([config(data, method=method, teacher="resnet14") for method in ("fsp", "at+kd")], ledger, CPU)
    run([config(data, method="dml", seed=4)], ledger, CPU)
    run([config(data, method="kd", teacher="1", train={"lr": 0.02, "milestones": [0.4]})], ledger, CPU)
    assert all(one.status == "finished" for one in ledger.runs())
    ledger.close()
    return folder


@pytest.fixture(scope="module", autouse=True)
def _few_passes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_card, "WARM_UP", 1)
        patch.setattr(runner_card, "PASSES", 5)
        yield


@pytest.fixture
def runs(work: Path) -> Iterator[Ledger]:
    ledger = Ledger(work / "runs")
    yield ledger
    ledger.close()


@pytest.fixture(scope="module")
def fsp_card(work: Path) -> Card:
    return measure(4, Ledger(work / "runs"), CPU, batch_size=8)


def test_columns_are_teacher_student_and_student_alone(fsp_card: Card) -> None:
    assert [(column.role, column.model, column.origin) for column in fsp_card.columns] == [
        ("teacher", "resnet14", "run 1, seed 9"),
        ("student", "resnet8", "run 4, seed 0"),
        ("student alone", "resnet8", "run 3, seed 1"),  # the newest
    ]
    assert fsp_card.advice == ""


def test_every_test_image_is_counted_once(fsp_card: Card, work: Path) -> None:
    labels = np.load(work / "small.npz")["y_test"]
    assert fsp_card.images == len(labels) == 150
    assert fsp_card.class_images == tuple((labels == label).sum() for label in range(10))
    for column in fsp_card.columns:
        assert sum(column.score.class_correct) == column.score.correct
        assert all(right <= images for right, images in zip(column.score.class_correct, fsp_card.class_images, strict=True))
        assert column.score.agreement is None or column.score.agreement.images == 150


@pytest.mark.parametrize("no", range(1, 9))
def test_the_students_accuracy_is_the_records(no: int, runs: Ledger) -> None:
    found = measure(no, runs, CPU, batch_size=2)
    assert found.student.score.correct == runs.run(no).correct
    assert "record" not in page(found, "md")
    assert found.student.parameters == runs.run(no).parameters


@pytest.mark.parametrize("split", ["full", "holdout"])
def test_a_student_with_its_teachers_classifier_is_measured_whole(split: str, ledger: Ledger, small_npz: Path) -> None:
    """Under either split, whose images decide the normalisation."""
    run([config(small_npz, student="resnet14", seed=9, split=split), config(small_npz, split=split)], ledger, CPU)
    run([config(small_npz, method="simkd", teacher="resnet14", split=split)], ledger, CPU)
    found = measure(3, ledger, CPU, batch_size=2)
    assert found.student.model == "reused(resnet8,resnet14,2)"
    assert [column.score.correct for column in found.columns] == [ledger.run(no).correct for no in (1, 3, 2)]
    assert found.student.parameters > found.columns[2].parameters


def test_the_others_accuracy_is_their_own_records(fsp_card: Card, runs: Ledger) -> None:
    assert [column.score.correct for column in fsp_card.columns] == [runs.run(no).correct for no in (1, 4, 3)]
    assert 100 * fsp_card.columns[0].score.correct / 150 == pytest.approx(fsp_card.run.teacher_accuracy)


def test_agreement_and_classes_are_those_of_the_recorded_predictions(fsp_card: Card, runs: Ledger, work: Path) -> None:
    labels = np.load(work / "small.npz")["y_test"]
    teacher, student, alone = (np.load(runs.run_folder(no) / "predictions.npz")["classes"].astype(int) for no in (1, 4, 3))
    assert fsp_card.columns[1].score.agreement == agreement(student, teacher, labels)
    assert fsp_card.columns[2].score.agreement == agreement(alone, teacher, labels)
    for column, classes in zip(fsp_card.columns, (teacher, student, alone), strict=True):
        assert column.score.class_correct == tuple(((classes == labels) & (labels == label)).sum() for label in range(10))


def test_calibration_is_that_of_the_recorded_predictions(fsp_card: Card, runs: Ledger, work: Path) -> None:
    found = np.load(runs.run_folder(4) / "predictions.npz")
    correct = found["classes"] == np.load(work / "small.npz")["y_test"]
    assert fsp_card.student.score.calibration_error == pytest.approx(calibration_error(found["probabilities"], correct), abs=1e-6)
    sure = -np.log(found["probabilities"][correct].astype(float)).sum() / 150  # of the images that are right the class is the label
    assert fsp_card.student.score.negative_log_likelihood > sure


def test_sizes_and_latencies(fsp_card: Card, runs: Ledger) -> None:
    for column, no in zip(fsp_card.columns, (1, 4, 3), strict=True):
        assert column.file_bytes == (runs.run_folder(no) / "student.safetensors").stat().st_size > 4 * column.parameters
        assert [latency.batch_size for latency in column.latencies] == [1, 8]
        assert all(0 < latency.median <= latency.p90 and latency.passes == 5 for latency in column.latencies)
    teacher, student, _ = fsp_card.columns
    assert teacher.parameters > student.parameters
    assert teacher.macs > student.macs


def test_batch_1_is_timed_once_and_a_batch_may_be_larger_than_the_test_set(runs: Ledger) -> None:
    assert [latency.batch_size for latency in measure(1, runs, CPU, batch_size=1).student.latencies] == [1]
    assert [latency.batch_size for latency in measure(1, runs, CPU, batch_size=151).student.latencies] == [1, 151]


def test_slow_networks_are_timed_less_often_but_not_less_than_the_least(runs: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_card, "SECONDS", 0.0)
    monkeypatch.setattr(runner_card, "MIN_PASSES", 2)
    assert [latency.passes for latency in measure(1, runs, CPU).student.latencies] == [2, 2]


@pytest.mark.parametrize(("no", "roles"), [(1, ["student"]), (2, ["student"]), (6, ["student", "student alone"])])
def test_without_a_teacher_its_column_and_its_rows_are_left_out(no: int, roles: list[str], runs: Ledger) -> None:
    found = measure(no, runs, CPU, batch_size=2)
    assert [column.role for column in found.columns] == roles
    assert "teacher" not in page(found, "md")


def test_a_student_alone_by_another_recipe_does_not_count_and_the_advice_trains_the_right_one(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work, tmp_path / "copy")
    before = Ledger(tmp_path / "copy" / "runs")
    found = measure(8, before, CPU, batch_size=2)
    assert [column.role for column in found.columns] == ["teacher", "student"]
    words = shlex.split(found.advice.partition("yet: ")[2])
    assert words[:2] == ["flowdistill", "train"]
    said = command(tmp_path, *words[1:])
    assert said.code == 0, said.err
    alone = baseline(before.run(8), before)
    assert alone is not None
    assert (alone.no, alone.seed, alone.config["train"]) == (9, 0, before.run(8).config["train"])
    assert measure(8, before, CPU, batch_size=2).advice == ""


def test_mixed_images_have_no_student_alone(runs: Ledger) -> None:
    kd = runs.run(8)
    mixed = dataclasses.replace(kd, config={**kd.config, "train": {**kd.config["train"], "mixup": True}})
    assert baseline(mixed, runs) is None
    assert "no labels" in runner_card._advice(runner_card.validate(mixed.config), runs)


def test_a_student_alone_whose_file_is_gone_gives_way_to_the_one_before(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "runs", tmp_path / "runs")
    copy = Ledger(tmp_path / "runs")
    (copy.run_folder(3) / "student.safetensors").unlink()
    alone = baseline(copy.run(4), copy)
    assert alone is not None
    assert alone.no == 2


# What is gone


def broken(work: Path, tmp_path: Path) -> Ledger:
    shutil.copytree(work / "runs", tmp_path / "runs")
    return Ledger(tmp_path / "runs")


@pytest.mark.parametrize(("no", "gone"), [(4, 1), (4, 4), (8, 1)])
def test_a_teacher_or_student_that_is_gone_is_told(no: int, gone: int, work: Path, tmp_path: Path) -> None:
    copy = broken(work, tmp_path)
    (copy.run_folder(gone) / "student.safetensors").unlink()
    assert_refused(tmp_path, ["card", str(no)], f"weights file runs/{gone}/student.safetensors: no such file")


def test_data_that_are_gone_or_changed_are_told(small_npz: Path, tmp_path: Path) -> None:
    shutil.copy(small_npz, tmp_path / "mine.npz")
    words = "train --model resnet8 --dataset npz:mine.npz --epochs 1 --batch-size 64 --set data.pad=1"
    assert command(tmp_path, *shlex.split(words)).code == 0
    gc.collect()  # closes the ledger
    (tmp_path / "mine.npz").rename(tmp_path / "moved.npz")
    assert_refused(tmp_path, ["card", "1"], "npz:mine.npz: no such file")
    arrays = dict(np.load(tmp_path / "moved.npz"))
    arrays["x_test"][0] ^= 1
    np.savez(tmp_path / "mine.npz", **arrays)
    said = command(tmp_path, "card", "1")
    assert said.code == 2
    line = r"flowdistill: run 1: npz:mine\.npz is not the data that it was trained on \(hash \w{8}, was \w{8}\); put the old data back\n"
    assert re.fullmatch(line, said.err)


def test_a_teachers_file_that_changed_is_told(work: Path, tmp_path: Path, small_npz: Path) -> None:
    shutil.copy(work / "runs" / "1" / "student.safetensors", tmp_path / "t.safetensors")
    ledger = Ledger(tmp_path / "runs", create=True)
    run([config(small_npz, method="kd", teacher=str(tmp_path / "t.safetensors"))], ledger, CPU)
    found = measure(1, ledger, CPU, batch_size=2)
    assert found.columns[0].origin == str(tmp_path / "t.safetensors")
    assert found.columns[0].file_bytes == (tmp_path / "t.safetensors").stat().st_size
    shutil.copy(work / "runs" / "2" / "student.safetensors", tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"its teacher .*t\.safetensors is not the one that it learned from; put the old one back, or take"):
        measure(1, ledger, CPU)


def test_a_teacher_that_is_one_of_several_in_a_file(work: Path, tmp_path: Path, small_npz: Path) -> None:
    """Its names are those of a wrapper: it is the same teacher when the card asks again."""
    teacher = {f"module.{name}": value for name, value in load_weights(work / "runs" / "1" / "student.safetensors")[0].items()}
    torch.save({"model": teacher, "ema": {name: value + 1 for name, value in teacher.items()}}, tmp_path / "t.ckpt")
    ledger = Ledger(tmp_path / "runs", create=True)
    run([config(small_npz, method="kd", teacher=f"resnet14@{tmp_path}/t.ckpt#model")], ledger, CPU)
    found = measure(1, ledger, CPU, batch_size=2)
    assert found.columns[0].origin == f"{tmp_path}/t.ckpt#model"
    assert found.columns[0].file_bytes == (tmp_path / "t.ckpt").stat().st_size


# The page


class Page(HTMLParser):
    """Rows of cells, what is referred to, and whether every tag was closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| --")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_html_is_whole_needs_nothing_else_and_says_what_markdown_says(fsp_card: Card) -> None:
    text = page(fsp_card, "html")
    found = Page(text)
    assert found.open == []
    assert found.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert found.attributes.isdisjoint({"src", "href"})
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert found.rows == markdown_rows(page(fsp_card, "md"))


def test_the_page_shows_each_figure_in_its_place(fsp_card: Card) -> None:
    rows = {row[0]: row[1:] for row in markdown_rows(page(fsp_card, "md").split("## Confusions")[0])}
    for place, column in enumerate(fsp_card.columns):
        assert rows["measure"][place] == column.role
        assert rows["parameters"][place] == f"{column.parameters:,}"
        assert rows["accuracy"][place] == f"{100 * column.score.correct / 150:.2f} % ({column.score.correct} of 150)"
        for latency in column.latencies:
            assert rows[f"latency at batch {latency.batch_size}, ms"][place] == f"{latency.median:.2f} ({latency.p90:.2f})"
    teacher, student, alone = fsp_card.columns
    for label, images in enumerate(fsp_card.class_images):
        to_teacher, to_alone = (
            100 * (student.score.class_correct[label] - other.score.class_correct[label]) / images for other in (teacher, alone)
        )
        assert rows[str(label)][-2:] == [f"{to_teacher:+.2f}", f"{to_alone:+.2f}"]


def test_the_page_says_what_it_measured_with(fsp_card: Card) -> None:
    text = page(fsp_card, "md")
    for words in ("eager fp32", "cpu (1 threads)", "5 at batch 1, 5 at batch 8", "flop_counter", "15 bins", "all 150 test images"):
        assert words in text


@pytest.mark.parametrize(("p90", "unsteady"), [(2.0, False), (2.01, True)])
def test_unsteady_latency_is_said(fsp_card: Card, p90: float, unsteady: bool) -> None:
    columns = [dataclasses.replace(column, latencies=(runner_card.Latency(1, 1.0, 1.5, 5),)) for column in fsp_card.columns]
    columns[1] = dataclasses.replace(columns[1], latencies=(runner_card.Latency(1, 1.0, p90, 5),))
    assert ("Unsteady latency" in page(dataclasses.replace(fsp_card, columns=tuple(columns)), "md")) == unsteady


def test_a_class_without_test_images_has_no_share(fsp_card: Card) -> None:
    none = dataclasses.replace(fsp_card, class_images=(0, *fsp_card.class_images[1:]))
    assert ["0", "0", "-", "-", "-", "-", "-"] in markdown_rows(page(none, "md"))


def test_classes_have_their_names(fsp_card: Card) -> None:
    assert fsp_card.class_names == tuple("0123456789")
    named = dataclasses.replace(fsp_card, class_names=("<b>", *(f"bird {number}" for number in range(1, 10))))
    assert [row[0] for row in markdown_rows(page(named, "md"))][-9:] == [f"bird {number}" for number in range(1, 10)]
    html = Page(page(named, "html"))
    assert [row[0] for row in html.rows][-10:] == ["<b>", *(f"bird {number}" for number in range(1, 10))]
    assert "b" not in html.tags


def test_names_are_escaped(fsp_card: Card) -> None:
    hostile = dataclasses.replace(fsp_card, run=dataclasses.replace(fsp_card.run, dataset="<script>alert(1)</script>"))
    assert "script" not in Page(page(hostile, "html")).tags


def test_another_count_than_the_records_is_said(fsp_card: Card) -> None:
    other = dataclasses.replace(fsp_card, run=dataclasses.replace(fsp_card.run, correct=0))
    assert "The record of run 4 says 0 right" in page(other, "md")


def test_the_command_prints_or_writes_the_page(work: Path, tmp_path: Path) -> None:
    runs = ("--runs", str(work / "runs"), "--batch-size", "2", "--device", "cpu")
    printed = command(tmp_path, "card", "4", *runs)
    assert (printed.code, printed.err) == (0, "")
    assert printed.out.startswith("# Compression card: run 4, fsp ResNet14>>8 on small\n")
    written = command(tmp_path, "card", "4", *runs, "--format", "html", "--out", "new/card.html")
    assert (written.code, written.out, written.err) == (0, "", "")
    assert Page((tmp_path / "new" / "card.html").read_text()).open == []
    assert json.loads(command(tmp_path, "runs", "--format", "json", *runs[:2]).out)[-1]["no"] == 8
