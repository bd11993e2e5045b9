"""The bench times equal work, its figures follow from what it timed, and an engine that can't be had has no row."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import command

from flowdistill.bench import bench, measure, report
from flowdistill.bench.measure import Contender, Work
from flowdistill.bench.plain import PlainLoop
from flowdistill.bench.roofline import Traffic
from flowdistill.checks import UserError
from flowdistill.data.batches import DeviceData
from flowdistill.data.dataset import ImageData
from flowdistill.data.sources import read_npz
from flowdistill.report.tables import render
from flowdistill.training.engine import EagerEngine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(small_npz: Path) -> ImageData:
    data = read_npz(small_npz)
    x_train, x_test = (np.repeat(x, 3, axis=3) for x in (data.x_train, data.x_test))
    return ImageData("small", x_train, data.y_train, x_test, data.y_test, classes=10, pad=1, flip=False)


def a_work(images: ImageData, batch_size: int = 64) -> Work:
    return Work("resnet8", "resnet14", batch_size, images, DeviceData(images, "full", CPU))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda what, **_: what)


@pytest.mark.parametrize("method", ["base", "fsp", "at+kd"])
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.usefixtures("uncompiled")
def test_a_plain_loop_trains_what_the_engine_trains(images: ImageData, method: str, strong: bool) -> None:
    """One step of all images at once, where order and crops can make no difference."""
    whole = ImageData("whole", images.x_train, images.y_train, images.x_test, images.y_test, classes=10, pad=0, flip=False)
    work = a_work(whole, len(whole.x_train))
    member = work.member(method, 0)
    plain = PlainLoop(member, work.network(member.method.needs), whole, work.data, 0, strong=strong)
    plain.optimizer.param_groups[0]["lr"] = 0.01
    (seed_group,) = work.seed_groups([method], 1, "fp32")
    (student,) = seed_group.students
    before = student.net.fc.weight.detach().clone()
    assert torch.equal(before, member.net.fc.weight)
    next(EagerEngine("bf16" if strong else "fp32", "").epoch([seed_group], 0, {student: torch.tensor([0.01])}))
    assert len(list(plain.steps())) == 1
    moved, plainly = (net.fc.weight.detach() - before for net in (student.net, member.net))
    off = float((plainly - moved).norm() / moved.norm())
    assert off < (3e-2 if strong else 1e-4)


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A clock that every look moves on."""
    clock = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) * seconds)


def test_the_figures_follow_from_steps_and_seconds(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    work, steps = a_work(images), 4
    taken = {"plain": 0, "ours": 0}

    def loop(name: str) -> Iterator[None]:
        while True:
            taken[name] += 1
            yield

    plain, alone = Contender("plain loop", lambda: loop("plain"), kept=False), Contender("eager", lambda: loop("ours"))
    both = Contender("eager, 2 together", lambda: loop("ours"), students=2, separate=[alone, alone])
    ticking(monkeypatch, 0.5)
    measure._take_turns([plain, alone, both], work, steps, 3)
    assert taken == {"plain": 3 * (steps + measure.WARM), "ours": 2 * (3 * steps + measure.WARM)}
    assert plain.speeds == [steps * 64 / 0.5] * 3
    assert both.speeds == [2 * steps * 64 / 0.5] * 3
    assert plain.setup == 0.5
    alone.speeds = [100.0, 128.0, 1000.0]
    row = measure._row(alone, [plain, alone, both], 64)
    assert (row["images/s"], row["min-max"], row["step ms"]) == (128, "100-1000", 500.0)
    assert (row["s/epoch"], row["to plain"], row["to separate"]) == (round(50_000 / 128, 2), "0.25 x", "-")
    cohort = measure._row(both, [plain, alone, both], 64)
    assert (cohort["step ms"], cohort["s/epoch"]) == (125.0, round(2 * 50_000 / 1024, 2))
    plain.base = alone
    assert (measure._row(plain, [plain, alone, both], 64)["over base"], row["over base"]) == ("-375.0 ms", "-")
    assert cohort["to separate"] == "0.12 x"  # 2 students: 125 ms together, 2 x 500 ms apart


@pytest.mark.usefixtures("uncompiled")
def test_every_contender_takes_part_and_the_best_plain_loop_is_the_measure(images: ImageData) -> None:
    found = bench(
        ["resnet8:resnet14"],
        ["fsp", "kd"],
        CPU,
        engines=["eager"],
        precisions=["fp32"],
        cohorts=[2],
        batch_size=64,
        steps=1,
        rounds=3,
        workers=0,
        images=images,
    )
    (pair,) = found["pairs"]
    assert [row["loop"] for row in pair["rows"]] == [
        "plain loop, 0 workers: fsp",
        "strong plain loop, 0 workers: fsp",
        "eager, fp32: fsp",
        "eager, fp32: kd",
        "eager, fp32: 2 methods together",
        "eager, fp32: fsp, 2 seeds together",
    ]
    assert pair["rows"][0]["to plain"] == "1.00 x"
    assert all(row["images/s"] > 0 and row["s/epoch"] > 0 for row in pair["rows"])
    assert pair["rows"][2]["evaluation s"] != "-"
    text = report(found, lambda rows, columns: render(rows, "md", columns))
    assert "resnet8 <- resnet14" in text
    assert text.count("\n| ") == 2 + len(pair["rows"])
    assert "Roofline of a step of one fsp student, fp32" in text


@pytest.mark.usefixtures("uncompiled")
def test_an_engine_that_can_not_be_had_is_told_and_has_no_row(images: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"precisions": ["fp32"], "batch_size": 64, "steps": 1, "rounds": 2, "workers": 0, "images": images}
    found = bench(["resnet8:resnet14"], ["base"], CPU, engines=["eager", "graph"], **keys)
    assert [row["loop"] for row in found["pairs"][0]["rows"] if row["loop"].startswith(("eager", "graph"))] == ["eager, fp32: base"]
    assert "bench: no graph for base: no graph: CUDA graphs need a CUDA GPU, not cpu" in capsys.readouterr().err


def test_too_many_steps_for_the_images_are_refused(images: ImageData) -> None:
    with pytest.raises(UserError, match=r"--steps 3 of 64 images: an epoch here has 300; set --steps lower"):
        bench(["resnet8:resnet14"], ["base"], CPU, batch_size=64, steps=3, images=images)


def test_traffic_counts_what_a_product_reads_and_writes() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 4, dtype=torch.float32)
    with Traffic() as traffic:
        torch.relu(a @ b)
    assert traffic.bytes == 4 * (2 * 3 + 3 * 4 + 2 * 4)


@pytest.mark.usefixtures("uncompiled")
def test_the_command_prints_json(tmp_path: Path, images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "random_images", lambda: images)
    words = (
        "--pairs resnet8:resnet14 --engines eager --precisions fp32 --batch-size 64 --steps 1 --rounds 1 --workers 0 --device cpu --json"
    )
    said = command(tmp_path, "bench", *words.split())
    found = json.loads(said.out)
    assert (said.code, found["methods"], found["steps"]) == (0, ["fsp"], 1)
    speeds = [row["images/s"] for row in found["pairs"][0]["rows"]]
    assert len(speeds) == 3
    assert statistics.median(speeds) > 0


def test_memory_that_an_earlier_contender_freed_is_given_back_before_the_next_is_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the allocator keeps it, and the driver counts it as held."""
    cached, total = [3 << 30], 80 << 30
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cached.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - cached[0], total))
    weighed = measure._Memory(torch.device("cuda"))
    cached[0] = 1 << 30
    assert weighed.grown() == 1 << 30
