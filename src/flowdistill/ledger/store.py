"""The file of a ledger: runs are registered there, epochs added, rows read."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .. import advice
from ..checks import Changes, UserError, obstacle
from ..lock import Lock, held
from . import folders, network_file_system
from .rows import BRIEF, DAMAGED, DEAD, Brief, Epoch, Run, encoded, epoch_of, insert, run_of, sound_sql
from .schema import MIGRATIONS, migrate, refuse_foreign, version

BUSY_SECONDS = 30
SETTLED_SECONDS = 0.05  # a file that did not change for so long before it was copied did not change within one tick of its clock either
NAME = "ledger.db"
COMPANIONS = ("", "-wal", "-shm")  # the file's, which SQLite makes


class LostError(UserError):
    """The ledger is no longer the file that this process wrote."""


class Ledger:
    """The runs below one folder: ``ledger.db`` and a folder for each run's files."""

    def __init__(self, folder: Path, *, create: bool = False, changes: Changes | None = None) -> None:
        """Open the ledger of a folder. One that may not be written is read as it is at this moment.

        Args:
            create: there need be no ledger yet; the first run that registers makes it.
            changes: is asked if something recorded is used again and has changed. Default: that is refused.

        Raises:
            UserError: there is no ledger and ``create`` is False, or there are folders of runs without a ledger, or the file is no ledger,
                or it holds more than a ledger does, or a newer version made it.
        """
        self.folder, self.path, self.changes = folder, folder / NAME, changes or Changes()
        self.unwritable = ""  # why nothing can be written, where that is so
        self._on_disk = False
        if not self.path.is_file():
            self._refuse_orphans()
        if self.path.is_file():
            self._open()
        elif hindrance := obstacle(self.path):
            raise UserError(f"{self.path} cannot be used as a ledger ({hindrance}); name another folder with --runs")
        elif not create:
            raise UserError(f"no ledger in {folder}: train something first ({advice.demo(folder)}), or name its folder with --runs")
        else:
            self._db = connect(":memory:")
            migrate(self._db)

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.unwritable = _hindrance(self.path)
            if self.unwritable:
                self._db = snapshot(self.path)
                return
            if self.path.exists():
                with closing(connect(self.path, "ro")) as looked_at:  # read-only: closing it leaves the file as it is
                    refuse_foreign(looked_at, self.path)
            self._db = connect(self.path)
            _set_journal(self._db, "DELETE" if network_file_system.kind(self.folder) else "WAL")
            self._migrate()
            stat = self.path.stat()
            self._file, self._size, self._on_disk = (stat.st_dev, stat.st_ino), stat.st_size, True
        except (sqlite3.Error, OSError) as error:
            self.close()
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path} cannot be used as a ledger ({why}); {self._cure()}") from None
        self._refuse_orphans()

    def _cure(self) -> str:
        """What the user can do if the file can't be read."""
        another = "name another folder with --runs"
        if not _first(folders.runs_in(self.folder)):
            return another
        return f"{advice.rebuild(self.folder)} makes it again from the folders of its runs, or {another}"

    def _refuse_orphans(self) -> None:
        """Refuse folders of runs without a ledger, or with one that has no runs: it would number runs from 1 again.

        Raises:
            UserError: that is so.
        """
        opened = hasattr(self, "_db")
        if opened and self._has_runs():
            return
        orphan = _first(folders.runs_in(self.folder))
        if not orphan or (not opened and self.path.is_file()):  # another process has just made it
            return
        if self._on_disk:
            with self._write():  # whoever registers the first runs now is waited for: it made the folders
                if self._has_runs():
                    return
        state = "holds no run" if self.path.is_file() else "is gone"
        raise UserError(
            f"{self.path} {state}, but {self.folder / str(orphan)} is the folder of one: put the ledger back, or make it again from the "
            f"folders with {advice.rebuild(self.folder)}"
        )

    def _has_runs(self) -> bool:
        return bool(self._read("SELECT 1 FROM runs LIMIT 1"))

    def _migrate(self) -> None:
        if version(self._db) < len(MIGRATIONS):
            with self._write():
                migrate(self._db)

    @contextmanager
    def _write(self) -> Iterator[None]:
        """One transaction that takes the write lock at once: a deferred one fails when another writer comes between.

        Raises:
            sqlite3.OperationalError: it can't be written, with the file's path.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise sqlite3.OperationalError(f"{self.path}: {error}") from error

    def run_folder(self, no: int) -> Path:
        """Where a run's files lie."""
        return self.folder / str(no)

    def lock(self, home: int) -> Lock:
        """The lock that the process which trains a cohort holds."""
        return Lock(self.run_folder(home) / folders.LOCK_FILE)

    def refuse_unwritable(self) -> None:
        """Whoever is going to write calls this before it works for hours.

        Raises:
            UserError: this ledger can only be read.
        """
        if self.unwritable:
            raise UserError(f"{self.path} cannot be written ({self.unwritable}); name another folder with --runs")

    def register(
        self,
        rows: Iterable[Mapping[str, Any]],
        claim: Callable[[Sequence[int]], object] = lambda _: None,
        first: Callable[[], object] = lambda: None,
    ) -> list[int]:
        """Enter the runs of a new cohort as running, all or none, and return their numbers in order. Each gets a new folder.

        ``first`` is called once nobody else can register any more. ``claim`` gets the numbers before anybody can see the runs: whoever
        trains them takes the lock there.
        """
        self.refuse_unwritable()
        if not self._on_disk:
            self.close()
            self._open()
        numbers: list[int] = []
        try:
            with self._write():
                first()
                after = self.last_number()
                for no, row in enumerate(rows, after + 1):
                    values = {"no": no, "status": "running", **row, "cohort": after + 1}
                    self._db.execute(*insert("runs", values))
                    self.run_folder(no).mkdir()
                    numbers.append(no)
                    folders.note(self.run_folder(no), row=vars(self._whole(no)))
                if numbers:
                    claim(numbers)
        except BaseException:
            for no in numbers:
                shutil.rmtree(self.run_folder(no), ignore_errors=True)
            raise
        return numbers

    def enter(self, runs: Mapping[int, tuple[Run, Sequence[Epoch]]], drafts: Path, after: int, replaced: Collection[int] = ()) -> None:
        """Enter runs that were recorded elsewhere, all or none.

        Args:
            runs: number -> row and curve.
            drafts: holds a folder for each of them, which becomes the run's.
            after: the largest number here when the runs got theirs.
            replaced: numbers whose run gives way.

        Raises:
            UserError: another process has registered a run since.
            OSError: a folder can't be put in its place.
        """
        self.refuse_unwritable()
        if not self._on_disk:
            self.close()
            self._open()
        old, placed = drafts / "replaced", list[int]()
        try:
            with self._write():
                if self.last_number() != after:
                    raise UserError(f"another process has begun a run in {self.folder} meanwhile; give the command again")
                for no in replaced:
                    self._db.execute("DELETE FROM epochs WHERE run = ?", (no,))
                    self._db.execute("DELETE FROM runs WHERE no = ?", (no,))
                    if self.run_folder(no).exists():
                        old.mkdir(exist_ok=True)
                        self.run_folder(no).rename(old / str(no))
                for no, (run, curve) in runs.items():
                    self._db.execute(*insert("runs", vars(run)))
                    epochs = [encoded({"run": no, **vars(epoch)}) for epoch in curve]
                    if epochs:
                        self._db.executemany(insert("epochs", epochs[0])[0], epochs)
                    (drafts / str(no)).rename(self.run_folder(no))
                    placed.append(no)
        except BaseException:
            for no in placed:
                shutil.rmtree(self.run_folder(no), ignore_errors=True)
            for no in replaced:
                if (old / str(no)).exists():
                    (old / str(no)).rename(self.run_folder(no))
            raise

    def last_number(self) -> int:
        """The largest number that a run had or a folder has."""
        rows = "SELECT max(no) FROM runs UNION ALL SELECT max(CAST(seq AS INTEGER)) FROM sqlite_sequence WHERE name = 'runs'"
        known = [int(no) for (no,) in self._db.execute(rows) if no]
        return max([0, *known, *folders.numbers(self.folder)[-1:]])

    def reopen(self, numbers: Sequence[int], epochs: int) -> None:
        """Mark runs as running again, and delete what was recorded after so many epochs. An epoch that the ledger lacks is taken from the
        run's folder.

        Raises:
            UserError: one of the first ``epochs`` is not on record; then nothing is changed.
        """
        self.refuse_unwritable()
        with self._write():
            for no in numbers:
                self._db.execute("DELETE FROM epochs WHERE run = ? AND epoch > ?", (no, epochs))
                self._complete(no, epochs)
                known = self._db.execute("SELECT count(*) FROM epochs WHERE run = ?", (no,)).fetchone()[0]
                if known != epochs:
                    raise UserError(f"run {no} stands at epoch {epochs}, but {self.path} knows {known} of them; repeat it with --again")
                query = "UPDATE runs SET status = 'running', error = '', finished = NULL, resumed = resumed + 1 WHERE no = ?"
                self._db.execute(query, (no,))
            for no in numbers:
                self._reopen_journal(no)

    def _reopen_journal(self, no: int) -> None:
        """Write the journal anew: a run of an older version has none, and another may be damaged."""
        folder = self.run_folder(no)
        folder.mkdir(exist_ok=True)
        folders.note(folder, row=vars(self._whole(no)))
        folders.note(folder, reopened=0)
        for epoch in self.epochs(no):
            folders.note(folder, epoch=vars(epoch))

    def _complete(self, no: int, epochs: int) -> None:
        for number, values in folders.read_journal(self.run_folder(no)).curve.items():
            if number <= epochs:
                with contextlib.suppress(sqlite3.IntegrityError):  # it is there
                    self._db.execute(*insert("epochs", {"run": no, **values}))

    def add_epochs(self, epochs: Mapping[int, Epoch]) -> None:
        """Record an epoch of each of these runs (number -> epoch): first in their folders, then here in one transaction.

        Raises:
            LostError: the ledger is gone, or another file; the folders have the epoch.
        """
        for no, epoch in epochs.items():
            folders.note(self.run_folder(no), epoch=vars(epoch))
        with self._unless_lost({no: epoch.epoch for no, epoch in epochs.items()}), self._write():
            for no, epoch in epochs.items():
                self._db.execute(*insert("epochs", {"run": no, **vars(epoch)}))

    def update(self, no: int, **values: Any) -> None:
        """Set columns of a run."""
        folders.note(self.run_folder(no), row=values)
        with self._write():
            self._set(no, values)

    def write_record(self, no: int, write: Callable[[], str], **values: Any) -> None:
        """Call ``write``, which writes a run's record and returns its hash; enter that and further columns. Nobody else writes meanwhile.

        Raises:
            LostError: the ledger is gone, or another file; the folder has the record.
        """
        with self._unless_lost({no: 0}), self._write():
            self._set(no, values | {"record_hash": write()})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, nobody else writes to the ledger or to the files that go with it."""
        self.refuse_unwritable()
        with self._write():
            yield

    def _set(self, no: int, values: Mapping[str, Any]) -> None:
        assignments = ", ".join(f"{column} = :{column}" for column in values)
        if self._db.execute(f"UPDATE runs SET {assignments} WHERE no = :no", encoded(values) | {"no": no}).rowcount != 1:
            raise KeyError(f"no run {no} to update in {self.path}")

    @contextmanager
    def _unless_lost(self, epochs: Mapping[int, int]) -> Iterator[None]:
        """Inside is a write, after which the ledger is checked. If the write failed because the ledger was lost, the error says so."""
        try:
            yield
        except (sqlite3.Error, KeyError):
            self._refuse_lost(dict.fromkeys(epochs, 0))
            raise
        self._refuse_lost(epochs)

    def _refuse_lost(self, epochs: Mapping[int, int]) -> None:
        """Check that whoever opens the ledger now finds these runs at these epochs (run -> epoch). It may have been deleted, replaced or
        cut off meanwhile, and this process would go on with a file that has no name.

        Raises:
            LostError: it was.
        """
        try:
            stat = self.path.stat()
            lost = "replaced" if (stat.st_dev, stat.st_ino) != self._file else "truncated" if stat.st_size < self._size else ""
            self._size = stat.st_size
            if not lost and not self._stands(epochs):
                lost = "replaced"
        except FileNotFoundError:
            if not self.folder.is_dir():
                cure = f"put it back, then {advice.resume_all(self.folder)} goes on"
                raise LostError(f"{self.folder} is gone, where run {min(epochs)} was trained; {cure}") from None
            lost = "deleted"
        except sqlite3.Error as error:
            lost = f"damaged ({error})"
        if lost:
            raise LostError(
                f"{self.path} was {lost} while run {min(epochs)} was trained; its folder has all of it: {advice.rebuild(self.folder)} "
                f"makes the ledger again, then {advice.resume_all(self.folder)} goes on"
            )

    def _stands(self, epochs: Mapping[int, int]) -> bool:
        query = "SELECT fingerprint, seed, started, (SELECT max(epoch) FROM epochs WHERE run = no) FROM runs WHERE no = ?"
        with closing(connect(self.path, "ro")) as fresh:
            for no, epoch in epochs.items():
                open_row, file_row = (db.execute(query, (no,)).fetchone() for db in (self._db, fresh))
                if file_row is None or tuple(open_row or ()) != tuple(file_row) or (file_row[3] or 0) < epoch:
                    return False
        return True

    def _read(self, query: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """The rows of a query. Damage to a file often shows only here."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            if "decode" not in str(error):
                raise
            self._db.text_factory = _escaped  # slower, and asked for by damaged rows alone
            return self._read(query, values)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} cannot be read ({error}); put a copy of it back, or {self._cure()}") from None

    def runs(self, **equal: Any) -> list[Run]:
        """Runs whose columns have these values, by number. Damaged rows are left out. A run that is recorded as running, but that nobody
        trains, has the status ``dead``.
        """
        where = " AND ".join(f"{column} = :{column}" for column in equal) or "1"
        runs = [run_of(row) for row in self._read(f"SELECT * FROM runs WHERE {where} ORDER BY no", encoded(equal))]
        return self._with_dead([run for run in runs if run.status != DAMAGED])

    def listing(self, last: int | None = None) -> list[Run]:
        """Every run by number, or the last ``last`` of them, damaged ones too. A listing of all reads only what lists and tables show,
        and the rest when somebody asks for it.
        """
        if last is not None:
            rows = self._read("SELECT * FROM (SELECT * FROM runs ORDER BY no DESC LIMIT ?) ORDER BY no", (last,))
            return self._with_dead([run_of(row) for row in rows])
        rows = self._read(f"SELECT {', '.join(BRIEF)}, {sound_sql()} AS sound FROM runs ORDER BY no")
        plain = self._db.text_factory is str
        return self._with_dead([Brief(row, self._whole) if row["sound"] and plain else self._whole(row["no"]) for row in rows])

    def count(self) -> int:
        """How many runs there are."""
        return int(self._read("SELECT count(*) FROM runs")[0][0])

    def strangers(self) -> list[int]:
        """The numbers of run folders without a row, as after an older copy of the ledger was put back."""
        known = {no for (no,) in self._read("SELECT no FROM runs")}
        return [no for no in folders.runs_in(self.folder) if no not in known]

    def _whole(self, no: int) -> Run:
        return run_of(self._read("SELECT * FROM runs WHERE no = ?", (no,))[0])

    def _alive(self, home: int) -> bool:
        return held(self.run_folder(home) / folders.LOCK_FILE)

    def _with_dead(self, runs: list[Run]) -> list[Run]:
        alive = {home: self._alive(home) for home in {run.home for run in runs if run.status == "running"}}
        for run in runs:
            if run.status == "running" and not alive[run.home]:
                object.__setattr__(run, "status", DEAD)  # nobody else has it yet
        return runs

    def run(self, no: int) -> Run:
        """One run.

        Raises:
            UserError: no such number, or its row is damaged.
        """
        rows = self._read("SELECT * FROM runs WHERE no = ?", (no,)) if no < 2**63 else []
        if not rows:
            last = self._read("SELECT max(no) FROM runs")[0][0]
            hint = f"the last is {last}" if last else "it has no runs yet"
            raise UserError(f"no run {no} in {self.path}: {hint}; {advice.list_runs(self.folder)} lists them")
        run = run_of(rows[0])
        if run.status == DAMAGED:
            raise UserError(f"run {no} is damaged in {self.path} ({run.error}); {self._mend()}")
        return self._with_dead([run])[0]

    def _mend(self) -> str:
        return f"{advice.rebuild(self.folder)} makes its row again from its folder"

    def epochs(self, no: int) -> list[Epoch]:
        """A run's curve.

        Raises:
            UserError: an epoch of it is damaged.
        """
        curve = []
        for row in self._read("SELECT * FROM epochs WHERE run = ? ORDER BY epoch", (no,)):
            try:
                curve.append(epoch_of(row))
            except ValueError as error:
                raise UserError(f"epoch {row['epoch']} of run {no} is damaged in {self.path} ({error}); {self._mend()}") from None
        return curve

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_db"):
            self._db.close()


def connect(path: Path | str, mode: str = "rwc") -> sqlite3.Connection:
    """A connection that takes everything in the file for mere data, and checks each page before it is used."""
    db = sqlite3.connect(path if path == ":memory:" else f"{Path(path).absolute().as_uri()}?mode={mode}", BUSY_SECONDS, uri=True)
    db.isolation_level = None
    db.row_factory = sqlite3.Row
    for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "foreign_keys=ON"):
        db.execute(f"PRAGMA {pragma}")
    return db


def snapshot(path: Path) -> sqlite3.Connection:
    """A copy of a ledger that may not be written, as it is now. It includes what other processes wrote beside it, in the newest schema.

    SQLite itself needs to write beside a ledger that it reads, or to be told that nobody else has it open, which nobody can know.

    Raises:
        OSError: it can't be copied.
        sqlite3.DatabaseError: it is no ledger.
    """
    with tempfile.TemporaryDirectory(prefix="flowdistill-") as folder:
        copy = Path(folder) / NAME
        _copy_settled(path, copy)
        db = connect(copy)
        try:
            refuse_foreign(db, path)
            db.execute("PRAGMA journal_mode=DELETE")  # takes in what was written beside it; the copy needs no name after that
            migrate(db)
            db.execute("PRAGMA query_only=ON")
        except BaseException:
            db.close()
            raise
    return db


def _copy_settled(path: Path, copy: Path) -> None:
    """Copy the file and its ``-wal`` as of one moment; copy again if one changed meanwhile.

    Raises:
        OSError: they can't be read.
    """

    def states() -> list[tuple[int, int, int]]:
        files = [Path(f"{path}{end}") for end in COMPANIONS[:2]]
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for file in files if file.exists() for stat in [file.stat()]]

    until = time.monotonic() + BUSY_SECONDS
    while True:
        before, began = states(), time.time_ns()
        for end in COMPANIONS[:2]:
            Path(f"{copy}{end}").unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{end}", f"{copy}{end}")
        settled = all(began - changed > SETTLED_SECONDS * 1e9 for _, _, changed in before)
        if (states() == before and settled) or time.monotonic() > until:
            return
        time.sleep(SETTLED_SECONDS)


def _hindrance(path: Path) -> str:
    """Why a ledger, or the files that SQLite needs beside it, can't be written; empty if they can."""
    target = path.resolve()
    if not os.access(target, os.W_OK):
        return "you may not write it"
    return "" if os.access(target.parent, os.W_OK | os.X_OK) else f"you may not write in {path.parent}"


def _set_journal(db: sqlite3.Connection, mode: str) -> None:
    """Choose SQLite's journal: a write-ahead log (WAL), which needs memory that all processes share, or one file for each transaction.

    SQLite's busy timeout does not cover this switch, so that processes which make one ledger at once wait here.
    """
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute(f"PRAGMA journal_mode={mode}")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _escaped(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def _first(numbers: Iterator[int]) -> int:
    return next(numbers, 0)
