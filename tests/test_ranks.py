"""Several processes train one run as one process would: what each computes, what is sent, who writes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import Said, command
from helpers.method_cases import ALL, label, make, widest
from helpers.scenes import rows, scene
from helpers.small import Interrupt, config
from helpers.threads import by_ranks
from PIL import Image
from safetensors.torch import load_file
from torch import distributed

from flowdistill import models, ranks
from flowdistill.checks import UserError
from flowdistill.data.batches import DeviceData, SeedBatches, StreamedData, to_device
from flowdistill.data.dataset import ImageData, Unlabelled
from flowdistill.device import computing
from flowdistill.ledger import Ledger, Run, baseline_key
from flowdistill.methods import METHODS
from flowdistill.models import Network
from flowdistill.ranks import Ranks
from flowdistill.report import tables
from flowdistill.runner import resume, run
from flowdistill.runner.due import before
from flowdistill.runner.job import Job
from flowdistill.runner.plan import plan, recorded
from flowdistill.training import checkpoint, evaluate, gathering
from flowdistill.training.engine_choice import choose
from flowdistill.types import Batch, DataSpec, Outputs

CPU = torch.device("cpu")
SEVERAL = Path(__file__).parent / "helpers" / "several.py"
PLAIN = ("kd", "fsp", "sp")  # the second needs no other images, the third does
OTHERS = sorted({*METHODS} - {*PLAIN, "base"})
ROUNDING = 1e-4  # of losses and of a first step's gradients: 6e-5 where a gradient is a single number, 3e-6 elsewhere
TURNED = {"eval": 1e-2, "synchronised": 3e-2}  # of a second step's, in which a rounding may turn a ReLU: 2e-3; and all see it: 9e-3
LOCAL_LOSS, LOCAL_GRADIENT = 0.05, 0.6  # by a rank's own 64 images of 8x8, from fresh weights: losses 3e-2, gradients 0.55


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This process is one of several, none of which is there."""

    def take(rank: int, world: int = 2) -> None:
        monkeypatch.setattr(ranks, "_current", Ranks(rank, world))

    return take


def environment(rank: int = 0, world: int = 2) -> dict[str, str]:
    """What torchrun tells a process."""
    return {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


# What a rank is


def test_a_process_is_alone_unless_torchrun_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ranks.launched() == ranks.ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert ranks.launched() == Ranks(1, 2)


def test_alone_every_operation_gives_back_what_it_was_given() -> None:
    value = torch.tensor([1.0, 2.0])
    ranks.ALONE.mean_([value])
    ranks.ALONE.least_([value])
    assert value.tolist() == [1.0, 2.0]
    assert ranks.ALONE.gathered(value).tolist() == [1.0, 2.0]
    assert (ranks.ALONE.all("a"), ranks.ALONE.told("a")) == (["a"], "a")
    assert ranks.ALONE.own(64, 32) == slice(64, 96)
    with ranks.apart():
        assert not ranks.current().several


def test_the_parts_of_the_ranks_are_the_whole() -> None:
    positions = list(range(200))
    assert [n for rank in range(4) for n in positions[Ranks(rank, 4).own(24, 8)]] == positions[24:32]


def test_python_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    for work in (lambda ledger: run([config(tmp_path / "no.npz")], ledger, CPU), lambda ledger: resume(ledger, CPU)):
        with pytest.raises(UserError, match=r"^torchrun started 2 processes, and from Python each would train the whole run; start this"):
            work(Ledger(tmp_path / "runs", create=True))
    assert not (tmp_path / "runs").exists()


# What a rank is shown


def joined_parts(as_rank: Callable[..., None], batches: Callable[[], SeedBatches]) -> list[tuple[torch.Tensor, list[Batch]]]:
    """The images of each step, put together from the parts of two ranks, and what each knows of them."""
    parts = []
    for rank in range(2):
        as_rank(rank)
        parts.append(list(batches().epoch(1)))
    return [(torch.cat([images for images, _ in step]), [batch for _, batch in step]) for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("mixup", [False, 0.3, True])
def test_two_ranks_are_shown_the_images_of_one(data: ImageData, as_rank: Callable[..., None], mixup: float) -> None:
    on_device = to_device(data, "full", CPU)
    whole = list(SeedBatches(on_device, 0, 64, mixup=mixup).epoch(1))
    found = joined_parts(as_rank, lambda: SeedBatches(on_device, 0, 64, mixup=mixup))
    for (images, batch), (put_together, parts) in zip(whole, found, strict=True):
        assert [len(part.indices) for part in parts] == [32, 32]
        assert torch.equal(put_together, images)
        assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)
        if batch.labels is not None:
            assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        if batch.targets is not None:
            assert torch.equal(torch.cat([part.targets.partners for part in parts]), batch.targets.partners)
            assert [float(part.targets.share) for part in parts] == [float(batch.targets.share)] * 2


def test_ranks_count_the_labels_of_the_whole_batch(data: ImageData, as_rank: Callable[..., None]) -> None:
    more = replace(data, unlabelled=Unlabelled("more", data.x_train[:200]))
    on_device = to_device(more, "full", CPU)
    whole = [batch for _, batch in SeedBatches(on_device, 0, 64).epoch(1)]
    found = joined_parts(as_rank, lambda: SeedBatches(on_device, 0, 64))
    assert len({int(batch.targets.counted) for batch in whole}) > 1
    for batch, (_, parts) in zip(whole, found, strict=True):
        assert torch.equal(torch.cat([part.targets.labels for part in parts]), batch.targets.labels)
        assert sum(float(part.targets.counted) for part in parts) == float(batch.targets.counted)


def test_a_rank_decodes_its_own_images_alone(data: ImageData, as_rank: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedData(data, "full", CPU, 0)
    whole = [images for images, _ in SeedBatches(streamed, 0, 64).epoch(1)]
    decoded: list[int] = []
    fetch = streamed.fetch

    def counting(seed: int) -> Any:
        decoding = fetch(seed)
        batches = decoding.workers.batches
        monkeypatch.setattr(decoding.workers, "batches", lambda orders: [decoded.extend(len(o) for o in orders), batches(orders)][1])
        return decoding

    monkeypatch.setattr(streamed, "fetch", counting)
    found = joined_parts(as_rank, lambda: SeedBatches(streamed, 0, 64))
    assert decoded == [32] * 4 * 2
    assert all(torch.equal(images, put_together) for images, (put_together, _) in zip(whole, found, strict=True))


# What a method needs


@pytest.mark.parametrize(("name", "options"), [pytest.param(*case, id=label(*case)) for case in ALL])
def test_a_method_that_is_not_gathered_is_the_mean_of_its_halves(name: str, options: dict[str, Any]) -> None:
    pair = widest(name, options)
    method, given = make(name, options, pair).double().eval(), scene(pair, 4)
    halves = [method(*rows(given, half)) for half in ([0, 1], [2, 3])]
    whole = method(*given)
    same = all(
        value.item() == pytest.approx(sum(half[term].item() for half in halves) / 2, rel=1e-10, abs=1e-12) for term, value in whole.items()
    )
    assert same or method.whole_batch
    assert not (same and method.whole_batch) or options, "nothing is gathered that need not be"


def test_the_page_names_what_is_gathered() -> None:
    page = (Path(__file__).parents[1] / "docs" / "SCALE.md").read_text()
    named = re.search("Gathered are: ([^.]*)", page)[1]
    gathered = {name for name, options in ALL if name in METHODS and make(name, options, widest(name, options)).whole_batch}
    assert re.findall("`([^`]*)`", named) == sorted(gathered)


# What a fingerprint holds


@pytest.fixture
def planned_by(ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """The job of ``helpers.small.config`` as a number of processes plan it."""

    def make(world: int, **keys: Any) -> Job:
        with monkeypatch.context() as patch:
            for key, value in environment(0, world).items():
                patch.setenv(key, value)
            (job, *_) = plan([config(small_npz, **keys)], ledger, CPU, stand_in=True)
            return job

    return make


TOGETHER = {"batch_norm": "synchronised"}
BARE = """
import torch
class Bare(torch.nn.Module):
    def __init__(self, num_classes=10, in_chans=1):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_chans, 8, 3, 2, 1)
        self.conv2 = torch.nn.Conv2d(8, 8, 3, 2, 1)
        self.fc = torch.nn.Linear(8, num_classes)
    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))
"""


def test_the_number_of_processes_is_covered_where_each_normalises_by_itself(planned_by: Callable[..., Job]) -> None:
    jobs = [planned_by(world, method="base") for world in (1, 2, 4)]
    assert len({job.fingerprint for job in jobs}) == 3
    assert [job.variant for job in jobs] == ["", "ranks=2", "ranks=4"]
    together = [planned_by(world, method="base", train=TOGETHER) for world in (1, 2, 4)]
    assert {job.fingerprint for job in together} == {jobs[0].fingerprint}
    assert {job.variant for job in together} == {""}
    frozen = [planned_by(world, method="base", train={"freeze": normalisations("resnet8")}) for world in (1, 2)]
    assert frozen[0].fingerprint == frozen[1].fingerprint != jobs[0].fingerprint


def test_a_method_s_own_parts_count_unless_they_are_given_the_whole_batch(
    planned_by: Callable[..., Job], tmp_path: Path, own_code: None
) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    for method, covered in {"kd": False, "srrl": True, "at": False, "sp+srrl": False, "dml": False}.items():
        pair = {"student": f"{tmp_path}/bare.py:Bare", "teacher": None if method == "dml" else "resnet8", "method": method}
        one, two = (planned_by(world, **pair) for world in (1, 2))
        assert (one.fingerprint != two.fingerprint) == covered, method
    peers = [planned_by(world, student=f"{tmp_path}/bare.py:Bare", peer="resnet8", method="dml") for world in (1, 2)]
    assert peers[0].fingerprint != peers[1].fingerprint, "its peer normalises"


def test_a_run_goes_on_by_another_number_of_processes(
    ledger: Ledger, small_npz: Path, planned_by: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job keeps the number of processes with which the run began, whoever goes on with it; a new plan does not."""
    with computing(CPU, cores=1), pytest.raises(KeyboardInterrupt):
        run([config(small_npz, method="base")], ledger, CPU, watcher=Interrupt())
    for began in (1, 2, 4):
        ledger.update(1, fingerprint=planned_by(began, method="base").fingerprint)
        for world in (1, 2, 4):
            with monkeypatch.context() as patch:
                for key, value in environment(0, world).items():
                    patch.setenv(key, value)
                (job,) = recorded([ledger.run(1)], ledger, CPU)
            assert (job.ranks, job.fingerprint) == (began, ledger.run(1).fingerprint)
            assert (before(planned_by(world, method="base"), ledger) is not None) == (world == began)


def test_teachers_of_several_processes_are_teachers(ledger: Ledger, small_npz: Path) -> None:
    """They are chosen by name as others are; where both are there, one is to be named."""
    with computing(CPU, cores=1):
        run([config(small_npz, method="base", seed=seed, train={"epochs": 1}) for seed in (1, 2)], ledger, CPU)
    facts = {"ranks": "2", "batch_normalisation": "local to each rank"}
    ledger.update(2, fingerprint="of two", variant="ranks=2", versions=ledger.run(2).versions | facts)
    wanted = config(small_npz, method="kd", teacher="resnet8", train={"epochs": 1})
    with pytest.raises(UserError, match=r"by several recipes for 1 epochs \(runs 1, 2\); name one"):
        plan([wanted], ledger, CPU)
    ledger.update(1, status="failed")
    (job,) = plan([wanted], ledger, CPU)
    assert job.teacher.run == 2


# What the ranks send each other


def test_a_mean_over_the_ranks_is_one() -> None:
    sent = [[torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([5.0, 4.0]), torch.tensor(7.0)]]
    by_ranks(lambda rank: rank.mean_(sent[rank.rank]), 2)
    assert [[value.tolist() for value in values] for values in sent] == [[[3.0, 3.0], 5.0]] * 2


@pytest.mark.parametrize("world", [2, 3])
def test_the_gradient_of_what_is_gathered_is_that_of_the_whole_batch(world: int) -> None:
    """Of a loss that compares images with each other, by weights that every rank has."""
    numbers = torch.Generator().manual_seed(0)
    images, weights = torch.randn(6, 4, generator=numbers), torch.randn(4, 3, generator=numbers).requires_grad_()

    def gradient(answers: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((answers @ answers.T).tanh().sum(), weights)[0]

    def of_rank(rank: Ranks) -> torch.Tensor:
        own = images[rank.own(0, 6)] @ weights
        return gradient(gathering.whole_outputs(Outputs(own, own, {}), rank).logits)

    found = by_ranks(of_rank, world)
    torch.testing.assert_close(torch.stack(found).mean(0), gradient(images @ weights))


# Who measures what


def test_every_image_is_measured_once(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device = to_device(data, "full", CPU)
    net = models.build("resnet8", on_device.spec, seed=0)
    monkeypatch.setattr("flowdistill.data.batches.at_once", lambda *_: 40)  # 150 images: 4 batches, of which the last is smaller
    alone = evaluate.evaluate(net, on_device.test, "fp32")
    for world in (2, 3, 5):
        sent = [answers_of(Ranks(rank, world), net, on_device) for rank in range(world)]
        assert sum(len(labels) for part in sent for labels in part[::4]) == 150  # labels, and three tensors of answers, of each batch
        with monkeypatch.context() as patch:
            patch.setattr(Ranks, "tensors_from", lambda self, source, _, sent=sent: sent[source])
            (found,) = evaluate.evaluate_all([net], on_device.test, "fp32", ranks=Ranks(0, world))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone, strict=True))


class SentError(Exception):
    """What a rank was about to send."""


def answers_of(rank: Ranks, net: Network, data: DeviceData) -> Any:
    """What a rank tells the others of the images that it measured."""

    def send(_: Ranks, source: int, tensors: Any) -> None:
        raise SentError(tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "tensors_from", send)
        with pytest.raises(SentError) as sent:
            evaluate.evaluate_all([net], data.test, "fp32", ranks=rank)
    return sent.value.args[0]


# Started again


def met(store: distributed.Store, world: int) -> set[str]:
    """The names that ranks agree on, which look for each other at the same time."""
    with ThreadPoolExecutor(world) as threads:
        return set(threads.map(lambda rank: ranks._agreed_name(store, Ranks(rank, world)), reversed(range(world))))


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_that_are_started_again_do_not_meet_those_that_ended(world: int) -> None:
    """torchrun keeps its store. In it are what the first ones left, and the call of one that ended before anybody answered."""
    store = distributed.HashStore()
    (first,) = met(store, world)
    (second,) = met(store, world)
    assert first != second
    store.set("asks/1", "of one that ended")
    (third,) = met(store, world)
    assert third not in (first, second)


def test_a_rank_that_nobody_joins_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=0.1))
    for rank in range(2):
        with pytest.raises(ConnectionError, match=r"^another process of this run did not begin within 0:00:00.1"):
            ranks._agreed_name(distributed.HashStore(), Ranks(rank, 2))


def test_a_rank_that_is_told_to_end_while_it_waits_for_rank_0_to_speak_speaks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 was killed, and torchrun ends the others."""

    class Told:
        def check(self, _: list[str]) -> bool:
            raise KeyboardInterrupt

        def add(self, _: str, amount: int) -> int:
            return amount

    for key, value in environment(1).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(ranks, "_store", Told())
    assert ranks.tells()


# What is refused


def refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str, rank: int = 0) -> Said:
    for key, value in environment(rank).items():
        monkeypatch.setenv(key, value)
    return command(tmp_path, *words)


def test_torchrun_is_for_trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = "flowdistill: torchrun starts a training (distill, resume or train); give flowdistill table without it\n"
    assert refusal(monkeypatch, tmp_path, "table") == Said(2, "", line)
    assert refusal(monkeypatch, tmp_path, "table", rank=1) == Said(2, "", "")


def test_a_batch_that_can_not_be_shared_out_is_refused(as_rank: Callable[..., None], ledger: Ledger, small_npz: Path) -> None:
    as_rank(0, 3)
    expected = (
        "train.batch_size=64 can't be shared out equally by 3 processes; set --batch-size to a multiple of 3, such as 63, or start another "
        "number of them (torchrun --nproc-per-node)"
    )
    with pytest.raises(UserError) as refused:
        run([config(small_npz, method="base")], ledger, CPU)
    assert str(refused.value) == expected
    assert ledger.runs() == []


def test_a_graph_holds_one_process(as_rank: Callable[..., None]) -> None:
    as_rank(0)
    for name in ("graph", "graph+compiled"):
        with pytest.raises(UserError) as refused:
            choose(name, CPU, "fp32", pixels=1.0)
        assert str(refused.value) == f"--engine {name}: a CUDA graph holds the steps of one process, not of 2; use compiled or eager"
    assert choose("auto", torch.device("cuda"), "fp32", pixels=1.0).name == "eager"


def test_each_rank_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.device_name("cuda:1") == "cuda:1"
    for key, value in (environment(1) | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [ranks.device_name(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UserError) as refused:
        ranks.device_name("cuda:0")
    assert str(refused.value) == "--device cuda:0: 2 processes can't share it; give --device cuda, where each takes a GPU, or cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError) as refused:
        ranks.device_name("auto")
    assert str(refused.value) == (
        "--device auto: torchrun started 2 processes on a machine with 1 GPUs; start no more (torchrun --nproc-per-node 1), or give "
        "--device cpu"
    )


# Two processes


def several(data: Path, folder: Path, how: str, *words: str) -> Any:
    """What ``helpers/several.py`` prints."""
    done = subprocess.run(
        [sys.executable, str(SEVERAL), str(data), str(folder), how, *words],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_as_one(data: Path, folder: Path, names: Sequence[str]) -> None:
    """Two ranks of 64 images compute what one process of 128 computes, unless each normalises by its own."""
    found = several(data, folder, "equal", ",".join(names))
    assert {name.split()[0] for name in found} == {*names}
    for name, modes in found.items():
        for mode in ("eval", "synchronised"):
            for part, off in modes[mode].items():
                assert off <= (TURNED[mode] if part.startswith("step 1") else ROUNDING), (name, mode, part, off)
        for part, off in modes["train"].items():
            assert off <= (LOCAL_LOSS if part.startswith("loss") else LOCAL_GRADIENT), (name, part, off)
        assert max(modes["train"].values()) > ROUNDING, f"{name}: each rank normalises by its own images"


def test_two_ranks_compute_what_one_process_does(small_npz: Path, tmp_path: Path) -> None:
    assert_as_one(small_npz, tmp_path, PLAIN)


@pytest.mark.long
def test_two_ranks_compute_what_one_process_does_by_every_method(small_npz: Path, tmp_path: Path) -> None:
    assert_as_one(small_npz, tmp_path, OTHERS)


SMALL = ("--batch-size", "64", "--set", "data.pad=1", "--lr", "0.05", "--precision", "fp32", "--device", "cpu", "--engine", "eager")


def test_what_ranks_began_one_process_goes_on_with_and_back(small_npz: Path, tmp_path: Path) -> None:
    """With frozen batch normalisations the run is that of one process up to rounding, whoever trained which epoch; one rank writes."""
    small = (*SMALL, "--dataset", f"npz:{small_npz}")
    for model, seed in (("resnet14", "9"), ("resnet8", "8")):
        assert command(tmp_path, "train", "--model", model, "--seeds", seed, "--epochs", "1", *small).code == 0
    pair = ("--method", "kd,sp", "--student", "resnet8", "--teacher", "1", "--seeds", "0", "--epochs", "3", *small)
    pair = ("distill", *pair, "--init-from", "2", "--freeze", ",".join(normalisations("resnet8")))
    said = command(tmp_path, *pair)
    assert said.code == 0, said.err

    assert several(small_npz, tmp_path, "cut", *pair, "--again")[0] == 130
    err = (tmp_path / "err.0.txt").read_text()
    assert "runs 5, 6: 2 ranks, each with 32 of a batch's 64 images\n" in err
    assert err.endswith("runs 5, 6: stopped; go on with: flowdistill resume 5\ninterrupted\n")
    assert [(tmp_path / f"{name}.1.txt").read_text() for name in ("out", "err")] == ["", ""]
    ledger = Ledger(tmp_path / "runs")
    assert [run_.status for run_ in ledger.runs()] == ["finished"] * 4 + ["interrupted"] * 2
    assert ledger.run(5).device == "cpu (2 ranks of 1 threads)"
    assert (ledger.run(5).versions["ranks"], ledger.run(5).versions["batch_normalisation"]) == ("2", "none")
    assert checkpoint.load(ledger.run_folder(5)).done == 1

    with computing(CPU, cores=1), pytest.raises(KeyboardInterrupt):
        resume(ledger, CPU, no=5, watcher=Interrupt())
    assert checkpoint.load(ledger.run_folder(5)).done == 2
    assert several(small_npz, tmp_path, "command", "resume", "5", "--device", "cpu") == [0, 0]
    err = (tmp_path / "err.0.txt").read_text()
    assert "runs 5, 6: resumed after epoch 2 of 3\n" in err
    assert "device cpu (1 threads) -> cpu (2 ranks of 1 threads)" in err
    assert "batch normalisation" not in err, "all of them are frozen"
    assert [run_.status for run_ in ledger.runs()] == ["finished"] * 6
    for alone, shared in ((3, 5), (4, 6)):
        for expected, found in zip(ledger.epochs(alone), ledger.epochs(shared), strict=True):
            close = 1e-4 if expected.epoch == 1 else 2e-2  # roundings grow: 3e-3 in the third epoch
            assert found.terms == pytest.approx(expected.terms, rel=close)
            assert found.correct == pytest.approx(expected.correct, abs=2)
    assert command(tmp_path, "check").code == 0


def test_runs_of_local_normalisation_are_one_group_for_each_number_of_processes(small_npz: Path, tmp_path: Path) -> None:
    """What two processes finished one process trains again, and what one began goes on by two under the name that it had."""
    small = ("train", "--model", "resnet8", "--epochs", "2", "--dataset", f"npz:{small_npz}", *SMALL)
    assert several(small_npz, tmp_path, "command", *small, "--seeds", "0") == [0, 0]
    err = (tmp_path / "err.0.txt").read_text()
    assert "run 1: 2 ranks, each with 32 of a batch's 64 images, by which alone it normalises where it normalises batches\n" in err
    assert command(tmp_path, *small, "--seeds", "0").code == 0
    ledger = Ledger(tmp_path / "runs")
    by_two, by_one = ledger.run(1), ledger.run(2)
    assert by_two.fingerprint != by_one.fingerprint
    assert (by_two.variant, by_one.variant) == ("ranks=2", "")
    assert (by_two.versions["ranks"], by_two.versions["batch_normalisation"]) == ("2", "local to each rank")
    assert baseline_key(by_two) != baseline_key(by_one)
    assert [[run_.no for run_ in group_.runs] for group_ in tables.group(ledger.runs(), "last")] == [[1], [2]]
    assert [row["variant"] for row in tables.summary_rows(ledger.runs(), "last")] == ["ranks=2", ""]

    with computing(CPU, cores=1), pytest.raises(KeyboardInterrupt):
        run([config(small_npz, method="base", seed=1)], ledger, CPU, watcher=Interrupt())
    began = ledger.run(3).fingerprint
    assert several(small_npz, tmp_path, "command", "resume", "3", "--device", "cpu") == [0, 0]
    line = (
        "begun by 1 process, goes on by 2 processes: batch normalisation sees other parts of a batch now, so it does not go on as it would "
    )
    assert f"run 3: {line}have\n" in (tmp_path / "err.0.txt").read_text()
    assert (ledger.run(3).status, ledger.run(3).fingerprint, ledger.run(3).variant) == ("finished", began, "")
    assert "ranks" not in ledger.run(3).versions

    synchronised = (*small, "--seeds", "2", "--set", "train.batch_norm=synchronised")
    assert several(small_npz, tmp_path, "command", *synchronised) == [0, 0]
    told = "run 4: 2 ranks, each with 32 of a batch's 64 images; where batches are normalised, it is by all ranks together\n"
    assert told in (tmp_path / "err.0.txt").read_text()
    assert (ledger.run(4).versions["batch_normalisation"], ledger.run(4).variant) == ("synchronised", "")
    assert "run 4 has it already, skipped" in command(tmp_path, *small, "--seeds", "2").err


CURVE = {"synchronised": 5e-3, "local": 2e-2}  # how far a loss of an epoch is from one process's, relative to that: 6e-4 and 2e-3
POINTS = {"synchronised": 1.5, "local": 5.0}  # how far the final accuracies are apart, in percent: 0.2 and 1.7


@pytest.mark.long
def test_a_curve_of_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    """On the digits, by fsp and kd. It prints the table of docs/SCALE.md."""
    common = ("--dataset", "digits", "--precision", "fp32", "--device", "cpu", "--engine", "eager")
    small = ("--student", "resnet8", "--teacher", "1", "--method", "kd,fsp", "--epochs", "4", "--seeds", "0", "--lr", "0.01", *common)
    assert command(tmp_path, "train", "--model", "resnet20", "--epochs", "4", "--seeds", "9", *common).code == 0
    assert command(tmp_path, "distill", *small).code == 0
    for how in ("synchronised", "local"):
        assert several(tmp_path, tmp_path, "command", "distill", *small, "--again", "--set", f"train.batch_norm={how}") == [0, 0]
    ledger, lines = (
        Ledger(tmp_path / "runs"),
        ["| method | batch normalisation | loss of each epoch, off by | accuracy |", "|---|---|---|---|"],
    )
    for alone, shared in {2: (4, 6), 3: (5, 7)}.items():
        expected = ledger.run(alone)
        lines.append(f"| {expected.method} | one process | | {expected.accuracy:.2f} |")
        for how, number in zip(("synchronised", "local"), shared, strict=True):
            found = ledger.run(number)
            off = [
                max(abs(after.terms[term] - value) / abs(value) for term, value in before_.terms.items())
                for before_, after in zip(ledger.epochs(alone), ledger.epochs(number), strict=True)
            ]
            lines.append(f"| {found.method} | {how} | {', '.join(f'{value:.1e}' for value in off)} | {found.accuracy:.2f} |")
            assert max(off) <= CURVE[how]
            assert abs(found.accuracy - expected.accuracy) <= POINTS[how]
            assert (found.fingerprint == expected.fingerprint) == (how == "synchronised")
    print("\n".join(lines))


@pytest.mark.long
@pytest.mark.parametrize("how", ["streamed", "mixed", "unlabelled"])
def test_two_processes_are_shown_as_many_images(tmp_path: Path, small_npz: Path, how: str) -> None:
    """Of every source of batches; the students' weights are finite."""
    source, extra = f"npz:{small_npz}", []
    if how == "streamed":
        source, extra = f"folder:{pictures(tmp_path, small_npz)}", ["--set", "data.stream=true", "--workers", "1"]
    elif how == "mixed":
        extra = ["--set", "train.mixup=0.2"]
    else:
        np.savez(tmp_path / "more.npz", x=np.load(small_npz)["x_train"][:100])
        extra = ["--unlabelled", f"npz:{tmp_path}/more.npz"]
    small = ("--dataset", source, "--batch-size", "64", "--epochs", "1", "--precision", "fp32", "--device", "cpu", "--engine", "eager")
    words = ("distill", "--method", "kd", "--student", "resnet8", "--teacher", "1", "--seeds", "0", *small, *extra)
    streamed = extra if how == "streamed" else []
    assert command(tmp_path, "train", "--model", "resnet8", "--seeds", "9", *small, *streamed).code == 0
    assert command(tmp_path, *words).code == 0
    for normalised in ("local", "synchronised"):
        codes = several(small_npz, tmp_path, "command", *words, "--again", "--set", f"train.batch_norm={normalised}")
        assert codes == [0, 0], (tmp_path / "err.0.txt").read_text()
    ledger = Ledger(tmp_path / "runs")
    alone, *shared = (ledger.run(number) for number in (2, 3, 4))
    for found in shared:
        weights = load_file(ledger.run_folder(found.no) / "student.safetensors")
        assert all(value.isfinite().all() for value in weights.values())
        assert shown(found) == pytest.approx(shown(alone))
    (expected,), (synchronised,) = ledger.epochs(2), ledger.epochs(4)
    assert synchronised.terms == pytest.approx(expected.terms, rel=1e-3)


@pytest.mark.long
def test_two_processes_train_by_layer_stop_early_and_log_once(tmp_path: Path, small_npz: Path) -> None:
    """Rates that fall by the layer, AdamW, a student that is no better than at first, and a tracker's file of rank 0 alone."""
    common = ("--dataset", f"npz:{small_npz}", *SMALL, "--set", "train.batch_norm=synchronised")
    common = (*common, "--set", "split=holdout", "--set", "data.limit_train=128")
    assert command(tmp_path, "train", "--model", "resnet14", "--seeds", "9", "--epochs", "1", *common).code == 0
    words = (
        "distill",
        "--method",
        "kd,at",
        "--student",
        "resnet8",
        "--teacher",
        "1",
        "--seeds",
        "0",
        "--epochs",
        "5",
        *common,
        "--lr",
        "1e-7",
    )
    words = (*words, "--set", "train.optimizer=adamw", "--set", "train.layer_decay=0.5", "--set", "train.patience=2", "--log", "csv")
    assert command(tmp_path, *words).code == 0
    codes = several(small_npz, tmp_path, "command", *words, "--again")
    assert codes == [0, 0], (tmp_path / "err.0.txt").read_text()
    ledger = Ledger(tmp_path / "runs")
    for alone, shared in ((2, 4), (3, 5)):
        expected, found = ledger.run(alone), ledger.run(shared)
        assert found.error == expected.error
        assert found.error.startswith("stopped early at epoch 3 of 5")
        assert found.fingerprint == expected.fingerprint
        assert (found.epoch, found.correct) == (expected.epoch, pytest.approx(expected.correct, abs=2))
        for one, other in zip(ledger.epochs(alone), ledger.epochs(shared), strict=True):
            assert other.terms == pytest.approx(one.terms, rel=1e-3)
        lines = (ledger.run_folder(shared) / "metrics.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3"]


@pytest.mark.long
def test_two_processes_train_on_images_without_any_label(tmp_path: Path, small_npz: Path) -> None:
    np.savez(tmp_path / "images.npz", x=np.load(small_npz)["x_train"])
    assert (
        command(tmp_path, "train", "--model", "resnet14", "--seeds", "9", "--epochs", "1", "--dataset", f"npz:{small_npz}", *SMALL).code
        == 0
    )
    alone = ("--unlabelled", f"npz:{tmp_path}/images.npz", *SMALL, "--set", "train.batch_norm=synchronised")
    words = ("distill", "--method", "sp", "--student", "resnet8", "--teacher", "1", "--seeds", "0", "--epochs", "2", *alone)
    assert command(tmp_path, *words).code == 0
    codes = several(small_npz, tmp_path, "command", *words, "--again")
    assert codes == [0, 0], (tmp_path / "err.0.txt").read_text()
    ledger = Ledger(tmp_path / "runs")
    expected, found = ledger.run(2), ledger.run(3)
    assert found.backbone
    assert (found.accuracy, found.fingerprint) == (None, expected.fingerprint)
    for one, other in zip(ledger.epochs(2), ledger.epochs(3), strict=True):
        assert other.terms == pytest.approx(one.terms, rel=1e-2 if one.epoch > 1 else 1e-3)


def shown(run_: Run) -> float:
    """Images that a run was shown."""
    return run_.images_per_second * run_.train_seconds


def pictures(folder: Path, data: Path) -> Path:
    """The images of an npz file as files."""
    arrays = np.load(data)
    for split in ("train", "test"):
        for number, (image, name) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)):
            place = folder / "pictures" / split / str(name)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    return folder / "pictures"


def normalisations(model: str) -> list[str]:
    """The names of a network's batch normalisations."""
    net = models.build(model, DataSpec("small", 300, 10, 1, 8, 8), seed=0)
    return [name.removeprefix("body.") for name, module in net.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
