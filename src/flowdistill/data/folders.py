"""A user's own image files: ``folder:PATH``, sorted into folders by class, and ``csv:FILE``, which lists them."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ..checks import UserError, did_you_mean, first_line, printable, regular_file
from ..config import DataConfig
from ..env import memory
from .images import ImageData, Images, Labels, Unlabelled

T = TypeVar("T")

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not all that Pillow knows: EPS would start another program
GREY = ("1", "L", "LA")  # Pillow's modes
TEST_PART = 5  # where no split is given, a fifth of each class is test
LARGEST_IMAGE = 1 << 27  # pixels
COLUMNS = ("path", "label", "split")
SPLITS = ("train", "val", "test")
OTHER_WORDS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
NAMED = 3  # of many files, so many are named
BATCH = 64  # files that a thread takes at once
PROGRESS_SECONDS = 5.0


class Item(NamedTuple):
    """An image file that is to be read: its name in messages, its place, its class, its split (empty where none is given)."""

    name: str
    path: Path
    label: str
    split: str


class Header(NamedTuple):
    """What a file says of its image before it is decoded: width and height in pixels, and Pillow's mode."""

    size: tuple[int, int]
    mode: str


class Decoded(NamedTuple):
    """An image uint8 [H, W, C], and the SHA-256 of its file."""

    image: Images
    digest: str


class Broken(NamedTuple):
    """A file that can't be read, and why."""

    name: str
    why: str


def read_folder(config: DataConfig) -> ImageData:
    """Images in folders: ``PATH/train/CLASS`` beside ``PATH/test/CLASS`` or ``PATH/val/CLASS``, or ``PATH/CLASS`` alone.

    Classes are numbered by their sorted names. Where both are there, ``test`` is read and ``val`` is not. Of ``PATH/CLASS`` alone a fifth
    of each class is test (rounded half up, one at least): the files with the lowest SHA-256, whatever their names. Folders below a class
    belong to it. Hidden files are ignored; files without an image's extension or outside of a class are left out, which is said on stderr.

    Images are turned as their EXIF orientation says, made grey or RGB (transparency is dropped), and, with ``data.size``, resized to
    that short side (bilinear) and cut to a square in the middle. Without ``data.channels`` they are grey where every file is. Of an
    animation the first image is read.

    Raises:
        UserError: no such folder, no class, an empty one or one that lacks a split, a link that leads outside or in a circle, images of
            several sizes without ``data.size``, more of them than memory holds, or files that can't be read without ``data.skip_broken``.
    """
    what = config.name
    root = _folder(what)
    tree = _Tree(what, root)
    inner = tree.folders(root, (str(root),))
    for name in inner:
        meant = OTHER_WORDS.get(name.lower(), name.lower())
        if meant in SPLITS and name != meant:
            raise UserError(f"{what}: {name}/ looks like a split; rename it to {meant}/, or use csv:FILE if it is a class")
    splits = [split for split in SPLITS if split in inner]
    if splits == ["train"]:
        raise UserError(
            f"{what}: it has train/ but neither test/ nor val/; add one, or take a fifth of train with {what.rstrip('/')}/train"
        )
    if splits and "train" not in splits:
        raise UserError(f"{what}: it has {splits[-1]}/ but no train/; add that, or rename {splits[-1]}/ if it is a class")
    if splits:
        tree.left_out += [name for name in inner if name not in splits]
        items = [item for split in _used(what, splits) for item in tree.split(inner[split], split)]
    else:
        items = list(tree.classes(inner, "", (str(root),)))
    data = _read(what, root.name, items, config)
    tree.tell_left_out("no class's images")
    return data


def read_csv(config: DataConfig) -> ImageData:
    """Images that a CSV file lists: columns ``path`` (relative to the file), ``label`` and, if given, ``split`` (train, val or test).

    Classes, splits and images are treated as in ``read_folder``.

    Raises:
        UserError: no such file, a column missing or unknown, a row that is not whole, a path outside of the file's folder or named
            twice; and what ``read_folder`` refuses.
    """
    what = config.name
    place = Path(what.removeprefix("csv:"))
    found = regular_file(place, what)
    root = found.parent.resolve()
    try:
        with found.open(encoding="utf-8-sig", newline="") as file:
            items = list(_rows(csv.reader(file, strict=True), root, what))
    except UnicodeDecodeError:
        raise UserError(f"{what}: not UTF-8 text; write path,label[,split] as CSV") from None
    except csv.Error as error:
        raise UserError(f"{what}: no CSV ({first_line(error)}); write path,label[,split]") from None
    used = _used(what, {item.split for item in items})
    return _read(what, place.stem, [item for item in items if item.split in used], config)


def read_unlabelled(config: DataConfig) -> Unlabelled:
    """All images in a folder and in those below it, whatever their names; else as ``read_folder``.

    Raises:
        UserError: no such folder, no image in it, or as ``read_folder``.
    """
    what = config.name
    root = _folder(what)
    tree = _Tree(what, root)
    items = [Item(tree.name(path), path, "", "") for path in tree.images(root, (str(root),))]
    _, decoded = _sound(what, items, config)
    if not decoded:
        raise UserError(f"{what}: no image ({' '.join(EXTENSIONS)}) is in it; name a folder with images")
    tree.tell_left_out("no image")
    return Unlabelled(root.name, np.stack([file.image for file in decoded]))


def _folder(what: str) -> Path:
    given = what.removeprefix("folder:")
    try:
        place = Path(given).expanduser().resolve()
        there = bool(given) and place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{what}: no such folder ({getattr(error, 'strerror', None) or first_line(error)})") from None
    if not there:
        raise UserError(f"{what}: no such folder; write folder:PATH")
    if not place.is_dir():
        raise UserError(f"{what}: a file, not a folder; name a folder of images, or use csv:FILE or npz:PATH")
    return place


@dataclass
class _Tree:
    """A folder of images, walked in sorted order. ``above`` are the real paths of a folder and of those that hold it.

    Attributes:
        what: as messages name it.
        root: its real path.
        left_out: what was met that is no image of a class.
    """

    what: str
    root: Path
    left_out: list[str] = field(default_factory=list)

    def split(self, folder: Path, split: str) -> Iterator[Item]:
        """The images of a split's classes."""
        above = (str(self.root), os.path.realpath(folder))
        yield from self.classes(self.folders(folder, above), split, above)

    def classes(self, folders: Mapping[str, Path], split: str, above: tuple[str, ...]) -> Iterator[Item]:
        """The images of these class folders."""
        for label, folder in folders.items():
            images = list(self.images(folder, (*above, os.path.realpath(folder))))
            if not images:
                raise UserError(
                    f"{self.what}: class folder {self.name(folder)} has no image ({' '.join(EXTENSIONS)}); fill it or remove it"
                )
            yield from (Item(self.name(image), image, label, split) for image in images)

    def folders(self, folder: Path, above: tuple[str, ...]) -> dict[str, Path]:
        """The folders in a folder; all else is left out."""
        found = {}
        for path in self.below(folder, above):
            if path.is_dir():
                found[path.name] = path
            else:
                self.left_out.append(self.name(path))
        return found

    def images(self, folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
        """The image files in a folder and in those below it."""
        for path in self.below(folder, above):
            if path.is_dir():
                yield from self.images(path, (*above, os.path.realpath(path)))
            elif path.suffix.lower() in EXTENSIONS:
                yield path
            else:
                self.left_out.append(self.name(path))

    def below(self, folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
        """What is in a folder and not hidden."""
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_symlink():
                target = os.path.realpath(path)
                if target in above and path.is_dir():
                    raise UserError(f"{self.what}: the link {self.name(path)} leads in a circle; remove it")
                if not Path(target).is_relative_to(self.root):
                    raise UserError(f"{self.what}: the link {self.name(path)} leads outside, to {target}; put a copy in its place")
            yield path

    def tell_left_out(self, why: str) -> None:
        """Say on stderr what was left out."""
        if self.left_out:
            _say(f"{self.what}: left out, as {why}: {_some(sorted(self.left_out))}")

    def name(self, path: Path) -> str:
        """A path as messages name it."""
        return str(path.relative_to(self.root))


def _used(what: str, splits: Collection[str]) -> list[str]:
    """The splits that are read: of test and val, test."""
    if "test" in splits and "val" in splits:
        _say(f"{what}: test is read, val is not")
        return [split for split in splits if split != "val"]
    return list(splits)


def _rows(lines: Iterator[list[str]], root: Path, what: str) -> Iterator[Item]:
    header = [name.strip() for name in next(lines, [])]
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise UserError(f"{what}: unknown column {unknown[0]!r}: {did_you_mean(unknown[0], COLUMNS)}")
    if not {"path", "label"} <= set(header) or len(set(header)) < len(header):
        raise UserError(f"{what}: its first line is {','.join(header)!r}; write path,label or path,label,split")
    seen: dict[str, int] = {}
    for number, cells in enumerate(lines, 2):
        if not cells:
            continue
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
        if len(cells) != len(header) or not all(row.values()):
            raise UserError(f"{what}: row {number} is {','.join(cells)!r}; it needs {','.join(header)}")
        if row.get("split", "train") not in SPLITS:
            raise UserError(f"{what}: row {number} has split {row['split']!r}; {did_you_mean(row['split'], SPLITS)}")
        path = root / row["path"]
        if not _inside(path, root):
            raise UserError(f"{what}: row {number} leads outside of the file's folder, to {row['path']}; put the images beside the file")
        place = os.path.normpath(path)
        if place in seen:
            raise UserError(f"{what}: rows {seen[place]} and {number} both name {row['path']}; name it once")
        seen[place] = number
        yield Item(row["path"], path, row["label"], row.get("split", ""))


def _inside(path: Path, root: Path) -> bool:
    try:
        return Path(os.path.realpath(path)).is_relative_to(root)
    except ValueError:  # a NUL in the name: no such file, which is told with those that can't be read
        return True


def _read(what: str, name: str, items: list[Item], config: DataConfig) -> ImageData:
    """The data set of these files."""
    if not items:
        raise UserError(f"{what}: no images; it needs PATH/train/CLASS and PATH/test/CLASS, PATH/CLASS, or a CSV with rows")
    _refuse_gaps(what, items)
    items, decoded = _sound(what, items, config)
    _refuse_gaps(what, items)
    names = sorted({item.label for item in items})
    numbers = {label: number for number, label in enumerate(names)}
    labels = np.array([numbers[item.label] for item in items], dtype=np.int64)
    tested = np.array([item.split in ("val", "test") for item in items]) if items[0].split else _fifth(labels, decoded)
    x_train, x_test = (np.stack([decoded[place].image for place in np.flatnonzero(part)]) for part in (~tested, tested))
    return ImageData(name, x_train, labels[~tested], x_test, labels[tested], len(names), class_names=tuple(names))


def _sound(what: str, items: list[Item], config: DataConfig) -> tuple[list[Item], list[Decoded]]:
    """The files that can be read, decoded to one size.

    Raises:
        UserError: they have several, or are too many for the memory, or one can't be read and is not to be skipped.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on metadata and sizes; what can't be decoded is an error
        files = _decode(what, items, config)
    broken = [file for file in files if isinstance(file, Broken)]
    if broken:
        told = f"{what}: {len(broken):,} of {len(files):,} images can't be read: {_some([f'{name} ({why})' for name, why in broken])}"
        if not config.skip_broken:
            raise UserError(f"{told}; mend or remove them, or skip them with --set data.skip_broken=true")
        _say(f"{told}; skipped")
        items = [item for item, file in zip(items, files, strict=True) if not isinstance(file, Broken)]
    decoded = [file for file in files if isinstance(file, Decoded)]
    for item, file in zip(items, decoded, strict=True):
        if file.image.shape != decoded[0].image.shape:
            _refuse_sizes(what, items[0].name, decoded[0].image.shape[1::-1], item.name, file.image.shape[1::-1])
    return items, decoded


def _refuse_gaps(what: str, items: Sequence[Item]) -> None:
    """Every class has images to train and to test on, and there are two classes."""
    names = sorted({item.label for item in items})
    if len(names) < 2:
        raise UserError(f"{what}: {f'a single class, {names[0]!r}' if names else 'no image is left'}; a classifier needs two")
    counts = Counter((item.label, item.split) for item in items)
    splits = sorted({item.split for item in items}, key=("", *SPLITS).index)
    if splits == [""]:
        single = [name for name in names if counts[name, ""] < 2]
        if single:
            raise UserError(f"{what}: class {single[0]!r} has a single image; it needs one to train on and one to test on")
        return
    if "train" not in splits or len(splits) < 2:
        raise UserError(f"{what}: every image is {splits[0]}; there must be train and test (or val), or no split at all")
    for name in names:
        for split in splits:
            if not counts[name, split]:
                raise UserError(f"{what}: class {name!r} has no {split} image; every class needs images of {' and '.join(splits)}")


def _fifth(labels: Labels, decoded: Sequence[Decoded]) -> npt.NDArray[np.bool_]:
    """Which images are test: of each class a fifth, rounded half up and one at least, by the order of their files' SHA-256."""
    tested = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        places = sorted(np.flatnonzero(labels == label).tolist(), key=lambda place: decoded[place].digest)
        tested[places[: max(1, (2 * len(places) + TEST_PART) // (2 * TEST_PART))]] = True
    return tested


def _decode(what: str, items: Sequence[Item], config: DataConfig) -> list[Decoded | Broken]:
    """Every file, decoded in threads once all headers are known to agree on a size that fits.

    Raises:
        UserError: they have several sizes, or are too many for the memory.
    """
    headers = _in_threads(_header, items, f"{what}: headers of")
    sound = [(item, header) for item, header in zip(items, headers, strict=True) if isinstance(header, Header)]
    if not sound:
        return [header for header in headers if isinstance(header, Broken)]
    first, (size, _) = sound[0]
    if config.size is None:
        for item, header in sound:
            if sorted(header.size) != sorted(size):  # EXIF may yet turn them
                _refuse_sizes(what, first.name, size, item.name, header.size)
    channels = config.channels or (1 if all(header.mode in GREY for _, header in sound) else 3)
    width, height = size if config.size is None else (config.size, config.size)
    taken, limit = len(sound) * height * width * channels, memory() // 2  # they are held twice: as they are, and padded
    if taken > limit:
        raise UserError(
            f"{what}: {len(sound):,} images of {height}x{width}x{channels} take {taken:,} bytes, over half of this machine's memory "
            f"({limit:,}); set data.size lower, or give fewer images"
        )
    decoded = iter(_in_threads(lambda item: _image(item, config.size, channels), [item for item, _ in sound], f"{what}: decoded"))
    return [header if isinstance(header, Broken) else next(decoded) for header in headers]


def _refuse_sizes(what: str, first: str, its: Sequence[int], other: str, size: Sequence[int]) -> None:
    """Images of two sizes, width and height in pixels, are refused."""
    one, another = ("x".join(map(str, sides)) for sides in (its, size))
    raise UserError(
        f"{what}: its images have several sizes ({first} is {one}, {other} {another}); set data.size=64, or another side to resize them to"
    )


def _header(item: Item) -> Header | Broken:
    def read() -> Header:
        with Image.open(regular_file(item.path, item.name), formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, not 8 bits a channel")
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"{image.width}x{image.height} pixels; at most {LARGEST_IMAGE:,} are read")
            return Header(image.size, image.mode)

    return _or_broken(item, read)


def _image(item: Item, size: int | None, channels: int) -> Decoded | Broken:
    def read() -> Decoded:
        content = regular_file(item.path, item.name).read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(image if size is None else _square(image, size))
        return Decoded(pixels.reshape(*pixels.shape[:2], channels), hashlib.sha256(content).hexdigest())

    return _or_broken(item, read)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image whose short side is resized to ``size``: the pixels of torchvision's Resize and CenterCrop."""
    width, height = (size * side // min(image.size) for side in image.size)
    if width * height > LARGEST_IMAGE:
        raise ValueError(f"{image.width}x{image.height} pixels, too long and thin to be resized to {size}")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _or_broken(item: Item, read: Callable[[], T]) -> T | Broken:
    try:
        return read()
    except UserError as error:  # regular_file's, which begins with the name
        return Broken(item.name, str(error).removeprefix(f"{item.name}: "))
    except UnidentifiedImageError:
        return Broken(item.name, "no image of a known format")
    except Exception as error:  # Pillow raises anything on junk
        return Broken(item.name, first_line(error))


def _in_threads(work: Callable[[Item], T], items: Sequence[Item], told: str) -> list[T]:
    """``work`` of every item, in order; a line on stderr every few seconds."""
    pool, results, last = ThreadPoolExecutor(os.cpu_count()), list[T](), time.monotonic()
    batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    try:
        for batch in pool.map(lambda batch: [work(item) for item in batch], batches):
            results += batch
            if time.monotonic() - last >= PROGRESS_SECONDS and len(results) < len(items):
                _say(f"{told} {len(results):,} of {len(items):,} images")
                last = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many there are beside them."""
    shown = list(names)
    more = f" and {len(shown) - NAMED:,} more" if len(shown) > NAMED else ""
    return ", ".join(shown[:NAMED]) + more


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
