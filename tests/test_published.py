"""Published weights by name: they are what the library makes of them, their images too, and nothing but them ever stands in their place."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import hub
from helpers.command import Evil, command
from helpers.small import config
from PIL import Image
from torch import Tensor, nn
from torchvision import models as torchvision_models

from flowdistill.checks import UserError
from flowdistill.data.normalisation import Normalisation
from flowdistill.data.sources import load
from flowdistill.ledger import Ledger
from flowdistill.models.published import is_published, published
from flowdistill.runner import run
from flowdistill.runner.plan import plan
from flowdistill.runner.references import named
from flowdistill.training.weights import load_weights, save_weights
from flowdistill.types import DataSpec

CPU = torch.device("cpu")
TINY = "hf-hub:me/tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of both libraries, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    published.cache_clear()
    return tmp_path / "hub"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Site]:
    """The hub is a server of the test's own."""
    from huggingface_hub import constants

    with hub.serving() as site:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", site.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.address + "/{repo_id}/resolve/{revision}/{filename}")
        yield site


@pytest.fixture
def tiny(cache: Path) -> nn.Module:
    """A model of the hub for 3x32x32 images, in the cache, whose classes are ImageNet's."""
    net = hub.network("test_resnet")
    hub.lay(cache, "me/tiny", {"config.json": hub.tiny_config(), "model.safetensors": hub.weights(net)})
    return net


def raw(*shape: int) -> Tensor:
    """Images in 0..1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def logits(reference: str, images: Tensor) -> Tensor:
    """What the network of a reference answers to images in 0..1, which the data normalise in some other way."""
    network, data = named(reference), Normalisation((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    net = network.build(DataSpec("some", 100, 10, *images.shape[1:]), given=data).eval()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    with torch.no_grad():
        return net((images - mean) / std).logits


@torch.no_grad()
def expected(net: nn.Module, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return net((images - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1))


@pytest.mark.parametrize("reference", ["timm:test_resnet.r160_in1k", "timm:test_resnet@pretrained", "timm:test_resnet@DEFAULT"])
def test_timm_by_tag_or_by_its_default(reference: str, cache: Path) -> None:
    net = hub.network("test_resnet")
    hub.lay(cache, "timm/test_resnet.r160_in1k", {"model.safetensors": hub.weights(net)})
    images = raw(2, 3, 160, 160)
    configured = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    torch.testing.assert_close(logits(reference, images), expected(net, images, configured.mean, configured.std), rtol=1e-4, atol=1e-4)
    network = named(reference)
    assert (network.model, network.labels[0], network.published and network.published.licence) == (
        "timm:test_resnet",
        "tench, Tinca tinca",
        "apache-2.0",
    )


def test_images_of_another_size_are_resized_as_its_weights_declare(tiny: nn.Module) -> None:
    images = raw(2, 3, 20, 24)
    larger = F.interpolate(images, (32, 32), mode="bicubic")
    found = logits(TINY, images)
    torch.testing.assert_close(found, expected(tiny, larger, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), rtol=1e-3, atol=1e-3)
    bilinear = expected(tiny, F.interpolate(images, (32, 32), mode="bilinear"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert not torch.allclose(found, bilinear, rtol=1e-3, atol=1e-3)


def test_a_network_of_one_size_takes_its_weights(cache: Path) -> None:
    net = hub.network("test_vit")
    hub.lay(cache, "timm/test_vit.r160_in1k", {"model.safetensors": hub.weights(net)})
    configured = timm.get_pretrained_cfg("test_vit.r160_in1k")
    images = raw(1, 1, 28, 28)
    larger = F.interpolate(images.expand(-1, 3, -1, -1), (160, 160), mode="bicubic")
    grey = named("timm:test_vit@pretrained").build(DataSpec("grey", 9, 10, 1, 28, 28), given=Normalisation((0.0,), (1.0,))).eval()
    with torch.no_grad():
        torch.testing.assert_close(grey(images).logits, expected(net, larger, configured.mean, configured.std), rtol=1e-3, atol=1e-3)


def torchvision_site(site: hub.Site, name: str, monkeypatch: pytest.MonkeyPatch, **parts: Any) -> nn.Module:
    """A network of torchvision with fresh weights, which the site serves as those that the library publishes."""
    torch.manual_seed(0)
    net = torchvision_models.get_model(name, weights=None, init_weights=False, **parts) if parts else torchvision_models.get_model(name)
    content = io.BytesIO()
    torch.save(net.state_dict(), content)
    path = f"/{name}-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    site.put(path, content.getvalue())
    weights = torchvision_models.get_model_weights(name).DEFAULT
    changed = type(weights.value)(f"{site.address}{path}", weights.transforms, weights.meta)
    monkeypatch.setattr(weights, "_value_", changed)
    return net.eval()


@pytest.mark.parametrize("word", ["DEFAULT", "IMAGENET1K_V1", "pretrained"])
def test_torchvision_is_downloaded_once(word: str, site: hub.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    net = torchvision_site(site, "shufflenet_v2_x0_5", monkeypatch)
    images = raw(1, 3, 224, 224)
    reference = f"torchvision:shufflenet_v2_x0_5@{word}"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(logits(reference, images), expected(net, images, mean, std), rtol=1e-3, atol=1e-4)
    assert named(reference).labels[:2] == ("tench", "goldfish")
    published.cache_clear()
    named(reference)
    assert len([path for path in site.asked if path.endswith(".pth")]) == 1


def test_what_a_network_does_to_images_with_published_weights_alone(site: hub.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """GoogLeNet of torchvision normalises again, from ImageNet's mean and std, if its weights are published; a fresh one does not."""
    net = torchvision_site(site, "googlenet", monkeypatch, aux_logits=True)
    theirs = torchvision_models.googlenet(weights=torchvision_models.GoogLeNet_Weights.DEFAULT).eval()
    assert theirs.transform_input
    assert not net.transform_input
    images = raw(1, 3, 224, 224)
    answer = expected(theirs, images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(logits("torchvision:googlenet@DEFAULT", images), answer, rtol=1e-3, atol=1e-4)


def test_the_hub_is_asked_once(site: hub.Site) -> None:
    net = hub.network("test_resnet")
    folder = "/me/tiny/resolve/main/"
    site.put(f"{folder}config.json", hub.tiny_config())
    site.put(f"{folder}model.safetensors", hub.weights(net))
    images = raw(2, 3, 32, 32)
    torch.testing.assert_close(logits(TINY, images), expected(net, images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), rtol=1e-3, atol=1e-4)
    asked = len(site.asked)
    published.cache_clear()
    named(TINY)
    assert len(site.asked) == asked, "what lies in the cache needs no network"


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (404, "RepoNotFound", "the hub has no me/tiny, or it is private; look at the name, or log in: hf auth login"),
        (403, "GatedRepo", "me/tiny is given to those who asked for it; ask on {site}/me/tiny, then log in: hf auth login"),
        (404, "RevisionNotFound", "me/tiny has no revision None; name one that it has"),
        (404, "EntryNotFound", "me/tiny has no config.json; name a model whose weights are safetensors"),
    ],
)
def test_what_the_hub_refuses(status: int, code: str, line: str, site: hub.Site) -> None:
    site.put("/me/tiny/resolve/main/config.json", b"", status, **{"X-Error-Code": code})
    with pytest.raises(UserError) as error:
        named(TINY)
    assert str(error.value) == f"{TINY}: {line.format(site=site.address)}"


def test_weights_that_can_hold_code_are_not_taken_from_strangers(site: hub.Site) -> None:
    site.put("/me/tiny/resolve/main/config.json", hub.tiny_config())
    site.put("/me/tiny/resolve/main/pytorch_model.bin", b"")
    with pytest.raises(UserError, match=r"^hf-hub:me/tiny: me/tiny has no model.safetensors; name a model whose weights are safetensors$"):
        named(TINY)
    assert not any(path.endswith(".bin") for path in site.asked)


def test_a_pickle_of_timms_own_runs_no_code(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = io.BytesIO()
    torch.save({"conv1.weight": Evil()}, content)
    hub.lay(cache, "timm/test_resnet.r160_in1k", {"pytorch_model.bin": content.getvalue()})
    with pytest.raises(UserError, match=r"pytorch_model.bin can't be used \(UnpicklingError"):
        named("timm:test_resnet@pretrained")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_file_is_refused(tiny: nn.Module, cache: Path) -> None:
    file = next(cache.rglob("model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(UserError) as error:
        named(TINY)
    where = f"{file} is damaged (its SHA-256 is not that in its name); delete {file.resolve()}"
    assert str(error.value) == f"{TINY}: {where}, and it is downloaded again"


def test_a_file_that_is_no_model_of_timm(cache: Path) -> None:
    hub.lay(cache, "me/tiny", {"config.json": b'{"architectures": ["ViTModel"]}'})
    with pytest.raises(
        UserError, match=r"^hf-hub:me/tiny: its config.json names no architecture of timm; name a model that timm can load$"
    ):
        named(TINY)


def test_weights_of_another_network(cache: Path) -> None:
    hub.lay(cache, "me/tiny", {"config.json": hub.tiny_config(), "model.safetensors": hub.weights(hub.network("test_convnext"))})
    with pytest.raises(UserError, match=r"^hf-hub:me/tiny: .*model.safetensors can't be used \(RuntimeError: Error"):
        named(TINY)


def test_a_network_made_otherwise_than_its_name_says(cache: Path) -> None:
    hub.lay(cache, "me/tiny", {"config.json": hub.tiny_config(model_args={"block_args": 3})})
    with pytest.raises(
        UserError, match=r"^hf-hub:me/tiny: it is timm's test_resnet made otherwise \(block_args=3\); make it in FILE.py:FUNC"
    ):
        named(TINY)


@pytest.mark.parametrize(
    ("reference", "download"),
    [
        ("timm:test_resnet.r160_in1k", "hf download timm/test_resnet.r160_in1k model.safetensors;"),
        ("hf-hub:me/tiny@v1", "hf download me/tiny config.json model.safetensors --revision v1;"),
    ],
)
def test_without_network_and_cache(reference: str, download: str, cache: Path) -> None:
    with pytest.raises(UserError) as error:
        named(reference)
    assert str(error.value).startswith(f"{reference}: it is not in the cache and can't be downloaded (")
    assert str(error.value).endswith(f"run this on a machine with a network: {download} then copy {cache} from there to here")
    assert len(str(error.value).splitlines()) == 1


def test_torchvision_without_network_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision_models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(weights, "_value_", type(weights.value)("http://127.0.0.1:9/r-01234567.pth", weights.transforms, weights.meta))
    with pytest.raises(UserError) as error:
        named("torchvision:resnet18@DEFAULT")
    assert str(error.value) == (
        "torchvision:resnet18@DEFAULT: it is not in the cache and can't be downloaded (<urlopen error [Errno 111] Connection refused>); "
        'run this on a machine with a network: python -c "import torch; torch.hub.load_state_dict_from_url('
        f"'http://127.0.0.1:9/r-01234567.pth')\"; then copy {tmp_path}/torch/hub/checkpoints/r-01234567.pth from there to here"
    )


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ("timm:resnet18.a1_in", "timm publishes no such weights of resnet18; did you mean 'a1_in1k'?"),
        ("timm:test_coatnet@pretrained", "timm publishes no weights of test_coatnet; write timm:test_coatnet for fresh ones"),
        ("timm:resnt18@pretrained", "unknown model 'timm:resnt18': did you mean 'resnet18'?"),
        ("torchvision:resnt18@DEFAULT", "unknown model 'torchvision:resnt18': did you mean 'resnet18'?"),
        (
            "resnet20@pretrained",
            "nobody publishes weights of resnet20; write timm:NAME.TAG, timm:NAME@pretrained, torchvision:NAME@DEFAULT or hf-hub:ORG/NAME, "
            "or resnet20@./pretrained for a file of that name",
        ),
        ("hf-hub:a/b/c", "Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'a/b/c'. Use `repo_type` argument if needed."),
    ],
)
def test_names_of_nothing(reference: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        named(reference)
    told = str(error.value)
    assert told.startswith(line if line.startswith("unknown") else f"{reference}: {line}")
    assert len(told.splitlines()) == 1


def test_reserved_words_name_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = named("resnet8").build(DataSpec("digits", 100, 10, 1, 8, 8))
    save_weights(tmp_path / "pretrained", net.state_dict(), {})
    with pytest.raises(UserError, match="nobody publishes weights of resnet8"):
        named("resnet8@pretrained")
    assert named("resnet8@./pretrained").weights is not None


def test_what_means_published_weights() -> None:
    names = [
        "timm:resnet18.tv_in1k",
        "timm:resnet18@pretrained",
        "torchvision:resnet18@IMAGENET1K_V1",
        "hf-hub:org/name@rev",
        "x.py:F@DEFAULT",
    ]
    assert [name for name in names if not is_published(name)] == []
    others = ["timm:resnet18", "torchvision:resnet18", "timm:resnet18@weights.pt", "resnet20@runs/1/student.safetensors", "12", "resnet20"]
    assert [name for name in others if is_published(name)] == []


def test_a_student_begins_from_them_and_sees_their_normalisation(tiny: nn.Module, small_npz: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs", create=True)
    straight = config(small_npz, student=TINY)
    by_init = config(small_npz, student="timm:test_resnet", init_from=TINY)
    first, second = plan([straight, by_init], ledger, CPU)
    assert first.fingerprint == second.fingerprint
    assert first.student.input_spec.mean == (0.4, 0.5, 0.6)
    assert (first.student.input_spec.height, first.student.head) == (None, False)
    file = tmp_path / "copy.safetensors"
    save_weights(file, tiny.state_dict(), {})
    (as_file,) = plan(
        [config(small_npz, student="timm:test_resnet", init_from=f"timm:test_resnet@{file}", inputs={"student": {"channels": 3}})],
        ledger,
        CPU,
    )
    assert as_file.student.input_spec.mean is None
    assert as_file.fingerprint != first.fingerprint, "the same weights, but the student sees other images"
    data = load(straight.data)
    built = first.student.build(data.spec, given=Normalisation((0.2,), (0.4,)))
    torch.testing.assert_close(built.state_dict()["conv1.0.weight"], tiny.state_dict()["conv1.0.weight"])
    images = raw(1, 1, 8, 8)
    torch.testing.assert_close(built.input_adapter((images - 0.2) / 0.4)[:, 1], (images[:, 0] - 0.5) / 0.3)
    ledger.close()


def test_a_training_from_and_by_published_weights(tiny: nn.Module, cache: Path, small_npz: Path, tmp_path: Path) -> None:
    """From the command line: what is said, what is recorded, that the student's file needs nothing of the cache."""
    data = ("--dataset", f"npz:{small_npz}", "--epochs", "1", "--set", "train.precision=fp32")
    said = command(tmp_path, "distill", "--method", "at", "--student", TINY, "--teacher", TINY, *data)
    assert said.code == 0, said.err
    assert (
        f"student timm:test_resnet begins from {TINY}: published weights, licence mit, its classifier fresh (1000 classes, the data has"
        in said.err
    )
    assert f"teacher timm:test_resnet ({TINY}: published weights, licence mit): 1000 classes, the data has 10;" in said.err
    weights, about = load_weights(tmp_path / "runs" / "1" / "student.safetensors")
    assert (about["model"], about["front"]["mean"], len(weights["fc.bias"])) == ("timm:test_resnet", [0.4, 0.5, 0.6], 10)
    with closing(Ledger(tmp_path / "runs")) as ledger:
        (row,) = ledger.runs()
    assert (row.config["student"], row.config["teacher"], row.variant) == (TINY, TINY, f"init={TINY}")
    again = command(tmp_path, "distill", "--method", "at", "--student", TINY, "--teacher", TINY, *data)
    assert "run 1 has it already, skipped" in again.err
    for file in cache.rglob("*"):
        file.unlink() if file.is_file() or file.is_symlink() else None
    published.cache_clear()
    assert command(tmp_path, "evaluate", "1").code == 0
    refused = command(tmp_path, "distill", "--method", "at", "--student", TINY, "--teacher", TINY, *data)
    assert (refused.code, refused.out) == (2, "")
    assert "it is not in the cache and can't be downloaded" in refused.err


def test_classes_by_name_and_by_wordnet_id(cache: Path, small_npz: Path) -> None:
    names = ["n00000001", "n00000002", "n00000003"]
    content = hub.tiny_config(num_classes=3, label_names=names, label_descriptions={"n00000001": "ant", "n00000002": "bee"})
    hub.lay(cache, "me/tiny", {"config.json": content, "model.safetensors": hub.weights(hub.network("test_resnet", num_classes=3))})
    network = named(TINY)
    assert network.labels == ("ant", "bee", "n00000003")

    class Data:
        spec, classes = DataSpec("d", 1, 3, 3, 32, 32), 3

        def __init__(self, *class_names: str) -> None:
            self.class_names = class_names

    assert network.other_classes(Data(*names)) == ""
    assert network.other_classes(Data(names[1], names[0], names[2])) == "class 'n00000001' where the data has 'n00000002'"
    assert network.other_classes(Data("bee", "ant", "cow")) == "class 'ant' where the data has 'bee'"


def test_a_student_of_other_classes_that_has_no_number_of_them(tiny: nn.Module, small_npz: Path, tmp_path: Path) -> None:
    """Methods on logits refuse a teacher of a thousand classes, as of any other."""
    with (
        closing(Ledger(tmp_path / "runs", create=True)) as ledger,
        pytest.raises(UserError, match="resnet8 has 10 classes, timm:test_resnet 1000"),
    ):
        run([config(small_npz, method="kd", teacher=TINY)], ledger, CPU)


def test_by_a_probe_a_classifier_of_imagenet_teaches_other_classes(tiny: nn.Module, tmp_path: Path) -> None:
    """The data's classes have names, which are none of ImageNet's; the probe's are the data's."""
    chance = np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), ("ant", "bee")):
        (tmp_path / "insects" / split / name).mkdir(parents=True)
        for number in range(8):
            pixels = chance.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "insects" / split / name / f"{number}.png")
    words = ("distill", "--method", "kd", "--student", "resnet8", "--teacher", TINY, "--dataset", "folder:insects", "--epochs", "1")
    words = (*words, "--set", "train.batch_size=8", "--set", "train.precision=fp32")
    assert "resnet8 has 2 classes, timm:test_resnet 1000" in command(tmp_path, *words).err
    said = command(tmp_path, *words, "--probe")
    assert said.code == 0, said.err
    assert f"teacher timm:test_resnet ({TINY}: published weights, licence mit, with a linear probe of its features): " in said.err


def test_hub_configs_of_long_ago(cache: Path) -> None:
    """All keys at the top, as timm wrote them before 2023."""
    old = {
        "architecture": "test_resnet",
        "num_classes": 4,
        "input_size": [3, 24, 24],
        "mean": [0.1] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
    }
    hub.lay(
        cache,
        "me/tiny",
        {"config.json": json.dumps(old).encode(), "model.safetensors": hub.weights(hub.network("test_resnet", num_classes=4))},
    )
    spec = named(TINY).input_spec
    assert (spec.height, spec.mean, spec.interpolation) == (24, (0.1, 0.1, 0.1), None)
