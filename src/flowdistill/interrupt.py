"""What Ctrl-C and a kill do, at each moment of a command."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FrameType

from . import lock, ranks
from .checks import INTERRUPTED
from .talk import say


def leave(_: int, __: FrameType | None) -> None:
    """End at once: nothing has begun, and what is half imported may not take an exception."""
    if ranks.launched().leads:
        say("interrupted")
    os._exit(INTERRUPTED)


def stop(number: int, frame: FrameType | None) -> None:
    """End a command by KeyboardInterrupt, so that what it does is put on record. While a library is imported, and nothing is trained yet,
    it ends at once: C code in the middle of its beginning aborts the process when an exception comes.
    """
    if not lock.any_taken() and _imports(frame):
        leave(number, frame)
    raise KeyboardInterrupt


def over(code: int) -> Callable[[int, FrameType | None], None]:
    """What a signal does when the command is over: the process ends at once, as the command did."""
    return lambda _, __: os._exit(code)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
