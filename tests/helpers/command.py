"""Run the command line in this process, as a shell would see it."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import pytest

from flowdistill.cli import main

SLOW = 10  # seconds, on a machine that does other work too
LARGE = 512 << 20  # bytes, the first import of torch and scikit-learn among them


class Evil:
    """Whoever unpickles it makes a file in the working directory."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('executed', 'w').close()",)


class Said(NamedTuple):
    code: int
    out: str
    err: str


def command(folder: Path, *words: str) -> Said:
    """``flowdistill WORDS`` in a folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr("sys.argv", ["flowdistill", *words])
        with pytest.raises(SystemExit) as end:
            main()
    code = end.value.code
    return Said(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def assert_refused(folder: Path, words: list[str], line: str, code: int = 2) -> None:
    """The whole answer is this one line; it came soon, took little memory, and left the folder as it was."""
    before, peak = _contents(folder), _peak_memory()
    with _limited(SLOW):
        said = command(folder, *words)
    assert said == Said(code, "", f"flowdistill: {line}\n")
    assert _contents(folder) == before, "a mistake writes nothing and executes nothing"
    assert _peak_memory() - peak < LARGE


def _contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of change of all below a folder; SQLite's passing companions of a ledger aside."""
    below = {str(path): path.lstat() for path in folder.rglob("*") if not path.name.startswith("ledger.db-")}
    return {name: (found.st_mode, found.st_size, found.st_mtime_ns if S_ISREG(found.st_mode) else 0) for name, found in below.items()}


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Fail what takes longer, a read that waits for ever included."""

    def late(*_: object) -> None:
        pytest.fail(f"not refused within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def as_shell_reads(line: str) -> list[str]:
    """The words of a command after its first, by a shell."""
    name, *_ = line.split(" ")
    assert name == "flowdistill", line
    shown = subprocess.run(
        ["bash", "-c", f"flowdistill() {{ printf '%s\\0' \"$@\"; }}; {line}"], capture_output=True, check=True, timeout=60
    )
    assert shown.stderr == b""
    return [os.fsdecode(word) for word in shown.stdout.split(b"\0")[:-1]]
