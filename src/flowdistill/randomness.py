"""Where every random number comes from: a generator of its own for each (seed, purpose, epoch).

Nothing draws from the global generator, so no generator state needs storing: an epoch can be drawn again from its number
alone, an adapter cannot change a student's initial weights, and a run does not depend on which runs share its process.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose; different for every (seed, purpose, epoch)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator for one purpose (``order``, ``augment``, ...)."""
    return torch.Generator().manual_seed(derive(seed, purpose, epoch))


@contextmanager
def seeded(seed: int, purpose: str, epoch: int = 0, device: torch.device | None = None) -> Iterator[None]:
    """Inside, the global generators have a private state, from which initialisers and dropout draw. Afterwards the caller's state is back.

    These are the CPU's generator, that of ``device`` if it is a GPU, numpy's and Python's.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    derived, before = derive(seed, purpose, epoch), (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng(devices=gpus):
            torch.default_generator.manual_seed(derived)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(derived)
            random.seed(derived)
            np.random.seed(derived % 2**32)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def states() -> tuple[object, ...]:
    """The states of the CPU's global generators: torch's, numpy's and Python's."""
    _, numbers, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), np.asarray(numbers).tobytes(), *rest, random.getstate()
