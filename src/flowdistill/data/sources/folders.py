"""A user's own image files: ``folder:PATH``, sorted into folders by class, and ``csv:FILE``, which lists them."""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np

from ...checks import UserError, did_you_mean, first_line, is_there, regular_file, some
from ...config import DataConfig, location
from ...talk import Remarks
from ..dataset import ImageData, Unlabelled
from ..image_files import OTHER_WORDS, SPLITS, Item, assemble, read_all
from ..lazy_images import Files
from .base import READERS, UNLABELLED_READERS

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
COLUMNS = ("path", "label", "split")


@READERS.register("folder")
def read_folder(config: DataConfig, remarks: Remarks) -> ImageData:
    """Read images in folders: ``PATH/train/CLASS`` beside ``PATH/test/CLASS`` or ``PATH/val/CLASS``, or ``PATH/CLASS`` alone.

    Classes are numbered by their sorted names. If there are both test and val, ``test`` is read and ``val`` is not. If there is
    ``PATH/CLASS`` alone, a fifth of each class is test (rounded half up, one at least): the files with the lowest SHA-256, whatever their
    names. Folders below a class belong to it. Hidden files are ignored. Files without an image's extension or outside of a class are
    left out, and ``remarks`` names them.

    Images are turned as their EXIF orientation says and made grey or RGB; transparency is dropped. With ``data.size`` they are resized to
    that short side (bilinear) and cut to a square in the middle. Without ``data.channels`` they are grey if every file is. Only the first
    image of an animation is read.

    Raises:
        UserError: there is no such folder or no class; a class is empty or lacks a split; a link leads outside or in a circle; images have
            several sizes without ``data.size``; or files can't be read without ``data.skip_broken``.
    """
    source = config.name
    root = _folder(source)
    tree = _Tree(source, root)
    inner = tree.folders(root, (str(root),))
    for name in inner:
        meant = OTHER_WORDS.get(name.lower(), name.lower())
        if meant in SPLITS and name != meant:
            raise UserError(f"{source}: {name}/ looks like a split; rename it to {meant}/, or use csv:FILE if it is a class")
    splits = [split for split in SPLITS if split in inner]
    if splits == ["train"]:
        raise UserError(
            f"{source}: it has train/ but neither test/ nor val/; add one, or take a fifth of train with {source.rstrip('/')}/train"
        )
    if splits and "train" not in splits:
        raise UserError(f"{source}: it has {splits[-1]}/ but no train/; add that, or rename {splits[-1]}/ if it is a class")
    if splits:
        tree.left_out += [name for name in inner if name not in splits]
        items = [item for split in _used(source, splits, remarks) for item in tree.split(inner[split], split)]
    else:
        items = list(tree.classes(inner, "", (str(root),)))
    data = assemble(config, root.name, items, _files(root, items), remarks)
    tree.tell_left_out("no class's images", remarks)
    return data


@READERS.register("csv")
def read_csv(config: DataConfig, remarks: Remarks) -> ImageData:
    """Read the images that a CSV file lists in columns ``path`` (relative to the file), ``label`` and, optionally, ``split``.

    A split is train, val or test.

    Classes, splits and images are treated as in ``read_folder``.

    Raises:
        UserError: there is no such file; a column is missing or unknown; a row is not whole; a path is outside of the file's folder or
            named twice; or as ``read_folder``.
    """
    source = config.name
    path = regular_file(Path(location(source)), source)
    root = path.parent.resolve()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            items = list(_rows(csv.reader(file, strict=True), root, source))
    except UnicodeDecodeError:
        raise UserError(f"{source}: not UTF-8 text; write path,label[,split] as CSV") from None
    except csv.Error as error:
        raise UserError(f"{source}: no CSV ({first_line(error)}); write path,label[,split]") from None
    used = _used(source, {item.split for item in items}, remarks)
    items = [item for item in items if item.split in used]
    return assemble(config, path.stem, items, _files(root, items), remarks)


@UNLABELLED_READERS.register("folder")
def read_unlabelled(config: DataConfig, remarks: Remarks) -> Unlabelled:
    """Read all images in a folder and in those below it, whatever their names; else as ``read_folder``.

    Raises:
        UserError: there is no such folder or no image in it; or as ``read_folder``.
    """
    source = config.name
    root = _folder(source)
    tree = _Tree(source, root)
    items = [Item(tree.name(path), "", "") for path in tree.images(root, (str(root),))]
    images = read_all(config, items, _files(root, items), remarks)
    if not images:
        raise UserError(f"{source}: no image ({' '.join(EXTENSIONS)}) is in it; name a folder with images")
    tree.tell_left_out("no image", remarks)
    return Unlabelled(root.name, np.stack(images))


def _folder(source: str) -> Path:
    user_path = location(source)
    try:
        folder = Path(user_path).expanduser().resolve()
        exists = bool(user_path) and folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{source}: no such folder ({getattr(error, 'strerror', None) or first_line(error)})") from None
    if not exists:
        raise UserError(f"{source}: no such folder; write folder:PATH")
    if not folder.is_dir():
        raise UserError(f"{source}: a file, not a folder; name a folder of images, or use csv:FILE or npz:PATH")
    return folder


@dataclass
class _Tree:
    """A folder of images, walked in sorted order. ``above`` are the real paths of a folder and of those that hold it.

    Attributes:
        source: the folder as messages name it.
        root: its real path.
        left_out: names of files and folders that hold no image of a class.
    """

    source: str
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
                    f"{self.source}: class folder {self.name(folder)} has no image ({' '.join(EXTENSIONS)}); fill it or remove it"
                )
            yield from (Item(self.name(image), label, split) for image in images)

    def folders(self, folder: Path, above: tuple[str, ...]) -> dict[str, Path]:
        """The folders in a folder, by name; all else is left out."""
        inner = {}
        for path in self.below(folder, above):
            if path.is_dir():
                inner[path.name] = path
            else:
                self.left_out.append(self.name(path))
        return inner

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
        """The files and folders in a folder that are not hidden."""
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_symlink():
                target = os.path.realpath(path)
                if target in above and path.is_dir():
                    raise UserError(f"{self.source}: the link {self.name(path)} leads in a circle; remove it")
                if not Path(target).is_relative_to(self.root):
                    user_path = location(self.source).rstrip("/")
                    copied = shlex.join(["cp", "-rL", user_path, f"{user_path}-copied"])
                    raise UserError(
                        f"{self.source}: the link {self.name(path)} leads outside, to {target}; put a copy in its place, or name a copy of "
                        f"the folder that has what its links lead to: {copied}"
                    )
            yield path

    def tell_left_out(self, why: str, remarks: Remarks) -> None:
        """Tell ``remarks`` what was left out, and why."""
        if self.left_out:
            remarks.tell(f"{self.source}: left out, as {why}: {some(sorted(self.left_out))}")

    def name(self, path: Path) -> str:
        """A path as messages name it."""
        return str(path.relative_to(self.root))


def _used(source: str, splits: Collection[str], remarks: Remarks) -> list[str]:
    """The splits that are read: without val if there is test."""
    if "test" in splits and "val" in splits:
        remarks.tell(f"{source}: test is read, val is not")
        return [split for split in splits if split != "val"]
    return list(splits)


def _rows(lines: Iterator[list[str]], root: Path, source: str) -> Iterator[Item]:
    header = [name.strip() for name in next(lines, [])]
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise UserError(f"{source}: unknown column {unknown[0]!r}: {did_you_mean(unknown[0], COLUMNS)}")
    if not {"path", "label"} <= set(header) or len(set(header)) < len(header):
        raise UserError(f"{source}: its first line is {','.join(header)!r}; write path,label or path,label,split")
    seen: dict[str, int] = {}
    for number, cells in enumerate(lines, 2):
        if not cells:
            continue
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
        if len(cells) != len(header) or not all(row.values()):
            raise UserError(f"{source}: row {number} is {','.join(cells)!r}; it needs {','.join(header)}")
        if row.get("split", "train") not in SPLITS:
            raise UserError(f"{source}: row {number} has split {row['split']!r}; {did_you_mean(row['split'], SPLITS)}")
        path = root / row["path"]
        if "\\" in row["path"] and not is_there(path):
            meant = PureWindowsPath(row["path"]).as_posix()
            raise UserError(f"{source}: row {number} names {row['path']!r}, as Windows writes it; write / between folders: {meant}")
        if not _inside(path, root):
            cure = "put the images, or copies of them, beside the file, or the file into a folder that has them all"
            raise UserError(f"{source}: row {number} leads outside of the file's folder, to {row['path']}; {cure}")
        normal_path = os.path.normpath(path)
        if normal_path in seen:
            raise UserError(f"{source}: rows {seen[normal_path]} and {number} both name {row['path']}; name it once")
        seen[normal_path] = number
        yield Item(row["path"], row["label"], row.get("split", ""))


def _inside(path: Path, root: Path) -> bool:
    try:
        return Path(os.path.realpath(path)).is_relative_to(root)
    except ValueError:  # a NUL in the name: no such file; it is reported with those that can't be read
        return True


def _files(root: Path, items: list[Item]) -> Files:
    return Files(str(root), np.array([os.fsencode(item.name) for item in items], dtype=np.bytes_))
