"""The ledger: one SQLite row per run and one per epoch. It does not import torch, so that listing is instant."""

from .answers import class_names, kept_answers
from .compare import LOCAL, MAY_DIFFER, baseline_key, flattened, is_baseline, newest, ranks_apart
from .folders import EXPORTS, JOURNAL, PREDICTIONS, PROBE_FILE, RECORD, STUDENT_FILE, files_of, own_files, sealed, sealing
from .rows import COLUMNS, DAMAGED, Epoch, Run, stored
from .schema import MIGRATIONS
from .store import NAME, Ledger

__all__ = [
    "COLUMNS",
    "DAMAGED",
    "EXPORTS",
    "JOURNAL",
    "LOCAL",
    "MAY_DIFFER",
    "MIGRATIONS",
    "NAME",
    "PREDICTIONS",
    "PROBE_FILE",
    "RECORD",
    "STUDENT_FILE",
    "Epoch",
    "Ledger",
    "Run",
    "baseline_key",
    "class_names",
    "files_of",
    "flattened",
    "is_baseline",
    "kept_answers",
    "newest",
    "own_files",
    "ranks_apart",
    "sealed",
    "sealing",
    "stored",
]
