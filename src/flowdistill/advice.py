"""The commands that messages advise: quoted, and complete, so that each can be pasted into a shell."""

from __future__ import annotations

import os
import shlex

RUNS = "runs"  # the folder of runs that a command takes by itself


def command(*words: object, runs: str | os.PathLike[str] = RUNS) -> str:
    """``flowdistill WORD ...``, with ``--runs`` where that is another folder than a command takes by itself."""
    where = [] if os.fspath(runs) == RUNS else ["--runs", os.fspath(runs)]
    return shlex.join(["flowdistill", *map(str, words), *where])
