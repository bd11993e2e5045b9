"""Junk, truncated, huge and hostile weights: refused in one line, unexecuted, before they take memory."""

from __future__ import annotations

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
from command import Evil, assert_refused, command
from safetensors.torch import save

from flowdistill import models
from flowdistill.taps import DataSpec

IT = "weights file it.safetensors"
NO_SAFETENSORS = f"{IT}: not a valid safetensors file (damaged, truncated, or something else)"
SILENT = f"{IT} does not say its model and data; evaluate a run's student.safetensors or a run's number"
DAMAGED = "cannot be read as a dictionary of named tensors (damaged, or with something else in it, which is never executed)"
NO_STUDENT, NO_TEACHER = f"{IT}: {DAMAGED}", f"weights file it.pt: {DAMAGED}"
CURE = "use weights trained on the same data"
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


def pt(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


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
    "junk": (lambda: b"junk" * 10, NO_SAFETENSORS),
    "empty": (lambda: b"", NO_SAFETENSORS),
    "truncated": (lambda: student()[:-100], NO_SAFETENSORS),
    "a head alone": (lambda: student()[:50], NO_SAFETENSORS),
    "a head of 2^63 bytes": (lambda: struct.pack("<Q", 1 << 63) + student()[8:], NO_SAFETENSORS),
    "a head beyond the file": (lambda: struct.pack("<Q", 90_000_000) + student()[8:], NO_SAFETENSORS),
    "a head of nothing": (lambda: struct.pack("<Q", 4) + b"null", NO_SAFETENSORS),
    "a tensor beyond the file": (
        lambda: struct.pack("<Q", 66) + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}' + bytes(4),
        NO_SAFETENSORS,
    ),
    "a pickle": (lambda: pt(Evil()), NO_SAFETENSORS),
    "a foreign file": (lambda: save(weights()), SILENT),
    "no JSON": (lambda: save(weights(), {"flowdistill": "{broken"}), NO_STUDENT),
    "a list": (lambda: save(weights(), {"flowdistill": "[1, 2]"}), SILENT),
    "nested deeply": (lambda: save(weights(), {"flowdistill": "[" * 100_000}), NO_STUDENT),
    "no input": (lambda: student(input=...), SILENT),
    "an unknown model": (lambda: student(model="resnet9"), f"{IT}: unknown model 'resnet9': did you mean 'resnet8'?"),
    "a number as model": (lambda: student(model=20), f"{IT}: model=20: input should be a valid string"),
    "another model": (
        lambda: student(model="resnet14"),
        "it.safetensors does not fit resnet14: it lacks 'layer1.1.bn1.bias'; name the model as MODEL@FILE",
    ),
    "a trillion classes": (lambda: student(classes=10**12), f"{IT}: classes=1000000000000: input should be less than 2147483648"),
    "a billion classes": (
        lambda: student(classes=10**9),
        f"it.safetensors does not fit resnet8 with 1000000000 classes: fc.weight is (3, 64), needs (1000000000, 64); {CURE}",
    ),
    "four classes": (
        lambda: student(classes=4),
        f"it.safetensors does not fit resnet8 with 4 classes: fc.weight is (3, 64), needs (4, 64); {CURE}",
    ),
    "minus one class": (lambda: student(classes=-1), f"{IT}: classes=-1: input should be greater than or equal to 1"),
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
        f"it.safetensors does not fit resnet8 with 3 classes: conv1.weight is (16, 1, 3, 3), needs (16, 3, 3, 3); {CURE}",
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
    "no images": (lambda: student(images=0), f"{IT}: images=0: input should be greater than or equal to 1"),
    "hostile names": (lambda: student(model="\x1b[2J\n"), rf"{IT}: unknown model '\x1b[2J\n': choose from: {MODELS}"),
}

TEACHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "junk": (lambda: b"junk" * 99, NO_TEACHER),
    "empty": (lambda: b"", NO_TEACHER),
    "truncated": (lambda: pt(weights())[:-100], NO_TEACHER),
    "a pickle that would run code": (lambda: pickle.dumps(Evil()), NO_TEACHER),
    "weights and code": (lambda: pt(weights() | {"evil": Evil()}), NO_TEACHER),
    "a whole module": (lambda: pt(models.build("resnet8", SPEC)), NO_TEACHER),
    "a list": (lambda: pt([torch.zeros(2)]), NO_TEACHER),
    "numbers": (lambda: pt({"epoch": 3}), NO_TEACHER),
    "a safetensors file": (student, NO_TEACHER),
    "a bomb": (pt_bomb, NO_TEACHER),
    "one number repeated to terabytes": (lambda: pt(weights() | {"fc.weight": torch.zeros(1).expand(1 << 42)}), NO_TEACHER),
    "a tensor of nothing": (lambda: pt(weights() | {"fc.weight": torch.empty(1 << 42, device="meta")}), NO_TEACHER),
    "a sparse tensor": (lambda: pt(weights() | {"fc.weight": torch.zeros(3, 64).to_sparse()}), NO_TEACHER),
    "complex numbers": (lambda: pt(weights() | {"fc.weight": torch.zeros(3, 64, dtype=torch.complex64)}), NO_TEACHER),
    "another model": (
        lambda: pt(weights("resnet14")),
        "it.pt does not fit resnet8: it has 'layer1.1.bn1.bias', which the network has not; name the model as MODEL@FILE",
    ),
    "more than the model has": (
        lambda: pt(weights() | {"extra": torch.zeros(1)}),
        "it.pt does not fit resnet8: it has 'extra', which the network has not; name the model as MODEL@FILE",
    ),
    "other classes": (
        lambda: pt(weights(spec=DataSpec("it", 12, 10, 1, 8, 8))),
        "kd: resnet14 has 3 classes, resnet8 10; logits are compared class by class, so train both on the same classes or use a method on "
        "feature maps",
    ),
    "another width": (
        lambda: pt(weights() | {"conv1.weight": torch.zeros(32, 1, 3, 3)}),
        f"it.pt does not fit resnet8 with 3 classes: conv1.weight is (32, 1, 3, 3), needs (16, 1, 3, 3); {CURE}",
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
