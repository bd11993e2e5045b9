"""The ledger: what goes in comes out, all writers are kept, and what is no ledger is refused in one line."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import row, run

from flowdistill.checks import UserError
from flowdistill.ledger import COLUMNS, MIGRATIONS, Epoch, Ledger, newest

WRITERS, RUNS_EACH, EPOCHS_EACH = 8, 20, 2


def epoch(number: int = 1, **changes: Any) -> Epoch:
    values = {"epoch": number, "phase": "joint", "lr": 0.1, "terms": {"task": 1.5, "fsp": 0.25}, "correct": 91, "images": 100}
    return Epoch(**{**values, "seconds": 0.5, **changes})


def complaint(folder: Path, **how: Any) -> str:
    with pytest.raises(UserError) as error:
        Ledger(folder, **how)
    line = str(error.value)
    assert "\n" not in line
    return line


# Round trip


def test_a_run_comes_back_as_it_went_in(ledger: Ledger) -> None:
    given = row(seed=3, error="", config={"weights": {"task": 0.5, "fsp": 10.0}})
    [no] = ledger.register([given])
    assert vars(ledger.run(no)) == {"no": 1, **given, "cohort": 1}


def test_columns_of_the_table_are_the_fields_of_a_run(ledger: Ledger) -> None:
    ledger.register([])
    with sqlite3.connect(ledger.path) as db:
        names = [column[1] for column in db.execute("PRAGMA table_info(runs)")]
    db.close()
    assert tuple(names) == COLUMNS


def test_a_new_run_is_running_unless_told(ledger: Ledger) -> None:
    given = row()
    del given["status"]
    with contextlib.ExitStack() as stack:
        ledger.register([given], lambda numbers: stack.enter_context(ledger.lock(numbers[0])))
        assert ledger.run(1).status == "running"


def test_numbers_start_at_one_and_count_up(ledger: Ledger) -> None:
    assert ledger.register([row(seed=0), row(seed=1)]) == [1, 2]
    assert ledger.register([]) == []
    assert ledger.register([row(seed=2)]) == [3]
    assert [found.no for found in ledger.runs()] == [1, 2, 3]
    assert [found.seed for found in ledger.runs()] == [0, 1, 2]


def test_update_changes_just_that_run(ledger: Ledger) -> None:
    before = row(status="running", correct=None, epoch=None)
    ledger.register([before, row(seed=1, status="running")])
    ledger.update(1, status="finished", correct=9_123, epoch=200, versions={"torch": "9"})
    assert vars(ledger.run(1)) == {
        **before,
        "no": 1,
        "cohort": 1,
        "status": "finished",
        "correct": 9_123,
        "epoch": 200,
        "versions": {"torch": "9"},
    }
    assert ledger.run(2).status == "dead"


# Alive or dead, and taken up again


def test_a_running_run_without_its_lock_is_dead_and_its_cohort_with_it(ledger: Ledger) -> None:
    with contextlib.ExitStack() as stack:
        ledger.register([row(seed=0, status="running"), row(seed=1)], lambda numbers: stack.enter_context(ledger.lock(numbers[0])))
        ledger.register([row(seed=2, status="running")])
        assert [(run.home, run.status) for run in ledger.runs()] == [(1, "running"), (1, "finished"), (3, "dead")]
    assert [(run.status, run.cut_off) for run in ledger.runs()] == [("dead", True), ("finished", False), ("dead", True)]


def test_runs_cannot_be_seen_before_they_are_claimed(ledger: Ledger) -> None:
    ledger.register([row()])
    other = Ledger(ledger.folder)
    seen: list[int] = []
    ledger.register([row(seed=1)], lambda numbers: seen.extend([*numbers, len(other.runs())]))
    assert seen == [2, 1]
    assert len(other.runs()) == 2
    other.close()


def test_a_claim_that_fails_takes_the_register_back(ledger: Ledger) -> None:
    with ledger.lock(7), pytest.raises(UserError, match=f"is being trained by process {os.getpid()}; wait for it, or stop it"):
        ledger.register([row()], lambda _: ledger.lock(7).__enter__())
    assert ledger.runs() == []
    assert [path.name for path in ledger.folder.iterdir() if path.is_dir()] == ["7"]


def test_reopening_forgets_what_comes_after_the_checkpoint(ledger: Ledger) -> None:
    numbers = ledger.register([row(status="interrupted", error="KeyboardInterrupt"), row(seed=1, status="interrupted")])
    for number in (1, 2, 3):
        ledger.add_epochs({no: epoch(number) for no in numbers})
    ledger.reopen(numbers[:1], 2)
    assert [point.epoch for point in ledger.epochs(1)] == [1, 2]
    assert [point.epoch for point in ledger.epochs(2)] == [1, 2, 3]
    assert next((run.status, run.error, run.finished, run.resumed) for run in ledger.runs()) == ("dead", "", None, 1)


def test_reopening_at_an_epoch_that_is_not_on_record_is_refused_and_changes_nothing(ledger: Ledger) -> None:
    [no] = ledger.register([row(status="interrupted")])
    ledger.add_epochs({no: epoch(1)})
    with pytest.raises(UserError, match=r"run 1 stands at epoch 2, but \S+ knows 1 of them; repeat it with --again"):
        ledger.reopen([no], 2)
    assert (ledger.run(no).status, ledger.run(no).resumed) == ("interrupted", 0)


def test_a_ledger_of_the_first_schema_is_migrated_and_keeps_its_runs(tmp_path: Path) -> None:
    added = {"cohort": None, "threads": None, "resumed": 0, "networks": None, "record_hash": None}
    added |= {"top5": None, "macro_f1": None, "balanced_accuracy": None}
    old = {key: value for key, value in row().items() if key not in added}
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        for statement in MIGRATIONS[0]:
            db.execute(statement)
        db.execute("PRAGMA user_version=1")
        values = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in old.items()}
        db.execute(f"INSERT INTO runs ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", list(values.values()))
    db.close()
    ledger = Ledger(tmp_path)
    assert vars(ledger.run(1)) == {**old, "no": 1, **added}
    assert ledger.run(1).home == 1
    ledger.close()


def test_runs_are_filtered_by_columns(ledger: Ledger) -> None:
    ledger.register([row(), row(method="base"), row(method="base", seed=1), row(method="base", status="failed")])
    assert [found.no for found in ledger.runs(method="base")] == [2, 3, 4]
    assert [found.no for found in ledger.runs(method="base", status="finished", seed=1)] == [3]
    assert ledger.runs(method="at") == []


@pytest.mark.parametrize(
    ("correct", "images", "accuracy"), [(9_200, 10_000, 92.0), (0, 10_000, 0.0), (None, 10_000, None), (5, None, None), (0, 0, None)]
)
def test_accuracy_is_in_percent_or_none(correct: int | None, images: int | None, accuracy: float | None) -> None:
    assert run(correct=correct, images=images).accuracy == accuracy


def test_epochs_come_back_in_order(ledger: Ledger) -> None:
    ledger.register([row(), row(seed=1)])
    second, first = epoch(2, correct=None, terms={"task": 0.5}), epoch(1)
    other = epoch(1, phase="fsp", lr=0.001)
    ledger.add_epochs({1: second, 2: other})
    ledger.add_epochs({1: first})
    assert ledger.epochs(1) == [first, second]
    assert ledger.epochs(2) == [other]
    assert ledger.epochs(3) == []


def test_a_curve_of_a_diverged_run_keeps_what_is_not_finite(ledger: Ledger) -> None:
    ledger.register([row()])
    ledger.add_epochs({1: epoch(terms={"task": float("inf"), "fsp": float("nan")}, correct=None)})
    [found] = ledger.epochs(1)
    assert found.terms["task"] == float("inf")
    assert found.terms["fsp"] != found.terms["fsp"]
    assert found.correct is None


def test_one_epoch_twice_is_refused_whole(ledger: Ledger) -> None:
    ledger.register([row(), row(seed=1)])
    ledger.add_epochs({2: epoch()})
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add_epochs({1: epoch(), 2: epoch()})
    assert ledger.epochs(1) == []
    assert len(ledger.epochs(2)) == 1


@pytest.mark.parametrize(
    "bad", [row(started=None), row() | {"no_such_column": 1}, {"method": "fsp"}], ids=["no start", "unknown column", "columns missing"]
)
def test_a_failing_row_takes_all_of_its_register_back(ledger: Ledger, bad: dict[str, Any]) -> None:
    ledger.register([row(seed=5)])
    with pytest.raises(sqlite3.Error):
        ledger.register([row(seed=6), row(seed=7), bad])
    assert [found.seed for found in ledger.runs()] == [5]
    assert ledger.register([row(seed=8)]) == [2]


def test_an_error_of_the_caller_takes_all_of_its_register_back(ledger: Ledger) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield row()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.register(rows())
    assert ledger.runs() == []
    assert ledger.register([row()]) == [1]


def test_reopening_keeps_all(tmp_path: Path) -> None:
    first = Ledger(tmp_path, create=True)
    first.register([row(), row(seed=1)])
    first.add_epochs({1: epoch()})
    kept, curve = first.runs(), first.epochs(1)
    first.close()
    for create in (False, True):
        again = Ledger(tmp_path, create=create)
        assert (again.runs(), again.epochs(1)) == (kept, curve)
        again.close()
    last = Ledger(tmp_path)
    assert last.register([row()]) == [3]
    last.close()


def test_two_openings_see_what_the_other_writes(ledger: Ledger) -> None:
    ledger.register([row()])
    other = Ledger(ledger.folder)
    other.register([row(seed=1)])
    ledger.register([row(seed=2)])
    assert ledger.runs() == other.runs()
    assert [found.seed for found in other.runs()] == [0, 1, 2]
    other.close()


def test_two_that_opened_before_the_first_run_share_one_ledger(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "runs", create=True), Ledger(tmp_path / "runs", create=True)
    assert first.register([row(seed=0)]) == [1]
    assert second.register([row(seed=1)]) == [2]
    second.add_epochs({2: epoch()})
    assert [found.seed for found in first.runs()] == [0, 1]
    assert len(first.epochs(2)) == 1
    first.close()
    second.close()


def test_nothing_is_written_before_the_first_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs", create=True)
    assert ledger.runs() == []
    assert list(tmp_path.iterdir()) == []
    assert ledger.register([row()]) == [1]
    assert (tmp_path / "runs" / "ledger.db").is_file()
    ledger.close()


def test_the_folder_of_a_run_is_its_number(ledger: Ledger) -> None:
    assert ledger.run_folder(7) == ledger.folder / "7"


# Several writers


def write_much(folder: Path, writer: int, start: Any) -> None:
    start.wait(60)
    ledger = Ledger(folder, create=True)
    start.wait(60)  # all have opened a folder without a ledger, and now all make it at once
    for position in range(RUNS_EACH):
        [no] = ledger.register([row(seed=writer * RUNS_EACH + position, status="running")])
        for number in range(1, EPOCHS_EACH + 1):
            ledger.add_epochs({no: epoch(number, terms={"task": float(writer)})})
        ledger.update(no, status="finished")
    ledger.close()


def test_eight_processes_write_at_once_and_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(WRITERS)
    writers = [context.Process(target=write_much, args=(tmp_path / "runs", number, start)) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(90)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    ledger = Ledger(tmp_path / "runs")
    runs = ledger.runs()
    assert [found.no for found in runs] == list(range(1, WRITERS * RUNS_EACH + 1))
    assert sorted(found.seed for found in runs) == list(range(WRITERS * RUNS_EACH))
    assert {found.status for found in runs} == {"finished"}
    for found in runs:
        curve = ledger.epochs(found.no)
        assert [point.epoch for point in curve] == list(range(1, EPOCHS_EACH + 1))
        assert {point.terms["task"] for point in curve} == {float(found.seed // RUNS_EACH)}
    ledger.close()


def register_one(folder: Path, together: threading.Barrier) -> int:
    ledger = Ledger(folder, create=True)
    together.wait(60)
    [no] = ledger.register([row()])
    ledger.close()
    return no


def test_a_ledger_can_be_made_by_eight_at_once_again_and_again(tmp_path: Path) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for attempt in range(40):
            folder, together = tmp_path / str(attempt), threading.Barrier(WRITERS)
            numbers = [future.result() for future in [pool.submit(register_one, folder, together) for _ in range(WRITERS)]]
            assert sorted(numbers) == list(range(1, WRITERS + 1))


# What is no ledger


def test_a_folder_without_a_ledger_is_told_and_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    assert (
        complaint(folder)
        == f"no ledger in {folder}: train something first (flowdistill demo --runs {folder}), or name its folder with --runs"
    )
    assert not folder.exists()


@pytest.mark.parametrize("create", [False, True])
def test_file_that_is_no_database(tmp_path: Path, create: bool) -> None:
    content = b"this is no SQLite database\n" * 100
    (tmp_path / "ledger.db").write_bytes(content)
    line = complaint(tmp_path, create=create)
    assert line == f"{tmp_path / 'ledger.db'} cannot be used as a ledger (file is not a database); name another folder with --runs"
    assert (tmp_path / "ledger.db").read_bytes() == content


def test_database_of_something_else(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("CREATE TABLE runs (marathon TEXT)")
    db.close()
    assert "cannot be used as a ledger" in complaint(tmp_path)


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.write_text("a file")
    with pytest.raises(UserError) as error:
        Ledger(file, create=True).register([row()])
    assert str(error.value).startswith(f"{file / 'ledger.db'} cannot be used as a ledger (")


def test_ledger_of_a_newer_version(tmp_path: Path) -> None:
    Ledger(tmp_path, create=True).close()
    newer = len(MIGRATIONS) + 1
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute(f"PRAGMA user_version={newer}")
    db.close()
    expected = f"{tmp_path / 'ledger.db'} was made by a newer flowdistill (schema {newer}); upgrade this one"
    assert complaint(tmp_path) == expected
    assert complaint(tmp_path, create=True) == expected


# Numbers and repeats


def test_unknown_number_of_an_empty_ledger(ledger: Ledger) -> None:
    with pytest.raises(UserError) as error:
        ledger.run(1)
    assert str(error.value) == f"no run 1 in {ledger.path}: it has no runs yet; flowdistill runs --runs {ledger.folder} lists them"


@pytest.mark.parametrize("number", [0, 3, -1, 10**9])
def test_unknown_number(ledger: Ledger, number: int) -> None:
    ledger.register([row(), row(seed=1)])
    with pytest.raises(UserError) as error:
        ledger.run(number)
    assert str(error.value) == f"no run {number} in {ledger.path}: the last is 2; flowdistill runs --runs {ledger.folder} lists them"


def test_newest_keeps_the_last_of_a_fingerprint_and_seed() -> None:
    runs = [
        run(5, fingerprint="a", seed=0),
        run(1, fingerprint="a", seed=0),
        run(2, fingerprint="a", seed=1),
        run(3, fingerprint="b", seed=0),
        run(4, fingerprint="b", seed=0),
    ]
    assert [found.no for found in newest(runs)] == [2, 4, 5]
    assert newest([]) == []
