"""From configs to finished runs: the only room that knows both training and the ledger."""

from .evaluate import Measured, evaluate, load_network
from .execute import resume, run
from .preview import dry_run
from .watcher import Watcher

__all__ = ["Measured", "Watcher", "dry_run", "evaluate", "load_network", "resume", "run"]
