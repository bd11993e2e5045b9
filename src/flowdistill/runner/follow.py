"""One run by several processes: rank 0 runs, records and talks as ever; the others train what it announces, and write nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..device import computing
from ..ledger import Ledger
from ..ranks import current, joined
from ..training import checkpoint
from ..training.cohort import Cohort, train
from .cohorts import Member, prepare
from .plan import recorded


@dataclass(frozen=True)
class Announced:
    """The cohort that comes next, and how it is trained.

    Attributes:
        runs: numbers of its runs, which are on record by now, in the order of its members.
    """

    runs: tuple[int, ...]
    engine: str
    deterministic: bool
    threads: int


def announce(cohort: Cohort, members: Sequence[Member]) -> None:
    """Tell the other ranks which cohort comes next, and give them its state. Without others this does nothing."""
    ranks = current()
    if ranks.several:
        runs = tuple(member.no for member in members)
        deterministic = torch.are_deterministic_algorithms_enabled()
        ranks.told(asdict(Announced(runs, cohort.engine.name, deterministic, torch.get_num_threads())))
        checkpoint.share(cohort, ranks)


def told(cohort: Cohort, members: Sequence[Member]) -> str:
    """What the user is told of the ranks."""
    world, size = current().world, cohort.train.batch_size
    together = "; where batches are normalised, it is by all ranks together" if cohort.train.batch_norm == "synchronised" else ""
    apart = any(member.job.normalises_apart for member in members)
    how = ", by which alone it normalises where it normalises batches" if apart else together
    return f"{world} ranks, each with {size // world} of a batch's {size} images{how}"


@contextmanager
def leading(device: torch.device) -> Iterator[None]:
    """Inside, rank 0 works with the others, which are told after that that nothing comes any more. Without others this does nothing."""
    with joined(device) as ranks:
        yield
        ranks.told(None)


def follow(opened: Callable[[], Ledger], device: torch.device, workers: int | None = None) -> None:
    """Train what rank 0 announces, until it dismisses this rank. The cohort is made again from its runs' rows, as a resumed one is.

    Args:
        opened: opens the ledger, which may not be there before rank 0 has registered a run.

    Raises:
        UserError: the data, the teacher or the code that this process finds are not those that rank 0 put on record.
    """
    nothing: dict[str, Any] | None = None
    while (told_next := current().told(nothing)) is not None:
        announced, ledger = Announced(**told_next), opened()
        runs = [ledger.run(no) for no in announced.runs]
        with computing(device, deterministic=announced.deterministic, cores=announced.threads):
            (cohort, _), *others = prepare(recorded(runs, ledger, device), device, announced.engine, workers)
            assert not others, "runs of one cohort stay together"
            checkpoint.share(cohort, current())
            for _ in train(cohort):
                pass
