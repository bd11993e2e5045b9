"""Names for things: one registry for methods, one for models, one for data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .checks import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to entry that answers a wrong name with the right one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

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

    def sort(self) -> None:
        """Put the names in alphabetical order, whatever order their files were imported in."""
        self._entries = dict(sorted(self._entries.items()))

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}: {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
