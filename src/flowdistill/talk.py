"""The one place that prints. stdout is data, stderr is talk; neither ever ends the work that it tells of.

What a file's name or content puts into a text is shown, not obeyed: ESC is printed as ``\\x1b``. A character that a stream's encoding
lacks is printed as its escape, too. A stream that is closed, or None, gets nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console

IGNORED = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""What Python calls printable and nobody sees: Unicode's Default_Ignorable_Code_Point among letters and marks."""


def printable(line: str) -> str:
    """A text as one line of visible characters: controls, line breaks, turns of direction and lone surrogates become their escapes."""
    if line.isascii() and line.isprintable():
        return line
    return "".join(_escaped(char) if not char.isprintable() or IGNORED.match(char) else char for char in line)


def _escaped(char: str) -> str:
    return ascii(char)[1:-1]


def answer(text: str) -> None:
    """Print data on stdout. If the reader has gone away, nothing more is printed.

    Raises:
        OSError: it can't be written, as on a full disk.
    """
    with contextlib.suppress(BrokenPipeError):
        try:
            _write(sys.stdout, "".join(f"{printable(line)}\n" for line in text.split("\n")))
        except OSError as error:
            error.filename = error.filename or "stdout"
            raise


def say(line: str) -> None:
    """Print one line of talk on stderr. If it can't be written, the work that it tells of goes on."""
    with contextlib.suppress(OSError):
        _write(sys.stderr, f"{printable(line)}\n")


class Remarks:
    """What is to be told of a piece of work, to whoever listens.

    Attributes:
        lines: what was told, as it can be printed, in order, each once.
        say: gets each line when it is told. Default: it is printed on stderr. What only passes, such as a count, is said and not kept.
    """

    def __init__(self, say: Callable[[str], object] = say) -> None:
        self.lines, self.say = list[str](), say

    def tell(self, line: str) -> None:
        """A line, once."""
        if (shown := printable(line)) not in self.lines:
            self.lines.append(shown)
            self.say(shown)


def unheard() -> Remarks:
    """Remarks that nobody listens to."""
    return Remarks(lambda _: None)


def console() -> Console:
    """What rich draws with, on stderr: texts as they are, without markup, highlights or emoji."""
    from rich.console import Console

    return Console(file=cast("IO[str]", _Stderr()), highlight=False, markup=False, emoji=False, soft_wrap=True)


class _Stderr:
    """Whatever ``sys.stderr`` is at the moment. While a bar is drawn, rich puts itself in its place and must not draw on itself."""

    @property
    def _stream(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    @property
    def encoding(self) -> str:
        return _encoding(self._stream)

    def isatty(self) -> bool:
        return _is_terminal(self._stream)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            _write(self._stream, text)
        return len(text)

    def flush(self) -> None:
        """Every text is flushed when it is written."""


def answers_a_terminal() -> bool:
    """Whether data go to a terminal."""
    return _is_terminal(sys.stdout)


def _is_terminal(stream: Any) -> bool:
    """None, a closed stream and an object that can't say are no terminal."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return bool(stream.isatty())
    return False


def begin() -> None:
    """Prepare the streams before a command. Another library that prints, such as the parser, must not stumble over an encoding. A file
    that is opened later must not get the number of a stream that the caller closed, or C code would print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def end() -> None:
    """After a command, drop what could not be written, or Python would complain of it at its own end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write(stream: Any, text: str) -> None:
    if stream is None or getattr(stream, "closed", False):
        return
    encoding = _encoding(stream)
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    if hasattr(stream, "flush"):
        stream.flush()


def _encoding(stream: Any) -> str:
    return getattr(stream, "encoding", None) or "utf-8"
