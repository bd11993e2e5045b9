"""Where workers keep the states of their cohorts, so that another worker can go on: a folder that all of them see.

A state is one file, written whole: the journals of the cohort's runs and its checkpoint. Every attempt at a cohort writes files of its own,
so that a worker that was taken for dead and lives on harms nobody. The newest that is whole counts.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from ...checks import pass_on_shortage
from ...training.weights import write_whole
from .kit import packed, unpack

FOLDER = "storage"  # below a folder of runs
KEPT = 2  # states of one attempt
PROBE = ".probe"


class States:
    """The states of one cohort, as one attempt at it sees them. Whoever saves none needs no attempt."""

    def __init__(self, storage: Path, name: str, attempt: str = "") -> None:
        self.folder, self._attempt, self._own = storage / name, attempt, list[Path]()

    def save(self, done: int, root: Path, paths: Iterable[Path]) -> None:
        """Keep the state after so many epochs.

        Raises:
            OSError: it can't be written; the state before it stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{done:06d}-{self._attempt}.zip"
        write_whole(path, packed(root, paths))
        self._own = [*(own for own in self._own if own != path), path]
        while len(self._own) > KEPT:
            self._own.pop(0).unlink(missing_ok=True)

    def bring(self, root: Path) -> tuple[int, str]:
        """Put the newest state that is whole below a folder.

        Returns:
            The epochs that it has trained, 0 if there is none; and what is wrong with newer ones, empty if nothing is.
        """
        remarks = list[str]()
        for path in self._newest_first():
            try:
                unpack(path.read_bytes(), root)
                return int(path.name[:6]), "; ".join(remarks)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                pass_on_shortage(error)
                remarks.append(f"{path} can't be read ({getattr(error, 'strerror', None) or error})")
        return 0, "; ".join(remarks)

    def _newest_first(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return sorted((path for path in self.folder.iterdir() if re.fullmatch(r"\d{6}-\w+\.zip", path.name)), reverse=True)
        return []

    def clear(self) -> None:
        """Remove the states of all attempts: the cohort is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def leave_probe(storage: Path) -> str:
    """Write something that a worker must be able to read there.

    Raises:
        OSError: it can't be written.
    """
    word = secrets.token_hex(8)
    storage.mkdir(parents=True, exist_ok=True)
    (storage / f"{PROBE}-{word}").write_text(word)
    return word


def sees_probe(storage: Path, word: str) -> bool:
    """Whether this machine sees what the driver wrote, and can write beside it."""
    try:
        seen = (storage / f"{PROBE}-{word}").read_text() == word
        own = storage / f"{PROBE}-{word}-{secrets.token_hex(4)}"
        own.touch()
        own.unlink()
    except OSError:
        return False
    return seen


def remove_probe(storage: Path, word: str) -> None:
    """Remove it again, if the storage is still there."""
    with contextlib.suppress(OSError):
        (storage / f"{PROBE}-{word}").unlink()
