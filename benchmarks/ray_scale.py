"""What a plan of many runs costs beside the training: planning, handing out, ledger and files, and the driver's memory.

python benchmarks/ray_scale.py --runs 100 1000 10000   # workers that train nothing: each gives back one recorded run
python benchmarks/ray_scale.py --overhead              # runs of about a minute by Ray and by one process, alternating
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FLOWDISTILL_STATE"] = tempfile.mkdtemp(prefix="flowdistill-state-")

import torch

from flowdistill import talk
from flowdistill.config import RunConfig, validate
from flowdistill.ledger import Ledger
from flowdistill.runner import run as run_here
from flowdistill.runner.remote import driver, ray_crew
from flowdistill.runner.remote.kit import Began, Finished, Kit, Result, Word
from flowdistill.runner.watcher import Watcher

CPU = torch.device("cpu")
DATA = {"name": "digits"}
TINY = {"epochs": 1, "batch_size": 128, "precision": "fp32"}


def configs(seeds: Sequence[int], **train: Any) -> list[RunConfig]:
    return [validate({"method": "base", "student": "resnet8", "data": DATA, "seed": seed, "train": {**TINY, **train}}) for seed in seeds]


def recorded_run(folder: Path) -> Finished:
    """One run that was trained, as a worker gives it back."""
    ledger = Ledger(folder, create=True)
    (run,) = run_here(configs([0]), ledger, CPU)
    files = {name: (folder / str(run.no) / name).read_bytes() for name in ("student.safetensors", "predictions.npz", "run.json")}
    return Finished(vars(run), [vars(epoch) for epoch in ledger.epochs(run.no)], files)


def idle(kit: Kit, *others: Any) -> Result:
    """In the place of ``ray_crew.work``, a worker that trains nothing: every run ends as the pattern did, which comes last."""
    import ray

    _, _, mailbox, _, _, pattern = others

    first = 10**9 + 1
    rows = {first + n: {**pattern.row, "no": first + n, "fingerprint": key, "seed": seed} for n, (key, seed) in enumerate(kit.keys)}
    ray.get(mailbox.post.remote(Word(kit.number, "a", "here", Began({no: {**row, "status": "running"} for no, row in rows.items()}, {}))))
    return Result("a", "here", {no: replace(pattern, row=row) for no, row in rows.items()})


class Idle:
    """A crew whose workers train nothing."""

    def __init__(self, crew: ray_crew.RayCrew, pattern: Finished) -> None:
        self._crew, kept = crew, crew._ray.put(pattern)
        remote = crew._ray.remote(idle)

        class Work:
            @staticmethod
            def options(**options: Any) -> Any:
                class Submit:
                    @staticmethod
                    def remote(*words: Any) -> Any:
                        return remote.options(**options).remote(*words, kept)

                return Submit

        crew._work = Work

    def measure(self, *_: object) -> str:
        return "nothing is measured"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._crew, name)


def memory() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Memory(Watcher):
    """The driver's memory when a tenth of the cohorts is done, and at the end."""

    def __init__(self, cohorts: int) -> None:
        super().__init__()
        self._tenth, self.first, self.last = cohorts // 10, 0, 0

    def say(self, line: str) -> None:
        done = line.partition(" of ")[0]
        if done.isdigit() and int(done) >= self._tenth:
            self.last = memory()
            self.first = self.first or self.last


def scale(counts: Sequence[int]) -> None:
    """Print a row for each number of runs."""
    heads = ("runs", "planning, ms a run", "cohorts a second", "driver's MiB after a tenth, at the end", "files a run", "ledger, KiB a run")
    for cells in (heads, ["---"] * len(heads)):
        talk.answer(f"| {' | '.join(cells)} |")
    with tempfile.TemporaryDirectory() as place:
        pattern = recorded_run(Path(place, "one"))
        with ray_crew.connected("local", "cpu", Path(place, "storage"), []) as crew:
            for count in counts:
                folder = Path(place, str(count))
                ledger, watcher = Ledger(folder, create=True), Memory(count)
                started = time.perf_counter()
                due = driver.outstanding(configs(range(count)), ledger, CPU, watcher, again=False)
                planned = time.perf_counter() - started
                started = time.perf_counter()
                driver._trained(due, ledger, CPU, gathered(Idle(crew, pattern)), Path(place, "storage"), driver.How(), watcher)
                seconds = time.perf_counter() - started
                assert ledger.count() == count
                files = sum(len(files) for _, _, files in os.walk(folder)) / count
                size = (folder / "ledger.db").stat().st_size / count / 1024
                grown = f"{watcher.first / 2**20:.0f}, {watcher.last / 2**20:.0f}"
                talk.answer(f"| {count:,} | {1000 * planned / count:.1f} | {count / seconds:.0f} | {grown} | {files:.1f} | {size:.1f} |")


def gathered(crew: Any) -> Callable[[], Any]:
    @contextlib.contextmanager
    def gather() -> Iterator[Any]:
        yield crew

    return gather


def overhead(epochs: int, pairs: int) -> None:
    """Print how much longer a run takes by Ray, and what two workers of one core are to one process of two."""
    seconds: dict[str, list[float]] = {"one process": [], "Ray": [], "one process, two threads": [], "Ray, two workers": []}
    with tempfile.TemporaryDirectory() as place:

        def timed(name: str, seeds: str, *more: str, threads: int = 1) -> None:
            words = ["train", "--model", "resnet8", "--dataset", "digits", "--seeds", seeds, "--epochs", str(epochs), "--precision", "fp32"]
            folder = Path(place, f"{len(seconds[name])}-{name.replace(' ', '-').replace(',', '')}")
            environment: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            started = time.perf_counter()
            command = [sys.executable, "-m", "flowdistill", *words, "--runs", str(folder), *more]
            subprocess.run(command, check=True, capture_output=True, env=environment)
            seconds[name].append(time.perf_counter() - started)

        for _ in range(pairs):
            timed("one process", "0")
            timed("Ray", "0", "--ray", "local")
            timed("one process, two threads", "0-3", threads=2)
            timed("Ray, two workers", "0-3", "--ray", "local")
    for name, values in seconds.items():
        talk.answer(f"{name}: median {statistics.median(values):.1f} s of {', '.join(f'{value:.1f}' for value in values)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, nargs="*", default=[])
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    if given.runs:
        scale(given.runs)
    if given.overhead:
        overhead(given.epochs, given.pairs)
