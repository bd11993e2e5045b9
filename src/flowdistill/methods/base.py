"""What a method is: a module that turns the outputs of student and teacher into named, unweighted loss terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import UserError, did_you_mean
from ..config import Frozen, parse_as
from ..registry import Registry
from ..taps import Batch, DataSpec, NetSpec, Outputs


class Paper(NamedTuple):
    """Where a method comes from."""

    authors: str
    title: str
    venue: str
    year: int
    url: str


class MethodOptions(Frozen):
    """Base of every method's options: immutable, validated, unknown keys refused."""

    def variant(self) -> str:
        """What differs from the defaults, as tables print it: ``T=2``; empty when nothing does."""
        fields = type(self).model_fields
        return ", ".join(f"{k}={v}" for k, v in self.model_dump().items() if v != fields[k].default)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimiser of its own.

    Attributes:
        name: as logs print it.
        epochs, lr, milestones: None takes the run's own. Milestones are the shares of the phase at which lr falls tenfold.
        only: the terms that count, None for all.
        without: terms that do not count.
        head: whether the classifier is trained (else it gets no step and no decay).
    """

    name: str
    epochs: int | None = None
    lr: float | None = None
    milestones: tuple[float, ...] | None = None
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    head: bool = True

    def counts(self, term: str) -> bool:
        """Whether a term has weight in this phase."""
        return term not in self.without and (self.only is None or term in self.only)


class Needs(NamedTuple):
    """The taps that a method wants of each network."""

    student: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()


class Method(nn.Module):
    """One paper, one file, one registered name.

    Class facts:
        paper: where the formula comes from.
        version: raised when the number it computes changes; part of every run's fingerprint.
        terms: the keys of what ``forward`` returns.
        vanishes_at_match: every term is 0, with gradient 0, where student equals teacher.
        per_sample: repeating the batch changes nothing.
        uses_teacher: False for training on labels alone.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    version: ClassVar[int] = 1
    terms: tuple[str, ...] = ()
    vanishes_at_match: ClassVar[bool] = True
    per_sample: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = True
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    needs: Needs = Needs()

    def __init__(self, options: Mapping[str, Any] | MethodOptions | None = None, **networks: Any) -> None:
        """Check the pair and build adapters.

        Args:
            options: values for ``Options``, or an instance of it.
            networks: ``student: NetSpec, teacher: NetSpec`` and, where a method wants it, ``data: DataSpec``.

        Raises:
            UserError: an option is unknown or out of range.
            ValueError: this student and this teacher can't be paired; which tap, both shapes, what to do.
        """
        super().__init__()
        given = options if isinstance(options, MethodOptions) else parse_as(self.Options, options or {}, f"options.{self.name}.")
        self.options = given

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """The factor of each term, for these options."""
        raise NotImplementedError

    @classmethod
    def phases(cls, options: Any) -> tuple[Phase, ...]:
        """The phases of training; one, unless the paper trains in stages."""
        return (Phase("joint"),)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """Unweighted float32 scalars by term, the cross-entropy not among them."""
        raise NotImplementedError


METHODS: Registry[type[Method]] = Registry("method")


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: file the method under its name."""
    return METHODS.register(cls.name)(cls)


def get(name: str) -> type[Method]:
    """A method's class.

    Raises:
        UserError: no such method.
    """
    return METHODS[name]


def parts(name: str) -> list[type[Method]]:
    """``'at+kd'`` -> the classes of its parts.

    Raises:
        UserError: a part is unknown or named twice, ``base`` is composed, or two parts train in stages.
    """
    names = [part.strip() for part in name.split("+")]
    classes = [get(part) for part in names]
    if len(set(names)) < len(names):
        raise UserError(f"method {name!r} names a part twice; give each once")
    if len(classes) > 1 and not all(cls.uses_teacher for cls in classes):
        raise UserError(f"method {name!r}: 'base' is training on labels alone, which every method includes; leave it out")
    return classes


@dataclass(frozen=True)
class Settled:
    """A method with every option and weight filled in: what a run records and what its fingerprint covers."""

    name: str
    options: dict[str, MethodOptions]
    weights: dict[str, float]
    phases: tuple[Phase, ...]
    versions: dict[str, int]
    uses_teacher: bool
    variant: str


def settle(name: str, options: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> Settled:
    """Fill in the defaults of a method or composition.

    Raises:
        UserError: options for a method that is not part of it, an unknown option, or a weight for a term it has not.
    """
    classes = parts(name)
    name = "+".join(cls.name for cls in classes)
    for given in options:
        if given not in [cls.name for cls in classes]:
            raise UserError(f"options.{given}: method {name!r} has no such part; {did_you_mean(given, [cls.name for cls in classes])}")
    filled = {cls.name: parse_as(cls.Options, options.get(cls.name, {}), f"options.{cls.name}.") for cls in classes}
    defaults = {"task": 1.0}  # cross-entropy, in every source named in the methods' own files
    for cls in classes:
        defaults |= cls.default_weights(filled[cls.name])
    for term, value in weights.items():
        if term not in defaults:
            raise UserError(f"weights.{term}: method {name!r} has no such term; {did_you_mean(term, defaults)}")
        if value < 0:
            raise UserError(f"weights.{term}={value}: a weight is 0 or more")
    staged = [cls for cls in classes if len(cls.phases(filled[cls.name])) > 1]
    if len(staged) > 1:
        raise UserError(f"method {name!r}: {' and '.join(cls.name for cls in staged)} both train in stages; only one part may")
    leading = staged[0] if staged else classes[0]
    settled = {term: float(weights.get(term, default)) for term, default in defaults.items()}
    phases = leading.phases(filled[leading.name])
    for phase in phases:
        if not any(weight for term, weight in settled.items() if phase.counts(term)):
            raise UserError(f"method {name!r}: every weight of its phase {phase.name!r} is 0, so nothing would be trained; raise one")
    notes = [filled[cls.name].variant() for cls in classes]
    notes += [f"weights.{term}={value:g}" for term, value in settled.items() if value != defaults[term]]
    return Settled(
        name=name,
        options=filled,
        weights=settled,
        phases=phases,
        versions={cls.name: cls.version for cls in classes},
        uses_teacher=any(cls.uses_teacher for cls in classes),
        variant=", ".join(note for note in notes if note),
    )


def build(settled: Settled, *, student: NetSpec, teacher: NetSpec | None, data: DataSpec) -> Method:
    """The module that training calls: the method, or the composition of its parts.

    Raises:
        ValueError: this student and this teacher can't be paired.
    """
    networks = {"student": student, "teacher": teacher, "data": data}
    built = [get(name)(options, **networks) for name, options in settled.options.items()]
    return built[0] if len(built) == 1 else Composed(built)


class Composed(Method):
    """Several methods at once: the terms of all of them."""

    name = "composed"

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__()
        self.methods = nn.ModuleList(methods)
        self.terms = tuple(term for method in methods for term in method.terms)
        self.needs = Needs(
            frozenset().union(*(method.needs.student for method in methods)),
            frozenset().union(*(method.needs.teacher for method in methods)),
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """The terms of every part."""
        found: dict[str, Tensor] = {}
        for method in self.methods:
            found |= method(student, teacher, batch)
        return found


def full(x: Tensor) -> Tensor:
    """At least float32: sums, norms, exp and log are never taken in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def same_classes(student: NetSpec, teacher: NetSpec, method: str) -> None:
    """Refuse a pair whose logits can't be compared.

    Raises:
        ValueError: different numbers of classes.
    """
    if student.classes != teacher.classes:
        raise ValueError(
            f"{method}: {student.name} has {student.classes} classes, {teacher.name} {teacher.classes}; logits are compared class "
            f"by class, so train both on the same classes or use a method on feature maps"
        )


def paired_stages(student: NetSpec, teacher: NetSpec, method: str) -> tuple[str, ...]:
    """The stage ends that both networks have.

    Raises:
        ValueError: none, or not the same number of them.
    """
    if not student.stages or len(student.stages) != len(teacher.stages):
        raise ValueError(
            f"{method}: {student.name} has {len(student.stages)} stages, {teacher.name} {len(teacher.stages)}; choose networks with "
            f"the same number of stages, or a method on logits such as kd"
        )
    return student.stages
