"""A crew that Ray makes: its nodes are checked, and cohorts handed to its workers. Placement, retries and the death of nodes are Ray's."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import UserError, first_line
from ...checks import joined as enumerated
from ...data.dataset import ImageData
from ...env import code_hash, versions
from . import storage as storages
from . import worker
from .driver import Lost
from .kit import Kit, Measured, Result, Word
from .ray_cluster import AUTO, demands_token, joined, refuse_open

ROOM = 1.3  # times what was measured that a cohort may take
MOST_A_GPU = 8  # cohorts
RETRIES = 3  # of a cohort whose worker or node died
SAME = ("flowdistill", "torch", "numpy", "python")  # versions that must be equal on all machines


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as it sees itself.

    Attributes:
        code: hash of this package's code there.
        demands_token: whether its Ray does.
        sees_storage: whether it reads what the driver wrote there, and can write beside it.
    """

    id: str
    name: str
    versions: Mapping[str, str]
    code: str
    demands_token: bool
    sees_storage: bool

    def other(self, driver: Node) -> str:
        """In what it differs from the driver's machine, in one phrase; empty if in nothing that matters."""
        apart = [
            f"{name} {self.versions[name]}, not {driver.versions[name]}" for name in SAME if self.versions[name] != driver.versions[name]
        ]
        if not apart and self.code != driver.code:
            apart = [f"other code of flowdistill ({self.code[:8]}, not {driver.code[:8]})"]
        return enumerated(apart, "and") if apart else ""


def here(node: str, storage: str, word: str) -> Node:
    """This machine."""
    sees = storages.sees_probe(Path(storage), word)
    return Node(node, socket.gethostname(), {name: versions()[name] for name in SAME}, code_hash(), demands_token(), sees)


@contextmanager
def connected(address: str, device: str, storage: Path, option: Sequence[str]) -> Iterator[RayCrew]:
    """Inside, the workers of a Ray cluster.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``, of the workers.
        storage: the folder in which they keep states.
        option: the words of the command line that name this crew.

    Raises:
        UserError: as ``ray_cluster.joined``; or a node has other code, or does not see the storage.
    """
    with joined(address) as ray, _probe(storage) as word:
        yield RayCrew(ray, address, device, storage, word, option)


@contextmanager
def _probe(storage: Path) -> Iterator[str]:
    """Inside, something lies in the storage that each node must see."""
    try:
        word = storages.leave_probe(storage)
    except OSError as error:
        raise UserError(f"--storage {storage} cannot be written ({error.strerror}); name another folder") from None
    try:
        yield word
    finally:
        storages.remove_probe(storage, word)


class Mailbox:
    """Where workers leave their words until the driver takes them."""

    def __init__(self) -> None:
        self._words: list[Word] = []

    def post(self, word: Word) -> None:
        """Leave a word."""
        self._words.append(word)

    def take(self) -> list[Word]:
        """All words since the last time."""
        words, self._words = self._words, []
        return words


def work(kit: Kit, data: ImageData | None, given: bytes, mailbox: Any, driver: Node, probe: str) -> Result | Node:
    """What Ray runs on a node: a cohort; or nothing, where the node is another than it must be."""
    import ray

    node = here(ray.get_runtime_context().get_node_id(), kit.storage, probe)
    if node.other(driver):
        return node
    posted: list[Any] = []

    def tell(attempt: str, told: Any) -> None:
        posted[:] = [mailbox.post.remote(Word(kit.number, attempt, node.name, told))]

    result = worker.train(kit, data, given, node.name, tell)
    if posted:
        ray.get(posted[-1])  # the last word comes before the result
    return result


class RayCrew:
    """The workers of a Ray cluster."""

    def __init__(self, ray: Any, address: str, device: str, storage: Path, probe: str, option: Sequence[str]) -> None:
        self._ray, self._address, self._probe, self.option = ray, address, probe, option
        self.storage = storage.absolute()
        self._driver = here(ray.get_runtime_context().get_node_id(), str(self.storage), probe)
        self._unfit: dict[str, str] = {}  # id of a node -> what is wrong with it
        self._told = set[str]()
        self._check()
        total = ray.cluster_resources()
        self.device = ("cuda" if total.get("GPU") else "cpu") if device == AUTO else device
        if self.device == "cuda" and not total.get("GPU"):
            raise UserError(f"--device {device}: no node of the Ray cluster has a GPU; give --device cpu")
        self.threads, self._share = 1, 1.0
        self._memory = 0
        self.slots = sum(map(self._slots_of, ray.nodes()))
        mailbox = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox)
        self._mailbox = mailbox.options(scheduling_strategy=self._on(self._driver.id, soft=True)).remote()
        self._work = ray.remote(work)
        self._data: dict[str, Any] = {}  # hash of images -> where Ray keeps them, for all nodes
        self._given: tuple[bytes, Any] = b"", None
        self._tasks: dict[Any, tuple[int, Callable[[], Any]]] = {}

    def _on(self, node: str, *, soft: bool) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id=node, soft=soft)

    def _check(self) -> None:
        """Ask every node what it is.

        Raises:
            UserError: one is not what it must be.
        """
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        ask = self._ray.remote(num_cpus=0, max_retries=0)(here)
        asked = {
            node["NodeID"]: ask.options(scheduling_strategy=self._on(node["NodeID"], soft=False)).remote(
                node["NodeID"], str(self.storage), self._probe
            )
            for node in alive
        }
        for node in alive:
            name = f"--ray {self._address}: node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            try:
                found: Node = self._ray.get(asked[node["NodeID"]], timeout=120)
            except Exception as error:
                if "flowdistill" in str(error):
                    why = "has no flowdistill, or an older one; install the version of this machine there"
                else:
                    why = f"does not work: {_last_line(error)}"
                raise UserError(f"{name} {why}") from None
            refuse_open(self._address, [node["NodeManagerAddress"]], demands_token=found.demands_token)
            if other := found.other(self._driver):
                raise UserError(f"{name} has {other}; install the same on all machines")
            if not found.sees_storage:
                raise UserError(
                    f"{name} does not see --storage {self.storage}, or can't write there; name a folder that all machines share"
                )

    def measure(self, kit: Kit, data: ImageData | None, given: bytes) -> str:
        """As ``Crew`` has it. Measured is on one node; all are taken to be like it."""
        wanted = {"num_gpus": 1} if self.device == "cuda" else {}
        task = self._ray.remote(worker.measure).options(num_cpus=self.threads, max_retries=1, **wanted)
        try:
            measured: Measured = self._ray.get(task.remote(kit, self._put_data(data), self._put_given(given)))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise UserError(f"{kit.title}: it can't be trained on this cluster ({_last_line(error)})") from None
        self._memory = int(ROOM * measured.memory)
        told = f"{measured.memory / 2**30:.1f} GiB of memory"
        if self.device == "cuda":
            at_once = max(1, min(MOST_A_GPU, int(1 / max(ROOM * measured.device_share, 1e-9))))
            self._share = 1 / at_once
            told += f", {100 * measured.device_share:.0f} % of a GPU's"
        self.slots = sum(map(self._slots_of, self._ray.nodes()))
        if not self.slots:
            raise UserError(f"{kit.title} takes {told}, more than a node of this cluster has; set a smaller --batch-size")
        return f"a cohort takes {told} and {measured.seconds:.1f} s an epoch and thread, as measured by a few steps of the eager engine"

    def _slots_of(self, node: Mapping[str, Any]) -> int:
        """How many cohorts a node trains at the same time."""
        has = node["Resources"] if node["Alive"] else {}
        wanted = {"CPU": float(self.threads), "memory": float(self._memory), "GPU": self._share if self.device == "cuda" else 0.0}
        return min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items() if amount)

    def _put_data(self, data: ImageData | None) -> Any:
        if data is not None and data.hash not in self._data:
            self._data[data.hash] = self._ray.put(data)
        return None if data is None else self._data[data.hash]

    def _put_given(self, given: bytes) -> Any:
        if self._given[0] is not given:
            self._given = given, self._ray.put(given)
        return self._given[1]

    def begin(self, kit: Kit, data: ImageData | None, given: bytes) -> None:
        """As ``Crew`` has it."""
        data_ref, given_ref = self._put_data(data), self._put_given(given)

        def submit() -> Any:
            options: dict[str, Any] = {"num_cpus": self.threads, "max_retries": RETRIES, "name": kit.title}
            if self.device == "cuda":
                options["num_gpus"] = self._share
            if self._memory:
                options["memory"] = self._memory
            if self._unfit:
                options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self._unfit)})"}
            return self._work.options(**options).remote(kit, data_ref, given_ref, self._mailbox, self._driver, self._probe)

        self._tasks[submit()] = kit.number, submit

    def words(self) -> Sequence[Word]:
        """As ``Crew`` has it. If the mailbox's node dies, words are lost, but no result: that has all of them."""
        try:
            taken: list[Word] = self._ray.get(self._mailbox.take.remote())
        except self._ray.exceptions.RayActorError:  # Ray begins it again elsewhere
            return []
        return taken

    def results(self, seconds: float) -> Mapping[int, Result | Lost]:
        """As ``Crew`` has it."""
        if not self._tasks:
            return {}
        ready, _ = self._ray.wait([*self._tasks], num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait([*self._tasks], num_returns=len(self._tasks), timeout=0)
        ended: dict[int, Result | Lost] = {}
        for task in ready:
            number, submit = self._tasks.pop(task)
            result = self._result(task)
            if isinstance(result, Node):  # it joined later, and is another than it must be
                self._unfit[result.id] = result.other(self._driver)
                self._tasks[submit()] = number, submit
            else:
                ended[number] = result
        return ended

    def _result(self, task: Any) -> Result | Node | Lost:
        errors = self._ray.exceptions
        try:
            result: Result | Node = self._ray.get(task)
        except errors.TaskCancelledError:
            return Lost("it was cancelled")
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError) as error:
            return Lost(f"its worker died {RETRIES + 1} times, the last time: {first_line(error)}")
        except errors.RayError as error:
            return Lost(_last_line(error))
        return result

    def remarks(self) -> Sequence[str]:
        """What is to be told of the nodes."""
        new = [f"node {node[:8]} is left out: it has {why}" for node, why in self._unfit.items() if node not in self._told]
        self._told |= self._unfit.keys()
        return new

    def cancel(self, number: int) -> None:
        """As ``Crew`` has it."""
        for task, (cohort, _) in [*self._tasks.items()]:
            if cohort == number:
                self._ray.cancel(task)
                del self._tasks[task]

    def stop(self, seconds: float) -> None:
        """As ``Crew`` has it."""
        for task in self._tasks:
            with contextlib.suppress(Exception):
                self._ray.cancel(task)
        with contextlib.suppress(Exception):
            self._ray.wait([*self._tasks], num_returns=max(1, len(self._tasks)), timeout=seconds)


def _last_line(error: BaseException) -> str:
    """What an error of Ray says at its end, where the error of the code stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
