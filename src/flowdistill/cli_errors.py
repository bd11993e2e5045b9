"""What the command line says if it can't do what was asked: one printable line, whatever the input."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ValidationError

from . import advice
from .checks import UserError, first_line, shortage
from .config import one_line
from .talk import printable, say

LONGEST_LINE = 600  # in characters


def complain(line: str, code: int) -> int:
    """Write one printable line to stderr, of a long line both ends, and return ``code``."""
    line = printable(line)
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    say(f"flowdistill: {line}")
    return code


def refuse_empty(words: Sequence[str]) -> None:
    """Refuse an empty value: it is a shell variable that was not set, and as a path it would mean this folder.

    Raises:
        UserError: there is one.
    """
    for before, word in pairwise(words):
        if not word or re.fullmatch("--[a-z-]+=", word):
            raise UserError(f"{word.rstrip('=') or before} is followed by nothing; give a value, or leave it out")


def usage(error: Any) -> str:
    """What the parser complains of. If that is a value: the option, the value and what is allowed."""
    if isinstance(error.__cause__, ValidationError):
        return one_line(error.__cause__, BaseModel, error.param.opts[-1])
    message = error.format_message().replace("\n\t", " ")  # before each choice of an option that is missing
    return f"{message.rstrip('.')} ({advice.usage()})"


def failure(error: Exception) -> str:
    """What the machine refused, and what to do."""
    if isinstance(error, OSError):
        cause = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    else:
        cause = f"the ledger: {error}" if isinstance(error, sqlite3.Error) else first_line(error)
    return f"{cause}; {shortage(error) or 'mend that'} and give the command again (finished runs are kept)"
