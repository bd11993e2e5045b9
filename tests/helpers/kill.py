"""Train in child processes, kill them with SIGKILL, resume, and tell what became of it.

python tests/helpers/kill.py DATA.npz FOLDER moments      # at every moment that has a name, each in a ledger of its own
python tests/helpers/kill.py DATA.npz FOLDER random 20    # at so many random moments of one run

Children are forked from this process, which has imported everything and computed nothing, so that a start costs no seconds.
The last line is JSON: folder -> how it went.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowdistill import cli
from flowdistill.ledger import Ledger, Run
from flowdistill.lock import held
from flowdistill.runner import execute, record
from flowdistill.training import checkpoint, engine, weights
from flowdistill.training.student import Student

ALIVE = 99  # the exit code of a child that should have died

STAGES = ("--set", "options.fsp.schedule=two-stage", "--set", "options.fsp.stage_epochs=2")
SMALL = ("--batch-size", "64", "--set", "data.pad=1", "--lr", "0.05", "--deterministic", "--device", "cpu")


def begin() -> None:
    """Before the first child: load what each of them would spend a second on. They have one thread."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner: Any, name: str, call: int = 1, *, after: bool = False, first: Callable[..., None] = lambda *_: None) -> None:
    """The process dies when ``owner.name`` is called for the nth time: before it, or after; ``first`` does some harm before."""
    original, calls = getattr(owner, name), 0

    def deadly(*args: Any, **keys: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return original(*args, **keys)
        first(*args)
        if after:
            original(*args, **keys)
        die()
        raise AssertionError("alive")

    setattr(owner, name, deadly)


def halve(descriptor: int) -> None:
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)


MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: die_at(engine, "train_step", 3),
    "in a step": lambda: die_at(engine, "train_step", 4 * 4 * 2 + 3),
    "in evaluation": lambda: die_at(engine, "evaluate_all", 3),
    "between an epoch and the ledger": lambda: die_at(execute, "record_epoch", 3),
    "in the ledger's transaction": lambda: die_at(Ledger, "add_epochs", 3, first=lambda ledger, rows: half_a_transaction(ledger)),
    "between ledger and checkpoint": lambda: die_at(checkpoint, "save", 3),
    "with half a checkpoint written": lambda: die_at(weights.os, "fsync", 2 * 3 + 1, first=halve),
    "before the old checkpoint is put aside": lambda: die_at(Path, "replace", 1 + 2 * 2),
    "between the checkpoint's two renames": lambda: die_at(Path, "replace", 1 + 2 * 2 + 1),
    "after the checkpoint": lambda: die_at(checkpoint, "save", 4, after=True),
    "between two phases": lambda: die_at(Student, "begin_phase", 3),
    "after the first epoch of a phase": lambda: die_at(checkpoint, "save", 3, after=True),
    "before anything is finished": lambda: die_at(execute, "finish", 1),
    "with half a student's file written": lambda: die_at(record, "save_weights", 1, first=lambda path, *_: half_a_file(path)),
    "between a student's file and its record": lambda: die_at(Ledger, "write_record", 1),
    "between a run's record and the ledger": lambda: die_at(record, "write_record", 1, after=True),
    "between two students": lambda: die_at(execute, "finish", 2),
    "before the checkpoint is cleared": lambda: die_at(checkpoint, "clear", 1),
}


def half_a_transaction(ledger: Ledger) -> None:
    ledger._db.execute("BEGIN IMMEDIATE")
    ledger._db.execute("UPDATE runs SET error = 'half written'")


def half_a_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")


def child(folder: Path, words: list[str], plant: Callable[[], None] = lambda: None) -> int:
    """``flowdistill WORDS`` in a forked process; its exit code, -9 for killed."""
    return os.waitstatus_to_exitcode(os.waitpid(start(folder, words, plant), 0)[1])


def start(folder: Path, words: list[str], plant: Callable[[], None] = lambda: None, log: str = "") -> int:
    """The number of a process that runs ``flowdistill WORDS``. What it says is added to ``out.txt`` and ``err.txt``, or ``LOG.err.txt``."""
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(f"{log}.{name}" if log else name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        execute.CHECKPOINT_SECONDS = 0.0
        plant()
        sys.argv = ["flowdistill", *words]
        code = 1
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def killed(folder: Path, words: list[str], ready: Callable[[], bool], seconds: float) -> int:
    """Kill a process so many seconds after it was ready; its exit code, 0 where it was done before."""
    process = start(folder, words)
    while not ready():
        if (ended := os.waitpid(process, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def locked(folder: Path) -> bool:
    """Whether a process holds a cohort of this ledger."""
    return any(held(lock) for lock in folder.glob("runs/*/.lock"))


def checkpoints(folder: Path) -> set[tuple[str, int]]:
    """Which there are, and of when."""
    found = set()
    for path in folder.glob("runs/*/checkpoint.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # it has just been put aside
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def prepared(root: Path, data: str, epochs: int, *folders: str) -> list[str]:
    """Folders with one and the same teacher in their ledgers; the words that train two students of two stages."""
    dataset = ("--dataset", f"npz:{data}")
    first = root / folders[0]
    assert child(first, ["train", "--model", "resnet14", "--seeds", "9", *dataset, *SMALL, "--epochs", "1"]) == 0
    for folder in folders[1:]:
        shutil.copytree(first, root / folder)
    pair = ("--method", "fsp", "--student", "resnet8", "--teacher", "resnet14", "--seeds", "0,1")
    return ["distill", *pair, *dataset, *SMALL, *STAGES, "--epochs", str(epochs)]


def students(folder: Path) -> list[Run]:
    """The newest two students."""
    ledger = Ledger(folder / "runs")
    found = [run for run in ledger.runs() if run.method == "fsp"][-2:]
    ledger.close()
    return found


def stands(folder: Path) -> str:
    """What the ledger and the checkpoint say of a run that was killed."""
    runs = students(folder)
    if not runs:
        return "not begun"
    ledger = Ledger(folder / "runs")
    epochs = max(len(ledger.epochs(run.no)) for run in runs)
    saved = checkpoint.load(ledger.run_folder(runs[0].home))
    ledger.close()
    at = f"checkpoint of epoch {saved.done}" if saved and saved.done else "no checkpoint"
    return f"{'/'.join(run.status for run in runs)}, ledger at epoch {epochs}, {at}"


def at_moments(data: str, root: Path) -> dict[str, int]:
    words = prepared(root, data, 3, "straight", *MOMENTS)
    codes = {"straight": child(root / "straight", words)}
    for number, (moment, plant) in enumerate(MOMENTS.items(), 1):
        code = child(root / moment, words, plant)
        seen = stands(root / moment)
        codes[moment] = child(root / moment, ["resume"]) if code == -signal.SIGKILL else ALIVE
        print(f"{number:2d}. killed {moment}: {seen}; resumed: exit {codes[moment]}", flush=True)
    return codes


def at_random(data: str, root: Path, kills: int) -> dict[str, int]:
    """Runs on end in one ledger, killed again and again; one that finishes between two kills is followed by the next.

    Every fourth process is killed some time after it took the lock, so while it loads; the others after they wrote a checkpoint.
    """
    words, chance, began = prepared(root, data, 40, "straight", "killed"), random.Random(0), time.monotonic()
    codes = {"straight": child(root / "straight", words)}
    whole, folder, number = time.monotonic() - began, root / "killed", 0
    print(f"straight through: 42 epochs of 2 students in {whole:.2f} s", flush=True)
    while number < kills:
        go_on = ["resume"] if any(run.cut_off for run in students(folder)) else [*words, "--again"]
        before, loading, seconds = checkpoints(folder), number % 4 == 0, chance.uniform(0, whole / 14)
        code = killed(
            folder, go_on, lambda early=loading, old=before: locked(folder) if early else bool(checkpoints(folder) - old), seconds
        )
        assert code in (0, -signal.SIGKILL), code
        if code:
            number += 1
            since = "the lock" if loading else "a checkpoint"
            print(f"{number:2d}. killed {seconds:.3f} s after {since}: {stands(folder)}", flush=True)
    codes["killed"] = child(folder, ["resume"])
    print(f"resumed to the end: exit {codes['killed']}", flush=True)
    return codes


if __name__ == "__main__":
    source, where, how = str(Path(sys.argv[1]).resolve()), Path(sys.argv[2]), sys.argv[3]
    where.mkdir(parents=True, exist_ok=True)
    begin()
    print(json.dumps(at_moments(source, where) if how == "moments" else at_random(source, where, int(sys.argv[4]))))
