"""A model of what CUDA demands of a capture: streams fork by events and join again, and nothing waits. It computes nothing itself.

A stream that waits for an event of a capture becomes part of it. Whatever a capture waits for must be part of it, and every part must
have been waited for before it ends. Work that goes to a stream beside the capture is not in the graph. Streams belong to a device. And
memory that is freed goes back to the stream that it was asked for on: before that is given it again, it must have waited for all users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.fake_cuda import MEMORY, launches, waits


class CaptureError(RuntimeError):
    """What CUDA would refuse; the message begins with its own name for it."""


@dataclass
class Memory:
    """Memory of a tensor that was made in a capture: the stream that it was asked for on, and how far others have used it."""

    held: StorageWeakRef
    owner: Stream
    used: dict[Stream, int] = field(default_factory=dict)


class Capture:
    """One graph in the making.

    Attributes:
        origin, members: the stream that it began on, and all that are part of it.
        memory: what was asked for so far; its key is PyTorch's own.
        shared: of that, what streams other than its owner use.
    """

    def __init__(self, origin: Stream) -> None:
        self.origin, self.members = origin, {origin}
        self.memory: dict[int, Memory] = {}
        self.shared: dict[int, Memory] = {}

    def gave(self, tensor: Tensor, stream: Stream) -> None:
        """An operation on a stream gave this tensor, in memory of its own or in another's."""
        held = StorageWeakRef(tensor.untyped_storage())
        if held.cdata in self.memory:
            return
        self.memory[held.cdata] = Memory(held, stream)
        for memory in self.shared.values():
            if memory.owner is stream and memory.held.expired() and not stream.knows(memory.used):
                raise CaptureError("a stream is given memory again that another may still use, for which it has not waited")

    def used(self, tensor: Tensor, stream: Stream) -> None:
        """An operation on a stream takes this tensor."""
        key = tensor.untyped_storage()._cdata
        memory = self.memory.get(key)
        if memory is not None and memory.owner is not stream:
            memory.used[stream] = stream.given
            self.shared[key] = memory


class Event:
    """A place in the work of a stream."""

    machine: Machine

    def __init__(self, *_: Any, **__: Any) -> None:
        self.capture: Capture | None = None
        self.reached: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        """What the stream was given so far."""
        stream = stream or self.machine.current_stream()
        self.capture, self.reached = stream.capture, stream.all_reached()

    def wait(self, stream: Stream | None = None) -> None:
        """What the stream is given from here on comes after it."""
        (stream or self.machine.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.machine.synchronize()


class Stream:
    """A stream of a device.

    Attributes:
        capture: which it is part of, if any.
        given: how much work it got.
        reached: of other streams, after how much of their work its own comes.
    """

    machine: Machine

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", self.machine.index(device))
        self.capture: Capture | None = None
        self.given = 0
        self.reached: dict[Stream, int] = {}
        self.machine.streams.append(self)

    def all_reached(self) -> dict[Stream, int]:
        return {**self.reached, self: self.given}

    def knows(self, given: Mapping[Stream, int]) -> bool:
        """Whether what it is given next comes after so much of the work of others."""
        reached = self.all_reached()
        return all(reached.get(stream, 0) >= number for stream, number in given.items())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self.machine.event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if self.capture is not event.capture:
            if self.capture is not None:
                raise CaptureError("cudaErrorStreamCaptureIsolation: a stream of the capture waits for work that was not captured")
            if event.capture is not self.machine.capture:
                raise CaptureError("cudaErrorCapturedEvent: a stream waits for an event of a capture that has ended")
            assert event.capture is not None
            event.capture.members.add(self)
            self.capture = event.capture
            self.given += 1  # it has to be waited for, with or without work
        for stream, given in event.reached.items():
            self.reached[stream] = max(given, self.reached.get(stream, 0))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.machine.synchronize()


class Machine:
    """The streams of one process.

    Attributes:
        streams: all that were made, but for those that every device has from the start.
        captures: all that ended well.
        capture: the one under way.
        replays: how often any graph ran.
    """

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.captures: list[Capture] = []
        self.capture: Capture | None = None
        self.replays = 0
        self.device = 0
        self.stream = type("Stream", (Stream,), {"machine": self})
        self.event = type("Event", (Event,), {"machine": self})
        self._current: dict[int, Stream] = {}
        self._sync_mode = 0
        self._made_by_graph: Stream | None = None

    def index(self, device: Any = None) -> int:
        """A device as PyTorch's functions take it: a number, a name, or nothing for the current one."""
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.device if index is None else index

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        if index not in self._current:
            self._current[index] = self.stream(index)
            self.streams.pop()
        return self._current[index]

    def set_stream(self, stream: Stream) -> None:
        """As PyTorch's own, it also makes the stream's device the current one."""
        self._current[stream.device.index] = stream
        self.device = stream.device.index

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        before, replaced = self.current_stream(), self.current_stream(stream.device)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(replaced)
            self.set_stream(before)

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, self.index(device)
        try:
            yield
        finally:
            self.device = before

    def set_device(self, device: Any) -> None:
        self.device = self.index(device)

    def work(self, index: int) -> None:
        """A device is given something to do, on its current stream."""
        stream = self.current_stream(index)
        if self.capture is not None and stream.capture is not self.capture:
            raise CaptureError(f"cudaErrorStreamCaptureImplicit: work on cuda:{index} goes to a stream that is not captured")
        stream.given += 1

    def synchronize(self, device: Any = None) -> None:
        """The host waits."""
        if self.capture is not None:
            raise CaptureError("cudaErrorStreamCaptureUnsupported: the host waits for the device")
        if self._sync_mode == 2:
            raise CaptureError("called a synchronizing CUDA operation")

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self._sync_mode = ("default", "warn", "error").index(mode) if isinstance(mode, str) else mode

    def get_sync_debug_mode(self) -> int:
        return self._sync_mode

    @contextmanager
    def graph(self, graph: Any, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        """``torch.cuda.graph``: where no stream is named, it makes one for all captures of the process, on the current device."""
        if stream is None:
            stream = self._made_by_graph = self._made_by_graph or self.stream()
        self.synchronize()
        with self.on_stream(stream):
            self.capture = stream.capture = Capture(stream)
            try:
                yield
                self._end(self.capture)
            finally:
                for member in self.capture.members:
                    member.capture = None
                self.capture = None

    def _end(self, capture: Capture) -> None:
        if left := [stream for stream in capture.members if not capture.origin.knows({stream: stream.given})]:
            raise CaptureError(f"cudaErrorStreamCaptureUnjoined: the capture ends before it has waited for {len(left)} of its streams")
        if self.current_stream(capture.origin.device) is not capture.origin:
            raise CaptureError("cudaErrorStreamCaptureWrongThread: another stream is current at the end than at the beginning")
        self.captures.append(capture)


class _Working(TorchDispatchMode):
    """Tells the machine of every operation."""

    def __init__(self, machine: Machine, device: torch.device) -> None:
        super().__init__()
        self.machine, self.device = machine, device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            return func(*args, **kwargs)
        ours, others = self._split((args, kwargs))
        if ours and waits(func.overloadpacket.__name__, args):
            self.machine.synchronize()
        out = func(*args, **kwargs)
        made, elsewhere = self._split(out)
        if (ours and elsewhere) or (others and made):
            self.machine.synchronize()  # a copy from or to memory that is not pinned
        if launches(func):
            for index in {self._index(tensor) for tensor in (*ours, *made)}:
                self.machine.work(index)
        if (capture := self.machine.capture) is not None:
            for tensor in made:
                capture.gave(tensor, self.machine.current_stream(self._index(tensor)))
            for tensor in (*ours, *made):
                capture.used(tensor, self.machine.current_stream(self._index(tensor)))
        return out

    def _index(self, tensor: Tensor) -> int:
        """Its GPU; a CPU that stands for one is the first."""
        return tensor.device.index or 0

    def _split(self, tree: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors on a GPU, and all others."""
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if tensor.device.type == self.device.type]
        return ours, [tensor for tensor in tensors if tensor.device.type != self.device.type]


class _CUDAGraph:
    """What was captured; it runs nothing."""

    machine: Machine

    def replay(self) -> None:
        self.machine.replays += 1

    def reset(self) -> None:
        """Nothing is held."""

    def pool(self) -> Sequence[int]:
        return (0, 0)


@contextmanager
def fake_capture(device: torch.device) -> Iterator[Machine]:
    """Inside, streams and captures of ``torch.cuda`` are the model's, for tensors on ``device``: the CPU may stand for a GPU."""
    machine = Machine()
    instead = {
        "Stream": machine.stream,
        "Event": machine.event,
        "CUDAGraph": type("CUDAGraph", (_CUDAGraph,), {"machine": machine}),
        "graph": machine.graph,
        "graph_pool_handle": lambda: (0, 0),
        "stream": machine.on_stream,
        "set_stream": machine.set_stream,
        "current_stream": machine.current_stream,
        "device": machine.on_device,
        "set_device": machine.set_device,
        "current_device": lambda: machine.device,
        "synchronize": machine.synchronize,
        "is_current_stream_capturing": lambda: machine.current_stream().capture is not None,
        "set_sync_debug_mode": machine.set_sync_debug_mode,
        "get_sync_debug_mode": machine.get_sync_debug_mode,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda device=None: 0),
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats"), lambda device=None: None),
    }
    with ExitStack() as stack:
        for name, value in instead.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(_Working(machine, device))
        yield machine
