"""One run by two processes that torchrun did not start: forked from one that has imported everything and computed nothing.

python tests/helpers/several.py DATA.npz FOLDER equal METHOD,...   # 2 ranks x 64 images beside one process x 128
python tests/helpers/several.py DATA.npz FOLDER command WORD ...   # flowdistill WORDS by two ranks
python tests/helpers/several.py DATA.npz FOLDER cut WORD ...       # the same, stopped after the first epoch

The last line is JSON. ``equal``: method -> mode of batch normalisations -> how far losses and gradients are apart. Else: the exit codes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # before torch is imported, as the command line does it

import torch
from torch import Tensor, nn

from flowdistill import cli, ranks
from flowdistill.config import RunConfig, validate
from flowdistill.ledger import Ledger
from flowdistill.report.progress import Bars
from flowdistill.runner.cohorts import prepare
from flowdistill.runner.plan import plan
from flowdistill.training import cohort as cohorts
from flowdistill.training.student import Student

CPU = torch.device("cpu")
WORLD = 2
BATCH = 128
STEPS = 2
LITTLE = 1e-3  # ctkd's gradient is a number of 8e-7, what is left of larger ones: weights that differ by 1e-7 move it by a fiftieth
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d)
MODES = ("eval", "train", "synchronised")

torch.set_num_threads(1)

Found = dict[str, dict[str, dict[str, Tensor]]]
"""Method -> mode of batch normalisations -> name -> a loss, or all gradients of a module as one vector."""


def both(work: Callable[[int], int], folder: Path) -> list[int]:
    """The exit codes of two processes that do this, each told its rank by its environment, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    processes = []
    for rank in range(WORLD):
        if (process := os.fork()) == 0:
            os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
            for descriptor, name in ((1, f"out.{rank}.txt"), (2, f"err.{rank}.txt")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            code = 1
            try:
                code = work(rank)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def a_command(folder: Path, words: Sequence[str], *, cut: bool) -> list[int]:
    """The exit codes of ``flowdistill WORDS`` by two ranks; with ``cut`` the first stops after an epoch, as by Ctrl-C."""

    def work(rank: int) -> int:
        os.chdir(folder)
        sys.argv = ["flowdistill", *words]
        if cut and rank == 0:
            Bars.report = interrupted  # type: ignore[method-assign]
        cli.main()
        return 0

    return both(work, folder)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def configs(data: str, names: Sequence[str], batch_norm: str) -> list[RunConfig]:
    """A run of each method on 256 digits; crd with banks that suit them."""
    images = {"name": f"npz:{data}", "pad": 1, "flip": False}
    train = {"epochs": 1, "batch_size": BATCH, "lr": 0.01, "precision": "fp32", "batch_norm": batch_norm}
    options = {"crd": {"crd": {"negatives": 50, "dim": 8}}}
    common = {"student": "resnet8", "data": images, "train": train}
    return [
        validate({**common, "method": name, "options": options.get(name, {}), "teacher": None if name == "base" else "resnet14"})
        for name in names
    ]


def measured(data: str, names: Sequence[str], ledger: Path) -> Found:
    """Losses, gradients and running statistics of each method's first steps, in each mode of the batch normalisations."""
    found: Found = {}
    for mode in MODES:
        batch_norm = "synchronised" if mode == "synchronised" else "local"
        jobs = plan(configs(data, names, batch_norm), Ledger(ledger, create=True), CPU, stand_in=True)
        for cohort, members in prepare(jobs, CPU, "eager"):
            if mode == "eval":
                settle(cohort)
            for student in cohort.students:
                student.begin_phase(0)
                student.begin_epoch()
            with normalising(cohort.students, mode):
                rates = {student: torch.full((STEPS,), 0.01) for student in cohort.students}
                for step, _ in zip(range(STEPS), cohort.engine.epoch(cohort.seed_groups, 0, rates), strict=False):
                    for member in members:
                        taken = gradients(member.student)
                        values = found.setdefault(name_of(member.job), {}).setdefault(mode, {})
                        values |= {f"step {step} {part}": value for part, value in taken.items()}
            cohorts._unite(cohort)
            for member in members:
                losses = {
                    f"loss {term}": value.clone() for term, value in member.student.sums.items() if term in member.student.tally.terms
                }
                found[name_of(member.job)][mode] |= losses | statistics(member.student)
    return found


def name_of(job: Any) -> str:
    return job.resolved.name if job.config.side == 1 else f"{job.resolved.name} {job.config.side}"


def settle(cohort: cohorts.Cohort) -> None:
    """Statistics as of networks that were trained, the same in every process: those of 100 images of the test set."""
    images = next(cohort.data.test.batches())[0][:100]
    with torch.no_grad():
        for student in cohort.students:
            student.net.train()
            for _ in range(3):
                student.net(images)


@contextlib.contextmanager
def normalising(students: Sequence[Student], mode: str) -> Iterator[None]:
    """Inside, batch normalisations of students and methods are in this mode."""
    for student in students:
        for module in (*student.net.modules(), *student.method.modules()):
            if isinstance(module, NORMALISATIONS):
                module.train(mode != "eval")
    yield


def gradients(student: Student) -> dict[str, Tensor]:
    """The gradients of the network and of the method's own parts, each as one vector."""
    parts = {"net": student.net, "method": student.method}
    vectors = {
        part: [value.grad.reshape(-1).clone() for value in module.parameters() if value.grad is not None] for part, module in parts.items()
    }
    return {part: torch.cat(values) for part, values in vectors.items() if values}


def statistics(student: Student) -> dict[str, Tensor]:
    """The running means and variances of the network's and the method's batch normalisations, each kind as one vector."""
    modules = nn.ModuleList([student.net, student.method])
    buffers = {name: value.clone() for name, value in modules.named_buffers()}
    kinds = {kind: [value for name, value in buffers.items() if name.endswith(kind)] for kind in ("running_mean", "running_var")}
    return {kind: torch.cat(values) for kind, values in kinds.items()}


def equal(data: str, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """How far two ranks are from one process."""

    def work(rank: int) -> int:
        with ranks.joined(CPU):
            torch.save(measured(data, names, folder / f"ledger.{rank}"), folder / f"{rank}.pt")
        return 0

    codes = both(work, folder)
    assert codes == [0, 0], (folder / "err.0.txt").read_text() + (folder / "err.1.txt").read_text()
    alone, (first, second) = measured(data, names, folder / "ledger"), (torch.load(folder / f"{rank}.pt") for rank in range(WORLD))
    for name, by_mode in first.items():
        for mode, values in by_mode.items():
            for part, value in values.items():
                assert torch.equal(value, second[name][mode][part]), (name, mode, part)
            assert values.keys() == alone[name][mode].keys()
    return {
        name: {mode: {part: distance(first[name][mode][part], value) for part, value in values.items()} for mode, values in modes.items()}
        for name, modes in alone.items()
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """How far a value is from the expected one, relative to that. ``LITTLE`` stands for what is less."""
    return float((found - expected).double().norm() / expected.double().norm().clamp(min=LITTLE))


if __name__ == "__main__":
    source, where, how, *given = str(Path(sys.argv[1]).resolve()), Path(sys.argv[2]).resolve(), *sys.argv[3:]
    where.mkdir(parents=True, exist_ok=True)
    print(json.dumps(equal(source, where, given[0].split(",")) if how == "equal" else a_command(where, given, cut=how == "cut")))
