"""Cut off and taken up again, in one process: bit for bit, from the newest checkpoint that is whole, and never from another run's."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.interruptions import STEPS, Cut, Scissors, cut_off, outcome
from helpers.small import config

from flowdistill import UserError
from flowdistill.ledger import Ledger, store
from flowdistill.methods import METHODS, Method, Needs
from flowdistill.methods.base import Paper
from flowdistill.runner import execute, resume, run
from flowdistill.training import checkpoint, student
from flowdistill.training import cohort as engine
from flowdistill.training.cohort import train
from flowdistill.types import Batch, NetSpec, Outputs

CPU = torch.device("cpu")


class Learned(Method):
    """A method with all that a method may have: an adapter that is trained, and a memory that every step changes."""

    name, terms, paper = "learned", ("learned",), Paper("nobody", "nothing", "nowhere", 2026, "")
    memory: torch.Tensor

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.adapter = torch.nn.Linear(student.embedding, teacher.embedding)
        self.register_buffer("memory", torch.zeros(teacher.embedding))
        self.needs = Needs(embedding=True)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        return {"learned": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, torch.Tensor]:
        self.memory.mul_(0.9).add_(0.1 * teacher.embedding.mean(0))
        return {"learned": (self.adapter(student.embedding) - teacher.embedding - self.memory.clone()).square().mean()}


@pytest.fixture(autouse=True)
def _a_checkpoint_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def learned() -> Iterator[None]:
    """The method can be named."""
    with METHODS.restored():
        METHODS.register("learned")(Learned)
        yield


@pytest.fixture
def taught(ledger: Ledger, small_npz: Path) -> Ledger:
    return with_teacher(ledger, small_npz)


def with_teacher(ledger: Ledger, data: Path) -> Ledger:
    """The ledger with a teacher in it."""
    run([config(data, student="resnet14", seed=9, train={"epochs": 1})], ledger, CPU)
    return ledger


KINDS: dict[str, dict[str, Any]] = {
    "base": {"method": "base", "teacher": None},
    "an adapter and a memory": {"method": "learned"},
    "memory banks": {"method": "crd", "options": {"crd": {"negatives": 50, "dim": 8}}},
    "a queue": {"method": "seed_kd", "options": {"seed_kd": {"queue": 50}}},
    "told of the teacher": {"method": "nd+ofd+srrl"},
    "in stage one": {"options": {"fsp": {"schedule": "two-stage", "stage_epochs": 4}}},
    "at the end of stage one": {"options": {"fsp": {"schedule": "two-stage", "stage_epochs": 2}}},
    "in stage two": {"options": {"fsp": {"schedule": "two-stage", "stage_epochs": 1}}},
    "holdout": {"method": "base", "teacher": None, "split": "holdout"},
    "bf16, nesterov, cosine": {"method": "at+kd", "train": {"precision": "bf16", "nesterov": True, "schedule": "cosine"}},
    "no momentum": {"method": "kd", "train": {"momentum": 0.0}},
    "mixed labels, smoothed": {"method": "kd", "train": {"mixup": 0.3, "label_smoothing": 0.1}},
    "cut and mixed, erased": {"method": "kd", "train": {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "class_weights": "balanced"}},
    "balanced": {"method": "fsp", "train": {"sampling": "balanced", "random_erasing": 0.25, "label_smoothing": 0.1}},
    "adamw, clipped, warmed up": {
        "method": "learned",
        "train": {"optimizer": "adamw", "lr": 0.003, "decay_norm_and_bias": False, "clip": 0.5, "warmup_steps": 5},
    },
    "layers at rates of their own": {"method": "learned", "train": {"layer_decay": 0.6, "decay_norm_and_bias": False}},
    "an average that ships": {"method": "kd", "train": {"ema": 0.9}},
    "an average, chosen": {"method": "base", "teacher": None, "split": "holdout", "train": {"ema": 0.9}},
    "rmsprop": {"method": "kd", "train": {"optimizer": "rmsprop", "lr": 0.001, "optimizer_options": {"momentum": 0.5}}},
    "with unlabelled images": {"method": "kd+sp", "unlabelled": 19},
    "mixed and resized": {"method": "kd", "crop": "resized", "weights": {"task": 0.0}, "train": {"mixup": True, "schedule": "cosine"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_straight_bit_for_bit(taught: Ledger, small_npz: Path, tmp_path: Path, learned: None, kind: str) -> None:
    keys = {"method": "fsp", "teacher": "1", **KINDS[kind]}
    epochs, more = {"train": {"epochs": 4, **keys.pop("train", {})}}, keys.pop("unlabelled", None)
    configs = [config(small_npz, seed=seed, **keys, **epochs) for seed in (0, 1)]
    if more:
        np.savez(tmp_path / "more.npz", x=np.load(small_npz)["x_test"][:more])
        data = configs[0].data.model_copy(update={"unlabelled": f"npz:{tmp_path / 'more.npz'}"})
        configs = [one.model_copy(update={"data": data}) for one in configs]
    interrupted = cut_off(configs, taught, 2 * STEPS + 2)
    assert [len(taught.epochs(one.no)) for one in interrupted] == [2, 2]
    resumed = run(configs, taught, CPU)
    assert [one.no for one in resumed] == [one.no for one in interrupted]
    assert [one.resumed for one in resumed] == [1, 1]
    straight = run(configs, taught, CPU, again=True)
    assert [outcome(one, taught) for one in resumed] == [outcome(one, taught) for one in straight]


def test_the_best_epoch_of_a_holdout_run_survives(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch 2 is best on the held-out images, the cut falls in epoch 4, and the weights of epoch 2 ship."""
    measured = engine._measure

    def scripted(cohort: engine.Cohort, *args: int) -> dict[student.Student, engine.Progress]:
        progress = measured(cohort, *args)
        for one in progress.values():
            one.correct = (5, 9, 9, 2, 7)[cohort.done]
        return progress

    monkeypatch.setattr(engine, "_measure", scripted)
    configs = [config(small_npz, split="holdout", train={"epochs": 5})]
    cut_off(configs, taught, 3 * STEPS + 2)
    (resumed,) = resume(taught, CPU)
    (straight,) = run(configs, taught, CPU, again=True)
    assert resumed.epoch == 2
    assert outcome(resumed, taught) == outcome(straight, taught)


def test_channels_last_and_the_fused_optimiser(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum that came back contiguous beside a channels_last weight would be added wrongly, without a word."""
    built = student.build_optimizer

    def fused(*args: Any) -> torch.optim.SGD:
        plain = built(*args)
        return torch.optim.SGD(plain.param_groups, **{**plain.defaults, "fused": True, "foreach": False})

    monkeypatch.setattr(student, "build_optimizer", fused)
    configs = [config(small_npz, method="fsp", teacher="1", train={"epochs": 4})]
    (interrupted,) = cut_off(configs, taught, 2 * STEPS + 2)
    layouts: set[bool] = set()

    class Look(Scissors):
        def epoch(self, line: str) -> None:
            layouts.update(same for student in seen for same in same_layouts(student))

    seen: list[student.Student] = []
    loaded = student.Student.load
    monkeypatch.setattr(student.Student, "load", lambda self, *args, **keys: (seen.append(self), loaded(self, *args, **keys))[1])
    (resumed,) = resume(taught, CPU, no=interrupted.no, watcher=Look())
    (straight,) = run(configs, taught, CPU, again=True)
    assert layouts == {True}
    assert outcome(resumed, taught) == outcome(straight, taught)


def same_layouts(student: student.Student) -> list[bool]:
    buffers = [(p, student.optimizer.state[p]["momentum_buffer"]) for p in student.net.parameters()]
    assert any(p.ndim == 4 and not p.is_contiguous() for p, _ in buffers)
    return [p.stride() == momentum.stride() for p, momentum in buffers]


def test_the_whole_cohort_goes_on_whichever_run_is_named(taught: Ledger, small_npz: Path) -> None:
    configs = [config(small_npz, method=method, teacher="1", seed=seed) for method in ("base", "kd") for seed in (0, 1)]
    interrupted = cut_off(configs, taught, STEPS + 1)
    resumed = resume(taught, CPU, no=interrupted[-1].no)
    assert [one.no for one in resumed] == [one.no for one in interrupted] == [2, 3, 4, 5]
    assert {one.status for one in resumed} == {"finished"}
    assert not list(taught.folder.glob("*/*checkpoint*"))


def test_without_a_number_all_that_was_cut_off_goes_on(taught: Ledger, small_npz: Path) -> None:
    for seed in (0, 1):
        cut_off([config(small_npz, seed=seed)], taught, STEPS + 1)
    assert [(one.seed, one.status) for one in resume(taught, CPU)] == [(0, "finished"), (1, "finished")]
    assert resume(taught, CPU) == []


def test_the_same_command_goes_on_and_again_does_not(taught: Ledger, small_npz: Path) -> None:
    (interrupted,) = cut_off([config(small_npz)], taught, STEPS + 1)
    (fresh,) = run([config(small_npz)], taught, CPU, again=True)
    assert (fresh.no, fresh.resumed) == (interrupted.no + 1, 0)
    assert taught.run(interrupted.no).status == "interrupted"


def test_it_keeps_the_teacher_it_began_with(taught: Ledger, small_npz: Path) -> None:
    student = config(small_npz, method="kd", teacher="resnet14", seed=1, train={"epochs": 4})
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 4})], taught, CPU)
    (interrupted,) = cut_off([student], taught, STEPS + 1)
    run([config(small_npz, student="resnet14", seed=5, train={"epochs": 4})], taught, CPU)  # seed 1 takes number 2 mod 2 now
    (resumed,) = run([student], taught, CPU)
    assert (resumed.no, resumed.teacher_run) == (interrupted.no, interrupted.teacher_run) == (3, 2)
    (named,) = run([student.model_copy(update={"teacher": "2"})], taught, CPU)
    assert named.weights_hash == resumed.weights_hash
    (anew,) = run([student], taught, CPU, again=True)
    assert anew.teacher_run != resumed.teacher_run
    assert anew.weights_hash != resumed.weights_hash


def test_a_student_that_diverged_stays_failed_and_the_others_go_on(taught: Ledger, small_npz: Path) -> None:
    configs = [config(small_npz), config(small_npz, seed=1)]
    interrupted = cut_off(configs, taught, STEPS + 1)
    taught.update(interrupted[0].no, status="failed", error="diverged in epoch 1: task is not finite")
    resumed = resume(taught, CPU)
    assert [one.no for one in resumed] == [interrupted[1].no]
    assert taught.run(interrupted[0].no).status == "failed"
    with pytest.raises(UserError, match=r"run 2 is failed \(diverged in epoch 1: task is not finite\); only what was cut off"):
        resume(taught, CPU, no=interrupted[0].no)


def test_a_run_that_is_alive_is_left_alone(taught: Ledger, small_npz: Path) -> None:
    (interrupted,) = cut_off([config(small_npz)], taught, STEPS + 1)
    taught.update(interrupted.no, status="running")
    with taught.lock(interrupted.home):
        with pytest.raises(UserError, match=r"run 2 is being trained by another process"):
            resume(taught, CPU, no=interrupted.no)
        with pytest.raises(UserError, match=r"another process trains it as run 2; wait for that, or repeat it with --again"):
            run([config(small_npz)], taught, CPU)
        assert resume(taught, CPU) == []


def test_threads_and_determinism_are_those_it_began_with(taught: Ledger, small_npz: Path) -> None:
    (interrupted,) = cut_off([config(small_npz)], taught, STEPS + 1)
    taught.update(interrupted.no, threads=2, deterministic=1)
    seen = []

    class Look(Scissors):
        def step(self) -> None:
            seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))

    resume(taught, CPU, watcher=Look())
    assert set(seen) == {(2, True)}
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (1, False)


def test_what_is_cut_off_before_its_first_step_is_interrupted_too(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(device: torch.device) -> None:
        raise Cut("cut")

    with monkeypatch.context() as patch:
        patch.setattr(execute, "reset_peak_memory", cut)
        with pytest.raises(Cut):
            run([config(small_npz)], taught, CPU)
    assert (taught.run(2).status, taught.run(2).error) == ("interrupted", "cut")
    assert resume(taught, CPU)[0].status == "finished"


# Faults


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "one bit flipped": flip,
    "junk": lambda path: path.write_bytes(b"junk" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(taught: Ledger, small_npz: Path, damage: str) -> None:
    configs = [config(small_npz, train={"epochs": 5})]
    (interrupted,) = cut_off(configs, taught, 3 * STEPS + 1)
    newest = taught.run_folder(interrupted.no) / checkpoint.FILE
    DAMAGE[damage](newest)
    ear = Scissors()
    (resumed,) = resume(taught, CPU, watcher=ear)
    assert ear.lines[0].startswith(f"{newest} is damaged (")
    assert ear.lines[0].endswith("the one before it is used")
    assert "run 2: resumed after epoch 2 of 5" in ear.lines
    (straight,) = run(configs, taught, CPU, again=True)
    assert outcome(resumed, taught) == outcome(straight, taught)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(
    taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged, resumed, and cut off again while the next checkpoint is being renamed: there is still one that is whole."""
    (interrupted,) = cut_off([config(small_npz, train={"epochs": 5})], taught, 3 * STEPS + 1)
    folder = taught.run_folder(interrupted.no)
    os.truncate(folder / checkpoint.FILE, 100)
    rename = Path.replace

    def cut(path: Path, target: Path) -> Path:
        if target.name == checkpoint.FILE:
            raise Cut("cut")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        with pytest.raises(Cut):
            resume(taught, CPU)
    saved = checkpoint.load(folder)
    assert saved is not None
    assert saved.done == 2
    assert resume(taught, CPU)[0].status == "finished"


def test_with_both_damaged_it_starts_again_and_says_so(taught: Ledger, small_npz: Path) -> None:
    configs = [config(small_npz, train={"epochs": 4})]
    (interrupted,) = cut_off(configs, taught, 3 * STEPS + 1)
    for name in (checkpoint.FILE, checkpoint.PREVIOUS):
        os.truncate(taught.run_folder(interrupted.no) / name, 100)
    ear = Scissors()
    (resumed,) = resume(taught, CPU, watcher=ear)
    assert ear.lines[0].endswith("there is no other, so it starts again")
    assert "run 2: resumed after epoch 0 of 4" in ear.lines
    (straight,) = run(configs, taught, CPU, again=True)
    assert outcome(resumed, taught) == outcome(straight, taught)


def test_a_full_disk_ends_no_run(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of epoch 2 does not fit; the one of epoch 1 stands, training goes on, and the next fits again."""
    saved = checkpoint.save_weights

    def full(path: Path, weights: Any, about: dict[str, Any], **keys: Any) -> None:
        if about["done"] == 2:
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(b"as much as there was room for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(path, weights, about, **keys)

    monkeypatch.setattr(checkpoint, "save_weights", full)
    ear = Scissors()
    (done,) = run([config(small_npz, train={"epochs": 4})], taught, CPU, watcher=ear)
    assert "run 2: no checkpoint of epoch 2 (No space left on device); training goes on with the one before" in ear.lines
    assert done.status == "finished"
    files = [".lock", "journal.jsonl", "predictions.npz", "run.json", "student.safetensors"]
    assert sorted(path.name for path in taught.run_folder(2).iterdir()) == files


def test_a_full_disk_under_the_ledger_stops_the_run_which_goes_on_when_there_is_room(taught: Ledger, small_npz: Path) -> None:
    """SQLite's own error, from a ledger that is not allowed to grow."""
    configs = [config(small_npz, train={"epochs": 120})]

    class Full(Scissors):
        def epoch(self, line: str) -> None:
            pages = taught._db.execute("PRAGMA page_count").fetchone()[0]
            taught._db.execute(f"PRAGMA max_page_count={pages}")

    ear = Full()
    with pytest.raises(sqlite3.OperationalError, match="full"):
        run(configs, taught, CPU, watcher=ear)
    assert ear.lines[-1].startswith("run 2: stopped; go on with: flowdistill resume 2")
    assert taught.run(2).cut_off
    taught._db.execute("PRAGMA max_page_count=1000000")
    (resumed,) = resume(taught, CPU)
    assert (resumed.status, len(taught.epochs(2))) == ("finished", 120)


class MovedAway(Scissors):
    """The folder of the runs is gone when an epoch is to be recorded, or after it was."""

    def __init__(self, runs: Path) -> None:
        super().__init__()
        self.runs = runs

    def epoch(self, line: str) -> None:
        if not self.lines[-1].endswith("moved"):
            self.runs.rename(self.runs.with_name("away"))
            self.lines.append("moved")


def test_a_folder_of_runs_that_is_gone_for_a_while_comes_back_with_all(taught: Ledger, small_npz: Path, tmp_path: Path) -> None:
    """Nothing is written where it was, so that it can come back: a checkpoint would make the run's folder anew."""
    configs = [config(small_npz, train={"epochs": 4})]
    ear = MovedAway(taught.folder)
    with pytest.raises(FileNotFoundError, match=r"2/journal\.jsonl"):
        run(configs, taught, CPU, watcher=ear)
    assert "run 2: no checkpoint of epoch 1 (No such file or directory); training goes on with the one before" in ear.lines
    assert ear.lines[-1].startswith("run 2: stopped; go on with")
    assert not taught.folder.exists()
    (tmp_path / "away").rename(taught.folder)
    (resumed,) = resume(taught, CPU)
    (straight,) = run(configs, taught, CPU, again=True)
    assert outcome(resumed, taught) == outcome(straight, taught)


def test_a_folder_of_runs_that_goes_while_the_ledger_is_written_is_told(
    taught: Ledger, small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal has the epoch already, and the ledger, whose file goes on without a name, takes it too."""
    noted = store.folders.note

    def moved(folder: Path, **entry: Any) -> None:
        noted(folder, **entry)
        if "epoch" in entry:
            taught.folder.rename(tmp_path / "away")

    monkeypatch.setattr(store.folders, "note", moved)
    line = rf"^{re.escape(str(taught.folder))} is gone, where run 2 was trained; put it back, then flowdistill resume"
    with pytest.raises(UserError, match=line):
        run([config(small_npz)], taught, CPU)
    monkeypatch.undo()
    assert not taught.folder.exists()
    (tmp_path / "away").rename(taught.folder)
    assert resume(taught, CPU)[0].status == "finished"


def test_what_stopped_a_run_is_told_even_if_its_journal_has_no_room_for_that(
    taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(taught, "update", full)
    ear = Scissors(STEPS + 1)
    with pytest.raises(Cut):
        run([config(small_npz)], taught, CPU, watcher=ear)
    assert ear.lines[-1].startswith("run 2: stopped; go on with: flowdistill resume 2")
    assert taught.run(2).cut_off


LOCKER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE"); print("locked", flush=True); time.sleep(8); db.execute("COMMIT")
"""


def test_a_ledger_locked_by_another_process_for_8_seconds_is_waited_for(taught: Ledger, small_npz: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LOCKER, str(taught.path)], stdout=subprocess.PIPE, text=True) as locker:
        assert locker.stdout is not None
        locker.stdout.readline()
        started = time.monotonic()
        (done,) = run([config(small_npz)], taught, CPU)
        assert time.monotonic() - started > 6  # SQLite gives up after 5 by itself
    assert locker.returncode == 0
    assert (done.status, len(taught.epochs(done.no))) == ("finished", 2)


def test_data_that_changed_are_refused_and_nothing_is_lost(taught: Ledger, small_npz: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(small_npz.read_bytes())
    (interrupted,) = cut_off([config(path)], taught, STEPS + 1)
    with np.load(small_npz) as arrays:
        changed = dict(arrays)
    changed["x_train"][0, 0, 0] ^= 1
    np.savez(path, **changed)
    with pytest.raises(UserError, match=rf"run 2 can't be resumed: npz:{path} is not the data that it began with \(hash \w+, was \w+\)"):
        resume(taught, CPU)
    assert taught.run(interrupted.no).status == "interrupted"
    path.write_bytes(small_npz.read_bytes())
    assert resume(taught, CPU)[0].status == "finished"


def test_data_that_are_not_found_are_looked_for_from_where_the_run_began(
    taught: Ledger, small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.npz").write_bytes(small_npz.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    cut_off([config(Path("own.npz"))], taught, STEPS + 1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    line = r"^run 2 can't be resumed: npz:own.npz: no such file; .* a relative path is seen from the folder in which the run began$"
    with pytest.raises(UserError, match=line):
        resume(taught, CPU)
    monkeypatch.chdir(tmp_path)
    assert resume(taught, CPU)[0].status == "finished"


def test_a_method_of_another_version_is_refused(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowdistill.methods.kd import KD

    cut_off([config(small_npz, method="kd", teacher="1")], taught, STEPS + 1)
    monkeypatch.setattr(KD, "version", KD.version + 1)
    with pytest.raises(UserError, match="or the version of its method or of its networks' taps is not what it began with"):
        resume(taught, CPU)


def test_another_runs_checkpoint_is_not_taken(taught: Ledger, small_npz: Path) -> None:
    (first,) = cut_off([config(small_npz)], taught, STEPS + 1)
    _, second = cut_off([config(small_npz, seed=1)], taught, STEPS + 1)
    foreign = (taught.run_folder(first.no) / checkpoint.FILE).read_bytes()
    (taught.run_folder(second.no) / checkpoint.FILE).write_bytes(foreign)
    with pytest.raises(UserError, match=f"the checkpoint in {taught.run_folder(second.no)} is not of run 3; remove it"):
        resume(taught, CPU, no=second.no)


def test_the_checkpoint_of_a_ledger_that_was_deleted_is_not_taken(taught: Ledger, small_npz: Path, tmp_path: Path) -> None:
    (first,) = cut_off([config(small_npz)], taught, 2 * STEPS - 1)
    old = taught.run_folder(first.no) / checkpoint.FILE
    fresh = Ledger(tmp_path / "fresh", create=True)
    (fresh.folder / "1").mkdir(parents=True)
    (fresh.folder / "1" / checkpoint.FILE).write_bytes(old.read_bytes())
    with pytest.raises(UserError, match=r"fresh/1 is the folder of one: put the ledger back, or make it again from the folders"):
        run([config(small_npz)], fresh, CPU, watcher=Scissors(1))
    assert (fresh.run_folder(1) / checkpoint.FILE).read_bytes() == old.read_bytes()
    fresh.close()


def test_other_versions_are_said_and_recorded(taught: Ledger, small_npz: Path) -> None:
    (interrupted,) = cut_off([config(small_npz)], taught, STEPS + 1)
    taught.update(interrupted.no, versions={**interrupted.versions, "torch": "2.9.0"})
    ear = Scissors()
    (resumed,) = resume(taught, CPU, watcher=ear)
    assert any(line.startswith("not bit for bit what it would have been") and "torch 2.9.0 -> " in line for line in ear.lines)
    assert {**resumed.versions, "load": ""} == {**interrupted.versions, "load": ""}  # the load is of another moment


def test_checkpoints_are_no_more_often_than_every_ten_seconds(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert execute.CHECKPOINT_SECONDS == 10
    saved: list[int] = []
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(execute.checkpoint, "save", lambda folder, cohort, *_: saved.append(cohort.done))
    monkeypatch.setattr(execute.time, "monotonic", lambda: next(clock))  # twice an epoch with a checkpoint, once without
    run([config(small_npz, train={"epochs": 8})], taught, CPU)
    assert saved == [1, 4, 7]


# The command line


def test_resume_by_command(taught: Ledger, small_npz: Path, tmp_path: Path) -> None:
    (interrupted,) = cut_off([config(small_npz)], taught, STEPS + 1)
    said = command(tmp_path, "resume", str(interrupted.no))
    assert said.code == 0
    assert "run 2: resumed after epoch 1 of 2" in said.err
    assert said.out.splitlines()[1].startswith("2   finished")
    again = command(tmp_path, "resume")
    assert (again.code, again.out) == (0, "")
    assert again.err.startswith("nothing was cut off")


def test_a_dead_run_is_shown_as_dead(taught: Ledger, small_npz: Path, tmp_path: Path) -> None:
    (interrupted,) = cut_off([config(small_npz)], taught, STEPS + 1)
    taught.update(interrupted.no, status="running")
    assert command(tmp_path, "runs").out.splitlines()[2].startswith("2   dead")
    assert "dead" in command(tmp_path, "show", "2").out


def test_training_goes_on_where_the_cohort_stands() -> None:
    """``position`` over three phases, the empty one between two phases included."""
    from flowdistill.training.cohort import Cohort

    cohort = Cohort(None, [], None, (2, 1, 3), "fp32")  # type: ignore[arg-type]
    places = []
    for cohort.done in range(7):
        places.append(cohort.position)
    assert places == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert list(train(cohort)) == []
