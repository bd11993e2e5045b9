"""The keys of a config by name, with what help and ``flowdistill config`` say of each. Torch-free."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .checks import UserError, did_you_mean, joined
from .config import RunConfig

KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Key:
    """A key that ``--set`` takes.

    Attributes:
        key: its name, dotted.
        allowed: type and limits of its value, in words.
        default: of RunConfig; None: none, or what the description says.
        description: one or two sentences. They say the default if that is no value.
    """

    key: str
    allowed: str
    default: Any
    description: str

    @property
    def written_default(self) -> str | None:
        """The default as ``--set`` reads it; None if it is no value."""
        if self.default is None or isinstance(self.default, str):
            return self.default
        return json.dumps(self.default)


def chosen(pattern: str | None) -> list[Key]:
    """The keys of this name, below the table of this name, or that fit a pattern with * and ?. None: all keys.

    Raises:
        UserError: there is none.
    """
    if pattern is None:
        return list(KEYS.values())
    keys = [key for name, key in KEYS.items() if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
    if not keys:
        close = [name for name in KEYS if name.endswith(f".{pattern}")] or difflib.get_close_matches(pattern, KEYS)
        raise UserError(f"config {pattern!r}: no key has such a name; {did_you_mean(pattern, close or RunConfig.model_fields)}")
    return keys


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of a model, with those of the models that it has. A table by role has its keys once for each role."""
    for name, field in model.model_fields.items():
        key, annotation = f"{prefix}{name}", field.annotation
        by_role = _literals(get_args(annotation)[0]) if get_origin(annotation) is dict else ()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _keys(annotation, f"{key}.")
        elif by_role:
            below = get_args(annotation)[1]
            for role in by_role:
                if isinstance(below, type) and issubclass(below, BaseModel):
                    yield from _keys(below, f"{key}.{role}.")
                else:
                    yield Key(f"{key}.{role}", _allowed(below, field), None, field.description or "")
        else:
            default = json.loads(json.dumps(field.default, default=str))  # lists and texts in the place of tuples and paths
            yield Key(key, _allowed(annotation, field), default, field.description or "")


def _literals(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _allowed(annotation: Any, field: FieldInfo) -> str:
    limits = [f", {LIMITS[name]} {limit}" for mark in field.metadata for name in LIMITS if (limit := getattr(mark, name, None)) is not None]
    return joined(dict.fromkeys(_kinds(annotation)), "or") + "".join(limits)


def _kinds(annotation: Any) -> list[str]:
    """The kinds of value that a type allows, in words."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if origin in (Union, UnionType):
        return [kind for part in inner if part is not NoneType for kind in _kinds(part)]
    if origin is Literal:
        return [str(value) for value in inner]
    if origin is tuple:
        return [f"list of {KINDS[inner[0]]}s"]
    if origin is dict:
        return ["table"]
    return KINDS[annotation].split(" or ")


KEYS: Mapping[str, Key] = {key.key: key for key in _keys(RunConfig)}
