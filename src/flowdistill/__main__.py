"""``flowdistill`` and ``python -m flowdistill``: from its first moment on Ctrl-C ends it by one line."""

from __future__ import annotations

import signal

from .interrupt import leave


def main() -> None:
    """Import the command line, which takes a while, and run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
