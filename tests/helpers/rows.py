"""Complete rows for a ledger that no training filled. Free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flowdistill.config import validate
from flowdistill.ledger import COLUMNS, Run


def row(**changes: Any) -> dict[str, Any]:
    """Every column of a finished run but ``no``: fsp, resnet20 by resnet20, cifar10, seed 0, 200 epochs, 9,200 of 10,000 right.

    Columns that the config holds too (``lr``, ``student``, ...) are put there; ``config={"train": {...}}`` changes single keys of it.
    What is not given follows from what is: a base row has no teacher, and the fingerprint changes with all but the seed.
    """
    method = changes.get("method", "fsp")
    taught = method != "base"
    given = {"method": method, "student": "resnet20", "teacher": "resnet20" if taught else "-", "dataset": "cifar10", "seed": 0}
    given |= {"split": "full", "nepoch": 200, "lr": 0.1, "batch_size": 128, "precision": "fp32"} | changes
    config = _config(given, changes.get("config", {}))
    given |= {"lr": config["train"]["lr"], "batch_size": config["train"]["batch_size"], "precision": config["train"]["precision"]}
    full = given["split"] == "full"
    columns = {
        "status": "finished",
        "error": "",
        "variant": "",
        "data_hash": _hash(given["dataset"]),
        "student_fingerprint": "",
        "teacher_run": 1 if given["teacher"] != "-" else None,
        "teacher_fingerprint": _hash(given["teacher"]) if given["teacher"] != "-" else "",
        "teacher_accuracy": 92.0 if given["teacher"] != "-" else None,
        "fingerprint": _hash({key: value for key, value in config.items() if key != "seed"}),
        "device": "cpu (2 threads)",
        "engine": "eager",
        "deterministic": 0,
        "cohort_size": 1,
        "init_hash": _hash([given["student"], given["seed"]]),
        "parameters": 272474,
        "versions": {"flowdistill": "0.1.0", "python": "3.11.7"},
        "started": "2021-09-01T08:10:43",
        "finished": "2021-09-01T08:58:43",
        "epoch": given["nepoch"],
        "correct": 9200,
        "images": 10000,
        "best_epoch": given["nepoch"] if full else None,
        "best_correct": 9200 if full else None,
        "setup_seconds": 1.5,
        "train_seconds": 200.0,
        "eval_seconds": 10.0,
        "images_per_second": 50000.0,
        "peak_memory": 1 << 30,
        "weights_hash": _hash("weights"),
        "cohort": None,
        "threads": 2,
        "resumed": 0,
        "networks": None,
        "record_hash": None,
        "top5": 9900,
        "macro_f1": 91.9,
        "balanced_accuracy": 91.95,
    }
    found = columns | given | changes | {"config": config}
    assert found.keys() == set(COLUMNS) - {"no"}, f"unknown columns {sorted(found.keys() - set(COLUMNS))}"
    return found


def run(no: int = 1, **changes: Any) -> Run:
    """A ``Run`` as the ledger would give it."""
    return Run(no=no, **row(**changes))


def _config(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "student": given["student"],
        "teacher": None if given["teacher"] == "-" else given["teacher"],
        "seed": given["seed"],
        "split": given["split"],
        "data": {"name": given["dataset"], "pad": 4, "flip": True},
        "train": {key: given[key] for key in ("lr", "batch_size", "precision")} | {"epochs": given["nepoch"]},
        "method": given["method"],
        "weights": {"task": 1.0} if given["method"] == "base" else {"task": 1.0, given["method"]: 1.0},
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
    return validate(config).model_dump(mode="json")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
