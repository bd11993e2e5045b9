"""Choose the demo's weights on the holdout split: accuracy on the held-out tenth after the last epoch; test is never read here.

python benchmarks/demo_weights.py FOLDER [SEEDS]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from flowdistill.config import validate
from flowdistill.demo import BATCH_SIZE, STUDENT, TEACHER
from flowdistill.device import resolve_device
from flowdistill.ledger import Ledger
from flowdistill.report.progress import Bars
from flowdistill.runner import run

GRID = {"base": [{}], "at": [{"at": w} for w in (5.0, 20.0, 80.0)], "fsp": [{"fsp": w} for w in (1.0, 3.0, 10.0, 30.0)]}
EPOCHS = (6,)


def main() -> None:
    ledger = Ledger(Path(sys.argv[1]), create=True)
    seeds = range(int(sys.argv[2]) if len(sys.argv) > 2 else 12)
    device, shared = resolve_device("cpu"), {"data": {"name": "digits"}, "split": "holdout"}
    run([validate({**TEACHER, **shared, "seed": 100})], ledger, device, watcher=Bars())
    print("| epochs | method | weights | held-out accuracy, mean (std, n) | difference to base |\n| - | - | - | - | - |")
    for epochs in EPOCHS:
        base = 0.0
        for method, choices in GRID.items():
            for weights in choices:
                common = {**STUDENT, **shared, "method": method, "weights": weights, "train": {"epochs": epochs, "batch_size": BATCH_SIZE}}
                done = run([validate({**common, "seed": seed}) for seed in seeds], ledger, device)
                last = [ledger.epochs(one.no)[-1] for one in done]
                values = [100 * (epoch.correct or 0) / epoch.images for epoch in last]
                mean = statistics.fmean(values)
                base = mean if method == "base" else base
                cells = (
                    epochs,
                    method,
                    weights or "-",
                    f"{mean:.2f} ({statistics.stdev(values):.2f}, {len(values)})",
                    f"{mean - base:+.2f}",
                )
                print("|", " | ".join(map(str, cells)), "|", flush=True)


main()
