"""Networks of others that draw random numbers, in training or always: what they draw is a function of seed, epoch and step."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.small import config
from torch import Tensor, nn

from flowdistill import UserError, models
from flowdistill.data.batches import SeedBatches, to_device
from flowdistill.data.sources import load
from flowdistill.ledger import Ledger
from flowdistill.methods import Needs
from flowdistill.models.foreign import adopt
from flowdistill.runner import evaluate, export, resume, run
from flowdistill.runner.doctor import examine
from flowdistill.runner.watcher import Watcher
from flowdistill.training.engine import EagerEngine
from flowdistill.training.graph import GraphEngine
from flowdistill.training.method_context import gather
from flowdistill.training.student import SeedGroup
from flowdistill.training.teacher import Teacher
from flowdistill.training.weights import save_weights
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
DATA = DataSpec("digits", 100, 10, 1, 8, 8)


def dropping(share: float) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(share), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def named() -> str:
    return adopt(dropping(0.5), "dropping")


@pytest.mark.parametrize(("model", "draws"), [("timm:resnet10t", False), ("torchvision:mobilenet_v2", True), ("resnet8", False)])
def test_networks_with_dropout_have_a_layer_seed(model, draws):
    data = DataSpec("images", 100, 10, 3, 32, 32)
    assert models.build(model, data, seed=5).layer_seed == (5 if draws else None)


def test_building_leaves_statistics_and_generator_alone():
    name = named()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    net = models.build(name, DATA)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.body[1].num_batches_tracked == 0


def test_dropout_of_zero_draws_nothing():
    assert models.build(adopt(dropping(0.0), "still"), DATA).layer_seed is None


class Stops(Watcher):
    def epoch(self, text: str) -> None:
        raise KeyboardInterrupt


def test_a_run_repeats_resumes_and_does_not_depend_on_its_company(small_npz, tmp_path: Path):
    name = named()
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


ALWAYS = """
import random
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.one, self.norm, self.fc = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def draw(self, x):
        return x

    def forward(self, images):
        return self.fc(self.draw(self.norm(self.one(images)).relu().mean((2, 3))))

class Torch(Net):
    def draw(self, x):
        return F.dropout(x, 0.5)

class Numpy(Net):
    def draw(self, x):
        return x * float(np.random.uniform(0.5, 1.5))

class Python(Net):
    def draw(self, x):
        return x * random.uniform(0.5, 1.5)

class One(Net):
    def draw(self, x):
        return x * torch.rand(())
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path) -> Path:
    path = folder / "nets.py"
    path.write_text(ALWAYS)
    return path


def a_teacher(nets: Path, name: str) -> str:
    """A drawing network with weights of its own."""
    path = nets.with_name(f"{name}.safetensors")
    save_weights(path, models.build(f"{nets}:{name}", DATA, seed=7).state_dict(), {})
    return f"{nets}:{name}@{path}"


def disturbed(number: int) -> None:
    """The generators stand elsewhere."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def hashes(ledger: Ledger, configs: list[Any], engine: str = "eager") -> list[str | None]:
    return [one.weights_hash for one in run(configs, ledger, CPU, engine=engine)]


@pytest.mark.parametrize("name", ["Torch", "Numpy", "Python", "One"])
def test_a_teacher_that_always_draws(small_npz, tmp_path: Path, nets: Path, name: str):
    """The same weights again, in company, and after a break; another seed draws otherwise."""
    one = config(small_npz, student="resnet8", teacher=a_teacher(nets, name), method="kd", seed=1)
    other = one.model_copy(update={"weights": {"task": 0.5}})
    found = []
    for folder in "ab":
        disturbed(ord(folder))
        found += hashes(Ledger(tmp_path / folder, create=True), [one])
    found.append(hashes(Ledger(tmp_path / "together", create=True), [other, one])[1])
    stopped = Ledger(tmp_path / "stopped", create=True)
    with pytest.raises(KeyboardInterrupt):
        run([one], stopped, CPU, engine="eager", watcher=Stops())
    disturbed(3)
    found.append(resume(stopped, CPU)[0].weights_hash)
    assert len(set(found)) == 1
    accuracies = {ledger.run(1).teacher_accuracy for ledger in (Ledger(tmp_path / "a"), Ledger(tmp_path / "b"))}
    assert len(accuracies) == 1


def test_a_teacher_draws_by_seed_epoch_and_step(small_npz, tmp_path: Path):
    """Of two batches alike, of two epochs and of two seeds no two are answered alike."""
    nets = written(tmp_path)

    data = to_device(load(config(small_npz).data), "full", CPU)
    teacher = Teacher(models.build(f"{nets}:Torch", DATA, seed=7).eval(), Needs(logits=True), "fp32")
    assert "draws random numbers" in teacher.whole, "a trace keeps what numpy and Python draw, and torch.rand(())"
    images = torch.ones(4, 1, 8, 8)

    def said(seed: int, epoch: int, step: int) -> Tensor:
        with SeedGroup(SeedBatches(data, seed, 64), teacher, []).teaching(epoch, step):
            return teacher.teach(images).logits

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    answers = [said(*one) for one in places]
    assert all(torch.equal(answer, said(*one)) for answer, one in zip(answers, places, strict=True))
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == len(places)


@pytest.mark.parametrize("name", ["Torch", "Numpy"])
def test_what_always_draws_is_measured_alike(small_npz, tmp_path: Path, nets: Path, name: str):
    ledger = Ledger(tmp_path / "runs", create=True)
    (done,) = run([config(small_npz, student=f"{nets}:{name}", train={"epochs": 2, "batch_size": 64})], ledger, CPU, engine="eager")
    path = ledger.run_folder(done.no) / "student.safetensors"
    for number in range(2):
        disturbed(number)
        assert evaluate(path, CPU).correct == done.correct
    cards = []
    for number in range(2):
        disturbed(number)
        said = command(tmp_path, "card", "1")
        cards.append([line for line in said.out.splitlines() if "accuracy" in line.lower() or "NLL" in line])
    assert cards[0] == cards[1] != []
    for form in ("safetensors", "torch-export"):
        assert export(path, form, out=tmp_path / f"it.{form}").difference == 0
        if name == "Numpy":
            break  # traced, a number of numpy's is a constant
    with pytest.raises(
        UserError, match=f"{name} draws random numbers in eval mode, which an ONNX file can't do alike; use --to torch-export"
    ):
        export(path, "onnx")


def test_class_means_and_the_doctor_of_what_always_draws(small_npz, tmp_path: Path, nets: Path):

    data = to_device(load(config(small_npz).data), "full", CPU)
    net = models.build(f"{nets}:Torch", DATA, seed=7).eval()
    ledger, found = Ledger(tmp_path / "runs", create=True), []
    one = config(small_npz, student="resnet8", teacher=a_teacher(nets, "Torch"), method="kd")
    for number in range(2):
        disturbed(number)
        means = gather(Needs(context=frozenset({"class_means"})), net, data, "fp32").class_means
        found.append((means, [finding for finding in examine([one], ledger, CPU) if "cost" not in finding.check]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_graph_does_not_hold_what_a_teacher_draws(nets: Path):

    class Taught:
        net, needs_teacher, peers = models.build("resnet8", DATA), True, ()

    teacher = Teacher(models.build(f"{nets}:Torch", DATA, seed=7).eval(), Needs(logits=True), "fp32")
    engine = GraphEngine(EagerEngine("fp32", "inside"), "outside").ready([SeedGroup(None, teacher, [Taught()])])
    assert type(engine) is EagerEngine
    assert engine.why == "a teacher draws random numbers in eval mode, or moves its buffers, which a graph would not hold to its seed"
