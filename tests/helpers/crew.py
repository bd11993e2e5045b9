"""A crew without Ray: it trains in this process, one cohort after the other, and its workers die when a test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flowdistill.data.dataset import ImageData
from flowdistill.runner.remote import worker
from flowdistill.runner.remote.driver import Lost
from flowdistill.runner.remote.kit import Alive, Epochs, Kit, Result, Word

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
        self.slots = slots
        self.begun: list[tuple[Kit, ImageData | None, bytes]] = []
        self.attempts: dict[int, int] = {}
        self.stopped = self.left = False
        self.cancelled: list[int] = []
        self._dies = dies
        self._queue: deque[tuple[Kit, ImageData | None, bytes]] = deque()
        self._words: list[Word] = []

    @contextmanager
    def gathered(self) -> Iterator[LocalCrew]:
        """As ``driver.run`` takes a crew."""
        yield self
        self.left = True

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
