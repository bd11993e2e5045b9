"""The reference log by one command, small: the document, its figures, what is skipped, what is refused."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.command import Said, command
from helpers.fsp_log import LOG, accuracies, section
from helpers.rows import run
from PIL import Image

from flowdistill import models
from flowdistill import reproduce as study
from flowdistill.checks import UserError
from flowdistill.ledger import Ledger, Run
from flowdistill.methods.fsp import FSP
from flowdistill.report import fsp_log, matrices, tables
from flowdistill.report.reference import SETTINGS
from flowdistill.report.study import head, shortened
from flowdistill.reproduce import Order, choose, settings
from flowdistill.stats import welch
from flowdistill.types import DataSpec

SECTIONS = [
    "# The FSP reference log, reproduced",
    "## The method",
    "## The reference beside ours",
    "## FSP against AT",
    "## The log: FSP students",
    "## The log: AT students and baselines",
    "## The matrix",
    "## Departures from the reference",
    "## Reference",
]
SETTING = SETTINGS[0]


def words(data: Path) -> tuple[str, ...]:
    return ("reproduce", "fsp-log", "--cifar10", f"npz:{data}", "--only", "resnet20-cifar10", "--epochs", "1", "--limit-train", "150")


class Done:
    """A folder in which the short study ran once."""

    def __init__(self, folder: Path, said: Said) -> None:
        self.folder, self.said = folder, said
        self.document = folder / "runs" / "fsp-log" / "fsp-log.md"
        self.text = self.document.read_text()
        self.runs = Ledger(folder / "runs").runs()


@pytest.fixture(scope="module")
def done(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("study")
    said = command(folder, *words(small_npz))
    assert said.code == 0, said.err
    return Done(folder, said)


# The smoke version


def test_stdout_is_the_path_and_the_time_is_told_before_training(done: Done) -> None:
    assert done.said.out == "runs/fsp-log/fsp-log.md\n"
    told = done.said.err
    clock = r"\d:\d\d:\d\d by eager engine, fp32"
    assert re.match(rf"resnet20-cifar10: about {clock}\nall: about {clock} \(h:mm:ss\) on cpu \(1 threads\), measured", told)
    assert told.index("all: about") < told.index("run 1: base")


def test_two_baselines_then_three_students_of_each_method(done: Done) -> None:
    assert [(one.method, one.seed) for one in done.runs] == [
        *(("base", seed) for seed in range(2)),
        *((method, seed) for method in ("fsp", "at") for seed in range(3)),
    ]
    assert {(one.status, one.student, one.nepoch, one.config["data"]["limit_train"]) for one in done.runs} == {
        ("finished", "resnet20", 1, 150)
    }
    assert {one.cohort_size for one in done.runs[2:]} == {6}


def test_the_loss_is_the_logs(done: Done) -> None:
    fsp = next(one for one in done.runs if one.method == "fsp")
    assert (fsp.variant, fsp.config["weights"]) == ("log", {"task": 1.0, "fsp": 1 / 3})
    assert next(one for one in done.runs if one.method == "at").variant == ""


def test_no_student_began_where_its_teacher_began(done: Done) -> None:
    teachers = {one.no: one for one in done.runs if one.method == "base"}
    students = [one for one in done.runs if one.method != "base"]
    assert [teachers[one.teacher_run or 0].seed for one in students] == [1, 0, 1] * 2
    assert all(one.init_hash != teachers[one.teacher_run or 0].init_hash for one in students)


def test_the_document_has_every_section_in_order(done: Done) -> None:
    fenced = re.sub(r"```.*?```", "", done.text, flags=re.DOTALL)
    assert [line for line in fenced.splitlines() if re.match("##? ", line)] == SECTIONS
    assert done.text.isascii()
    assert "def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:" in done.text
    assert "@inproceedings{yim2017gift," in done.text


def test_the_head_says_with_what_and_that_it_is_short(done: Done) -> None:
    head = done.text.split("\n## ")[0]
    assert f"torch {done.runs[0].versions['torch']}" in head
    assert "on cpu (1 threads)" in head
    assert "- **A short run (1 of 200 epochs, about 150 training images): not comparable to the reference.**" in head
    assert "- In place of cifar10: small." in head
    assert "- Not here yet: resnet20-cifar100, resnet110-cifar10, resnet110-cifar100." in head


def test_the_tables_are_the_ledgers(done: Done) -> None:
    for title, methods in {SECTIONS[4]: ("fsp",), SECTIONS[5]: ("at", "base")}.items():
        text = section(done.text, title)
        for method in methods:
            own = [one for one in done.runs if one.method == method]
            by_best, by_last = (tables.log_table(own, protocol, "md") for protocol in ("best", "last"))
            assert 0 <= text.index(by_best) < text.index(by_last)
        assert text.count("### ") == 2 * len(methods)
    heading = f"### ResNet20>>20/Small ({statistics.fmean(accuracies(done.runs, 'fsp')):.1f})"
    assert section(done.text, SECTIONS[4]).strip().startswith(heading)
    assert f"Taught: run 3 by 2 ({done.runs[1].accuracy:.2f} %), 4 by 1 ({done.runs[0].accuracy:.2f} %)" in done.text


def test_the_figures_beside_the_references_are_the_ledgers(done: Done) -> None:
    text = section(done.text, "## The reference beside ours")
    base, at, fsp = (accuracies(done.runs, method) for method in ("base", "at", "fsp"))
    assert f"| ResNet20 | small | base | 92.0 | {statistics.fmean(base):.2f} (2) | {base[0]:.2f} {base[1]:.2f} (2) | 1 |" in text
    for name, theirs, ours in (("at", "91.9", at), ("fsp", "92.0", fsp)):
        mean = f"{statistics.fmean(ours):.2f}"
        assert f"| ResNet20>>20 | small | {name} | {theirs} | {mean} (3) | {mean} +- {statistics.stdev(ours):.2f} (3) | 1 |" in text
    difference = welch(fsp, at)
    assert difference is not None
    compared = f"FSP less AT is {difference.value:+.2f} points ({difference.low:+.2f} to {difference.high:+.2f}, n = 3 and 3)"
    assert compared in section(done.text, "## FSP against AT")


def test_the_picture_is_a_png_of_a_sensible_size(done: Done) -> None:
    assert "](matrices.png)" in section(done.text, "## The matrix")
    with Image.open(done.document.parent / "matrices.png") as picture:
        picture.verify()
    with Image.open(done.document.parent / "matrices.png") as picture:
        assert picture.format == "PNG"
        assert all(1000 < side < 3000 for side in picture.size)
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_a_second_call_trains_nothing_and_writes_the_document_again(done: Done, small_npz: Path) -> None:
    done.document.unlink()
    said = command(done.folder, *words(small_npz))
    assert (said.code, said.out) == (0, "runs/fsp-log/fsp-log.md\n")
    assert said.err.startswith("resnet20-cifar10: about 0:00:00\nall: about 0:00:00 ")
    assert said.err.count("has it already, skipped") == 8
    assert done.document.read_text() == done.text
    assert Ledger(done.folder / "runs").runs() == done.runs


def test_a_dry_run_prints_plan_and_time_and_writes_nothing(small_npz: Path, tmp_path: Path) -> None:
    said = command(tmp_path, *words(small_npz), "--dry-run", "--device", "cpu")
    assert (said.code, list(tmp_path.iterdir())) == (0, [])
    header, *rows = [line.split() for line in said.out.splitlines()]
    assert header == ["setting", "method", "student", "teacher", "dataset", "seeds", "epochs"]
    assert [row[:4] + row[5:] for row in rows] == [
        ["resnet20-cifar10", "base", "resnet20", "-", "0,1", "1"],
        ["resnet20-cifar10", "fsp", "resnet20", "resnet20", "0,1,2", "1"],
        ["resnet20-cifar10", "at", "resnet20", "resnet20", "0,1,2", "1"],
    ]
    assert re.search(r"all: about 0:00:0\d by eager engine, fp32 \(h:mm:ss\) on cpu", said.err)
    assert "run 1" not in said.err


# What is chosen and refused


def test_the_settings_stand_in_the_logs_order_whatever_only_says() -> None:
    assert settings(choose("fsp-log"), None) == SETTINGS
    chosen = settings(choose("fsp-log"), "resnet110-cifar10, resnet20-cifar100")
    assert [one.name for one in chosen] == ["resnet20-cifar100", "resnet110-cifar10"]


# The document


def test_the_references_figures_are_those_of_its_twelve_runs() -> None:
    for setting in SETTINGS:
        accuracies_, _ = LOG[setting.model, setting.data]
        assert list(setting.runs["fsp"]) == list(accuracies_)


def recorded(fsp: Sequence[int], at: Sequence[int], **changes: object) -> list[Run]:
    pairs = [("fsp", seed, right) for seed, right in enumerate(fsp)] + [("at", seed, right) for seed, right in enumerate(at)]
    return [run(no, method=method, seed=seed, correct=right, **changes) for no, (method, seed, right) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    ("fsp", "at", "verdict"),
    [
        ([9250, 9255, 9260], [9150, 9155, 9160], "FSP less AT is +1.00 points (+0.89 to +1.11, n = 3 and 3): above AT."),
        ([9150, 9155, 9160], [9250, 9255, 9260], "FSP less AT is -1.00 points (-1.11 to -0.89, n = 3 and 3): below AT."),
        ([9200, 9250, 9300], [9190, 9240, 9290], "(-1.03 to +1.23, n = 3 and 3): not distinguishable from AT."),
        ([9200, 9250], [9190, 9240, 9290], "FSP 92.00 92.50, AT 91.90 92.40 92.90: fewer than 3 runs a side, so no verdict."),
        ([9200], [], "FSP 92.00, AT none: fewer than 3 runs a side, so no verdict."),
    ],
)
def test_the_verdict_is_the_intervals(fsp: Sequence[int], at: Sequence[int], verdict: str) -> None:
    said = fsp_log.verdict(SETTING, recorded(fsp, at))
    assert verdict in said
    assert said.startswith("resnet20-cifar10: FSP")
    assert said.endswith("The reference: +0.1 (92.0 and 91.9, best epoch).")


def test_a_full_run_is_not_called_short() -> None:
    assert shortened(recorded([9200], [9200])) == []
    (limited,) = shortened(recorded([9200], [], config={"data": {"limit_train": 5000}}))
    assert limited == "**A short run (about 5,000 training images): not comparable to the reference.**"


def test_teachers_that_are_not_the_baselines_are_named() -> None:
    made = {"versions": {"flowdistill": "0.1.0", "torch": "2.9.0"}}
    base = [run(no, method="base", seed=no, **made) for no in (5, 6)]
    own, other = (run(no, seed=no, teacher_run=teacher, **made) for no, teacher in ((7, 6), (8, 2)))
    assert "Teachers other" not in head({SETTING: [*base, own]}, [])
    assert "- Teachers other than the baselines here: run 2." in head({SETTING: [*base, own, other]}, [])


def test_the_matrices_are_those_of_the_loss() -> None:
    spec = DataSpec("some", 1, 10, 3, 16, 16)
    fsp = FSP({"preset": "log"}, student=models.spec("resnet8", spec), teacher=models.spec("resnet8", spec))
    nets = [models.build("resnet8", spec, taps=tuple(fsp.needs.student), seed=seed).eval() for seed in (0, 1)]
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = (matrices._matrices(net(image).maps, fsp) for net in nets)
    assert [tuple(matrix.shape) for matrix in ours] == [(16, 16), (16, 32), (32, 64)]
    squares = [float((a - b).square().mean()) for a, b in zip(ours, theirs, strict=True)]
    with torch.no_grad():
        loss = float(fsp(nets[0](image), nets[1](image))["fsp"])
    assert statistics.fmean(squares) == pytest.approx(loss, rel=1e-5)


# What fails


@pytest.fixture
def order(small_npz: Path) -> Order:
    return Order(fsp_log.STUDY, SETTINGS[:1], fsp_log.STUDY.rows, {"cifar10": f"npz:{small_npz}"}, train={"epochs": 1})


def test_without_its_teachers_a_setting_has_no_students(order: Order, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def diverge(configs: Sequence[object], *_: object, **__: object) -> list[Run]:
        asked.append(len(configs))
        return [run(no, method="base", status="failed", error="diverged in epoch 1") for no, _ in enumerate(configs, 1)]

    monkeypatch.setattr(study, "run", diverge)
    document, sound = study.reproduce(order, ledger, torch.device("cpu"), ledger.folder / "fsp-log", "flowdistill")
    assert (asked, sound) == ([2], False)
    text = document.read_text()
    assert "- Failed: run 1 (base resnet20 seed 0): diverged in epoch 1." in text
    assert "- Not here yet: resnet20-cifar10, " in text
    assert "No run has finished." in text
    assert "No picture" in text


def test_what_was_cut_off_is_gone_on_with(order: Order, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cpu = ledger.folder / "fsp-log", torch.device("cpu")

    def interrupt(bars: study.Bars, line: str) -> None:
        if len(ledger.runs()) == 8 and line.startswith("epoch 1/2"):
            raise KeyboardInterrupt

    order = dataclasses.replace(order, limit_train=150, train={"epochs": 2})
    with monkeypatch.context() as patch:
        patch.setattr(study.Bars, "epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study.reproduce(order, ledger, cpu, folder, "flowdistill")
    assert [one.status for one in ledger.runs()] == ["finished"] * 2 + ["interrupted"] * 6
    assert not folder.exists()
    document, sound = study.reproduce(order, ledger, cpu, folder, "flowdistill")
    assert [one.status for one in ledger.runs()] == ["finished"] * 8
    assert sound
    assert "2 of 200 epochs" in document.read_text()


def test_a_study_that_can_not_be_planned_is_refused_before_training(small_npz: Path, ledger: Ledger) -> None:
    sources = {"cifar10": f"npz:{small_npz}", "cifar100": "npz:none.npz"}
    order = Order(fsp_log.STUDY, SETTINGS[:2], fsp_log.STUDY.rows, sources, train={"epochs": 1})
    with pytest.raises(UserError, match="no such file"):
        study.tell_time(order, ledger, torch.device("cpu"))
    assert not ledger.folder.exists()
