"""How the data sets of loaders name their classes, and whether they all mean the same by a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from numbers import Integral
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from ..checks import UserError

Names = Mapping[int, str]
"""Class number -> name."""

SHOWN = 10  # names of a list that a message shows


def own_names(dataset: Any) -> Names:
    """The names that a data set itself gives its classes; empty if it gives none.

    They are those of ``class_to_idx`` (name to number), as torchvision's and timm's data sets have it. If that lists other names than
    ``classes``, they are ``classes``, in the order of the numbers. For a Hugging Face data set, they are those of the one column of type
    ClassLabel.
    """
    listed = getattr(dataset, "classes", None)
    names = dict(enumerate(map(str, listed))) if isinstance(listed, list | tuple) else {}
    for owner in (dataset, getattr(dataset, "reader", None)):
        table = getattr(owner, "class_to_idx", None)
        if not isinstance(table, Mapping) or not table or not all(isinstance(number, Integral) for number in table.values()):
            continue
        numbered = {int(number): str(name) for name, number in table.items()}
        if len(numbered) == len(table) and (not names or sorted(names.values()) == sorted(numbered.values())):
            return numbered
    if names:
        return names
    features = getattr(dataset, "features", None)
    columns = [kind for kind in features.values() if type(kind).__name__ == "ClassLabel"] if isinstance(features, Mapping) else []
    return dict(enumerate(map(str, columns[0].names))) if len(columns) == 1 else {}


def names_below(dataset: Any) -> Iterator[Names]:
    """Yield the names that a data set has, or those of the data sets that it is made of: a subset, several put together, or a wrapper."""
    for _ in range(100):  # one that holds itself has no end
        if names := own_names(dataset):
            yield names
            return
        if isinstance(dataset, ConcatDataset):
            for part in dataset.datasets:
                yield from names_below(part)
            return
        if (dataset := getattr(dataset, "dataset", None)) is None:
            return


def in_order(dataset: Any) -> tuple[str, ...]:
    """The names of a data set's ``classes`` in the order of their numbers, below subsets; empty if it has none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    listed = getattr(dataset, "classes", None)
    if not isinstance(listed, list | tuple):
        return ()
    names = own_names(dataset)
    return tuple(names[number] for number in range(len(listed))) if set(names) == set(range(len(listed))) else tuple(map(str, listed))


def refuse_other_names(sources: Sequence[tuple[str, Names]]) -> None:
    """Refuse sources that give a class number two names, or a name two numbers. A source may name fewer classes than another.

    Raises:
        UserError: two sources differ; the message has the first two that do, and both lists.
    """
    distinct = {(source, tuple(sorted(names.items()))): names for source, names in sources}
    for ((first, _), first_names), ((second, _), second_names) in combinations(distinct.items(), 2):
        number = _first_difference(first_names, second_names)
        if number is not None:
            origins = (first, second) if first != second else (f"one data set of {first}", "another")
            pair = zip((first_names, second_names), origins, strict=True)
            clash = " and ".join(f"{_quoted(names, number)} in {origin}" for names, origin in pair)
            lists = " against ".join(map(_listed, (first_names, second_names)))
            cure = "number both alike, and let classes or class_to_idx of the data sets say so"
            raise UserError(f"class {number} is {clash} ({lists}); {cure}")


def _first_difference(first: Names, second: Names) -> int | None:
    """The first number with two names, or else the first whose name has only another number in the other source."""
    both = sorted(first.keys() & second.keys())
    agreed = {first[number] for number in both if first[number] == second[number]}
    shared = {*first.values()} & {*second.values()} - agreed
    lone = sorted(number for number, name in {**first, **second}.items() if number not in both and name in shared)
    return next((number for number in both if first[number] != second[number]), lone[0] if lone else None)


def _quoted(names: Names, number: int) -> str:
    return repr(names[number]) if number in names else "none"


def _listed(names: Names) -> str:
    """The names in the order of their numbers."""
    ordered = [names[number] for number in sorted(names)]
    more = f" and {len(ordered) - SHOWN:,} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
