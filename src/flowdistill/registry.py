"""Names for things: registries of methods, networks, data sets and export formats. Other packages can add to them by entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from .checks import FAILURES, UserError, did_you_mean, summary

T = TypeVar("T")

PLUGINS: dict[str, str] = {}
"""Packages whose entry points were loaded, with their versions; a run's record has them."""

_FAILURES: dict[str, list[str]] = {}
"""Groups whose entry points were loaded -> why some could not be, a line each. Registries may share a group."""


class Registry(Generic[T]):
    """A table from name to entry that answers a wrong name with the right one.

    Attributes:
        kind: what an entry is, as messages name it.
        group: of the entry points that other packages add entries by. Each names a module, which registers them when it is imported. That
            is done when a name is not known otherwise, or when all names are asked for. Default: none.
    """

    def __init__(self, kind: str, group: str = "") -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, T] = {}

    @property
    def failures(self) -> list[str]:
        """Why entry points could not be loaded, a line each."""
        return _FAILURES.get(self.group, [])

    @property
    def causes(self) -> str:
        """The failures, as the end of a line that refuses a name; empty if there are none."""
        return "".join(f"; {failure}" for failure in self.failures)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an entry under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def file(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"two entries named {name!r} in the registry of {self.kind}s")
            self._entries[name] = entry
            return entry

        return file

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What is registered inside is gone after; what other packages add is loaded before."""
        self.load_plugins()
        before, self._entries = self._entries, dict(self._entries)
        try:
            yield
        finally:
            self._entries = before

    def sort(self) -> None:
        """Put the names in alphabetical order, whatever order their files were imported in."""
        self._entries = dict(sorted(self._entries.items()))

    def load_plugins(self) -> None:
        """Import what other packages add, once. A package that can't be imported costs its own entries alone."""
        if not self.group or self.group in _FAILURES:
            return
        failures = _FAILURES[self.group] = []  # at first, for a module that is imported here may ask again
        for point in entry_points(group=self.group):
            package, before = point.dist.name if point.dist else point.value, len(self._entries)
            try:
                point.load()
            except FAILURES as error:
                for name in list(self._entries)[before:]:
                    del self._entries[name]
                failures.append(
                    f"package {package}: its entry point {point.name} = {point.value} of {self.group} can't be loaded "
                    f"({summary(error)}); mend the package, or uninstall it"
                )
            else:
                PLUGINS[package] = point.dist.version if point.dist else ""

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise UserError(f"unknown {self.kind} {name!r}: {did_you_mean(name, self._entries)}{self.causes}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self.load_plugins()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self.load_plugins()
        return iter(self._entries)
