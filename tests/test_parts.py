"""A batch in parts is the whole batch: the same losses and gradients, less memory; what compares images with each other is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cohorts import Taped, a_cohort, train_with, weights_of
from helpers.command import command
from helpers.small import config
from torch import nn

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.runner import run
from flowdistill.training.engine import EagerEngine
from flowdistill.training.parts import cut
from flowdistill.training.task import task_loss
from flowdistill.types import NO_LABEL, Batch, Outputs, Targets

CPU = torch.device("cpu")


def trained(data: ImageData, small_npz: Path, parts: int, engine: type[EagerEngine] = EagerEngine, **train: Any) -> tuple[Any, ...]:
    """One epoch of students whose methods are means over images; the terms, the weights, and the sizes of what a student was shown."""
    keys = {"epochs": 1, "accumulate": parts, "momentum": 0.0, "lr": 0.01, **train}
    cohort, students = a_cohort(data, [config(small_npz, method=method, teacher="-", train=keys) for method in ("base", "fsp", "kd")])
    sizes: set[int] = set()
    students[0].net.register_forward_pre_hook(lambda net, images: sizes.add(len(images[0])) if net.training else None)
    (terms,) = train_with(cohort, engine("fp32", ""))
    return [terms[student] for student in students], students, sizes


def test_a_step_in_parts_is_that_of_the_whole_batch(data: ImageData, small_npz: Path) -> None:
    """Where no layer normalises by the batch; there it is by the part."""
    net = models.build("resnet8", data.spec)
    frozen = [name.removeprefix("body.") for name, module in net.body.named_modules() if isinstance(module, nn.BatchNorm2d)]
    whole, parts = (trained(data, small_npz, count, freeze=frozen) for count in (1, 4))
    assert (whole[2], parts[2]) == ({64}, {16})
    for one, other in zip(whole[0], parts[0], strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    for one, other in zip(whole[1], parts[1], strict=True):
        for weight, close in zip(one.net.parameters(), other.net.parameters(), strict=True):
            torch.testing.assert_close(weight, close, rtol=1e-3, atol=2e-4)


def test_a_graph_s_step_in_parts_is_the_eager_one_bit_for_bit(data: ImageData, small_npz: Path) -> None:
    (_, eager, _), (_, taped, _) = (trained(data, small_npz, 2, engine) for engine in (EagerEngine, Taped))
    assert [weights_of(student) for student in eager] == [weights_of(student) for student in taped]
    assert weights_of(eager[0]) != weights_of(trained(data, small_npz, 1)[1][0]), "each part is normalised by itself"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_mean_of_the_parts_tasks_is_the_task(mixed: bool, smoothing: float) -> None:
    """Also where the parts have other numbers of labels."""
    chance = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(12, 5, generator=chance), torch.randint(0, 5, (12,), generator=chance)
    if not mixed:
        labels[[0, 1, 2, 7]] = NO_LABEL
    mixture = (torch.randint(0, 5, (12,), generator=chance), torch.tensor([0.3])) if mixed else (None, None)
    batch = Batch(None, torch.arange(12), torch.tensor(1), targets=Targets(labels, (labels != NO_LABEL).sum(), *mixture))
    parts = list(cut(3, torch.arange(12), Outputs(logits, logits, {"stage1": logits}), batch))
    assert [images.tolist() for images, _, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    tasks = [task_loss(outputs.maps["stage1"], own, smoothing) for _, outputs, own in parts if outputs is not None]
    whole = task_loss(logits, batch, smoothing)
    assert whole is not None
    assert float(sum(tasks) / 3) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize(("method", "named"), [("sp", "sp"), ("kd+sp", "sp"), ("crd", "crd")])
def test_methods_that_compare_images_with_each_other_are_refused_by_name(ledger: Ledger, small_npz: Path, method: str, named: str) -> None:
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 1})], ledger, CPU)
    with pytest.raises(UserError) as error:
        run([config(small_npz, method=method, teacher="1", train={"accumulate": 2})], ledger, CPU)
    line = f"train.accumulate=2: method {named!r} compares the images of a batch with each other; leave one of them out"
    assert str(error.value) == line


def test_a_dry_run_says_how_a_batch_is_computed(small_npz: Path, tmp_path: Path) -> None:
    words = ("train", "--model", "resnet8", "--dataset", f"npz:{small_npz}", "--batch-size", "32", "--device", "cpu", "--dry-run")
    plain, parted = (json.loads(command(tmp_path, *words, *more).out)[0] for more in ((), ("--set", "train.accumulate=4")))
    assert ("batch" in plain, parted["batch"]) == (False, "32 images, in parts of 8 one after the other")
