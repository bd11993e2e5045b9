"""Whose code runs: code that the user names, or that a training of the user's recorded; never code that a received file names alone.

A network's name can be code: ``FILE.py:FUNCTION`` or ``PACKAGE.MODULE:FUNCTION``. Such a name may stand in a weights file, in a ledger or
in a config, and those come from anywhere. Names that the command line or a call from Python gives are the user's word. What a training
used is written down, with the place and the hashes of the code, in the user's state folder; equal code in that place runs again. The
state folder is ``FLOWDISTILL_STATE``, by default ``$XDG_STATE_HOME/flowdistill`` or ``~/.local/state/flowdistill``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checks import UserError

STATE = "FLOWDISTILL_STATE"
FILE = "code.jsonl"  # one line for each network that is code: its ledger, name, place and hashes
Hashes = Mapping[str, str]

_named: set[str] = set()
_origins: dict[str, str] = {}
_everything = False


def name(*references: object) -> None:
    """The user wrote these references (MODEL, MODEL@FILE) on the command line or in a call: their code may run."""
    for reference in references:
        if isinstance(reference, str):
            _named.update((reference, reference.partition("@")[0]))


def named() -> frozenset[str]:
    """What the user wrote so far, as another process that works for the same command is told."""
    return frozenset(_named)


def came_from(reference: object, origin: str) -> None:
    """A name was read in a file; ``origin`` says in which."""
    if isinstance(reference, str):
        _origins[reference.partition("@")[0]] = origin


@contextmanager
def code(trusted: bool) -> Iterator[None]:
    """Inside, all code may run, whoever names it, if ``trusted`` (``--trust-code``)."""
    global _everything
    before, _everything = _everything, _everything or trusted
    try:
        yield
    finally:
        _everything = before


def meet(model: str, place: str, hashes: Callable[[], Hashes]) -> None:
    """A network is wanted whose name is code in ``place``. The code is read, for its hashes, only if a training recorded it.

    Raises:
        UserError: nobody vouches for the code. Nothing of it was imported, executed or called.
    """
    if _everything or model in _named:
        return
    recorded = [line["code"] for line in _recorded() if (line["model"], line["place"]) == (model, place)]
    if recorded and dict(hashes()) in recorded:
        return
    why = "it changed since a training of yours recorded it" if recorded else "no training of yours recorded it"
    hint = "" if state_folder() or recorded else f" (there is no state folder for such records here; {STATE} names one)"
    raise UserError(
        f"{_origins.get(model, 'a file')} names code: {model} would run {place}. This command does not name it, and {why}{hint}; read that "
        f"code, then let it run with --trust-code (in Python trust_code=True)"
    )


def record(model: str, place: str, hashes: Hashes, ledger: Path) -> None:
    """A training of the user's ran this code.

    Raises:
        OSError: it can't be written down.
    """
    folder = state_folder()
    line = {"ledger": os.fspath(ledger.resolve()), "model": model, "place": place, "code": dict(hashes)}
    if folder is None or line in _recorded():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / FILE, "ab", buffering=0, opener=_private) as file:
        file.write(f"{json.dumps(line)}\n".encode())  # in one piece, whoever else appends


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def state_folder() -> Path | None:
    """Where this user's records lie; None if the user has no home."""
    if folder := os.environ.get(STATE):
        return Path(folder)
    if (state_home := os.environ.get("XDG_STATE_HOME", "")) and Path(state_home).is_absolute():
        return Path(state_home, "flowdistill")
    try:
        return Path.home() / ".local" / "state" / "flowdistill"
    except RuntimeError:
        return None


def _recorded() -> list[dict[str, Any]]:
    """The records that this user wrote. A file that others may write counts for nothing, and a line that was cut off is skipped."""
    folder = state_folder()
    try:
        file = os.open(folder / FILE, os.O_RDONLY) if folder else -1
    except OSError:
        return []
    if file < 0:
        return []
    with open(file, encoding="utf-8", errors="replace") as opened:
        status = os.fstat(file)
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return []
        return [line for line in map(_line, opened) if line is not None]


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line.keys() >= {"ledger", "model", "place", "code"} else None
