"""Junk, truncated, huge and hostile weights: refused in one line, unexecuted, before they take memory."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import shlex
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import Evil, assert_refused, command
from safetensors.torch import save

from flowdistill import models
from flowdistill.types import DataSpec

IT = "weights file it.safetensors"
NO_SAFETENSORS = f"{IT}: not a valid safetensors file (damaged, truncated, or something else)"
SILENT = f"{IT} does not say its model and data; evaluate a run's student.safetensors or a run's number"
NO_JSON = f"{IT}: what it says of itself is no JSON (damaged); put a sound copy there"
PT = "weights file it.pt"
UNKNOWN = "cannot be read: neither safetensors nor written by torch.save (damaged, truncated, or something else)"
PLAIN = "save its tensors: torch.save(model.state_dict(), 'plain.pth')"
DENSE = "save a state_dict of dense tensors of real numbers"
NO_TABLE = "cannot be read as a dictionary of named tensors (damaged, truncated, or something else)"
NONE = "it holds no table of named tensors that could be a network's"
UNPACK = "unpack it, and name the file inside"
TWO = "(2 of 56 shapes differ)"
CURE = "it has 3 classes: use weights trained on the same data"
MODELS = ", ".join(models.MODELS)

SPEC = DataSpec("it", 12, 3, 1, 8, 8)
ABOUT: dict[str, Any] = {
    "model": "resnet8", "classes": 3, "input": [1, 8, 8], "mean": [0.5], "std": [0.5], "data": {"name": "npz:it.npz"},
    "data_hash": "", "precision": "fp32", "correct": 3, "images": 6,
}  # fmt: skip


def weights(model: str = "resnet8", spec: DataSpec = SPEC) -> dict[str, torch.Tensor]:
    return dict(models.build(model, spec).state_dict())


def student(**changed: Any) -> bytes:
    """A student's file, but for what is changed of what it says."""
    about = {key: value for key, value in (ABOUT | changed).items() if value is not ...}
    return save(weights(), {"format": "pt", "flowdistill": json.dumps(about)})


def pt(content: Any, *, zipped: bool = True, protocol: int = 2) -> bytes:
    return written(torch.save, content, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)


def written(write: Callable[..., Any], content: Any, **how: Any) -> bytes:
    """What a function writes into a file."""
    file = io.BytesIO()
    write(content, file, **how)
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def held(file: str, what: str) -> str:
    """The line on a pickle that holds more than tensors."""
    return (
        f"weights file {file}: it holds {what}, and of a pickle nothing but tensors and plain values is read, for the rest is code; where "
        f"you "
        f"trust it, write a plain file in Python: torch.save(torch.load('{file}', weights_only=False)['state_dict'], 'plain.pth') (by the "
        f"key "
        f"that it has; of a whole module its .state_dict())"
    )


def pt_bomb() -> bytes:
    """PyTorch's own file, its tensors compressed: 40 MB in 200 kB."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pt({"fc.weight": torch.zeros(10 << 20)}))) as stored,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    return file.getvalue()


STUDENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "junk": (lambda: b"junk" * 10, f"{IT}: {UNKNOWN}"),
    "empty": (lambda: b"", f"{IT}: an empty file; copy it again"),
    "truncated": (lambda: student()[:-100], NO_SAFETENSORS),
    "a head alone": (lambda: student()[:50], NO_SAFETENSORS),
    "a head of 2^63 bytes": (lambda: struct.pack("<Q", 1 << 63) + student()[8:], NO_SAFETENSORS),
    "a head beyond the file": (lambda: struct.pack("<Q", 90_000_000) + student()[8:], NO_SAFETENSORS),
    "a head of nothing": (lambda: struct.pack("<Q", 4) + b"null", f"{IT}: {UNKNOWN}"),
    "a tensor beyond the file": (
        lambda: struct.pack("<Q", 66) + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}' + bytes(4),
        NO_SAFETENSORS,
    ),
    "a pickle": (lambda: pt(Evil()), held("it.safetensors", "exec")),
    "a foreign file": (lambda: save(weights()), SILENT),
    "no JSON": (lambda: save(weights(), {"flowdistill": "{broken"}), NO_JSON),
    "a list": (lambda: save(weights(), {"flowdistill": "[1, 2]"}), SILENT),
    "nested deeply": (lambda: save(weights(), {"flowdistill": "[" * 100_000}), NO_JSON),
    "no input": (lambda: student(input=...), SILENT),
    "an unknown model": (lambda: student(model="resnet9"), f"{IT}: unknown model 'resnet9': did you mean 'resnet8'?"),
    "a number as model": (lambda: student(model=20), f"{IT}: model=20: input should be a valid string"),
    "another model": (
        lambda: student(model="resnet14"),
        "it.safetensors does not fit resnet14: it lacks 'layer1.1.conv1.weight', 'layer1.1.bn1.weight' and 28 more (92 names are wanted, "
        "it has 56); these are the weights of a resnet8; name that model",
    ),
    "a trillion classes": (lambda: student(classes=10**12), f"{IT}: classes=1000000000000: input should be less than 2147483648"),
    "a billion classes": (
        lambda: student(classes=10**9),
        f"it.safetensors does not fit resnet8 with 1000000000 classes: fc.weight is (3, 64), needs (1000000000, 64) {TWO}; {CURE}",
    ),
    "four classes": (
        lambda: student(classes=4),
        f"it.safetensors does not fit resnet8 with 4 classes: fc.weight is (3, 64), needs (4, 64) {TWO}; {CURE}",
    ),
    "minus one class": (lambda: student(classes=-1), f"{IT}: classes=-1: input should be greater than or equal to 0"),
    "classes in words": (lambda: student(classes="x"), f"{IT}: classes='x': input should be a valid integer"),
    "one size": (lambda: student(input=[3]), f"{IT}: input.1: field required"),
    "sizes of fractions": (lambda: student(input=[1e9, 1e9, 3]), f"{IT}: input.0=1000000000.0: input should be a valid integer"),
    "a billion channels": (
        lambda: student(input=[10**9, 8, 8], mean=[0.5], std=[0.5]),
        f"{IT}: mean and std must have 1000000000 values, one a channel",
    ),
    "a billion pixels": (
        lambda: student(input=[1, 10**9, 10**9]),
        "resnet8 can't take images of 1000000000x1000000000: Storage size calculation overflowed with "
        "sizes=[1, 16, 1000000000, 1000000000]",
    ),
    "three channels": (
        lambda: student(input=[3, 8, 8], mean=[0.5] * 3, std=[0.5] * 3),
        "it.safetensors does not fit resnet8 with 3 classes: conv1.weight is (16, 1, 3, 3), needs (16, 3, 3, 3); it is for images of "
        "1 channel: set data.channels=1",
    ),
    "a mean too many": (lambda: student(mean=[0.5, 0.5]), f"{IT}: mean and std must have 1 values, one a channel"),
    "no deviation": (lambda: student(std=[0.0]), f"{IT}: std.0=0.0: input should be greater than 0"),
    "a mean that is none": (lambda: student(mean=[float("nan")]), f"{IT}: mean.0=nan: input should be a finite number"),
    "data of another kind": (lambda: student(data="it.npz"), f"{IT}: data='it.npz': must be a table of keys"),
    "data with more to it": (
        lambda: student(data={"name": "npz:it.npz", "bytes": 3}),
        f"{IT}: unknown key 'data.bytes': choose from: name, root, crop, pad, flip, randaugment, limit_train, "
        "size, channels, skip_broken, unlabelled, stream, label",
    ),
    "a size that npz data has not": (
        lambda: student(data={"name": "npz:it.npz", "size": 3}),
        f"{IT}: data: size=3 belongs to folder:PATH, csv:FILE and hf:NAME, not to npz:it.npz; leave it out",
    ),
    "a name too few": (
        lambda: student(labels=["cat", "dog"]),
        f"{IT}: labels must have 3 names, one a class",
    ),
    "other data": (
        lambda: student(data={"name": "digits"}),
        "it.safetensors was trained on 1x8x8 images of 3 classes; digits has 1x16x16 of 10; choose a data set of that shape",
    ),
    "data that are gone": (lambda: student(data={"name": "npz:gone.npz"}), "npz:gone.npz: no such file"),
    "an unknown precision": (lambda: student(precision="int4"), f"{IT}: precision='int4': input should be 'bf16' or 'fp32'"),
    "no images": (lambda: student(images=0), f"{IT}: a network with classes says how many of how many images it gets right"),
    "hostile names": (lambda: student(model="\x1b[2J\n"), rf"{IT}: unknown model '\x1b[2J\n': choose from: {MODELS}"),
}

TEACHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "junk": (lambda: b"junk" * 99, f"{PT}: {UNKNOWN}"),
    "empty": (lambda: b"", f"{PT}: an empty file; copy it again"),
    "truncated": (lambda: pt(weights())[:-100], f"{PT}: a zip archive that can't be read (damaged or truncated); copy it again"),
    "truncated, of the old format": (lambda: pt(weights(), zipped=False)[:-100], f"{PT}: {NO_TABLE}; copy it again"),
    "a pickle that would run code": (
        lambda: pickle.dumps(Evil()),
        f"{PT}: a pickle that torch.save did not write, which is never executed; {PLAIN}",
    ),
    "weights and code": (lambda: pt(weights() | {"evil": Evil()}), held("it.pt", "exec")),
    "code of the old format": (lambda: pt({"state_dict": weights(), "evil": Evil()}, zipped=False), held("it.pt", "exec")),
    "options beside weights": (
        lambda: pt({"state_dict": weights(), "args": argparse.Namespace(lr=0.1)}),
        held("it.pt", "argparse.Namespace"),
    ),
    "a number of numpy": (lambda: pt({"model": weights(), "acc": np.float64(93.1)}), held("it.pt", "numpy._core.multiarray.scalar")),
    "a whole module": (lambda: pt(models.build("resnet8", SPEC)), held("it.pt", "flowdistill.models.cifar_resnet.CifarResNet")),
    "a list": (lambda: pt([torch.zeros(2, 2)]), f"{PT}: {NONE}; {PLAIN}"),
    "numbers": (lambda: pt({"epoch": 3, "loss": torch.tensor(1.0)}), f"{PT}: {NONE} (its keys: epoch, loss); {PLAIN}"),
    "an optimiser": (
        lambda: pt({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}, "x": {"exp_avg": torch.zeros(2, 2)}}, "param_groups": []}}),
        f"{PT}: {NONE} (its keys: optimizer); {PLAIN}",
    ),
    "two networks": (
        lambda: pt({"model": weights(), "ema": {"module": weights("resnet14")}}),
        f"{PT} holds several networks: model (56 tensors, 77,980 values), ema.module (92 tensors, 175,650 values); choose one as FILE#KEY, "
        "such as 'it.pt#model'",
    ),
    "another pickle_protocol": (
        lambda: pt(weights(), protocol=5),
        f"{PT}: cannot be read as a dictionary of named tensors (written with another pickle_protocol than 2); {PLAIN}",
    ),
    "TorchScript": (
        lambda: zipped({"it/data.pkl": b"", "it/constants.pkl": b""}),
        f"{PT}: TorchScript, which is a program; save its weights where you trust it: torch.save(torch.jit.load(FILE).state_dict(), "
        "'plain.pth')",
    ),
    "a program of torch.export": (
        lambda: zipped({"it/archive_format": b"pt2", "it/models/model.json": b"{}"}),
        f"{PT}: written by torch.export, which is a program; save its weights where you trust it: "
        "torch.save(torch.export.load(FILE).state_dict, 'plain.pth')",
    ),
    "arrays": (
        lambda: written(lambda it, file: np.savez(file, **it), {"a": np.zeros((2, 2))}),
        f"{PT}: arrays of numpy; write them as tensors: torch.save({{name: torch.from_numpy(array) for name, array in "
        "numpy.load(FILE).items()}, 'plain.pth')",
    ),
    "an array": (
        lambda: written(lambda it, file: np.save(file, it), np.zeros((2, 2))),
        f"{PT}: an array of numpy; name its tensors: torch.save({{name: torch.from_numpy(array), ...}}, 'plain.pth')",
    ),
    "HDF5": (
        lambda: b"\x89HDF\r\n\x1a\n" + bytes(500),
        f"{PT}: HDF5, as Keras writes it; put its values into the PyTorch network, and {PLAIN}",
    ),
    "ONNX": (
        lambda: b"\x08\x0a\x12\x07pytorch\x1a\x05" + bytes(50),
        f"{PT}: an ONNX file, which is a program; of the network that it was made of, {PLAIN}",
    ),
    "a pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        f"{PT}: a pointer of Git LFS, not the file that it stands for; fetch that: git lfs pull",
    ),
    "a page": (
        lambda: b"\n<!DOCTYPE html><html></html>",
        f"{PT}: a web page, not the file that it leads to; download that",
    ),
    "an index": (
        lambda: b'{"metadata": {"total_size": 3}, "weight_map": {"fc.bias": "model-00001-of-00002.safetensors"}}',
        f"{PT}: an index of several files; join the files that it lists, read by safetensors.torch.load_file (or torch.load): whole = "
        f"{{}}; "
        "[whole.update(load_file(file)) for file in FILES]; torch.save(whole, 'plain.pth')",
    ),
    "compressed": (lambda: gzip.compress(pt(weights())), f"{PT}: an archive; {UNPACK}"),
    "in a zip": (lambda: zipped({"it.pt": pt(weights())}), f"{PT}: a zip archive that torch.save did not write; {UNPACK}"),
    "a bomb": (pt_bomb, f"{PT}: its content is larger than the file, which torch.save never writes; {PLAIN}"),
    "one number repeated to terabytes": (
        lambda: pt(weights() | {"fc.weight": torch.zeros(1).expand(1 << 42)}),
        f"{PT}: its 'fc.weight' is larger than what the file holds of it; {DENSE}",
    ),
    "a tensor of nothing": (
        lambda: pt(weights() | {"fc.weight": torch.empty(1 << 42, device="meta")}),
        f"{PT}: its 'fc.weight' is on the device meta, without values; {DENSE}",
    ),
    "a sparse tensor": (
        lambda: pt(weights() | {"fc.weight": torch.zeros(3, 64).to_sparse()}),
        f"{PT}: its 'fc.weight' is a sparse tensor; {DENSE}",
    ),
    "complex numbers": (
        lambda: pt(weights() | {"fc.weight": torch.zeros(3, 64, dtype=torch.complex64)}),
        f"{PT}: its 'fc.weight' is of complex numbers; {DENSE}",
    ),
    "complex numbers in safetensors": (
        lambda: save(weights() | {"fc.weight": torch.zeros(3, 64, dtype=torch.complex64)}),
        f"{PT}: its 'fc.weight' is of complex numbers; {DENSE}",
    ),
    "whole numbers": (
        lambda: pt(weights() | {"fc.weight": torch.zeros(3, 64, dtype=torch.int8)}),
        "it.pt does not fit resnet8: fc.weight is int8, needs floating point; use weights that are not quantised",
    ),
    "another model": (
        lambda: pt(weights("resnet14")),
        "it.pt does not fit resnet8: it has 'layer1.1.conv1.weight', 'layer1.1.bn1.weight' and 34 more, which the network has not (56 "
        "names "
        "are wanted, it has 92); these are the weights of a resnet14; name that model",
    ),
    "more than the model has": (
        lambda: pt(weights() | {"extra": torch.zeros(1)}),
        "it.pt does not fit resnet8: it has 'extra', which the network has not (56 names are wanted, it has 57); use weights of this very "
        "network",
    ),
    "counts of thop": (
        lambda: pt(weights() | {"total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)}),
        "it.pt does not fit resnet8: it has 'total_ops', 'layer1.total_params', which the network has not (56 names are wanted, it has "
        "58); "
        "thop left them; save the weights without them",
    ),
    "less than the model has": (
        lambda: pt({name: value for name, value in weights().items() if name != "fc.bias"}),
        "it.pt does not fit resnet8: it lacks 'fc.bias' (56 names are wanted, it has 55); use weights of this very network",
    ),
    "other names": (
        lambda: pt({name.replace("layer1.", "block1."): value for name, value in weights().items()}),
        "it.pt does not fit resnet8: it lacks 'layer1.0.conv1.weight', 'layer1.0.bn1.weight' and 8 more and it has "
        "'block1.0.conv1.weight', "
        "'block1.0.bn1.weight' and 10 more, which the network has not (56 names are wanted, it has 56); all 47 shapes agree in order, so "
        "the "
        "names alone may differ (block1.0.conv1.weight for layer1.0.conv1.weight): save them under the network's",
    ),
    "a name misspelt, and another shape": (
        lambda: pt(
            {name.replace("layer1.0.conv1.w", "layer1.0.convl.w"): value for name, value in weights().items()} | {"fc.bias": torch.zeros(9)}
        ),
        "it.pt does not fit resnet8: it lacks 'layer1.0.conv1.weight' and it has 'layer1.0.convl.weight', which the network has not (56 "
        "names "
        "are wanted, it has 56); is layer1.0.convl.weight what the network calls layer1.0.conv1.weight? use weights of this very network",
    ),
    "two networks in one table": (
        lambda: pt({f"{net}.{name}": value for net in ("student", "teacher") for name, value in weights().items()}),
        "it.pt does not fit resnet8: it lacks 'conv1.weight', 'bn1.weight' and 45 more and it has 'student.conv1.weight', "
        "'student.bn1.weight' and 110 more, which the network has not (56 names are wanted, it has 112); those that begin with 'student', "
        "'teacher' fit; name them as it.pt#student or it.pt#teacher",
    ),
    "names without end": (
        lambda: pt({"x" * 100_000: torch.zeros(3, 3), "\x1b[2J": torch.zeros(3, 3)}),
        f"it.pt does not fit resnet8: it lacks 'conv1.weight', 'bn1.weight' and 45 more and it has '{'x' * 28}...{'x' * 28}', "
        "'\\x1b[2J', which the network has not (56 names are wanted, it has 2); use weights of this very network",
    ),
    "three channels": (
        lambda: pt(weights(spec=DataSpec("it", 12, 3, 3, 8, 8))),
        "it.pt does not fit resnet8 with 3 classes: conv1.weight is (16, 3, 3, 3), needs (16, 1, 3, 3); it is for images of 3 channels: "
        "set "
        "inputs.teacher.channels=3 (or inputs.student)",
    ),
    "other classes": (
        lambda: pt(weights(spec=DataSpec("it", 12, 10, 1, 8, 8))),
        "kd: resnet14 has 3 classes, resnet8 10; logits are compared class by class, so train both on the same classes or use a method on "
        "feature maps",
    ),
    "another width": (
        lambda: pt(weights() | {"conv1.weight": torch.zeros(32, 1, 3, 3)}),
        "it.pt does not fit resnet8 with 3 classes: conv1.weight is (32, 1, 3, 3), needs (16, 1, 3, 3); it is of another width or kind; "
        "use "
        "weights of this very network",
    ),
    "no numbers": (
        lambda: pt({name: value * torch.nan for name, value in weights().items()}),
        "teacher resnet8: its answer (logits) is not finite for 6 of 6 images that it is measured on; mend it, or choose another",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The data that the weights were trained on."""
    images = np.zeros((12, 8, 8), np.uint8)
    np.savez(tmp_path / "it.npz", x_train=images, y_train=np.arange(12) % 3, x_test=images[:6], y_test=np.arange(6) % 3)
    return tmp_path


@pytest.mark.parametrize(("make", "line"), STUDENTS.values(), ids=STUDENTS.keys())
def test_a_wrong_student_is_told_in_one_line(folder: Path, make: Callable[[], bytes], line: str) -> None:
    (folder / "it.safetensors").write_bytes(make())
    assert_refused(folder, ["evaluate", "it.safetensors"], line)


DISTILL = shlex.split("distill --dry-run --student resnet14 --dataset npz:it.npz --set data.pad=1 --batch-size 4 --method kd --teacher")


@pytest.mark.parametrize(("make", "line"), TEACHERS.values(), ids=TEACHERS.keys())
def test_a_wrong_teacher_is_told_in_one_line(folder: Path, make: Callable[[], bytes], line: str) -> None:
    (folder / "it.pt").write_bytes(make())
    assert_refused(folder, [*DISTILL, "resnet8@it.pt"], line)


def test_the_same_without_the_mistake_are_taken(folder: Path) -> None:
    (folder / "it.safetensors").write_bytes(student())
    (folder / "it.pt").write_bytes(pt(weights()))
    assert command(folder, "evaluate", "it.safetensors").code == 0
    assert command(folder, *DISTILL, "resnet8@it.pt").code == 0


REFERENCES = {
    "none.ckpt": "weights file none.ckpt: no such file",
    "none#model": f"unknown model 'none#model': choose from: {MODELS}",
    "resnet8@none.pt#model": "weights file none.pt#model: no such file",
    "me@home/none.pt": f"unknown model 'me': choose from: {MODELS}",
    "/data/me@home/none.pt": "weights file /data/me@home/none.pt: no such file",
    "it.pt": "weights file it.pt does not say its model; its weights are those of a resnet8: write resnet8@it.pt",
    "odd.pt": f"weights file odd.pt does not say its model; write MODEL@odd.pt with one of: {MODELS}, timm:NAME, torchvision:NAME, "
    "FILE.py:FUNCTION",
    "resnet8@it.pt#ema": "weights file it.pt: it has no 'ema'; its names begin with conv1, bn1, layer1, layer2, layer3, fc",
    "resnet8@two.pt#ema": "weights file two.pt: it has no 'ema'; it has model (56 tensors, 77,980 values), model.ema (56 tensors, 77,980 "
    "values)",
}


@pytest.mark.parametrize(("reference", "line"), REFERENCES.items(), ids=REFERENCES.keys())
def test_a_wrong_reference_is_told_in_one_line(folder: Path, reference: str, line: str) -> None:
    (folder / "it.pt").write_bytes(pt(weights()))
    (folder / "odd.pt").write_bytes(pt({"a": torch.zeros(2, 2)}))
    (folder / "two.pt").write_bytes(pt({"model": weights(), "model.ema": weights()}))
    assert_refused(folder, [*DISTILL, reference], line)


@pytest.mark.parametrize("words", [["evaluate"], [*DISTILL[:-1], "--teacher"]], ids=["evaluate", "distill"])
@pytest.mark.parametrize(
    ("place", "what"), [("./folder", "a folder"), ("./pipe.pt", "a device or pipe"), ("/dev/zero", "a device or pipe")]
)
def test_what_is_no_regular_file_is_not_read(folder: Path, words: list[str], place: str, what: str) -> None:
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.pt")
    assert_refused(
        folder,
        [*words, f"resnet8@{place}" if "distill" in words else place],
        f"weights file {Path(place)}: {what}, not a file; name a regular file",
    )
