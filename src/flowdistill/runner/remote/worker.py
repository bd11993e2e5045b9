"""A worker: trains one cohort in a folder of its own, as ``run`` does on one machine, and tells the driver what it enters."""

from __future__ import annotations

import os
import secrets
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ... import trust
from ...checks import Changes, UserError, first_line, shortage
from ...config import RunConfig, validate
from ...data import sources
from ...data.batches import to_device
from ...data.dataset import ImageData
from ...device import computing, peak_memory, reset_peak_memory
from ...ledger import PROBE_FILE, Epoch, Ledger, Run, own_files
from ...ledger.folders import JOURNAL
from ...ledger.rebuild import rebuild
from ...training import checkpoint
from ...training.timing import seconds_per_epoch
from ..estimate import unmeasured
from ..execute import run
from ..plan import plan
from ..watcher import Watcher
from .kit import Alive, Began, Changed, Epochs, Finished, Kit, Measured, Result, Said, unpack
from .storage import States

OWN = 10**9  # a worker numbers its own runs from here on, above those that it was given
HEARTBEAT = 5.0  # seconds between two signs of life

Tell = Callable[[str, Began | Epochs | Changed | Said | Alive], object]
"""Gets the name of the attempt and what there is to tell of it."""


def train(kit: Kit, data: ImageData | None, given: bytes, node: str, tell: Tell) -> Result:
    """Train a cohort, or go on with it from the newest state in the storage.

    Args:
        data: its images; None: they are read here, by their name.
        given: the ledger and the folders of the runs that it learns from.
        node: the name of this machine.
    """
    attempt = secrets.token_hex(6)

    def told(what: Began | Epochs | Changed | Said | Alive) -> None:
        tell(attempt, what)

    with tempfile.TemporaryDirectory(prefix="flowdistill-") as place, _signs_of_life(lambda: told(Alive())):
        try:
            runs = _trained(kit, data, given, Path(place), States(Path(kit.storage), kit.name, attempt), node, told)
        except UserError as error:
            return Result(attempt, node, refused=str(error))
        except (OSError, RuntimeError, sqlite3.Error) as error:
            if not shortage(error):
                raise
            return Result(attempt, node, refused=f"{first_line(error)}; {shortage(error)}")
        return Result(attempt, node, runs)


def measure(kit: Kit, data: ImageData | None, given: bytes) -> Measured:
    """What a cohort takes of this machine, by a few steps of the eager engine, which takes the most memory.

    Raises:
        UserError: it can't be trained here.
    """
    device = torch.device(kit.device)
    with tempfile.TemporaryDirectory(prefix="flowdistill-") as place, computing(device, cores=kit.threads):
        unpack(given, Path(place))
        with _as_the_driver(kit, data, Path(place)) as configs:
            jobs = plan(configs, Ledger(Path(place), create=True, changes=Changes(kit.accepts_changes, say=lambda _: None)), device)
            cohort, _ = unmeasured(jobs, to_device(jobs[0].data, jobs[0].config.split, device, kit.decoders), device, "eager")
            reset_peak_memory(device)
            seconds = seconds_per_epoch(cohort)
    if device.type != "cuda":
        return Measured(peak_memory(device), 0.0, seconds)
    total = torch.cuda.get_device_properties(device).total_memory
    return Measured(peak_memory(torch.device("cpu")), peak_memory(device) / total, seconds)


@contextmanager
def _as_the_driver(kit: Kit, data: ImageData | None, folder: Path) -> Iterator[list[RunConfig]]:
    """Inside, code is trusted and data are there as at the driver's, which vouches for the code that ran. Gives the configs of the runs."""
    configs = [validate(dict(config)) for config in kit.configs]
    trust.name(*kit.trusted)
    before = os.environ.get(trust.STATE)
    os.environ[trust.STATE] = str(folder / "trust")
    try:
        with trust.code(kit.trusts_all), sources.held({} if data is None else {configs[0].data: data}):
            yield configs
    finally:
        del os.environ[trust.STATE]
        os.environ |= {} if before is None else {trust.STATE: before}


def _trained(
    kit: Kit, data: ImageData | None, given: bytes, folder: Path, states: States, node: str, told: Callable[..., None]
) -> Mapping[int, Finished]:
    unpack(given, folder)
    done, remark = states.bring(folder)
    if done:
        rebuild(folder)  # the state has folders alone
    torch.set_num_threads(kit.threads)
    how: dict[str, Any] = {"deterministic": kit.deterministic, "engine": kit.engine, "workers": kit.decoders}
    with _as_the_driver(kit, data, folder) as configs:
        ledger = _TellingLedger(folder, Changes(kit.accepts_changes, say=lambda _: None), kit, node, remark, told)
        failed = [run_ for run_ in ledger.runs(status="failed") if (run_.fingerprint, run_.seed) in kit.keys]  # in an earlier attempt
        over = {(run_.fingerprint, run_.seed) for run_ in failed}
        left = [config for config, key in zip(configs, kit.keys, strict=True) if key not in over]
        runs = run(left, ledger, torch.device(kit.device), **how, watcher=_TellingWatcher(folder, states, told)) if left else []
    return {run_.no: _finished(run_, ledger) for run_ in [*failed, *runs]}


class _TellingLedger(Ledger):
    """The ledger of a worker. What is entered is told."""

    def __init__(self, folder: Path, changes: Changes, kit: Kit, node: str, remark: str, told: Callable[..., None]) -> None:
        super().__init__(folder, create=True, changes=changes)
        self._kit, self._node, self._remark, self._told = kit, node, remark, told

    def last_number(self) -> int:
        return max(OWN, super().last_number())

    def register(self, rows: Iterable[Mapping[str, Any]], *hooks: Any) -> list[int]:
        rows = [{**row, "versions": row["versions"] | {"node": self._node}} for row in rows]
        self._refuse_other({(row["fingerprint"], row["seed"]) for row in rows})
        numbers = super().register(rows, *hooks)
        self._tell_begun(numbers)
        return numbers

    def reopen(self, numbers: Sequence[int], epochs: int) -> None:
        super().reopen(numbers, epochs)
        for no in numbers:
            super().update(no, versions=self.run(no).versions | {"node": self._node})
        self._tell_begun(numbers)

    def add_epochs(self, epochs: Mapping[int, Epoch]) -> None:
        super().add_epochs(epochs)
        self._told(Epochs({no: vars(epoch) for no, epoch in epochs.items()}))

    def update(self, no: int, **values: Any) -> None:
        if "versions" in values:
            values["versions"] = values["versions"] | {"node": self._node}
        super().update(no, **values)
        self._told(Changed(no, values))

    def _tell_begun(self, numbers: Sequence[int]) -> None:
        rows = {no: vars(self.run(no)) for no in numbers}
        self._told(Began(rows, {no: [vars(epoch) for epoch in self.epochs(no)] for no in numbers}, self._remark))

    def _refuse_other(self, found: set[tuple[str, int]]) -> None:
        if not found <= set(self._kit.keys):
            raise UserError(
                f"{self._node} would not train what was planned: the data, the code of a network or a weights file is another there; make "
                f"these files equal on all machines"
            )


class _TellingWatcher(Watcher):
    """What a worker says is told, and each checkpoint goes to the storage."""

    def __init__(self, folder: Path, states: States, told: Callable[..., None]) -> None:
        super().__init__()
        self._folder, self._states, self._told = folder, states, told
        self._early, self._lost = True, False

    def say(self, line: str) -> None:
        if str(self._folder) not in line:  # what names this folder advises what the driver does
            self._told(Said(line, self._early))

    def begin(self, *_: object) -> None:
        self._early = False

    def saved(self, done: int, runs: Sequence[int], home: int) -> None:
        journals = [self._folder / str(no) / JOURNAL for no in runs]
        try:
            self._states.save(done, self._folder, [*journals, self._folder / str(home) / checkpoint.FILE])
            self._lost = False
        except OSError as error:
            if not self._lost:  # once, not after every epoch
                why = f"{self._states.folder}: {error.strerror or error}"
                self.say(f"no state is kept ({why}); training goes on, but another worker could not")
            self._lost = True


def _finished(run_: Run, ledger: Ledger) -> Finished:
    folder, files = ledger.run_folder(run_.no), (*own_files(run_), *[PROBE_FILE] * run_.config.get("probe", False))
    contents = {name: (folder / name).read_bytes() for name in files if run_.status == "finished"}
    return Finished(vars(run_), [vars(epoch) for epoch in ledger.epochs(run_.no)], contents)


@contextmanager
def _signs_of_life(tell: Callable[[], None]) -> Iterator[None]:
    """Inside, a sign of life is given every few seconds, by a thread, which stands still if the process does."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            tell()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
