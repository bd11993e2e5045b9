"""Hugging Face data sets: ``hf:NAME``, ``hf:NAME:CONFIG``, or ``hf:PATH`` of what ``save_to_disk`` wrote."""

from __future__ import annotations

import contextlib
import io
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ...checks import UserError, did_you_mean, first_line, some
from ...config import DataConfig, location
from ...talk import Remarks
from ..dataset import ImageData
from ..image_files import OTHER_WORDS, SPLITS, Item, assemble
from ..lazy_images import decode
from .base import READERS

TAIL = 64  # bytes of an image's file that its identity covers
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Tables:
    """The image column of several tables. Rows are numbered through, from one table to the next."""

    names: tuple[str, ...]
    tables: tuple[Any, ...]  # datasets.Dataset in the format arrow, which gives an image's file as it is stored
    column: str

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(table) for table in self.tables))

    def _at(self, row: int) -> tuple[int, int]:
        table = bisect_right(self._ends, row)
        return table, row - (self._ends[table - 1] if table else 0)

    def name(self, row: int) -> str:  # noqa: D102
        table, index = self._at(row)
        return f"{self.names[table]}/{index}"

    def identity(self, row: int) -> str:
        """Name, number of bytes, and the last bytes, for a name is but a number."""
        with self.open(row) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(-min(size, TAIL), io.SEEK_END)
            return f"{self.name(row)}\0{size}\0{file.read().hex()}"

    def open(self, row: int) -> BinaryIO:  # noqa: D102
        import pyarrow

        table, index = self._at(row)
        cell = self.tables[table][index].column(self.column)[0]
        if not cell.is_valid:
            raise ValueError("the row has no image")
        if cell["bytes"].is_valid:
            file: BinaryIO = pyarrow.BufferReader(cell["bytes"].as_buffer())  # a view: reading a header copies no file
            return file
        return Path(cell["path"].as_py()).open("rb")

    def image(self, row: int, channels: int) -> Image.Image:  # noqa: D102
        with self.open(row) as file:
            return decode(file, channels)


@READERS.register("hf")
def read_hub(config: DataConfig, remarks: Remarks) -> ImageData:
    """Read the images of a Hugging Face data set.

    Its splits are train, and test or else validation. If there is train alone, a fifth of each class is test, by the SHA-256 of
    ``train/ROW``. A test split whose labels are hidden (-1) is not read. The images are the column of type Image. The classes are
    ``data.label``, or the column of type ClassLabel, whose names are kept, or integers named label, labels or fine_label. The columns are
    chosen in train, and every split must have them. All else is as in ``read_folder``.

    Raises:
        UserError: datasets is not installed; there is no such data set, network or column; a split has no rows, or other columns or
            classes than train; or as ``assemble``.
    """
    source = config.name
    if find_spec("datasets") is None:
        raise UserError(f"{source}: hf:NAME needs datasets, which is not installed: pip install datasets")
    name, available = _opened(source)
    splits = _splits(source, available, remarks)
    features = splits["train" if "train" in splits else ""].features
    image, label = _image_column(source, features), _label_column(source, features, config.label)
    if "test" in splits and "val" in splits:
        hidden = _hidden(splits["test"], label)
        remarks.tell(f"{source}: {'val is read, test is not, for its labels are hidden' if hidden else 'test is read, val is not'}")
        del splits["test" if hidden else "val"]
    for split, table in splits.items():
        _refuse_other(source, split, table, features, (image, label))
    items = list(_items(source, splits, label))
    tables = Tables(
        tuple(split or "train" for split in splits),
        tuple(table.select_columns([image]).with_format("arrow") for table in splits.values()),
        image,
    )
    return assemble(config, name, items, tables, remarks, classes=_classes(features[label], items), by_content=False)


def _opened(source: str) -> tuple[str, Mapping[str, Any]]:
    """The data set's name as tables print it, and its splits by name; one without splits has the name ""."""
    import datasets

    reference = location(source)
    path = Path(reference).expanduser()
    local = path.is_dir()
    if not reference or (not local and reference.startswith(("/", ".", "~"))):
        raise UserError(f"{source}: no such folder; write hf:NAME, hf:NAME:CONFIG, or hf:PATH of what save_to_disk wrote")
    repository, _, variant = reference.partition(":")
    try:
        loaded = datasets.load_from_disk(str(path)) if local else datasets.load_dataset(repository, variant or None)
    except Exception as error:  # of the network, of the hub, of Arrow
        if local and (split := _saved_empty(path)) is not None:
            raise _empty(source, split) from None
        cure = "name a folder that save_to_disk wrote" if local else "is it spelt right, and is there a network?"
        raise UserError(f"{source}: can't be opened ({first_line(error)}); {cure}") from None
    name = path.resolve().name if local else reference.replace("/", "_").replace(":", "_")
    return name, loaded if isinstance(loaded, dict) else {"": loaded}


def _saved_empty(path: Path) -> str | None:
    """The split that was saved without rows, or None. It has no file then, and datasets can't open it."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        for state in (*path.glob("state.json"), *sorted(path.glob("*/state.json"))):
            if json.loads(state.read_text())["_data_files"] == []:
                return "" if state.parent == path else state.parent.name
    return None


def _empty(source: str, split: str) -> UserError:
    return UserError(f"{source}: {split or 'it'} has no rows; give it some, or leave it out")


def _splits(source: str, available: Mapping[str, Any], remarks: Remarks) -> dict[str, Any]:
    """The splits that are read, called train, val and test. The name of a single one is empty."""
    splits: dict[str, Any] = {}
    for name, table in available.items():
        meant = OTHER_WORDS.get(str(name), str(name))
        if meant in splits:
            alike = [str(other) for other in available if OTHER_WORDS.get(str(other), str(other)) == meant]
            raise UserError(f"{source}: its splits {' and '.join(alike)} both mean {meant}; leave one of them out")
        splits[meant] = table
    left_out = [name for name in splits if name not in (*SPLITS, "")]
    if left_out and len(left_out) < len(splits):
        remarks.tell(f"{source}: left out, as neither train nor test: {some(left_out)}")
    splits = {name: table for name, table in splits.items() if name not in left_out}
    if "train" not in splits and "" not in splits:
        raise UserError(f"{source}: its splits are {', '.join(map(str, available)) or 'none'}; it needs train")
    return {"": splits["train"]} if list(splits) == ["train"] else splits


def _image_column(source: str, features: Mapping[str, Any]) -> str:
    import datasets

    candidates = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    named = [name for name in candidates if name in IMAGE_NAMES]
    if len(candidates) == 1 or len(named) == 1:
        return (candidates if len(candidates) == 1 else named)[0]
    raise UserError(f"{source}: its columns are {_columns(features)}; it needs one of type Image, or of several one named image")


def _label_column(source: str, features: Mapping[str, Any], wanted: str | None) -> str:
    kinds = {name: _kind(feature) for name, feature in features.items()}
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"{source}: data.label={wanted} is no column of it: {did_you_mean(wanted, features)}")
        if kinds[wanted] not in ("ClassLabel", "integers", "strings"):
            raise UserError(f"{source}: data.label={wanted} is a column of {kinds[wanted]}; classes are a ClassLabel, integers or strings")
        return wanted
    candidates = [name for name, kind in kinds.items() if kind == "ClassLabel" or (name in LABEL_NAMES and kind == "integers")]
    named = [name for name in candidates if name in LABEL_NAMES]
    if len(candidates) == 1 or len(named) == 1:
        return (candidates if len(candidates) == 1 else named)[0]
    raise UserError(f"{source}: its columns are {_columns(features)}; name the one with the classes by --set data.label=COLUMN")


def _kind(feature: Any) -> str:
    """The kind of a column's classes: ClassLabel, integers or strings, of any width. For another column, its type."""
    dtype = str(getattr(feature, "dtype", ""))
    if type(feature).__name__ == "ClassLabel":
        return "ClassLabel"
    return "integers" if dtype.startswith(("int", "uint")) else "strings" if dtype.startswith("string") else dtype


def _type(feature: Any) -> str:
    return str(feature.dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def _columns(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())


def _refuse_other(source: str, split: str, table: Any, train_features: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Refuse a split without rows, or with other columns or classes than train. Classes may be in another order.

    Raises:
        UserError: the split is one of these.
    """
    if not len(table):
        raise _empty(source, split)
    for column in columns:
        feature, train_feature = table.features.get(column), train_features[column]
        if feature is None:
            present = _columns(table.features)
            raise UserError(f"{source}: {split} has no column {column!r}, as train has, but {present}; name it as in train")
        if _kind(feature) != _kind(train_feature):
            types = f"{_type(train_feature)} in train and {_type(feature)} in {split}"
            raise UserError(f"{source}: column {column!r} is {types}; cast both to one type")
        names, train_names = getattr(feature, "names", ()), getattr(train_feature, "names", ())
        if set(names) != set(train_names):
            of_train = some(sorted(train_names, key=names.__contains__))  # those that differ first
            of_split = some(sorted(names, key=train_names.__contains__))
            raise UserError(
                f"{source}: the classes of column {column!r} are {of_train} in train and {of_split} in {split}; give both the same"
            )


def _no_label(label: Any) -> bool:
    return label is None or (isinstance(label, int) and label < 0)


def _hidden(table: Any, label: str) -> bool:
    return label not in table.features or any(map(_no_label, table.with_format(None)[label][:]))


def _items(source: str, splits: Mapping[str, Any], column: str) -> Iterator[Item]:
    for split, table in splits.items():
        names = getattr(table.features[column], "names", None)
        for row, label in enumerate(table.with_format(None)[column][:]):
            name = f"{split or 'train'}/{row}"
            if _no_label(label):
                raise UserError(f"{source}: {name} has no label ({label}); leave such rows out, or choose another column by data.label")
            yield Item(name, str(names[label] if names else label), split)


def _classes(kind: Any, items: Sequence[Item]) -> Sequence[str]:
    """The order of the classes: that of train's ClassLabel, or of the numbers."""
    if names := getattr(kind, "names", None):
        return list(names)
    labels = {item.label for item in items}
    return sorted(labels, key=int) if _kind(kind) == "integers" else sorted(labels)
