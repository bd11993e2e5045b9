"""What a caller may want to see of the work."""

from __future__ import annotations


class Watcher:
    """This one is blind. Nothing here may wait for the device."""

    def say(self, line: str) -> None:
        """One line of talk."""

    def begin(self, title: str, steps: int) -> None:
        """A cohort starts, with so many steps ahead of it."""

    def step(self) -> None:
        """One step of every student is done."""

    def epoch(self, line: str) -> None:
        """An epoch is done."""

    def end(self) -> None:
        """The cohort is done."""
