"""Transfer learning on two halves of the digits: a teacher of six classes, students of four others with few images of each.

Trained are students from fresh weights, alone and with FSP in two stages by the teacher (Yim et al. 2017; at the paper's weight, and by the
mean at weight 1), from the teacher's weights, and from these with the front frozen: so student and teacher are of one model.

python benchmarks/transfer.py FOLDER [--images 5] [--batch-size 20] [--seeds 0-2] [--epochs 60] [--teacher-epochs 30] [--stage-epochs 54]
    [--device cpu]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from flowdistill.checks import parse_seeds
from flowdistill.config import RunConfig, validate
from flowdistill.ledger import Ledger
from flowdistill.report import tables
from flowdistill.runner import run

MODEL = "resnet8"
FIRST = 6  # classes of the teacher; the student has the other four
FRONT = "conv1,bn1,layer1"


def two_sets(folder: Path, images: int) -> tuple[Path, Path]:
    """The teacher's digits, and so many a class of the student's; of every class the second half is test."""
    digits = load_digits()
    found = []
    for name, classes, most in (("digits-0-5", range(FIRST), None), ("digits-6-9", range(FIRST, 10), images)):
        places = [np.flatnonzero(digits.target == label) for label in classes]
        train = np.concatenate([own[: len(own) // 2][:most] for own in places])
        test = np.concatenate([own[len(own) // 2 :] for own in places])
        path = folder / f"{name}.npz"
        parts = {"x_train": train, "x_test": test}
        pixels = {part: (digits.images[chosen] * 15).astype(np.uint8) for part, chosen in parts.items()}
        labels = {part.replace("x", "y"): digits.target[chosen] - classes[0] for part, chosen in parts.items()}
        np.savez(path, **pixels, **labels)
        found.append(path)
    return found[0], found[1]


def config(data: Path, epochs: int, batch_size: int, seed: int, **keys: Any) -> RunConfig:
    train = {"epochs": epochs, "batch_size": batch_size, "precision": "fp32"} | keys.pop("train", {})
    return validate({"student": MODEL, "seed": seed, "data": {"name": f"npz:{data}", "pad": 1, "flip": False}, "train": train, **keys})


def students(data: Path, given: argparse.Namespace, teacher: str) -> list[RunConfig]:
    """Each way with every seed."""
    stages = {"preset": "paper", "reduction": "mean", "stage_epochs": given.stage_epochs}
    ways: list[dict[str, Any]] = [
        {"method": "base"},
        {"method": "fsp", "teacher": teacher, "options": {"fsp": {"preset": "paper", "stage_epochs": given.stage_epochs}}},
        {"method": "fsp", "teacher": teacher, "options": {"fsp": stages}},
        {"method": "base", "init_from": teacher},
        {"method": "base", "init_from": teacher, "train": {"freeze": FRONT}},
    ]
    return [config(data, given.epochs, given.batch_size, seed, **way) for way in ways for seed in parse_seeds(given.seeds)]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--stage-epochs", type=int, default=54)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(words)
    given.folder.mkdir(parents=True, exist_ok=True)
    ledger, device = Ledger(given.folder / "runs", create=True), torch.device(given.device)
    many, few = two_sets(given.folder, given.images)
    (teacher,) = run([config(many, given.teacher_epochs, 32, 100)], ledger, device)
    run(students(few, given, str(teacher.no)), ledger, device)
    print(tables.summary_table(ledger.runs(), "last", "md"))
    ledger.close()


if __name__ == "__main__":
    main()
