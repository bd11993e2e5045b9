"""User mistakes, said in one line: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .talk import Remarks, printable, say

INTERRUPTED = 130  # a shell's exit code for Ctrl-C
MAX_SEEDS = 10_000
NAMED = 3  # of many names, so many are told
LONGEST_NAME = 60  # characters that are told of one
TRACEBACK = "Traceback (most recent call last):"
MAX_WORKERS = 256
NO_MEMORY = (
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
)  # as PyTorch and ld.so say it
FAILURES = (Exception, SystemExit)  # of anyone's code: by itself SystemExit would end the command without a word


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line and exits with 2."""


class Changes(Remarks):
    """What is used again and is not what was recorded: refused in one line, unless the user takes it as it is.

    Args:
        accepted: it is taken, and told; None: it can't be taken here, and nobody is told that it could.
        say: as of ``Remarks``.
    """

    def __init__(self, accepted: bool | None = False, say: Callable[[str], object] = say) -> None:
        super().__init__(say)
        self.accepted = accepted

    def meet(self, line: str, cure: str = "put the old one back") -> None:
        """There is such a difference.

        Raises:
            UserError: it is not accepted.
        """
        if not self.accepted:
            offer = "" if self.accepted is None else ", or take it as it is with --accept-changes (in Python accept_changes=True)"
            raise UserError(f"{line}; {cure}{offer}")
        self.tell(f"taken as it is: {line}")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The end of an error line: ``(did you mean 'x'?)`` where one name is close, else the list of names."""
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from: {', '.join(names)}" if names else "there is none to choose from"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type's name where it says nothing.

    One that brings another process's traceback, as a loader's worker does, says the line below that.
    """
    _, traced, text = str(error).rpartition(TRACEBACK)
    lines = (line.strip() for line in text.splitlines() if line.strip() and not (traced and line.startswith(" ")))
    return next(lines, type(error).__name__)


FORMULA = re.compile(r"'*[=+\-@\uff1d\uff0b\uff0d\uff20].", re.DOTALL)


def defused(cell: str) -> str:
    """A cell of a CSV with an apostrophe before it where a spreadsheet would compute it: it begins as a formula and is no number."""
    return f"'{cell}" if FORMULA.match(cell) and not _number(cell) else cell


def undefused(cell: str) -> str:
    """The cell that ``defused`` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def short(name: str) -> str:
    """A name that a file gave, as it can be told: printable, and cut in the middle where it is long."""
    text = printable(name)
    half = LONGEST_NAME // 2 - 2
    return text if len(text) <= LONGEST_NAME else f"{text[:half]}...{text[-half:]}"


def some(names: Iterable[str], most: int = NAMED) -> str:
    """The first few names, and how many there are beside them."""
    shown = list(names)
    more = f" and {len(shown) - most:,} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def joined(parts: Iterable[str], word: str) -> str:
    """``a, b and c``, with ``word`` before the last."""
    *before, last = parts
    return f"{', '.join(before)} {word} {last}" if before else last


def is_there(path: Path) -> bool:
    """Whether there is anything at a path, ``~`` expanded; no path is too long or too odd to be asked about."""
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def summary(error: BaseException) -> str:
    """An exception's type and the first line that it says."""
    line, name = first_line(error), type(error).__name__
    return name if line == name else f"{name}: {line}"


def shortage(error: BaseException) -> str:
    """What to do where an error says that this machine ran out of memory, of open files or of disk; else empty."""
    number, text = getattr(error, "errno", None), str(error)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in text for words in NO_MEMORY):
        return "free some memory, or train fewer seeds and methods together"
    if number in (errno.EMFILE, errno.ENFILE):
        return "allow more open files (ulimit -n)"
    return "make room there" if number == errno.ENOSPC or "disk is full" in text else ""


def pass_on_shortage(error: BaseException) -> None:
    """Raise an error again that says that the machine ran out of something: it tells nothing of the file or the network at hand."""
    if shortage(error):
        raise error


@contextmanager
def as_user_error() -> Iterator[None]:
    """Inside, a ValueError is the user's mistake.

    Raises:
        UserError: what the ValueError says.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


@contextmanager
def told_by_path(path: Path) -> Iterator[None]:
    """Inside, an error of the system names this file: a full disk does not say which file it had no room for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library, in words of its own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def regular_file(path: Path, label: str) -> Path:
    """The path, ``~`` expanded, of a file to be read. A folder, a device or a pipe is refused unopened: it may never end.

    Raises:
        UserError: there is no such file, or it is another kind of thing, or it may not be read; ``label`` names it.
    """
    try:
        expanded = path.expanduser()
        mode = expanded.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{label}: no such file") from None
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user's home, a NUL in the name
        raise UserError(f"{label}: no such file ({getattr(error, 'strerror', None) or first_line(error)})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{label}: {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'}, not a file; name a regular file")
    if not os.access(expanded, os.R_OK):
        raise UserError(f"{label}: you may not read it; change its permissions")
    return expanded


def obstacle(path: Path) -> str | None:
    """Why a file could not be made, known before anything is trained; None where nothing is in the way."""
    try:
        nearest = next(there for there in (path, *path.parents) if there.exists())
    except OSError as error:  # a name too long
        return error.strerror
    if nearest == path:
        return None if path.is_file() else "it is not a file"  # another process may just have made it
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"you may not write in {nearest}"


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """``'0-2,5'`` -> ``[0, 1, 2, 5]``; ranges include both ends. ``option`` is what was given.

    Raises:
        UserError: not numbers, a range that runs backwards, too many, or a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d{1,30})(?:-(\d{1,30}))?", part.strip(), re.ASCII)
        if not numbers:
            raise UserError(f"{option} {text!r}: {part.strip()!r} is no seed; write numbers and ranges such as 0-2,5")
        low, high = int(numbers[1]), int(numbers[2] or numbers[1])
        if high < low:
            raise UserError(f"{option} {text!r}: the range {part.strip()} runs backwards; write {high}-{low}")
        if (count := len(seeds) + high - low + 1) > MAX_SEEDS:
            raise UserError(f"{option} {text!r}: {count:,} seeds; one command takes at most {MAX_SEEDS:,}")
        seeds.extend(range(low, high + 1))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{option} {text!r} names a seed twice; name each once")
    return seeds
