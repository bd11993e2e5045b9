"""Folders that hold no ledger, and what a full disk or a locked file does: one line, no traceback."""

from __future__ import annotations

import errno
import gc
import os
import shlex
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.command import assert_refused, command
from helpers.rows import row

from flowdistill.ledger import MIGRATIONS, Ledger
from flowdistill.ledger import store as ledger_module

SMALL = "--model resnet8 --epochs 1 --batch-size 64 --set data.pad=1 --dataset npz:small.npz"


def junk(path: Path) -> None:
    path.write_bytes(b"this is no database\n" * 500)


def of_300_runs(path: Path) -> None:
    ledger = Ledger(path.parent, create=True)
    ledger.register([row(seed=seed) for seed in range(300)])
    ledger.close()


def truncated(path: Path) -> None:
    of_300_runs(path)
    os.truncate(path, path.stat().st_size // 2)


def of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE runs (marathon TEXT)")


def of_another_program_with_our_number(path: Path) -> None:
    of_another_program(path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")


def newer(path: Path) -> None:
    Ledger(path.parent, create=True).register([row()])
    gc.collect()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA user_version=1000")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


OTHER = "name another folder with --runs"
NO_FILE = f"it/ledger.db cannot be used as a ledger (it is not a file); {OTHER}"
REBUILD = f"flowdistill ledger rebuild --runs it makes it again from the folders of its runs, or {OTHER}"
NONE = "no ledger in it: train something first (flowdistill demo --runs it), or name its folder with --runs"
READ: list[tuple[Callable[[Path], None], str]] = [
    (junk, f"it/ledger.db cannot be used as a ledger (file is not a database); {OTHER}"),
    (truncated, f"it/ledger.db cannot be used as a ledger (database disk image is malformed); {REBUILD}"),
    (of_another_program, f"it/ledger.db cannot be used as a ledger (it is another program's database); {OTHER}"),
    (of_another_program_with_our_number, f"it/ledger.db cannot be used as a ledger (it lacks the index 'runs_by_fingerprint'); {OTHER}"),
    (newer, "it/ledger.db was made by a newer flowdistill (schema 1000); upgrade this one"),
    (a_folder, NO_FILE),
    (a_pipe, NO_FILE),
]


@pytest.fixture
def folder(tmp_path: Path, small_npz: Path) -> Path:
    (tmp_path / "it").mkdir()
    (tmp_path / "small.npz").write_bytes(small_npz.read_bytes())
    return tmp_path


@pytest.mark.parametrize("words", ["runs", "table", "table --summary", "show 1", "evaluate 1"])
@pytest.mark.parametrize(("make", "line"), READ)
def test_what_is_no_ledger_is_not_read(folder: Path, make: Callable[[Path], None], line: str, words: str) -> None:
    make(folder / "it" / "ledger.db")
    assert_refused(folder, [*words.split(), "--runs", "it"], line)


@pytest.mark.parametrize(("make", "line"), READ)
def test_what_is_no_ledger_is_not_written(folder: Path, make: Callable[[Path], None], line: str) -> None:
    make(folder / "it" / "ledger.db")
    assert_refused(folder, [*shlex.split(f"train {SMALL}"), "--runs", "it"], line)


@pytest.mark.parametrize("listing", ["runs", "table"])
def test_damage_in_the_middle_is_found_out_by_the_first_query(folder: Path, listing: str) -> None:
    path = folder / "it" / "ledger.db"
    of_300_runs(path)
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])
    line = f"it/ledger.db cannot be read (database disk image is malformed); put a copy of it back, or {REBUILD}"
    assert_refused(folder, [listing, "--runs", "it"], line)


@pytest.mark.parametrize("below", ["small.npz", "small.npz/it", "small.npz/it/deeper"])
def test_a_folder_below_a_file_is_refused_before_anything_is_trained(folder: Path, below: str) -> None:
    line = f"{below}/ledger.db cannot be used as a ledger (small.npz is a file); {OTHER}"
    assert_refused(folder, [*shlex.split(f"train {SMALL}"), "--runs", below], line)


# What is nobody's mistake: exit 1


def failure(folder: Path) -> str:
    """The last line of a training that the machine did not allow; what it had begun goes on later."""
    said = command(folder, *shlex.split(f"train {SMALL}"))
    assert (said.code, said.out) == (1, "")
    assert "Traceback" not in said.err
    return said.err.splitlines()[-1]


CURE = "give the command again (finished runs are kept)"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_while_a_student_is_saved(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/1/student.safetensors")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[call], full)
    expected = f"flowdistill: runs/1/student.safetensors: No space left on device; make room there and {CURE}"
    assert failure(folder) == expected
    assert Ledger(folder / "runs").run(1).status == "interrupted"


def test_a_full_disk_while_the_ledger_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Ledger, "add_epochs", full)
    assert failure(folder) == f"flowdistill: the ledger: database or disk is full; make room there and {CURE}"
    assert Ledger(folder / "runs").run(1).status == "interrupted"


@pytest.fixture
def _locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another program holds the ledger for longer than anybody waits."""
    Ledger(folder / "runs", create=True).register([row()])
    gc.collect()
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(folder / "runs" / "ledger.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.mark.usefixtures("_locked")
def test_a_ledger_that_another_program_holds(folder: Path) -> None:
    assert failure(folder) == f"flowdistill: the ledger: runs/ledger.db: database is locked; mend that and {CURE}"


def test_a_folder_that_may_not_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is forbidden, so that the system's answer is played."""

    usual = Path.open

    def forbidden(path: Path, *mode: Any, **more: Any) -> Any:
        if path.suffix == ".npz":
            return usual(path, *mode, **more)
        raise PermissionError(errno.EACCES, "Permission denied", "runs/1")

    monkeypatch.setattr(Path, "open", forbidden)
    assert failure(folder) == f"flowdistill: runs/1/student.safetensors: Permission denied; mend that and {CURE}"
