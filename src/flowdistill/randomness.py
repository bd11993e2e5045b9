"""Where every random number comes from: a generator of its own for each (seed, purpose, epoch).

Nothing draws from the global generator, so no generator state needs storing: an epoch can be drawn again from its number
alone, an adapter cannot change a student's initial weights, and a run does not depend on which runs share its process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose; different for every (seed, purpose, epoch)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator for one purpose (``order``, ``augment``, ...)."""
    return torch.Generator().manual_seed(derive(seed, purpose, epoch))


@contextmanager
def seeded(seed: int, purpose: str, epoch: int = 0) -> Iterator[None]:
    """What draws from the global generator inside, as initialisers do, sees a private state, and the caller's is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, purpose, epoch))
        yield
