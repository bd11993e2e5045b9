"""The ledger: one SQLite row a run, one an epoch. Torch-free, so that listing is instant."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import advice
from .checks import Changes, UserError, obstacle
from .config import validate
from .lock import Lock, held

BUSY_SECONDS = 30
LOCK_FILE = ".lock"
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
    CREATE TABLE runs (
        no INTEGER PRIMARY KEY AUTOINCREMENT,
        status TEXT NOT NULL,             -- running, finished, failed (diverged), interrupted; read as dead: running by nobody
        error TEXT NOT NULL DEFAULT '',
        method TEXT NOT NULL,
        variant TEXT NOT NULL,            -- preset, options and weights that differ from the defaults
        dataset TEXT NOT NULL,
        data_hash TEXT NOT NULL,
        student TEXT NOT NULL,
        student_fingerprint TEXT NOT NULL, -- of the weights it starts from; empty for fresh ones
        teacher TEXT NOT NULL,            -- model, '-' for none
        teacher_run INTEGER,              -- NULL for none or a file
        teacher_fingerprint TEXT NOT NULL,
        teacher_accuracy REAL,            -- percent, measured before training on what the curve is measured on
        seed INTEGER NOT NULL,
        split TEXT NOT NULL,              -- full or holdout
        fingerprint TEXT NOT NULL,        -- what the numbers depend on, without the seed
        config TEXT NOT NULL,             -- resolved RunConfig, JSON
        nepoch INTEGER NOT NULL,          -- of all phases
        lr REAL NOT NULL,
        batch_size INTEGER NOT NULL,
        precision TEXT NOT NULL,
        device TEXT NOT NULL,
        engine TEXT NOT NULL,
        deterministic INTEGER NOT NULL,
        cohort_size INTEGER NOT NULL,     -- students trained together with this one, itself included
        init_hash TEXT NOT NULL,          -- of the initial weights
        parameters INTEGER NOT NULL,
        versions TEXT NOT NULL,           -- JSON
        started TEXT NOT NULL,            -- local time, ISO 8601
        finished TEXT,
        epoch INTEGER,                    -- of the weights that ship
        correct INTEGER,                  -- test images they get right
        images INTEGER,                   -- test images
        best_epoch INTEGER,               -- full runs: best epoch on test, earliest on ties
        best_correct INTEGER,
        setup_seconds REAL,               -- of the cohort
        train_seconds REAL,               -- this run's equal share of the cohort's
        eval_seconds REAL,                -- likewise
        images_per_second REAL,           -- training images over train_seconds
        peak_memory INTEGER,              -- bytes, of the process or GPU
        weights_hash TEXT
    )
    """,
        "CREATE INDEX runs_by_fingerprint ON runs (fingerprint, seed)",
        """
    CREATE TABLE epochs (
        run INTEGER NOT NULL REFERENCES runs (no),
        epoch INTEGER NOT NULL,           -- 1-based over all phases
        phase TEXT NOT NULL,
        lr REAL NOT NULL,
        terms TEXT NOT NULL,              -- mean of each unweighted term, JSON
        correct INTEGER,                  -- on test (full) or on the held-out images (holdout); NULL when diverged
        images INTEGER NOT NULL,
        seconds REAL NOT NULL,            -- of the cohort
        PRIMARY KEY (run, epoch)
    )
    """,
    ),
    (
        "ALTER TABLE runs ADD COLUMN cohort INTEGER",  # number of its cohort's first run, in whose folder lock and checkpoint lie
        "ALTER TABLE runs ADD COLUMN threads INTEGER",  # of PyTorch's operations on a CPU; another number rounds otherwise
        "ALTER TABLE runs ADD COLUMN resumed INTEGER NOT NULL DEFAULT 0",  # how often it was taken up again
    ),
    (
        "ALTER TABLE runs ADD COLUMN networks TEXT",  # JSON, by role: which network it began with, its code and answers; NULL: unknown
        "ALTER TABLE runs ADD COLUMN record_hash TEXT",  # SHA-256 of run.json, which lists all files with theirs; NULL: not verified
    ),
)
"""One tuple of statements for each version of the schema; a shipped one is never edited."""


@dataclass(frozen=True)
class Run:
    """A row of the ledger; the columns are explained in the schema above."""

    no: int
    status: str
    error: str
    method: str
    variant: str
    dataset: str
    data_hash: str
    student: str
    student_fingerprint: str
    teacher: str
    teacher_run: int | None
    teacher_fingerprint: str
    teacher_accuracy: float | None
    seed: int
    split: str
    fingerprint: str
    config: dict[str, Any]
    nepoch: int
    lr: float
    batch_size: int
    precision: str
    device: str
    engine: str
    deterministic: int
    cohort_size: int
    init_hash: str
    parameters: int
    versions: dict[str, str]
    started: str
    finished: str | None
    epoch: int | None
    correct: int | None
    images: int | None
    best_epoch: int | None
    best_correct: int | None
    setup_seconds: float | None
    train_seconds: float | None
    eval_seconds: float | None
    images_per_second: float | None
    peak_memory: int | None
    weights_hash: str | None
    cohort: int | None
    threads: int | None
    resumed: int
    networks: dict[str, Any] | None
    record_hash: str | None

    @property
    def accuracy(self) -> float | None:
        """Percent of the test images that the shipped weights get right."""
        return None if self.correct is None or not self.images else 100 * self.correct / self.images

    @property
    def home(self) -> int:
        """The run in whose folder its cohort's lock and checkpoint lie."""
        return self.cohort or self.no

    @property
    def cut_off(self) -> bool:
        """Whether it was stopped from outside, and can be taken up again."""
        return self.status in ("dead", "interrupted")


COLUMNS = tuple(field.name for field in fields(Run))
JSON_COLUMNS = ("config", "versions", "networks")


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run."""

    epoch: int
    phase: str
    lr: float
    terms: dict[str, float]
    correct: int | None
    images: int
    seconds: float


class Ledger:
    """The runs below one folder: ``ledger.db`` and a folder for each run's files."""

    def __init__(self, folder: Path, *, create: bool = False, changes: Changes | None = None) -> None:
        """Open the ledger of a folder. With ``create`` there need be none yet: the first run that registers makes it.

        ``changes`` is asked about what was recorded and is used again, and is not what it was; left out, it is refused.

        Raises:
            UserError: there is none and ``create`` is False, or the file is no ledger, or a newer version made it.
        """
        self.folder, self.path, self.changes = folder, folder / "ledger.db", changes or Changes()
        self._on_disk = False
        if self.path.is_file():
            self._open()
        elif hindrance := obstacle(self.path):
            raise UserError(f"{self.path} cannot be used as a ledger ({hindrance}); name another folder with --runs")
        elif not create:
            raise UserError(f"no ledger in {folder}: train something first ({advice.demo(folder)}), or name its folder with --runs")
        else:
            self._db = _connect(":memory:")
            self._migrate()

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._db = _connect(self.path)
            self._refuse_foreign()
            _write_ahead(self._db)
            self._migrate()
            self._on_disk = True
        except (sqlite3.DatabaseError, OSError) as error:
            self.close()
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path} cannot be used as a ledger ({why}); name another folder with --runs") from None

    def _refuse_foreign(self) -> None:
        """Another program's database is left as it is; version and tables are read in one transaction, since another may make them."""
        self._db.execute("BEGIN")
        version, tables = self._version(), self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        self._db.execute("COMMIT")
        if version > len(MIGRATIONS):
            raise UserError(f"{self.path} was made by a newer flowdistill (schema {version}); upgrade this one")
        if version == 0 and tables:
            raise sqlite3.DatabaseError("it is another program's database")
        if version:
            self._db.execute("SELECT no, fingerprint FROM runs LIMIT 0")

    def _migrate(self) -> None:
        if self._version() == len(MIGRATIONS):
            return
        with self._write():
            version = self._version()
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def _write(self) -> Iterator[None]:
        """One transaction that takes the write lock at once: a deferred one fails when another writer comes between."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def run_folder(self, no: int) -> Path:
        """Where a run's files lie."""
        return self.folder / str(no)

    def lock(self, home: int) -> Lock:
        """What the process that trains a cohort holds."""
        return Lock(self.run_folder(home) / LOCK_FILE)

    def register(self, rows: Iterable[Mapping[str, Any]], claim: Callable[[Sequence[int]], object] = lambda _: None) -> list[int]:
        """Enter the runs of a new cohort as running, all or none; their numbers, in order.

        ``claim`` gets the numbers before anybody can see the runs: whoever trains them takes the lock there.
        """
        if not self._on_disk:
            self.close()
            self._open()
        numbers: list[int] = []
        with self._write():
            for row in rows:
                cursor = self._db.execute(*_insert("runs", {"status": "running", **row}))
                assert cursor.lastrowid is not None
                numbers.append(cursor.lastrowid)
                self._db.execute("UPDATE runs SET cohort = ? WHERE no = ?", (numbers[0], numbers[-1]))
            if numbers:
                claim(numbers)
        return numbers

    def reopen(self, numbers: Sequence[int], epochs: int) -> None:
        """Take up runs again after so many epochs: they are running, and what was recorded of later epochs is gone.

        Raises:
            UserError: an epoch before that is not on record; nothing is changed then.
        """
        with self._write():
            for no in numbers:
                self._db.execute("DELETE FROM epochs WHERE run = ? AND epoch > ?", (no, epochs))
                known = self._db.execute("SELECT count(*) FROM epochs WHERE run = ?", (no,)).fetchone()[0]
                if known != epochs:
                    raise UserError(f"run {no} stands at epoch {epochs}, but {self.path} knows {known} of them; repeat it with --again")
                again = "UPDATE runs SET status = 'running', error = '', finished = NULL, resumed = resumed + 1 WHERE no = ?"
                self._db.execute(again, (no,))

    def add_epochs(self, epochs: Mapping[int, Epoch]) -> None:
        """One epoch of each of these runs, by number, in one transaction."""
        with self._write():
            for no, epoch in epochs.items():
                self._db.execute(*_insert("epochs", {"run": no, **vars(epoch)}))

    def update(self, no: int, **values: Any) -> None:
        """Set columns of a run."""
        assignments = ", ".join(f"{column} = :{column}" for column in values)
        with self._write():
            changed = self._db.execute(f"UPDATE runs SET {assignments} WHERE no = :no", {**_encoded(values), "no": no}).rowcount
            if changed != 1:
                raise KeyError(f"no run {no} to update in {self.path}")

    def write_record(self, no: int, write: Callable[[], str], **values: Any) -> None:
        """Have a run's record written, which gives its hash, and enter that and further columns; nobody else writes meanwhile."""
        with self._write():
            columns = _encoded(values) | {"record_hash": write(), "no": no}
            assignments = ", ".join(f"{column} = :{column}" for column in columns if column != "no")
            self._db.execute(f"UPDATE runs SET {assignments} WHERE no = :no", columns)

    def _read(self, query: str, values: Mapping[str, Any] | tuple[Any, ...]) -> list[sqlite3.Row]:
        """The rows of a query; a damaged file is often found out only here."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} cannot be read ({error}); put a copy of it back, or name another folder with --runs") from None

    def runs(self, **equal: Any) -> list[Run]:
        """Runs whose columns have these values, by number. One that is recorded as running, by nobody, comes out as ``dead``."""
        where = " AND ".join(f"{column} = :{column}" for column in equal) or "1"
        found = [_run(row) for row in self._read(f"SELECT * FROM runs WHERE {where} ORDER BY no", _encoded(equal))]
        return [replace(run, status="dead") if run.status == "running" and not self._alive(run) else run for run in found]

    def _alive(self, run: Run) -> bool:
        return held(self.run_folder(run.home) / LOCK_FILE)

    def run(self, no: int) -> Run:
        """One run.

        Raises:
            UserError: no such number.
        """
        found = self.runs(no=no) if no < 2**63 else []
        if not found:
            last = self._read("SELECT max(no) FROM runs", ())[0][0]
            what = f"the last is {last}" if last else "it has no runs yet"
            raise UserError(f"no run {no} in {self.path}: {what}; {advice.list_runs(self.folder)} lists them")
        return found[0]

    def epochs(self, no: int) -> list[Epoch]:
        """A run's curve."""
        rows = self._read("SELECT * FROM epochs WHERE run = ? ORDER BY epoch", (no,))
        return [
            Epoch(**{**{k: row[k] for k in row.keys() if k != "run"}, "terms": json.loads(row["terms"])})  # noqa: SIM118
            for row in rows
        ]

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_db"):
            self._db.close()


def newest(runs: Iterable[Run]) -> list[Run]:
    """Of runs that repeat one fingerprint and seed, only the last."""
    by_key = {(run.fingerprint, run.seed): run for run in sorted(runs, key=lambda run: run.no)}
    return sorted(by_key.values(), key=lambda run: run.no)


MAY_DIFFER: Mapping[str, str] = {
    "method": "what is compared",
    "options": "of the method",
    "weights": "of the method's terms; the task has weight 1 in a base run",
    "teacher": "a base run has none",
    "taps": "maps that methods look at; a base run looks at none",
    "inputs.teacher": "images of a network that a base run has not",
    "peer": "the other student of a method; a base run has none",
    "side": "which of two students it is",
    "seed": "means are over seeds",
    "init_from": "what it began from is part of what is compared",
    "train.freeze": "likewise what of it is trained",
    "data.unlabelled": "images that a base run can't use",
    "data.name": "where the data lie; the hash of the data says what they are",
    "data.root": "likewise",
    "data.skip_broken": "likewise: which files were left out",
    "student": "how it was named; the model, its first weights and its code are compared",
}
"""Key of a RunConfig -> why students may differ in it from the ``base`` runs that they are compared with. In all others they agree."""


def baseline_key(run: Run) -> str:
    """What a run has in common with the ``base`` runs that it is compared with: all of its resolved config but ``MAY_DIFFER``, and what
    student, code and data were.
    """
    try:
        config = validate(run.config).model_dump(mode="json")  # with the keys that have come since
    except UserError:
        config = run.config
    alike = {key: value for key, value in flattened(config).items() if not any(f"{key}.".startswith(f"{may}.") for may in MAY_DIFFER)}
    network = (run.networks or {}).get("student", {})
    made = [run.student, run.student_fingerprint, network.get("made_of", ""), network.get("number", 0)]
    return json.dumps([made, run.data_hash, alike], sort_keys=True)


def is_baseline(run: Run) -> bool:
    """Whether others are compared with a run: trained from fresh weights, all of them, on the labels alone, at weight 1."""
    own = run.config
    plain = own.get("init_from") is None and not own["train"].get("freeze") and own.get("weights", {}).get("task", 1.0) == 1.0
    return run.method == "base" and plain


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys; an empty table is nothing."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _connect(path: Path | str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA foreign_keys=ON")
    return db


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switch to WAL. SQLite's busy timeout does not cover this switch, so that processes which make one ledger at once wait here."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _encoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """As SQLite takes them. JSON holds a name that is no UTF-8 as it is, so that its file is found again; a column shows it by escapes."""
    encoded = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: stored(value) if isinstance(value, str) else value for key, value in encoded.items()}


def stored(name: str) -> str:
    """A name as a column has it: bytes that are no UTF-8 are escapes."""
    return name.encode(errors="backslashreplace").decode()


def _insert(table: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    names = ", ".join(values)
    return f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in values)})", _encoded(values)


def _run(row: sqlite3.Row) -> Run:
    return Run(**{name: json.loads(row[name]) if name in JSON_COLUMNS and row[name] else row[name] for name in COLUMNS})
