"""ls: the logits of student and teacher are standardised, row by row, before another method sees them; ``ls:kd`` is kd on those.

In the authors' code of mlkd only the kd part sees standardised logits; here ``ls:mlkd`` does as a whole. The standard deviation is the one
divided by K - 1, as in their code. A row where it is not above 1e-7 counts as constant and gets zeros without a gradient: the formula's
gradient grows to 1e7 there. A logit of -inf, a class that the network never says, is no part of it and stays -inf.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from pydantic import Field, create_model
from torch import Tensor

from ..checks import UserError
from ..types import Batch, NetSpec, Outputs
from .base import Method, Paper, at_least_float32, get

PREFIX = "ls:"
EPS = 1e-7  # the authors' code
VERSION = 1  # raised when the numbers of ``standardise`` change
BY_AUTHORS = ("kd", "dkd", "mlkd", "ctkd")
"""What the authors wrapped, with weight 9 and base temperature 2 (that of ctkd is learned)."""


def standardise(logits: Tensor) -> Tensor:
    """(z - mean(z)) / (std(z) + 1e-7) of every row, with the unbiased standard deviation; zeros for a constant row.

    Sun et al. 2024, with the standard deviation of the authors' code, which divides by K - 1. A logit of -inf, a class that the network
    never says, stays -inf; mean and standard deviation are those of the other classes. Computed in at least float32.

    Args:
        logits: [N, K], K above 1.

    Returns:
        [N, K].

    Raises:
        ValueError: there is one class.
    """
    if logits.shape[1] < 2:
        raise ValueError(f"the logits {tuple(logits.shape)} are of one class; a standard deviation needs two or more")
    values = at_least_float32(logits)
    never = values == -torch.inf
    counts = (~never).sum(1, keepdim=True)
    values = values.masked_fill(never, 0)
    centred = (values - values.sum(1, keepdim=True) / counts).masked_fill(never, 0)
    variance = centred.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)
    constant = variance <= EPS**2
    deviation = torch.where(constant, 1.0, variance).sqrt()
    return torch.where(constant, 0.0, centred / (deviation + EPS)).masked_fill(never, -torch.inf)


class Standardised(Method):
    """What every ``ls:NAME`` puts before the class of NAME.

    Attributes:
        inside: that class.
    """

    inside: ClassVar[type[Method]]

    def __init__(self, options: Any = None, *, student: NetSpec, **networks: Any) -> None:
        super().__init__(options, student=student, **networks)
        if student.classes < 2:
            raise ValueError(f"{self.name}: {student.name} has one class, but a standard deviation needs two; choose other data")
        if not self.needs.logits:
            raise ValueError(
                f"{self.name} compares no logits by these options, and has nothing to standardise; leave {self.options.variant()} out"
            )

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """9 where the authors wrapped the method (for dkd they multiply its alpha and beta by 9), else the method's own.

        Beside a task weight of 0.1 for kd and mlkd, of 1 for dkd; it is 1 here.
        """
        weights = super().default_weights(options)
        return {PREFIX + term: 9.0 if cls.inside.name in BY_AUTHORS else weight for term, weight in weights.items()}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """The method's terms, under names with ``ls:`` before them."""
        ours, theirs = (outputs._replace(logits=standardise(outputs.logits)) for outputs in (student, teacher))
        return {PREFIX + term: value for term, value in super().forward(ours, theirs, batch).items()}


@functools.cache
def standardised(wrapped: str) -> type[Method]:
    """The method ``ls:NAME``: options, phases and promises of NAME, and terms of its own.

    Raises:
        UserError: there is no NAME, or it does not compare the logits of two networks.
    """
    name = PREFIX + wrapped
    if wrapped.startswith(PREFIX):
        raise UserError(f"method {name!r} standardises what is standardised already; write ls: once")
    inside = get(wrapped)
    if inside.kind != "logits" or not inside.uses_teacher:
        why = f"compares {inside.kind}" if inside.uses_teacher else "looks at no teacher"
        raise UserError(f"method {name!r}: {wrapped} {why}, but ls: standardises the logits of both; put it before kd")
    options = inside.Options
    if inside.name in BY_AUTHORS and "T" in options.model_fields:
        options = create_model(f"Standardised{options.__name__}", __base__=options, T=(float, Field(2.0, gt=0, strict=True)))
    context = {
        "__doc__": f"{wrapped} on standardised logits. {inside.__doc__}",
        "__module__": __name__,
        "inside": inside,
        "name": name,
        "paper": Paper(
            "S. Sun, W. Ren, J. Li, R. Wang, X. Cao",
            "Logit Standardization in Knowledge Distillation",
            "CVPR",
            2024,
            "https://arxiv.org/abs/2403.01427",
        ),
        "version": inside.version + VERSION - 1,
        "terms": tuple(PREFIX + term for term in inside.terms),
        "Options": options,
    }
    return type(f"Standardised{inside.__name__}", (Standardised, inside), context)
