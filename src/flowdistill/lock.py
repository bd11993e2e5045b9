"""One owner at a time, for as long as its process lives: the system takes the lock back from a process that dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from .checks import UserError

PATIENCE = 2.0  # seconds: longer than anyone looks whether a lock is held


class Lock:
    """An exclusive lock on a file, which holds its owner's process number and stays behind, free, when the owner is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            UserError: another process has it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        until = time.monotonic() + PATIENCE
        while not _take(self._file, fcntl.LOCK_EX):
            if time.monotonic() > until:
                owner = os.pread(self._file, 20, 0).decode(errors="replace").strip()
                os.close(self._file)
                raise UserError(f"{self.path.parent} is being trained by process {owner or 'unknown'}; wait for it, or stop it")
            time.sleep(0.02)
        _taken.add(self._file)
        os.truncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _taken.discard(self._file)
        os.close(self._file)


_taken: set[int] = set()


def _let_go() -> None:
    """In a forked process: the lock is its parent's, and must end with that, however long the child lives."""
    while _taken:
        os.close(_taken.pop())


os.register_at_fork(after_in_child=_let_go)


def any_taken() -> bool:
    """Whether this process holds a lock."""
    return bool(_taken)


def held(path: Path) -> bool:
    """Whether a living process has the lock."""
    try:
        file = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        return True  # of somebody else, and nobody else can say that it is free
    try:
        return not _take(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


def _take(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
