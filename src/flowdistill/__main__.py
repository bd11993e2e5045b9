"""``python -m flowdistill``."""

from .cli import main

main()
