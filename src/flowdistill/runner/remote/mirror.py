"""What workers tell of one cohort, entered into the driver's ledger, which the driver alone writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...checks import UserError
from ...ledger import JOURNAL, RECORD, Epoch, Ledger, Run, files_of
from ...ledger.rows import COLUMNS
from ...training import checkpoint
from ...training.weights import write_whole
from ..integrity import listed, write_record
from ..record import now
from .kit import Began, Changed, Epochs, Finished, Kit, Result, Values
from .worker import OWN

KEPT = ("no", "status", "cohort", "resumed", "record_hash")  # columns that are the driver's own
_WORKERS_NUMBER = re.compile(rf"\b{str(OWN)[:3]}\d{{{len(str(OWN)) - 3}}}\b")
Key = tuple[str, int]


class Mirror:
    """A cohort's runs in the driver's ledger, while a worker trains them.

    Args:
        home: of a cohort that was cut off, the run in whose folder its lock lies; None for one that begins.
        refuse_taken: is called before a cohort that begins is entered.
    """

    def __init__(self, kit: Kit, ledger: Ledger, home: int | None, refuse_taken: Callable[[], object]) -> None:
        self.kit = kit
        self._ledger, self._refuse_taken = ledger, refuse_taken
        self._lock = contextlib.ExitStack()
        self._attempt, self._earlier = "", set[str]()
        self._here: dict[int, int] = {}  # the worker's number of a run -> the driver's
        self._home = home
        self.numbers: dict[Key, int] = {}
        if home is not None:
            self._lock.enter_context(ledger.lock(home))
            self.numbers = {(run.fingerprint, run.seed): run.no for run in ledger.runs() if run.home == home}

    def close(self) -> None:
        """Let the lock go."""
        self._lock.close()

    def listens_to(self, attempt: str, *, begins: bool = False) -> bool:
        """Whether words of this attempt count. ``begins``: also those of one that was not heard of yet."""
        return attempt == self._attempt or (begins and attempt not in self._earlier)

    def here(self, line: str) -> str:
        """A worker's line with the driver's numbers; empty if it is of a run that the driver does not know yet."""
        if any(int(found) not in self._here for found in _WORKERS_NUMBER.findall(line)):
            return ""
        return _WORKERS_NUMBER.sub(lambda found: str(self._here[int(found[0])]), line)

    def began(self, attempt: str, told: Began) -> int:
        """A cohort begins, or goes on from where its worker found it: what was recorded after that is forgotten.

        Returns:
            The epochs that it has trained.

        Raises:
            UserError: another process has begun it meanwhile.
        """
        if attempt != self._attempt:
            self._earlier.add(self._attempt)
            self._attempt = attempt
        done = min(map(len, told.curves.values()), default=0)
        if not self.numbers:
            entered = [{name: row[name] for name in COLUMNS if name not in KEPT} for row in told.rows.values()]
            numbers = self._ledger.register(entered, self._claim, self._refuse_taken)
            self.numbers = {_key(row): no for row, no in zip(entered, numbers, strict=True)}
            self._number(told.rows)
            self._enter(told.curves)
        else:
            self._number(told.rows)
            self._enter(told.curves)
            self._ledger.reopen([*self._here.values()], done)
            for no, row in told.rows.items():
                moved = ("device", "threads", "engine", "versions")
                self._ledger.update(self._here[no], **{name: row[name] for name in moved})
        return done

    def _number(self, rows: Mapping[int, Values]) -> None:
        self._here = {no: self.numbers[_key(row)] for no, row in rows.items()}

    def _claim(self, numbers: Sequence[int]) -> None:
        self._home = numbers[0]
        self._lock.enter_context(self._ledger.lock(self._home))

    def _enter(self, curves: Mapping[int, Sequence[Values]]) -> None:
        """Enter the epochs that the ledger lacks."""
        for no, curve in curves.items():
            known = {epoch.epoch for epoch in self._ledger.epochs(self._here[no])}
            for epoch in curve:
                if epoch["epoch"] not in known:
                    self._ledger.add_epochs({self._here[no]: Epoch(**epoch)})

    def epochs(self, told: Epochs) -> Mapping[int, Epoch]:
        """An epoch of each run, which is returned by the driver's number of the run."""
        rows = {self._here[no]: Epoch(**epoch) for no, epoch in told.epochs.items()}
        self._ledger.add_epochs(rows)
        return rows

    def changed(self, told: Changed) -> None:
        """A run diverged. What else a worker enters comes with the result, or is the driver's to say."""
        if told.values.get("status") == "failed":
            self._ledger.update(self._here[told.run], **told.values)

    def finish(self, result: Result) -> None:
        """Enter what came of the cohort: files first, then the rows.

        Raises:
            UserError: a file is not what its worker wrote.
        """
        if not self.listens_to(result.attempt):
            self.began(result.attempt, Began({no: run.row for no, run in result.runs.items()}, {}))
        self._number({no: run.row for no, run in result.runs.items()})
        self._enter({no: run.curve for no, run in result.runs.items()})
        for no, finished in result.runs.items():
            run = self._ledger.run(self._here[no])
            if finished.row["status"] == "finished" and run.status != "finished":
                self._finish(run, finished)
            elif finished.row["status"] == "failed" and run.status != "failed":
                values = {name: finished.row[name] for name in ("status", "error", "finished")}
                self._ledger.update(run.no, **values)
        if self._home is not None:
            checkpoint.clear(self._ledger.run_folder(self._home))  # of a cohort that was trained here before

    def _finish(self, run: Run, finished: Finished) -> None:
        folder = self._ledger.run_folder(run.no)
        contents = dict(finished.files)
        record: dict[str, Any] = json.loads(contents.pop(RECORD))
        for name, content in contents.items():
            if files_of(record)[name]["sha256"] != hashlib.sha256(content).hexdigest():
                raise UserError(f"run {run.no}: {name} is not what its worker wrote; train it again")
            write_whole(folder / name, content, make_folder=False)
        values = {name: finished.row[name] for name in COLUMNS if name not in KEPT}
        record |= values | {name: getattr(run, name) for name in ("no", "cohort", "resumed")} | {"status": "finished"}
        record |= {"files": listed(folder, (*contents, JOURNAL))}
        self._ledger.write_record(run.no, lambda: write_record(folder, record), status="finished", **values)

    def stop(self, why: str) -> list[int]:
        """Record that the cohort was cut off. The numbers of its runs that had begun."""
        stopped = [no for no in self.numbers.values() if self._ledger.run(no).status == "running"]
        for no in stopped:
            self._ledger.update(no, status="interrupted", error=why, finished=now())
        return stopped


def _key(row: Values) -> Key:
    return row["fingerprint"], row["seed"]
