"""Where people look at runs: TensorBoard, Weights & Biases, a CSV file. Each is a file here, behind one protocol (``base.py``).

They are told what the ledger has (``log.py``), and write into the runs' folders. They read nothing back, and change no number.
"""

from . import csv, tensorboard, wandb
from .base import TRACKERS, Kind, Tracker, chosen
from .log import Log, refuse_running

__all__ = ["TRACKERS", "Kind", "Log", "Tracker", "chosen", "csv", "refuse_running", "tensorboard", "wandb"]
