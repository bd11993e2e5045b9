"""A crew without Ray: it trains in this process, one cohort after the other, and its workers die when a test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.runner import run
from flowdistill.runner.remote import worker
from flowdistill.runner.remote.driver import Lost
from flowdistill.runner.remote.kit import Alive, Epochs, Kit, Result, Word
from helpers.small import config

Dies = Callable[[Kit, int, Any], str]
"""Gets the cohort, the attempt from 1 and what is to be told: ``before`` that or ``after`` it the worker is gone, else it is empty."""


class Gone(BaseException):
    """The worker is not there any more; no code expects it."""


def at_epoch(number: int, when: str = "after", *, attempts: int = 1, cohort: int | None = None) -> Dies:
    """Dies as this epoch is told, in each of the first attempts, at every cohort or one."""

    def dies(kit: Kit, attempt: int, told: Any) -> str:
        here = isinstance(told, Epochs) and {epoch["epoch"] for epoch in told.epochs.values()} == {number}
        return when if here and attempt <= attempts and cohort in (None, kit.number) else ""

    return dies


class LocalCrew:
    """Satisfies ``driver.Crew``. What a worker that is gone was training is begun again at the next call of ``results``.

    Attributes:
        begun: what was handed out, with the data that came along.
        attempts: how often each cohort was begun.
    """

    threads, device, option = 1, "cpu", ("--ray", "local")

    def __init__(self, dies: Dies = lambda *_: "", *, slots: int = 1) -> None:
        self.slots, self.storage = slots, Path()
        self.begun: list[tuple[Kit, ImageData | None, bytes]] = []
        self.attempts: dict[int, int] = {}
        self.stopped = self.left = False
        self.cancelled: list[int] = []
        self._dies = dies
        self._queue: deque[tuple[Kit, ImageData | None, bytes]] = deque()
        self._words: list[Word] = []

    def gathered(self, storage: Path) -> Callable[[], AbstractContextManager[LocalCrew]]:
        """What gathers it, as ``driver.run`` takes that."""

        @contextmanager
        def gather() -> Iterator[LocalCrew]:
            self.storage = storage
            yield self
            self.left = True

        return gather

    def measure(self, kit: Kit, data: ImageData | None, given: bytes) -> str:
        measured = worker.measure(kit, data, given)
        assert measured.memory > 0
        assert measured.seconds > 0
        return "it was measured"

    def begin(self, kit: Kit, data: ImageData | None, given: bytes) -> None:
        self.begun.append((kit, data, given))
        self._queue.append((kit, data, given))

    def words(self) -> Sequence[Word]:
        words, self._words = self._words, []
        return words

    def results(self, seconds: float) -> Mapping[int, Result | Lost]:
        if not self._queue:
            return {}
        kit, data, given = self._queue.popleft()
        try:
            return {kit.number: self.attempt(kit, data, given)}
        except Gone:
            self._queue.appendleft((kit, data, given))
            return {}

    def attempt(self, kit: Kit, data: ImageData | None, given: bytes) -> Result | Lost:
        """Train a cohort, which the worker may not survive."""
        number = self.attempts[kit.number] = self.attempts.get(kit.number, 0) + 1
        gone = False

        def tell(attempt: str, told: Any) -> None:
            nonlocal gone
            if isinstance(told, Alive):  # of a thread, which nobody listens to
                return
            dies = "before" if gone else self._dies(kit, number, told)
            if dies != "before":
                self._words.append(Word(kit.number, attempt, f"node {number}", told))
            if dies:
                gone = True
                raise Gone

        return worker.train(kit, data, given, f"node {number}", tell)

    def remarks(self) -> Sequence[str]:
        return ()

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self._queue = deque(one for one in self._queue if one[0].number != number)

    def stop(self, seconds: float) -> None:
        self.stopped = True


def ledger_of_a_teacher(small_npz: Path, folder: Path) -> Path:
    """A ledger in which run 1 is a teacher; its folder."""
    ledger = Ledger(folder, create=True)
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 1})], ledger, torch.device("cpu"))
    ledger.close()
    return folder
