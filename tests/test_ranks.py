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

import pytest
import torch
from helpers.command import Said, command
from helpers.method_cases import ALL, label, make, widest
from helpers.scenes import rows, scene
from helpers.small import Interrupt, config
from torch import distributed

from flowdistill import models, ranks
from flowdistill.checks import UserError
from flowdistill.data.batches import DeviceData, SeedBatches, StreamedData, to_device
from flowdistill.data.dataset import ImageData, Unlabelled
from flowdistill.device import computing
from flowdistill.ledger import Ledger
from flowdistill.methods import METHODS
from flowdistill.models import Network
from flowdistill.ranks import Ranks
from flowdistill.runner import resume, run
from flowdistill.training import checkpoint, evaluate
from flowdistill.training.engine_choice import choose
from flowdistill.types import Batch, DataSpec

CPU = torch.device("cpu")
SEVERAL = Path(__file__).parent / "helpers" / "several.py"
PLAIN = ("kd", "fsp", "sp")  # the second needs no other images, the third does
OTHERS = sorted({*METHODS} - {*PLAIN, "base"})
ROUNDING = 1e-4  # of losses and of a first step's gradients: 6e-5 where a gradient is a single number, 3e-6 elsewhere
TURNED = 1e-2  # of the gradients of a second step, in which a rounding may turn a ReLU: 2e-3
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


# Who measures what


def test_every_image_is_measured_once(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device = to_device(data, "full", CPU)
    net = models.build("resnet8", on_device.spec, seed=0)
    monkeypatch.setattr("flowdistill.data.batches.at_once", lambda *_: 40)  # 150 images: 4 batches, of which the last is smaller
    alone = evaluate.evaluate(net, on_device.test, "fp32")
    for world in (2, 3, 5):
        sent = [answers_of(Ranks(rank, world), net, on_device) for rank in range(world)]
        assert sum(len(labels) for part in sent for labels in part[::3]) == 150  # labels, probabilities and classes of each batch
        with monkeypatch.context() as patch:
            patch.setattr(Ranks, "tensors_from", lambda self, source, _, sent=sent: sent[source])
            (found,) = evaluate.evaluate_all([net], on_device.test, "fp32", ranks=Ranks(0, world))
        assert torch.equal(found.classes, alone.classes)
        assert torch.equal(found.probabilities, alone.probabilities)
        assert int(found.correct) == int(alone.correct)


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
    """Two ranks of 64 images compute what one process of 128 computes."""
    found = several(data, folder, "equal", ",".join(names))
    assert {name.split()[0] for name in found} == {*names}
    for name, modes in found.items():
        for part, off in modes["eval"].items():
            assert off <= (TURNED if part.startswith("step 1") else ROUNDING), (name, part, off)
        for part, off in modes["train"].items():
            assert off <= (LOCAL_LOSS if part.startswith("loss") else LOCAL_GRADIENT), (name, part, off)
        assert max(modes["train"].values()) > ROUNDING, f"{name}: batch normalisations are local"


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
    assert "runs 5, 6: 2 ranks, each with 32 of a batch's 64 images, by which alone it normalises where it normalises batches\n" in err
    assert err.endswith("runs 5, 6: stopped; go on with: flowdistill resume 5\ninterrupted\n")
    assert [(tmp_path / f"{name}.1.txt").read_text() for name in ("out", "err")] == ["", ""]
    ledger = Ledger(tmp_path / "runs")
    assert [run_.status for run_ in ledger.runs()] == ["finished"] * 4 + ["interrupted"] * 2
    assert ledger.run(5).device == "cpu (2 ranks of 1 threads)"
    assert (ledger.run(5).versions["ranks"], ledger.run(5).versions["batch_normalisation"]) == ("2", "local to each rank")
    assert checkpoint.load(ledger.run_folder(5)).done == 1

    with computing(CPU, cores=1), pytest.raises(KeyboardInterrupt):
        resume(ledger, CPU, no=5, watcher=Interrupt())
    assert checkpoint.load(ledger.run_folder(5)).done == 2
    assert several(small_npz, tmp_path, "command", "resume", "5", "--device", "cpu") == [0, 0]
    err = (tmp_path / "err.0.txt").read_text()
    assert "runs 5, 6: resumed after epoch 2 of 3\n" in err
    assert "device cpu (1 threads) -> cpu (2 ranks of 1 threads)" in err
    assert [run_.status for run_ in ledger.runs()] == ["finished"] * 6
    for alone, shared in ((3, 5), (4, 6)):
        for expected, found in zip(ledger.epochs(alone), ledger.epochs(shared), strict=True):
            close = 1e-4 if expected.epoch == 1 else 2e-2  # roundings grow: 3e-3 in the third epoch
            assert found.terms == pytest.approx(expected.terms, rel=close)
            assert found.correct == pytest.approx(expected.correct, abs=2)
    assert command(tmp_path, "check").code == 0


def normalisations(model: str) -> list[str]:
    """The names of a network's batch normalisations."""
    net = models.build(model, DataSpec("small", 300, 10, 1, 8, 8), seed=0)
    return [name.removeprefix("body.") for name, module in net.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
