"""``flowdistill`` and ``python -m flowdistill``: from its first moment on Ctrl-C ends it by one line."""

from __future__ import annotations

import signal

from .interrupt import leave, over


def main() -> None:
    """Import the command line, which takes a while, and run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    from .cli import main as run

    try:
        run()
    except SystemExit as end:  # Python ends, and what it calls for that may not take an exception either
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, over(end.code if isinstance(end.code, int) else 0))
        raise


if __name__ == "__main__":
    main()
