"""From configs to finished runs: the only room that knows both training and the ledger."""

from .due import finished
from .estimate import Duration, estimate
from .evaluate import Measured, evaluate, load_network
from .execute import resume, run
from .export import export
from .follow import follow, leading
from .preview import dry_run, duration
from .watcher import Report, Watcher

__all__ = [
    "Duration",
    "Measured",
    "Report",
    "Watcher",
    "dry_run",
    "duration",
    "estimate",
    "evaluate",
    "export",
    "finished",
    "follow",
    "leading",
    "load_network",
    "resume",
    "run",
]
