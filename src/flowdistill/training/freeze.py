"""Parts of a student that are not trained: no step, no weight decay, and fixed statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..checks import UserError
from ..models import Network


def freeze(net: Network, names: Sequence[str]) -> list[nn.Module]:
    """Freeze what is named, and return the modules that must stay in eval mode: those whose running statistics are frozen.

    A name is that of a module, which stands for all that is in it, or of a parameter or buffer, as in the state dict. ``*`` stands for
    any letters, ``?`` for one letter. ``conv1,bn1,layer1`` is the front of a ResNet.

    Raises:
        UserError: a name matches nothing, or nothing is left to train.
    """
    body = net.body
    for name in names:
        if not any(_named(entry, name) for entry in body.state_dict()):
            children = ", ".join(path for path, _ in body.named_children())
            raise UserError(f"train.freeze={name}: nothing in {net.spec.name} is so named; it has: {children}, and names below these")
    for entry, parameter in body.named_parameters(remove_duplicate=False):  # a tied one has several names
        if any(_named(entry, name) for name in names):
            parameter.requires_grad_(False)
    if names and not any(parameter.requires_grad for parameter in body.parameters()):
        raise UserError(
            f"train.freeze={','.join(names)} is all of {net.spec.name}; leave a part to train, such as its classifier {net.spec.head}"
        )
    modules = [(f"{path}.running_mean", module) for path, module in body.named_modules(remove_duplicate=False) if _counts(module)]
    return [*dict.fromkeys(module for entry, module in modules if any(_named(entry, name) for name in names))]


def _named(entry: str, name: str) -> bool:
    return fnmatchcase(entry, name) or fnmatchcase(entry, f"{name}.*")


def _counts(module: nn.Module) -> bool:
    return any(buffer == "running_mean" for buffer, _ in module.named_buffers(recurse=False))
