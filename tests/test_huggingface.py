"""Hugging Face data sets: the pixels and classes that were put in, found by the columns' types, held or streamed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.command import assert_refused, command
from PIL import Image

from flowdistill.checks import UserError
from flowdistill.config import DataConfig
from flowdistill.data.batches import SeedBatches, to_device
from flowdistill.data.dataset import ImageData
from flowdistill.data.sources import huggingface, load
from flowdistill.talk import Remarks

CPU = torch.device("cpu")
NAMES = ["zebra", "ant", "cow"]
CLASSES = datasets.ClassLabel(names=NAMES)
datasets.disable_progress_bars()


def pixels(n: int, seed: int = 0, channels: int = 1, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def table(images: np.ndarray, labels: list[Any], kind: Any = CLASSES, image: str = "image", label: str = "label", **more: Any) -> Any:
    """A data set of PNG files; ``more`` are further columns, each values and type."""
    pictures = [Image.fromarray(one.squeeze()) for one in images]
    columns = {image: (pictures, datasets.Image()), label: (labels, kind), **more}
    features = datasets.Features({name: kind for name, (_, kind) in columns.items()})
    return datasets.Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features=features)


def save(to_device: Path, **splits: Any) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        datasets.DatasetDict(splits).save_to_disk(str(to_device))
    return to_device


def read(to_device: Path, **keys: Any) -> ImageData:
    return load(DataConfig.model_validate({"name": f"hf:{to_device}", "pad": 1} | keys), Remarks())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """24 images to train on and 9 to test on."""
    train, test = (table(pixels(n, seed), [number % 3 for number in range(n)]) for seed, n in enumerate((24, 9)))
    return save(tmp_path / "animals", train=train, test=test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_pixels_and_classes_that_were_put_in_come_out(tmp_path: Path, channels: int, stream: bool) -> None:
    parts = {split: table(pixels(12, seed, channels), [number % 3 for number in range(12)]) for seed, split in enumerate(("train", "test"))}
    data = read(save(tmp_path / "a", **parts), stream=stream)
    assert (data.streamed, data.name, data.classes, data.class_names) == (stream, "a", 3, tuple(NAMES))
    for seed, (images, labels) in enumerate(((data.x_train, data.y_train), (data.x_test, data.y_test))):
        np.testing.assert_array_equal(images[:], pixels(12, seed, channels))
        assert labels.tolist() == [number % 3 for number in range(12)]


def test_streamed_batches_are_those_of_memory_whatever_decodes_them(small: Path) -> None:
    found = [
        [images for images, _ in SeedBatches(to_device(read(small, stream=stream), "holdout", CPU, workers), 0, 5).epoch(1)]
        for stream, workers in ((False, 0), (True, 0), (True, 1))
    ]
    assert len(found[0]) > 3
    for one, other, another in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, another)


def test_rows_that_were_shuffled_or_chosen_are_those_shown(tmp_path: Path) -> None:
    whole = table(pixels(24), [number % 3 for number in range(24)])
    chosen = [5, 3, 22, 1, 0, 2]
    data = read(save(tmp_path / "a", train=whole.select(chosen), test=whole), stream=True)
    np.testing.assert_array_equal(data.x_train[:], pixels(24)[chosen])


@pytest.mark.parametrize("split", ["validation", "val", "valid"])
def test_validation_stands_in_for_test(tmp_path: Path, split: str) -> None:
    parts = {name: table(pixels(6, seed), [0, 1, 2] * 2) for seed, name in enumerate(("train", split))}
    np.testing.assert_array_equal(read(save(tmp_path / "a", **parts)).x_test, pixels(6, 1))


@pytest.mark.parametrize("hidden", [False, True])
def test_validation_is_read_only_if_the_labels_of_test_are_hidden(tmp_path: Path, hidden: bool, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {name: table(pixels(6, seed), [0, 1, 2] * 2) for seed, name in enumerate(("train", "validation", "unlabelled"))}
    parts["test"] = table(pixels(6, 3), [-1] * 6 if hidden else [0, 1, 2] * 2)
    np.testing.assert_array_equal(read(save(tmp_path / "a", **parts)).x_test, pixels(6, 1 if hidden else 3))
    chosen = "val is read, test is not, for its labels are hidden" if hidden else "test is read, val is not"
    lines = ["left out, as neither train nor test: unlabelled", chosen]
    assert capsys.readouterr().err.splitlines() == [f"hf:{tmp_path / 'a'}: {line}" for line in lines]


@pytest.mark.parametrize("single", [False, True])
def test_without_a_test_split_a_fifth_of_train_is_test_held_or_streamed(tmp_path: Path, single: bool) -> None:
    whole = table(pixels(30), [number % 3 for number in range(30)])
    if single:
        whole.save_to_disk(str(tmp_path / "a"))
    else:
        save(tmp_path / "a", train=whole)
    held, streamed = read(tmp_path / "a"), read(tmp_path / "a", stream=True)
    assert np.bincount(held.y_test).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(held.x_test, streamed.x_test[:])
    np.testing.assert_array_equal(held.x_train, streamed.x_train[:])


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        (datasets.Value("int64"), [10, 9, 700], ("9", "10", "700")),
        (datasets.Value("string"), ["b", "a", "Z"], ("Z", "a", "b")),
        (datasets.ClassLabel(names=["none", *NAMES]), [2, 1, 3], tuple(NAMES)),
    ],
    ids=["integers", "strings", "a class without images"],
)
def test_classes_are_numbered_in_their_order(tmp_path: Path, kind: Any, labels: list[Any], names: tuple[str, ...]) -> None:
    whole = table(pixels(6), labels * 2, kind)
    data = read(save(tmp_path / "a", train=whole, test=whole), label="label")
    assert data.class_names == names
    order = [str(kind.names[label]) if hasattr(kind, "names") else str(label) for label in labels]
    assert data.y_train.tolist() == [names.index(name) for name in order] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_labels_of_a_split_are_read_by_the_names_of_its_own_classes(tmp_path: Path, stream: bool) -> None:
    """The columns' types name the same classes in another order; train's stands, whichever split is stored first."""
    other = datasets.ClassLabel(names=sorted(NAMES))
    parts = {"test": table(pixels(6, 1), [0, 1, 2] * 2, other), "train": table(pixels(6), [0, 1, 2] * 2)}
    data = read(save(tmp_path / "a", **parts), stream=stream)
    assert data.class_names == tuple(NAMES)
    assert data.y_train.tolist() == [0, 1, 2] * 2
    assert [NAMES[label] for label in data.y_test] == sorted(NAMES) * 2


def test_a_test_split_without_the_column_of_classes_is_one_whose_labels_are_hidden(tmp_path: Path) -> None:
    parts = {name: table(pixels(6, seed), [0, 1, 2] * 2) for seed, name in enumerate(("train", "validation", "test"))}
    parts["test"] = parts["test"].remove_columns("label")
    np.testing.assert_array_equal(read(save(tmp_path / "a", **parts)).x_test, pixels(6, 1))


def test_one_of_two_columns_of_classes_is_chosen_by_name(tmp_path: Path) -> None:
    """As CIFAR-100 has them."""
    datasets.ClassLabel(names=["x", "y"])
    whole = table(
        pixels(6), [0, 1, 2] * 2, image="img", label="fine_label", coarse_label=([0, 1] * 3, datasets.ClassLabel(names=["x", "y"]))
    )
    where = save(tmp_path / "a", train=whole, test=whole)
    assert (read(where).class_names, read(where, label="coarse_label").class_names) == (tuple(NAMES), ("x", "y"))


def test_images_of_several_sizes_are_resized(tmp_path: Path) -> None:
    images = [Image.fromarray(pixels(1, n, 3, 8 + n)[0]) for n in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    whole = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2] * 2}, features=features)
    where = save(tmp_path / "a", train=whole, test=whole)
    with pytest.raises(UserError, match=r"several sizes \(train/0 is 8x8, train/1 9x9\); set data.size=64"):
        read(where)
    held, streamed = read(where, size=5), read(where, size=5, stream=True)
    np.testing.assert_array_equal(streamed.x_test[:], held.x_test)


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(decode=False), "label": CLASSES})
    files = []
    for image in pixels(6):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0]).save(buffer, "png")
        files.append({"bytes": buffer.getvalue(), "path": None})
    rows = {"image": [*files, None, {"bytes": b"junk", "path": None}], "label": [0, 1, 2, 0, 1, 2, 0, 1]}
    whole = datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image())
    where = save(tmp_path / "a", train=whole, test=whole)
    with pytest.raises(UserError, match=r"4 of 16 images can't be read: train/6 \(the row has no image\), train/7 \(no image of a known"):
        read(where)
    assert len(read(where, skip_broken=True).y_train) == 6


def test_the_hash_is_of_the_rows_files(small: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "b", train=table(pixels(24, 7), [number % 3 for number in range(24)]), test=table(pixels(9, 1), [0, 1, 2] * 3))
    assert read(small, stream=True).hash == read(small, stream=True).hash != read(other, stream=True).hash


def test_a_name_and_a_config_are_asked_for_and_no_network_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def offline(*given: Any) -> None:
        asked.append(given)
        raise ConnectionError("Couldn't reach the Hub\nmore of it")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for name in ("nobody/nothing", "cifar100:full"):
        line = f"hf:{name}: can't be opened (Couldn't reach the Hub); is it spelt right, and is there a network?"
        assert_refused(tmp_path, ["train", "--dataset", f"hf:{name}"], line)
    assert asked == [("nobody/nothing", None), ("cifar100", "full")]
    found = {"train": table(pixels(6), [0, 1, 2] * 2), "test": table(pixels(6, 1), [0, 1, 2] * 2)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: found)
    assert load(DataConfig(name="hf:nobody/nothing:full")).name == "nobody_nothing_full"


ROWS = [0, 1, 2] * 2
EMPTY = "{} has no rows; give it some, or leave it out"
WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no image": (
        {"train": datasets.Dataset.from_dict({"x": ROWS, "label": ROWS})},
        [],
        "its columns are x (int64), label (int64); it needs one of type Image, or of several one named image",
    ),
    "no classes": (
        {"train": table(pixels(6), ROWS, datasets.Value("int64"), label="kind")},
        [],
        "its columns are image (Image), kind (int64); name the one with the classes by --set data.label=COLUMN",
    ),
    "a column mistyped": (
        {"train": table(pixels(6), ROWS)},
        ["--set", "data.label=lable"],
        "data.label=lable is no column of it: did you mean 'label'?",
    ),
    "a column of images": (
        {"train": table(pixels(6), ROWS)},
        ["--set", "data.label=image"],
        "data.label=image is a column of PIL.Image.Image; classes are a ClassLabel, integers or strings",
    ),
    "a split without classes": (
        {"train": table(pixels(6), ROWS), "test": table(pixels(6), ROWS).remove_columns("label")},
        [],
        "test has no column 'label', as train has, but image (Image); name it as in train",
    ),
    "images under another name": (
        {"train": table(pixels(6), ROWS), "validation": table(pixels(6), ROWS, image="img")},
        [],
        "val has no column 'image', as train has, but img (Image), label (ClassLabel); name it as in train",
    ),
    "numbers beside classes": (
        {"train": table(pixels(6), ROWS), "test": table(pixels(6), ROWS, datasets.Value("int64"))},
        [],
        "column 'label' is ClassLabel in train and int64 in test; cast both to one type",
    ),
    "names beside classes": (
        {"train": table(pixels(6), ROWS), "test": table(pixels(6), NAMES * 2, datasets.Value("string"))},
        [],
        "column 'label' is ClassLabel in train and string in test; cast both to one type",
    ),
    "other classes": (
        {"train": table(pixels(6), ROWS), "test": table(pixels(6), ROWS, datasets.ClassLabel(names=[*NAMES, "dog"]))},
        [],
        "the classes of column 'label' are zebra, ant, cow in train and dog, zebra, ant and 1 more in test; give both the same",
    ),
    "a split without rows": ({"train": table(pixels(6), ROWS), "test": table(pixels(0), [])}, [], EMPTY.format("test")),
    "no rows to train on": ({"train": table(pixels(0), []), "test": table(pixels(6), ROWS)}, [], EMPTY.format("train")),
    "validation twice": (
        {"train": table(pixels(6), ROWS), "valid": table(pixels(6), ROWS), "validation": table(pixels(6), ROWS)},
        [],
        "its splits valid and validation both mean val; leave one of them out",
    ),
    "no number": (
        {"train": table(pixels(4), [0, 1, -1, 0], datasets.Value("int64")), "test": table(pixels(2), [0, 1], datasets.Value("int8"))},
        [],
        "train/2 has no label (-1); leave such rows out, or choose another column by data.label",
    ),
    "no train": ({"test": table(pixels(6), ROWS)}, [], "its splits are test; it needs train"),
    "no label": (
        {"train": table(pixels(6), [0, 1, 2, 0, -1, 2])},
        [],
        "train/4 has no label (-1); leave such rows out, or choose another column by data.label",
    ),
    "a class of one": (
        {"train": table(pixels(6), [0, 1, 1, 0, 2, 0])},
        [],
        "class 'cow' has a single image; it needs one to train on and one to test on",
    ),
}


def test_an_empty_split_of_the_hub_is_told_as_a_saved_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened, where one that was saved is not."""
    found = {"train": table(pixels(6), ROWS), "test": table(pixels(0), [])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: found)
    with pytest.raises(UserError, match=f"hf:nobody/nothing: {EMPTY.format('test')}"):
        load(DataConfig(name="hf:nobody/nothing"))


@pytest.mark.parametrize(("splits", "words", "line"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_data_set_is_told_in_one_line(tmp_path: Path, splits: dict[str, Any], words: list[str], line: str) -> None:
    save(tmp_path / "it", **splits)
    assert_refused(tmp_path, ["train", "--model", "resnet8", "--batch-size", "4", "--dataset", "hf:it", *words], f"hf:it: {line}")


def test_a_wrong_place_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    said = command(tmp_path, "train", "--dataset", "hf:empty")
    assert said.code == 2
    assert said.err.startswith("flowdistill: hf:empty: can't be opened (")
    assert said.err.endswith("); name a folder that save_to_disk wrote\n")
    line = "hf:./none: no such folder; write hf:NAME, hf:NAME:CONFIG, or hf:PATH of what save_to_disk wrote"
    assert_refused(tmp_path, ["train", "--dataset", "hf:./none"], line)
    assert_refused(
        tmp_path, ["train", "--dataset", "digits", "--set", "data.label=x"], "data: label=x belongs to hf:NAME, not to digits; leave it out"
    )
    monkeypatch.setattr(huggingface, "find_spec", lambda _: None)
    assert_refused(tmp_path, ["train", "--dataset", "hf:x"], "hf:x: hf:NAME needs datasets, which is not installed: pip install datasets")


def test_a_streamed_data_set_trains_by_command(small: Path) -> None:
    words = "train --model resnet8 --dataset hf:animals --set data.stream=true --set data.size=8 --epochs 1 --batch-size 8 --workers 1"
    said = command(small.parent, *words.split(), "--precision", "fp32")
    assert (said.code, "animals" in said.out, "finished" in said.out) == (0, True, True), said.err
