"""Weights beside a network: under which names they fit it, and how those that do not fit differ."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from .. import models
from ..checks import short, some
from ..models import Network
from ..types import DataSpec
from .weight_files import below

Weights = Mapping[str, Tensor]

WRAPPERS = ("module", "_orig_mod")  # in a name, where DistributedDataParallel or torch.compile held that part of the network
COUNTER = "num_batches_tracked"  # of a batch normalisation: files from before PyTorch 0.4.1 have none
THOP = ("total_ops", "total_params")  # what the package thop leaves in a network that it counted
SHOWN = 2  # of many names, so many are told
LONGEST_KEYS = 160  # characters
USUAL = DataSpec("", 0, 10, 3, 32, 32)


def named_as_in(net: Network, weights: Weights) -> Weights:
    """The weights by the names that the network gives them, a missing counter as 0; as they are where they fit under no names.

    What wrappers put before the names, or into them, is left out: of each name the same.
    """
    own = _own(net)
    fitting = next((found for found in _unwrapped(weights) if _fits(found, own, net.grown)), None)
    if fitting is None:
        return weights
    counters = {name: torch.zeros(value.shape, dtype=value.dtype, device="cpu") for name, value in own.items() if name not in fitting}
    return {**fitting, **counters} if counters else fitting


def misfit(net: Network, weights: Weights, origin: str) -> str:
    """How weights differ from those of the network, in one line; empty where they fit it under the names that they have."""
    own, model = _own(net), net.spec.name
    if not _fits(weights, own, net.grown):
        nearest = max(_unwrapped(weights), key=lambda found: len(own.keys() & found.keys()))
        return f"{origin} does not fit {model}: {_other_names(net, own, nearest, weights, origin)}"
    common = {name: value for name, value in own.items() if name in weights}
    if shapes := [name for name, value in common.items() if value.shape != weights[name].shape]:
        first = f"{short(shapes[0])} is {tuple(weights[shapes[0]].shape)}, needs {tuple(own[shapes[0]].shape)}"
        more = f" ({len(shapes)} of {len(own)} shapes differ)" if len(shapes) > 1 else ""
        return f"{origin} does not fit {model} with {net.spec.classes} classes: {first}{more}; {_other_shapes(net, own, weights, shapes)}"
    if whole := [name for name, value in common.items() if value.is_floating_point() and not weights[name].is_floating_point()]:
        kind = str(weights[whole[0]].dtype).removeprefix("torch.")
        return f"{origin} does not fit {model}: {short(whole[0])} is {kind}, needs floating point; use weights that are not quantised"
    return ""


def registered(weights: Weights, but: str = "") -> str:
    """The network of this package whose names and shapes these are, whatever their classes and channels; empty where there is none."""
    for name in models.MODELS:
        if name != but:
            net = _on_meta(name)
            found = named_as_in(net, weights)
            if _fits(found, _own(net), net.grown) and not _elsewhere(net, _own(net), found):
                return name
    return ""


@functools.lru_cache(maxsize=64)
def _on_meta(name: str) -> Network:
    with torch.device("meta"):
        return models.build(name, USUAL)


def _own(net: Network) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if name not in net.grown}


def _fits(weights: Weights, own: Weights, grown: frozenset[str]) -> bool:
    """Whether the names are those of the network, its counters aside."""
    missing, extra = _apart(weights, own, grown)
    return not missing and not extra


def _apart(weights: Weights, own: Weights, grown: frozenset[str]) -> tuple[list[str], list[str]]:
    """The names that are missing, and those that are left over."""
    missing = [name for name in own if name not in weights and name.rpartition(".")[2] != COUNTER]
    return missing, [name for name in weights if name not in own and name not in grown]


def _unwrapped(weights: Weights) -> Iterator[Weights]:
    """The weights under the names that they have, and under those without what may be of wrappers."""
    inner = {".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in weights.items()}
    for found in (weights, inner) if len(inner) == len(weights) else (weights,):
        yield found
        while found and len(beginnings := {name.partition(".")[0] for name in found}) == 1 and all("." in name for name in found):
            begin = f"{beginnings.pop()}."
            found = {name.removeprefix(begin): value for name, value in found.items()}
            yield found


def _other_names(net: Network, own: Weights, weights: Weights, given: Weights, origin: str) -> str:
    missing, extra = _apart(weights, own, net.grown)
    parts = [f"it lacks {_listed(missing)}"] if missing else []
    parts += [f"it has {_listed(extra)}, which the network has not"] if extra else []
    told = f"{' and '.join(parts)} ({len(own)} names are wanted, it has {len(weights)})"
    return f"{told}; {_why(net, own, weights, given, origin)}"


def _listed(names: Sequence[str]) -> str:
    return some((f"'{short(name)}'" for name in names), SHOWN)


def _why(net: Network, own: Weights, weights: Weights, given: Weights, origin: str) -> str:
    """What explains other names, and what to do."""
    missing, extra = _apart(weights, own, net.grown)
    if inside := [begin for begin in _beginnings(own, given) if _fits(below(given, begin), own, net.grown)]:
        keys = " or ".join(f"{origin}{'.' if '#' in origin else '#'}{begin}" for begin in inside[:SHOWN])
        return f"those that begin with {_listed(inside)} fit; name them as {keys if len(keys) <= LONGEST_KEYS else 'FILE#KEY'}"
    if all(name.rpartition(".")[2] in THOP for name in extra) and not missing:
        return "thop left them; save the weights without them"
    if other := registered(given, but=net.spec.name):
        return f"these are the weights of a {other}; name that model"
    if missing and extra and (wanted := _shapes(own)) == _shapes(weights):
        pair = f"{short(extra[0])} for {short(missing[0])}"
        return f"all {len(wanted)} shapes agree in order, so the names alone may differ ({pair}): save them under the network's"
    return f"{_nearest(own, weights, missing, extra)}use weights of this very network"


def _beginnings(own: Weights, given: Weights) -> list[str]:
    """What stands before the network's last name wherever that ends a name of the file."""
    last = list(own)[-1]
    return [name.removesuffix(f".{last}") for name in given if name.endswith(f".{last}")]


def _shapes(weights: Weights) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for name, value in weights.items() if name.rpartition(".")[2] != COUNTER]


def _nearest(own: Weights, weights: Weights, missing: Sequence[str], extra: Sequence[str]) -> str:
    """The name left over that is likest to a missing one, of the same shape if there is any."""
    for name in missing:
        alike = [other for other in extra if weights[other].shape == own[name].shape]
        if near := get_close_matches(name, alike, n=1):
            return f"is {short(near[0])} what the network calls {short(name)}? "
    return ""


def _stem(own: Weights) -> str:
    return next((name for name, value in own.items() if value.dim() == 4), "")


def _elsewhere(net: Network, own: Weights, weights: Weights) -> list[str]:
    """The shapes that differ in other than the number of classes and of the images' channels."""
    head, stem = f"{net.spec.head}.", _stem(own)

    def same(name: str) -> bool:
        ours, theirs = own[name].shape, weights[name].shape
        if name.startswith(head):
            return ours[1:] == theirs[1:]
        return ours == theirs or (name == stem and len(theirs) == 4 and (ours[0], *ours[2:]) == (theirs[0], *theirs[2:]))

    return [name for name in own if name in weights and not same(name)]


def _other_shapes(net: Network, own: Weights, weights: Weights, shapes: Sequence[str]) -> str:
    """What explains other shapes, and what to do."""
    if _elsewhere(net, own, weights):
        if other := registered(weights, but=net.spec.name):
            return f"these are the weights of a {other}; name that model"
        return "it is of another width or kind; use weights of this very network"
    stem, rows = _stem(own), [name for name in shapes if name.startswith(f"{net.spec.head}.")]
    told = [f"it has {len(weights[rows[0]])} classes: use weights trained on the same data"] if rows else []
    if stem in shapes:
        theirs = weights[stem].shape[1]
        cure = f"set inputs.teacher.channels={theirs} (or inputs.student)" if theirs == 3 else f"set data.channels={theirs}"
        told.append(f"it is for images of {theirs} channel{'s' * (theirs > 1)}: {cure}")
    return "; ".join(told)
