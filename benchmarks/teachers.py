"""What two teachers cost beside each of them, and a teacher's features beside its logits: processor milliseconds for a batch of 128 images.

    OMP_NUM_THREADS=1 python benchmarks/teachers.py [ROUNDS]

The ways take turns; each figure is a median. Default: 10 rounds.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from flowdistill import models
from flowdistill.methods import Needs
from flowdistill.models import Network
from flowdistill.models.joined import Joined
from flowdistill.training.teacher import Teacher
from flowdistill.types import DataSpec

CPU = torch.device("cpu")
DATA = DataSpec("images", 100, 10, 3, 32, 32)
LOGITS, FEATURES = Needs(logits=True), Needs(embedding=True)


def net(name: str, seed: int) -> Network:
    return models.build(name, DATA, seed=seed).on(CPU).eval()


def main(rounds: int) -> None:
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    for precision in ("fp32", "bf16"):
        ways = {
            "resnet20": Teacher(net("resnet20", 0), LOGITS, precision),
            "resnet20, features alone": Teacher(net("resnet20", 0), FEATURES, precision),
            "resnet56": Teacher(net("resnet56", 1), LOGITS, precision),
            "both": Teacher(Joined([net("resnet20", 0), net("resnet56", 1)], (0.5, 0.5)).on(CPU), LOGITS, precision),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 2):  # two to warm up
            for name, teacher in ways.items():
                began = time.process_time()
                teacher.teach(images)
                if turn >= 2:
                    times[name].append(1000 * (time.process_time() - began))
        median = {name: statistics.median(values) for name, values in times.items()}
        print(precision, ", ".join(f"{name} {value:.1f}" for name, value in median.items()))
        print(f"  both / (resnet20 + resnet56) = {median['both'] / (median['resnet20'] + median['resnet56']):.2f}")
        print(f"  features alone / with logits = {median['resnet20, features alone'] / median['resnet20']:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
