"""How long a large ledger takes: its list, its summary and its tables, each in a process of its own.

python benchmarks/ledger_scale.py [RUNS] [GROUPS]      # by default 100,000 runs in 3,000 groups
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path
from typing import Any

from flowdistill.config import validate
from flowdistill.ledger import Ledger

COMMANDS = ("runs", "runs --all --format csv", "table --summary", "table", "table --summary --format json", "check 1", "show 1")
METHODS = ("base", "fsp", "at", "kd", "sp", "at+kd")
STUDENTS = ("resnet20", "resnet8", "vgg8", "wrn-16-2")


def rows(runs: int, groups: int) -> list[dict[str, Any]]:
    """Runs of groups that differ in method, student, data and recipe, with configs and networks of a real run's size."""
    chance = random.Random(0)
    answers = {f"eval stage{place}": [float(f"{chance.gauss(0, 1):.7g}") for _ in range(4)] for place in range(20)}
    network = {"key": "0" * 64, "made_of": "", "number": 0, "code": {}, "answers": answers}
    found = []
    for group in range(groups):
        method, student = METHODS[group % len(METHODS)], STUDENTS[group // len(METHODS) % len(STUDENTS)]
        lr = round(0.1 + group // (len(METHODS) * len(STUDENTS)) * 1e-3, 6)
        has_teacher = method != "base"
        config = validate({"student": student, "teacher": "resnet110" if has_teacher else None, "method": method, "train": {"lr": lr}})
        values = config.model_dump(mode="json")
        fingerprint = hashlib.sha256(f"{group}".encode()).hexdigest()
        for seed in range(runs // groups + (group < runs % groups)):
            found.append(
                {
                    "status": "finished", "method": method, "variant": "", "dataset": "cifar10", "data_hash": "d" * 64, "student": student,
                    "student_fingerprint": "", "teacher": "resnet110" if has_teacher else "-", "teacher_run": 1 if has_teacher else None,
                    "teacher_fingerprint": "t" * 64 if has_teacher else "", "teacher_accuracy": 93.0, "seed": seed, "split": "full",
                    "fingerprint": fingerprint, "config": json.dumps(values | {"seed": seed}), "nepoch": 200, "lr": lr,
                    "batch_size": 128, "precision": "fp32", "device": "cpu (2 threads)", "engine": "eager", "deterministic": 0,
                    "cohort_size": 1, "init_hash": hashlib.sha256(f"{seed}".encode()).hexdigest(), "parameters": 272474,
                    "versions": json.dumps({"flowdistill": "0.1.0", "torch": "2.9.1", "python": "3.11.7"}),
                    "started": "2026-01-01T00:00:00", "finished": "2026-01-01T01:00:00", "epoch": 200,
                    "correct": chance.randrange(9000, 9400), "images": 10000, "best_epoch": 190, "best_correct": 9400,
                    "setup_seconds": 1.0, "train_seconds": 3600.0, "eval_seconds": 60.0, "images_per_second": 2777.0,
                    "peak_memory": 1 << 30, "weights_hash": hashlib.sha256(f"{group} {seed}".encode()).hexdigest(), "threads": 2,
                    "networks": json.dumps({"student": network, "teacher": network} if has_teacher else {"student": network}),
                }
            )  # fmt: skip
    chance.shuffle(found)
    return found


def make(folder: Path, runs: int, groups: int) -> None:
    """Such a ledger, written past ``register``, which would make a folder for each."""
    Ledger(folder, create=True).register([])
    with sqlite3.connect(folder / "ledger.db") as db:
        made = rows(runs, groups)
        names = list(made[0])
        db.executemany(f"INSERT INTO runs ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})", made)
    db.close()


def measure(words: list[str]) -> tuple[float, float, float]:
    """Seconds of the clock, seconds of the processor and peak MiB of a command."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "flowdistill", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{words} failed")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    runs, groups = (int(word) for word in (sys.argv[1:] + ["100000", "3000"][len(sys.argv) - 1 :])[:2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs" / "ledger.db"
        maker = Process(target=make, args=(path.parent, runs, groups))  # in a process of its own: a child's peak begins with its parent's
        maker.start()
        maker.join()
        print(f"{runs:,} runs in {groups:,} groups, ledger of {path.stat().st_size >> 20:,} MiB\n")
        print("| command | seconds | of the processor | peak MiB |\n| -- | -- | -- | -- |")
        for words in COMMANDS:
            seconds, processor, peak = measure([*words.split(), "--runs", str(path.parent)])
            print(f"| {words} | {seconds:.2f} | {processor:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
