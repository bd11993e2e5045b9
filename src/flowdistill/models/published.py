"""Weights that a library publishes, by name, through its own downloader and cache.

``timm:NAME.TAG``, ``timm:NAME@pretrained``, ``torchvision:NAME@DEFAULT`` (or another of its weights' names), and ``hf-hub:ORG/NAME``, a
timm model of the Hugging Face hub whose weights are safetensors.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checks import FAILURES, UserError, did_you_mean, joined, pass_on_shortage, summary
from .downloads import of_hub, of_url
from .foreign import WITH_AUXILIARY_HEADS, timm_library, torchvision_library
from .input_adapter import InputSpec

RESERVED = ("pretrained", "DEFAULT")  # after @: the weights that a library takes by default, never a file of that name
PUBLISHED_NAMES = ("timm:NAME.TAG", "timm:NAME@pretrained", "torchvision:NAME@DEFAULT", "hf-hub:ORG/NAME")  # as messages name them
SAFE_FILE = "model.safetensors"
CONFIG = "config.json"

_TIMM = re.compile(r"timm:(?P<name>[^:@.]+)(\.(?P<tag>[^:@]+)|@(pretrained|DEFAULT))")
_TORCHVISION = re.compile(r"torchvision:(?P<name>[^:@]+)@(?P<weights>\w+)")
_HUB = re.compile(r"hf-hub:(?P<repository>[^:@]+)(@(?P<revision>[^:@]+))?")


@dataclass(frozen=True, eq=False)  # large: one is told from another by identity
class Published:
    """Weights that a library publishes.

    Attributes:
        model: the network that they are for, as this package names it: ``timm:resnet18``.
        weights: its whole state, by the network's own names.
        input_spec: the images that it was trained on.
        classes: the number of classes; 0 for a backbone, which has no classifier.
        resizable: whether the network takes images of another size than these.
        labels: the names of its classes, in the order of the logits; empty if unknown.
        synsets: their WordNet ids (``n01440764``), after which ImageNet's folders are named; empty if unknown.
        licence: as the weights declare it; empty if they do not.
        file: where the library keeps them.
    """

    model: str
    weights: Mapping[str, Tensor]
    input_spec: InputSpec
    classes: int
    resizable: bool
    labels: tuple[str, ...]
    synsets: tuple[str, ...]
    licence: str
    file: Path

    @property
    def student_input_spec(self) -> InputSpec:
        """The images that a student sees which begins from them: normalised as they know it; of the data's size, if it can take that."""
        return replace(self.input_spec, height=None, width=None, interpolation=None) if self.resizable else self.input_spec

    @property
    def about(self) -> str:
        """What they are, in a few words."""
        return f"published weights, licence {self.licence or 'not declared'}"


def is_published(reference: str) -> bool:
    """Whether a name means published weights, or would if its network had any. It is never a file's, and never means fresh weights.

    Nothing is loaded. ``torchvision:NAME@WORD`` is such a name where WORD is reserved, or the library has weights of that name.
    """
    if _TIMM.fullmatch(reference) or _HUB.fullmatch(reference):
        return True
    _, at, word = reference.rpartition("@")
    written = _TORCHVISION.fullmatch(reference)
    return bool(at) and (word in RESERVED or (written is not None and word in _torchvision_weights(written["name"])))


@functools.lru_cache(maxsize=8)
def published(reference: str) -> Published:
    """The weights that a name means; downloaded if the library's cache does not have them.

    Raises:
        UserError: nobody publishes such weights, they are neither in the cache nor within reach, or the file in the cache is damaged.
    """
    if written := _HUB.fullmatch(reference):
        return _of_hub(reference, written["repository"], written["revision"])
    if written := _TIMM.fullmatch(reference):
        return _of_timm(reference, written["name"], written["tag"])
    if written := _TORCHVISION.fullmatch(reference):
        return _of_torchvision(reference, written["name"], written["weights"])
    network, _, word = reference.rpartition("@")
    names = joined(PUBLISHED_NAMES, "or")
    raise UserError(f"{reference}: nobody publishes weights of {network}; write {names}, or {network}@./{word} for a file of that name")


def _of_timm(reference: str, name: str, tag: str | None) -> Published:
    """The weights of one of timm's models, those of a tag or those that timm takes by default."""
    timm = timm_library(name)
    tags = {other.partition(".")[2]: other for other in timm.list_pretrained(name)}
    if not tags:
        raise UserError(f"{reference}: timm publishes no weights of {name}; write timm:{name} for fresh ones")
    if tag is not None and tag not in tags:
        raise UserError(f"{reference}: timm publishes no such weights of {name}; {did_you_mean(tag, tags)}")
    configured = timm.get_pretrained_cfg(name if tag is None else f"{name}.{tag}")
    if configured.hf_hub_id:
        repository, _, revision = configured.hf_hub_id.partition("@")
        file = of_hub(reference, repository, _alternatives(configured.hf_hub_filename or "pytorch_model.bin"), revision or None)
    else:
        file = of_url(reference, configured.url)
    return _timm_network(reference, name, configured, file)


def _alternatives(file: str) -> tuple[str, ...]:
    """The files that may hold a model's weights, those that can't hold code first."""
    safe = {"pytorch_model.bin": SAFE_FILE, "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return (safe.get(file, f"{file.removesuffix('.bin')}.safetensors"), file) if file.endswith(".bin") else (file,)


def _of_hub(reference: str, repository: str, revision: str | None) -> Published:
    """The weights of a timm model that anybody put on the hub."""
    config = _read_config(reference, of_hub(reference, repository, (CONFIG,), revision, beside=SAFE_FILE))
    name, parts = config["architecture"], config.get("model_args") or {}
    timm_library(name)
    if parts:
        given = ", ".join(f"{key}={value}" for key, value in parts.items())
        raise UserError(
            f"{reference}: it is timm's {name} made otherwise ({given}); make it in FILE.py:FUNCTION, and name its weights file"
        )
    return _timm_network(reference, name, config["pretrained_cfg"], of_hub(reference, repository, (SAFE_FILE,), revision, beside=CONFIG))


def _read_config(reference: str, file: Path) -> dict[str, Any]:
    """What a model of the hub says of itself: ``architecture``, ``model_args``, and ``pretrained_cfg`` as timm has it.

    Raises:
        UserError: it is no model of timm.
    """
    from timm.models import PretrainedCfg

    known = {field.name for field in fields(PretrainedCfg)} - {"url", "file", "state_dict", "custom_load"}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        about = {**config, **config.get("pretrained_cfg", {})} | {
            key: config[key] for key in ("num_classes", "label_names") if key in config
        }
        configured = PretrainedCfg(**{key: value for key, value in about.items() if key in known})
        return {"architecture": str(config["architecture"]), "model_args": config.get("model_args"), "pretrained_cfg": configured}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{reference}: its {CONFIG} names no architecture of timm; name a model that timm can load") from None


def _timm_network(reference: str, name: str, configured: Any, file: Path) -> Published:
    """timm's own network with the weights of a file, as timm puts them in, and what its ``PretrainedCfg`` declares of them."""
    import timm

    try:
        # timm reads numpy's files itself; those of torch are read here, so that a file can run no code.
        content = {"file": str(file)} if file.suffix == ".npz" else {"state_dict": _state(file)}
        net = timm.create_model(name, pretrained=True, pretrained_cfg=replace(configured, hf_hub_id=None, url=None, **content))
    except FAILURES as error:
        pass_on_shortage(error)
        raise _unusable(reference, file, error) from None
    channels, height, width = configured.input_size
    spec = InputSpec(channels, height, width, tuple(configured.mean), tuple(configured.std), _filter(configured.interpolation))
    labels, synsets = _timm_labels(net, configured)
    licence, resizable = configured.license or "", not configured.fixed_input_size
    return Published(f"timm:{name}", net.state_dict(), spec, configured.num_classes, resizable, labels, synsets, licence, file)


def _state(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    return state


def _unusable(reference: str, file: Path, error: BaseException) -> UserError:
    return UserError(f"{reference}: {file} can't be used ({summary(error)}); if it is damaged, delete it, and it is downloaded again")


def _filter(interpolation: str) -> str | None:
    """How images are resized for a network; bilinearly where the library leaves it to chance, or has a way that tensors do not have."""
    return "bicubic" if interpolation == "bicubic" else None


def _timm_labels(net: nn.Module, configured: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes' names, those that the weights declare or else ImageNet's, and WordNet ids."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    names, descriptions = configured.label_names, configured.label_descriptions
    if names:
        described = [descriptions.get(name, name) for name in names] if isinstance(descriptions, Mapping) else descriptions or names
        return tuple(map(str, described)), _if_synsets(names)
    subset = infer_imagenet_subset(net)
    if subset is None:
        return (), ()
    info = ImageNetInfo(subset)
    indices = range(len(info.label_names()))  # type: ignore[no-untyped-call]
    return tuple(info.index_to_description(index) for index in indices), tuple(info.index_to_label_name(index) for index in indices)


def are_synsets(names: Sequence[str]) -> bool:
    """Whether classes are named by WordNet ids."""
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def _if_synsets(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names) if are_synsets(names) else ()


def _torchvision_weights(name: str) -> dict[str, Any]:
    """The weights of one of torchvision's models, by name; none if there is no such model."""
    from torchvision import models as library

    if name not in library.list_models(module=library):
        return {}
    return dict(library.get_model_weights(name).__members__)


def _of_torchvision(reference: str, name: str, word: str) -> Published:
    library = torchvision_library(name)
    enum = library.get_model_weights(name)
    if word not in (*RESERVED, *enum.__members__):
        raise UserError(f"{reference}: torchvision publishes no such weights of {name}; {did_you_mean(word, enum.__members__)}")
    if not enum.__members__:
        raise UserError(f"{reference}: torchvision publishes no weights of {name}; write torchvision:{name} for fresh ones")
    weights = enum.DEFAULT if word in RESERVED else enum[word]
    file = of_url(reference, weights.url)
    try:
        net = library.get_model(name, weights=weights, progress=False)  # finds the file in the cache
    except FAILURES as error:
        pass_on_shortage(error)
        raise _unusable(reference, file, error) from None
    made_for = weights.transforms()
    (side,) = made_for.crop_size
    mean, std = tuple(made_for.mean), tuple(made_for.std)
    if name in WITH_AUXILIARY_HEADS:  # with published weights, and then alone, these turn the images into such of mean and std 0.5 first
        mean = std = (0.5, 0.5, 0.5)
    state = {key: value for key, value in net.state_dict().items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    spec = InputSpec(3, side, side, mean, std, _filter(made_for.interpolation.value))
    labels = tuple(weights.meta["categories"])
    return Published(f"torchvision:{name}", state, spec, len(labels), not name.startswith("vit_"), labels, (), "", file)
