"""Every method with its reference, and the options and pairs of networks that it is tried with."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill.methods import METHODS, Composed, Method, build, resolve
from flowdistill.randomness import seeded
from flowdistill.types import DataSpec, MethodContext, NetSpec
from helpers.pairs import PAIRS, USUAL

COMPOSITION = "at+kd"
SHEETS = {
    path.stem: importlib.import_module(f"reference.{path.stem}")
    for path in sorted((Path(__file__).parents[1] / "reference").glob("[!_]*.py"))
}
REFERENCES = {name: found for stem, module in SHEETS.items() for name, found in getattr(module, "WRAPPED", {stem: module}).items()}
WRAPPED = sorted(name for module in SHEETS.values() for name in getattr(module, "WRAPPED", ()))
NAMES = [*(name for name in METHODS if name != "base"), *WRAPPED, COMPOSITION]
DATA = DataSpec("tiny", n_train=30, classes=4, channels=3, height=8, width=8)


def by_part(name: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return options if "+" in name else {name: options}


def pairs_for(name: str, options: dict[str, Any]) -> list[str]:
    """The pairs that a method is tried on with these options: the usual ones, unless its reference says otherwise."""
    return next(
        (REFERENCES[part].pairs(given) for part, given in by_part(name, options).items() if hasattr(REFERENCES[part], "pairs")), list(USUAL)
    )


def cases(name: str) -> list[dict[str, Any]]:
    return [{}, {"at": {"mode": "paper"}, "kd": {"T": 2.0}}] if name == COMPOSITION else REFERENCES[name].CASES


def label(name: str, options: dict[str, Any]) -> str:
    return "-".join([name, *(f"{k}={v}" for part in by_part(name, options).values() for k, v in part.items())])


ALL = [(name, options) for name in NAMES for options in cases(name)]


def make(name: str, options: dict[str, Any], pair: tuple[NetSpec, NetSpec], classes: int | None = None) -> Method:
    """The method, told of a teacher with this number of classes in the data, or with as many as the teacher's own."""
    with seeded(0, "adapters"):
        method = build(resolve(name, by_part(name, options), {}), student=pair[0], teacher=pair[1], data=DATA)
    method.setup(method_context(pair[1], classes=classes))
    return forgetful(method)


def forgetful(method: Method) -> Method:
    """Each call begins with the buffers as they are now: what a method remembers does not come between two calls that are compared."""
    forward = method.forward
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # of batch normalisation, which a training forward does not read
    kept = {name: buffer.clone() for name, buffer in method.named_buffers() if not name.endswith(statistics)}

    def recall() -> None:
        with torch.no_grad():
            for name, before in kept.items():
                buffer = method.get_buffer(name)
                if torch.compiler.is_compiling() or not torch.equal(buffer, before.to(buffer.dtype)):
                    buffer.copy_(before)

    def once(*given: Any) -> dict[str, Tensor]:
        recall()
        return forward(*given)

    if kept:
        method.forward, method.recall = once, recall  # type: ignore[method-assign, assignment]
    return method


def method_context(teacher: NetSpec, images: int = DATA.n_train, classes: int | None = None) -> MethodContext:
    """Of a teacher known by its spec: drawn numbers. ``classes``: of the data, where they are not the teacher's."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    norms = {tap.name: (normal(tap.channels), normal(tap.channels)) for tap in teacher.taps if tap.norm}
    head = normal(teacher.classes, teacher.embedding), normal(teacher.classes)
    classes = classes or teacher.classes
    return MethodContext(head, norms, normal(classes, teacher.embedding), torch.arange(images) % classes)


def widest(name: str, options: dict[str, Any]) -> tuple[NetSpec, NetSpec]:
    """The pair with the most in it: adapters, where the case has any."""
    return PAIRS[pairs_for(name, options)[-1]]


def wanted(method: Method) -> set[str]:
    """What of the student a method pulls at: the taps that it requests, and ``PULLS`` of its reference (logits, embedding)."""
    pulled: set[str] = set()
    for part in method.methods if isinstance(method, Composed) else [method]:
        sheet = REFERENCES[part.name]
        pulled |= part.needs.student
        pulled |= sheet.pulls(part.options.model_dump()) if hasattr(sheet, "pulls") else getattr(sheet, "PULLS", set())
    return pulled
