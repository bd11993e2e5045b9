"""Image files: ``folder:PATH`` and ``csv:FILE`` give the pixels that were written, and train as the same arrays do."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from helpers.command import assert_refused, command
from helpers.image_files import NAMES, csv_data, digits, folder_data, on, write
from helpers.interruptions import cut_off
from helpers.small import config
from PIL import Image

from flowdistill.checks import UserError
from flowdistill.data import image_files
from flowdistill.data.batches import DeviceData
from flowdistill.data.dataset import ImageData
from flowdistill.env import memory
from flowdistill.ledger import Ledger
from flowdistill.report.card import page
from flowdistill.runner import load_network, resume, run
from flowdistill.runner.card import measure
from flowdistill.runner.evaluate import evaluate

CPU = torch.device("cpu")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """90 digits to train on and 30 to test on, in folders."""
    write(tmp_path / "birds" / "train", *digits(90))
    write(tmp_path / "birds" / "test", *digits(30, 90))
    return tmp_path / "birds"


def same(data: ImageData, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> None:
    for images, labels, (own, numbers) in ((data.x_train, data.y_train, train), (data.x_test, data.y_test, test)):
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(images, own if own.ndim == 4 else own[..., None])
        np.testing.assert_array_equal(labels, numbers)


# What is read


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_gives_the_pixels_that_were_written(small: Path, test: str) -> None:
    (small / "test").rename(small / test)
    data = folder_data(small)
    same(data, digits(90), digits(30, 90))
    assert (data.name, data.classes, data.class_names, data.pad, data.flip) == ("birds", 3, NAMES, 1, True)


def test_colour_and_other_formats_come_through(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)
    labels = np.sort(np.arange(12) % 3)
    for split, kind in (("train", "bmp"), ("test", "PPM")):
        write(tmp_path / split, images, labels, kind)
    same(folder_data(tmp_path), (images, labels), (images, labels))


@pytest.mark.parametrize("header", ["path,label,split", "split,label,path"])
def test_a_csv_gives_the_pixels_that_were_written(small: Path, header: str) -> None:
    """The rows' order is kept; paths are relative to the file, wherever the command is given."""
    rows = [
        {"path": str(path.relative_to(small)), "label": path.parent.name, "split": path.parts[-3]} for path in sorted(small.rglob("*.png"))
    ][::-1]
    lines = [header, *(",".join(row[key] for key in header.split(",")) for row in rows)]
    (small / "list.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    data = csv_data(small / "list.csv")
    reversed_ = [tuple(array[::-1] for array in digits(*part)) for part in ((90,), (30, 90))]
    same(data, *reversed_)
    assert (data.name, data.class_names) == ("list", NAMES)


def test_classes_are_numbered_by_their_sorted_names(tmp_path: Path) -> None:
    paths = write(tmp_path, *digits(60))
    numbers = {"ant": "10", "bee": "9", "cat": "Z"}
    (tmp_path / "a.csv").write_text(
        "path,label\n" + "\n".join(f"{path.relative_to(tmp_path)},{numbers[path.parent.name]}" for path in paths)
    )
    data = csv_data(tmp_path / "a.csv")
    assert data.class_names == ("10", "9", "Z")
    assert np.bincount(np.concatenate([data.y_train, data.y_test])).tolist() == np.bincount(digits(60)[1]).tolist()


@pytest.mark.parametrize("by_csv", [False, True])
def test_without_a_split_a_fifth_of_each_class_is_test_by_the_content_of_its_files(tmp_path: Path, by_csv: bool) -> None:
    images, labels = digits(90)
    kept = np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in ((0, 22), (1, 23), (2, 2))])
    paths = write(tmp_path / "a", images[kept], labels[kept])
    if by_csv:
        rows = [f"a/{path.parent.name}/{path.name},{path.parent.name}" for path in paths]
        (tmp_path / "a.csv").write_text("path,label\n" + "\n".join(rows))
    data = csv_data(tmp_path / "a.csv") if by_csv else folder_data(tmp_path / "a")
    assert np.bincount(data.y_test).tolist() == [4, 5, 1]  # 4.4, 4.6 and 0.4 rounded, one at least
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    tested = [
        path
        for name, count in zip(NAMES, [4, 5, 1], strict=True)
        for path in sorted((path for path in paths if path.parent.name == name), key=digests.__getitem__)[:count]
    ]
    split = [np.flatnonzero([(path in tested) == measured for path in paths]) for measured in (False, True)]
    same(data, *((images[kept][part], labels[kept][part]) for part in split))


def test_names_do_not_decide_the_split(tmp_path: Path) -> None:
    paths = write(tmp_path / "a", *digits(60))
    before = folder_data(tmp_path / "a")
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"{-number % 97:03}.PNG"))
    after = folder_data(tmp_path / "a")
    assert before.hash != after.hash
    for one, other in ((before.x_test, after.x_test), (before.x_train, after.x_train)):
        assert sorted(image.tobytes() for image in one) == sorted(image.tobytes() for image in other)


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGB", "RGBA", "CMYK"])
def test_images_become_grey_or_colour(tmp_path: Path, mode: str, channels: int | None) -> None:
    """As grey as all files are, or as declared; without transparency."""
    chance = np.random.default_rng(0)
    kind = "tif" if mode == "CMYK" else "png"
    want = {}
    for split, label, number in itertools.product(("train", "test"), NAMES, range(2)):
        path = tmp_path / split / label / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = Image.fromarray(chance.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        image = colour.convert("RGB" if mode == "RGBA" else mode)
        if mode == "RGBA":
            image.putalpha(Image.fromarray(chance.integers(0, 256, (6, 9), dtype=np.uint8)))
        image.save(path)
        expected = channels or (1 if mode in ("L", "LA", "1") else 3)
        want[split, label, number] = np.asarray(image.convert("L" if expected == 1 else "RGB")).reshape(6, 9, expected)
    data = folder_data(tmp_path, channels=channels)
    np.testing.assert_array_equal(data.x_train, np.stack([want["train", label, number] for label in NAMES for number in range(2)]))
    np.testing.assert_array_equal(data.x_test, np.stack([want["test", label, number] for label in NAMES for number in range(2)]))


def test_one_colour_image_among_grey_ones_makes_all_colour(small: Path) -> None:
    path = next((small / "train" / "ant").iterdir())
    Image.open(path).convert("RGB").save(path)
    same(folder_data(small), *((np.stack([images] * 3, 3), labels) for images, labels in (digits(90), digits(30, 90))))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path: Path, orientation: int, kind: str) -> None:
    """The eight orientations of EXIF 2.3: where the 0th row and the 0th column of the stored image are seen."""
    upright = np.arange(40, 52, dtype=np.uint8).reshape(3, 4).repeat(16, 0).repeat(16, 1)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split, label in itertools.product(("train", "test"), NAMES):
        (tmp_path / split / label).mkdir(parents=True)
        Image.fromarray(upright).save(tmp_path / split / label / "upright.png")
        lossless = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(kind, {})
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / split / label / f"turned.{kind}", exif=exif, **lossless)
    held, streamed = (folder_data(tmp_path, channels=1, stream=stream) for stream in (False, True))
    np.testing.assert_array_equal(streamed.x_train[:], held.x_train)
    images = held.x_train[..., 0].astype(int)
    assert images.shape == (6, 48, 64)
    assert np.abs(images - upright).max() <= (1 if kind in ("jpg", "webp") else 0)  # a step of grey is 1, of a row 4
    middles = images[:, 8::16, 8::16]
    assert all(np.array_equal(np.argsort(middle, axis=None), np.arange(12)) for middle in middles)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_images_are_streamed_as_they_are_held(tmp_path: Path, orientation: int, kind: str) -> None:
    """The header's size is that of the image as it is seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for (split, label), seed in zip(itertools.product(("train", "test"), NAMES), range(6), strict=True):
        (tmp_path / split / label).mkdir(parents=True)
        image = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / split / label / f"a.{kind}", exif=exif)
    held, streamed = (folder_data(tmp_path, stream=stream) for stream in (False, True))
    assert held.x_train.shape == streamed.x_train.shape == (3, *((9, 6) if orientation > 4 else (6, 9)), 3)
    np.testing.assert_array_equal(streamed.x_train[:], held.x_train)


@pytest.mark.parametrize("size", [5, 8, 16])
def test_images_of_several_sizes_are_resized_as_torchvision_does(tmp_path: Path, size: int) -> None:
    """The very pixels of Resize and CenterCrop."""
    chance = np.random.default_rng(1)
    sides = [(8, 8), (7, 30), (31, 6), (16, 17), (40, 33), (5, 5), (16, 16), (9, 8), (8, 11), (11, 8)]
    images = {
        (split, label): [chance.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
        for split, label in itertools.product(("train", "test"), range(3))
    }
    for (split, label), own in images.items():
        (tmp_path / split / NAMES[label]).mkdir(parents=True)
        for number, image in enumerate(own):
            Image.fromarray(image).save(tmp_path / split / NAMES[label] / f"{number}.png")
    data = folder_data(tmp_path, size=size)
    torchvisions = tv.Compose([tv.Resize(size), tv.CenterCrop(size)])
    for split, images_read in (("train", data.x_train), ("test", data.x_test)):
        want = [np.asarray(torchvisions(Image.fromarray(image))) for label in range(3) for image in images[split, label]]
        np.testing.assert_array_equal(images_read, np.stack(want))


def test_what_is_hidden_is_ignored_and_what_is_no_image_is_told(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = folder_data(small)
    for hidden in (".DS_Store", "train/.cache.png", "train/ant/._0001.png"):
        (small / hidden).write_text("junk")
    (small / ".git" / "objects").mkdir(parents=True)
    assert folder_data(small).hash == before.hash
    assert capsys.readouterr().err == ""
    for other in ("README", "loose.png", "train/list.txt", "train/ant/a.txt", "train/ant/b.xml"):
        (small / other).write_text("junk")
    (small / "extra").mkdir()
    assert folder_data(small).hash == before.hash
    told = "left out, as no class's images: README, extra, loose.png and 3 more"
    assert capsys.readouterr().err == f"folder:{small}: {told}\n"


def test_folders_below_a_class_belong_to_it(small: Path) -> None:
    before = folder_data(small)
    for label in NAMES:
        first, *_ = sorted((small / "train" / label).iterdir())
        (small / "train" / label / "0").mkdir()
        first.rename(small / "train" / label / "0" / first.name)
    assert folder_data(small).hash == before.hash


def test_the_test_folder_is_read_and_val_is_not(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = folder_data(small)
    (small / "val" / "dodo").mkdir(parents=True)
    assert folder_data(small).hash == before.hash
    assert capsys.readouterr().err == f"folder:{small}: test is read, val is not\n"


def test_the_test_rows_are_read_and_val_rows_are_not(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = folder_data(small)
    rows = [f"{p.relative_to(small)},{p.parent.name},{p.parts[-3]}" for p in sorted(small.rglob("*.png"))]
    shutil.copy(small / "test" / "ant" / "0000.png", small / "more.png")
    (small / "a.csv").write_text("\n".join(["path,label,split", "more.png,dodo,val", *rows]))
    assert {array.tobytes() for array in before.x_train} == {array.tobytes() for array in csv_data(small / "a.csv").x_train}
    assert capsys.readouterr().err == f"csv:{small / 'a.csv'}: test is read, val is not\n"


def test_a_link_inside_is_followed(small: Path) -> None:
    before = folder_data(small)
    (small / "train" / "ant").rename(small / ".ants")
    (small / "train" / "ant").symlink_to("../.ants")
    assert folder_data(small).hash == before.hash


def test_a_large_folder_is_told_of(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(image_files, "PROGRESS_SECONDS", 0.0)
    folder_data(small)
    lines = [f"folder:{small}: {what} 64 of 120 images" for what in ("headers of", "decoded")]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("cores", [1, 7])
def test_the_number_of_threads_changes_nothing(small: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    same(folder_data(small), digits(90), digits(30, 90))


# Files that can't be read


def break_some(small: Path) -> list[str]:
    """Five files that can't be read, by name, each with its reason."""
    (small / "train/ant/0001.png").write_text("no image")
    whole = (small / "train/bee/0035.png").read_bytes()
    (small / "train/bee/0035.png").write_bytes(whole[:-30])
    (small / "train/cat/0070.png").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(small / "train/cat/0080.png")
    (small / "test/ant/0000.png").unlink()
    (small / "test/ant/0000.png").symlink_to("nowhere.png")
    return ["train/ant/0001.png", "train/bee/0035.png", "train/cat/0070.png", "train/cat/0080.png", "test/ant/0000.png"]


def test_broken_files_are_counted_and_the_first_three_named(small: Path) -> None:
    break_some(small)
    with pytest.raises(UserError) as told:
        folder_data(small)
    line = str(told.value)
    assert line.startswith(f"folder:{small}: 5 of 120 images can't be read: train/ant/0001.png (no image of a known format), ")
    assert [name in line for name in ("train/bee/0035.png (", "train/cat/0070.png (", "0080")] == [True, True, False]
    assert line.endswith(" and 2 more; mend or remove them, or skip them with --set data.skip_broken=true")
    assert "\n" not in line


def test_broken_files_are_skipped_where_that_is_asked_for(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = break_some(small)
    found = folder_data(small, skip_broken=True)
    assert capsys.readouterr().err.startswith(f"folder:{small}: 5 of 120 images can't be read: train/ant/0001.png (")
    for name in broken:
        (small / name).unlink()
    assert found.hash == folder_data(small).hash
    assert (len(found.y_train), len(found.y_test)) == (86, 29)


def test_a_class_of_broken_files_is_not_skipped(small: Path) -> None:
    for path in (small / "test" / "bee").iterdir():
        path.write_text("junk")
    with pytest.raises(UserError, match="class 'bee' has no test image; every class needs images of train and test"):
        folder_data(small, skip_broken=True)


# Refusals


def claim(side: int, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims so many pixels a side, bits a channel and, by its type of colour, channels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


def only(*names: str) -> Callable[[Path], None]:
    """A folder of these files, each a copy of one image, or an empty folder where the name ends with a slash."""

    def make(it: Path) -> None:
        image = next(it.rglob("*.png")).read_bytes()
        shutil.rmtree(it)
        it.mkdir()
        for name in names:
            (it / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                (it / name).mkdir()
            else:
                (it / name).write_bytes(image)

    return make


def all_are(content: bytes) -> Callable[[Path], None]:
    def make(it: Path) -> None:
        for path in it.rglob("*.png"):
            path.write_bytes(content)

    return make


@pytest.mark.parametrize(("colour", "mode"), [(0, "I;16B"), (2, "RGB;16B"), (4, "LA;16B"), (6, "RGBA;16B")])
def test_16_bits_a_channel_are_refused(small: Path, colour: int, mode: str) -> None:
    (small / "train/bee/0050.png").write_bytes(claim(8, 16, colour))
    with pytest.raises(UserError, match=rf"1 of 12\d images can't be read: train/bee/0050.png \(mode {mode}, not 8 bits a channel\)"):
        folder_data(small)


def tiff(values: np.ndarray[Any, Any], *, planes: bool = False, kind: int = 1) -> bytes:
    """A TIFF of RGB or grey values as they lie in memory."""
    height, width, channels = values.shape
    tags = {256: width, 257: height, 259: 1, 262: 2 if channels == 3 else 1, 277: channels, 278: height, 279: values.nbytes}
    tags |= {284: 2 if planes else 1, 273: 400}
    lists = {258: values.itemsize * 8, 339: kind}
    entries = b""
    for tag in sorted(tags | lists):
        if tag in lists and channels == 3:
            entries += struct.pack("<HHII", tag, 3, 3, 300 if tag == 258 else 310)
        else:
            entries += struct.pack("<HHIHH", tag, 3, 1, (tags | lists)[tag], 0)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries
    arrays = {300: struct.pack("<3H", *[lists[258]] * 3), 310: struct.pack("<3H", *[kind] * 3), 400: values.tobytes()}
    content = bytearray(head.ljust(400 + values.nbytes, b"\0"))
    for place, part in arrays.items():
        content[place : place + len(part)] = part
    return bytes(content)


PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
DEEP = PIXELS.astype("<u2") * 257
DEEPER = {
    "p6.ppm": (b"P6 8 8 65535\n" + DEEP.tobytes(), "values to 65535"),
    "p6 of 10 bits.ppm": (b"P6\n# a camera's\n8 8\n1023\n" + (DEEP // 64).tobytes(), "values to 1023"),
    "p3.ppm": (b"P3 8 8 65535\n" + b" ".join(b"%d" % value for value in DEEP.flatten()), "values to 65535"),
    "p5.pgm": (b"P5 8 8 65535\n" + DEEP[..., 0].tobytes(), "mode I;16B"),
    "p2.pgm": (b"P2 8 8 256\n" + b"256 " * 64, "mode I"),
    "rgb.tif": (tiff(DEEP), "mode RGB;16L"),
    "planes.tif": (tiff(DEEP, planes=True), "16 bits"),
    "grey.tif": (tiff(DEEP[..., :1]), "mode I;16"),
    "fractions.tif": (tiff(DEEP[..., :1].astype("<f4"), kind=3), "mode F"),
    "signed.tif": (tiff(PIXELS[..., :1].astype("i1"), kind=2), "signed or fractional values"),
}


@pytest.mark.parametrize("name", DEEPER)
def test_what_pillow_would_cut_to_8_bits_is_refused(small: Path, name: str) -> None:
    content, what = DEEPER[name]
    (small / "train/bee" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"images can't be read: train/bee/{name} \({what}, not 8 bits a channel\)"):
        folder_data(small)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p6.ppm", b"P6 8 8 255\n" + PIXELS.tobytes()),
        ("p3.ppm", b"P3 8 8 255\n" + b" ".join(b"%d" % value for value in PIXELS.flatten())),
        ("rgb.tif", tiff(PIXELS)),
    ],
)
def test_colours_of_8_bits_are_read_as_they_are(small: Path, name: str, content: bytes) -> None:
    (small / "test/bee" / f"z{name}").write_bytes(content)
    found = folder_data(small)
    assert any(np.array_equal(image, PIXELS) for image in found.x_test)


@pytest.mark.parametrize("kind", ["png", "bmp", "tif", "gif"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_8_bits_a_channel_or_fewer_are_read(small: Path, mode: str, kind: str) -> None:
    Image.new(mode, (8, 8)).save(small / f"train/bee/0050.{kind}")
    folder_data(small)


def of_another_size(it: Path) -> None:
    Image.fromarray(np.zeros((6, 9), np.uint8)).save(it / "train/bee/0050.png")


def turned(it: Path) -> None:
    """One image lies on its side."""
    for path in it.rglob("*.png"):
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(path)
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(it / "train/bee/0050.png")


EXTENSIONS = ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp"
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (only(), "no images; it needs PATH/train/CLASS and PATH/test/CLASS, PATH/CLASS, or a CSV with rows"),
    "loose images": (only("a.png", "b.png"), "no images; it needs PATH/train/CLASS and PATH/test/CLASS, PATH/CLASS, or a CSV with rows"),
    "an empty class": (
        lambda it: (it / "train/dodo").mkdir(),
        f"class folder train/dodo has no image ({EXTENSIONS}); fill it or remove it",
    ),
    "a class of texts": (
        lambda it: only("train/a/a.png", "train/b/a.txt", "test/a/a.png")(it),
        f"class folder train/b has no image ({EXTENSIONS}); fill it or remove it",
    ),
    "a class only in test": (
        lambda it: shutil.copytree(it / "test/ant", it / "test/dodo"),
        "class 'dodo' has no train image; every class needs images of train and test: make some of its 9 test images train images, or "
        "leave "
        "the class out of both",
    ),
    "a class only in train": (
        lambda it: shutil.rmtree(it / "test/cat"),
        "class 'cat' has no test image; every class needs images of train and test: make some of its 29 train images test images, or leave "
        "the "
        "class out of both",
    ),
    "one class": (only("train/a/a.png", "test/a/a.png"), "a single class, 'a'; a classifier needs two"),
    "one image a class": (
        only("a/1.png", "a/2.png", "b/1.png"),
        "class 'b' has a single image; it needs one to train on and one to test on",
    ),
    "train alone": (
        lambda it: shutil.rmtree(it / "test"),
        "it has train/ but neither test/ nor val/; add one, or take a fifth of train with folder:it/train",
    ),
    "test alone": (lambda it: shutil.rmtree(it / "train"), "it has test/ but no train/; add that, or rename test/ if it is a class"),
    "another case": (
        lambda it: (it / "train").rename(it / "Train"),
        "Train/ looks like a split; rename it to train/, or use csv:FILE if it is a class",
    ),
    "another word": (
        lambda it: (it / "test").rename(it / "validation"),
        "validation/ looks like a split; rename it to val/, or use csv:FILE if it is a class",
    ),
    "an empty test": (
        lambda it: (shutil.rmtree(it / "test"), (it / "test").mkdir()),
        "every image is train; there must be train and test (or val), or no split at all",
    ),
    "several sizes": (
        of_another_size,
        "its images have several sizes (train/ant/0000.png is 8x8, train/bee/0050.png 9x6); set data.size=64, or another side to resize "
        "them to",
    ),
    "one that lies": (
        turned,
        "its images have several sizes (train/ant/0000.png is 9x8, train/bee/0050.png 8x9); set data.size=64, or another side to resize "
        "them to",
    ),
    "images larger than memory": (
        all_are(claim(11_000)),
        f"120 images of 11000x11000x1 take {120 * 11_000**2:,} bytes, over half of this machine's memory ({memory() // 2:,}); set "
        "data.size=224, or another side to resize them to while they are streamed",
    ),
    "images larger than any": (
        all_are(claim(12_000)),
        "120 of 120 images can't be read: "
        + ", ".join(f"train/ant/{n:04}.png (12000x12000 pixels; at most 134,217,728 are read)" for n in range(3))
        + " and 117 more; mend or remove them, or skip them with --set data.skip_broken=true",
    ),
    "a program for a printer": (
        all_are(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
        "120 of 120 images can't be read: "
        + ", ".join(f"train/ant/{n:04}.png (no image of a known format)" for n in range(3))
        + " and 117 more; mend or remove them, or skip them with --set data.skip_broken=true",
    ),
    "a pipe": (
        lambda it: ((it / "train/ant/0000.png").unlink(), os.mkfifo(it / "train/ant/0000.png")),
        "1 of 120 images can't be read: train/ant/0000.png (a device or pipe, not a file; name a regular file); mend or remove them, or "
        "skip them with --set data.skip_broken=true",
    ),
    "a circle of links": (lambda it: (it / "train/ant/all").symlink_to(".."), "the link train/ant/all leads in a circle; remove it"),
    "a circle over two classes": (
        lambda it: ((it / "train/ant/x").symlink_to("../bee"), (it / "train/bee/x").symlink_to("../ant")),
        "the link train/ant/x/x leads in a circle; remove it",
    ),
    "a circle at the top": (lambda it: (it / "again").symlink_to("."), "the link again leads in a circle; remove it"),
    "a link outside": (
        lambda it: (it / "train/ant/x.png").symlink_to("/etc/passwd"),
        "the link train/ant/x.png leads outside, to /etc/passwd; put a copy in its place, or name a copy of the folder "
        "that has what its links lead to: cp -rL it it-copied",
    ),
    "a folder outside": (
        lambda it: (it / "train/dodo").symlink_to("/usr"),
        "the link train/dodo leads outside, to /usr; put a copy in its place, or name a copy of the folder "
        "that has what its links lead to: cp -rL it it-copied",
    ),
    "hostile names": (
        lambda it: (it / "train/\x1b[2J\n").mkdir(),
        rf"class folder train/\x1b[2J\n has no image ({EXTENSIONS}); fill it or remove it",
    ),
}


@pytest.mark.parametrize(("make", "line"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_wrong_folder_is_told_in_one_line(small: Path, make: Callable[[Path], Any], line: str) -> None:
    it = small.rename(small.with_name("it"))
    make(it)
    words = ["train", "--model", "resnet8", "--batch-size", "4", "--dataset", "folder:it"]
    assert_refused(it.parent, words, f"folder:it: {line}")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("folder:", "folder:: no such folder; write folder:PATH"),
        ("folder:none", "folder:none: no such folder; write folder:PATH"),
        ("folder:a.txt", "folder:a.txt: a file, not a folder; name a folder of images, or use csv:FILE or npz:PATH"),
        ("folder:~nobody-of-that-name/x", "folder:~nobody-of-that-name/x: no such folder (Could not determine home directory.)"),
        ("csv:", "csv:: a folder, not a file; name a regular file"),
        ("csv:none.csv", "csv:none.csv: no such file"),
        ("csv:/dev/zero", "csv:/dev/zero: a device or pipe, not a file; name a regular file"),
    ],
)
def test_a_wrong_place_is_told_in_one_line(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / "a.txt").write_text("junk")
    assert_refused(tmp_path, ["train", "--dataset", name], line)


ROW = "train/ant/0000.png"
BESIDE = "put the images, or copies of them, beside the file, or the file into a folder that has them all"
CSVS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "its first line is ''; write path,label or path,label,split"),
    "no rows": ("path,label\n", "no images; it needs PATH/train/CLASS and PATH/test/CLASS, PATH/CLASS, or a CSV with rows"),
    "no header": (f"{ROW},ant\n", f"unknown column '{ROW}': choose from: path, label, split"),
    "a column mistyped": ("path,label,spilt\n", "unknown column 'spilt': did you mean 'split'?"),
    "no label": ("path,split\n", "its first line is 'path,split'; write path,label or path,label,split"),
    "a column twice": ("path,label,path\n", "its first line is 'path,label,path'; write path,label or path,label,split"),
    "a cell short": (f"path,label\n{ROW}\n", f"row 2 is '{ROW}'; it needs path,label"),
    "a cell more": (f"path,label\n{ROW},ant,train\n", f"row 2 is '{ROW},ant,train'; it needs path,label"),
    "an empty cell": (f"path,label\n\n{ROW}, \n", f"row 3 is '{ROW}, '; it needs path,label"),
    "an unknown split": (f"path,label,split\n{ROW},ant,tset\n", "row 2 has split 'tset'; did you mean 'test'?"),
    "outside": ("path,label\n../x.png,ant\n", f"row 2 leads outside of the file's folder, to ../x.png; {BESIDE}"),
    "elsewhere": (
        "path,label\n/etc/passwd,ant\n",
        f"row 2 leads outside of the file's folder, to /etc/passwd; {BESIDE}",
    ),
    "by a link": ("path,label\nout/x.png,ant\n", f"row 2 leads outside of the file's folder, to out/x.png; {BESIDE}"),
    "written on Windows": (
        "path,label\ntrain\\ant\\0000.png,ant\n",
        r"row 2 names 'train\\ant\\0000.png', as Windows writes it; write / between folders: train/ant/0000.png",
    ),
    "a drive of Windows": (
        "path,label\nC:\\images\\1.png,ant\n",
        r"row 2 names 'C:\\images\\1.png', as Windows writes it; write / between folders: C:/images/1.png",
    ),
    "named twice": (f"path,label\n{ROW},ant\ntrain/./ant/0000.png,bee\n", "rows 2 and 3 both name train/./ant/0000.png; name it once"),
    "train alone": (
        f"path,label,split\n{ROW},ant,train\ntrain/bee/0035.png,bee,train\n",
        "every image is train; there must be train and test (or val), or no split at all",
    ),
    "a class only in val": (
        f"path,label,split\n{ROW},ant,train\ntest/ant/0000.png,ant,val\ntest/bee/0015.png,bee,val\n",
        "class 'bee' has no train image; every class needs images of train and val: make some of its 1 val images train images, or leave "
        "the "
        "class out of both",
    ),
    "no text": (b"\xff\xfe\x00path", "not UTF-8 text; write path,label[,split] as CSV"),
    "a quote left open": ('path,label\n"a,ant\n', "no CSV (unexpected end of data); write path,label[,split]"),
    "no such images": (
        "path,label\na.png,a\nb.png,a\nc\0.png,b\nd.png,b\n",
        r"4 of 4 images can't be read: a.png (no such file), b.png (no such file), c\x00.png (no such file (embedded null byte)) and 1 "
        "more; mend or remove them, or skip them with --set data.skip_broken=true",
    ),
}


@pytest.mark.parametrize(("content", "line"), CSVS.values(), ids=CSVS.keys())
def test_a_wrong_csv_is_told_in_one_line(small: Path, content: str | bytes, line: str) -> None:
    (small / "it.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    (small / "out").symlink_to("/usr")
    assert_refused(small, ["train", "--model", "resnet8", "--batch-size", "4", "--dataset", "csv:it.csv"], f"csv:it.csv: {line}")


def test_a_long_thin_image_takes_no_memory(small: Path) -> None:
    Image.fromarray(np.zeros((1, 60_000), np.uint8)).save(small / "train/ant/0000.png")
    with pytest.raises(UserError, match=r"train/ant/0000.png \(60000x1 pixels, too long and thin to be resized to 64\)"):
        folder_data(small, size=64)


# Training


@pytest.mark.parametrize("split", ["full", "holdout"])
def test_training_is_that_on_the_same_arrays_bit_for_bit(small: Path, ledger: Ledger, split: str) -> None:
    (x_train, y_train), (x_test, y_test) = digits(90), digits(30, 90)
    np.savez(small.parent / "same.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    names = (f"folder:{small}", f"npz:{small.parent / 'same.npz'}")
    of_folder, of_arrays = (run([on(name, split=split)], ledger, CPU, again=True)[0] for name in names)
    assert (of_folder.data_hash, of_folder.weights_hash) == (of_arrays.data_hash, of_arrays.weights_hash)
    assert (of_folder.correct, of_folder.images, of_folder.dataset) == (of_arrays.correct, 30, "birds")
    assert [run([on(name, split=split)], ledger, CPU)[0].no for name in names] == [of_folder.no, of_arrays.no], "one has names"


def test_classes_under_other_names_are_trained_anew_and_not_gone_on_with(small: Path, ledger: Ledger) -> None:
    """A student's file says its classes: one that was trained before they were renamed has the old names."""
    (cut,) = cut_off([on(f"folder:{small}")], ledger, 2)
    (done,) = run([on(f"folder:{small}", seed=1)], ledger, CPU)
    for split in ("train", "test"):
        (small / split / "bee").rename(small / split / "bird")
    (again,) = run([on(f"folder:{small}", seed=1)], ledger, CPU)
    assert (again.no, again.data_hash, again.weights_hash) == (done.no + 1, done.data_hash, done.weights_hash)
    assert load_network(ledger.run_folder(again.no) / "student.safetensors")[1].labels == ("ant", "bird", "cat")
    with pytest.raises(UserError, match=f"run {cut.no} can't be resumed: its teacher, .*, the names of its classes, or .*; train it anew"):
        resume(ledger, CPU)
    for split in ("train", "test"):
        (small / split / "bird").rename(small / split / "bee")
    assert resume(ledger, CPU)[0].status == "finished"


def test_holdout_keeps_a_tenth_of_each_class_out(small: Path) -> None:
    data = DeviceData(folder_data(small), "holdout", CPU)
    counts = np.bincount(digits(90)[1])
    assert torch.bincount(data.epoch_images.labels).tolist() == [(2 * count + 10) // 20 for count in counts.tolist()]
    assert len(data.labels) + len(data.epoch_images.labels) == 90


def test_a_student_is_measured_again_from_its_file_and_knows_its_classes(small: Path, ledger: Ledger) -> None:
    (done,) = run([on(f"folder:{small}", data={"size": 7, "channels": 3})], ledger, CPU)
    path = ledger.run_folder(done.no) / "student.safetensors"
    _, about = load_network(path)
    assert (about.labels, about.input) == (NAMES, (3, 7, 7))
    again = evaluate(path, CPU)
    assert (again.correct, again.images, again.data) == (done.correct, 30, "as trained")
    card = measure(done.no, ledger, CPU, batch_size=1)
    assert card.class_names == NAMES
    assert re.findall(r"^\| (\w+) +\| +\d+ \|", page(card, "md").partition("## Confusions")[0], re.MULTILINE) == list(NAMES)
    other = small.parent / "other"
    shutil.copytree(small, other)
    assert evaluate(path, CPU, dataset=f"folder:{other}").correct == done.correct
    for split in ("train", "test"):
        (other / split / "bee").rename(other / split / "cow")
    with pytest.raises(UserError, match=r"was trained on other classes than other has \('bee' where that has 'cat'\); name them alike"):
        evaluate(path, CPU, dataset=f"folder:{other}")


def test_data_without_names_of_classes_has_none_in_the_file(small_npz: Path, ledger: Ledger) -> None:
    (done,) = run([config(small_npz, train={"epochs": 1})], ledger, CPU)
    assert load_network(ledger.run_folder(done.no) / "student.safetensors")[1].labels == ()


def test_the_command_to_train_a_missing_teacher_reads_the_same_images(small: Path) -> None:
    words = "distill --student resnet8 --teacher resnet14 --method kd --dataset folder:birds --set data.size=7 --set data.skip_broken=true"
    told = command(small.parent, *words.split())
    assert told.err.endswith("--dataset folder:birds --seeds 100 --set data.size=7 --set data.skip_broken=true\n")
