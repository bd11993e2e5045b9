"""The time-to-accuracy board, and the file that a ledger's results travel in."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Said, as_shell_reads, assert_refused, command
from helpers.rows import row

from flowdistill.checks import UserError
from flowdistill.ledger import Epoch, Ledger, exported
from flowdistill.report import board
from flowdistill.stats import interval

SHORT = ("--epochs", "2", "--batch-size", "64", "--set", "data.pad=1", "--precision", "fp32")
TEACHER, STUDENT, LONGER = 1, 2, 5


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """A teacher, three fsp students of its, and one that was trained longer; rows that no training filled, with their curves."""
    rows = [row(method="base", nepoch=2, seed=100, correct=9050, train_seconds=300.0, eval_seconds=20.0, setup_seconds=10.0)]
    for seed, correct in enumerate((9200, 9210, 9220)):
        made = {"flowdistill": "0.1.0", "commit": "abc", "cores": "2", "load": f"0.{seed}0"}
        rows.append(row(seed=seed, correct=correct, nepoch=2, cohort_size=3, teacher_run=TEACHER, teacher_accuracy=90.5, versions=made))
    rows.append(row(correct=9300, nepoch=4, train_seconds=900.0, eval_seconds=40.0, teacher_run=TEACHER, teacher_accuracy=90.5))
    ledger.register([one | {"best_correct": one["correct"], "best_epoch": one["nepoch"]} for one in rows])
    for run in ledger.runs():
        whole = (run.train_seconds + run.eval_seconds) * run.cohort_size
        for epoch in range(1, run.nepoch + 1):
            right = run.correct if epoch == run.nepoch else 5000
            ledger.add_epochs({run.no: Epoch(epoch, "joint", 0.1, {"task": 1.0}, right, 10_000, whole / run.nepoch)})
    return ledger


def rows_of(ledger: Ledger, to: float | None = None, **only: str) -> list[dict[str, Any]]:
    return board.rows([exported.opened(ledger.folder)], "last", only, to=to)


# What a row says


def test_a_row_has_mean_interval_and_every_cost(filled: Ledger) -> None:
    longer, short, teacher = rows_of(filled)
    assert [one["mean"] for one in (longer, short, teacher)] == pytest.approx([93.0, 92.1, 90.5])
    assert (short["n"], short["epochs"], short["together"], short["load"]) == (3, 2, [3], 0.2)
    assert short["interval"] == interval([92.0, 92.1, 92.2])
    assert short["interval"][0] == pytest.approx(92.1 - 4.302653 * 0.1 / 3**0.5)
    assert (short["seconds"], short["setup_seconds"], short["teacher_seconds"]) == (210.0, 1.5, 330.0)
    assert short["all_seconds"] == 541.5
    assert (short["teacher"], short["teacher_accuracy"], short["commit"]) == ("resnet20", 90.5, "0.1.0 abc")
    assert short["hardware"] == "processor not recorded, 2 cores; cpu (2 threads); eager, fp32"
    assert (longer["interval"], longer["seconds"], longer["load"]) == (None, 940.0, None)
    assert (teacher["teacher_seconds"], teacher["all_seconds"]) == (0.0, 330.0)


def test_to_keeps_the_rows_that_reach_it_the_fastest_first(filled: Ledger) -> None:
    assert [one["mean"] for one in rows_of(filled, to=92.0)] == pytest.approx([92.1, 93.0])
    assert [one["mean"] for one in rows_of(filled, to=90.5)] == pytest.approx([90.5, 92.1, 93.0])
    assert [one["mean"] for one in rows_of(filled, to=92.2)] == pytest.approx([93.0])
    assert rows_of(filled, to=93.5) == []


def test_an_unknown_cost_is_not_counted_as_zero(filled: Ledger) -> None:
    filled.update(LONGER, teacher_run=None)
    filled.update(STUDENT, student_fingerprint="some weights")
    by_mean = {round(one["mean"], 1): one for one in rows_of(filled)}
    assert (by_mean[93.0]["teacher_seconds"], by_mean[93.0]["all_seconds"]) == (None, None)
    assert [round(one["mean"], 1) for one in rows_of(filled, to=0)] == [90.5, 93.0, 92.1]
    assert by_mean[92.1]["all_seconds"] is None, "what its first weights cost is not known"


def test_times_of_other_hardware_are_not_averaged(filled: Ledger) -> None:
    filled.update(STUDENT, device="cpu (8 threads)", train_seconds=50.0)
    assert [(one["n"], one["seconds"]) for one in rows_of(filled, method="fsp") if one["epochs"] == 2] == [(2, 210.0), (1, 60.0)]


def test_a_run_in_two_ledgers_counts_once_by_its_newest_figures(filled: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other", create=True)
    again = {name: value for name, value in vars(filled.run(STUDENT)).items() if name != "no"}
    other.register([again | {"correct": 9500, "started": "2022-01-01T00:00:00", "teacher_run": None}])
    both = [exported.opened(ledger.folder) for ledger in (other, filled)]
    (short,) = (one for one in board.rows(both, "last", {}) if one["n"] == 3)
    assert sorted(short["values"]) == [92.1, 92.2, 95.0]
    assert short["teacher_seconds"] is None, "numbers are of one ledger"


@pytest.mark.parametrize(("numbers", "told"), [([0, 1, 2, 5], "0-2,5"), ([7], "7"), ([1, 3], "1,3")])
def test_seeds_are_told_as_they_are_read(numbers: list[int], told: str) -> None:
    assert board._ranges(numbers) == told


# The plain loop


def bench_file(folder: Path, **changes: Any) -> Path:
    loops = {
        "plain loop, 0 workers: fsp": 500,
        "plain loop, 2 workers: fsp": 400,
        "strong plain loop, 2 workers: fsp": 800,
        "eager, fp32: fsp": 900,
    }
    rows = [{"loop": loop, "images/s": pace, "set-up s": 0.5} for loop, pace in loops.items()]
    told = {"methods": ["fsp"], "batch_size": 128, "hardware": {"cpu": "some CPU", "device": "cpu (2 threads)"}}
    (folder / "bench.json").write_text(json.dumps(told | {"pairs": [{"pair": "resnet20 <- resnet20", "rows": rows}]} | changes))
    return folder / "bench.json"


def with_plain(ledger: Ledger, path: Path, about: Any) -> list[dict[str, Any]]:
    class Source(exported.Folder):
        def about(self, run: object) -> Any:
            return about

    return [one for one in board.rows([Source(ledger)], "last", {}, board.paces(path)) if one["times"] != "measured"]


def test_the_plain_loops_time_is_its_epochs_by_its_pace(filled: Ledger, tmp_path: Path) -> None:
    found = with_plain(filled, bench_file(tmp_path), {"processor": "some CPU", "input": [3, 32, 32]})
    images = 50_000.0 * 200.0  # images a second of the row, times its seconds of training
    assert [(one["method"], one["seconds"]) for one in found if one["epochs"] == 2] == [
        ("plain loop, 0 workers: fsp", images / 500),
        ("strong plain loop, 2 workers: fsp", images / 800),
    ]
    assert {one["times"] for one in found} == {"estimated from its measured pace"}
    assert found[0]["all_seconds"] == found[0]["seconds"] + 0.5 + 330.0
    text = board.table(found, "last", "md")
    assert "| plain loop, 0 workers: fsp | resnet20 (90.50) | 2 | - | (92.10) | - |" in text


def test_a_baseline_is_met_by_the_pace_of_base_in_any_pair(filled: Ledger, tmp_path: Path) -> None:
    """A baseline has no teacher; bench times it in a pair."""
    rows = [{"loop": "plain loop, 0 workers: base", "images/s": 500, "set-up s": 0.5}]
    path = bench_file(
        tmp_path, methods=["base"], pairs=[{"pair": f"{name} <- resnet110", "rows": rows} for name in ("resnet20", "resnet8")]
    )
    (found,) = with_plain(filled, path, {"processor": "some CPU", "input": [3, 32, 32]})
    assert (found["student"], found["teacher"], found["mean"]) == ("resnet20", "-", 90.5)
    assert found["all_seconds"] == found["seconds"] + 0.5


@pytest.mark.parametrize(
    "about",
    [{"processor": "another CPU", "input": [3, 32, 32]}, {"processor": "some CPU", "input": [3, 64, 64]}, {"processor": "some CPU"}, {}],
)
def test_a_pace_of_other_hardware_or_images_gives_no_row(filled: Ledger, tmp_path: Path, about: Any) -> None:
    assert with_plain(filled, bench_file(tmp_path), about) == []


@pytest.mark.parametrize(
    "changes", [{"batch_size": 64}, {"methods": ["at"]}, {"hardware": {"cpu": "some CPU", "device": "cpu (8 threads)"}}]
)
def test_a_pace_of_other_work_gives_no_row(filled: Ledger, tmp_path: Path, changes: Any) -> None:
    assert with_plain(filled, bench_file(tmp_path, **changes), {"processor": "some CPU", "input": [3, 32, 32]}) == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "[" * 100_000, '{"methods": [], "hardware": {}}', '{"pairs": [{}], "methods": ["fsp"], "hardware": {}}'),
        '{"methods": ["fsp"], "hardware": {"cpu": "a", "device": "b"}, "batch_size": 1, "pairs": [{"pair": "a <- b", "rows": [3]}]}',
    ],
)
def test_a_file_that_bench_did_not_print_is_told_in_one_line(filled: Ledger, text: str) -> None:
    folder = filled.folder.parent
    (folder / "odd.json").write_text(text)
    line = "--plain odd.json: it is not what flowdistill bench --json prints; give a file of that"
    assert_refused(folder, ["record", "--plain", "odd.json"], line)


@pytest.mark.parametrize("pace", [0, -1, "fast", None, float("nan")])
def test_a_pace_that_is_no_positive_number_is_refused(tmp_path: Path, pace: Any) -> None:
    rows = [{"loop": "plain loop, 0 workers: fsp", "images/s": pace, "set-up s": 0.5}]
    with pytest.raises(UserError, match="not what flowdistill bench --json prints"):
        board.paces(bench_file(tmp_path, pairs=[{"pair": "a <- b", "rows": rows}]))


# The file


@pytest.fixture
def file(filled: Ledger, tmp_path: Path) -> Path:
    (tmp_path / "results.jsonl").write_bytes(exported.exported(filled))
    return tmp_path / "results.jsonl"


def test_a_file_gives_what_its_ledger_gives(filled: Ledger, file: Path) -> None:
    assert exported.exported(filled) == file.read_bytes(), "one ledger always gives the same bytes"
    there = exported.read(file)
    assert there.listing() == filled.runs()
    assert there.curves == {run.no: filled.epochs(run.no) for run in filled.runs()}
    for words in (("record",), ("table",), ("table", "--summary"), ("record", "--format", "json")):
        said = [command(file.parent, *words, "--runs", place) for place in ("results.jsonl", "runs")]
        assert said[0] == said[1]
        assert (said[0].code, said[0].err) == (0, "")
    exported.refuse_other(file, filled)


def test_an_export_leaves_out_interrupted_runs_and_keeps_diverged_ones(filled: Ledger, tmp_path: Path) -> None:
    filled.update(LONGER, status="interrupted")
    filled.update(STUDENT, status="failed", error="diverged", correct=None)
    filled.add_epochs({STUDENT: Epoch(3, "joint", 0.1, {"task": float("nan")}, None, 10_000, 1.0)})
    (tmp_path / "some.jsonl").write_bytes(exported.exported(filled))
    there = exported.read(tmp_path / "some.jsonl")
    assert [(run.no, run.status) for run in there.runs] == [(1, "finished"), (2, "failed"), (3, "finished"), (4, "finished")]
    assert str(there.curves[STUDENT][-1].terms["task"]) == "nan"
    exported.refuse_other(tmp_path / "some.jsonl", filled)


def sealed_again(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """The file with other content and a seal that fits it."""
    first, *lines = path.read_text().splitlines()
    ones = [json.loads(line) for line in lines]
    change(ones)
    lines = [json.dumps(one, sort_keys=True) for one in ones]
    head = json.loads(first) | {"sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    path.write_text("".join(f"{line}\n" for line in [json.dumps(head), *lines]))


WRITE = "write it again with flowdistill ledger export results.jsonl"


@pytest.mark.parametrize(("old", "new"), [("9210", "9310"), ("210", "110"), ("\n", "\n\n"), ("fsp", "kd"), ("abc", "abd")])
def test_an_edited_file_is_refused(file: Path, old: str, new: str) -> None:
    first, rest = file.read_text().split("\n", 1)
    file.write_text(f"{first}\n{rest.replace(old, new, 1)}")
    line = f"results.jsonl is not what was written: its lines do not fit their SHA-256; {WRITE}"
    assert_refused(file.parent, ["record", "--runs", "results.jsonl"], line)
    assert_refused(file.parent, ["table", "--runs", "results.jsonl"], line)


def test_a_file_that_was_cut_off_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for size in (0, 10, 300, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"is no ledger's export|is not what was written"):
            exported.read(file)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"correct": 9999}, "9,999 right after epoch 2 in its row, 9200 in its curve"),
        ({"best_correct": 9999}, "9,999 right after epoch 2 in its row, 9200 in its curve"),
        ({"nepoch": 3}, "its curve has 2 epochs, its row 3"),
        ({"train_seconds": 20.0}, "30.0 s in its row, 630.0 s of 3 students in its curve"),
        ({"train_seconds": 2000.0}, "2010.0 s in its row, 630.0 s of 3 students in its curve"),
        ({"status": "running"}, "status 'running' is none of finished, failed"),
        ({"config": {}}, "config: it has no table 'train'"),
        ({"method": 3}, "method: 3 is not text"),
    ],
)
def test_figures_that_contradict_each_other_are_refused_though_sealed(file: Path, change: dict[str, Any], why: str) -> None:
    sealed_again(file, lambda ones: ones[STUDENT - 1]["run"].update(change))
    assert_refused(file.parent, ["record", "--runs", "results.jsonl"], f"results.jsonl: run 2: {why}; {WRITE}")


@pytest.mark.parametrize("change", [list.clear, lambda one: one, lambda ones: ones.append({}), lambda ones: ones.append({"run": 3})])
def test_lines_that_are_no_runs_are_refused(file: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    sealed_again(file, change)
    lines = file.read_text().count("\n")
    if lines == 7:
        assert_refused(file.parent, ["record", "--runs", "results.jsonl"], f"results.jsonl: a line of it is no run; {WRITE}")
    else:
        assert len(exported.read(file).runs) == lines - 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda ones: ones[1]["run"].update(correct=9300, best_correct=9300) or ones[1]["curve"][1].update(correct=9300),
            "best_correct is 9300",
        ),
        (lambda ones: ones[1]["run"].update(device="a GPU"), 'device is "a GPU" in the file, "cpu (2 threads)" in the ledger'),
        (lambda ones: ones[1]["run"]["config"]["train"].update(lr=0.5), "config.train.lr is 0.5 in the file, 0.1 in the ledger"),
        (lambda ones: ones[1]["curve"][0]["terms"].update(task=0.5), "epoch 1.terms.task is 0.5 in the file, 1.0 in the ledger"),
        (lambda ones: ones[1]["about"].update(processor="fast"), 'about.processor is "fast" in the file, null in the ledger'),
    ],
)
def test_a_file_that_differs_from_its_ledger_is_refused_though_sealed(file: Path, change: Callable[[Any], object], why: str) -> None:
    sealed_again(file, change)
    said = command(file.parent, "ledger", "export", "results.jsonl", "--check")
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(rf"flowdistill: results.jsonl does not fit runs/ledger.db: run 2: {re.escape(why)}.*; {WRITE}\n", said.err)


def test_a_run_too_few_or_too_many_does_not_fit(filled: Ledger, file: Path) -> None:
    sealed_again(file, lambda ones: ones.pop())
    line = f"results.jsonl does not fit runs/ledger.db: run 5 is in the ledger alone; {WRITE}"
    assert_refused(file.parent, ["ledger", "export", "results.jsonl", "--check"], line)
    filled.update(4, status="interrupted")
    assert "run 4 is in the file alone" in command(file.parent, "ledger", "export", "results.jsonl", "--check").err


def test_a_file_of_a_newer_version_is_told(file: Path) -> None:
    file.write_text(file.read_text().replace('"version": 1', '"version": 2', 1))
    assert_refused(file.parent, ["record", "--runs", "results.jsonl"], "results.jsonl was written by a newer flowdistill; upgrade this one")


# The command


def test_a_committed_table_is_held_to_its_ledger(filled: Ledger, file: Path) -> None:
    folder = file.parent
    table = folder / "table.md"
    table.write_text(command(folder, "record", "--runs", "results.jsonl").out)
    assert command(folder, "record", "--check", "table.md") == Said(0, "", "table.md is what the ledger gives\n")
    written = table.read_text()
    table.write_text(written.replace("92.10", "92.90"))
    said = command(folder, "record", "--check", "table.md")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert re.search(r"table.md does not fit its ledger: line 6 has '.*92.90.*', the ledger gives '.*92.10", said.err)
    table.write_text(f"{written}| cifar10 | better |\n")
    assert "line 8 has '| cifar10 | better |', the ledger gives ''" in command(folder, "record", "--check", "table.md").err


def test_the_command_of_a_row_trains_its_runs(small_npz: Path, tmp_path: Path) -> None:
    (tmp_path / "my data.npz").write_bytes(small_npz.read_bytes())
    data = ("--dataset", "npz:my data.npz", *SHORT, "--label-smoothing", "0.1")
    command(tmp_path, "train", "--model", "resnet8", "--seeds", "100", *data)
    students = (
        "--method",
        "fsp,at+kd",
        "--student",
        "resnet8",
        "--teacher",
        "resnet8",
        "--seeds",
        "0,1,3",
        "--set",
        "options.fsp.preset=log",
    )
    said = command(tmp_path, "distill", *students, "--set", "weights.at=20", *data)
    assert said.code == 0, said.err
    rows = list(csv.DictReader(command(tmp_path, "record", "--format", "csv").out.splitlines()))
    assert sorted(one["method"] for one in rows) == ["at+kd", "base", "fsp"]
    for one in rows:
        said = command(tmp_path, *as_shell_reads(one["command"]))
        assert said.code == 0, said.err
        assert said.err.count("has it already, skipped") == int(one["n"]), one["command"]
    assert {one["hardware"].split(";")[1] for one in rows} == {" cpu (1 threads)"}
    assert float(rows[0]["load"]) >= 0
    seconds = [one.train_seconds + one.eval_seconds for one in Ledger(tmp_path / "runs").runs(method="fsp")]
    assert float(next(one["seconds"] for one in rows if one["method"] == "fsp")) == pytest.approx(statistics.fmean(seconds))


def test_record_says_that_no_run_is_finished(ledger: Ledger) -> None:
    ledger.register([row(status="failed")])
    assert command(ledger.folder.parent, "record").err == "no finished runs here for --protocol last and these filters\n"
    assert command(ledger.folder.parent, "record", "--format", "json").out == "[]\n"
