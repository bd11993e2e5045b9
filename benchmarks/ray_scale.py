"""What a plan of many runs costs beside the training: planning, handing out, ledger and files, and the driver's memory.

python benchmarks/ray_scale.py --runs 100 1000 10000   # workers that train nothing: each gives back one recorded run
python benchmarks/ray_scale.py --overhead              # runs of about a minute by Ray and by one process, alternating
python benchmarks/ray_scale.py --grid                  # nothing is trained: the operations of a paper's grid, and of an ImageNet student
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FLOWDISTILL_STATE"] = tempfile.mkdtemp(prefix="flowdistill-state-")

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowdistill import models, talk
from flowdistill.config import RunConfig, validate
from flowdistill.ledger import Ledger
from flowdistill.runner import run as run_here
from flowdistill.runner.remote import driver, ray_crew
from flowdistill.runner.remote.kit import Began, Finished, Kit, Result, Word
from flowdistill.runner.watcher import Watcher
from flowdistill.types import DataSpec

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


class Measured:
    """A crew that knows already what a cohort takes."""

    def __init__(self, crew: ray_crew.RayCrew) -> None:
        self._crew = crew

    def measure(self, *_: object) -> str:
        return "nothing is measured"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._crew, name)


class Idle(Measured):
    """A crew whose workers train nothing."""

    def __init__(self, crew: ray_crew.RayCrew, pattern: Finished) -> None:
        super().__init__(crew)
        kept = crew._ray.put(pattern)
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
                driver.train(due, ledger, gathered(Idle(crew, pattern)), driver.How(), watcher)
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
    """Print what a run takes longer by Ray, and what two workers of one core are to one process with two threads. Ray and its workers have
    begun before, as they have from a plan's second cohort on.
    """
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place, ray_crew.connected("local", "cpu", Path(place, "storage"), []) as crew:

        def timed(name: str, seeds: Sequence[int], threads: int) -> None:
            folder = Path(place, f"{name}.{len(seconds.get(name, ()))}".replace(" ", "-"))
            ledger, watcher = Ledger(folder, create=True), Watcher()
            torch.set_num_threads(threads)
            started = time.perf_counter()
            if name.startswith("Ray"):
                due = driver.outstanding(configs(seeds, epochs=epochs), ledger, CPU, watcher, again=False)
                driver.train(due, ledger, gathered(Measured(crew)), driver.How(), watcher)
            else:
                run_here(configs(seeds, epochs=epochs), ledger, CPU)
            seconds.setdefault(name, []).append(time.perf_counter() - started)

        timed("Ray, to begin", range(2), 1)
        for _ in range(pairs):
            timed("one run, one process", [0], 1)
            timed("Ray, one run", [0], 1)
            timed("four runs, one process, two threads", range(4), 2)
            timed("Ray, four runs, two workers", range(4), 1)
    for name, values in seconds.items():
        talk.answer(f"{name}: median {statistics.median(values):.2f} s of {', '.join(f'{value:.2f}' for value in values)}")


PAIRS = (  # of Tian et al. 2020 (CRD), tables 1 and 2: student, teacher
    *(("wrn-16-2", "wrn-40-2"), ("wrn-40-1", "wrn-40-2"), ("resnet20", "resnet56"), ("resnet20", "resnet110"), ("resnet32", "resnet110")),
    *(("resnet8x4", "resnet32x4"), ("vgg8", "vgg13"), ("mobilenetv2", "vgg13"), ("mobilenetv2", "resnet50"), ("vgg8", "resnet50")),
    *(("shufflenetv1", "resnet32x4"), ("shufflenetv2", "resnet32x4"), ("shufflenetv1", "wrn-40-2")),
)
CRD_METHODS, CRD_SEEDS, CRD_EPOCHS = 14, 5, 240
IMAGES = 50_000
LOG_EPOCHS, LOG_SECONDS = 200, 48 * 60  # a run of the reference log, ResNet-20 >> 20, on its GPU


def operations(model: str, classes: int = 100, side: int = 32) -> int:
    """Of the forward pass of one image; a multiplication and an addition are two."""
    spec = DataSpec("images", IMAGES, classes, 3, side, side)
    net = models.build(model, spec).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, side, side))
    return int(counter.get_total_flops())


def grid() -> None:
    """Print what a grid costs at the rate of the reference's own GPU, and what an ImageNet student asks of its loader."""
    resnet20 = operations("resnet20")
    rate = IMAGES * LOG_EPOCHS * 4 * resnet20 / LOG_SECONDS
    talk.answer(f"the reference log's rate: {rate / 1e12:.2f} T operations/s")
    images = IMAGES * CRD_EPOCHS
    students = sum(images * (3 * operations(student) + operations(teacher)) for student, teacher in PAIRS) * CRD_METHODS * CRD_SEEDS
    teachers = sum(images * 3 * operations(teacher) for teacher in {teacher for _, teacher in PAIRS})
    runs = len(PAIRS) * CRD_METHODS * CRD_SEEDS
    all_of_it = (students + teachers) / 1e18
    hours = all_of_it * 1e18 / rate / 3600
    networks = f"{runs} students and {len({teacher for _, teacher in PAIRS})} teachers"
    talk.answer(f"{networks}: {all_of_it:.1f} E operations, {hours:,.0f} hours at that rate")
    image = 3 * operations("torchvision:resnet18", 1000, 224) + operations("torchvision:resnet34", 1000, 224)
    ask = f"100 T operations/s ask for {100e12 / image:,.0f} images/s"
    talk.answer(f"ResNet-18 <- ResNet-34 at 224x224: {image / 1e9:.1f} G operations an image; {ask}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, nargs="*", default=[])
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    if given.runs:
        scale(given.runs)
    if given.overhead:
        overhead(given.epochs, given.pairs)
    if given.grid:
        grid()
