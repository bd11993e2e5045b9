"""Bugs to be planted into the package, each with the check that must catch it: the suite itself is tested (test_planted.py)."""

from . import capturing, checking, keeping, losses, networks, probing, reading, remembering, sharing, training, travelling
from .bug import BUGS, Bug

__all__ = [
    "BUGS",
    "Bug",
    "capturing",
    "checking",
    "keeping",
    "losses",
    "networks",
    "probing",
    "reading",
    "remembering",
    "sharing",
    "training",
    "travelling",
]
