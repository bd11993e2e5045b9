"""Networks of others that draw random numbers in training: what they draw is a function of seed, epoch and step."""

from pathlib import Path

import pytest
import torch
from small import config
from torch import nn

from flowdistill import models
from flowdistill.ledger import Ledger
from flowdistill.models.foreign import adopt
from flowdistill.runner import resume, run
from flowdistill.runner.watcher import Watcher
from flowdistill.taps import DataSpec

CPU = torch.device("cpu")
DATA = DataSpec("digits", 100, 10, 1, 8, 8)


def dropping(share: float) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(share), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.fixture
def name() -> str:
    return adopt(dropping(0.5), "dropping")


@pytest.mark.parametrize(("model", "draws"), [("timm:resnet10t", False), ("torchvision:mobilenet_v2", True), ("resnet8", False)])
def test_who_draws(model, draws):
    data = DataSpec("images", 100, 10, 3, 32, 32)
    assert models.build(model, data, seed=5).draws_from == (5 if draws else None)


def test_the_look_leaves_statistics_and_generator(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    net = models.build(name, DATA)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.body[1].num_batches_tracked == 0


def test_no_dropout_no_draws():
    assert models.build(adopt(dropping(0.0), "still"), DATA).draws_from is None


class Stops(Watcher):
    def epoch(self, text: str) -> None:
        raise KeyboardInterrupt


def test_a_run_repeats_resumes_and_does_not_depend_on_its_company(name, small_npz, tmp_path: Path):
    base = config(small_npz, student=name, method="base", seed=1)
    hashes = []
    for folder in "ab":
        torch.manual_seed(ord(folder))
        ledger = Ledger(tmp_path / folder, create=True)
        torch.rand(7)
        hashes.append(run([base], ledger, CPU, engine="eager")[0].weights_hash)
    together = Ledger(tmp_path / "together", create=True)
    other = config(small_npz, student=name, method="base", seed=1, weights={"task": 0.5})
    hashes.append(run([other, base], together, CPU, engine="eager")[1].weights_hash)
    stopped = Ledger(tmp_path / "stopped", create=True)
    with pytest.raises(KeyboardInterrupt):
        run([base], stopped, CPU, engine="eager", watcher=Stops())
    hashes.append(resume(stopped, CPU)[0].weights_hash)
    assert len(set(hashes)) == 1
    assert run([config(small_npz, student=name, method="base", seed=2)], together, CPU)[0].weights_hash != hashes[0]
