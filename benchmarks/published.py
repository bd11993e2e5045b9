"""What published weights add to making a network: timm's ResNet-18 from a cache that this lays (random weights, 45 MB), and fresh.

python benchmarks/published.py [ROUNDS]      # by default 10

The first time the file is read and its SHA-256 computed; a process remembers both. Seconds are of the clock.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

CACHE = tempfile.mkdtemp()
os.environ |= {"HF_HUB_CACHE": CACHE, "HF_HUB_OFFLINE": "1"}  # before the hub's client is imported

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import hub  # noqa: E402

from flowdistill import models  # noqa: E402
from flowdistill.types import DataSpec  # noqa: E402

DATA = DataSpec("random", 100, 1000, 3, 64, 64)
FRESH, PUBLISHED = "timm:resnet18", "timm:resnet18.a1_in1k"


def seconds(name: str) -> float:
    """Of making this network once."""
    began = time.perf_counter()
    models.build(name, DATA, seed=0)
    return time.perf_counter() - began


def main(rounds: str = "10") -> None:
    """Print the first time of each, and the medians of the others, which take turns."""
    hub.lay(Path(CACHE), "timm/resnet18.a1_in1k", {"model.safetensors": hub.weights(hub.network("resnet18"))})
    first = {name: seconds(name) for name in (FRESH, PUBLISHED)}
    found: dict[str, list[float]] = {name: [] for name in first}
    for _ in range(int(rounds)):
        for name, measured in found.items():
            measured.append(seconds(name))
    for name, measured in found.items():
        print(f"{name}: first {first[name]:.3f} s, then {statistics.median(measured):.3f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
