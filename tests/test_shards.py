"""A plan in shards: every run in exactly one, seeds together, balanced; and after a merge what one process would have trained."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.interruptions import Cut, Scissors, outcome
from helpers.small import config

from flowdistill import UserError
from flowdistill.checks import Changes
from flowdistill.config import RunConfig
from flowdistill.ledger import Ledger, Run, merge, network_file_system, shard_plan
from flowdistill.runner import Watcher, run, shards
from flowdistill.runner.partition import part, whole
from flowdistill.runner.plan import plan

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[1] / "docs" / "shard.sbatch"


def train_shard(configs: Sequence[RunConfig], runs: Path, number: int, count: int, watcher: Watcher | None = None) -> list[Run]:
    """What ``--shard number/count`` does."""
    base = Ledger(runs, create=True)
    shard = shards.planned(configs, base, CPU, number, count)
    base.close()
    own = shards.opened(configs, runs, CPU, shard, Changes())
    try:
        return run(configs, own, CPU, shard=shard, watcher=watcher)
    finally:
        own.close()


def teachers(small_npz: Path, runs: Path, seeds: Sequence[int] = (0, 1, 2)) -> None:
    ledger = Ledger(runs, create=True)
    run([config(small_npz, method="base", seed=seed) for seed in seeds], ledger, CPU)
    ledger.close()


def students(small_npz: Path, seeds: Sequence[int], **keys: Any) -> list[RunConfig]:
    methods = ("base", "kd", "at", "dml")
    made = [
        {"method": method, "seed": seed, **({"teacher": "resnet8"} if method in ("kd", "at") else {})}
        for method in methods
        for seed in seeds
    ]
    return [config(small_npz, **values, **keys) for values in made]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_run_is_in_one_shard_and_what_shares_a_seed_stays_together(small_npz: Path, ledger: Ledger, count: int) -> None:
    configs = [config(small_npz, method=method, seed=seed) for method in ("base", "dml", "tf_kd") for seed in range(5)]
    jobs = plan(configs, ledger, CPU)
    parts = [part(jobs, whole(jobs, number, count)) for number in range(1, count + 1)]
    assert sorted(job.key for jobs_ in parts for job in jobs_) == sorted(job.key for job in jobs)
    seeds = [{job.config.seed for job in jobs_} for jobs_ in parts]
    assert sum(map(len, seeds)) == 5
    assert max(map(len, seeds)) - min(map(len, seeds)) <= 1, "seeds cost the same, so shares differ by one at most"
    assert [job.key for job in parts[0]] == [job.key for job in jobs if job in parts[0]], "the plan's order is kept"


def test_a_costly_seed_gets_a_shard_of_its_own(small_npz: Path, ledger: Ledger) -> None:
    sizes = {"resnet20": [0], "resnet8": [1, 2, 3]}  # in operations a ResNet-20 takes 3.3 times what a ResNet-8 does
    jobs = plan(
        [config(small_npz, method="base", student=model, seed=seed) for model, seeds in sizes.items() for seed in seeds], ledger, CPU
    )
    parts = [[(job.student.model, job.config.seed) for job in part(jobs, whole(jobs, number, 2))] for number in (1, 2)]
    assert parts == [[("resnet20", 0)], [("resnet8", 1), ("resnet8", 2), ("resnet8", 3)]]


def test_twice_the_epochs_are_twice_the_cost(small_npz: Path, ledger: Ledger) -> None:
    jobs = plan([config(small_npz, method="base", seed=seed, train={"epochs": 4 if seed == 0 else 2}) for seed in (0, 1, 2)], ledger, CPU)
    assert [[job.config.seed for job in part(jobs, whole(jobs, number, 2))] for number in (1, 2)] == [[0], [1, 2]]


def test_merged_shards_are_the_runs_of_one_process(small_npz: Path, tmp_path: Path) -> None:
    runs, single = tmp_path / "runs", tmp_path / "single"
    configs = students(small_npz, (0, 1, 3))
    for folder in (runs, single):
        teachers(small_npz, folder)
    done = [run_ for number in (3, 1, 2) for run_ in train_shard(configs, runs, number, 3)]
    assert len(done) == 15  # dml trains two
    merge.merge([runs / "shards" / f"{number}-of-3" for number in (1, 2, 3)], runs)
    merged, alone = Ledger(runs), Ledger(single)
    wanted = run(configs, alone, CPU)
    heard = Scissors()
    found = run(configs, merged, CPU, watcher=heard)
    assert len([line for line in heard.lines if "skipped" in line]) == 15, "nothing is trained again"
    assert merged.count() == alone.count() == 3 + 15 - 2  # the bases of seeds 0 and 1 are two of the teachers
    key = ("method", "seed", "fingerprint", "variant", "student", "teacher", "teacher_fingerprint", "teacher_accuracy", "init_hash")
    for ours, other in zip(found, wanted, strict=True):
        assert [getattr(ours, name) for name in key] == [getattr(other, name) for name in key]
        assert outcome(ours, merged) == outcome(other, alone)
        if ours.teacher_run:
            assert merged.run(ours.teacher_run).weights_hash == alone.run(other.teacher_run or 0).weights_hash


def test_a_teacher_is_chosen_as_by_one_process_even_if_a_shard_needs_few_of_them(small_npz: Path, tmp_path: Path) -> None:
    teachers(small_npz, tmp_path / "runs")
    configs = [config(small_npz, method="kd", teacher="resnet8", seed=seed) for seed in (0, 1, 4)]
    chosen = {run_.seed: run_.teacher_run for number in (1, 2, 3) for run_ in train_shard(configs, tmp_path / "runs", number, 3)}
    assert chosen == {0: 2, 1: 3, 4: 3}  # number (seed + 1) mod 3


def test_a_shard_that_was_cut_off_goes_on_with_the_same_command(small_npz: Path, tmp_path: Path) -> None:
    configs = [config(small_npz, method="base", seed=seed, train={"epochs": 3}) for seed in (0, 1, 2)]
    alone = Ledger(tmp_path / "single", create=True)
    wanted = {run_.seed: outcome(run_, alone) for run_ in run(configs, alone, CPU)}
    with pytest.raises(Cut):
        train_shard(configs, tmp_path / "runs", 1, 2, Scissors(6))
    again = Scissors()
    done = train_shard(configs, tmp_path / "runs", 1, 2, again)
    assert any("resumed after epoch 1 of 3" in line for line in again.lines)
    own = Ledger(tmp_path / "runs/shards/1-of-2")
    assert {run_.seed: outcome(run_, own) for run_ in done} == {seed: wanted[seed] for seed in (0, 2)}
    assert own.count() == 2


def test_what_the_ledger_has_is_not_trained_again_and_does_not_move_the_parts(small_npz: Path, tmp_path: Path) -> None:
    configs = [config(small_npz, method="base", seed=seed) for seed in range(4)]
    teachers(small_npz, tmp_path / "runs", (0, 1))
    heard = Scissors()
    done = train_shard(configs, tmp_path / "runs", 1, 2, heard)
    assert [run_.seed for run_ in done] == [0, 2]
    assert [line for line in heard.lines if "skipped" in line] == [
        "base resnet8 seed 0: run 1 has it already, skipped (--again repeats it, in Python again=True)"
    ]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"seeds": (0, 1, 2)}, "base resnet8 seed 2 is new"),
        ({"seeds": (0,)}, "base resnet8 seed 1 is gone"),
        ({"seeds": (0, 1), "train": {"lr": 0.06}}, "base resnet8 seed 0: its data, networks, teacher or recipe changed"),
        ({"seeds": (0, 1), "count": 3}, "2 shards, and 3"),
    ],
    ids=["a seed more", "a seed less", "another rate", "another count"],
)
def test_a_plan_that_changed_since_its_shards_ran_is_refused(small_npz: Path, tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    runs, seeds, count = tmp_path / "runs", keys.pop("seeds"), keys.pop("count", 2)
    train_shard([config(small_npz, method="base", seed=seed) for seed in (0, 1)], runs, 1, 2)
    changed = [config(small_npz, method="base", seed=seed, **keys) for seed in seeds]
    for number in (1, 2):
        with pytest.raises(UserError) as refused:
            train_shard(changed, runs, number, count)
        assert f"the plan changed since shard 1/2 ran in {runs / 'shards' / '1-of-2'} ({told});" in str(refused.value)
    assert [path.name for path in (runs / "shards").iterdir()] == ["1-of-2"]


def test_shards_of_different_plans_are_not_merged(small_npz: Path, tmp_path: Path) -> None:
    train_shard([config(small_npz, method="base", seed=0)], tmp_path / "a", 1, 2)
    train_shard([config(small_npz, method="base", seed=1)], tmp_path / "b", 2, 2)
    said = command(tmp_path, "ledger", "merge", "a/shards/1-of-2", "b/shards/2-of-2", "--into", "runs")
    assert said.err == (
        "flowdistill: a/shards/1-of-2 and b/shards/2-of-2 are shards of different plans (base resnet8 seed 0 is gone; base resnet8 seed 1 "
        "is new); the plan changed since one of them ran: train that shard again, or merge the two by separate commands\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_merge_says_which_shards_it_had_not(small_npz: Path, tmp_path: Path) -> None:
    train_shard([config(small_npz, method="base", seed=seed) for seed in range(3)], tmp_path / "runs", 2, 3)
    said = command(tmp_path, "ledger", "merge", "runs/shards/2-of-3", "--into", "runs")
    assert said.err == "1 of 1 runs were copied into runs\nnot among them: shard 1/3 and 3/3\n"


def test_more_shards_than_seeds_leave_some_without_work(small_npz: Path, tmp_path: Path) -> None:
    words = f"train --model resnet8 --dataset npz:{small_npz} --set data.pad=1 --epochs 1 --seeds 0 --shard 2/2".split()
    said = command(tmp_path, *words)
    assert said.code == 0
    assert said.err.splitlines()[-1] == (
        "shard 2/2: 0 of the 1 runs of the plan; put all shards together with: flowdistill ledger merge runs/shards/* --into runs"
    )


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "5"}


@pytest.mark.parametrize(
    ("changes", "shard"),
    [
        ({}, (3, 5)),
        ({"SLURM_ARRAY_TASK_ID": "3"}, (1, 5)),
        ({"SLURM_ARRAY_TASK_ID": "11"}, (5, 5)),
        ({"SLURM_ARRAY_TASK_STEP": None, "SLURM_ARRAY_TASK_ID": "4"}, (2, 5)),
    ],
)
def test_a_slurm_array_gives_the_shard(changes: dict[str, str | None], shard: tuple[int, int]) -> None:
    environment = {key: value for key, value in (ARRAY | changes).items() if value is not None}
    assert shards.parse("slurm", environment) == shard


@pytest.mark.parametrize("name", ["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"])
def test_slurm_without_an_array_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"--shard slurm: {name} is not set to a number; start this as a job array"):
        shards.parse("slurm", {key: value for key, value in ARRAY.items() if key != name})


def test_a_task_outside_its_array_is_refused() -> None:
    with pytest.raises(UserError, match="there is no shard 6 of 5"):
        shards.parse("slurm", ARRAY | {"SLURM_ARRAY_TASK_ID": "13"})


def test_a_published_log_is_trained_in_shards(small_npz: Path, tmp_path: Path) -> None:
    words = f"reproduce log --only resnet20-cifar10 --cifar10 npz:{small_npz} --epochs 1 --limit-train 150 --seeds 0 --shard 1/2".split()
    said = command(tmp_path, *words, "--methods", "kd")
    assert (said.code, said.out) == (2, "")
    assert "no resnet20 was trained on" in said.err
    assert command(tmp_path, *words, "--methods", "base").code == 0
    assert [run_.seed for run_ in Ledger(tmp_path / "runs/shards/1-of-2").runs()] == [0]


# Where SQLite's write-ahead log can't be

MOUNTS = r"""
22 1 0:20 / / rw,relatime - ext4 /dev/root rw
30 22 0:50 / {root}/shared\040disk rw,relatime shared:1 - nfs4 server:/export rw,vers=4.2
31 30 0:51 / {root}/shared\040disk/scratch rw - tmpfs tmpfs rw
32 22 0:52 / {root}/sharedtoo rw - xfs /dev/sdb rw
33 22 0:53 / {root}/over rw - cifs //server/x rw
34 33 0:54 / {root}/over rw - ext4 /dev/sdc rw
junk
"""


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mountinfo").write_text(MOUNTS.format(root=tmp_path))
    monkeypatch.setattr(network_file_system, "MOUNTS", tmp_path / "mountinfo")
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("shared disk/runs", "nfs4"),
        ("shared disk", "nfs4"),
        ("shared disk/scratch/runs", ""),
        ("sharedtoo/runs", ""),
        ("shared", ""),
        ("over/runs", ""),
        ("link/runs", "nfs4"),
    ],
)
def test_a_network_file_system_is_known_by_its_mount(mounted: Path, folder: str, kind: str) -> None:
    (mounted / "link").symlink_to(mounted / "shared disk")
    assert network_file_system.kind(mounted / folder) == kind


def test_without_a_table_of_mounts_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_file_system, "MOUNTS", tmp_path / "none")
    assert network_file_system.kind(tmp_path) == ""


def journal_of(folder: Path) -> str:
    with sqlite3.connect(folder / "ledger.db") as db:
        return str(db.execute("PRAGMA journal_mode").fetchone()[0])


def test_training_into_a_network_file_system_is_refused_with_what_to_do_and_shards_work(small_npz: Path, mounted: Path) -> None:
    runs = mounted / "shared disk" / "runs"
    words = f"train --model resnet8 --dataset npz:{small_npz} --set data.pad=1 --epochs 1 --batch-size 64 --seeds 0".split()
    said = command(mounted, *words, "--runs", str(runs))
    assert said.err == (
        f"flowdistill: --runs {runs} lies on nfs4, which several machines share; SQLite can't keep a ledger there that more than one "
        f"process writes. Name a folder on a local disk, or train shards, each with a ledger of its own (--shard 1/1 for a single one), "
        f"and put them together with: flowdistill ledger merge '{runs / 'shards'}'/* --into '{runs}'\n"
    )
    assert (said.code, said.out, runs.exists()) == (2, "", False)
    assert command(mounted, *words, "--runs", str(runs), "--shard", "1/1").code == 0
    assert command(mounted, "ledger", "merge", str(runs / "shards/1-of-1"), "--into", str(runs)).code == 0
    assert [journal_of(folder) for folder in (runs, runs / "shards/1-of-1")] == ["delete", "delete"]
    assert command(mounted, *words, "--runs", str(mounted / "local")).code == 0
    assert journal_of(mounted / "local") == "wal"


# Real processes


@pytest.mark.long
def test_a_job_that_is_told_to_end_ends_within_ten_seconds_and_its_requeued_task_goes_on(small_npz: Path, tmp_path: Path) -> None:
    """By the script for a job array; ``scontrol`` is a stand-in that notes what it is asked."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "flowdistill").write_text(f'#!/bin/sh\nexec {sys.executable} -m flowdistill "$@"\n')
    for name in ("scontrol", "flowdistill"):
        (tmp_path / name).chmod(0o755)
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_JOB_ID": "4711"}
    environment = os.environ | array | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = f"train --model resnet20 --dataset npz:{small_npz} --set data.pad=1 --epochs 40 --batch-size 64 --seeds 0-1".split()
    start = ["bash", str(SCRIPT), *words]
    job = subprocess.Popen(start, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "runs/shards/2-of-2/1/journal.jsonl"
    until = time.monotonic() + 120
    while not (journal.exists() and b'"epoch": {"epoch": 2' in journal.read_bytes()):
        assert time.monotonic() < until
        assert job.poll() is None
        time.sleep(0.05)
    told = time.monotonic()
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert time.monotonic() - told < 10
    assert job.returncode == 130
    assert "go on with" in err
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    requeued = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "resumed after epoch" in requeued.stderr
    assert (tmp_path / "asked").read_text() == "requeue 4711\n", "a task that is done is not put back"
    own = Ledger(tmp_path / "runs/shards/2-of-2")
    straight = Ledger(tmp_path / "straight", create=True)
    (wanted,) = run([RunConfig.model_validate(own.run(1).config)], straight, CPU)
    assert outcome(own.run(1), own) == outcome(wanted, straight)


def test_a_plan_file_that_is_no_plan_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"number": 1, "count": "x", "runs": []}))
    with pytest.raises(UserError, match=r"plan\.json is not what a shard wrote; put a copy of it back, or remove it"):
        shard_plan.read(tmp_path)
