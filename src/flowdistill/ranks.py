"""The processes that train one run together, as torchrun starts them: which of them this is, and what they send each other.

A process that was not started beside others is alone, and every operation gives back what it was given. Importing this brings no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from . import advice
from .checks import UserError, shortage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(hours=1)  # that one rank waits for another, which may read data or compile; one that ends is noticed at once
COURTESY = 5.0  # seconds that another rank leaves rank 0 to tell what ended the run

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: its number, from 0. Rank 0 leads: it alone writes and talks.
        world: how many there are.
        apart: whether it works by itself for a while: then its operations leave the others out.
    """

    rank: int = 0
    world: int = 1
    apart: bool = False

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def _by_itself(self) -> bool:
        return self.apart or not self.several

    def own(self, start: int, size: int) -> slice:
        """Its part of the ``size`` positions from ``start`` on, of which every rank has equally many."""
        share = size // self.world
        return slice(start + self.rank * share, start + (self.rank + 1) * share)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Give each tensor its mean over the ranks, in place. All of them travel as one float32 buffer."""
        if self._by_itself or not tensors:
            return
        import torch
        from torch import distributed

        with torch.no_grad():
            flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
            with _another_may_end():
                distributed.all_reduce(flat)
            flat /= self.world
            for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def least_(self, tensors: Sequence[Tensor]) -> None:
        """Give each value of each tensor its minimum over the ranks, in place."""
        if self._by_itself:
            return
        from torch import distributed

        with _another_may_end():
            for tensor in tensors:
                distributed.all_reduce(tensor, distributed.ReduceOp.MIN)

    def gathered(self, own: Tensor) -> Tensor:
        """The rows [N, ...] of all ranks, one rank after the other: [world * N, ...], without a gradient. N is the same on every rank."""
        if self._by_itself:
            return own.detach()
        import torch
        from torch import distributed

        sent = own.detach().contiguous()
        as_bytes = sent.view(-1).view(torch.uint8)  # gloo does not know every type
        parts = [torch.empty_like(as_bytes) for _ in range(self.world)]
        with _another_may_end():
            distributed.all_gather(parts, as_bytes)
        return torch.cat(parts).view(sent.dtype).view(self.world * len(sent), *sent.shape[1:])

    def all(self, value: T) -> list[T]:
        """The values of all ranks, in their order. They travel as JSON: what another process sends is never executed."""
        return [self._from(rank, value) for rank in range(self.world)] if not self._by_itself else [value]

    def told(self, value: T) -> T:
        """The value of rank 0, as JSON."""
        return self._from(0, value)

    def _from(self, source: int, value: T) -> T:
        if self._by_itself:
            return value
        import torch
        from torch import distributed

        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor(len(content))
        with _another_may_end():
            distributed.broadcast(length, source)
            if self.rank != source:
                content = torch.empty(int(length), dtype=torch.uint8)
            distributed.broadcast(content, source)
        told: T = json.loads(bytes(content.tolist()))
        return told

    def tensors_from(self, source: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of one rank, on the CPU. What the other ranks give does not count."""
        sent = [tensor.detach().cpu().contiguous() for tensor in tensors]
        if self._by_itself:
            return sent
        import torch
        from torch import distributed

        shapes = self._from(source, [(list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in sent])
        if self.rank != source:
            sent = [torch.empty(shape, dtype=getattr(torch, kind)) for shape, kind in shapes]
        with _another_may_end():
            for tensor in sent:
                if tensor.numel():
                    distributed.broadcast(tensor.view(-1).view(torch.uint8), source)  # gloo does not know every type
        return sent


ALONE = Ranks()

_current = ALONE
_store: Any = None  # where the ranks of this run meet, once they have


def current() -> Ranks:
    """The ranks that this process works with now."""
    return _current


def launched() -> Ranks:
    """The ranks that torchrun started, as its environment says; alone if it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def device_name(wanted: str) -> str:
    """The device of this rank: with several ranks and GPUs, the GPU with the rank's number on its machine.

    Raises:
        UserError: a GPU is named that all would share, or there are fewer GPUs than ranks.
    """
    here = launched()
    if not here.several or wanted == "cpu":
        return wanted
    import torch

    if wanted == "auto" and not torch.cuda.is_available():
        return "cpu"
    if wanted not in ("auto", "cuda"):
        raise UserError(f"--device {wanted}: {here.world} processes can't share it; give --device cuda, where each takes a GPU, or cpu")
    number, count = int(os.environ.get("LOCAL_RANK", here.rank)), torch.cuda.device_count()
    if number >= count:
        started = os.environ.get("LOCAL_WORLD_SIZE", here.world)
        cure = f"start no more (torchrun --nproc-per-node {count}), or give --device cpu" if count else "give --device cpu"
        raise UserError(f"--device {wanted}: torchrun started {started} processes on a machine with {count} GPUs; {cure}")
    return f"cuda:{number}"


def refuse_uneven(batch_size: int, parts: int = 1) -> None:
    """Refuse a batch that can't be shared out equally. ``parts``: in how many parts each rank computes its share. Default: 1.

    Raises:
        UserError: the number of ranks does not divide it, or the parts do not divide a rank's share.
    """
    world = current().world
    if batch_size % world:
        fits = max(batch_size // world, 1) * world
        raise UserError(
            f"train.batch_size={batch_size} can't be shared out equally by {world} processes; set --batch-size to a multiple of {world}, "
            f"such as {fits}, or start another number of them (torchrun --nproc-per-node)"
        )
    if (share := batch_size // world) % parts:
        raise UserError(
            f"train.accumulate={parts} does not divide the {share} images that each of {world} processes has; set another number"
        )


def refuse_unjoined() -> None:
    """Refuse to train by oneself where torchrun started several processes, each of which would train the whole run.

    Raises:
        UserError: that is so.
    """
    if launched().several and not current().several:
        raise UserError(
            f"torchrun started {launched().world} processes, and from Python each would train the whole run; start this without torchrun, "
            f"or use the command line: {advice.options('torchrun', '-m', 'flowdistill', 'distill')}"
        )


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Inside, this process works with the others that torchrun started, over gloo, or over NCCL on GPUs."""
    global _store
    ranks = launched()
    if not ranks.several:
        yield ALONE
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _another_may_end():
        store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
        _store = distributed.PrefixStore(_agreed_name(store, ranks), store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=PATIENCE)
    with _as(ranks):
        yield ranks
    distributed.destroy_process_group()  # not after an error: it would wait for ranks that do not come


def _agreed_name(store: Any, ranks: Ranks) -> str:
    """A name that only the ranks which are alive know. When torchrun starts ranks again (``--max-restarts``), its store still has all that
    the ended ones left there, their addresses among it. Its count of restarts is no such name: machines may count differently.

    Raises:
        ConnectionError: another rank did not come.
    """
    own, others = secrets.token_hex(8), range(1, ranks.world)
    if not ranks.leads:
        store.set(f"asks/{ranks.rank}", own)
        _until(lambda: store.check([f"answer/{own}"]))
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/{ranks.rank}", "here")
        return str(name)

    def all_here() -> bool:
        for rank in others:
            if store.check([f"asks/{rank}"]):  # perhaps one that has ended, and its successor asks anew
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", own)
        return all(store.check([f"{own}/{rank}"]) for rank in others)

    _until(all_here)
    return own


def _until(met: Callable[[], bool]) -> None:
    """Wait in Python, which a signal ends, and not in the store, which would not let it through.

    Raises:
        ConnectionError: it takes longer than one rank waits for another.
    """
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not met():
        if time.monotonic() > deadline:
            raise ConnectionError(f"another process of this run did not begin within {PATIENCE}")
        time.sleep(0.02)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this process does by itself what the others may not do, or not at the same time. Its part of a batch stays its own."""
    with _as(replace(_current, apart=True)):
        yield


@contextlib.contextmanager
def _as(ranks: Ranks) -> Iterator[None]:
    global _current
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before


@contextlib.contextmanager
def _another_may_end() -> Iterator[None]:
    """Inside, the ranks speak with each other.

    Raises:
        ConnectionError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:  # of gloo, NCCL or the store, each in words of its own
        if shortage(error):
            raise
        raise ConnectionError("another process of this run has ended; see what it said") from error


def tells() -> bool:
    """Whether this process tells what ended the run: rank 0 if it comes to know, else the first of the others. Each is asked once."""
    here = launched()
    if _store is None or not here.several:
        return here.leads
    with contextlib.suppress(Exception):  # the store may have ended with torchrun
        deadline = time.monotonic() + (0 if here.leads else COURTESY)
        with contextlib.suppress(KeyboardInterrupt):  # torchrun ends the others, and this one waits no longer
            while time.monotonic() < deadline and not _store.check(["told"]):
                time.sleep(0.05)
        return bool(_store.add("told", 1) == 1)
    return False
