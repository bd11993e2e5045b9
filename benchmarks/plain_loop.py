"""Images/s of this package and of the loop a user would write, on the same work, alternating in one process.

    python benchmarks/plain_loop.py DATA.npz [--steps 30] [--rounds 5]

The work: ResNet-8 <- ResNet-20, FSP + cross-entropy, batch 128, SGD; random weights, every image cropped, flipped and normalised.
The plain loop: torchvision transforms on PIL images in a DataLoader (0 and 2 workers), eager float32, ``loss.item()`` each step.
Evaluation is in neither. Medians over the rounds; each round starts its own loader, whose first two batches are not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from flowdistill import fsp_loss, methods, models
from flowdistill.config import validate
from flowdistill.data.loader import DeviceData, Stream
from flowdistill.data.sources import ImageData, read_npz
from flowdistill.training.step import Student, train_step
from flowdistill.training.teacher import Teacher

BATCH, WARM = 128, 2
TAPS = ("stem", "stage1", "stage2", "stage3")
CPU = torch.device("cpu")


class PlainImages(Dataset[tuple[torch.Tensor, int]]):
    """The data set as most repositories have it."""

    def __init__(self, data: ImageData, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.images, self.labels = data.x_train, data.y_train
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.x_train.shape[1:3], padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def plain(data: ImageData, on_device: DeviceData, workers: int) -> Iterator[None]:
    """One step a turn of the loop that a user would write."""
    student, teacher = (models.build(name, data.spec, taps=TAPS) for name in ("resnet8", "resnet20"))
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    normalisation = on_device.normalisation
    loader = DataLoader(
        PlainImages(data, normalisation.mean, normalisation.std),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=False,
    )
    for images, labels in loader:
        given = student(images)
        with torch.no_grad():
            taught = teacher(images)
        pairs = [[(out.maps[a], out.maps[b]) for a, b in pairwise(TAPS)] for out in (given, taught)]
        loss = F.cross_entropy(given.logits, labels) + fsp_loss(*pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield


def ours(data: ImageData, on_device: DeviceData, precision: str) -> Iterator[None]:
    """One step a turn of this package's engine."""
    config = validate({"student": "resnet8", "method": "fsp"})
    settled = methods.settle("fsp", {}, {})
    method = methods.build(settled, student=models.spec("resnet8", data.spec), teacher=models.spec("resnet20", data.spec), data=data.spec)
    nets = [models.build(name, data.spec, taps=TAPS).to(memory_format=torch.channels_last) for name in ("resnet8", "resnet20")]
    student, teacher = Student(nets[0], method, settled, config.train), Teacher(nets[1], method.needs, precision)
    student.begin_phase(0)
    student.begin_epoch()
    for images, batch in Stream(on_device, 0, BATCH).epoch(0):
        train_step(student, images, teacher.teach(images), batch, lr=torch.tensor(0.1), precision=precision)
        yield


def speed(loop: Iterator[None], steps: int) -> float:
    """Images/s over ``steps`` steps after the warm-up."""
    for _ in range(WARM):
        next(loop)
    started = time.perf_counter()
    for _ in range(steps):
        next(loop)
    return steps * BATCH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    data = read_npz(given.data)
    on_device = DeviceData(data, "full", CPU)
    contenders: dict[str, Callable[[], Iterator[None]]] = {
        "plain loop, 0 workers": lambda: plain(data, on_device, 0),
        "plain loop, 2 workers": lambda: plain(data, on_device, 2),
        "flowdistill, fp32": lambda: ours(data, on_device, "fp32"),
        "flowdistill, bf16": lambda: ours(data, on_device, "bf16"),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, start in contenders.items():
            found[name].append(speed(start(), given.steps))
    best = max(statistics.median(found[name]) for name in contenders if name.startswith("plain"))
    epoch = len(data.x_train) // BATCH * BATCH
    print("| loop | images/s, median (min-max) | s/epoch of training | to the better plain loop |\n| -- | -- | -- | -- |")
    for name, values in found.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} ({min(values):.0f}-{max(values):.0f}) | {epoch / median:.1f} | {median / best:.2f} x |")
    print(f"\n{given.rounds} rounds of {given.steps} steps, {torch.get_num_threads()} threads, torch {torch.__version__}")


main()
