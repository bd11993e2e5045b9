"""Weights on disk: safetensors files that hold what is needed to use them again, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..checks import Changes, UserError, told_by_path
from ..models import Network
from .fitting import misfit, named_as_in
from .weight_files import chosen, located, read

Weights = Mapping[str, Tensor]
SEAL, SEALED = "sha256", "sealed"  # metadata: the hash of all content, and that there is a hash, so that no single changed bit removes it


def write_whole(path: Path, content: bytes, keep: Path | None = None, *, make_folder: bool = True) -> None:
    """Write to a file beside it, sync and rename: a reader sees the old file or the new one, never a part of one.

    With ``keep``, the old file gets that name; else it is lost. ``make_folder``: the folder need not be there. A run's folder must be: if
    a disk that has gone for a while finds another folder in its place, it can't come back.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with told_by_path(path):
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                path.replace(keep)
            draft.replace(path)
            _sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Sync a folder: a rename outlives a power cut only if its folder is synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(path: Path, weights: Weights, about: Mapping[str, Any], keep: Path | None = None, *, make_folder: bool = True) -> None:
    """Write a safetensors file whose metadata hold ``about`` as JSON under ``flowdistill``; the rest as in ``write_whole``."""
    write_whole(path, serialised(weights, about), keep, make_folder=make_folder)


def serialised(weights: Weights, about: Mapping[str, Any], beside: Mapping[str, str] | None = None) -> bytes:
    """The content of such a file; ``beside`` are further metadata, for readers other than this package."""
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}
    metadata = {"format": "pt", **(beside or {}), "flowdistill": json.dumps(about), SEALED: "true"}
    return save(tensors, metadata | {SEAL: json.dumps(seal(tensors, metadata))})


def seal(weights: Weights, metadata: Mapping[str, str]) -> str:
    """SHA-256 over all weights and all metadata but the seal itself."""
    text = json.dumps({key: value for key, value in metadata.items() if key != SEAL}, sort_keys=True)
    return hashlib.sha256(f"{hash_weights(weights)}\n{text}".encode()).hexdigest()


def is_whole(weights: Weights, metadata: Mapping[str, str]) -> bool:
    """Whether a file holds what was written. True for a file without a seal, which has no record of its content."""
    return not {SEAL, SEALED} & metadata.keys() or metadata.get(SEAL) == json.dumps(seal(weights, metadata))


def load_weights(path: Path, changes: Changes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file, or in the part that ``FILE#KEY`` names; and what was saved as ``about`` with a whole file of ours, else {}.

    Raises:
        UserError: as ``weight_files``; or its content is not what was written, and such ``changes`` are not accepted.
    """
    file, key = located(path)
    content = read(file)
    if not is_whole(content.tables.get("", {}), content.metadata):
        (changes or Changes()).meet(f"weights file {file}: its content is not what was written into it", "put a sound copy there")
    return chosen(content.tables, key, file), {} if key else _about(content.metadata, file)


def _about(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get("flowdistill", "{}"))
    except (ValueError, RecursionError):
        raise UserError(f"weights file {file}: what it says of itself is no JSON (damaged); put a sound copy there") from None
    return about if isinstance(about, dict) else {}


def whole(path: Path) -> bool:
    """Whether a file can be read, and holds what was written."""
    try:
        return bool(load_weights(path))
    except UserError:
        return False


def refuse_misfit(net: Network, weights: Weights, origin: str) -> None:
    """Compare names and shapes of weights with a network's.

    Raises:
        UserError: they do not fit; how, and what to do.
    """
    _fitted(net, weights, origin)


def fill(net: Network, weights: Weights, origin: str) -> None:
    """Put weights into a network. What wrappers added to their names is left out.

    Raises:
        UserError: as ``refuse_misfit``.
    """
    net.take(_fitted(net, weights, origin))


def _fitted(net: Network, weights: Weights, origin: str) -> Weights:
    fitting = named_as_in(net, weights)
    if message := misfit(net, fitting, origin):
        raise UserError(message)
    return fitting


def hash_weights(weights: Weights) -> str:
    """SHA-256 over names, types, shapes and values; the memory layout does not matter."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().to("cpu", copy=True).contiguous()  # numpy keeps what it sees from being resized, as observers are
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
