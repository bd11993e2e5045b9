"""What may befall a training: real processes, struck at a seeded moment, and what the user does after that.

``FAULTS`` is the list. A further fault is a function that takes a ``Scene``, and an entry there.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from sklearn.datasets import load_digits

from flowdistill import env
from flowdistill.checks import INTERRUPTED
from flowdistill.ledger import Ledger, Run
from flowdistill.training.weights import hash_weights, load_weights

from . import kill
from .ray_nodes import OWN, nodes

EACH_EPOCH = Path(__file__).parent / "each_epoch.py"
SCRIPT = Path(__file__).parents[2] / "docs" / "shard.sbatch"
PATIENCE = 300  # seconds for what takes ten on an idle machine
GRACE = 10  # seconds between SIGTERM and the end
MINUTE, STOPPED = 60, 3  # seconds of SIGSTOP: once in a long session, and else
DISK = 24 << 20  # bytes of a disk that is filled
TRIES = 5  # to strike before the work is done

TEACHER, TEACHER_SEED = "1", 9  # its run's number
TOTAL = 2 * (6 + 6 + 8)  # epochs of all runs of the plan
SMALL = ("--batch-size", "64", "--set", "data.pad=1", "--lr", "0.05", "--precision", "fp32", "--device", "cpu")
PLAN = ("--method", "base,kd,fsp", "--student", "resnet8", "--teacher", TEACHER, "--seeds", "0-1", "--epochs", "6")
STAGES = ("--set", "options.fsp.schedule=two-stage", "--set", "options.fsp.stage_epochs=2")  # so fsp is a second cohort, of 8 epochs

USUAL = re.compile(
    r"runs? [\d, ]+: \d ranks, |.* has it already, skipped|.*: epoch \d+/\d+, best|run \d+: .* of training|.* engine, |taps of |teacher "
    r"|  \w+: |.* gradient of |\d+ runs in \d+ cohorts, |a cohort takes |\d+ of \d+ cohorts done, "
)
"""What is said while nothing is the matter."""

Outcome = dict[str, str]
"""Run, by method and seed -> a hash of all that must not depend on what befell it."""


class TooLateError(Exception):
    """The work was done before its moment came."""


@dataclass(frozen=True)
class Fault:
    """Something that may befall a training.

    Attributes:
        name: as the matrix has it.
        cure: what the user does, as the matrix has it.
        befall: begins the work, strikes, and does what the user would.
        ranks: how many processes train the undisturbed runs that the result must equal.
        allowed: epochs on record that may have to be trained again. One: a kill may fall between an epoch's record and its checkpoint.
        possible: whether this machine lets it happen.
    """

    name: str
    cure: str
    befall: Callable[[Scene], None]
    ranks: int = 1
    allowed: int = 1
    possible: Callable[[], bool] = lambda: True


class Work:
    """A process that was begun here."""

    def __init__(self, number: int, log: Path) -> None:
        self.number, self.log = number, log
        self.code: int | None = None

    def ended(self) -> bool:
        """Whether it ended; then ``code`` is its exit code, or below zero the signal's number."""
        if self.code is None:
            number, status = os.waitpid(self.number, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if number else None
        return self.code is not None

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code, once it has one."""
        until = time.monotonic() + seconds
        while not self.ended():
            assert time.monotonic() < until, f"process {self.number} did not end within {seconds} s: {self.last_lines()}"
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def lines(self) -> list[str]:
        """What it said, which is never a traceback."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        assert "Traceback" not in text, text[text.index("Traceback") :]
        return text.splitlines()

    def last_lines(self) -> list[str]:
        """The last of what it said that was not usual."""
        return [line for line in self.lines() if not USUAL.match(line)][-3:]


@dataclass
class Scene:
    """Where one strike happens.

    Attributes:
        folder: the commands are given here; ``runs`` has the teacher.
        words: the command that trains the plan.
        chance: decides the moment, and all else that is open.
        minute: whether what is stopped is stopped for a minute.
        code: exit code of what was struck.
        on_record: epochs that it had on record at that moment, of all its runs together.
        saw: what the user saw of it.
        unsaved: epochs that it could not write a checkpoint of, as it said; they may be trained again.
        stack: what is undone when the strike is over and judged.
    """

    folder: Path
    words: Sequence[str]
    chance: random.Random
    minute: bool = False
    code: int | None = None
    on_record: int = 0
    saw: list[str] = field(default_factory=list)
    unsaved: int = 0
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def flowdistill(self, *words: str, log: str = "struck") -> Work:
        """A process, forked from this one, which has imported everything."""
        return self._begun(kill.start(self.folder, list(words), log=log), log)

    def program(self, *command: str, log: str = "struck", **environment: str) -> Work:
        """A process that begins from nothing."""

        def become() -> NoReturn:
            os.execvpe(command[0], command, os.environ | {"OMP_NUM_THREADS": "1"} | environment)

        return self._begun(kill.start(self.folder, [], become, log), log)

    def _begun(self, number: int, log: str) -> Work:
        work = Work(number, self.folder / f"{log}.err.txt")
        self.stack.callback(_end, work)
        return work

    def moment(self, work: Work, runs: str = "runs", total: int = TOTAL) -> None:
        """Wait for the moment to strike: a part of an epoch after some epoch, from the first on record to the last but one.

        Raises:
            TooLateError: all was done before.
        """
        wanted, share = self.chance.randrange(1, total - 2), self.chance.random()
        found, changes = 0, [time.monotonic()]
        while found < wanted:
            if work.ended():
                assert work.code == 0, f"it ended before it was struck: {work.last_lines()}"
                raise TooLateError
            time.sleep(0.005)
            if (now := epochs_on_record(self.folder / runs)) != found:
                found = now
                changes.append(time.monotonic())
        if len(changes) > 2:
            time.sleep(share * (changes[-1] - changes[-2]))
        self.on_record = epochs_on_record(self.folder / runs)

    def struck(self, work: Work, *codes: int, seconds: float = PATIENCE) -> None:
        """What was struck ends, with one of these codes.

        Raises:
            TooLateError: it was done before.
        """
        self.code = work.wait(seconds)
        self.saw = work.last_lines()
        if self.code == 0 and 0 not in codes:
            raise TooLateError
        assert self.code in codes, f"exit {self.code}, not {codes}: {self.saw}"

    def cured(self, *words: str, log: str = "cure") -> Work:
        """The user gives a command, which does all that it should."""
        work = self.flowdistill(*words, log=log)
        code = work.wait()
        assert code == 0, f"exit {code} of flowdistill {' '.join(words[:2])}: {work.last_lines()}"
        work.lines()
        return work


def _end(work: Work) -> None:
    if not work.ended():
        os.kill(work.number, signal.SIGKILL)
        work.wait()


# What befalls a training


def end(scene: Scene, work: Work, number: signal.Signals = signal.SIGKILL) -> None:
    """What gets this signal ends; if it could say so, it said that it was interrupted."""
    os.kill(work.number, number)
    if number == signal.SIGKILL:
        scene.struck(work, -number)
    else:
        scene.struck(work, INTERRUPTED, seconds=GRACE)


def go_on(scene: Scene) -> Work:
    """Resume what was cut off, then train what had not begun."""
    resumed = scene.cured("resume")
    scene.cured(*scene.words, log="the rest")
    return resumed


def process_killed(scene: Scene) -> None:
    work = scene.flowdistill(*scene.words)
    scene.moment(work)
    end(scene, work)
    scene.saw += [f"flowdistill runs: {status}" for status in {*statuses(scene.folder / "runs")} - {"finished"}]
    go_on(scene)


def process_told_to_end(scene: Scene) -> None:
    work = scene.flowdistill(*scene.words)
    scene.moment(work)
    end(scene, work, signal.SIGTERM)
    assert set(statuses(scene.folder / "runs")) <= {"interrupted", "finished"}
    go_on(scene)


def process_stopped(scene: Scene) -> None:
    """Meanwhile another process finds nothing to resume: the stopped one holds its lock."""
    work = scene.flowdistill(*scene.words)
    scene.moment(work)
    os.kill(work.number, signal.SIGSTOP)
    until = time.monotonic() + (MINUTE if scene.minute else STOPPED)
    if work.ended():
        raise TooLateError
    assert "resumed" not in "".join(scene.cured("resume").lines()), "two processes train one run"
    time.sleep(max(0.0, until - time.monotonic()))
    os.kill(work.number, signal.SIGCONT)
    scene.struck(work, 0)


def power_cut(scene: Scene) -> None:
    """As a kill, and of the newest checkpoint only a part is on the disk."""
    work = scene.flowdistill(*scene.words)
    scene.moment(work)
    end(scene, work)
    for path in scene.folder.glob("runs/*/checkpoint.safetensors"):
        os.truncate(path, int(scene.chance.random() * path.stat().st_size))
    scene.saw = [line for line in go_on(scene).lines() if "damaged" in line]


def disk_full(scene: Scene) -> None:
    """Not a byte is left on the disk. Resuming is tried before there is room again, too."""
    disk, filler = scene.folder / "disk", scene.folder / "disk" / "filler"
    scene.stack.enter_context(mounted(disk))
    shutil.move(scene.folder / "runs", disk / "runs")
    (scene.folder / "runs").symlink_to(disk / "runs")
    work = scene.flowdistill(*scene.words)
    scene.moment(work)
    fill(filler)
    scene.struck(work, 1)
    tried = scene.flowdistill("resume", log="tried")
    assert tried.wait() in (0, 1), tried.last_lines()  # 0: nothing was cut off
    assert tried.last_lines(), "nothing was said"
    scene.unsaved = len(without_checkpoint(work))
    filler.unlink()
    go_on(scene)


def without_checkpoint(work: Work) -> set[str]:
    """The lines in which it said that an epoch has no checkpoint."""
    return {line for line in work.lines() if ": no checkpoint of epoch " in line}


def folder_vanishes(scene: Scene) -> None:
    """The folder of the runs is moved away, and comes back when the training has ended."""
    runs, away = scene.folder / "runs", scene.folder / "away"
    work = scene.flowdistill(*scene.words)
    scene.moment(work)
    runs.rename(away)
    scene.struck(work, 1, 2)
    assert not runs.exists(), f"there are new files where it was: {sorted(map(str, runs.rglob('*')))}"
    away.rename(runs)
    go_on(scene)


def shard_killed(scene: Scene) -> None:
    """One of two that train beside each other; the other goes on."""
    number, other = scene.chance.sample((1, 2), 2)
    works = {k: scene.flowdistill(*scene.words, "--shard", f"{k}/2", log=f"shard {k}") for k in (number, other)}
    scene.moment(works[number], f"runs/shards/{number}-of-2", TOTAL // 2)
    end(scene, works[number])
    scene.cured(*scene.words, "--shard", f"{number}/2")
    assert works[other].wait() == 0, works[other].last_lines()
    merge(scene)


def shard_told_to_end(scene: Scene) -> None:
    """A task of a job array, by the script for Slurm. ``scontrol`` is a stand-in that notes what it is asked."""
    (scene.folder / "scontrol").write_text('#!/bin/sh\necho "$@" >> asked\n')
    (scene.folder / "flowdistill").write_text(f'#!/bin/sh\nexec {sys.executable} {EACH_EPOCH} . "$@"\n')
    for name in ("scontrol", "flowdistill"):
        (scene.folder / name).chmod(0o755)
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_JOB_ID": "4711"}
    environment = array | {"PATH": f"{scene.folder}:{os.environ['PATH']}"}
    task = ("bash", str(SCRIPT), *scene.words)
    work = scene.program(*task, **environment)
    scene.moment(work, "runs/shards/2-of-2", TOTAL // 2)
    end(scene, work, signal.SIGTERM)
    assert (scene.folder / "asked").read_text() == "requeue 4711\n"
    again = scene.program(*task, log="cure", **environment)
    assert again.wait() == 0, again.last_lines()
    scene.cured(*scene.words, "--shard", "1/2", log="the other shard")
    merge(scene)


def merge(scene: Scene) -> None:
    scene.cured("ledger", "merge", "runs/shards/1-of-2", "runs/shards/2-of-2", "--into", "runs", log="merge")


def rank_killed(rank: int) -> Callable[[Scene], None]:
    """One of the two processes that train every run together."""

    def befall(scene: Scene) -> None:
        work = torchrun(scene, "--max-restarts", "1")
        scene.moment(work)
        (number,) = process_numbers(scene, rank)
        os.kill(number, signal.SIGKILL)
        scene.struck(work, 0)
        if len(process_numbers(scene, rank)) == 1:
            raise TooLateError

    return befall


def torchrun(scene: Scene, *options: str) -> Work:
    """``torchrun`` with two processes. ``--standalone`` finds a free port, so that several may run beside each other."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options)
    return scene.program(*launcher, str(EACH_EPOCH), str(scene.folder), *scene.words)


# What befalls a plan on Ray


def by_ray(scene: Scene, address: str = "local", *more: str, words: Sequence[str] = (), log: str = "struck", **environment: str) -> Work:
    """``flowdistill`` with the workers of a Ray cluster."""
    command = (sys.executable, str(EACH_EPOCH), str(scene.folder), *(words or scene.words), "--ray", address, *more)
    return scene.program(*command, log=log, **environment)


def go_on_by_ray(scene: Scene) -> Work:
    """Resume what was cut off, then train what had not begun."""
    resumed = by_ray(scene, words=("resume",), log="cure")
    assert resumed.wait() == 0, resumed.last_lines()
    rest = by_ray(scene, log="the rest")
    assert rest.wait() == 0, rest.last_lines()
    return resumed


def below(number: int) -> Iterator[tuple[int, str]]:
    """The processes that a process began, and those that these began: number and command line."""
    parents = collections.defaultdict(list)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            parents[parent].append((int(path.name), (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")))
    todo = [number]
    while todo:
        for child, command in parents[todo.pop()]:
            yield child, command
            todo.append(child)


def ray_worker_killed(scene: Scene) -> None:
    work = by_ray(scene)
    scene.moment(work)
    at_work = [number for number, command in below(work.number) if command.startswith("ray::") and " seed " in command]
    if not at_work:
        raise TooLateError
    os.kill(scene.chance.choice(at_work), signal.SIGKILL)
    scene.struck(work, 0)


def ray_driver_killed(scene: Scene) -> None:
    work = by_ray(scene)
    scene.moment(work)
    end(scene, work)
    scene.saw = go_on_by_ray(scene).last_lines()


def ray_driver_told_to_end(scene: Scene) -> None:
    work = by_ray(scene)
    scene.moment(work)
    end(scene, work, signal.SIGTERM)
    assert set(statuses(scene.folder / "runs")) <= {"interrupted", "finished"}
    go_on_by_ray(scene)


def ray_node_killed(scene: Scene) -> None:
    """One of two nodes."""
    cluster = scene.stack.enter_context(nodes())
    work = by_ray(scene, cluster.address, **OWN)
    scene.moment(work)
    cluster.kill(1)
    scene.struck(work, 0)


def ray_node_of_another_version(scene: Scene) -> None:
    """A third node joins, and has other code."""
    other = scene.folder / "other"
    shutil.copytree(Path(env.__file__).parent, other / "flowdistill", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "flowdistill" / "stats.py", "a") as file:
        file.write("# changed\n")
    cluster = scene.stack.enter_context(nodes())
    work = by_ray(scene, cluster.address, **OWN)
    scene.moment(work)
    cluster.add({"PYTHONPATH": str(other)})
    scene.struck(work, 0)


def ray_storage_vanishes(scene: Scene) -> None:
    """Another thing is in its place, so that it can't be made anew."""
    storage = scene.folder / "states"
    work = by_ray(scene, "local", "--storage", str(storage))
    scene.moment(work)
    storage.rename(scene.folder / "away")
    storage.write_text("")
    scene.struck(work, 0)


def ray_disk_full(scene: Scene) -> None:
    """Not a byte is left on the disk that the workers train on."""
    disk, filler = scene.folder / "disk", scene.folder / "disk" / "filler"
    scene.stack.enter_context(mounted(disk))
    work = by_ray(scene, TMPDIR=str(disk), RAY_TMPDIR="/tmp")  # Ray's own files stay where they are
    scene.moment(work)
    fill(filler)
    scene.struck(work, 2)
    scene.unsaved = len(without_checkpoint(work))
    filler.unlink()
    go_on_by_ray(scene)


def process_numbers(scene: Scene, rank: int) -> list[int]:
    """The processes that were this rank, the newest last."""
    return [int(number) for number in (scene.folder / f"rank.{rank}").read_text().split()]


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk of its own, while inside."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def may_mount() -> bool:
    """Whether this user may mount a disk."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0


def has_ray() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


def may_fill_a_workers_disk() -> bool:
    """Whether this machine lets both happen."""
    return has_ray() and may_mount()


FAULTS = (
    Fault("`kill -9` of the process", "`flowdistill resume`", process_killed),
    Fault("SIGTERM, with 10 s of grace", "`flowdistill resume`", process_told_to_end),
    Fault(f"SIGSTOP, SIGCONT {STOPPED} s later, once a minute later", "nothing", process_stopped, allowed=0),
    Fault("`kill -9` of one shard of two", "the same command, then `flowdistill ledger merge`", shard_killed),
    Fault("SIGTERM to a task of a job array", "nothing: the script puts it back into the queue", shard_told_to_end),
    Fault("`kill -9` of rank 0 of two", "nothing: `torchrun --max-restarts 1` starts both again", rank_killed(0), ranks=2),
    Fault("`kill -9` of rank 1 of two", "nothing: `torchrun --max-restarts 1` starts both again", rank_killed(1), ranks=2),
    Fault("a full disk", "room on it, then `flowdistill resume`", disk_full, possible=may_mount),
    Fault("the folder of the runs vanishes", "the folder back, then `flowdistill resume`", folder_vanishes),
    Fault("`kill -9`, and the newest checkpoint is torn", "`flowdistill resume`", power_cut, allowed=2),
    Fault("`kill -9` of a Ray worker", "nothing", ray_worker_killed, possible=has_ray),
    Fault("`kill -9` of the driver of `--ray local`", "`flowdistill resume --ray local`", ray_driver_killed, possible=has_ray),
    Fault("SIGTERM to the driver, with 10 s of grace", "`flowdistill resume --ray local`", ray_driver_told_to_end, possible=has_ray),
    Fault("one of two Ray nodes dies", "nothing", ray_node_killed, possible=has_ray),
    Fault("a Ray node with other code joins", "nothing", ray_node_of_another_version, allowed=0, possible=has_ray),
    Fault("the storage of `--ray` vanishes", "nothing", ray_storage_vanishes, allowed=0, possible=has_ray),
    Fault(
        "a full disk at a Ray worker",
        "room, then `flowdistill resume --ray local`",
        ray_disk_full,
        possible=lambda: has_ray() and may_mount(),
    ),
)


# What became of it


@dataclass(frozen=True)
class Strike:
    """One strike, as it went.

    Attributes:
        fault: its name.
        seed: decides the moment.
        code: exit code of what was struck.
        saw: the last lines that the user saw of it.
        on_record: epochs on record at that moment, of all runs together.
        again: the most epochs on record that a run had to train again.
        differs: runs that are not bit for bit what they are undisturbed.
        problem: what else went wrong, or empty.
        seconds: how long it all took.
    """

    fault: str
    seed: int
    code: int | None
    saw: list[str]
    on_record: int
    again: int
    differs: list[str]
    problem: str
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether all went as it should."""
        return not self.problem and not self.differs

    def record(self) -> dict[str, Any]:
        """As a line of JSON has it."""
        return asdict(self)


@dataclass
class Session:
    """A teacher, and the plan's runs as they are when nothing befalls them: by how many processes train each."""

    root: Path
    words: Sequence[str]
    undisturbed: dict[int, Outcome] = field(default_factory=dict)

    def scene(self, name: str, seed: int, *, minute: bool = False) -> Scene:
        """A fresh folder with the teacher."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / "teacher", folder)
        return Scene(folder, self.words, random.Random(seed), minute)


def session(root: Path, faults: Sequence[Fault]) -> Session:
    """Train the teacher, and once what these faults are to be compared with."""
    kill.begin()
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "small.npz", x_train=pixels[:300], y_train=labels[:300], x_test=pixels[300:450], y_test=labels[300:450])
    data = ("--dataset", f"npz:{root / 'small.npz'}", *SMALL)
    (root / "teacher").mkdir()
    teacher = Scene(root / "teacher", (), random.Random(0))
    teacher.cured("train", "--model", "resnet14", "--seeds", str(TEACHER_SEED), "--epochs", "1", *data)
    own = Session(root, ("distill", *PLAN, *data, *STAGES))
    for ranks in sorted({fault.ranks for fault in faults}):
        scene = own.scene(f"undisturbed by {ranks}", 0)
        if ranks == 1:
            scene.cured(*own.words)
        else:
            work = torchrun(scene)
            assert work.wait() == 0, work.last_lines()
        own.undisturbed[ranks] = outcomes(scene.folder / "runs")
    return own


def strike(fault: Fault, seed: int, session: Session, *, minute: bool = False) -> Strike:
    """Let a fault befall a training at the moment that the seed decides. The folder stays if something is wrong."""
    began, problem, found = time.monotonic(), "", Outcome()
    wanted = session.undisturbed[fault.ranks]
    name = re.sub(r"\W+", "-", fault.name)
    for attempt in range(TRIES):
        scene = session.scene(f"{name}.{seed}.{attempt}", seed + 1000 * attempt, minute=minute)
        with scene.stack:
            try:
                fault.befall(scene)
                found = outcomes(scene.folder / "runs")
            except TooLateError:
                problem = "the work was done before it could be struck"
                continue
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                problem = ""
            again = trained_again(scene.folder)
            break
    else:
        again = 0
    if again > (allowed := fault.allowed + scene.unsaved) and not problem:
        problem = f"{again} epochs on record were trained again, where {allowed} may be"
    differs = [] if problem else sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    saw = [line.replace(f"{scene.folder}/", "").replace(sys.executable, "python") for line in scene.saw]  # equal on every machine
    done = Strike(fault.name, seed, scene.code, saw, scene.on_record, again, differs, problem, round(time.monotonic() - began, 1))
    if done.sound:
        shutil.rmtree(scene.folder)
    return done


def epochs_on_record(runs: Path) -> int:
    """How many epochs the students' journals have, of all together."""
    found = 0
    for journal in runs.glob("*/journal.jsonl"):
        if journal.parent.name != TEACHER:
            with contextlib.suppress(OSError):  # the folder has just been moved away
                found += len(set(re.findall(rb'{"epoch": {"epoch": (\d+)', journal.read_bytes())))
    return found


def trained_again(folder: Path) -> int:
    """The most epochs on record that a run had to train again: an epoch that was trained twice took two different times."""
    most = 0
    for journal in folder.rglob("journal.jsonl"):
        times = collections.defaultdict(set)
        for line in journal.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # empty, or cut off
                if epoch := json.loads(line.partition(b" ")[2]).get("epoch"):
                    times[epoch["epoch"]].add(epoch["seconds"])
        most = max(most, sum(len(found) > 1 for found in times.values()))
    return most


def statuses(runs: Path) -> list[str]:
    """What the ledger says of the students."""
    ledger = Ledger(runs)
    found = [run.status for run in ledger.runs() if run.seed != TEACHER_SEED]
    ledger.close()
    return found


def outcomes(runs: Path) -> Outcome:
    """What became of each run of the plan: the weights in its file, curve, predictions and figures."""
    ledger = Ledger(runs)
    found = {f"{run.method} seed {run.seed}": _outcome(run, ledger) for run in ledger.runs() if run.seed != TEACHER_SEED}
    ledger.close()
    return found


def _outcome(run: Run, ledger: Ledger) -> str:
    if run.status != "finished":
        return run.status
    curve = [replace(epoch, seconds=0.0) for epoch in ledger.epochs(run.no)]
    weights, _ = load_weights(ledger.run_folder(run.no) / "student.safetensors")
    predictions = hashlib.sha256((ledger.run_folder(run.no) / "predictions.npz").read_bytes()).hexdigest()
    figures = run.error, run.correct, run.epoch, run.best_correct, run.best_epoch, run.weights_hash, hash_weights(weights)
    return hashlib.sha256(repr((figures, curve, predictions)).encode()).hexdigest()
