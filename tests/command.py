"""Run the command line in this process, as a shell would see it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from flowdistill.cli import main


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
