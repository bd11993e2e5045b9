"""Weights compared with a network: under which names they fit it, and how they differ if they do not."""

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

WRAPPERS = ("module", "_orig_mod")  # parts of a name, if DistributedDataParallel or torch.compile wrapped that part of the network
COUNTER = "num_batches_tracked"  # of a batch normalisation: files from before PyTorch 0.4.1 have none
THOP = ("total_ops", "total_params")  # what the package thop leaves in a network that it counted
SHOWN = 2  # how many of many names a message gives
LONGEST_KEYS = 160  # characters
USUAL = DataSpec("", 0, 10, 3, 32, 32)


def named_as_in(net: Network, weights: Weights) -> Weights:
    """The weights under the network's names, a missing counter as 0; unchanged if they fit under no names.

    What wrappers put before or into the names is left out, the same for every name.
    """
    expected = _expected(net)
    fitting = next((candidate for candidate in _unwrapped(weights) if _fits(candidate, expected, net.grown)), None)
    if fitting is None:
        return weights
    counters = {name: torch.zeros(value.shape, dtype=value.dtype, device="cpu") for name, value in expected.items() if name not in fitting}
    return {**fitting, **counters} if counters else fitting


def misfit(net: Network, weights: Weights, origin: str) -> str:
    """How weights differ from those of the network, in one line; empty if they fit it under the names that they have."""
    expected, model = _expected(net), net.spec.name
    if not _fits(weights, expected, net.grown):
        nearest = max(_unwrapped(weights), key=lambda candidate: len(expected.keys() & candidate.keys()))
        return f"{origin} does not fit {model}: {_other_names(net, expected, nearest, weights, origin)}"
    common = {name: value for name, value in expected.items() if name in weights}
    if shapes := [name for name, value in common.items() if value.shape != weights[name].shape]:
        first = f"{short(shapes[0])} is {tuple(weights[shapes[0]].shape)}, needs {tuple(expected[shapes[0]].shape)}"
        more = f" ({len(shapes)} of {len(expected)} shapes differ)" if len(shapes) > 1 else ""
        cause = _other_shapes(net, expected, weights, shapes)
        return f"{origin} does not fit {model} with {net.spec.classes} classes: {first}{more}; {cause}"
    if whole := [name for name, value in common.items() if value.is_floating_point() and not weights[name].is_floating_point()]:
        kind = str(weights[whole[0]].dtype).removeprefix("torch.")
        return f"{origin} does not fit {model}: {short(whole[0])} is {kind}, needs floating point; use weights that are not quantised"
    return ""


def registered(weights: Weights, but: str = "") -> str:
    """The network of this package that has these names and shapes, whatever their classes and channels; empty if there is none."""
    for name in models.MODELS:
        if name != but:
            net = _on_meta(name)
            named = named_as_in(net, weights)
            if _fits(named, _expected(net), net.grown) and not _elsewhere(net, _expected(net), named):
                return name
    return ""


@functools.lru_cache(maxsize=64)
def _on_meta(name: str) -> Network:
    with torch.device("meta"):
        return models.build(name, USUAL)


def _expected(net: Network) -> dict[str, Tensor]:
    """The network's own tensors, without the buffers that take their shape in a first pass."""
    return {name: value for name, value in net.state_dict().items() if name not in net.grown}


def _fits(weights: Weights, expected: Weights, grown: frozenset[str]) -> bool:
    """Whether the names are those of the network, its counters aside."""
    missing, extra = _apart(weights, expected, grown)
    return not missing and not extra


def _apart(weights: Weights, expected: Weights, grown: frozenset[str]) -> tuple[list[str], list[str]]:
    """The names that are missing, and those that are left over."""
    missing = [name for name in expected if name not in weights and name.rpartition(".")[2] != COUNTER]
    return missing, [name for name in weights if name not in expected and name not in grown]


def _unwrapped(weights: Weights) -> Iterator[Weights]:
    """The weights under the names that they have, and under those names without what wrappers may have added."""
    inner = {".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in weights.items()}
    for named in (weights, inner) if len(inner) == len(weights) else (weights,):
        yield named
        while named and len(beginnings := {name.partition(".")[0] for name in named}) == 1 and all("." in name for name in named):
            begin = f"{beginnings.pop()}."
            named = {name.removeprefix(begin): value for name, value in named.items()}
            yield named


def _other_names(net: Network, expected: Weights, weights: Weights, file_weights: Weights, origin: str) -> str:
    missing, extra = _apart(weights, expected, net.grown)
    parts = [f"it lacks {_listed(missing)}"] if missing else []
    parts += [f"it has {_listed(extra)}, which the network has not"] if extra else []
    difference = f"{' and '.join(parts)} ({len(expected)} names are wanted, it has {len(weights)})"
    return f"{difference}; {_why(net, expected, weights, file_weights, origin)}"


def _listed(names: Sequence[str]) -> str:
    return some((f"'{short(name)}'" for name in names), SHOWN)


def _why(net: Network, expected: Weights, weights: Weights, file_weights: Weights, origin: str) -> str:
    """What explains other names, and what to do."""
    missing, extra = _apart(weights, expected, net.grown)
    if inside := [begin for begin in _beginnings(expected, file_weights) if _fits(below(file_weights, begin), expected, net.grown)]:
        keys = " or ".join(f"{origin}{'.' if '#' in origin else '#'}{begin}" for begin in inside[:SHOWN])
        return f"those that begin with {_listed(inside)} fit; name them as {keys if len(keys) <= LONGEST_KEYS else 'FILE#KEY'}"
    if all(name.rpartition(".")[2] in THOP for name in extra) and not missing:
        return "thop left them; save the weights without them"
    if other := registered(file_weights, but=net.spec.name):
        return f"these are the weights of a {other}; name that model"
    if missing and extra and (wanted := _shapes(expected)) == _shapes(weights):
        pair = f"{short(extra[0])} for {short(missing[0])}"
        return f"all {len(wanted)} shapes agree in order, so the names alone may differ ({pair}): save them under the network's"
    return f"{_nearest(expected, weights, missing, extra)}use weights of this very network"


def _beginnings(expected: Weights, file_weights: Weights) -> list[str]:
    """What stands before the network's last name in each name of the file that ends with it."""
    last = list(expected)[-1]
    return [name.removesuffix(f".{last}") for name in file_weights if name.endswith(f".{last}")]


def _shapes(weights: Weights) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for name, value in weights.items() if name.rpartition(".")[2] != COUNTER]


def _nearest(expected: Weights, weights: Weights, missing: Sequence[str], extra: Sequence[str]) -> str:
    """A question about the left-over name that is most like a missing one of the same shape; empty if none is."""
    for name in missing:
        alike = [other for other in extra if weights[other].shape == expected[name].shape]
        if near := get_close_matches(name, alike, n=1):
            return f"is {short(near[0])} what the network calls {short(name)}? "
    return ""


def _stem(expected: Weights) -> str:
    return next((name for name, value in expected.items() if value.dim() == 4), "")


def _elsewhere(net: Network, expected: Weights, weights: Weights) -> list[str]:
    """The names of tensors whose shapes differ in more than the number of classes or of the images' channels."""
    head, stem = f"{net.spec.head}.", _stem(expected)

    def same(name: str) -> bool:
        wanted, shape = expected[name].shape, weights[name].shape
        if name.startswith(head):
            return wanted[1:] == shape[1:]
        return wanted == shape or (name == stem and len(shape) == 4 and (wanted[0], *wanted[2:]) == (shape[0], *shape[2:]))

    return [name for name in expected if name in weights and not same(name)]


def _other_shapes(net: Network, expected: Weights, weights: Weights, shapes: Sequence[str]) -> str:
    """What explains other shapes, and what to do."""
    if _elsewhere(net, expected, weights):
        if other := registered(weights, but=net.spec.name):
            return f"these are the weights of a {other}; name that model"
        return "it is of another width or kind; use weights of this very network"
    stem, rows = _stem(expected), [name for name in shapes if name.startswith(f"{net.spec.head}.")]
    causes = [f"it has {len(weights[rows[0]])} classes: use weights trained on the same data"] if rows else []
    if stem in shapes:
        channels = weights[stem].shape[1]
        cure = f"set inputs.teacher.channels={channels} (or inputs.student)" if channels == 3 else f"set data.channels={channels}"
        causes.append(f"it is for images of {channels} channel{'s' * (channels > 1)}: {cure}")
    return "; ".join(causes)
