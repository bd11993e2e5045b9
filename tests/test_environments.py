"""A machine that runs out of something: shared memory, open files, memory, disk. One line, and the run goes on later."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.small import config
from PIL import Image

from flowdistill import env
from flowdistill.checks import UserError, shortage
from flowdistill.data import streaming
from flowdistill.data.lazy_images import Files, Pictures, or_broken
from flowdistill.ledger import Ledger, folders
from flowdistill.runner import resume, run
from flowdistill.runner.watcher import Report, Watcher
from flowdistill.training import checkpoint
from flowdistill.training.weights import write_whole

CPU = torch.device("cpu")
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
SHORT = [
    (MemoryError(), "free some memory, or train fewer seeds and methods together"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "free some memory, or train fewer seeds and methods together"),
    (RuntimeError(ALLOCATOR), "free some memory, or train fewer seeds and methods together"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "free some memory, or train fewer seeds and methods together"),
    (RuntimeError("std::bad_alloc"), "free some memory, or train fewer seeds and methods together"),
    (RuntimeError("can't start new thread"), "free some memory, or train fewer seeds and methods together"),
    (
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        "free some memory, or train fewer seeds and methods together",
    ),
    (OSError(errno.EMFILE, "Too many open files"), "allow more open files (ulimit -n)"),
    (OSError(errno.ENFILE, "Too many open files in system"), "allow more open files (ulimit -n)"),
    (OSError(errno.ENOSPC, "No space left on device"), "make room there"),
]


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """3 classes of 12 images for training and test each."""
    chance = np.random.default_rng(0)
    for folder in (tmp_path / "rgb" / split / label for split in ("train", "test") for label in "abc"):
        folder.mkdir(parents=True)
        for number in range(12):
            Image.fromarray(chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(("error", "cure"), SHORT, ids=repr)
def test_a_shortage_is_told_with_its_cure_and_the_run_goes_on(
    error: Exception, cure: str, small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(_: Watcher, report: Report) -> None:
        if report.epoch == 1:
            raise error

    words = ["train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", "--batch-size", "64", "--set", "train.precision=fp32"]
    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "report", raises)
        said = command(tmp_path, *words, "--epochs", "2")
    assert said.code == 1
    assert said.err.splitlines()[-1].endswith(f"{cure} and give the command again (finished runs are kept)")
    assert "flowdistill resume 1" in said.err
    ledger = Ledger(tmp_path / "runs")
    assert ledger.run(1).status == "interrupted"
    (done,) = resume(ledger, CPU)
    assert (done.status, done.resumed) == ("finished", 1)


def test_no_other_error_is_a_shortage() -> None:
    for error in (ValueError("x"), OSError(errno.ENOENT, "No such file"), RuntimeError("shape mismatch")):
        assert shortage(error) == ""


def test_no_memory_left_while_training_is_one_line(small_npz: Path, tmp_path: Path) -> None:
    """For real: after the first epoch the process may have no more memory than it has."""
    program = f"""
import resource, sys
import torch
from flowdistill.runner.watcher import Watcher
from flowdistill.cli import main

def starve(self, report):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    size = 1 << 24
    while size > 1 << 10:  # what it freed is taken, too
        try:
            hold.append(torch.empty(size))
        except RuntimeError:
            size //= 2

hold = []
Watcher.report = starve
sys.argv = ["flowdistill", *"train --model resnet20 --dataset npz:{small_npz} --epochs 3 --batch-size 150".split()]
try:
    main()
finally:  # torch ends with code of its own
    hold.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("flowdistill: ")
    assert "free some memory, or train fewer seeds and methods together" in done.stderr.splitlines()[-1]
    assert Ledger(tmp_path / "runs").run(1).cut_off


def test_a_shortage_is_no_damage(coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_npz: Path) -> None:
    """It must not replace images by others, nor throw a checkpoint away."""

    def short(*_: object, **__: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        or_broken("a.png", short)
    monkeypatch.setattr(checkpoint, "read_safetensors", short)
    with pytest.raises(OSError, match="Too many open files"):
        checkpoint.load(tmp_path)


# Streamed images


def sent(batch: object) -> object:
    """What comes out of the pipe between two processes."""
    return pickle.loads(pickle.dumps(batch))


def decoder(root: Path) -> streaming.Decoder:
    names = np.array([os.fsencode(str(path.relative_to(root))) for path in sorted(root.rglob("*.png"))], dtype=np.bytes_)
    rows = np.arange(len(names))
    return streaming.Decoder(Pictures("folder:rgb", Files(str(root), names), rows, np.zeros_like(rows), (16, 16, 3)))


def test_a_batch_needs_no_shared_memory_and_no_file(coloured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = decoder(coloured / "rgb")
    batch = decode[[streaming.Shot(0, 3), streaming.Shot(0, 4)]]
    monkeypatch.setattr(torch.Storage, "_share_memory_", lambda *_: pytest.fail("shared memory"), raising=False)
    monkeypatch.setattr(torch.UntypedStorage, "share_memory_", lambda *_: pytest.fail("shared memory"))
    again = sent(batch)
    assert isinstance(again, streaming.Decoded)
    assert torch.equal(again.pixels.on(CPU), batch.pixels.on(CPU))
    assert batch.pixels.on(CPU).shape == (2, 16, 16, 3)
    assert batch.pixels.on(CPU).dtype == torch.uint8


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=repr)
def test_a_shortage_in_a_process_ends_the_pass(coloured: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def short(*_: object) -> Any:
        raise error

    monkeypatch.setattr(Files, "open", short)
    workers = streaming.Workers(decoder(coloured / "rgb"), CPU, 0, set())
    with pytest.raises(UserError, match=r"^folder:rgb: .*; (allow more open files|free some memory)"):
        list(workers.batches([[streaming.Shot(0, 0)]]))


class Unsendable:
    """A batch that is lost on its way."""

    def __reduce__(self) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


class Losing(streaming.Decoder):
    def __getitem__(self, shots: Any) -> Any:
        return Unsendable()


def test_a_batch_that_is_lost_in_a_process_is_noticed(coloured: Path) -> None:
    """Python would tell it on stderr and wait for ever."""
    workers = streaming.Workers(Losing(decoder(coloured / "rgb").pictures), CPU, 1, set())
    with pytest.raises(UserError, match=r"folder:rgb: a process that decodes was killed .*; resume with fewer --workers, or 0"):
        list(workers.batches([[streaming.Shot(0, 0)]]))


def isolated(folder: Path, shell: str) -> subprocess.CompletedProcess[str]:
    """A shell in a container-like namespace: it has its own mounts."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can mount another /dev/shm")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["unshare", "-m", "sh", "-c", shell], cwd=folder, env=given, capture_output=True, text=True, timeout=120)


TRAIN = (
    "flowdistill train --model resnet8 --dataset folder:rgb --set data.stream=true --set data.size=16 --workers 2 --epochs 1 "
    "--batch-size 12 --precision fp32"
)


@pytest.mark.parametrize(("size", "code"), [("64k", 2), ("64m", 0)])
def test_streaming_with_little_shared_memory(coloured: Path, size: str, code: int) -> None:
    """64 MB is Docker's default. In 64 KB not even the locks of two processes have room."""
    done = isolated(coloured, f"mount -t tmpfs -o size={size} tmpfs /dev/shm && {TRAIN}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        line = "folder:rgb: processes that decode can't be started ([Errno 28] No space left on device); use fewer --workers, or 0"
        assert done.stderr.splitlines()[-1] == f"flowdistill: {line}"
        assert command(coloured, "resume", "--workers", "0").code == 0


# What a container grants


@pytest.mark.parametrize(
    ("groups", "files", "granted"),
    [
        ("0::/\n", {"memory.max": "1000\n"}, [1000]),
        ("0::/\n", {"memory.max": "max\n"}, []),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "700", "memory.max": "9000"}, [700, 9000]),
        ("0::/docker/0123\n", {"memory.max": "800"}, [800]),  # in a container the outer folders are not there
        (
            "5:cpu:/x\n4:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": "600", "memory/memory.limit_in_bytes": "9223372036854771712"},
            [600, 1 << 62],
        ),
        ("4:hugetlb,memory:/\n", {"memory/memory.limit_in_bytes": "500"}, [500]),
        ("1:name=systemd:/\n", {"memory.max": "1"}, []),
        ("", {}, []),
    ],
)
def test_the_memory_of_a_container_is_what_it_grants(tmp_path: Path, groups: str, files: dict[str, str], granted: list[int]) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    found = list(env._granted_by_groups(tmp_path / "cgroup", tmp_path / "fs"))
    assert [min(number, 1 << 62) for number in found] == granted


def test_data_are_held_up_to_half_of_what_is_granted(monkeypatch: pytest.MonkeyPatch, small_npz: Path, tmp_path: Path) -> None:
    whole = env.memory()
    monkeypatch.setattr(env, "_granted_by_groups", lambda: iter([4096]))
    assert (env.memory(), whole > 1 << 20) == (4096, True)
    said = command(tmp_path, "train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", "--epochs", "1")
    assert said.code == 2
    assert "memory" in said.err


def test_without_any_limit_all_memory_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_granted_by_groups", lambda: iter(()))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert env.memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, resource.RLIM_INFINITY))
    assert env.memory() == 1 << 20


# A full disk


@pytest.mark.parametrize("name", ["student.safetensors", "deep/run.json"])
def test_a_full_disk_names_the_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / name, b"content")
    assert caught.value.filename == str(tmp_path / name)
    assert not list((tmp_path / name).parent.iterdir()), "no part of it stays"


def test_a_full_disk_names_the_ledger_and_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "runs", create=True)
    with pytest.raises(sqlite3.OperationalError, match=f"^{re.escape(str(ledger.path))}: database or disk is full$"), ledger.alone():
        raise sqlite3.OperationalError("database or disk is full")
    with pytest.raises(OSError, match="No such file") as caught:
        folders.note(tmp_path / "gone", row={})
    assert caught.value.filename == str(tmp_path / "gone" / folders.JOURNAL)


@pytest.mark.parametrize("read", [lambda folder: folders.numbers(folder), lambda folder: folders.read_journal(folder)])
def test_no_descriptors_are_no_lost_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]) -> None:
    def short(*_: object, **__: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    for name in ("iterdir", "open", "read_bytes"):
        monkeypatch.setattr(Path, name, short)
    monkeypatch.setattr("os.scandir", short)
    monkeypatch.setattr("os.listdir", short)
    with pytest.raises(OSError, match="Too many open files"):
        read(tmp_path)


def on_a_small_disk(tmp_path: Path, work: Callable[[Path], None]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=False, capture_output=True).returncode
    ):
        pytest.skip("only root can mount a small disk")
    try:
        work(disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_student_that_has_no_room_is_told_by_its_path(tmp_path: Path, small_npz: Path) -> None:
    def work(disk: Path) -> None:
        ledger = Ledger(disk / "runs", create=True)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run([config(small_npz, train={"epochs": 1})], ledger, CPU)
        assert caught.value.filename == str(disk / "runs/1/student.safetensors")

    on_a_small_disk(tmp_path, work)


def test_circumstances_are_the_load_and_the_commit_of_this_checkout(tmp_path: Path) -> None:
    found = env.circumstances()
    assert float(found["load"]) >= 0
    assert env._commit(tmp_path) == {}, "a folder that is no checkout"
    (tmp_path / ".git").mkdir()
    assert env._commit.__wrapped__(tmp_path) == {}, "one that git can't read"
    assert set(found) <= {"load", "commit"}
    assert "-" not in found.get("commit", "").removesuffix("-dirty")
