"""Weights files of any origin: a file's content, not its name, says what it is, and nothing in it is executed."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import UserError, is_there, pass_on_shortage, regular_file, short, some

Table = dict[str, Tensor]

HEAD = 4096  # bytes that say what a file is
DEEPEST = 16  # dictionaries in dictionaries
LISTED = 8  # of many tables, so many are named
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: its magic number, as a pickle has it
PLAIN = "save its tensors: torch.save(model.state_dict(), 'plain.pth')"
UNPACK = "unpack it, and name the file inside"
DAMAGED = "damaged, truncated, or something else"

OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (rb"\Z", "an empty file", "copy it again"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file that it stands for", "fetch that: git lfs pull"),
    (rb"\s*(<!doctype|<html|<\?xml)", "a web page, not the file that it leads to", "download that"),
    (
        rb'\s*\{.*"weight_map"',
        "an index of several files",
        "join the files that it lists, read by safetensors.torch.load_file (or torch.load): "
        "whole = {}; [whole.update(load_file(file)) for file in FILES]; torch.save(whole, 'plain.pth')",
    ),
    (rb"\s*[{\[]", "JSON, not weights", PLAIN),
    (rb"\x93NUMPY", "an array of numpy", "name its tensors: torch.save({name: torch.from_numpy(array), ...}, 'plain.pth')"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5, as Keras writes it", f"put its values into the PyTorch network, and {PLAIN}"),
    (rb"\x08[\x01-\x1f][\x12:B]", "an ONNX file, which is a program", f"of the network that it was made of, {PLAIN}"),
    (rb"GGUF|....TFL3", "a file of another library", f"put its values into the PyTorch network, and {PLAIN}"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar", "an archive", UNPACK),
    (rb"\x80[\x02-\x05]", "a pickle that torch.save did not write, which is never executed", PLAIN),
)
"""How a file begins that is no weights file, what it is, and what to do."""


class Content(NamedTuple):
    """What a weights file holds: tables of named tensors by their keys (dotted where nested; empty for the whole file), and metadata."""

    tables: Mapping[str, Table]
    metadata: Mapping[str, str]


def located(path: Path) -> tuple[Path, str]:
    """The file and the key of ``FILE#KEY``. A path that exists is a file without a key, even if its name has a ``#``."""
    text = str(path)
    marks = [] if is_there(path) else [index for index, char in enumerate(text) if char == "#"]
    for mark in reversed(marks):
        if is_there(Path(text[:mark])):
            return Path(text[:mark]), text[mark + 1 :]
    return path, ""


def read(path: Path) -> Content:
    """A file's content: safetensors, or what ``torch.save`` wrote in either of its formats, whatever the file is called.

    Raises:
        UserError: missing, damaged, another kind of file, or a pickle that holds more than tensors and plain values (it is not executed).
    """
    label = f"weights file {path}"
    expanded = regular_file(path, label)
    with expanded.open("rb") as file:
        head = file.read(HEAD)
    if _begins_as_safetensors(head, expanded.stat().st_size):
        return _safetensors(expanded, label)
    if head.startswith(b"PK"):
        _refuse_other_zip(expanded, label)
    elif LEGACY not in head[:40]:
        _refuse_other(head, label)
    return Content(_tables(_unpickled(expanded, path), label), {})


def read_safetensors(path: Path) -> tuple[Table, dict[str, str]]:
    """Tensors and metadata of a safetensors file, as they are there.

    Raises:
        Exception: the one of safetensors, if it is no such file.
    """
    with path.open("rb") as opened, safe_open(_openable(path, opened.fileno()), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (safe_open is no mapping)


def _openable(path: Path, descriptor: int) -> str:
    """A name under which safetensors opens a file: its path, or that of the descriptor, for it takes no path that is not UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{descriptor}"
    return os.fspath(path)


def chosen(tables: Mapping[str, Table], key: str, path: Path) -> Table:
    """The only table of a file; or the one that a key names, or the part of a table whose names begin with the key.

    Raises:
        UserError: there are several and no key is given, or none has that key.
    """
    listing = some((f"{short(name)} ({len(table)} tensors, {_values(table):,} values)" for name, table in tables.items()), LISTED)
    if key:
        if part := next(_parts(tables, key), None):
            return part
        available = f"it has {listing}" if "" not in tables else f"its names begin with {some(_beginnings(tables['']), LISTED)}"
        raise UserError(f"weights file {path}: it has no '{short(key)}'; {available}")
    if len(tables) > 1:
        advised = shlex.quote(f"{path}#{next(iter(tables))}")
        raise UserError(f"weights file {path} holds several networks: {listing}; choose one as FILE#KEY, such as {advised}")
    return next(iter(tables.values()))


def _parts(tables: Mapping[str, Table], key: str) -> Iterator[Table]:
    """What a key may mean: first the table of that name; then a part of a table, whose name the key begins with, or of the only one."""
    if key in tables:
        yield tables[key]
    for name, table in tables.items():
        inner = [key.removeprefix(f"{name}.")] if key.startswith(f"{name}.") else [key] if len(tables) == 1 else []
        yield from filter(None, (below(table, begin) for begin in inner))


def below(table: Mapping[str, Tensor], begin: str) -> Table:
    """The tensors whose names begin with ``begin`` and a dot, under the rest of their names."""
    return {name.removeprefix(f"{begin}."): value for name, value in table.items() if name.startswith(f"{begin}.")}


def _beginnings(table: Table) -> list[str]:
    return [short(name) for name in dict.fromkeys(name.partition(".")[0] for name in table)]


def _values(table: Table) -> int:
    return sum(value.numel() for value in table.values())


def _begins_as_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with a length of eight bytes, then JSON. If it is JSON from its first byte, those bytes are no length."""
    if head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return not (head.startswith((b"{", b"[")) and length > size)


def _safetensors(path: Path, label: str) -> Content:
    try:
        table, metadata = read_safetensors(path)
    except SafetensorError:
        raise UserError(f"{label}: not a valid safetensors file ({DAMAGED})") from None
    _refuse_unfit(table, label)
    return Content({"": table}, metadata)


def _refuse_other_zip(path: Path, label: str) -> None:
    """Refuse a zip archive that torch.save did not write, or that grows when it is read: PyTorch never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises anything on junk
        pass_on_shortage(error)
        raise UserError(f"{label}: a zip archive that can't be read (damaged or truncated); copy it again") from None
    names = [member.filename for member in members]
    inner = [name.partition("/")[2] for name in names]
    if any(name.startswith("code/") or name == "constants.pkl" for name in inner):
        cure = "save its weights where you trust it: torch.save(torch.jit.load(FILE).state_dict(), 'plain.pth')"
        raise UserError(f"{label}: TorchScript, which is a program; {cure}")
    if any(name.startswith("models/") or name == "archive_format" for name in inner):
        cure = "save its weights where you trust it: torch.save(torch.export.load(FILE).state_dict, 'plain.pth')"
        raise UserError(f"{label}: written by torch.export, which is a program; {cure}")
    if any(name.endswith(".npy") for name in names):
        cure = "torch.save({name: torch.from_numpy(array) for name, array in numpy.load(FILE).items()}, 'plain.pth')"
        raise UserError(f"{label}: arrays of numpy; write them as tensors: {cure}")
    if "data.pkl" not in inner:
        raise UserError(f"{label}: a zip archive that torch.save did not write; {UNPACK}")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UserError(f"{label}: its content is larger than the file, which torch.save never writes; {PLAIN}")


def _refuse_other(head: bytes, label: str) -> None:
    for begin, kind, cure in OTHERS:
        if re.match(begin, head, re.DOTALL | re.IGNORECASE):
            raise UserError(f"{label}: {kind}; {cure}")
    raise UserError(f"{label}: cannot be read: neither safetensors nor written by torch.save ({DAMAGED})")


def _unpickled(expanded: Path, path: Path) -> Any:
    label = f"weights file {path}"
    try:
        with expanded.open("rb") as file, warnings.catch_warnings(action="ignore"):  # open: by its name torch may take it for another kind
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            other = "Unsupported operand" in str(error)
            cause, cure = ("written with another pickle_protocol than 2", PLAIN) if other else (DAMAGED, "copy it again")
            raise UserError(f"{label}: cannot be read as a dictionary of named tensors ({cause}); {cure}") from None
        cure = f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'plain.pth')"
        raise UserError(
            f"{label}: it holds {short(refused[1])}, and of a pickle nothing but tensors and plain values is read, for the rest is code; "
            f"where you trust it, write a plain file in Python: {cure} (by the key that it has; of a whole module its .state_dict())"
        ) from None
    except Exception as error:  # torch.load raises anything on junk
        pass_on_shortage(error)
        raise UserError(f"{label}: cannot be read as a dictionary of named tensors ({DAMAGED}); copy it again") from None


def _tables(loaded: Any, label: str) -> dict[str, Table]:
    """Every table of named tensors, at any depth, that could be a network's.

    Raises:
        UserError: there is none, or a tensor is no dense one.
    """
    tables: dict[str, Table] = {}
    for keys, table in _walked(loaded, (), set()):
        if _could_be_network(table):
            key = ".".join(keys)
            if key in tables:
                raise UserError(f"{label}: two tables of it are both called '{short(key)}'; {PLAIN}")
            _refuse_unfit(table, label)
            tables[key] = table
    if not tables:
        listing = some((short(str(key)) for key in loaded), LISTED) if isinstance(loaded, dict) else ""
        has = f" (its keys: {listing})" if listing else ""
        raise UserError(f"{label}: it holds no table of named tensors that could be a network's{has}; {PLAIN}")
    return tables


def _walked(loaded: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Table]]:
    """Every dictionary of tensors with its keys, except an optimiser's state. ``seen``: what was walked; an object may hold itself."""
    if isinstance(loaded, dict):
        if loaded and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
            yield keys, dict(loaded)
            return
        inner = [] if "param_groups" in loaded else [(key, value) for key, value in loaded.items() if isinstance(key, str)]
    else:
        inner = [(str(index), value) for index, value in enumerate(loaded)] if isinstance(loaded, list | tuple) else []
    if id(loaded) not in seen and len(keys) < DEEPEST:
        seen.add(id(loaded))
        for name, value in inner:
            yield from _walked(value, (*keys, name), seen)


def _could_be_network(table: Table) -> bool:
    """Whether it has a matrix of other than whole numbers. Metrics, counts and generators' states have none."""
    return any(value.dim() > 1 and (value.is_floating_point() or value.is_complex() or value.is_quantized) for value in table.values())


def _refuse_unfit(table: Table, label: str) -> None:
    for name, value in table.items():
        if unfit := _unfit(value):
            raise UserError(f"{label}: its '{short(name)}' is {unfit}; save a state_dict of dense tensors of real numbers")


def _unfit(value: Tensor) -> str:
    """Why a tensor can't be one of a network's weights; empty if it can."""
    if value.layout != torch.strided:
        return "a sparse tensor"
    if value.device.type != "cpu":
        return f"on the device {value.device.type}, without values"
    if value.is_quantized:
        return "a quantised tensor"
    if value.is_complex():
        return "of complex numbers"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # a repeated (stride 0) one would grow when it is copied
        return "larger than what the file holds of it"
    return ""
