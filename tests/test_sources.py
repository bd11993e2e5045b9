"""Data sets: the digits, a user's npz file, torchvision's; and every mistake in one line."""

import gc
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits

from flowdistill.checks import UserError
from flowdistill.config import DataConfig
from flowdistill.data.dataset import ImageData
from flowdistill.data.sources import SOURCES, load


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load(DataConfig(name="digits"))


def arrays(**changed) -> dict[str, np.ndarray]:
    """A small correct data set: 12 training and 6 test images, 5x7 colour, 3 classes."""
    chance = np.random.default_rng(0)
    return {
        "x_train": chance.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": chance.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    } | changed


def npz(path: Path, **config) -> DataConfig:
    return DataConfig(name=f"npz:{path}", **({"pad": 1} | config))


def mistake(config: DataConfig) -> str:
    """The message of the UserError that loading gives, which must be one line."""
    with pytest.raises(UserError) as caught:
        load(config)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def test_digits_have_their_sizes_and_habits(digits):
    assert (len(digits.x_train), len(digits.x_test)) == (898, 899)
    assert digits.x_train.shape[1:] == digits.x_test.shape[1:] == (16, 16, 1)
    assert digits.x_train.dtype == digits.x_test.dtype == np.uint8
    assert (digits.y_train.dtype, digits.y_test.dtype) == (np.int64, np.int64)
    assert (digits.name, digits.classes, digits.pad, digits.flip) == ("digits", 10, 2, False)
    assert set(digits.y_train) == set(digits.y_test) == set(range(10))
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 255)
    spec = digits.spec
    assert (spec.name, spec.n_train, spec.classes, spec.channels, spec.height, spec.width) == ("digits", 898, 10, 1, 16, 16)


def test_digits_are_scikit_learns_in_their_order(digits):
    bunch = load_digits()
    assert np.concatenate([digits.y_train, digits.y_test]).tolist() == bunch.target.tolist()
    enlarged = np.concatenate([digits.x_train, digits.x_test])[..., 0].astype(float)
    shrunk = enlarged.reshape(-1, 8, 2, 8, 2).mean((2, 4)).reshape(len(enlarged), -1)
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(shrunk, bunch.images.reshape(len(enlarged), -1), strict=True)]
    assert min(alike) > 0.9


def test_digits_hash_is_the_same_each_time(digits):
    assert load(DataConfig(name="digits")).hash == digits.hash


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_hash_sees_one_changed_value(digits, key):
    changed = {name: getattr(digits, name).copy() for name in ("x_train", "y_train", "x_test", "y_test")}
    changed[key].flat[-1] ^= 1
    assert ImageData("digits", **changed, classes=10).hash != digits.hash


def test_hash_sees_the_shape():
    one = ImageData("a", **arrays(), classes=3)
    other = ImageData("a", **arrays(x_train=arrays()["x_train"].reshape(12, 7, 5, 3)), classes=3)
    assert one.hash != other.hash


def test_hash_ignores_name_and_memory_order():
    own = arrays()
    turned = own | {"x_train": np.asfortranarray(own["x_train"])}
    assert ImageData("a", **own, classes=3).hash == ImageData("b", **turned, classes=3).hash


def test_config_overrides_pad_and_flip():
    data = load(DataConfig(name="digits", pad=0, flip=True))
    assert (data.pad, data.flip) == (0, True)


def test_a_resized_crop_needs_no_border():
    data = load(DataConfig(name="digits", crop="resized"))
    assert (data.crop, data.pad, data.flip) == ("resized", 0, False)


def unbalanced(folder: Path) -> dict[str, np.ndarray]:
    """Training image i is all pixels i mod 256; 200, 100, 9 and 1 of four classes, in a random order."""
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(4), [200, 100, 9, 1]))
    images = np.broadcast_to(np.arange(310).astype(np.uint8)[:, None, None], (310, 5, 7)).copy()
    own = {"x_train": images, "y_train": labels, "x_test": images[:5], "y_test": labels[:5]}
    np.savez(folder / "unbalanced.npz", **own)
    return own


@pytest.mark.parametrize(("limit", "classes"), [(155, [100, 50, 5, 1]), (31, [20, 10, 1, 1]), (1, [1, 1, 1, 1]), (309, [199, 100, 9, 1])])
def test_limit_train_keeps_the_same_share_of_each_class_and_one_at_least(tmp_path, limit, classes):
    unbalanced(tmp_path)
    data = load(npz(tmp_path / "unbalanced.npz", limit_train=limit))
    assert np.bincount(data.y_train).tolist() == classes
    assert data.spec.n_train == len(data.x_train) == sum(classes)
    assert (data.classes, len(data.x_test)) == (4, 5)


def test_limit_train_is_fixed_and_a_smaller_one_lies_in_a_larger(tmp_path):
    own = unbalanced(tmp_path)
    np.random.seed(0)
    first = load(npz(tmp_path / "unbalanced.npz", limit_train=100))
    np.random.seed(1)
    again = load(npz(tmp_path / "unbalanced.npz", limit_train=100))
    larger = load(npz(tmp_path / "unbalanced.npz", limit_train=200))
    assert first.hash == again.hash
    assert len({data.hash for data in (first, larger, load(npz(tmp_path / "unbalanced.npz")))}) == 3
    pairs = [list(zip(data.x_train[:, 0, 0, 0].tolist(), data.y_train.tolist(), strict=True)) for data in (first, larger)]
    assert set(pairs[0]) < set(pairs[1]) < set(zip(own["x_train"][:, 0, 0].tolist(), own["y_train"].tolist(), strict=True))


@pytest.mark.parametrize("limit", [310, 10**9])
def test_limit_train_of_all_images_changes_nothing(tmp_path, limit):
    unbalanced(tmp_path)
    assert load(npz(tmp_path / "unbalanced.npz", limit_train=limit)).hash == load(npz(tmp_path / "unbalanced.npz")).hash


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_round_trip_colour(tmp_path, save):
    own = arrays()
    save(tmp_path / "birds.npz", **own)
    data = load(npz(tmp_path / "birds.npz"))
    for key, array in own.items():
        np.testing.assert_array_equal(getattr(data, key), array)
    assert (data.name, data.classes, data.pad, data.flip) == ("birds", 3, 1, True)


def test_npz_round_trip_grey_gets_a_channel(tmp_path):
    own = arrays()
    own |= {key: own[key][..., 0] for key in ("x_train", "x_test")}
    np.savez(tmp_path / "grey.npz", **own)
    data = load(npz(tmp_path / "grey.npz"))
    assert (data.x_train.shape, data.x_test.shape) == ((12, 5, 7, 1), (6, 5, 7, 1))
    np.testing.assert_array_equal(data.x_train[..., 0], own["x_train"])
    np.testing.assert_array_equal(data.x_test[..., 0], own["x_test"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64])
def test_npz_labels_of_any_integer_type_become_int64(tmp_path, dtype):
    own = arrays()
    np.savez(tmp_path / "a.npz", **own | {key: own[key].astype(dtype) for key in ("y_train", "y_test")})
    data = load(npz(tmp_path / "a.npz"))
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert data.y_train.tolist() == own["y_train"].tolist()


def test_npz_default_pad_is_four(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    assert load(npz(tmp_path / "a.npz", pad=None)).pad == 4


def grey(n: int, *size: int) -> np.ndarray:
    return np.zeros((n, *size), np.uint8)


NPZ_MISTAKES = {
    "float images": ({"x_train": np.zeros((12, 5, 7, 3), np.float32)}, ["x_train", "float32", "uint8"]),
    "signed images": ({"x_test": np.zeros((6, 5, 7, 3), np.int8)}, ["x_test", "int8", "uint8"]),
    "two axes": ({"x_train": grey(12, 35)}, ["x_train", "(12, 35)", "[N, H, W, C]"]),
    "five axes": ({"x_test": grey(6, 5, 7, 3, 1)}, ["x_test", "(6, 5, 7, 3, 1)", "[N, H, W, C]"]),
    "no images": ({"x_train": grey(0, 5, 7, 3), "y_train": np.arange(0)}, ["x_train", "(0, 5, 7, 3)"]),
    "no test images": ({"x_test": grey(0, 5, 7, 3), "y_test": np.arange(0)}, ["x_test", "(0, 5, 7, 3)"]),
    "no pixels": ({"x_train": grey(12, 0, 7, 3)}, ["x_train", "(12, 0, 7, 3)"]),
    "a label short": ({"y_train": np.arange(11) % 3}, ["y_train", "11", "12"]),
    "a test label more": ({"y_test": np.arange(7) % 3}, ["y_test", "7", "6"]),
    "negative label": ({"y_train": np.arange(12) % 3 - 1}, ["y_train", "-1", "start at 0"]),
    "negative test label": ({"y_test": np.arange(6) % 3 - 1}, ["y_test", "-1", "start at 0"]),
    "float labels": ({"y_train": np.arange(12) % 3.0}, ["y_train", "float64", "integers"]),
    "bool labels": ({"y_test": np.arange(6) % 2 == 0}, ["y_test", "bool", "integers"]),
    "one-hot labels": ({"y_train": np.eye(3, dtype=int)[np.arange(12) % 3]}, ["y_train", "(12, 3)", "integers"]),
    "test label beyond": ({"y_test": np.array([0, 1, 2, 3, 0, 1])}, ["y_test", "3", "ends at 2"]),
    "empty class": ({"y_train": np.arange(12) % 3 * 2}, ["class 1", "no training image"]),
    "labels from 1": ({"y_train": np.arange(12) % 3 + 1}, ["class 0", "no training image"]),
    "other size": ({"x_test": grey(6, 7, 5, 3)}, ["x_train", "(5, 7, 3)", "x_test", "(7, 5, 3)"]),
    "other channels": ({"x_test": grey(6, 5, 7)}, ["x_train", "(5, 7, 3)", "x_test", "(5, 7, 1)"]),
    "label beyond int64": ({"y_train": np.array([0, 1, 2, 2**63] * 3, np.uint64)}, ["y_train", str(2**63)]),
    "test label beyond int64": ({"y_test": np.array([0, 1, 2**63] * 2, np.uint64)}, ["y_test", str(2**63)]),
}


@pytest.mark.parametrize(("changed", "words"), NPZ_MISTAKES.values(), ids=NPZ_MISTAKES.keys())
def test_npz_content_mistakes_are_told_in_one_line(tmp_path, changed, words):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays(**changed))
    message = mistake(npz(path))
    assert [word for word in [str(path), *words] if word not in message] == []


@pytest.mark.parametrize("missing", ["x_train", "y_train", "x_test", "y_test"])
def test_npz_missing_key_is_named_beside_those_there(tmp_path, missing):
    own = arrays()
    own["images"] = own.pop(missing)
    np.savez(tmp_path / "a.npz", **own)
    message = mistake(npz(tmp_path / "a.npz"))
    assert f"{missing!r} is missing" in message
    assert "'images'" in message


def test_npz_huge_label_is_told_without_counting_up_to_it(tmp_path):
    """A label such as an identity number must not fill the memory with the range below it."""
    np.savez(tmp_path / "a.npz", **arrays(y_train=np.array([0, 1, 2, 300_000] * 3)))
    tracemalloc.start()
    try:
        message = mistake(npz(tmp_path / "a.npz"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "class 3" in message
    assert peak < 2e6


def a_saved_file(path: Path) -> bytes:
    np.savez_compressed(path, **arrays())
    return path.read_bytes()


def flipped_inside(path: Path) -> bytes:
    """A compressed archive whose index is intact, its first member's stream is not: zlib's error, not zipfile's."""
    content = bytearray(a_saved_file(path))
    name, extra = struct.unpack_from("<HH", content, 26)
    content[30 + name + extra] = 0xFF  # no block of a deflate stream begins so
    return bytes(content)


def of_raw_members(path: Path) -> bytes:
    """A zip whose members bear the right names but are no arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        for key in arrays():
            archive.writestr(f"{key}.npy", "no array")
    return path.read_bytes()


def a_single_array(path: Path) -> bytes:
    with path.open("wb") as file:
        np.save(file, arrays()["x_train"])
    return path.read_bytes()


DAMAGE = {
    "no zip": lambda path: b"this is no zip file\n" * 9,
    "empty": lambda path: b"",
    "truncated": lambda path: a_saved_file(path)[:-300],
    "half": lambda path: (content := a_saved_file(path))[: len(content) // 2],
    "damaged inside": flipped_inside,
    "members that are no arrays": of_raw_members,
    "a single array": a_single_array,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_npz_damaged_file_is_told_in_one_line_and_closed(tmp_path, damage):
    path = tmp_path / "a.npz"
    path.write_bytes(damage(path))
    gc.collect()
    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always")
        message = mistake(npz(path))
        gc.collect()
    assert [str(warning.message) for warning in left_open] == []
    assert str(path) in message
    assert "not a readable npz" in message


def test_npz_missing_file(tmp_path):
    assert "no such file" in mistake(npz(tmp_path / "none.npz"))
    assert "a folder, not a file" in mistake(npz(tmp_path))


class Evil:
    """Unpickling it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("key", ["x_train", "y_test"])
def test_npz_pickled_objects_are_refused_and_not_executed(tmp_path, key):
    path, mark = tmp_path / "a.npz", tmp_path / "executed"
    np.savez(path, **arrays(**{key: np.array([Evil(mark)], dtype=object)}))
    assert "pickled" in mistake(npz(path))
    assert not mark.exists()
    with np.load(path, allow_pickle=True) as archive:  # the trap is armed: whoever unpickles it makes the directory
        archive[key]
    assert mark.exists()


def test_npz_that_is_a_pickle_is_refused_and_not_executed(tmp_path):
    path, mark = tmp_path / "a.npz", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Evil(mark)))
    assert str(path) in mistake(npz(path))
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar01", "did you mean 'cifar10'?"),
        ("fashion-mnist", "did you mean 'fashion_mnist'?"),
        ("", "choose from: digits, cifar10, cifar100, fashion_mnist, npz:PATH, folder:PATH, csv:FILE, hf:NAME"),
    ],
)
def test_unknown_data_set(name, words):
    assert mistake(DataConfig(name=name)) == f"unknown data set {name!r}: {words}"


@pytest.mark.parametrize("pad", [5, 6, 100])
def test_pad_too_large_for_the_image(tmp_path, pad):
    np.savez(tmp_path / "a.npz", **arrays())
    message = mistake(npz(tmp_path / "a.npz", pad=pad))
    assert f"data.pad={pad}" in message
    assert "5 pixels" in message


def test_largest_pad_that_reflects_is_taken(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    assert load(npz(tmp_path / "a.npz", pad=4)).pad == 4


TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}
OFFLINE = {
    "no network": (URLError, ["Name or service not known"], "Name or service not known"),
    "many lines": (RuntimeError, ["Error downloading train-images:\nTried https://a\nTried https://b"], "Error downloading train-images"),
    "corrupted": (RuntimeError, ["Dataset not found or corrupted."], "corrupted"),
    "not allowed": (PermissionError, [13, "Permission denied"], "Permission denied"),
    "no words": (TimeoutError, [], "TimeoutError"),
}


@pytest.mark.parametrize(("error", "said", "words"), OFFLINE.values(), ids=OFFLINE.keys())
@pytest.mark.parametrize("name", TORCHVISION)
def test_offline_says_what_to_do(monkeypatch, tmp_path, name, error, said, words):
    def offline(*args, **kwargs):
        raise error(*said)

    monkeypatch.setattr(torchvision.datasets, TORCHVISION[name], offline)
    message = mistake(DataConfig(name=name, root=tmp_path))
    assert [w for w in (name, str(tmp_path), words, "connect to the network", "npz:PATH") if w not in message] == []
    assert "https://" not in message


@pytest.mark.parametrize(
    ("name", "size", "classes", "torch_data"),
    [("cifar10", (32, 32, 3), 10, False), ("cifar100", (32, 32, 3), 100, False), ("fashion_mnist", (28, 28), 10, True)],
)
def test_torchvision_arrays_come_through(monkeypatch, tmp_path, name, size, classes, torch_data):
    """Colour sets hold an HWC array and a list of labels, grey ones tensors without a channel."""
    chance = np.random.default_rng(0)
    images = {train: chance.integers(0, 256, (20 if train else 7, *size), dtype=np.uint8) for train in (True, False)}
    labels = {train: chance.integers(0, classes, len(images[train])) for train in (True, False)}
    asked = []

    def fake(root, *, train, download):
        asked.append((root, train, download))
        if torch_data:
            return SimpleNamespace(data=torch.from_numpy(images[train]), targets=torch.from_numpy(labels[train]))
        return SimpleNamespace(data=images[train], targets=labels[train].tolist())

    monkeypatch.setattr(torchvision.datasets, TORCHVISION[name], fake)
    data = load(DataConfig(name=name, root=tmp_path))
    assert sorted(asked) == [(str(tmp_path), False, True), (str(tmp_path), True, True)]
    whole = (*size, 1) if torch_data else size
    assert (data.x_train.shape, data.x_test.shape) == ((20, *whole), (7, *whole))
    assert (data.x_train.dtype, data.y_train.dtype, data.y_test.dtype) == (np.uint8, np.int64, np.int64)
    np.testing.assert_array_equal(data.x_train.reshape(20, *size), images[True])
    np.testing.assert_array_equal(data.x_test.reshape(7, *size), images[False])
    assert (data.y_train.tolist(), data.y_test.tolist()) == (labels[True].tolist(), labels[False].tolist())
    assert (data.name, data.classes, data.pad, data.flip) == (name, classes, 4, True)


def test_every_source_says_what_it_is():
    assert sorted(SOURCES) == ["cifar10", "cifar100", "digits", "fashion_mnist"]
    assert all(SOURCES[name].about for name in SOURCES)
