"""From configs to finished runs: the only room that knows both training and the ledger."""

from .estimate import estimate
from .evaluate import Measured, evaluate, load_network
from .execute import finished, resume, run
from .export import export
from .preview import dry_run
from .watcher import Report, Watcher

__all__ = ["Measured", "Report", "Watcher", "dry_run", "estimate", "evaluate", "export", "finished", "load_network", "resume", "run"]
