"""``flowdistill`` and ``python -m flowdistill``: from its first moment on Ctrl-C ends it by one line."""

from __future__ import annotations

import os
import signal
from types import FrameType

from .checks import INTERRUPTED
from .talk import say


def main() -> None:
    """Import the command line, which takes a while, and run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from .cli import main as run

    run()


def _leave(_: int, __: FrameType | None) -> None:
    """Nothing has begun, and what is half imported may not take an exception."""
    say("interrupted")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
