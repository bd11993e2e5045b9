"""What the shards of a plan know of each other: each keeps the whole plan in a file, so that two plans are not taken for one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import UserError, joined, regular_file

FILE = "plan.json"
FOLDER = "shards"  # below a folder of runs


@dataclass(frozen=True)
class ShardPlan:
    """A plan, and the part of it that one shard has.

    Attributes:
        number: of the shard, from 1.
        count: of all shards.
        runs: (label, fingerprint, seed) of every run of the whole plan.
    """

    number: int
    count: int
    runs: tuple[tuple[str, str, int], ...]

    @property
    def name(self) -> str:
        """Such as 2/5."""
        return f"{self.number}/{self.count}"

    def difference(self, other: ShardPlan) -> str:
        """How another plan differs from this one, in one phrase; empty if it does not."""
        if self.count != other.count:
            return f"{self.count} shards, and {other.count}"
        mine, others = ({(fingerprint, seed): label for label, fingerprint, seed in plan.runs} for plan in (self, other))
        gone = [label for key, label in mine.items() if key not in others]
        new = [label for key, label in others.items() if key not in mine]
        if gone and gone == new:
            return f"{gone[0]}: its data, networks, teacher or recipe changed"
        return "; ".join(f"{_first(labels)} is {word}" for labels, word in ((gone, "gone"), (new, "new")) if labels)

    def write(self, folder: Path) -> None:
        """Keep it in a shard's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps({"number": self.number, "count": self.count, "runs": self.runs}, indent=1) + "\n")


def read(folder: Path) -> ShardPlan | None:
    """The plan in a folder; None if the folder is no shard's.

    Raises:
        UserError: the file is not what a shard wrote.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content: Any = json.loads(regular_file(path, "plan").read_bytes())
        runs = tuple((str(label), str(fingerprint), int(seed)) for label, fingerprint, seed in content["runs"])
        return ShardPlan(int(content["number"]), int(content["count"]), runs)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is not what a shard wrote; put a copy of it back, or remove it and merge the folder as a plain ledger"
        ) from None


def _first(labels: Sequence[str]) -> str:
    return labels[0] + (f" (and {len(labels) - 1} more)" if labels[1:] else "")


def refuse_different(sources: Sequence[Path]) -> None:
    """Refuse shards that are not parts of one plan.

    Raises:
        UserError: two are not, or are the same part.
    """
    plans = [(source, plan) for source in sources if (plan := read(source)) is not None]
    for (first_source, first), (source, plan) in ((plans[0], other) for other in plans[1:]):
        if apart := first.difference(plan):
            raise UserError(
                f"{first_source} and {source} are shards of different plans ({apart}); the plan changed since one of them ran: train that "
                f"shard again, or merge the two by separate commands"
            )


def missing(sources: Sequence[Path]) -> str:
    """Which shards of the plan are not among these folders, as a sentence; empty if all are, or none is a shard's."""
    plans = [plan for source in sources if (plan := read(source)) is not None]
    if not plans:
        return ""
    there = {plan.number for plan in plans}
    absent = [f"{number}/{plans[0].count}" for number in range(1, plans[0].count + 1) if number not in there]
    return f"not among them: shard {joined(absent, 'and')}" if absent else ""
