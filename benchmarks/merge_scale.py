"""How long ``flowdistill ledger merge`` takes for many ledgers with the folders of their runs.

python benchmarks/merge_scale.py [LEDGERS] [RUNS] [EPOCHS]      # by default 20 ledgers of 500 runs with 48 epochs each
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ledger_scale import measure, rows

from flowdistill.ledger import JOURNAL, PREDICTIONS, RECORD, STUDENT_FILE, Epoch, Ledger, sealing
from flowdistill.ledger.folders import journal
from flowdistill.ledger.rows import encoded, run_of

STUDENT_BYTES, PREDICTION_BYTES = 1_100_000, 36_000  # of a ResNet-20 on CIFAR-10


def sha256(path: Path) -> dict[str, Any]:
    """Size and hash, as a record lists them."""
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def make(folder: Path, columns: list[dict[str, Any]], epochs: int, files: Path) -> None:
    """A ledger with the folder of every run; the large files are links to one copy."""
    drafts, entered = folder / ".drafts", {}
    for no, values in enumerate(columns, 1):
        draft = drafts / str(no)
        draft.mkdir(parents=True)
        known = {"no": no, "error": "", "cohort": no, "resumed": 0, "record_hash": None, **values}
        curve = [Epoch(epoch, "task", 0.1, {"task": 1.5, "fsp": 0.25}, 9000 + epoch, 10_000, 50.0) for epoch in range(1, epochs + 1)]
        run = run_of(encoded(known))
        (draft / JOURNAL).write_bytes(journal([{"row": vars(run)}, *({"epoch": vars(epoch)} for epoch in curve)]))
        for name in (STUDENT_FILE, PREDICTIONS):
            os.link(files / name, draft / name)
        listed = {name: sha256(draft / name) for name in (STUDENT_FILE, PREDICTIONS, JOURNAL)}
        content = sealing({key: value for key, value in vars(run).items() if key != "record_hash"} | {"files": listed})
        (draft / RECORD).write_bytes(content)
        entered[no] = (run_of(encoded(vars(run) | {"record_hash": hashlib.sha256(content).hexdigest()})), curve)
    ledger = Ledger(folder, create=True)
    ledger.enter(entered, drafts, 0)
    ledger.close()


def main() -> None:
    """Make the ledgers, merge them, and merge them again."""
    ledgers, runs, epochs = (*map(int, sys.argv[1:]), *(20, 500, 48)[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as folder:
        place, files = Path(folder), Path(folder) / "files"
        files.mkdir()
        (files / STUDENT_FILE).write_bytes(os.urandom(STUDENT_BYTES))
        (files / PREDICTIONS).write_bytes(os.urandom(PREDICTION_BYTES))
        made = rows(ledgers * runs, 600)
        for number in range(ledgers):
            make(place / f"ledger{number}", made[number::ledgers], epochs, files)
        sources = [str(place / f"ledger{number}") for number in range(ledgers)]
        for title in ("merged", "merged again"):
            seconds, used, peak = measure(["ledger", "merge", *sources, "--into", str(place / "into"), "--format", "json"])
            what = f"{ledgers} ledgers of {runs} runs with {epochs} epochs"
            print(f"{title}: {what}: {seconds:.1f} s, {used:.1f} s of the processor, peak {peak:.0f} MiB")
        (count,) = {Ledger(place / "into").count()}
        assert count == ledgers * runs, count


if __name__ == "__main__":
    main()
