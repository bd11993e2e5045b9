"""Forward hooks on modules that belong to others. Copies and pickles of the modules are without them; a call by the owner keeps nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Seen(dict[str, Tensor]):
    """What the hooks saw. It is no plain dict: if a module holds one, torch.export leaves a copy in its place, of which no hook knows.

    Attributes:
        watching: whether the network that asked is running. If its owner calls a module, nothing is kept.
    """

    watching = False


class Keep:
    """A forward hook that puts a module's output into ``seen``.

    Args:
        first_input: whether it keeps the module's first input in place of the output. Default: False.
        overwritten: whether the output will be changed in place, so that it keeps a copy. Default: False.
    """

    def __init__(self, seen: Seen, name: str, *, first_input: bool = False, overwritten: bool = False) -> None:
        self.seen, self.name, self.first_input, self.overwritten = seen, name, first_input, overwritten

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Keep it, if the network that asked is running. Compiled code always keeps it: the compiler looks at hooks once, and one graph
        serves every caller.
        """
        if self.seen.watching or torch.compiler.is_compiling():
            kept = (*inputs, *named.values())[0] if self.first_input else output
            self.seen[self.name] = kept.clone() if self.overwritten else kept


class Hooks(OrderedDict[int, Any]):
    """Takes the place of a module's table of hooks. Copies and pickles are without the hooks that this package added.

    Attributes:
        before: the table that the module had. Its owner's handles still remove hooks from that one.
        inherited: the numbers of the hooks that were in it at first.
        added: the numbers of the hooks that this package added.
    """

    def __init__(self, before: OrderedDict[int, Any]) -> None:
        super().__init__(before)
        self.before, self.inherited, self.added = before, frozenset(before), set[int]()

    def items(self) -> Any:
        """All hooks, but for inherited ones that their owner has removed."""
        if not self.inherited:
            return super().items()
        return [(number, hook) for number, hook in super().items() if number not in self.inherited or number in self.before]

    def __len__(self) -> int:
        return super().__len__() - len([number for number in self.inherited if number not in self.before])

    def bare(self) -> list[tuple[int, Any]]:
        """The owner's hooks."""
        return [(number, hook) for number, hook in self.items() if number not in self.added]

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[int, Any]:
        return OrderedDict(deepcopy(self.bare(), memo))

    def __reduce__(self) -> Any:
        return OrderedDict, (self.bare(),)


TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs")  # of a module


def hook(module: nn.Module, keep: Keep) -> Callable[[], None]:
    """Register a hook; the function that is returned removes it."""
    for attribute in TABLES:
        if not isinstance(getattr(module, attribute), Hooks):
            setattr(module, attribute, Hooks(getattr(module, attribute)))
    handle = module.register_forward_hook(keep, with_kwargs=True)
    tables: list[Hooks] = [getattr(module, attribute) for attribute in TABLES]
    for table in tables:
        table.added.add(handle.id)

    def remove() -> None:
        handle.remove()
        for attribute, table in zip(TABLES, tables, strict=True):
            table.added.discard(handle.id)
            if getattr(module, attribute) is table and table.keys() <= table.inherited:
                setattr(module, attribute, table.before)

    return remove


def remove_all(hooks: Iterable[Callable[[], None]]) -> None:
    """Remove hooks that ``hook`` made."""
    for remove in hooks:
        remove()
