"""Ranks as threads of this process, which exchange what processes would send. Mistakes that a test plants reach them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, distributed

from flowdistill.ranks import Ranks

T = TypeVar("T")


def by_ranks(work: Callable[[Ranks], T], world: int) -> list[T]:
    """What each of the ranks gives. Inside, it is ``torch.distributed`` that is replaced, and not what the package makes of it."""
    meeting, here = threading.Barrier(world, timeout=60), threading.local()
    sent: dict[int, Any] = {}

    def exchanged(value: Tensor) -> list[Tensor]:
        meeting.wait()
        sent[here.rank] = value.clone()
        meeting.wait()
        return [sent[rank] for rank in range(world)]

    def all_reduce(value: Tensor) -> None:
        value.copy_(torch.stack(exchanged(value)).sum(0))

    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        for part, value in zip(parts, exchanged(own), strict=True):
            part.copy_(value)

    def of(rank: int) -> T:
        here.rank = rank
        try:
            return work(Ranks(rank, world))
        except BaseException:
            meeting.abort()  # the others do not wait for what does not come
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(world) as pool:
        patch.setattr(distributed, "all_reduce", all_reduce)
        patch.setattr(distributed, "all_gather", all_gather)
        return list(pool.map(of, range(world)))
