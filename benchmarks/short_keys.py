"""Two keys that a recipe for few epochs might have, measured before they are built: each is put by hand into a run of ``--recipe short``.

no decay: no weight decay on what is neither matrix nor kernel (normalisation, biases). alternating flip: an image is mirrored by chance in
its first epoch, and from then on every second time (Jordan 2024, airbench). Judged by the last epoch on held-out images, test is not read.

OMP_NUM_THREADS=1 python benchmarks/short_keys.py CIFAR10.npz --seeds 1000-1001 --epochs 12 --images 20000
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer

from flowdistill.checks import parse_seeds
from flowdistill.config import RunConfig, validate
from flowdistill.data import augment, batches
from flowdistill.ledger import Ledger
from flowdistill.randomness import generator
from flowdistill.recipes import over, recipe
from flowdistill.runner import run
from flowdistill.training import optim, student

CPU = torch.device("cpu")


def alternating(n: int, *, seed: int, epoch: int, **rest: object) -> augment.Draws:
    """As ``draw_epoch``, with other flips."""
    drawn = augment.draw_epoch(n, seed=seed, epoch=epoch, **rest)  # type: ignore[arg-type]
    first = torch.rand(n, generator=generator(seed, "augment", 0)) < 0.5
    return augment.Draws(drawn.order, drawn.rows, drawn.columns, first[drawn.order] ^ bool(epoch % 2))


def undecayed(*given: object) -> torch.optim.SGD:
    """As ``build_optimizer``, with a group of its own for what has one dimension."""
    optimizer: torch.optim.SGD = optim.build_optimizer(*given)  # type: ignore[arg-type]
    (group,) = optimizer.param_groups
    flat = [parameter for parameter in group["params"] if parameter.dim() < 2]
    group["params"] = [parameter for parameter in group["params"] if parameter.dim() >= 2]
    optimizer.param_groups.append(group | {"params": flat, "weight_decay": 0.0})
    return optimizer


KEYS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "as it is": contextlib.nullcontext,
    "no decay": lambda: mock.patch.object(student, "build_optimizer", undecayed),
    "alternating flip": lambda: mock.patch.object(batches, "draw_epoch", alternating),
}


def main(
    data: Path,
    seeds: str = "1000-1001",
    epochs: Annotated[int, typer.Option(help="Of each run.")] = 12,
    images: Annotated[int, typer.Option(help="Training images, a tenth of which is held out.")] = 20_000,
) -> None:
    """A line for each key and seed."""
    for seed in parse_seeds(seeds):
        for name, patched in KEYS.items():
            with tempfile.TemporaryDirectory() as folder, patched():
                (done,) = run([config(data, seed, epochs, images)], Ledger(Path(folder), create=True), CPU, engine="compiled")
                last = Ledger(Path(folder)).epochs(done.no)[-1]
                assert last.correct is not None, done.error
            print(f"{name}, seed {seed}: {100 * last.correct / last.images:.2f} % of {last.images:,} held-out images", flush=True)


def config(data: Path, seed: int, epochs: int, images: int) -> RunConfig:
    """A baseline by the recipe."""
    asked = {"student": "resnet20", "method": "base", "seed": seed, "split": "holdout", "train": {"epochs": epochs}}
    return validate(over(recipe("short").of("resnet20"), asked | {"data": {"name": f"npz:{data}", "limit_train": images}}))


if __name__ == "__main__":
    typer.run(main)
