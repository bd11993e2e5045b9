"""Images as arrays: ``npz:PATH``."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ...checks import UserError, pass_on_shortage, regular_file
from ...config import DataConfig, location
from ...env import memory
from ...talk import Remarks
from ..dataset import ImageData, Images, Labels, Unlabelled
from .base import READERS, UNLABELLED_READERS

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
UNLABELLED_KEYS = ("x",)
MAX_CHANNELS = 4  # of what may be rows of 1 or 3 pixels; with more, and as long, they are channels before height and width
LARGEST_HEADER = 1 << 14  # bytes; numpy itself refuses one over 10,000


@READERS.register("npz")
def _read(config: DataConfig, _: Remarks) -> ImageData:
    return read_npz(Path(location(config.name)))


@UNLABELLED_READERS.register("npz")
def _read_unlabelled(config: DataConfig, _: Remarks) -> Unlabelled:
    path = Path(location(config.name))
    return Unlabelled(path.stem, _checked_images(path, "x", _read_arrays(path, UNLABELLED_KEYS)["x"]))


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
    file = regular_file(path, f"npz:{path}")
    try:
        with zipfile.ZipFile(file) as archive:
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
