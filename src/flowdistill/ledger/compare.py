"""Which runs may be compared, and which one of several repeats counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..checks import UserError
from ..config import BASELINE, validate
from .rows import Run


def newest(runs: Iterable[Run]) -> list[Run]:
    """The runs without repeats, by number: of several with the same fingerprint and seed only the last is kept."""
    by_key = {(run.fingerprint, run.seed): run for run in sorted(runs, key=lambda run: run.no)}
    return sorted(by_key.values(), key=lambda run: run.no)


MAY_DIFFER: Mapping[str, str] = {
    "method": "what is compared",
    "options": "of the method",
    "weights": "of the method's terms; the task has weight 1 in a base run",
    "teacher": "a base run has none",
    "teacher_shares": "of several teachers; likewise",
    "probe": "of a teacher; likewise",
    "taps": "maps that methods look at; a base run looks at none",
    "inputs.teacher": "images of a network that a base run has not",
    "peer": "the other student of a method; a base run has none",
    "side": "which of two students it is",
    "seed": "means are over seeds",
    "init_from": "what it began from is part of what is compared",
    "train.freeze": "likewise what of it is trained",
    "train.batch_norm": "with one process it changes nothing; with several, their number is compared where each normalises by itself",
    "data.unlabelled": "images that a base run can't use",
    "data.name": "where the data lie; the hash of the data says what they are",
    "data.root": "likewise",
    "data.skip_broken": "likewise: which files were left out",
    "student": "how it was named; the model, its first weights and its code are compared",
}
"""Key of a RunConfig -> why students may differ in it from the ``base`` runs that they are compared with. They agree in all other keys."""
_MAY_DIFFER = tuple(f"{key}." for key in MAY_DIFFER)


def baseline_key(run: Run) -> str:
    """A key that a run shares with the ``base`` runs that it is compared with. It holds the resolved config without the keys of
    ``MAY_DIFFER``, which student, code and data the run used, and how many processes normalised parts of a batch.
    """
    try:
        config = validate(run.config).model_dump(mode="json")  # with the keys that have come since
    except UserError:
        config = run.config
    alike = {key: value for key, value in flattened(config).items() if not f"{key}.".startswith(_MAY_DIFFER)}
    network = (run.networks or {}).get("student", {})
    made = [run.student, run.student_fingerprint, network.get("made_of", ""), network.get("number", 0)]
    ranks = [ranks_apart(run)] if ranks_apart(run) > 1 else []
    return json.dumps([made, run.data_hash, alike, *ranks], sort_keys=True)


LOCAL = "local to each rank"  # ``batch_normalisation`` among the versions of a run


def ranks_apart(run: Run) -> int:
    """How many processes shared a run's batches out, if each normalised by its own images; else 1."""
    ranks = run.versions.get("ranks", "1") if run.versions.get("batch_normalisation") == LOCAL else "1"
    return int(ranks) if ranks.isdecimal() else 1


def is_baseline(run: Run) -> bool:
    """Whether other runs are compared with this one: it trained all weights, from fresh ones, on the labels alone, with weight 1."""
    config = run.config
    plain = config.get("init_from") is None and not config["train"].get("freeze") and config.get("weights", {}).get("task", 1.0) == 1.0
    return run.method == BASELINE and plain


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one flat table with dotted keys. Empty tables are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
