"""The log table, held against the reference log's own figures; protocols, headings, the summary, and every format."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from helpers.fsp_log import LOG
from helpers.keys import CHANGED, every_key, put
from helpers.rows import run

from flowdistill import stats
from flowdistill.checks import UserError
from flowdistill.ledger import MAY_DIFFER, Epoch, Run, baseline_key
from flowdistill.report import pages, tables
from flowdistill.report.tables import summary_rows

IMAGES = 9_984  # the reference log dropped the last partial batch of 10,000 test images
ACCURACIES = [accuracy for accuracies, _ in LOG.values() for accuracy in accuracies]
EPOCHS = [epoch for _, epochs in LOG.values() for epoch in epochs]
# The log averaged its batches in float32, whose steps are 7.6e-6 at 92: two of its twelve are 1e-5 off the fraction of whole
# counts, 9,175 / 9,984 = 91.897035... and 9,233 / 9,984 = 92.477965 (just below). Those print as they are.
ROUNDED = {91.89703: 91.89704, 92.47797: 92.47796}
PRINTED = [ROUNDED.get(accuracy, accuracy) for accuracy in ACCURACIES]
HEADINGS = [
    "ResNet20>>20/Cifar10 (92.0)",
    "ResNet20>>20/Cifar100 (68.0)",
    "ResNet110>>110/Cifar10 (92.7)",
    "ResNet110>>110/Cifar100 (72.8)",
]
HEADER = "| no | method | dataset | student | teacher | start_time | acc | epoch | nepoch | lr | batch_size |"
FORMATS = ["table", "md", "csv", "json"]


def reference_log() -> list[Run]:
    found = []
    for (model, dataset), (accuracies, epochs) in LOG.items():
        for seed, (accuracy, epoch) in enumerate(zip(accuracies, epochs, strict=True)):
            right = {"best_correct": round(accuracy * IMAGES / 100), "best_epoch": epoch, "correct": 6_000, "images": IMAGES}
            found.append(run(len(found) + 1, student=model, teacher=model, dataset=dataset, seed=seed, variant="ours", **right))
    return found


def numbered(rows: Sequence[dict[str, Any]]) -> list[Run]:
    return [run(no, **changes) for no, changes in enumerate(rows, 1)]


def seeds(correct: Sequence[int], **changes: Any) -> list[dict[str, Any]]:
    return [{"seed": seed, "correct": right, **changes} for seed, right in enumerate(correct)]


def headings(runs: Sequence[Run], protocol: str = "last") -> list[str]:
    return tables.headings(tables.group(runs, protocol))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def md_rows(text: str) -> list[dict[str, str]]:
    return [dict(zip(cells(HEADER), cells(line), strict=True)) for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]


def strict_json(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


# The reference log


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_reference_accuracies_are_counts_of_9984_images(accuracy: float) -> None:
    correct = accuracy * IMAGES / 100
    half_a_decimal, half_a_float32_step = 0.5e-5, 0.5 * 2**-17
    assert correct == pytest.approx(round(correct), abs=(half_a_decimal + half_a_float32_step) * IMAGES / 100)


def test_reference_log_prints_its_own_figures() -> None:
    rows = md_rows(tables.log_table(reference_log(), "best", "md"))
    assert [row["acc"] for row in rows] == [f"{accuracy:.5f}" for accuracy in PRINTED]
    assert [float(row["acc"]) for row in rows] == pytest.approx(ACCURACIES, abs=1.01e-5)
    assert [int(row["epoch"]) for row in rows] == EPOCHS
    assert [int(row["no"]) for row in rows] == list(range(1, 13))


def test_reference_log_prints_its_own_headings() -> None:
    text = tables.log_table(reference_log(), "best", "md")
    assert [line.removeprefix("### ") for line in text.splitlines() if line.startswith("#")] == HEADINGS


def test_reference_log_is_four_tables_of_three_rows() -> None:
    blocks = tables.log_table(reference_log(), "best", "md").split("### ")[1:]
    assert [len(md_rows(block)) for block in blocks] == [3, 3, 3, 3]
    assert all(block.count(HEADER + "\n") == 1 for block in blocks)


def test_first_row_to_the_letter() -> None:
    lines = tables.log_table(reference_log(), "best", "md").splitlines()
    at = lines.index(HEADER)
    assert set(lines[at + 1]) == {"|", " ", "-"}
    assert lines[at + 1].count("|") == HEADER.count("|")
    assert lines[at + 2] == "| 1 | fsp | cifar10 | resnet20 | resnet20 | 2021-09-01/08-10-43 | 91.95713 | 195 | 200 | 0.1 | 128 |"


def test_base_has_no_teacher() -> None:
    text = tables.log_table([run(4, method="base", student="resnet110")], "last", "md")
    assert "| 4 | base | cifar10 | resnet110 | - | 2021-09-01/08-10-43 | 92.00000 | 200 | 200 | 0.1 | 128 |" in text.splitlines()
    assert text.startswith("### ResNet110/Cifar10 (92.0)\n")


# Protocols


def test_last_and_best_read_the_same_runs_otherwise() -> None:
    one = run(correct=9_100, epoch=200, best_correct=9_250, best_epoch=150)
    assert tables.read(one, "last") == tables.Reading(91.0, 200)
    assert tables.read(one, "best") == tables.Reading(92.5, 150)
    assert tables.read(one, "holdout") is None


def test_holdout_reads_holdout_runs_alone() -> None:
    one = run(split="holdout", correct=9_100, epoch=120)
    assert tables.read(one, "holdout") == tables.Reading(91.0, 120)
    assert tables.read(one, "last") is None
    assert tables.read(one, "best") is None


@pytest.mark.parametrize("protocol", ["last", "best", "holdout"])
def test_a_table_never_mixes_splits(protocol: str) -> None:
    both = numbered([{"split": split, "seed": seed} for split in ("full", "holdout") for seed in range(3)])
    shown = {row["no"] for row in json.loads(tables.log_table(both, protocol, "json"))}
    assert shown == ({4, 5, 6} if protocol == "holdout" else {1, 2, 3})
    assert [row["n"] for row in tables.summary_rows(both, protocol)] == [3]


@pytest.mark.parametrize("split", ["full", "holdout"])
@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_unfinished_runs_never_appear(status: str, split: str) -> None:
    one = run(status=status, split=split, best_epoch=3, best_correct=9_000)
    for protocol in tables.PROTOCOLS:
        assert tables.read(one, protocol) is None
        assert json.loads(tables.log_table([one], protocol, "json")) == []
        assert tables.summary_rows([one], protocol) == []


@pytest.mark.parametrize("missing", [{"correct": None}, {"epoch": None}, {"images": None}])
def test_a_run_without_figures_is_not_read(missing: dict[str, None]) -> None:
    assert tables.read(run(**missing), "last") is None


def test_no_right_answer_is_a_figure() -> None:
    assert tables.read(run(correct=0), "last") == tables.Reading(0.0, 200)


def test_protocol_stands_under_every_heading() -> None:
    runs = reference_log() + numbered([{"split": "holdout", "images": IMAGES, "student": student} for student in ("resnet8", "resnet20")])
    for protocol, meaning in tables.PROTOCOLS.items():
        blocks = tables.log_table(runs, protocol, "md").split("### ")[1:]
        assert len(blocks) == (2 if protocol == "holdout" else 4)
        for block in blocks:
            _, blank, stamp, *_ = block.splitlines()
            assert blank == ""
            assert stamp.startswith(f"acc, epoch: {meaning}; 9,984 images; one teacher")


def test_stamps_of_the_protocols_differ() -> None:
    assert len(set(tables.PROTOCOLS.values())) == len(tables.PROTOCOLS) == 3


def test_variant_stands_under_the_heading() -> None:
    stamps = [tables.log_table([run(variant=variant)], "last", "md").splitlines()[2] for variant in ("", "ours, pool=avg")]
    assert stamps[1] == f"{stamps[0]}; fsp ours, pool=avg"


# Repeats and groups


def test_of_repeats_only_the_newest() -> None:
    runs = numbered([{"correct": 9_000}, {"correct": 9_100, "seed": 1}, {"correct": 9_300}])
    assert [row["no"] for row in json.loads(tables.log_table(runs, "last", "json"))] == [2, 3]
    [row] = tables.summary_rows(runs, "last")
    assert row["values"] == [91.0, 93.0]


@pytest.mark.parametrize("status", ["failed", "running", "interrupted"])
def test_a_repeat_that_did_not_finish_hides_nothing(status: str) -> None:
    runs = numbered([{"correct": 9_000}, {"correct": None, "status": status}])
    assert [row["no"] for row in json.loads(tables.log_table(runs, "last", "json"))] == [1]


def test_groups_stand_in_order_of_their_first_run() -> None:
    rows = [{"method": method, "seed": seed} for seed in range(2) for method in ("kd", "base", "at")]
    groups = tables.group(list(reversed(numbered(rows))), "last")
    assert [(group.first.method, [member.no for member in group.runs]) for group in groups] == [
        ("kd", [1, 4]),
        ("base", [2, 5]),
        ("at", [3, 6]),
    ]


def test_seeds_are_one_group_and_recipes_are_not() -> None:
    rows = [{"seed": seed, "lr": lr} for lr in (0.1, 0.05) for seed in range(3)]
    assert [len(group.runs) for group in tables.group(numbered(rows), "last")] == [3, 3]


# Headings


@pytest.mark.parametrize(
    ("student", "teacher", "shown"),
    [
        ("resnet20", "resnet110", "ResNet110>>20"),
        ("resnet20", "resnet20", "ResNet20>>20"),
        ("resnet20", "-", "ResNet20"),
        ("resnet8x4", "resnet32x4", "ResNet32x4>>8x4"),
        ("vgg8", "resnet110", "ResNet110>>VGG8"),
        ("resnet20", "vgg13", "VGG13>>ResNet20"),
        ("nets/a1.py:Small", "nets/a2.py:Small", "nets/a2.py:Small>>nets/a1.py:Small"),
        ("timm:resnet18", "timm:resnet34", "timm:resnet34>>timm:resnet18"),
        ("nets.py:Small", "resnet20", "ResNet20>>nets.py:Small"),
        ("resnet20", "resnet20+resnet56", "ResNet20+ResNet56>>20"),
        ("vgg8", "resnet20+timm:resnet34", "ResNet20+timm:resnet34>>VGG8"),
    ],
)
def test_a_pair_is_printed_student_behind_teacher(student: str, teacher: str, shown: str) -> None:
    method = "base" if teacher == "-" else "fsp"
    assert tables.pair(run(student=student, teacher=teacher, method=method)) == shown


def test_groups_that_read_alike_say_their_method() -> None:
    assert headings(numbered([{"method": "fsp"}, {"method": "at"}, {"method": "at+kd"}])) == [
        "ResNet20>>20/Cifar10 fsp (92.0)",
        "ResNet20>>20/Cifar10 at (92.0)",
        "ResNet20>>20/Cifar10 at+kd (92.0)",
    ]


@pytest.mark.parametrize(
    ("first", "second", "notes"),
    [
        ({"lr": 0.1}, {"lr": 0.05}, ["train.lr=0.1", "train.lr=0.05"]),
        ({"nepoch": 200}, {"nepoch": 30}, ["train.epochs=200", "train.epochs=30"]),
        ({"precision": "fp32"}, {"precision": "bf16"}, ["train.precision=fp32", "train.precision=bf16"]),
        ({}, {"config": {"weights": {"fsp": 10.0}}}, ["weights.fsp=1.0", "weights.fsp=10.0"]),
        ({}, {"config": {"data": {"flip": False}}}, ["data.flip=True", "data.flip=False"]),
        ({}, {"config": {"data": {"limit_train": 500}}}, ["data.limit_train=None", "data.limit_train=500"]),
        (
            {"config": {"options": {"fsp": {"pool": "max"}}}},
            {"config": {"options": {"fsp": {"pool": "avg"}}}},
            ["options.fsp.pool=max", "options.fsp.pool=avg"],
        ),
        ({"fingerprint": "aaaaaaaabb"}, {"fingerprint": "bbbbbbbbaa"}, ["fingerprint aaaaaaaa", "fingerprint bbbbbbbb"]),
    ],
)
def test_groups_that_read_alike_say_what_differs(first: dict[str, Any], second: dict[str, Any], notes: list[str]) -> None:
    assert headings(numbered([first, second])) == [f"ResNet20>>20/Cifar10 {note} (92.0)" for note in notes]


def test_a_run_recorded_before_a_key_was_there_reads_like_one_that_leaves_it_out() -> None:
    now = run(1, fingerprint="a" * 64)
    before = dataclasses.replace(now, no=2, seed=1, config={**now.config, "data": {"name": "cifar10", "pad": 4, "flip": True}})
    assert headings([before, now]) == ["ResNet20>>20/Cifar10 (92.0)"]
    other = dataclasses.replace(now, fingerprint="b" * 64)
    assert all("fingerprint" in heading for heading in headings([before, other]))


def test_method_and_key_are_both_said() -> None:
    assert headings(numbered([{"method": "at"}, {}, {"lr": 0.05}])) == [
        "ResNet20>>20/Cifar10 at (92.0)",
        "ResNet20>>20/Cifar10 fsp, train.lr=0.1 (92.0)",
        "ResNet20>>20/Cifar10 fsp, train.lr=0.05 (92.0)",
    ]


def test_no_two_headings_are_the_same() -> None:
    rows = [{"lr": 0.1, "fingerprint": "a" * 64}, {"lr": 0.1, "fingerprint": "b" * 64}, {"lr": 0.05, "fingerprint": "c" * 64}]
    found = headings(numbered(rows))
    assert len(set(found)) == 3, found


def test_headings_leave_out_what_is_alike() -> None:
    assert headings(numbered([{"lr": 0.1, "seed": 0}, {"lr": 0.05, "seed": 3}])) == [
        "ResNet20>>20/Cifar10 train.lr=0.1 (92.0)",
        "ResNet20>>20/Cifar10 train.lr=0.05 (92.0)",
    ]
    assert headings(numbered(seeds([9_000, 9_100, 9_200]))) == ["ResNet20>>20/Cifar10 (91.0)"]
    assert headings(numbered([{"method": "fsp", "dataset": "cifar10"}, {"method": "at", "dataset": "cifar100"}])) == [
        "ResNet20>>20/Cifar10 (92.0)",
        "ResNet20>>20/Cifar100 (92.0)",
    ]


# The summary


BASE, FSP, KD = [9_206, 9_234, 9_255], [9_293, 9_255, 9_301], [9_280, 9_310, 9_260, 9_299]


def test_mean_spread_and_difference() -> None:
    runs = numbered(seeds(BASE, method="base") + seeds(FSP, teacher_run=1) + seeds(KD, method="kd", teacher_run=1))
    base, fsp, kd = tables.summary_rows(runs, "last")
    values = {name: [correct / 100 for correct in counts] for name, counts in (("base", BASE), ("fsp", FSP), ("kd", KD))}
    for name, row in (("base", base), ("fsp", fsp), ("kd", kd)):
        assert (row["method"], row["n"], row["protocol"], row["images"]) == (name, len(values[name]), "last", 10_000)
        assert row["values"] == pytest.approx(values[name])
        assert row["mean"] == pytest.approx(sum(values[name]) / len(values[name]))
        assert row["std"] == pytest.approx(stats.sample_std(values[name]))
    assert base["difference"] is None
    assert fsp["difference"] == pytest.approx(stats.welch(values["fsp"], values["base"]))
    assert kd["difference"] == pytest.approx(stats.welch(values["kd"], values["base"]))
    assert fsp["base"] == kd["base"] == pytest.approx(92.316667)


@pytest.mark.parametrize("protocol", ["last", "best", "holdout"])
def test_the_summary_reads_by_its_protocol(protocol: str) -> None:
    split = {"split": "holdout"} if protocol == "holdout" else {"best_epoch": 150, "best_correct": 9_400}
    runs = numbered(seeds(BASE, method="base", **split) + seeds(FSP, **split))
    expected = [94.0] * 3 if protocol == "best" else [correct / 100 for correct in FSP]
    assert tables.summary_rows(runs, protocol)[1]["values"] == pytest.approx(expected)


@pytest.mark.parametrize(("base", "fsp"), [(2, 3), (3, 2), (1, 1), (2, 2)])
def test_no_difference_below_three_a_side(base: int, fsp: int) -> None:
    rows = tables.summary_rows(numbered(seeds(BASE[:base], method="base") + seeds(FSP[:fsp])), "last")
    assert rows[1]["difference"] is None
    assert [row["n"] for row in rows] == [base, fsp]


@pytest.mark.parametrize(
    "other",
    [
        {"student": "resnet8"},
        {"dataset": "cifar100"},
        {"data_hash": "other"},
        {"lr": 0.05},
        {"nepoch": 100},
        {"batch_size": 64},
        {"precision": "bf16"},
        {"config": {"train": {"schedule": "cosine"}}},
        {"config": {"train": {"weight_decay": 0.0}}},
        {"config": {"data": {"pad": 2}}},
        {"config": {"data": {"flip": False}}},
        {"config": {"data": {"crop": "resized", "pad": 0}}},
        {"config": {"student": "resnet20@trained.safetensors"}, "student_fingerprint": "file:1"},
    ],
    ids=lambda changes: str(changes).replace(" ", ""),
)
def test_no_difference_to_a_base_of_something_else(other: dict[str, Any]) -> None:
    _, fsp = tables.summary_rows(numbered(seeds(BASE, method="base", **other) + seeds(FSP)), "last")
    assert fsp["difference"] is None
    assert fsp["base"] is None


def test_each_recipe_has_its_own_base() -> None:
    rows = seeds(BASE, method="base") + seeds([9_000, 9_010, 9_020], method="base", lr=0.05)
    found = tables.summary_rows(numbered(rows + seeds(FSP) + seeds(FSP, lr=0.05)), "last")
    assert [row["base"] for row in found] == [None, None, pytest.approx(92.316667), pytest.approx(90.1)]


def test_methods_without_a_base_stand_alone() -> None:
    for row in tables.summary_rows(numbered(seeds(FSP) + seeds(KD, method="kd")), "last"):
        assert (row["base"], row["difference"]) == (None, None)


def test_the_base_may_come_last() -> None:
    fsp, base = tables.summary_rows(numbered(seeds(FSP) + seeds(BASE, method="base")), "last")
    assert fsp["base"] == pytest.approx(base["mean"])
    assert fsp["difference"] is not None
    assert base["difference"] is None


@pytest.mark.parametrize(
    ("teacher_runs", "told"),
    [([1, 1, 1], "one teacher"), ([1, 2, 3], "3 teachers"), ([1, 2, 1], "2 teachers"), ([None] * 3, "one teacher")],
)
def test_the_number_of_teachers_is_told(teacher_runs: list[int | None], told: str) -> None:
    runs = numbered([row | {"teacher_run": number} for row, number in zip(seeds(FSP), teacher_runs, strict=True)])
    assert tables.summary_rows(runs, "last")[0]["teachers"] == told
    assert f"; {told}" in tables.log_table(runs, "last", "md").splitlines()[2]


def test_base_has_no_teachers() -> None:
    assert tables.summary_rows(numbered(seeds(BASE, method="base")), "last")[0]["teachers"] == "no teacher"


def test_summary_as_it_is_read() -> None:
    runs = numbered(seeds(BASE, method="base") + seeds(FSP, variant="ours") + seeds(KD[:2], method="kd"))
    lines = tables.summary_table(runs, "best", "md").splitlines()
    assert lines[0].startswith(f"acc: {tables.PROTOCOLS['best']}. Mean +- sample std (n seeds)")
    runs = numbered(seeds(BASE, method="base") + seeds(FSP, variant="ours") + seeds(KD[:2], method="kd"))
    _, _, header, _, base, fsp, kd = tables.summary_table(runs, "last", "md").splitlines()
    assert header == "| method | variant | pair | dataset | nepoch | acc (n) | to base | 95 % interval | detectable | teacher |"
    assert base == "| base | - | ResNet20 | cifar10 | 200 | 92.32 +- 0.25 (3) | - | - | - | no teacher |"
    seen = stats.welch([correct / 100 for correct in FSP], [correct / 100 for correct in BASE])
    assert seen is not None
    difference = f"{seen.value:+.2f} | {seen.low:+.2f} to {seen.high:+.2f} | {seen.detectable:.2f}"
    assert fsp == f"| fsp | ours | ResNet20>>20 | cifar10 | 200 | 92.83 +- 0.25 (3) | {difference} | one teacher |"
    assert kd == "| kd | - | ResNet20>>20 | cifar10 | 200 | 92.80 93.10 | - | - | - | one teacher |"


# Formats


def test_log_as_csv_parses_back() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.log_table(reference_log(), "best", "csv"))))
    assert tuple(rows[0]) == (*tables.LOG_COLUMNS, *("group", "protocol", "metric", "variant", "images", "teachers"))
    assert [row["acc"] for row in rows] == [f"{accuracy:.5f}" for accuracy in PRINTED]
    assert [row["group"] for row in rows] == list(itertools.chain.from_iterable([heading] * 3 for heading in HEADINGS))
    assert {(row["protocol"], row["variant"], row["images"], row["teachers"]) for row in rows} == {("best", "ours", "9984", "one teacher")}


def test_log_as_json_is_an_array_of_objects() -> None:
    rows = strict_json(tables.log_table(reference_log(), "best", "json"))
    assert [row["acc"] for row in rows] == PRINTED
    assert [(row["no"], row["epoch"], row["protocol"]) for row in rows] == [(no, epoch, "best") for no, epoch in enumerate(EPOCHS, 1)]


def test_log_as_a_terminal_table_holds_every_cell() -> None:
    text = tables.log_table(reference_log(), "best", "table")
    lines = [line.split() for line in text.splitlines()]
    for expected, accuracy in zip(EPOCHS, PRINTED, strict=True):
        assert any(line[6:8] == [f"{accuracy:.5f}", str(expected)] and len(line) == 11 for line in lines)
    assert list(tables.LOG_COLUMNS) in lines
    assert [line.removeprefix("### ") for line in text.splitlines() if line.startswith("#")] == HEADINGS


def test_summary_as_json_and_csv_hold_the_same() -> None:
    runs = numbered(seeds(BASE, method="base") + seeds(FSP, variant="ours, pool=avg"))
    objects = strict_json(tables.summary_table(runs, "last", "json"))
    rows = list(csv.DictReader(io.StringIO(tables.summary_table(runs, "last", "csv"))))
    seen = stats.welch(objects[1]["values"], objects[0]["values"])
    assert seen is not None
    assert {name: objects[1][name] for name in seen._fields} == pytest.approx(seen._asdict())
    assert objects[0]["value"] is None
    for found, row in zip(objects, rows, strict=True):
        assert found.keys() == row.keys()
        assert [float(value) for value in row["values"].split()] == found["values"]
        assert row["variant"] == found["variant"]
        assert row["low"] == ("" if found["low"] is None else str(found["low"]))


@pytest.mark.parametrize("make", [tables.log_table, tables.summary_table])
def test_no_runs_are_an_empty_table(make: Any) -> None:
    assert strict_json(make([], "last", "json")) == []
    assert list(csv.DictReader(io.StringIO(make([], "last", "csv")))) == []
    assert not md_rows(make([], "last", "md"))


ODD = [
    {"no": 1, "text": "a, b", "number": 0.5},
    {"no": 2, "text": 'she said "c|d"', "number": None},
    {"no": 3, "text": "", "number": -1},
]
TWO_LINES = [{"no": 1, "text": "RuntimeError: CUDA error\nCompile with debug", "number": 1}, *ODD]


def test_csv_of_odd_cells_parses_back() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.render(TWO_LINES, "csv", ("no", "text", "number")), newline="")))
    shown = [{key: "" if value is None else str(value).replace("\n", r"\n") for key, value in row.items()} for row in TWO_LINES]
    assert rows == shown, "a line break is shown: what reads line by line sees a line a row"


def test_json_of_odd_cells_parses_back() -> None:
    assert strict_json(tables.render(TWO_LINES, "json", ())) == TWO_LINES


def test_markdown_of_odd_cells() -> None:
    lines = tables.render(ODD, "md", ("no", "text", "number")).splitlines()
    assert lines[2:] == ["| 1 | a, b | 0.5 |", '| 2 | she said "c\\|d" |  |', "| 3 |  | -1 |"]


def test_markdown_of_a_cell_of_two_lines_stays_one_row_a_line() -> None:
    lines = tables.render(TWO_LINES, "md", ("no", "text", "number")).splitlines()
    assert len(lines) == 2 + len(TWO_LINES)
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)


def test_columns_choose_and_order() -> None:
    rows = [{"a": 1, "b": 2, "c": 3}]
    assert tables.render(rows, "md", ("c", "a")).splitlines()[0] == "| c | a |"
    assert tables.render(rows, "csv", ("c", "a")) == "c,a\n3,1"
    assert tables.render(rows, "table", ("c", "a")).split() == ["c", "a", "3", "1"]


def test_unknown_format() -> None:
    with pytest.raises(UserError) as error:
        tables.render([], "xml", ())
    assert str(error.value) == "--format 'xml': choose from table, md, csv, json"


def test_the_command_line_offers_every_format_and_protocol_there_is() -> None:
    assert get_args(tables.Format) == tuple(tables.FORMATS)
    assert get_args(tables.Protocol) == tuple(tables.PROTOCOLS)


# Listings


@pytest.mark.parametrize("format_", FORMATS)
def test_listing_shows_every_run_whatever_became_of_it(format_: str) -> None:
    runs = numbered([{}, {"status": "failed", "error": "diverged", "correct": None}, {"status": "running", "correct": None}])
    text = pages.runs_list(runs, format_)
    for word in ("finished", "failed", "diverged", "running", "92.0"):
        assert word in text
    assert "nan" not in text.lower()


@pytest.mark.parametrize("format_", ["table", "md"])
def test_page_of_a_run_holds_config_and_curve(format_: str) -> None:
    text = pages.run_page(run(12), [Epoch(1, "joint", 0.1, {"task": 1.25, "fsp": 0.5}, 4_321, 10_000, 0.5)], format_)
    for word in ("weight_decay", "joint", "43.21", "1.25", "fingerprint"):
        assert word in text


def test_page_of_a_diverged_run_is_json() -> None:
    curve = [Epoch(1, "joint", 0.1, {"task": float("nan"), "fsp": float("inf")}, None, 10_000, 0.5)]
    strict_json(pages.run_page(run(status="failed"), curve, "json"))


def test_page_of_a_run_as_csv_is_its_curve() -> None:
    curve = [Epoch(number, "joint", 0.1, {"task": 1 / number}, 9_000, 10_000, 0.5) for number in (1, 2, 4)]
    rows = list(csv.DictReader(io.StringIO(pages.run_page(run(), curve, "csv"))))
    assert [(row["epoch"], row["acc"], row["task"]) for row in rows] == [("1", "90.00", "1"), ("2", "90.00", "0.5"), ("4", "90.00", "0.25")]


def test_summary_rows_that_differ_in_recipe_say_so() -> None:
    runs = [run(no, method="base", config={"train": {"lr": lr}}) for no, lr in ((1, 0.1), (2, 0.01))]
    assert [row["differs"] for row in tables.summary_rows(runs, "last")] == ["train.lr=0.1", "train.lr=0.01"]
    assert "train.lr=0.01" in tables.summary_table(runs, "last", "md")


# What is compared with what


@pytest.mark.parametrize("key", sorted(CHANGED))
def test_runs_are_compared_with_a_base_run_that_differs_in_nothing_but_what_may(key: str) -> None:
    """A key that nobody thought of gives ``-``, never a number."""
    base, plain = (run(method=method, config={"data": {"flip": False}}) for method in ("base", "kd"))
    other = replace(plain, config=put(plain.config, key, CHANGED[key]))
    assert baseline_key(plain) == baseline_key(base)
    assert (baseline_key(other) == baseline_key(base)) == any(f"{key}.".startswith(f"{may}.") for may in MAY_DIFFER)


def test_every_exception_names_a_key() -> None:
    assert all(any(f"{key}.".startswith(f"{may}.") for key in every_key()) for may in MAY_DIFFER)


@pytest.mark.parametrize(
    "changed",
    [
        {"student": "resnet32"},
        {"data_hash": "other"},
        {"student_fingerprint": "12/0"},
        {"networks": {"student": {"made_of": "x", "number": 0}}},
        {"networks": {"student": {"made_of": "", "number": 1}}},
    ],
)
def test_another_network_or_other_data_are_not_compared(changed: dict[str, Any]) -> None:
    base = run(method="base")
    assert baseline_key(replace(base, **changed)) != baseline_key(base)


def test_a_base_run_of_other_images_is_the_base_of_students_that_see_those() -> None:
    """inputs.student=8x8 beside 16x16: each is compared with its own."""
    seen = {"inputs": {"student": {"size": 8}}}
    runs = [run(no=no, method="base", seed=no, correct=9000) for no in range(3)]
    runs += [run(no=3 + no, method="base", seed=no, correct=5000, config=seen, variant="inputs.student.size=8") for no in range(3)]
    runs += [run(no=6 + no, method="kd", seed=no, correct=5100 + no, config=seen, variant="inputs.student.size=8") for no in range(3)]
    rows = {(row["method"], row["variant"]): row for row in summary_rows(runs, "last")}
    assert rows["kd", "inputs.student.size=8"]["base"] == 50.0
    assert rows["base", "inputs.student.size=8"]["difference"] is None
    alone = [one for one in runs if one.method == "kd" or not one.variant]
    assert {row["method"]: row["difference"] for row in summary_rows(alone, "last")} == {"base": None, "kd": None}


@pytest.mark.parametrize("changed", [{"train": {"freeze": ["bn1"]}}, {"init_from": "12"}, {"weights": {"task": 0.5}}])
def test_a_base_run_that_is_not_plain_is_nobodys_base(changed: dict[str, Any]) -> None:
    runs = [run(no=no, method="base", seed=no, config=changed, variant="x") for no in range(3)]
    runs += [run(no=3 + no, method="kd", seed=no) for no in range(3)]
    assert all(row["base"] is None for row in summary_rows(runs, "last") if row["method"] == "kd")


# Other figures than accuracy


def measured(count: int = 3, **changes: Any) -> list[dict[str, Any]]:
    """Rows of one group, whose figures grow with the seed and differ from each other."""
    figures = [{"top5": 9_000 + 100 * n, "macro_f1": 70.0 + n, "balanced_accuracy": 60.0 + 2 * n} for n in range(count)]
    return [{"seed": seed, **figures[seed], **changes} for seed in range(count)]


EXPECTED = {"top1": [92.0] * 3, "top5": [90.0, 91.0, 92.0], "macro-f1": [70.0, 71.0, 72.0], "balanced-accuracy": [60.0, 62.0, 64.0]}


@pytest.mark.parametrize("metric", EXPECTED)
def test_every_metric_is_read_and_named(metric: str) -> None:
    assert metric in get_args(tables.MetricName)
    runs, column = numbered(measured()), "acc" if metric == "top1" else metric
    logged = json.loads(tables.log_table(runs, "last", "json", metric))
    assert [row[column] for row in logged] == EXPECTED[metric]
    assert {row["metric"] for row in logged} == {metric}
    text = tables.log_table(runs, "last", "md", metric)
    assert text.splitlines()[2].startswith(f"{column}, epoch: ")
    assert f"({statistics.fmean(EXPECTED[metric]):.1f})" in text.splitlines()[0]
    assert f" {column} (n) " in tables.summary_table(runs, "last", "md", metric=metric)


def test_the_difference_to_base_is_that_of_the_metric() -> None:
    runs = numbered([*measured(method="base"), *[row | {"macro_f1": row["macro_f1"] + 5} for row in measured()]])
    _, fsp = summary_rows(runs, "last", metric="macro-f1")
    assert (fsp["mean"], fsp["std"], fsp["n"], fsp["base"], fsp["metric"]) == (76.0, 1.0, 3, 71.0, "macro-f1")
    assert fsp["difference"] == stats.welch([75.0, 76.0, 77.0], [70.0, 71.0, 72.0])
    assert summary_rows(runs, "last")[1]["difference"].value == 0


OLD = {"top5": None, "macro_f1": None, "balanced_accuracy": None}


@pytest.mark.parametrize("metric", ["top5", "macro-f1", "balanced-accuracy"])
def test_what_an_older_version_recorded_is_no_figure_and_is_told(metric: str) -> None:
    runs = numbered([*measured(), {"seed": 3, **OLD}, {"seed": 0, "method": "kd", **OLD}])
    told = f"{metric} -: an older version recorded run"
    log = tables.log_table(runs, "last", "md", metric)
    assert f"{told} 4 without it; flowdistill evaluate RUN measures it" in log
    assert log.count("| - | 200 |") == 2
    mixed, none = summary_rows(runs, "last", metric=metric)
    assert (mixed["n"], mixed["values"]) == (3, EXPECTED[metric])
    assert (none["n"], none["mean"], none["std"], none["values"], none["difference"]) == (0, None, None, [], None)
    summary = tables.summary_table(runs, "last", "md", metric=metric)
    assert f"{told}s 4, 5 without it; flowdistill evaluate RUN measures it." in summary
    assert [row[metric] for row in json.loads(tables.log_table(runs, "last", "json", metric))][3:] == [None, None]
    assert json.loads(tables.summary_table(runs, "last", "json", metric=metric))[1]["mean"] is None
    assert "older" not in tables.log_table(runs, "last", "md")


def test_five_classes_have_no_top5_and_it_is_told() -> None:
    text = tables.summary_table(numbered(measured(top5=None)), "last", "md", metric="top5")
    assert "top5 -: says nothing of 5 classes or fewer." in text
    assert "older" not in text
    assert "| - | - | - | - | one teacher |" in text


@pytest.mark.parametrize("show", [tables.log_table, tables.summary_table])
def test_the_best_epoch_by_top1_has_no_other_figure(show: Any) -> None:
    with pytest.raises(UserError, match="--metric top5 --protocol best: that epoch is the best by top-1"):
        show(numbered(measured()), "best", "md", metric="top5")
    assert show(numbered(measured()), "best", "md", metric="top1")
