"""Data sets by name: ``digits``, ``cifar10``, ``cifar100``, ``fashion_mnist``; by place: ``npz:``, ``folder:``, ``csv:``, ``hf:``."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..checks import UserError, did_you_mean, first_line, pass_on_shortage, regular_file
from ..config import DataConfig
from ..env import memory
from ..registry import Registry
from ..talk import Remarks, unheard
from .dataset import ImageData, Images, Labels, Unlabelled, part
from .folders import read_csv, read_folder, read_unlabelled
from .huggingface import read_hub
from .splits import stratified

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
UNLABELLED_KEYS = ("x",)
MAX_CHANNELS = 4  # of what may be rows of 1 or 3 pixels; with more, and as long, they are channels before height and width
LARGEST_HEADER = 1 << 14  # bytes; numpy itself refuses one over 10,000


@dataclass(frozen=True)
class Source:
    """A named data set that can be loaded: ``read(root)`` gives the images, ``about`` one line for listings."""

    read: Callable[[Path], ImageData]
    about: str


SOURCES: Registry[Source] = Registry("data set")
OWN = {
    "npz:PATH": "your images: x_train, y_train, x_test, y_test; uint8 NHWC or NHW, labels from 0; with --unlabelled: x alone",
    "folder:PATH": "your image files: train/CLASS/* and test/CLASS/* (or val), or CLASS/* alone, a fifth of which is test; "
    "classes numbered by sorted name, names kept in the student's file; with --unlabelled: files in any folders",
    "csv:FILE": "your image files by a list: path,label[,split], paths relative to it; otherwise as folder:PATH",
    "hf:NAME": "a Hugging Face data set, NAME or NAME:CONFIG, or a folder that save_to_disk wrote; needs the extra hf",
}
READERS = {"folder": read_folder, "csv": read_csv, "hf": read_hub}


def load(config: DataConfig, remarks: Remarks | None = None) -> ImageData:
    """The data that a config names, with its own crop, padding, flip and number of training images where the config says so.

    ``remarks`` are told what of the files is left out; left out itself, nobody hears of it.

    Raises:
        UserError: unknown name, file missing or not valid, no network; in one line.
    """
    if config.user_loaders:
        from .user_loaders import recall  # brings torch

        return recall(config.name)
    if config.name.startswith("npz:"):
        data = read_npz(Path(config.name.removeprefix("npz:")))
    elif (kind := config.name.partition(":")[0]) in READERS and ":" in config.name:
        data = READERS[kind](config, remarks or unheard())
    elif config.name in SOURCES:
        data = SOURCES[config.name].read(config.root.expanduser())
    else:
        raise UserError(f"unknown data set {config.name!r}: {did_you_mean(config.name, [*SOURCES, *OWN])}")
    crop = config.crop or ("resized" if data.streamed and config.pad is None else "shift")
    pad = 0 if crop == "resized" else data.pad if config.pad is None else config.pad
    smallest = min(data.spec.height, data.spec.width)
    if pad >= smallest:
        raise UserError(f"data.pad={pad}: reflection needs less than the image's {smallest} pixels; set data.pad lower")
    if config.randaugment is not None and data.spec.channels not in (1, 3):
        raise UserError(
            f"data.randaugment={config.randaugment}: its operations are on grey or RGB images, not on {data.spec.channels} channels"
        )
    flip = data.flip if config.flip is None else config.flip
    data = replace(data, pad=pad, flip=flip, crop=crop, randaugment=config.randaugment)
    return data if config.limit_train is None else _limited(data, config.limit_train)


def load_unlabelled(config: DataConfig, beside: ImageData, remarks: Remarks | None = None) -> Unlabelled:
    """The images of ``data.unlabelled``. Files are made grey or RGB as the labelled ones are and, where those are square, resized to them.

    Raises:
        UserError: they are missing or not valid, have other sizes than the labelled ones, or those are streamed; in one line.
    """
    what, like = str(config.unlabelled), beside.spec
    if beside.streamed:
        raise UserError(
            f"data.unlabelled={what}: unlabelled images are held in memory beside the labelled ones, but {config.name} is streamed; "
            f"leave data.stream out or set data.size lower, so that it is held, or leave unlabelled out"
        )
    if what.startswith("npz:"):
        path = Path(what.removeprefix("npz:"))
        found = Unlabelled(path.stem, _checked_images(path, "x", _read_arrays(path, UNLABELLED_KEYS)["x"]))
    else:
        size = like.height if like.height == like.width else None
        found = read_unlabelled(config.model_copy(update={"name": what, "size": size, "channels": like.channels}), remarks or unheard())
    if found.images.shape[1:] != (like.height, like.width, like.channels):
        ours, theirs = ("x".join(map(str, shape)) for shape in (found.images.shape[1:], (like.height, like.width, like.channels)))
        raise UserError(f"{what}: its images are {ours}, those of {like.name} {theirs}; give images of that size")
    return found


def _limited(data: ImageData, images: int) -> ImageData:
    """About so many training images, the same share of each class and one of each at least."""
    kept = stratified(data.y_train, min(images, len(data.y_train)), len(data.y_train), least=1)
    return replace(data, x_train=part(data.x_train, kept), y_train=data.y_train[kept])


def _read_digits(_: Path) -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images, labels = _enlarge(small, 16)[..., None], bunch.target.astype(np.int64)
    half = len(images) // 2
    return ImageData("digits", images[:half], labels[:half], images[half:], labels[half:], 10, pad=2, flip=False)


def _enlarge(images: Images, size: int) -> Images:
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images])


def _torchvision_reader(name: str, class_name: str, classes: int) -> Callable[[Path], ImageData]:
    def read(root: Path) -> ImageData:
        import torchvision.datasets

        dataset = getattr(torchvision.datasets, class_name)
        parts = []
        for train in (True, False):
            try:
                part = dataset(str(root), train=train, download=True)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{name} is not in {root} and could not be downloaded ({first_line(error)}); connect to the network, copy "
                    f"torchvision's files there, or use --dataset npz:PATH"
                ) from None
            images = np.asarray(part.data)
            parts.append((images[..., None] if images.ndim == 3 else images, np.asarray(part.targets, dtype=np.int64)))
        (x_train, y_train), (x_test, y_test) = parts
        return ImageData(name, x_train, y_train, x_test, y_test, classes)

    return read


def _register(name: str, read: Callable[[Path], ImageData], about: str) -> None:
    SOURCES.register(name)(Source(read, about))


_register("digits", _read_digits, "scikit-learn's 1,797 digits, 8x8 enlarged to 16x16; first 898 train, last 899 test; offline")
_register("cifar10", _torchvision_reader("cifar10", "CIFAR10", 10), "50,000 + 10,000 colour images 32x32, torchvision's download")
_register("cifar100", _torchvision_reader("cifar100", "CIFAR100", 100), "50,000 + 10,000 colour images 32x32, torchvision's download")
_register(
    "fashion_mnist",
    _torchvision_reader("fashion_mnist", "FashionMNIST", 10),
    "60,000 + 10,000 grey images 28x28, torchvision's download",
)


def read_npz(path: Path) -> ImageData:
    """A ``.npz`` with ``x_train, y_train, x_test, y_test``: images uint8 NHWC or NHW, integer labels from 0.

    Raises:
        UserError: the file is missing or no npz, a key is missing, the arrays are too large, a dtype, shape, length or label is
            wrong, or a class has no training image.
    """
    arrays = _read_arrays(path, NPZ_KEYS)
    images = {key: _checked_images(path, key, arrays[key]) for key in ("x_train", "x_test")}
    if images["x_train"].shape[1:] != images["x_test"].shape[1:]:
        raise UserError(f"npz:{path}: x_train is {images['x_train'].shape[1:]} an image, x_test {images['x_test'].shape[1:]}")
    labels = {key: _checked_labels(path, key, arrays[key], len(images[f"x_{key[2:]}"])) for key in ("y_train", "y_test")}
    present = np.unique(labels["y_train"])
    classes, last = len(present), int(labels["y_test"].max())
    absent = np.flatnonzero(present != np.arange(classes))
    if len(absent):
        raise UserError(f"npz:{path}: class {absent[0]} has no training image; labels must be 0 to K-1 with every class present")
    if classes < 2:
        raise UserError(f"npz:{path}: y_train has a single class; a classifier needs two")
    if last >= classes:
        raise UserError(f"npz:{path}: y_test has label {last}, but y_train ends at {classes - 1}")
    return ImageData(path.stem, images["x_train"], labels["y_train"], images["x_test"], labels["y_test"], classes)


def _read_arrays(path: Path, keys: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of these keys in an npz file.

    Raises:
        UserError: the file is missing or no npz, a key is missing, or the arrays are too large.
    """
    found = regular_file(path, f"npz:{path}")
    try:
        with zipfile.ZipFile(found) as archive:
            return _arrays(path, archive, keys)
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise anything on junk, and numpy's words advise to load pickles
        pass_on_shortage(error)
        raise UserError(f"npz:{path}: not a readable npz file of plain arrays (damaged, no zip, or with pickled objects in it)") from None


def _arrays(path: Path, archive: zipfile.ZipFile, keys: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Nothing is inflated before the zip's directory and the arrays' own headers agree on a size that fits."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    missing = [key for key in keys if key not in members]
    if missing:
        raise UserError(f"npz:{path}: key {missing[0]!r} is missing; it has {sorted(members)}, needs {list(keys)}")
    size, limit = sum(members[key].file_size for key in keys), memory() // 2  # the images are held twice: as they are, and padded
    if size > limit:
        raise UserError(f"npz:{path}: its arrays take {size:,} bytes, over half of this machine's memory ({limit:,}); give fewer images")
    arrays = {}
    for key in keys:
        with archive.open(members[key]) as member:
            if _claimed_size(member) != members[key].file_size:
                raise ValueError("the zip's directory and the array's header disagree")
        with archive.open(members[key]) as member:
            arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _claimed_size(member: IO[bytes]) -> int:
    """Bytes of an ``.npy`` file by its own header, of which no more is read than a sound one has."""
    head = io.BytesIO(member.read(LARGEST_HEADER))
    major, _ = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(head)
    return head.tell() + math.prod(shape) * dtype.itemsize


def _checked_images(path: Path, key: str, array: npt.NDArray[Any]) -> Images:
    if array.dtype != np.uint8:
        raise UserError(f"npz:{path}: {key} is {array.dtype}, must be uint8 (0 to 255)")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise UserError(f"npz:{path}: {key} has shape {array.shape}, must be [N, H, W, C] or [N, H, W], none of them 0")
    if array.ndim == 4 and array.shape[1] in (1, 3) and min(array.shape[2:]) > MAX_CHANNELS:
        raise UserError(f"npz:{path}: {key} has shape {array.shape}, which looks like [N, C, H, W]; transpose it to [N, H, W, C]")
    return array if array.ndim == 4 else array[..., None]


def _checked_labels(path: Path, key: str, array: npt.NDArray[Any], images: int) -> Labels:
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
        raise UserError(f"npz:{path}: {key} is {array.dtype} {array.shape}, must be integers [N]")
    if len(array) != images:
        raise UserError(f"npz:{path}: {key} has {len(array)} labels for {images} images")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise UserError(f"npz:{path}: {key} has labels from {array.min()} to {array.max()}; labels start at 0 and end at K-1")
    return array.astype(np.int64)
