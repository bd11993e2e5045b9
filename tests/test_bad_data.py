"""Junk, truncated, huge and hostile data: refused in one line, unexecuted, before it takes memory."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Evil, assert_refused

from flowdistill.data.sources import read_npz
from flowdistill.env import memory


def arrays(**changed: Any) -> dict[str, Any]:
    """A small correct data set, but for what is changed: 12 and 6 images of 3 classes."""
    images = np.zeros((12, 8, 8), np.uint8)
    return {"x_train": images, "y_train": np.arange(12) % 3, "x_test": images[:6], "y_test": np.arange(6) % 3} | changed


def npz(**changed: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays(**changed))
    return file.getvalue()


def npy(shape: tuple[int, ...], content: bytes, dtype: str = "|u1", version: int = 1) -> bytes:
    """An array's file with a header that claims what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + content


def npz_with(x_train: bytes, claimed: int | None = None) -> bytes:
    """A correct data set but for one member, of which the zip's directory may claim another size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays().items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                if key == "x_train":
                    member.write(x_train)
                else:
                    np.save(member, array)
        if claimed is not None:
            archive.getinfo("x_train.npy").file_size = claimed
    return file.getvalue()


def zipped(**members: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def one_array() -> bytes:
    file = io.BytesIO()
    np.save(file, arrays()["x_train"])
    return file.getvalue()


ZEROS = bytes(100 << 20)
PETABYTE = (10**6, 31_250, 32_000)
UNREADABLE = "not a readable npz file of plain arrays (damaged, no zip, or with pickled objects in it)"
NEEDS = "needs ['x_train', 'y_train', 'x_test', 'y_test']"

DATA: dict[str, tuple[Callable[[], bytes], str]] = {
    "junk": (lambda: b"junk" * 99, UNREADABLE),
    "empty": (lambda: b"", UNREADABLE),
    "truncated": (lambda: npz()[:-300], UNREADABLE),
    "one array, no zip": (one_array, UNREADABLE),
    "one array that claims a petabyte, no zip": (lambda: npy(PETABYTE, b""), UNREADABLE),
    "a pickle": (lambda: pickle.dumps(Evil()), UNREADABLE),
    "objects": (lambda: npz(x_train=np.array([Evil()] * 12, dtype=object)), UNREADABLE),
    "a zip of no arrays": (lambda: zipped(readme="hello"), f"key 'x_train' is missing; it has ['readme'], {NEEDS}"),
    "members that are no arrays": (lambda: zipped(**{f"{key}.npy": "no array" for key in arrays()}), UNREADABLE),
    "a key missing": (
        lambda: zipped(**{"x_train.npy": "", "y_train.npy": "", "x_test.npy": ""}),
        f"key 'y_test' is missing; it has ['x_test', 'x_train', 'y_train'], {NEEDS}",
    ),
    "a header of nonsense": (lambda: npz_with(npy((12, 8, 8), bytes(768)).replace(b"descr", b"dtype")), UNREADABLE),
    "a header that would run code": (lambda: npz_with(npy((12, 8, 8), bytes(768), "'+open('executed','w').name+'")), UNREADABLE),
    "a header of a type unknown": (lambda: npz_with(npy((12, 8, 8), bytes(768), "|x9")), UNREADABLE),
    "a header of gigabytes": (lambda: npz_with(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + ZEROS), UNREADABLE),
    "a header that claims a petabyte": (lambda: npz_with(npy(PETABYTE, bytes(768))), UNREADABLE),
    "a header that claims less than nothing": (lambda: npz_with(npy((-12, 8, 8), bytes(768))), UNREADABLE),
    "a bomb that header and directory own up to": (
        lambda: npz_with(npy(PETABYTE, ZEROS), len(npy(PETABYTE, b"")) + 10**15),
        f"its arrays take 1,000,000,000,000,999 bytes, over half of this machine's memory ({memory() // 2:,}); give fewer images",
    ),
    "a bomb behind an innocent header": (lambda: npz_with(npy((12, 8, 8), ZEROS)), UNREADABLE),
    "a bomb behind an innocent directory": (lambda: npz_with(npy((12, 8, 8), ZEROS), len(npy((12, 8, 8), b"")) + 768), UNREADABLE),
    "float images": (lambda: npz(x_train=np.zeros((12, 8, 8))), "x_train is float64, must be uint8 (0 to 255)"),
    "flat images": (
        lambda: npz(x_test=np.zeros((6, 64), np.uint8)),
        "x_test has shape (6, 64), must be [N, H, W, C] or [N, H, W], none of them 0",
    ),
    "channels first": (
        lambda: npz(x_train=np.zeros((12, 3, 5, 8), np.uint8)),
        "x_train has shape (12, 3, 5, 8), which looks like [N, C, H, W]; transpose it to [N, H, W, C]",
    ),
    "one channel first": (
        lambda: npz(x_test=np.zeros((6, 1, 8, 8), np.uint8)),
        "x_test has shape (6, 1, 8, 8), which looks like [N, C, H, W]; transpose it to [N, H, W, C]",
    ),
    "no images": (
        lambda: npz(x_train=np.zeros((0, 8, 8), np.uint8), y_train=np.arange(0)),
        "x_train has shape (0, 8, 8), must be [N, H, W, C] or [N, H, W], none of them 0",
    ),
    "images of no size": (
        lambda: npz(x_train=np.zeros((12, 0, 8), np.uint8)),
        "x_train has shape (12, 0, 8), must be [N, H, W, C] or [N, H, W], none of them 0",
    ),
    "images of two sizes": (lambda: npz(x_test=np.zeros((6, 7, 8), np.uint8)), "x_train is (8, 8, 1) an image, x_test (7, 8, 1)"),
    "a label short": (lambda: npz(y_train=np.arange(11) % 3), "y_train has 11 labels for 12 images"),
    "labels of fractions": (lambda: npz(y_train=np.arange(12) % 3.0), "y_train is float64 (12,), must be integers [N]"),
    "one-hot labels": (lambda: npz(y_train=np.eye(3, dtype=int)[np.arange(12) % 3]), "y_train is int64 (12, 3), must be integers [N]"),
    "negative labels": (lambda: npz(y_train=np.arange(12) % 3 - 1), "y_train has labels from -1 to 1; labels start at 0 and end at K-1"),
    "labels beyond 64 bits": (
        lambda: npz(y_test=np.array([2**64 - 1] * 6, np.uint64)),
        "y_test has labels from 18446744073709551615 to 18446744073709551615; labels start at 0 and end at K-1",
    ),
    "a gap in the classes": (
        lambda: npz(y_train=np.arange(12) % 3 * 2),
        "class 1 has no training image; labels must be 0 to K-1 with every class present",
    ),
    "one class": (lambda: npz(y_train=np.zeros(12, int), y_test=np.zeros(6, int)), "y_train has a single class; a classifier needs two"),
    "a test label beyond": (lambda: npz(y_test=np.arange(6)), "y_test has label 5, but y_train ends at 2"),
    "hostile names": (lambda: zipped(**{"\x1b[2J\n": ""}), rf"key 'x_train' is missing; it has ['\x1b[2J\n'], {NEEDS}"),
}


@pytest.mark.parametrize(("make", "line"), DATA.values(), ids=DATA.keys())
def test_wrong_data_are_told_in_one_line(tmp_path: Path, make: Callable[[], bytes], line: str) -> None:
    (tmp_path / "it.npz").write_bytes(make())
    words = ["train", "--model", "resnet8", "--batch-size", "4", "--dataset", "npz:it.npz"]
    assert_refused(tmp_path, words, f"npz:it.npz: {line}")


@pytest.mark.parametrize(
    "make", [npz, lambda: npz_with(npy((12, 8, 8), bytes(768))), lambda: npz_with(npy((12, 8, 8), bytes(768), version=2))]
)
def test_the_same_without_the_mistake_is_read(tmp_path: Path, make: Callable[[], bytes]) -> None:
    (tmp_path / "it.npz").write_bytes(make())
    assert read_npz(tmp_path / "it.npz").x_train.tolist() == np.zeros((12, 8, 8, 1)).tolist()


@pytest.mark.parametrize("shape", [(12, 3, 8, 4), (12, 1, 9, 3), (12, 5, 8, 8), (12, 8, 8, 5), (12, 3, 4, 8), (12, 3, 8)])
def test_what_may_be_channels_last_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "it.npz").write_bytes(npz(x_train=np.zeros(shape, np.uint8), x_test=np.zeros((6, *shape[1:]), np.uint8)))
    assert read_npz(tmp_path / "it.npz").x_train.shape == (shape if len(shape) == 4 else (*shape, 1))


@pytest.mark.parametrize(("place", "what"), [("folder", "a folder"), ("pipe", "a device or pipe"), ("/dev/zero", "a device or pipe")])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, place: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    line = f"npz:{place}: {what}, not a file; name a regular file"
    assert_refused(tmp_path, ["train", "--model", "resnet8", "--dataset", f"npz:{place}"], line)


def test_the_trap_is_armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").exists()
