"""What it costs to know which network it is: the probe, the hash of its contents and of its weights, the hash of its file.

    python benchmarks/identity.py [MODEL:SIZE ...]

Process time in seconds on the threads that are set, beside building the network once.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowdistill import models
from flowdistill.models.code import contents, file_hash
from flowdistill.models.probe import probe
from flowdistill.report.tables import render
from flowdistill.training.weights import hash_weights, load_weights, save_weights
from flowdistill.types import DataSpec

MODELS = ("resnet8:32", "resnet110:32", "wrn-40-2:32", "timm:resnet50:64", "timm:resnet50:224", "timm:vit_small_patch16_224:224")
COLUMNS = ("network", "size", "build", "probe of a student", "probe of a teacher", "contents", "weights", "file", "sealed file read")


def seconds(job: Callable[[], Any]) -> float:
    """Process time of a second call."""
    job()
    started = time.process_time()
    job()
    return round(time.process_time() - started, 3)


def row(name: str, size: int, folder: Path) -> dict[str, Any]:
    """One network."""
    data = DataSpec("data", 1000, 100, 3, size, size)
    spec = models.spec(name, data)
    taps = tuple(tap.name for tap in spec.taps)
    net, path = models.build(name, data, taps=taps, spec=spec), folder / "student.safetensors"
    save_weights(path, net.state_dict(), {"model": name})
    return {
        "network": name,
        "size": size,
        "build": seconds(lambda: models.build(name, data)),
        "probe of a student": seconds(lambda: probe(net, 3, size, size, trains=True)),
        "probe of a teacher": seconds(lambda: probe(net, 3, size, size, trains=False)),
        "contents": seconds(lambda: contents(net.body)),
        "weights": seconds(lambda: hash_weights(net.state_dict())),
        "file": seconds(lambda: file_hash(path)),
        "sealed file read": seconds(lambda: load_weights(path)),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        rows = [row(name.rpartition(":")[0], int(name.rpartition(":")[2]), Path(temporary)) for name in sys.argv[1:] or MODELS]
    print(render(rows, "md", COLUMNS))
