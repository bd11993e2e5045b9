"""The reference log of FSP: its figures, and what a document that reproduces it is read for."""

from __future__ import annotations

from collections.abc import Sequence

from flowdistill.ledger import Run

LOG = {
    ("resnet20", "cifar10"): ([91.95713, 91.89703, 92.28766], [195, 187, 193]),
    ("resnet20", "cifar100"): ([68.00881, 67.96875, 68.11899], [126, 155, 166]),
    ("resnet110", "cifar10"): ([92.19752, 92.47797, 93.46955], [198, 172, 178]),
    ("resnet110", "cifar100"): ([73.27724, 73.36739, 71.90505], [166, 167, 154]),
}
"""Model and data set -> the accuracies of its three runs, and the epochs at which they were best."""


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next."""
    return text.split(f"\n{title}\n")[1].split("\n## ")[0]


def accuracies(runs: Sequence[Run], method: str) -> list[float]:
    return [run.accuracy for run in runs if run.method == method and run.accuracy is not None]
