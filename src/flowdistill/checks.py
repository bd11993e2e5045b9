"""User mistakes, said in one line: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MOST_SEEDS = 10_000


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line and exits with 2."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The end of an error line: ``(did you mean 'x'?)`` where one name is close, else the list of names."""
    names = list(allowed)
    close = difflib.get_close_matches(given, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from: {', '.join(names)}" if names else "there is none to choose from"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type's name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def parse_seeds(text: str) -> list[int]:
    """``'0-2,5'`` -> ``[0, 1, 2, 5]``; ranges include both ends.

    Raises:
        UserError: not numbers, a range that runs backwards, or a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        if not numbers:
            raise UserError(f"--seeds {text!r}: {part.strip()!r} is no seed; write numbers and ranges such as 0-2,5")
        low, high = int(numbers[1]), int(numbers[2] or numbers[1])
        if high < low:
            raise UserError(f"--seeds {text!r}: the range {part.strip()} runs backwards; write {high}-{low}")
        if high - low >= MOST_SEEDS:
            raise UserError(f"--seeds {text!r}: {high - low + 1:,} seeds in one range; at most {MOST_SEEDS:,}")
        seeds.extend(range(low, high + 1))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r} names a seed twice; a seed is trained once (use --again to repeat a finished run)")
    return seeds
