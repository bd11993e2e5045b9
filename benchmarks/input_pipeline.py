"""Images a second of streamed JPEG files: decoded and augmented alone, and with a student that is trained on them, as a table.

python benchmarks/input_pipeline.py [IMAGES] [SIZE] [MODEL] [BATCH]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from flowdistill.bench.measure import hardware
from flowdistill.config import validate
from flowdistill.device import computing, resolve_device
from flowdistill.ledger import Ledger
from flowdistill.runner.cohorts import prepare
from flowdistill.runner.plan import plan
from flowdistill.training.cohort import train

CLASSES, SIDE, WORKERS = 10, 256, (0, 1, 2)


def write(folder: Path, images: int) -> int:
    """Smooth random JPEGs of 256x256, as many bytes as a photograph; how many bytes one has."""
    chance, total = np.random.default_rng(0), 0
    for split, count in (("train", images), ("test", CLASSES)):
        for number in range(count):
            path = folder / split / str(number % CLASSES) / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(chance.integers(0, 256, (48, 48, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)
            total += path.stat().st_size
    return total // (images + CLASSES)


def measure(folder: Path, keys: dict[str, object], workers: int, model: str, batch: int) -> tuple[float, float]:
    """Images a second without and with training."""
    config = validate({"student": model, "data": {"name": f"folder:{folder}", **keys}, "train": {"epochs": 1, "batch_size": batch}})
    device = resolve_device("auto")
    with computing(device):
        ((cohort, _),) = prepare(plan([config], Ledger(folder.parent / "runs", create=True), device), device, "eager", workers)
        stream, seconds = cohort.seed_groups[0].batches, 0.0
        for number in range(2):  # the first starts the processes
            started = time.perf_counter()
            for _ in stream.epoch(number):
                pass
            seconds = time.perf_counter() - started
        (report,) = train(cohort)
    images = stream.steps * batch
    return images / seconds, images / report.train_seconds


def main() -> None:
    given = dict(enumerate(sys.argv[1:]))
    images, size, model, batch = int(given.get(0, 960)), int(given.get(1, 64)), given.get(2, "resnet18"), int(given.get(3, 32))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "jpegs"
        each = write(folder, images)
        where = "{cpu}, {cores} cores; {device}; torch {torch}".format(**hardware(resolve_device("auto")))
        print(f"`{' '.join(['python benchmarks/input_pipeline.py', *sys.argv[1:]])}`")
        print(
            f"\n{where}; {images:,} JPEGs of {SIDE}x{SIDE}, {each / 1000:.0f} kB each, to {size}x{size}; {model}, batch {batch}, eager.\n"
        )
        print("| images | workers | images/s, decoded and augmented | images/s, with training |\n| -- | -- | -- | -- |")
        kinds = {
            "in memory": (None, {}),
            "streamed": (WORKERS, {"stream": True}),
            "streamed, RandAugment": (WORKERS, {"stream": True, "randaugment": 9}),
        }
        for name, (counts, keys) in kinds.items():
            for workers in counts or (0,):
                alone, training = measure(folder, {"size": size, "crop": "resized", **keys}, workers, model, batch)
                print(f"| {name} | {workers if counts else '-'} | {alone:,.0f} | {training:,.0f} |", flush=True)


main()
