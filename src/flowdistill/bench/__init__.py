"""How fast training is on this machine: the engines beside the loop that a user would write."""

from .measure import ENGINES, bench, report

__all__ = ["ENGINES", "bench", "report"]
