"""A Ray cluster of nodes on loopback, each of one core and in processes of its own, that a test adds and kills.

python tests/helpers/ray_nodes.py [ENVIRONMENT]    # a JSON object: what the environment of the second node has besides

Prints the address, and does what lines on stdin say: ``add [ENVIRONMENT]``, ``kill NUMBER``. Ends with its stdin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PROMPT = {"RAY_worker_niceness": "0"}
"""Of a cluster whose workers do not stand behind all else on a machine where other tests run."""
OWN = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}
"""Of every process: nodes keep to loopback, and ask for a token."""


class Nodes:
    """That process, as a test sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the nodes ended"
        return line

    def _tell(self, *words: str) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        assert self._answer() == "done"

    def add(self, environment: Mapping[str, str] | None = None) -> None:
        """A node joins."""
        self._tell("add", json.dumps(environment or {}))

    def kill(self, number: int) -> None:
        """A node dies; the head is 0."""
        self._tell("kill", str(number))


@contextmanager
def nodes(second: Mapping[str, str] | None = None) -> Iterator[Nodes]:
    """Inside, a head and a second node."""
    start = [sys.executable, __file__, json.dumps(second or {})]
    with subprocess.Popen(
        start, env=os.environ | OWN | PROMPT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield Nodes(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def _main() -> None:
    from ray.cluster_utils import Cluster

    def node(environment: Mapping[str, str]) -> object:
        return cluster.add_node(num_cpus=1, **({"env_vars": environment} if environment else {}))

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    there = [cluster.head_node, node(json.loads(sys.argv[1]))]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        word, rest = line.split(maxsplit=1)
        if word == "add":
            there.append(node(json.loads(rest)))
        else:
            cluster.remove_node(there[int(rest)], allow_graceful=False)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _main()
