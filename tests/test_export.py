"""A student that ships: its file answers as the network does without this package, says what it is, and is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import assert_refused, command
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from flowdistill import models
from flowdistill.data.batches import Normalisation
from flowdistill.runner import load_network
from flowdistill.runner.export import FORMATS, OUTPUT, TOLERANCE, DeviationError, Program, compare, metadata
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

SIMKD = "reused(resnet8,resnet14,2)"
ELSEWHERE = {
    "torch-export": """
import sys
sys.modules["flowdistill"] = None
import json, numpy, torch
extra = {"flowdistill.json": ""}
program = torch.export.load("FILE", extra_files=extra).module()
told = json.loads(extra["flowdistill.json"])
answer = lambda images: program(torch.from_numpy(images)).numpy()
""",
    "onnx": """
import sys
sys.modules["flowdistill"] = sys.modules["torch"] = None
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("FILE")
told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
answer = lambda images: session.run(["logits"], {"images": images})[0]
""",
}
SAVE = """
images = numpy.load("images.npy")
numpy.savez("answers.npz", whole=answer(images), ones=numpy.concatenate([answer(image[None]) for image in images]))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def work(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run 1 is a ResNet-14; run 2 a ResNet-8 with its classifier; run 3 diverged. Beside them, test images."""
    folder = tmp_path_factory.mktemp("export")
    images = f"npz:{small_npz}"
    for words in (
        ["train", "--model", "resnet14", "--seeds", "5"],
        ["distill", "--method", "simkd", "--student", "resnet8", "--teacher", "1"],
        ["train", "--model", "resnet8", "--lr", "1e30"],
    ):
        command(
            folder, *words, "--dataset", images, "--epochs", "2", "--batch-size", "64", "--set", "data.pad=1", "--set", "data.flip=false"
        )
    with np.load(small_npz) as data:
        np.save(folder / "images.npy", data["x_test"][..., None])
    return folder


def expected(folder: Path, no: int) -> tuple[np.ndarray, dict[str, object]]:
    """Logits by the plain formula, and what a file must say."""
    net, about = load_network(folder / f"runs/{no}/student.safetensors")
    images = np.load(folder / "images.npy") / 255
    pixels = ((images - np.array(about.mean)) / np.array(about.std)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        logits = net(torch.from_numpy(pixels).float()).logits.numpy()
    return logits, {
        "model": {1: "resnet14", 2: SIMKD}[no],
        "classes": 10,
        "input": [1, 8, 8],
        "mean": list(about.mean),
        "std": list(about.std),
        "accuracy": pytest.approx(100 * about.correct / 150),
        "data": about.data.name,
    }


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("ledger.db")}


@pytest.mark.parametrize("no", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("to", list(ELSEWHERE))
def test_a_program_gives_the_same_logits_without_this_package(work: Path, to: str, no: int) -> None:
    said = command(work, "export", str(no), "--to", to, "--out", "shipped/it", "--format", "json")
    assert (said.code, said.err) == (0, "")
    (told,) = json.loads(said.out)
    logits, about = expected(work, no)
    assert (told["file"], told["to"], told["images"]) == ("shipped/it", to, 64)
    assert told["bytes"] == (work / "shipped/it").stat().st_size
    assert 0 <= told["difference"] <= told["allowed"] == pytest.approx(TOLERANCE * np.abs(logits[:64]).max(), rel=1e-3)
    program = ELSEWHERE[to].replace("FILE", "shipped/it") + SAVE
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=work, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == about
    assert len(set(logits.argmax(1))) >= 3, "else much could be wrong unseen"
    with np.load(work / "answers.npz") as answers:
        for found in (answers["whole"], answers["ones"]):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("no", [1, 2])
def test_the_weights_load_with_safetensors_alone_and_can_be_measured(work: Path, no: int) -> None:
    said = command(work, "export", str(no), "--to", "safetensors")
    assert (said.code, said.err) == (0, "")
    written = work / f"runs/{no}/student.export.safetensors"
    net, _ = load_network(work / f"runs/{no}/student.safetensors")
    with safe_open(written, framework="pt") as file:
        told = {key: json.loads(value) for key, value in file.metadata().items() if key not in ("format", "flowdistill")}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    assert len(told.pop("sha256")) == 64
    assert told.pop("sealed") is True
    assert told == expected(work, no)[1]
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    measured = [command(work, "evaluate", str(target), "--format", "json").out for target in (no, written)]
    assert measured[0] == measured[1]


def test_the_names_of_the_classes_travel_where_they_are_known(work: Path) -> None:
    net, about = load_network(work / "runs/1/student.safetensors")
    assert "labels" not in metadata(net, about)
    net.about = {**net.about, "labels": [f"digit {k}" for k in range(10)]}
    assert json.loads(metadata(net, about)["labels"])[3] == "digit 3"


def test_onnx_has_one_input_and_one_output_for_any_number_of_images(work: Path) -> None:
    import onnx

    command(work, "export", "1", "--to", "onnx", "--out", "plain.onnx")
    model = onnx.load(work / "plain.onnx")
    onnx.checker.check_model(model, full_check=True)
    sizes = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    }
    assert sizes == {
        "images": (onnx.TensorProto.UINT8, ["batch", 8, 8, 1]),
        "logits": (onnx.TensorProto.FLOAT, ["batch", 10]),
    }
    assert [(used.domain, used.version) for used in model.opset_import] == [("", 18)]


@pytest.mark.parametrize("to", list(FORMATS))
def test_no_path_of_this_machine_travels(work: Path, to: str) -> None:
    command(work, "export", "1", "--to", to, "--out", "bare")
    assert str(Path(__file__).parents[1]).encode() not in (work / "bare").read_bytes()


@pytest.mark.parametrize("to", list(ELSEWHERE))
@pytest.mark.parametrize(
    "name",
    [
        *("vgg8", "wrn-16-1", "reused(vgg8,resnet8,2)"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet50")),
    ],
)
def test_each_family_of_networks_becomes_a_program(name: str, to: str) -> None:
    """Untrained, on grey images of a size that no pooling divides evenly."""
    net = models.build(name, DataSpec("some", 0, 10, 1, 28, 28))
    images = torch.randint(0, 256, (5, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    program = Program(net, Normalisation((0.5,), (0.25,)))
    difference, allowed = compare(program, FORMATS[to].read(FORMATS[to].write(program, images[:1], {}), program), images, to)
    assert difference <= allowed


NORMED = """
from torch import nn

def old(classes):
    first, second = nn.utils.weight_norm(nn.Conv2d(1, 6, 3)), nn.utils.spectral_norm(nn.Conv2d(6, 6, 3))
    return nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
"""


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_hooks_compute_are_exported(tmp_path: Path) -> None:
    """torch copies no module with such; and a file of other weights is still told from the network's own."""
    (tmp_path / "nets.py").write_text(NORMED)
    net = models.build(f"{tmp_path}/nets.py:old", DataSpec("some", 0, 10, 1, 28, 28))
    images = torch.randint(0, 256, (5, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    program, form = Program(net, Normalisation((0.5,), (0.25,))), FORMATS["safetensors"]
    content = form.write(program, images[:1], {})
    compare(program, form.read(content, program), images, "safetensors")
    other = {name: value * 2 for name, value in load(content).items()}
    with pytest.raises(DeviationError):
        compare(program, form.read(save(other), program), images, "safetensors")


# int8


@pytest.mark.parametrize("no", [1, pytest.param(2, marks=pytest.mark.long)])
def test_int8_is_smaller_and_both_accuracies_are_those_of_the_files(work: Path, small_npz: Path, no: int) -> None:
    import onnx
    import onnxruntime

    exact = command(work, "export", str(no), "--to", "onnx")
    said = command(work, "export", str(no), "--to", "onnx", "--int8", "--format", "json")
    assert (exact.code, said.code, said.err) == (0, 0, "")
    (told,) = json.loads(said.out)
    assert told["file"] == f"runs/{no}/student.int8.onnx"
    assert told["bytes"] < (work / f"runs/{no}/student.onnx").stat().st_size / 2
    accuracies, logits = {}, {}
    with np.load(small_npz) as data:
        for name in ("student", "student.int8"):
            session = onnxruntime.InferenceSession(work / f"runs/{no}/{name}.onnx")
            (logits[name],) = session.run(["logits"], {"images": data["x_test"][..., None]})
            accuracies[name] = 100 * float((logits[name].argmax(1) == data["y_test"]).mean())
            kept = session.get_modelmeta().custom_metadata_map
            assert json.loads(kept["accuracy"]) == pytest.approx(accuracies[name])
    assert (told["accuracy_fp32"], told["accuracy_int8"]) == (
        pytest.approx(accuracies["student"]),
        pytest.approx(accuracies["student.int8"]),
    )
    assert json.loads(kept["quantisation"]) == "int8"
    assert {key: json.loads(value) for key, value in kept.items()}.keys() == {*expected(work, no)[1], "quantisation"}
    assert 0 < np.abs(logits["student.int8"] - logits["student"]).max() < 0.2 * np.abs(logits["student"]).max()
    model = onnx.load(work / f"runs/{no}/student.int8.onnx")
    weights = [value for value in model.graph.initializer if value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1]
    assert len(weights) == sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node)


def test_int8_is_calibrated_on_training_images(work: Path, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime.quantization as onnx_quantization

    shown, real = [], onnx_quantization.quantize_static

    def spy(exact: Path, quantised: Path, reader: Any, **options: Any) -> None:
        class Spy:
            def get_next(self) -> Any:
                found = reader.get_next()
                shown.extend(found["images"] if found else [])
                return found

        real(exact, quantised, Spy(), **options)

    monkeypatch.setattr(onnx_quantization, "quantize_static", spy)
    before = files(work)
    assert command(work, "export", "1", "--to", "onnx", "--int8", "--out", "seen.onnx").code == 0
    with np.load(small_npz) as data:
        train = {image.tobytes() for image in data["x_train"]}
    assert len(shown) == 300
    assert {image.tobytes() for image in shown} == train
    assert files(work) == before | {"seen.onnx"}


def test_an_int8_export_that_fails_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", full)
    before = files(work)
    said = command(work, "export", "1", "--to", "onnx", "--int8", "--out", "never.onnx")
    assert (said.code, said.out) == (1, "")
    assert files(work) == before


def test_help_names_every_format_of_this_package(work: Path) -> None:
    shown = command(work, "export", "--help").out
    assert [name for name in FORMATS if name not in shown] == []


# What does not answer as the network does is not written


@pytest.mark.parametrize(
    ("to", "wrong"),
    [
        ("safetensors", "weight"),
        ("torch-export", "weight"),
        ("torch-export", "normalisation"),
        ("onnx", "weight"),
        ("onnx", "normalisation"),
    ],
)
def test_a_wrong_file_is_an_error_and_nothing_is_left(work: Path, to: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS[to]

    def write(program: Program, image: Tensor, told: dict[str, str]) -> bytes:
        net, about = load_network(work / "runs/1/student.safetensors")
        if wrong == "weight":
            net.fc.weight.data[3] *= 1.01
        return form.write(Program(net, Normalisation(about.mean, (1.0,) if wrong == "normalisation" else about.std)), image, told)

    monkeypatch.setitem(FORMATS._entries, to, form._replace(write=write))
    before = files(work)
    said = command(work, "export", "1", "--to", to, "--out", "wrong/it")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith(f"flowdistill: the {to} file does not answer as the network does: on 64 test images a logit differs by ")
    assert said.err.endswith("; nothing was written\n")
    assert len(said.err.splitlines()) == 1
    assert files(work) == before


class Rows(torch.nn.Module):
    """A network whose logits are the pixels of an image's first row."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.output = models.Network(), OUTPUT

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, :, 0].float()


ROWS = torch.tensor([[100, 50, 0], [0, 60, 60]], dtype=torch.uint8)[:, None, :, None]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda images: Rows()(images) + 0.011, "differs by 0.011 (0.01 is allowed), 0 of"),
        (lambda images: Rows()(images) * torch.nan, "differs by nan (0.01 is allowed)"),
        (lambda images: Rows()(images) + 0.02 * (len(images) == 1), "differs by 0.02 (0.01 is allowed), 0 of"),
        (lambda images: Rows()(images) + 0.02 * (len(images) > 1), "differs by 0.02 (0.01 is allowed), 0 of"),
        (lambda images: Rows()(images) + torch.tensor([0, 0, 0.005]), "differs by 0.005 (0.01 is allowed), 1 of"),
    ],
    ids=["all", "nan", "one by one", "together", "another class"],
)
def test_each_kind_of_disagreement_is_seen(answer, said: str) -> None:
    with pytest.raises(DeviationError) as told:
        compare(Rows(), answer, ROWS, "onnx")  # type: ignore[arg-type]
    assert said in str(told.value)


def test_rounding_is_no_disagreement() -> None:
    difference, allowed = compare(Rows(), lambda images: Rows()(images) - 0.009, ROWS, "onnx")  # type: ignore[arg-type]
    assert (difference, allowed) == (pytest.approx(0.009, rel=1e-3), pytest.approx(0.01))


# Mistakes, and what the machine refuses


def test_without_onnx_one_line_says_what_to_install(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            line = f"--to onnx needs {package}, which is not installed: pip install onnx onnxscript onnxruntime"
            assert_refused(work, ["export", "1", "--to", "onnx"], line)


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("runs/1/student.safetensors", "--out runs/1/student.safetensors: that is the student's own file; name another"),
        ("images.npy/it", "--out images.npy/it: cannot be written there (images.npy is a file); name another file"),
        ("runs", "--out runs: cannot be written there (it is not a file); name another file"),
    ],
)
def test_a_place_that_will_not_do_is_refused(work: Path, out: str, line: str) -> None:
    assert_refused(work, ["export", "1", "--to", "safetensors", "--out", out], line)


def test_a_run_without_a_student_is_refused(work: Path) -> None:
    assert_refused(work, ["export", "3", "--to", "onnx"], "weights file runs/3/student.safetensors: no such file")


FORK = """
from torch import nn

class Fork(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        h = self.stage2(self.stage1(images))
        return self.fc((h if h.sum() > 0 else h * 2).mean((2, 3)))
"""


def test_a_network_that_can_not_be_traced_is_one_line(small_npz: Path, tmp_path: Path) -> None:
    (tmp_path / "fork.py").write_text(FORK)
    words = ["--dataset", f"npz:{small_npz}", "--epochs", "1", "--batch-size", "64", "--set", "data.pad=1", "--set", "data.flip=false"]
    assert command(tmp_path, "train", "--model", "fork.py:Fork", *words).code == 0
    before = files(tmp_path)
    for to in ("torch-export", "onnx"):
        export = [sys.executable, "-m", "flowdistill", "export", "1", "--to", to]
        said = subprocess.run(export, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (said.returncode, said.stdout) == (2, "")
        (line,) = said.stderr.splitlines()
        assert line.startswith("flowdistill: torch.export can't trace fork.py:Fork: GuardOnDataDependentSymNode: Could not guard on")
        assert line.endswith("; use --to safetensors")
        assert files(tmp_path) == before
    assert command(tmp_path, "export", "1", "--to", "safetensors").code == 0


def test_an_operation_that_onnx_lacks_is_one_line(small_npz: Path, tmp_path: Path) -> None:
    (tmp_path / "bessel.py").write_text(
        FORK.replace("Fork", "Bessel").replace("(h if h.sum() > 0 else h * 2).mean((2, 3))", "torch.special.i0e(h.mean((2, 3)))")
        + "import torch\n"
    )
    words = ["--dataset", f"npz:{small_npz}", "--epochs", "1", "--batch-size", "64", "--set", "data.pad=1", "--set", "data.flip=false"]
    assert command(tmp_path, "train", "--model", "bessel.py:Bessel", *words).code == 0
    before = files(tmp_path)
    said = command(tmp_path, "export", "1", "--to", "onnx")
    assert (said.code, said.out, files(tmp_path)) == (2, "", before)
    (line,) = said.err.splitlines()
    assert line.startswith("flowdistill: ONNX can't express bessel.py:Bessel: DispatchError: No ONNX function found for")
    assert line.endswith("; use --to torch-export or safetensors")
    assert command(tmp_path, "export", "1", "--to", "torch-export").code == 0


def test_a_full_disk_leaves_the_file_that_was_there(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (work / "kept").write_text("earlier")
    before = files(work)
    monkeypatch.setattr(os, "fsync", full)
    said = command(work, "export", "1", "--to", "torch-export", "--out", "kept")
    assert (said.code, said.out) == (1, "")
    assert "No space left on device" in said.err
    assert (work / "kept").read_text() == "earlier"
    assert files(work) == before
