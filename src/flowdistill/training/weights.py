"""Weights on disk: safetensors with what is needed to use them again, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..checks import Changes, UserError, regular_file
from ..models import Network

Weights = Mapping[str, Tensor]
SEAL, SEALED = "sha256", "sealed"  # metadata: the hash of all content, and that there is one, so that no single bit takes it away
WRAPPERS = ("module.", "_orig_mod.")  # before every name, where DistributedDataParallel or torch.compile held the network


def write_whole(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write to a neighbour, sync, rename: a reader sees the old file or the new one, never a part.

    With ``keep`` the old file is not lost but gets that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
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
    """A rename outlives a power cut only when its folder is synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(path: Path, weights: Weights, about: Mapping[str, Any], keep: Path | None = None) -> None:
    """A safetensors file whose metadata hold ``about`` as JSON under ``flowdistill``; ``keep`` as in ``write_whole``."""
    write_whole(path, serialised(weights, about), keep)


def serialised(weights: Weights, about: Mapping[str, Any], beside: Mapping[str, str] | None = None) -> bytes:
    """The content of such a file; ``beside`` are further metadata, for readers other than this package."""
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}
    metadata = {"format": "pt", **(beside or {}), "flowdistill": json.dumps(about), SEALED: "true"}
    return save(tensors, metadata | {SEAL: json.dumps(seal(tensors, metadata))})


def seal(weights: Weights, metadata: Mapping[str, str]) -> str:
    """SHA-256 over all weights and all metadata but the seal itself."""
    told = json.dumps({key: value for key, value in metadata.items() if key != SEAL}, sort_keys=True)
    return hashlib.sha256(f"{hash_weights(weights)}\n{told}".encode()).hexdigest()


def is_whole(weights: Weights, metadata: Mapping[str, str]) -> bool:
    """Whether a file holds what was written; true of one without a seal, whose content nobody recorded in it."""
    return not {SEAL, SEALED} & metadata.keys() or metadata.get(SEAL) == json.dumps(seal(weights, metadata))


def load_weights(path: Path, changes: Changes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a safetensors file, or the weights of a ``.pt``/``.pth`` file that holds nothing but tensors.

    Raises:
        UserError: missing, damaged, or a pickle with anything but tensors in it (it is not executed); or its content is not what was
            written, and such ``changes`` are not accepted.
    """
    weights, about, whole = _read(path)
    if not whole:
        (changes or Changes()).meet(f"weights file {path}: its content is not what was written into it", "put a sound copy there")
    return weights, about


def whole(path: Path) -> bool:
    """Whether a file can be read, and holds what was written."""
    try:
        return bool(load_weights(path))
    except UserError:
        return False


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    path = regular_file(path, f"weights file {path}")
    try:
        if path.suffix in (".pt", ".pth"):
            _refuse_inflating(path)
            with warnings.catch_warnings(action="ignore"):  # they tell of what is refused below
                return _only_tensors(torch.load(path, map_location="cpu", weights_only=True)), {}, True
        weights, metadata = read_safetensors(path)
        about = json.loads(metadata.get("flowdistill", "{}"))
        return weights, about if isinstance(about, dict) else {}, is_whole(weights, metadata)
    except SafetensorError:
        raise UserError(f"weights file {path}: not a valid safetensors file (damaged, truncated, or something else)") from None
    except Exception:  # torch.load raises anything on junk, and its words advise to load pickles
        cause = "damaged, or with something else in it, which is never executed"
        raise UserError(f"weights file {path}: cannot be read as a dictionary of named tensors ({cause})") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, as they lie there.

    Raises:
        Exception: of safetensors, where it is no such file.
    """
    with path.open("rb") as opened, safe_open(_openable(path, opened.fileno()), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (safe_open is no mapping)


def _openable(path: Path, descriptor: int) -> str:
    """A name of an open file that safetensors takes, which knows no path that is not UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{descriptor}"
    return os.fspath(path)


def _refuse_inflating(path: Path) -> None:
    """PyTorch never compresses: a zip whose members are larger than itself is a bomb."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("members larger than the file")


def _only_tensors(loaded: Any) -> dict[str, Tensor]:
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(name, str) and _plain(value) for name, value in state.items()):
        raise TypeError("something else than named tensors")
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _plain(value: Any) -> bool:
    """A dense tensor of real numbers with a place in memory for each: a repeated (stride 0) one would grow when it is copied."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu" or value.is_complex():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def refuse_misfit(net: Network, weights: Weights, origin: str) -> None:
    """Compare names and shapes of weights with a network's.

    Raises:
        UserError: names or shapes do not fit; the first of them.
    """
    own = {name: value for name, value in net.state_dict().items() if name not in net.grown}
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys() - net.grown)
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the network has not"
        raise UserError(f"{origin} does not fit {net.spec.name}: it {what}; name the model as MODEL@FILE")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise UserError(
                f"{origin} does not fit {net.spec.name} with {net.spec.classes} classes: {name} is {tuple(weights[name].shape)}, "
                f"needs {tuple(value.shape)}; use weights trained on the same data"
            )


def fill(net: Network, weights: Weights, origin: str) -> None:
    """Put weights into a network.

    Raises:
        UserError: names or shapes do not fit; the first of them.
    """
    refuse_misfit(net, weights, origin)
    net.take(weights)


def hash_weights(weights: Weights) -> str:
    """SHA-256 over names, shapes and values, whatever the memory layout."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().to("cpu", copy=True).contiguous()  # numpy keeps what it sees from being resized, as observers are
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
