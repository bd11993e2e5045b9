"""Image files of any source: their headers are read, then they are decoded into memory, or streamed if they do not fit."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin

from ..checks import UserError, some
from ..config import LARGEST_IMAGE, DataConfig
from ..env import memory
from ..talk import Remarks
from .dataset import ImageData
from .lazy_images import FORMATS, Broken, Encoded, Images, Labels, Pictures, in_threads, or_broken, quiet

T = TypeVar("T")

GREY = ("1", "L", "LA")  # Pillow's modes
SPLITS = ("train", "val", "test")
OTHER_WORDS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
TEST_PART = 5  # a fifth of each class is test if there is no split
PROGRESS_SECONDS = 5.0
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF 2.3, orientation
BITS, KIND = TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.SAMPLEFORMAT  # of each channel
UNSIGNED = 1  # kind of a channel whose values are whole numbers from 0
LARGEST_STREAMED = 1 << 22  # pixels of an image that is neither resized nor held in memory


class Item(NamedTuple):
    """An image that is to be read: its name in messages, its class, its split (empty if the source has none)."""

    name: str
    label: str
    split: str


class Header(NamedTuple):
    """The size (width, height) in pixels and Pillow's mode of an image, read from its file before it is decoded.

    The size is that of the upright image, as EXIF says; but not turned if images are resized to one square anyway.
    """

    size: tuple[int, int]
    mode: str


def assemble(
    config: DataConfig,
    name: str,
    items: Sequence[Item],
    shelf: Encoded,
    remarks: Remarks,
    *,
    classes: Sequence[str] = (),
    by_content: bool = True,
) -> ImageData:
    """Make the data set of these images. Item i is in row i of the shelf.

    Args:
        name: as tables print the data set.
        classes: the order of the classes. Default: sorted.
        by_content: if there is no split and memory holds the images, the content of a file decides whether it is test. Otherwise its name
            does.

    Raises:
        UserError: a class or split lacks images, they have several sizes without ``data.size``, or can't be read without
            ``data.skip_broken``.
    """
    source = config.name
    if not items:
        raise UserError(f"{source}: no images; it needs PATH/train/CLASS and PATH/test/CLASS, PATH/CLASS, or a CSV with rows")
    _refuse_gaps(source, items)
    with quiet():
        pictures, headers = _pictures(config, items, shelf, remarks)
        streamed = _streamed(config, pictures, remarks)
        read: Sequence[Header | Images | Broken] = headers if streamed else _decoded(pictures, headers, remarks)
    kept = _sound(config, read, remarks)
    _refuse_gaps(source, [items[row] for row in kept.tolist()])
    labels, names = _numbered([items[row].label for row in kept.tolist()], classes)
    pictures = replace(pictures, rows=kept, labels=labels)
    if items[0].split:
        tested = np.array([items[row].split != "train" for row in kept.tolist()])
    else:
        tested = _fifth(labels, in_threads(lambda row: _key(shelf, row, content=by_content and not streamed), kept.tolist()))

    def images(positions: Labels) -> Images | Pictures:
        if streamed:
            return pictures.part(positions)
        return np.stack([_same_size(source, items, read, row) for row in kept[positions].tolist()])

    x_train, x_test = (images(np.flatnonzero(part)) for part in (~tested, tested))
    return ImageData(name, x_train, labels[~tested], x_test, labels[tested], len(names), class_names=names)


def read_all(config: DataConfig, items: Sequence[Item], shelf: Encoded, remarks: Remarks) -> list[Images]:
    """Read these images of one size into memory, whatever their classes and splits.

    Raises:
        UserError: memory does not hold them; they have several sizes without ``data.size``, or can't be read without
            ``data.skip_broken``.
    """
    with quiet():
        pictures, headers = _pictures(config, items, shelf, remarks)
        if too_large := _too_much(pictures):
            raise UserError(f"{too_large}; set data.size lower, or give fewer images")
        read = _decoded(pictures, headers, remarks)
    return [_same_size(config.name, items, read, row) for row in _sound(config, read, remarks).tolist()]


def _pictures(config: DataConfig, items: Sequence[Item], shelf: Encoded, remarks: Remarks) -> tuple[Pictures, list[Header | Broken]]:
    """The images of one size whose headers are sound, and all headers. The images' classes are not numbered yet.

    Raises:
        UserError: they have several sizes, and ``data.size`` is not set.
    """
    headers = _in_threads(
        lambda row: _header(shelf, row, turned=config.size is None), range(len(items)), f"{config.name}: headers of", remarks
    )
    rows = np.flatnonzero([isinstance(header, Header) for header in headers])
    sound = [header for header in headers if isinstance(header, Header)]
    if config.size is None:
        for row, header in zip(rows.tolist(), sound, strict=True):
            if header.size != sound[0].size:
                _refuse_sizes(config.name, items[rows[0]].name, sound[0].size, items[row].name, header.size)
    channels = config.channels or (1 if all(header.mode in GREY for header in sound) else 3)
    width, height = (config.size, config.size) if config.size else sound[0].size if sound else (0, 0)
    sides = (height, width, channels)
    return Pictures(config.name, shelf, rows, np.zeros_like(rows), sides, config.size, config.skip_broken), headers


def _streamed(config: DataConfig, pictures: Pictures, remarks: Remarks) -> bool:
    """Whether the images are streamed: by ``data.stream``, or because memory does not hold them.

    Raises:
        UserError: memory does not hold them, and each is too large to be streamed without ``data.size``.
    """
    too_large = "" if config.stream else _too_much(pictures)
    if not too_large:
        return config.stream
    if config.size is None and math.prod(pictures.sides[:2]) > LARGEST_STREAMED:
        raise UserError(f"{too_large}; set data.size=224, or another side to resize them to while they are streamed")
    remarks.tell(f"{too_large}: they are streamed")
    return True


def _too_much(pictures: Pictures) -> str:
    """A message that memory does not hold the images; empty if it does."""
    taken, limit = math.prod(pictures.shape), memory() // 2  # they are held twice: as they are, and padded
    if taken <= limit:
        return ""
    sides = "x".join(map(str, pictures.sides))
    return f"{pictures.source}: {len(pictures):,} images of {sides} take {taken:,} bytes, over half of this machine's memory ({limit:,})"


def _decoded(pictures: Pictures, headers: Sequence[Header | Broken], remarks: Remarks) -> list[Images | Broken]:
    """Decode every image, in the order of the headers."""

    def read(row: int) -> Images | Broken:
        shelf, channels = pictures.shelf, pictures.sides[2]
        image = or_broken(shelf.name(row), lambda: np.asarray(pictures.middle(shelf.image(row, channels))))
        return image if isinstance(image, Broken) else image.reshape(*image.shape[:2], channels)

    decoded = iter(_in_threads(read, pictures.rows.tolist(), f"{pictures.source}: decoded", remarks))
    return [header if isinstance(header, Broken) else next(decoded) for header in headers]


def _sound(config: DataConfig, read: Sequence[Header | Images | Broken], remarks: Remarks) -> Labels:
    """The rows that could be read.

    Raises:
        UserError: some could not, and ``data.skip_broken`` is not set.
    """
    source, broken = config.name, [result for result in read if isinstance(result, Broken)]
    kept = np.flatnonzero([not isinstance(result, Broken) for result in read])
    if broken:
        named = some(f"{name} ({why})" for name, why in broken)
        message = f"{source}: {len(broken):,} of {len(read):,} images can't be read: {named}"
        if not config.skip_broken:
            raise UserError(f"{message}; mend or remove them, or skip them with --set data.skip_broken=true")
        remarks.tell(f"{message}; skipped")
    return kept


def _same_size(source: str, items: Sequence[Item], read: Sequence[Header | Images | Broken], row: int) -> Images:
    """The decoded image of a row.

    Raises:
        UserError: its size differs from that of the first image.
    """
    first, first_image = next((row, image) for row, image in enumerate(read) if isinstance(image, np.ndarray))
    image = read[row]
    assert isinstance(image, np.ndarray)
    if image.shape != first_image.shape:
        _refuse_sizes(source, items[first].name, first_image.shape[1::-1], items[row].name, image.shape[1::-1])
    return image


def _numbered(labels: Sequence[str], order: Sequence[str]) -> tuple[Labels, tuple[str, ...]]:
    """Each image's class as a number, and the classes' names in that order."""
    present = set(labels)
    names = tuple(name for name in order if name in present) or tuple(sorted(present))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[label] for label in labels], dtype=np.int64), names


def _refuse_gaps(source: str, items: Sequence[Item]) -> None:
    """Refuse fewer than two classes, and a class without images to train or to test on."""
    names = sorted({item.label for item in items})
    if len(names) < 2:
        raise UserError(f"{source}: {f'a single class, {names[0]!r}' if names else 'no image is left'}; a classifier needs two")
    counts = Counter((item.label, item.split) for item in items)
    splits = sorted({item.split for item in items}, key=("", *SPLITS).index)
    if splits == [""]:
        single = [name for name in names if counts[name, ""] < 2]
        if single:
            raise UserError(f"{source}: class {single[0]!r} has a single image; it needs one to train on and one to test on")
        return
    if "train" not in splits or len(splits) < 2:
        raise UserError(f"{source}: every image is {splits[0]}; there must be train and test (or val), or no split at all")
    for name in names:
        for split in splits:
            if not counts[name, split]:
                other = next(other for other in splits if other != split)
                cure = f"make some of its {counts[name, other]:,} {other} images {split} images, or leave the class out of both"
                wanted = f"every class needs images of {' and '.join(splits)}"
                raise UserError(f"{source}: class {name!r} has no {split} image; {wanted}: {cure}")


def _fifth(labels: Labels, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Which images are test: a fifth of each class, rounded half up and one at least, those with the lowest keys."""
    tested = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        positions = sorted(np.flatnonzero(labels == label).tolist(), key=keys.__getitem__)
        tested[positions[: max(1, (2 * len(positions) + TEST_PART) // (2 * TEST_PART))]] = True
    return tested


def _key(shelf: Encoded, row: int, *, content: bool) -> bytes:
    """SHA-256 of the file's content or, if not all files can be read again, of its name."""
    if not content:
        return hashlib.sha256(os.fsencode(shelf.name(row))).digest()
    with shelf.open(row) as file:
        return hashlib.sha256(file.read()).digest()


def _refuse_sizes(source: str, first: str, first_size: Sequence[int], other: str, other_size: Sequence[int]) -> None:
    """Refuse images of two sizes (width, height) in pixels."""
    first_sides, other_sides = ("x".join(map(str, sides)) for sides in (first_size, other_size))
    raise UserError(
        f"{source}: its images have several sizes ({first} is {first_sides}, {other} {other_sides}); "
        "set data.size=64, or another side to resize them to"
    )


def _header(shelf: Encoded, row: int, *, turned: bool) -> Header | Broken:
    def read() -> Header:
        with shelf.open(row) as file, Image.open(file, formats=FORMATS) as image:
            if deeper := _deeper(image):
                raise ValueError(f"{deeper}, not 8 bits a channel")
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"{image.width}x{image.height} pixels; at most {LARGEST_IMAGE:,} are read")
            return Header(_upright(image) if turned else image.size, image.mode)

    return or_broken(shelf.name(row), read)


def _deeper(image: ImageFile.ImageFile) -> str:
    """What an image has instead of 8 bits per channel; empty if it has those. Pillow would cut or misread other values silently."""
    stored = re.search(r"\w+;16[BLN]", str([tile[3] for tile in image.tile[:1]]))
    mode = stored[0] if stored else image.mode
    if stored or mode.startswith(("I", "F")):
        return f"mode {mode}"
    if image.format == "PPM":
        most = next((most for tile in image.tile[:1] if isinstance(tile[3], tuple) for most in tile[3] if isinstance(most, int)), 0)
        return f"values to {most}" if most > 255 else ""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, kinds = (image.tag_v2.get(tag, (least,)) for tag, least in ((BITS, 8), (KIND, UNSIGNED)))
        return f"{max(bits)} bits" if max(bits) > 8 else "signed or fractional values" if set(kinds) != {UNSIGNED} else ""
    return ""


def _upright(image: Image.Image) -> tuple[int, int]:
    """The size of an image once it is upright. Only one that lies on its side is decoded, because Pillow may have turned a TIFF's."""
    if image.width == image.height or image.getexif().get(ExifTags.Base.Orientation) not in ON_ITS_SIDE:
        return image.size
    return ImageOps.exif_transpose(image).size


def _in_threads(work: Callable[[int], T], rows: Sequence[int], done: str, remarks: Remarks) -> list[T]:
    """``work(row)`` of every row, in order. Every few seconds ``remarks`` say how many are done."""
    last = time.monotonic()

    def tell(count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS and count < len(rows):
            remarks.say(f"{done} {count:,} of {len(rows):,} images")
            last = time.monotonic()

    return in_threads(work, rows, tell)
