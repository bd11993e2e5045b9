"""Attacks on records: ledgers and folders of runs that are gone, spoilt, swapped, hostile or read-only. Nothing of a run is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Said, command
from helpers.networks import NET
from helpers.rows import row
from helpers.small import Interrupt, config

from flowdistill.checks import UserError
from flowdistill.ledger import Epoch, Ledger, compare, rows
from flowdistill.ledger.rebuild import rebuild
from flowdistill.report import tables
from flowdistill.runner import execute, run
from flowdistill.runner.integrity import examine
from flowdistill.runner.watcher import Watcher

CPU = torch.device("cpu")


class Then(Watcher):
    """Something happens after the first epoch."""

    def __init__(self, what: Callable[[], object]) -> None:
        self.what, self.lines = what, list[str]()

    def say(self, line: str) -> None:
        self.lines.append(line)

    def report(self, report: Any) -> None:
        if report.epoch == 1:
            self.what()


def tiny(work: Path, data: Path, seed: int = 0, epochs: int = 3) -> Any:
    return config(data, student=f"{work}/nets.py:Tiny", method="base", seed=seed, train={"epochs": epochs})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_npz: Path) -> Path:
    """Runs 1 and 2 finished together, run 3 was cut off after its first epoch."""
    work = tmp_path_factory.mktemp("made")
    (work / "nets.py").write_text(NET)
    ledger = Ledger(work / "runs", create=True)
    run([tiny(work, small_npz, seed) for seed in (0, 1)], ledger, CPU)
    with pytest.raises(KeyboardInterrupt):
        run([tiny(work, small_npz, 2)], ledger, CPU, watcher=Interrupt())
    ledger.close()
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    return tmp_path


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    ledger = Ledger(folder)
    try:
        yield ledger
    finally:
        ledger.close()


def recorded(folder: Path) -> dict[int, tuple[dict[str, Any], list[Epoch], list[tuple[str, str]]]]:
    """All that a ledger says, and what ``check`` says of it."""
    with opened(folder) as ledger:
        return {
            one.no: (vars(one), ledger.epochs(one.no), [(found.file, found.verdict) for found in examine(one, ledger)])
            for one in ledger.runs()
        }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of every run."""
    return {str(path): path.read_bytes() for path in sorted(folder.glob("*/*")) if path.is_file() and not path.is_symlink()}


def sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def assert_one_line(said: Said, *parts: str, code: int = 2) -> None:
    assert (said.code, said.out) == (code, "")
    assert said.err.count("\n") == 1, said.err
    assert all(part in said.err for part in parts), said.err


# 1. A ledger that holds more than a ledger: refused before anything of it is read

HOSTILE = {
    "a trigger that rewrites old results": (
        "CREATE TRIGGER t AFTER UPDATE ON runs BEGIN UPDATE runs SET correct = 150 WHERE status = 'finished'; END",
    ),
    "a trigger on new epochs": ("CREATE TRIGGER t AFTER INSERT ON epochs BEGIN UPDATE runs SET correct = 150; END",),
    "an endless view in the place of the runs": (
        "ALTER TABLE runs RENAME TO other",
        "CREATE VIEW runs AS WITH RECURSIVE n(no) AS (SELECT 1 UNION ALL SELECT no + 1 FROM n) SELECT no, '' AS fingerprint FROM n",
    ),
    "a view beside the runs": ("CREATE VIEW other AS SELECT * FROM runs",),
    "a foreign table": ("CREATE TABLE other (a)",),
    "a virtual table": ("CREATE VIRTUAL TABLE other USING fts5(a)",),
    "a column more": ("ALTER TABLE runs ADD COLUMN other TEXT DEFAULT 'x'",),
    "a generated column": ("ALTER TABLE epochs ADD COLUMN other AS (epoch + 1)",),
    "an index on an expression": ("CREATE INDEX other ON runs (abs(correct))",),
    "a column renamed": ("ALTER TABLE runs RENAME COLUMN correct TO right",),
    "an index less": ("DROP INDEX runs_by_fingerprint",),
    "a table less": ("DROP TABLE epochs",),
    "a check that calls a function": (
        "PRAGMA writable_schema=ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'seed INTEGER NOT NULL', 'seed INTEGER NOT NULL CHECK (abs(seed) >= 0)')",
    ),
    "another default": (
        "PRAGMA writable_schema=ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'error TEXT NOT NULL DEFAULT ''''', 'error TEXT NOT NULL DEFAULT ''x''')",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_ledger_that_holds_more_is_refused_and_left_as_it_is(work: Path, what: str) -> None:
    path = work / "runs/ledger.db"
    before, files = recorded(work / "runs"), contents(work / "runs")
    sql(path, *HOSTILE[what])
    spoilt = path.read_bytes()
    for words in (["runs"], ["table"], ["show", "1"], ["check"], ["evaluate", "1"], ["resume"], ["train", "--dataset", "digits"]):
        said = command(work, *words)
        assert_one_line(said, "runs/ledger.db cannot be used as a ledger (it", "flowdistill ledger rebuild makes it again")
    assert path.read_bytes() == spoilt
    assert contents(work / "runs") == files
    said = command(work, "ledger", "rebuild")
    assert (said.code, said.err) == (0, "the old ledger is kept as runs/ledger.db.old\n")
    assert (work / "runs/ledger.db.old").read_bytes() == spoilt
    assert recorded(work / "runs") == before
    assert contents(work / "runs") == files


def test_statistics_of_analyze_are_no_attack(work: Path) -> None:
    sql(work / "runs/ledger.db", "ANALYZE")
    assert command(work, "runs").code == 0


# 2. A ledger that is gone or spoilt, beside the folders of its runs


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 999)


def zeroed_in_the_middle(path: Path) -> None:
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def without_its_rows(path: Path) -> None:
    sql(path, "DELETE FROM epochs", "DELETE FROM runs")


def anothers(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE runs (marathon TEXT)")
    db.close()


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.db")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


SPOILT = [Path.unlink, emptied, zeroed, halved, garbage, zeroed_in_the_middle, without_its_rows, anothers, a_link_to_nothing, a_folder]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_ledger_is_never_begun_at_1_beside_folders_of_runs(work: Path, small_npz: Path, spoil: Callable[[Path], None]) -> None:
    """One line, whatever is asked; the ledger made again says what the old one said, and training goes on from it."""
    before, files = recorded(work / "runs"), contents(work / "runs")
    spoil(work / "runs/ledger.db")
    small = ["--epochs", "1", "--batch-size", "64", "--set", "data.pad=1"]
    for words in (["runs"], ["table"], ["resume"], ["train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", *small]):
        assert_one_line(command(work, *words), "runs/ledger.db", "flowdistill ledger rebuild")
    assert contents(work / "runs") == files
    assert command(work, "ledger", "rebuild").code == 0
    assert recorded(work / "runs") == before
    assert contents(work / "runs") == files


def test_after_a_rebuild_tables_are_the_same_and_runs_go_on(made: Path, work: Path, small_npz: Path) -> None:
    with opened(work / "runs") as ledger:
        table = tables.log_table(ledger.runs(), "last", "md")
    (work / "runs/ledger.db").unlink()
    rebuild(work / "runs")
    with opened(work / "runs") as ledger:
        assert tables.log_table(ledger.runs(), "last", "md") == table
        lines = Then(lambda: None)
        found = run([tiny(made, small_npz, seed) for seed in (0, 1, 2, 3)], ledger, CPU, watcher=lines)
        assert [(one.no, one.status) for one in found] == [(1, "finished"), (2, "finished"), (3, "finished"), (4, "finished")]
        assert sum("has it already, skipped" in line for line in lines.lines) == 2
        assert "run 3: resumed after epoch 1 of 3" in lines.lines


def test_a_rebuild_needs_something_to_rebuild(tmp_path: Path) -> None:
    assert_one_line(command(tmp_path, "ledger", "rebuild", "--runs", "none"), "no folder in none says what its run was")
    (tmp_path / "runs/1").mkdir(parents=True)
    assert command(tmp_path, "runs").err.startswith("flowdistill: no ledger in runs: train something first")


# 3. Folders that were spoilt: each is told, the others are entered


def swapped(runs: Path) -> None:
    for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
        (runs / old).rename(runs / new)


def changed_record(runs: Path) -> None:
    path = runs / "1/run.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))


def record_of_junk(runs: Path) -> None:
    (runs / "1/run.json").write_bytes(b"{" * 100_000)


def record_gone_with_its_journal(runs: Path) -> None:
    for name in ("run.json", "journal.jsonl"):
        (runs / "1" / name).unlink()


def a_file_for_a_folder(runs: Path) -> None:
    shutil.rmtree(runs / "1")
    (runs / "1").write_text("a file")


LEFT: list[tuple[Callable[[Path], None], list[int], str]] = [
    (swapped, [1, 2], "is of run"),
    (record_gone_with_its_journal, [1], "there is no run.json and no journal.jsonl that says what it was"),
]


@pytest.mark.parametrize(("spoil", "numbers", "why"), LEFT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_does_not_say_what_it_was_is_told_and_left_alone(
    work: Path, spoil: Callable[[Path], None], numbers: list[int], why: str
) -> None:
    before = recorded(work / "runs")
    spoil(work / "runs")
    (work / "runs/ledger.db").unlink()
    files = contents(work / "runs")
    said = command(work, "ledger", "rebuild", "--format", "json")
    alone = {one["run"]: one["remark"] for one in json.loads(said.out) if one["status"] == "left alone"}
    assert said.code == 1
    assert list(alone) == numbers
    assert all(why in remark for remark in alone.values())
    assert recorded(work / "runs") == {no: of for no, of in before.items() if no not in numbers}
    assert contents(work / "runs") == files


@pytest.mark.parametrize("spoil", [changed_record, record_of_junk], ids=lambda spoil: spoil.__name__)
def test_a_record_that_was_changed_is_not_believed(work: Path, spoil: Callable[[Path], None]) -> None:
    """The journal still says that it was begun."""
    spoil(work / "runs")
    (work / "runs/ledger.db").unlink()
    entered, _ = rebuild(work / "runs")
    assert next((one.run, one.status, one.source) for one in entered) == (1, "running", "journal.jsonl")
    with opened(work / "runs") as ledger:
        assert ledger.run(1).seed == 0
        assert ledger.run(1).status == "dead"


def test_rows_whose_folders_are_gone_are_kept_from_the_old_ledger(work: Path) -> None:
    before = recorded(work / "runs")
    shutil.rmtree(work / "runs/1")
    a_file_for_a_folder_2 = work / "runs/2"
    shutil.rmtree(a_file_for_a_folder_2)
    a_file_for_a_folder_2.write_text("a file")
    entered, kept = rebuild(work / "runs")
    assert kept == work / "runs/ledger.db.old"
    assert [(one.run, one.source) for one in entered] == [(1, "the old ledger"), (2, "the old ledger"), (3, "journal.jsonl")]
    assert {no: of[:2] for no, of in recorded(work / "runs").items()} == {no: of[:2] for no, of in before.items()}


@pytest.mark.parametrize("bit", range(0, 2000, 200))
def test_a_line_of_a_journal_with_a_bit_flipped_is_told(work: Path, bit: int) -> None:
    path = work / "runs/3/journal.jsonl"
    content = bytearray(path.read_bytes())
    content[-1 - bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    (work / "runs/ledger.db").unlink()
    entered, _ = rebuild(work / "runs")
    assert "1 lines of journal.jsonl can't be read" in entered[2].remark


def test_a_journal_goes_on_after_a_line_that_was_cut_off(work: Path, made: Path, small_npz: Path) -> None:
    path = work / "runs/3/journal.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    with opened(work / "runs") as ledger:
        run([tiny(made, small_npz, 2)], ledger, CPU)
    before = recorded(work / "runs")
    (work / "runs/ledger.db").unlink()
    rebuild(work / "runs")
    assert recorded(work / "runs") == before


def test_a_ledger_is_not_rebuilt_while_somebody_trains_there(work: Path) -> None:
    with opened(work / "runs") as ledger, ledger.lock(3):
        assert_one_line(command(work, "ledger", "rebuild"), "run 3 in runs is being trained by another process")
    assert not (work / "runs/ledger.db.old").exists()


# 4. A new run never takes a folder that exists


@pytest.mark.parametrize("there", ["a folder", "a file", "a link to nothing"])
def test_numbers_go_on_after_whatever_is_there(ledger: Ledger, there: str) -> None:
    ledger.register([row()])
    place = ledger.folder / "7"
    {"a folder": place.mkdir, "a file": place.touch, "a link to nothing": lambda: place.symlink_to("gone")}[there]()
    assert ledger.register([row(seed=1), row(seed=2)]) == [8, 9]


def test_numbers_are_not_given_twice(ledger: Ledger) -> None:
    ledger.register([row(), row(seed=1)])
    sql(ledger.path, "DELETE FROM runs WHERE no = 2")
    shutil.rmtree(ledger.run_folder(2))
    assert ledger.register([row(seed=2)]) == [3]


# 5. A ledger that goes while training


def deleted(runs: Path) -> None:
    for path in runs.glob("ledger.db*"):
        path.unlink()


def deleted_without_companions(runs: Path) -> None:
    (runs / "ledger.db").unlink()


def wal_deleted(runs: Path) -> None:
    (runs / "ledger.db-wal").unlink()


def replaced_by_a_copy(runs: Path) -> None:
    shutil.copy(runs / "ledger.db", runs / "copy")
    (runs / "copy").rename(runs / "ledger.db")


def replaced_by_anothers(runs: Path) -> None:
    deleted(runs)
    other = Ledger(runs.parent / "other", create=True)
    other.register([row(seed=seed) for seed in range(9)])
    other.close()
    (runs.parent / "other/ledger.db").rename(runs / "ledger.db")


def truncated(runs: Path) -> None:
    os.truncate(runs / "ledger.db", 0)


def overwritten_by_an_older_one(runs: Path) -> None:
    deleted(runs)
    shutil.copy(runs.parent / "older.db", runs / "ledger.db")


GOES = [deleted, deleted_without_companions, wal_deleted, replaced_by_a_copy, replaced_by_anothers, truncated, overwritten_by_an_older_one]


@pytest.mark.parametrize("spoil", GOES, ids=lambda spoil: spoil.__name__)
def test_a_ledger_that_goes_while_training_is_noticed_and_nothing_is_lost(
    made: Path, work: Path, small_npz: Path, spoil: Callable[[Path], None]
) -> None:
    shutil.copy(work / "runs/ledger.db", work / "older.db")
    ledger = Ledger(work / "runs")
    wanted = [tiny(made, small_npz, 5, epochs=4)]
    with pytest.raises(
        UserError, match=r"ledger.db was (deleted|replaced|truncated|damaged.*) while run 4 was trained; its folder has all"
    ):
        run(wanted, ledger, CPU, watcher=Then(lambda: spoil(work / "runs")))
    ledger.close()
    rebuild(work / "runs")
    with opened(work / "runs") as ledger:
        assert [epoch.epoch for epoch in ledger.epochs(4)] == [1, 2]
        lines = Then(lambda: None)
        (done,) = run(wanted, ledger, CPU, watcher=lines)
        assert "run 4: resumed after epoch 2 of 4" in lines.lines
    with opened_new(work / "straight") as straight:
        (expected,) = run(wanted, straight, CPU)
        assert (done.no, done.weights_hash, done.correct) == (4, expected.weights_hash, expected.correct)


@contextlib.contextmanager
def opened_new(folder: Path) -> Iterator[Ledger]:
    ledger = Ledger(folder, create=True)
    try:
        yield ledger
    finally:
        ledger.close()


# 6. One damaged row closes nothing

DAMAGE = {
    "config": ("'{'", "config: '{' is not a JSON object"),
    "config ": ("'{}'", "config: it has no table 'train'"),
    "versions": ("'[]'", "versions: '[]' is not a JSON object"),
    "networks": ("'{\"student\": 5}'", "networks: 'student' is no network"),
    "status": ("'done'", "status: 'done' is none"),
    "seed": ("'x'", "seed: 'x' is not a whole number"),
    "correct": ("1.5", "correct: 1.5 is not a whole number"),
    "lr": ("x'00'", "lr: b'\\x00' is not a number"),
    "student": ("CAST(x'ff' AS TEXT)", "student: '\\udcff' is not text"),
    "started": ("x'ff'", "started: b'\\xff' is not text"),
}


@pytest.mark.parametrize("column", DAMAGE)
def test_a_damaged_row_is_shown_as_damaged_and_closes_nothing(work: Path, made: Path, small_npz: Path, column: str) -> None:
    value, why = DAMAGE[column]
    before = recorded(work / "runs")
    sql(work / "runs/ledger.db", f"UPDATE runs SET {column} = {value} WHERE no = 2")
    for all_ in ([], ["--all"]):
        listed = json.loads(command(work, "runs", "--format", "json", *all_).out)
        assert [one["status"] for one in listed] == ["finished", "damaged", "interrupted"]
        assert listed[1]["error"] == why
    assert [one["no"] for one in json.loads(command(work, "table", "--format", "json").out)] == [1]
    assert command(work, "table", "--summary").code == 0
    assert command(work, "show", "1").code == command(work, "check", "1").code == 0
    assert_one_line(command(work, "show", "2"), "run 2 is damaged in runs/ledger.db", "flowdistill ledger rebuild makes its row again")
    assert '"changed"' in command(work, "check", "--format", "json").out
    with opened(work / "runs") as ledger:
        (done,) = execute.resume(ledger, CPU)
        assert (done.no, done.status) == (3, "finished")
    rebuild(work / "runs")
    after = recorded(work / "runs")
    assert {no: after[no] for no in (1, 2)} == {no: before[no] for no in (1, 2)}


@pytest.mark.parametrize("value", ["'{'", "'[]'", '\'{"task": "x"}\'', "x'00'"])
def test_a_damaged_epoch_is_told_by_its_run_alone(work: Path, value: str) -> None:
    sql(work / "runs/ledger.db", f"UPDATE epochs SET terms = {value} WHERE run = 1 AND epoch = 2")
    assert_one_line(command(work, "show", "1"), "epoch 2 of run 1 is damaged in runs/ledger.db (terms: ")
    for words in (["runs"], ["table"], ["show", "2"], ["check"]):
        assert command(work, *words).code == 0
    rebuild(work / "runs")
    assert command(work, "show", "1").code == 0


def test_a_row_that_was_rewritten_is_told_by_check(work: Path) -> None:
    sql(work / "runs/ledger.db", "UPDATE runs SET correct = 149 WHERE no = 1")
    said = command(work, "check", "1")
    assert said.code == 1
    assert "correct 149, run.json says" in said.out


# 7. Read-only, another user's


EACH = """
import json, subprocess, sys
from pathlib import Path
from helpers.command import command

for words in json.loads(sys.argv[1]):
    subprocess.run(words, check=True) if words[0] == "mount" else print(json.dumps(command(Path(), *words)))
"""


def mounted(folder: Path, *commands: list[str]) -> list[Said]:
    """Commands in a folder, one after the other in one process; those that mount something are seen by nobody else."""
    words = ["unshare", "-m", "sh", "-c", 'cd "$0" && exec "$@"', folder, sys.executable, "-c", EACH, json.dumps(commands)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Said(*json.loads(line)) for line in done.stdout.splitlines()]


def read_only(folder: Path, *commands: list[str]) -> list[Said]:
    """Commands that see the runs in a folder mounted read-only."""
    return mounted(folder, ["mount", "--bind", "runs", "runs"], ["mount", "-o", "remount,ro,bind", "runs"], *commands)


READS = [["table", "--summary"], ["show", "1"], ["check"], ["evaluate", "1"], ["taps", "1"]]


def mounts() -> bool:
    """Whether this process may mount."""
    return bool(shutil.which("unshare")) and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not mounts(), reason="this process may not mount a folder read-only")
def test_a_ledger_in_a_read_only_place_is_read_by_what_only_reads(work: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With what another process wrote beside the file and did not merge; not a byte is written."""
    wanted = [command(work, *words) for words in READS]
    out = tmp_path_factory.mktemp("out") / "x.safetensors"
    with closing(sqlite3.connect(work / "runs/ledger.db", isolation_level=None)) as writer:
        writer.execute("UPDATE runs SET error = 'told beside' WHERE no = 3")
        assert (work / "runs/ledger.db-wal").stat().st_size
        before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        export = ["export", "1", "--to", "safetensors", "--out", str(out)]
        *read, exported, listed, refused = read_only(work, *READS, export, ["runs"], ["resume"])
        assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    assert read == wanted
    assert exported.code == 0
    assert out.is_file()
    assert "told beside" in listed.out
    assert_one_line(refused, "runs/ledger.db cannot be written (you may not write it); name another folder with --runs")


@pytest.mark.skipif(not mounts(), reason="this process may not mount a small disk")
def test_a_full_disk_loses_nothing(tmp_path: Path, small_npz: Path) -> None:
    """One line while it is full; with room there the run goes on to its end."""
    (tmp_path / "runs").mkdir()
    small = "--epochs 3 --batch-size 64 --set data.pad=1 --deterministic"
    train = ["train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", *small.split()]
    disk, larger = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", "runs"], ["mount", "-o", "remount,size=64m", "runs"]
    show = ["show", "1", "--format", "csv"]
    full, again, checked, shown = mounted(tmp_path, disk, train, larger, train, ["check"], show)
    assert (full.code, full.out) == (1, "")
    assert "Traceback" not in full.err
    assert "No space left on device; make room there and give the command again" in full.err.splitlines()[-1]
    assert again.code == checked.code == 0, again.err
    assert [line.split()[:2] for line in again.out.splitlines()[1:]] == [["1", "finished"]]
    assert len(shown.out.splitlines()) == 4


def test_an_old_ledger_that_may_not_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(Path(__file__).parent / "ledgers/6ed4590.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    before = (tmp_path / "runs/ledger.db").read_bytes()
    monkeypatch.setattr("flowdistill.ledger.store._hindrance", lambda _: "you may not write it")
    with opened(tmp_path / "runs") as ledger:
        assert len(ledger.runs()) == 6
    assert (tmp_path / "runs/ledger.db").read_bytes() == before


def test_folders_of_an_old_version_are_rebuilt_as_far_as_they_say(tmp_path: Path) -> None:
    """Four finished runs have a record; of two that were cut off nothing says what they were. With the old ledger nothing is missing."""
    with tarfile.open(Path(__file__).parent / "ledgers/6ed4590.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "runs/ledger.db"
    before, old = recorded(tmp_path / "runs"), path.read_bytes()
    path.unlink()
    entered, kept = rebuild(tmp_path / "runs")
    assert kept is None
    assert [(one.run, one.status) for one in entered] == [*((no, "finished") for no in range(1, 5)), (5, "left alone"), (6, "left alone")]
    assert entered[0].remark == "no curve: an older version wrote it, without journal.jsonl"
    after = recorded(tmp_path / "runs")
    assert {no: of[0] for no, of in after.items()} == {no: of[0] for no, of in before.items() if no < 5}
    assert {verdict for _, _, found in after.values() for _, verdict in found} == {"not verified"}
    path.write_bytes(old)
    rebuild(tmp_path / "runs")
    assert recorded(tmp_path / "runs") == before


def test_a_ledger_that_may_not_be_written_is_read_from_a_copy(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.ledger.store._hindrance", lambda _: "you may not write it")
    before = (work / "runs/ledger.db").read_bytes()
    with opened(work / "runs") as ledger:
        assert [one.no for one in ledger.runs()] == [1, 2, 3]
        with pytest.raises(UserError, match="cannot be written"):
            ledger.register([row()])
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            ledger.update(1, error="x")
    assert (work / "runs/ledger.db").read_bytes() == before


# 8. Two processes


def test_equal_commands_at_one_moment_train_once(made: Path, tmp_path: Path, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have planned before either registers: the one that comes second begins anew, and finds what the first does."""
    wanted = [tiny(made, small_npz, 0), tiny(made, small_npz, 1)]
    original, others = execute.prepare, []

    def late(*args: Any) -> Any:
        prepared = original(*args)
        if not others:
            others.append(None)
            with opened_new(tmp_path / "runs") as other:
                others[0] = run(wanted[1:], other, CPU)
        return prepared

    monkeypatch.setattr(execute, "prepare", late)
    with opened_new(tmp_path / "runs") as ledger:
        found = run(wanted, ledger, CPU)
        assert [one.no for one in found] == [2, 1]
        assert [one.no for one in ledger.runs()] == [1, 2]


def test_what_another_trains_since_it_was_planned_is_told(
    made: Path, tmp_path: Path, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [tiny(made, small_npz, 0, epochs=2)]
    reached, go_on, original = threading.Event(), threading.Event(), execute.prepare
    told: list[str] = []

    def second() -> None:
        with opened(tmp_path / "runs") as ledger, contextlib.suppress(UserError):
            try:
                run(wanted, ledger, CPU)
            except UserError as error:
                told.append(str(error))
        go_on.set()

    def late(*args: Any) -> Any:
        prepared = original(*args)
        if threading.current_thread() is not threading.main_thread() and not reached.is_set():
            reached.set()
            registered.wait(60)
        return prepared

    registered = threading.Event()
    monkeypatch.setattr(execute, "prepare", late)
    Ledger(tmp_path / "runs", create=True).register([])
    other = threading.Thread(target=second)
    other.start()
    reached.wait(60)

    def meanwhile() -> None:
        registered.set()
        go_on.wait(60)

    with opened(tmp_path / "runs") as ledger:
        run(wanted, ledger, CPU, watcher=Then(meanwhile))
        assert [one.no for one in ledger.runs()] == [1]
    other.join(60)
    assert len(told) == 1
    assert "another process trains it as run 1; wait for that, or repeat it with --again" in told[0]


# 9. Scale: what is counted, not timed


def counted(monkeypatch: pytest.MonkeyPatch, groups: int) -> dict[str, int]:
    """How often the costly things are done for a summary and a log of so many groups of three."""
    runs = [
        dataclasses.replace(one, no=3 * group + seed + 1, seed=seed, fingerprint=f"{group}")
        for group in range(groups)
        for one in [rows.run_of({"no": 1, **rows.encoded(row(lr=0.1 + group * 1e-3))})]
        for seed in range(3)
    ]
    found = {"validate": 0, "flattened": 0, "dumps": 0}

    def counting(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def count(*args: Any, **keys: Any) -> Any:
            found[name] += 1
            return original(*args, **keys)

        return count

    with monkeypatch.context() as patch:
        patch.setattr(compare, "validate", counting(compare, "validate"))
        patch.setattr(tables, "flattened", counting(tables, "flattened"))
        patch.setattr(json, "dumps", counting(json, "dumps"))
        tables.summary_table(runs, "last", "md")
        tables.log_table(runs, "last", "md")
    return found


def test_tables_grow_with_the_groups_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = counted(monkeypatch, 20), counted(monkeypatch, 80)
    assert all(many[name] <= 4 * few[name] for name in few), (few, many)
    assert few["validate"] == 20


def test_a_list_reads_no_json_of_runs_that_it_only_counts(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.register([row(seed=seed) for seed in range(30)])
    loads: list[str] = []
    monkeypatch.setattr(rows.json, "loads", lambda text, original=json.loads: loads.append(text) or original(text))
    tables.summary_table(ledger.listing(), "last", "md")
    assert len(loads) == 2, "config and versions of the one run that stands for all"


def test_runs_shows_the_last_hundred_and_says_how_many_there_are(ledger: Ledger) -> None:
    ledger.register([row(seed=seed) for seed in range(130)])
    said = command(ledger.folder.parent, "runs", "--format", "json")
    assert [one["no"] for one in json.loads(said.out)] == list(range(31, 131))
    assert said.err == "the last 100 of 130 runs; --last N shows more, --all all\n"
    said = command(ledger.folder.parent, "runs", "--last", "2", "--format", "json")
    assert [one["no"] for one in json.loads(said.out)] == [129, 130]
    said = command(ledger.folder.parent, "runs", "--all", "--format", "json")
    assert (len(json.loads(said.out)), said.err) == (130, "")
