"""What a teacher costs a batch: whole, trimmed, folded, cast and compiled; alternating in one process, medians.

python benchmarks/teacher.py [--model resnet20] [--rounds 15] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from flowdistill import models
from flowdistill.device import synchronize
from flowdistill.methods import Needs
from flowdistill.training.teacher import Teacher, teach, trim
from flowdistill.types import DataSpec

TAPS = ("stem", "stage1", "stage2", "stage3")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device, data = torch.device(given.device), DataSpec("random", 50_000, 10, 3, 32, 32)

    def network() -> models.Network:
        return models.build(given.model, data, taps=TAPS, seed=0).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    images = torch.randn(128, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    needs, early = Needs(teacher=frozenset(TAPS)), Needs(teacher=frozenset({"stage1"}))
    runs = {}
    for precision in ("fp32", "bf16"):
        whole, cheap, short = network(), Teacher(network(), needs, precision), Teacher(network(), early, precision)
        trimmed = trim(network(), needs)
        fast = torch.compile(cheap.teach, fullgraph=True, dynamic=False)
        runs |= {
            f"{precision}: whole": lambda whole=whole, precision=precision: teach(whole, images, precision),
            f"{precision}: trimmed to the four maps": lambda net=trimmed, precision=precision: teach(net, images, precision),
            f"{precision}: trimmed, folded" + (", cast" if precision == "bf16" else ""): lambda cheap=cheap: cheap.teach(images),
            f"{precision}: the same, compiled": lambda fast=fast: fast(images),
            f"{precision}: trimmed to stage1, folded": lambda short=short: short.teach(images),
        }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(given.rounds + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            synchronize(device)
            if number > 1:
                times[name].append(1000 * (time.perf_counter() - started))
    print("| teacher | ms a batch of 128, median | min |\n| -- | -- | -- |")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} |")


main()
