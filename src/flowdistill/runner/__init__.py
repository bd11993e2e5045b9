"""From configs to finished runs: the only room that knows both training and the ledger."""

from .evaluate import Measured, evaluate, load_network
from .execute import Watcher, dry_run, run

__all__ = ["Measured", "Watcher", "dry_run", "evaluate", "load_network", "run"]
