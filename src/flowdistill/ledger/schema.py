"""The tables of a ledger, version by version, and whether a file has exactly these."""

from __future__ import annotations

import functools
import re
import sqlite3
from pathlib import Path

from ..checks import UserError

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
    (
        "ALTER TABLE runs ADD COLUMN top5 INTEGER",  # test images whose class is among the five most probable; NULL: five classes or fewer
        "ALTER TABLE runs ADD COLUMN macro_f1 REAL",  # percent, of test; NULL, as the next: an older version did not record it
        "ALTER TABLE runs ADD COLUMN balanced_accuracy REAL",  # percent, of test
    ),
)
"""One tuple of statements for each version of the schema; a shipped one is never edited."""

_STATISTICS = re.compile(r"CREATE TABLE sqlite_stat[1-4]\([a-z,]+\)")  # of ANALYZE, which changes no answer
_KINDS = {"table": 0, "index": 1, "view": 2, "trigger": 3}


def version(db: sqlite3.Connection) -> int:
    """The version of the schema; 0 if nothing is there yet."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def migrate(db: sqlite3.Connection, upto: int = len(MIGRATIONS)) -> None:
    """Bring the tables to a version of the schema. The caller holds the transaction."""
    for statements in MIGRATIONS[version(db) : upto]:
        for statement in statements:
            db.execute(statement)
    db.execute(f"PRAGMA user_version={upto}")


def refuse_foreign(db: sqlite3.Connection, path: Path) -> int:
    """Refuse a file that does not hold exactly what the migrations of its version made, and return that version. The tables are compared
    before any is read: a trigger, a view or a generated column is a program of whoever made the file, and would run on the first query.

    Raises:
        UserError: a newer version made it, or it holds anything else.
        sqlite3.DatabaseError: it is no ledger.
    """
    db.execute("BEGIN")  # version and tables at one moment, since another process may be making them
    schema, contents = version(db), _contents(db)
    db.execute("COMMIT")
    if schema > len(MIGRATIONS):
        raise UserError(f"{path} was made by a newer flowdistill (schema {schema}); upgrade this one")
    if schema <= 0 and contents:
        raise sqlite3.DatabaseError("it is another program's database")
    if schema > 0 and (why := _difference(contents, _expected(schema))):
        raise sqlite3.DatabaseError(why)
    return max(schema, 0)


def _difference(have: dict[tuple[str, str], str], wanted: dict[tuple[str, str], str]) -> str:
    """The first difference from what the migrations made, the most telling kind first; empty if there is none."""
    for kind, name in sorted(have.keys() - wanted.keys(), key=lambda key: (-_KINDS.get(key[0], 9), key[1])):
        virtual = "virtual " if have[kind, name].upper().startswith("CREATE VIRTUAL") else ""
        return f"it has a {virtual}{kind} {name!r}, which this package did not make"
    for kind, name in sorted(wanted.keys() - have.keys()):
        return f"it lacks the {kind} {name!r}"
    for (kind, name), sql in wanted.items():
        if have[kind, name] != sql:
            parts = zip([*have[kind, name].split(","), "its end"], [*sql.split(","), ""], strict=False)
            odd = next(part for part, other in parts if part != other)
            return f"its {kind} {name!r} is not as this package makes it: {odd.strip()[:80]!r}"
    return ""


def _contents(db: sqlite3.Connection) -> dict[tuple[str, str], str]:
    """(kind, name) -> the SQL of all that a database holds, with its white space evened out."""
    rows = db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    return {(kind, name): " ".join((sql or "").split()) for kind, name, sql in rows if not _STATISTICS.fullmatch(sql or "")}


@functools.cache
def _expected(schema: int) -> dict[tuple[str, str], str]:
    db = sqlite3.connect(":memory:")
    migrate(db, schema)
    contents = _contents(db)
    db.close()
    return contents
