"""The study of all six pages, small: rows by parts, what the document says of them, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.command import command
from helpers.fsp_log import accuracies, section
from helpers.rows import run

from flowdistill import reproduce as study
from flowdistill.checks import UserError
from flowdistill.config import TrainConfig
from flowdistill.ledger import Ledger, Run
from flowdistill.methods import METHODS
from flowdistill.report import log
from flowdistill.report.reference import PAGES, SETTINGS
from flowdistill.report.study import beside, head, shortened
from flowdistill.reproduce import Order, by_recipe, choose, refuse_own_teachers, rows
from flowdistill.stats import interval, welch

FIRST = SETTINGS[:1]
BESIDE = "## The reference beside ours"
MEANS = {  # as the reference's README prints them: C10 R20, C100 R20, C10 R110, C100 R110
    "base": (92.0, 67.6, 92.5, 71.6),
    "logits": (92.5, 69.2, 94.2, 71.8),
    "kd": (92.8, 69.9, 93.9, 74.1),
    "at": (91.9, 68.4, 93.3, 72.6),
    "at+kd": (92.6, 68.7, 93.7, 73.7),
    "fsp": (92.0, 68.0, 92.7, 72.8),
}
TWO_RUNS = {("kd", "resnet110-cifar10"), ("kd", "resnet110-cifar100"), ("at+kd", "resnet110-cifar10")}


def words(data: Path, *more: str) -> tuple[str, ...]:
    short = ("--only", "resnet20-cifar10", "--epochs", "1", "--limit-train", "150")
    return ("reproduce", "log", "--cifar10", f"npz:{data}", *short, *more)


class Done(NamedTuple):
    """A folder in which the short study ran in three parts, and the document after each."""

    folder: Path
    texts: list[str]
    runs: list[Run]

    @property
    def text(self) -> str:
        return self.texts[-1]


@pytest.fixture(scope="module")
def done(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder, texts = tmp_path_factory.mktemp("study"), []
    other = ("distill", "--method", "kd,ls:kd", "--set", "options.kd.T=2", "--student", "resnet20", "--teacher", "resnet20", "--seeds", "0")
    short = ("--dataset", f"npz:{small_npz}", "--epochs", "1", "--set", "data.limit_train=150")
    for part in (words(small_npz, "--methods", "fsp"), (*other, *short), words(small_npz, "--methods", "kd+fsp,kd"), words(small_npz)):
        said = command(folder, *part)
        assert said.code == 0, said.err
        if part[0] == "reproduce":
            assert said.out == "runs/log/log.md\n"
            texts.append((folder / "runs" / "log" / "log.md").read_text())
    return Done(folder, texts, [one for one in Ledger(folder / "runs").runs() if one.variant != "T=2"])


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the first table of a section, without its head."""
    lines = [line for line in section(text, title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


# Which runs


def test_parts_of_the_study_train_each_run_once(done: Done) -> None:
    trained = [(one.method, one.seed) for one in done.runs if one.method != "ls:kd"]
    asked = [("base", (0, 1)), ("fsp", (0, 1, 2)), ("kd", (0, 1, 2)), ("fsp+kd", (0, 1, 2))]
    asked += [(method, (0, 1, 2)) for method in ("logits", "at", "at+kd")]
    assert trained == [(method, seed) for method, seeds in asked for seed in seeds]
    assert {one.cohort_size for one in done.runs if one.method in ("logits", "at", "at+kd")} == {9}


def test_each_row_is_what_the_reference_computed(done: Done) -> None:
    found = {one.method: (one.config["weights"], one.config["options"]) for one in done.runs}
    assert found["base"] == ({"task": 1.0}, {"base": {}})
    assert found["logits"] == ({"task": 1.0, "logits": 1.0}, {"logits": {"on": "embedding"}})
    assert found["kd"] == ({"task": 1.0, "kd": 1.0}, {"kd": {"T": 4.0}})
    assert found["at"] == ({"task": 1.0, "at": 1000.0}, {"at": {"mode": "code"}})
    assert found["at+kd"] == ({"task": 1.0, "at": 1000.0, "kd": 0.9}, {"at": {"mode": "code"}, "kd": {"T": 4.0}})
    assert found["fsp"][0] == {"task": 1.0, "fsp": 1 / 3}
    assert found["fsp+kd"][0] == {"task": 1.0, "fsp": 1 / 3, "kd": 1.0}
    assert all(found[method][1]["fsp"]["preset"] == "log" for method in ("fsp", "fsp+kd"))


def test_without_anything_to_train_the_document_is_written_from_the_ledger(done: Done, small_npz: Path) -> None:
    before = Ledger(done.folder / "runs").count()
    for part in (("--methods", "base"), ("--methods", "kd", "--seeds", "0", "--baselines", "1")):
        assert command(done.folder, *words(small_npz, *part)).code == 0
        assert cells((done.folder / "runs" / "log" / "log.md").read_text(), BESIDE) == cells(done.text, BESIDE)
    assert Ledger(done.folder / "runs").count() == before


def test_a_third_baseline_teaches_nobody_anew_and_gives_its_row_an_interval(done: Done, small_npz: Path) -> None:
    third = ("train", "--model", "resnet20", "--seeds", "2", "--dataset", f"npz:{small_npz}", "--epochs", "1")
    assert command(done.folder, *third, "--set", "data.limit_train=150").code == 0
    before = Ledger(done.folder / "runs").count()
    assert command(done.folder, *words(small_npz)).code == 0
    assert Ledger(done.folder / "runs").count() == before
    now, then = (cells(text, BESIDE) for text in ((done.folder / "runs" / "log" / "log.md").read_text(), done.text))
    assert now[1:] == then[1:]
    assert re.fullmatch(r"\S+ \+- \S+ \(3\)", now[0][5])


def test_a_dry_run_names_the_rows_and_writes_nothing(small_npz: Path, tmp_path: Path) -> None:
    said = command(tmp_path, *words(small_npz, "--methods", "fsp,kd", "--seeds", "4", "--baselines", "1-2", "--dry-run", "--recipe", "crd"))
    assert (said.code, list(tmp_path.iterdir())) == (0, [])
    assert [line.split()[1::2] for line in said.out.splitlines()[1:]] == [
        ["base", "-", "1,2"],
        ["kd", "resnet20", "4"],
        ["fsp", "resnet20", "4"],
    ]


def test_what_was_cut_off_is_gone_on_with_whatever_rows_came_between(
    small_npz: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, folder = torch.device("cpu"), ledger.folder / "log"
    short = {"train": {"epochs": 2}, "limit_train": 150, "seeds": (0,), "baselines": (1,)}
    order = Order(log.STUDY, FIRST, ("fsp",), {"cifar10": f"npz:{small_npz}"}, **short)

    def interrupt(bars: study.Bars, line: str) -> None:
        if len(ledger.runs()) == 2 and line.startswith("epoch 1/2"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study.Bars, "epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study.reproduce(order, ledger, cpu, folder, "flowdistill")
    assert not folder.exists()
    document, sound = study.reproduce(dataclasses.replace(order, rows=("kd",)), ledger, cpu, folder, "flowdistill")
    assert sound
    assert [(one.method, one.status) for one in ledger.runs()] == [("base", "finished"), ("fsp", "interrupted"), ("kd", "finished")]
    assert [row[2] for row in cells(document.read_text(), BESIDE)] == ["base", "kd"]
    study.reproduce(dataclasses.replace(order, rows=("kd", "fsp")), ledger, cpu, folder, "flowdistill")
    assert [(one.method, one.status, one.resumed) for one in ledger.runs()][1:] == [("fsp", "finished", 1), ("kd", "finished", 0)]
    assert [row[2] for row in cells(document.read_text(), BESIDE)] == ["base", "kd", "fsp"]
    assert "none (n = 1 and 1)" in document.read_text()


# The document


def test_the_document_has_every_section_and_the_rows_of_the_ledger(done: Done) -> None:
    assert re.findall(r"^##? .*", done.text, re.MULTILINE) == [
        "# The reference log, reproduced",
        "## The rows",
        "## The reference beside ours",
        "## Which rows can be told apart",
        "## The reference's single runs",
        "## The log",
        "## Departures from the reference",
        "## Reference",
    ]
    assert done.text.isascii()
    shown = [[row[2] for row in cells(text, BESIDE)] for text in done.texts]
    assert shown == [["base", "fsp"], ["base", "kd", "fsp", "ls:kd", "fsp+kd"], [*PAGES, "ls:kd", "fsp+kd"]]
    assert [row[0] for row in cells(done.text, "## The rows")] == shown[-1]
    asked = "`flowdistill reproduce log --only resnet20-cifar10 --methods kd+fsp,kd --cifar10 npz:"
    assert asked in done.texts[1]
    assert done.text.count("| no | method |") == 2 * len(shown[-1])


def test_the_figures_are_the_ledgers_beside_the_references(done: Done) -> None:
    teachers = {one.no: one for one in done.runs if one.method == "base"}
    for _, _, method, reference, best, last, reach, seconds, teacher, nepoch in cells(done.text, BESIDE):
        own = [one for one in done.runs if one.method == method]
        values = accuracies(own, method)
        assert reference == (f"{MEANS[method][0]:.1f} (3)" if method in MEANS else "-")
        assert best == f"{statistics.fmean(values):.2f} ({len(values)})", "one epoch is the best"
        expected = interval(values)
        assert reach == (f"{expected[0]:.2f} to {expected[1]:.2f}" if expected else "-")
        whole = (
            f"{statistics.fmean(values):.2f} +- {statistics.stdev(values):.2f}" if len(values) > 2 else " ".join(f"{v:.2f}" for v in values)
        )
        assert (last, nepoch) == (f"{whole} ({len(values)})", "1")
        spent = [(one.train_seconds or 0) + (one.eval_seconds or 0) for one in own]
        assert seconds == f"{statistics.fmean(spent):.0f}"
        assert (teacher == "-") == (not any(one.teacher_run for one in own))
    assert all(one.teacher_run in teachers for one in done.runs if one.method != "base")


def test_the_seconds_of_a_row_are_means_and_the_teachers_stand_beside() -> None:
    spent = {"train_seconds": 1000.0, "eval_seconds": 240.0}
    taught = [run(no, method="kd", seed=no, teacher_run=1, train_seconds=2000.0 + no, eval_seconds=10.0) for no in (2, 3, 4)]

    class One:
        def run(self, no: int) -> Run:
            return run(no, method="base", **spent)

    (base, kd) = beside({FIRST[0]: [run(1, method="base", **spent), *taught]}, PAGES, One())  # type: ignore[arg-type]
    assert (base["seconds"], base["its teacher's"]) == ("1,240", "-")
    assert (kd["seconds"], kd["its teacher's"]) == ("2,013", "1,240")


def test_every_pair_of_rows_is_compared_on_both_sides(done: Done) -> None:
    found = {row[0]: row[1:] for row in cells(done.text, "## Which rows can be told apart")}
    assert list(found) == [f"{second} less {first}" for first, second in itertools.combinations([*PAGES, "ls:kd", "fsp+kd"], 2)]
    assert found["kd less base"][:3] == ["+0.84", "+0.53 to +1.16", "above"]  # by hand: 92.8085 less 91.9638, s 0.1513 and 0.1139
    assert found["fsp less at"][:3] == ["+0.13", "-0.34 to +0.61", "not apart"]
    assert found["at less kd"][2] == "below"
    assert found["fsp+kd less at"][:3] == ["-", "-", "-"]
    fsp, at = (accuracies(done.runs, method) for method in ("fsp", "at"))
    difference = welch(fsp, at)
    assert difference is not None
    assert found["fsp less at"][3:5] == [f"{difference.value:+.2f}", f"{difference.low:+.2f} to {difference.high:+.2f}"]
    assert found["fsp less base"][4:] == ["-", "none (n = 3 and 2)"]
    early = {row[0]: row[4:] for row in cells(done.texts[0], "## Which rows can be told apart")}
    assert early["kd less base"] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("values", "others", "said"),
    [
        ([92.5, 92.6, 92.7], [91.5, 91.6, 91.7], ("+1.00", "+0.77 to +1.23", "above")),
        ([91.5, 91.6, 91.7], [92.5, 92.6, 92.7], ("-1.00", "-1.23 to -0.77", "below")),
        ([92.0, 92.5, 93.0], [91.9, 92.4, 92.9], ("+0.10", "-1.03 to +1.23", "not apart")),
        ([92.0, 92.5], [91.9, 92.4, 92.9], ("-0.15", "-", "none (n = 2 and 3)")),
        ([], [91.9, 92.4, 92.9], ("-", "-", "-")),
    ],
)
def test_the_verdict_is_the_intervals(values: Sequence[float], others: Sequence[float], said: tuple[str, str, str]) -> None:
    assert log.compared(values, others) == said


def test_what_the_reference_says_of_fsp() -> None:
    said = [log._fsp(setting).removeprefix("By the reference's runs FSP is ") for setting in SETTINGS]
    assert [re.sub(r", and one took.*", ".", line) for line in said] == [
        "below kd, below at+kd; not told apart from base, logits, at. Its three FSP runs lie 0.4 points apart.",
        "above base, below logits, below kd, below at+kd; not told apart from at. Its three FSP runs lie 0.2 points apart.",
        "apart from nothing; not told apart from base, logits, at; without a verdict beside kd, at+kd (2 runs). Its three FSP runs lie "
        "1.3 points apart.",
        "apart from nothing; not told apart from base, logits, at, at+kd; without a verdict beside kd (2 runs). Its three FSP runs lie "
        "1.5 points apart.",
    ]
    assert said[0].endswith("and one took about 48 minutes on its GPU.")


def test_the_references_single_runs_have_the_means_that_it_prints() -> None:
    for at, setting in enumerate(SETTINGS):
        assert tuple(setting.runs) == PAGES
        assert {method: setting.figure(method) for method in PAGES} == {method: means[at] for method, means in MEANS.items()}
        assert {(method, setting.name) for method in PAGES if len(setting.runs[method]) != 3} <= TWO_RUNS
    assert sum(len(values) for setting in SETTINGS for values in setting.runs.values()) == 72 - len(TWO_RUNS)


def test_another_recipe_is_told_with_what_it_changes() -> None:
    made = {"versions": {"flowdistill": "0.1.0", "torch": "2.9.0"}}
    usual, short = (run(1, method="base", **made, **more) for more in ({}, {"nepoch": 48, "config": {"train": {"nesterov": True}}}))
    assert "recipe" not in head({FIRST[0]: [usual]}, [])
    assert "- Not by the reference's recipe: nesterov=True." in head({FIRST[0]: [short]}, [])
    (line,) = shortened([short])
    assert line.startswith("**A short run (48 of 200 epochs): the reference's figures are a goal here")


# What is chosen and refused


def test_rows_stand_in_the_documents_order() -> None:
    six = choose("log")
    assert rows(six, None) == PAGES[1:] == ("logits", "kd", "at", "at+kd", "fsp")
    assert rows(six, "base, fsp+kd,fsp, kd+at,kd") == ("kd", "at+kd", "fsp", "fsp+kd")
    assert rows(six, "base") == ()
    assert rows(choose("fsp-log"), None) == ("fsp", "at")


def test_a_page_whose_method_can_not_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", {name: METHODS[name] for name in METHODS if name != "logits"})
    with pytest.raises(UserError, match="unknown method 'logits': "):
        rows(choose("log"), None)
    assert rows(choose("log"), "fsp,kd") == ("kd", "fsp")


def test_a_recipe_stands_below_what_is_given_and_what_the_reference_computed() -> None:
    order = Order(log.STUDY, FIRST, ("kd", "at+kd", "fsp"), {"cifar10": "npz:x.npz"}, train={"epochs": 3}, recipe=by_recipe("crd", FIRST))
    configs = order.teachers(FIRST[0]) + order.students(FIRST[0])
    assert len(configs) == 2 + 9
    assert {(one.train.epochs, one.train.lr, one.train.batch_size, one.train.weight_decay) for one in configs} == {(3, 0.05, 64, 5e-4)}
    assert configs[5].weights == {"kd": 0.9}
    assert configs[-1].options == {"fsp": {"preset": "log"}}
    assert {one.data.limit_train for one in dataclasses.replace(order, recipe=by_recipe("smoke", FIRST)).students(FIRST[0])} == {2000}
    plain = dataclasses.replace(order, recipe=by_recipe(None, FIRST), train=None)
    assert plain.students(FIRST[0])[0].train == TrainConfig()
    assert dataclasses.replace(plain, recipe=by_recipe("fsp-log", FIRST)).students(FIRST[0]) == plain.students(FIRST[0])


def test_a_student_needs_a_teacher_that_began_elsewhere() -> None:
    refuse_own_teachers((0, 1, 2), (0, 1))
    refuse_own_teachers((0,), (1,))
    for seeds, baselines in (((0, 1), (1,)), ((3,), (3,))):
        with pytest.raises(UserError, match=f"the student of seed {seeds[-1]} would have no teacher but the one"):
            refuse_own_teachers(seeds, baselines)
