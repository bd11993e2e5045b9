"""A method's name in full: ``at+kd`` is the terms of both, ``ls:kd`` is kd on standardised logits.

Every option, weight and phase is resolved before training.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..checks import UserError, did_you_mean, joined
from ..config import parse_as
from ..types import Batch, DataSpec, MethodContext, NetSpec, Outputs
from . import base
from .base import Method, MethodOptions, Needs, Phase
from .per_teacher import OfOne, terms_of
from .standardise import PREFIX, standardised

WITHOUT_LABELS = "kd"  # a method that looks at no labels, as messages name one
OF_FEATURES = "radio or seed_kd"  # methods that look at neither labels nor logits, likewise


def get(name: str) -> type[Method]:
    """A method's class; that of ``ls:kd`` is made from kd's.

    Raises:
        UserError: no such method, or one whose logits can't be standardised.
    """
    if not name.startswith(PREFIX):
        return base.get(name)
    return standardised(name.removeprefix(PREFIX))


def parts(name: str) -> list[type[Method]]:
    """``'kd+at'`` -> the classes of its parts, by name: the order does not matter.

    Raises:
        UserError: a part is unknown or named twice, or has no terms of its own and is composed with another.
    """
    names = sorted(part.strip() for part in name.split("+"))
    classes = [get(part) for part in names]
    if len(set(names)) < len(names):
        raise UserError(f"method {name!r} names a part twice; give each once")
    bare = [cls.name for cls in classes if not cls.terms]
    if len(classes) > 1 and bare:
        raise UserError(f"method {name!r}: {bare[0]!r} is training on labels alone, which every method includes; leave it out")
    return classes


def mutual_names() -> list[str]:
    """The methods whose students teach each other."""
    return [name for name in base.METHODS if base.METHODS[name].mutual]


@dataclass(frozen=True)
class ResolvedMethod:
    """A method with every option and weight filled in: what a run records, and what its fingerprint covers beside the versions."""

    name: str
    options: dict[str, MethodOptions]
    weights: dict[str, float]
    phases: tuple[Phase, ...]
    uses_teacher: bool
    mutual: bool
    variant: str

    def counted(self, phase: Phase) -> dict[str, float]:
        """The weights of the terms that count in a phase."""
        return {term: weight for term, weight in self.weights.items() if weight > 0 and phase.counts(term)}

    def shipped_model(self, student: str, teacher: str) -> str:
        """The name of the model that is trained and ships: the student, unless a part builds another. Takes names of models."""
        models = (get(name).shipped_model(options, student, teacher) for name, options in self.options.items())
        return next((model for model in models if model != student), student)


def resolve(name: str, options: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float], teachers: int = 1) -> ResolvedMethod:
    """Fill in the defaults of a method or composition.

    With several teachers a term on features stands once for each: ``weights.at=1000`` gives ``at@1`` and ``at@2`` 500 each, and
    ``weights.at@2=700`` sets one of them.

    Raises:
        UserError: options for a method that is not part of it, an unknown option, or a weight for a term it has not.
    """
    classes = parts(name)
    name = "+".join(cls.name for cls in classes)
    for part in options:
        if part not in [cls.name for cls in classes]:
            raise UserError(f"options.{part}: method {name!r} has no such part; {did_you_mean(part, [cls.name for cls in classes])}")
    filled = {cls.name: parse_as(cls.Options, options.get(cls.name, {}), f"options.{cls.name}.") for cls in classes}
    defaults = {"task": 1.0}  # cross-entropy, in every source named in the methods' own files
    chosen: dict[str, float] = {}
    known = ["task"]
    for cls in classes:
        own_defaults = cls.default_weights(filled[cls.name])
        defaults |= terms_of(cls, own_defaults, teachers)
        chosen |= terms_of(cls, {term: weights[term] for term in own_defaults if term in weights}, teachers)
        known += own_defaults
    chosen |= {term: value for term, value in weights.items() if term in defaults}
    for term, value in weights.items():
        if term not in defaults and term not in known:
            raise UserError(f"weights.{term}: method {name!r} has no such term; {did_you_mean(term, dict.fromkeys([*defaults, *known]))}")
        if not value >= 0:
            raise UserError(f"weights.{term}={value}: a weight is 0 or more")
    staged = [cls for cls in classes if len(cls.phases(filled[cls.name])) > 1]
    if len(staged) > 1:
        raise UserError(f"method {name!r}: {' and '.join(cls.name for cls in staged)} both train in stages; only one part may")
    leading = staged[0] if staged else classes[0]
    all_weights = {term: float(chosen.get(term, default)) for term, default in defaults.items()}
    phases = leading.phases(filled[leading.name])
    for phase in phases:
        if not any(weight for term, weight in all_weights.items() if phase.counts(term)):
            raise UserError(f"method {name!r}: every weight of its phase {phase.name!r} is 0, so nothing would be trained; raise one")
    notes = [filled[cls.name].variant() for cls in classes]
    notes += [f"weights.{term}={value:g}" for term, value in all_weights.items() if value != defaults[term]]
    return ResolvedMethod(
        name=name,
        options=filled,
        weights=all_weights,
        phases=phases,
        uses_teacher=any(cls.uses_teacher for cls in classes),
        mutual=any(cls.mutual for cls in classes),
        variant=", ".join(note for note in notes if note),
    )


def build(resolved: ResolvedMethod, *, student: NetSpec, teacher: NetSpec | None, data: DataSpec) -> Method:
    """The module that training calls: the method, or the composition of its parts.

    Raises:
        ValueError: this student and this teacher can't be paired, or one gives something else than logits.
    """
    # A network without a classifier is paired as if it had one for the other's classes; then methods that use it are refused, all alike.
    backbone, alone = teacher is not None and not teacher.classes, not student.classes
    classes = student.classes or (teacher.classes if teacher is not None else 0) or 2
    paired = replace(teacher, classes=classes) if teacher is not None and (backbone or alone) else teacher
    networks = {"student": replace(student, classes=classes), "teacher": paired, "data": data}
    methods = [method for name, options in resolved.options.items() for method in _made(get(name), options, networks)]
    if student.altered:
        raise ValueError(f"student {student.name}: {student.altered}")
    if teacher is not None:
        for method in methods:
            if (backbone or alone) and not _of_features(method.needs):
                whose = f"teacher {teacher.name}" if backbone else f"student {student.name}"
                raise ValueError(_without_classifier(method.name, whose, networks))
            for one in teacher.parts or (teacher,):
                _refuse_other_logits(method, one)
    return methods[0] if len(methods) == 1 else Composed(methods)


def _made(cls: type[Method], options: MethodOptions, networks: Mapping[str, Any]) -> list[Method]:
    """A part of a method for its networks. If it learns from the features of several teachers, there is one for each.

    Raises:
        ValueError: the networks can't be paired, or the method compares a teacher's features with its logits.
    """
    student, teacher = networks["student"], networks["teacher"]
    if teacher is None or not teacher.parts or cls.kind == "logits" or not cls.uses_teacher:
        return [cls(options, **networks)]
    of_each = []
    for number, (own_student, one) in enumerate(zip(student.parts, teacher.parts, strict=True), 1):
        pair = {
            "student": replace(own_student, classes=student.classes, labels=student.labels),
            "teacher": replace(one, classes=one.classes or student.classes),
        }
        of_each.append(OfOne(cls(options, **{**networks, **pair}), number, teacher.parts))
    if of_each[0].needs.logits:
        why = f"it uses the logits of each teacher beside its features, and {teacher.name} gives the mean of its logits alone"
        raise ValueError(f"{cls.name}: {why}; name one teacher, or use another method, such as at or kd")
    return list(of_each)


def _of_features(needs: Needs) -> bool:
    """Whether a method can do without logits: it asks for no classifier of the teacher, and compares none of the student's."""
    return not needs.logits and "head" not in needs.context


def lacking_labels(resolved: ResolvedMethod) -> str:
    """Why a method can't be used where no image has a label, as messages say it; empty if nothing but a need of logits can hinder it."""
    for name, options in resolved.options.items():
        cls = get(name)
        if not cls.uses_teacher or cls.mutual or cls.uses_labels:
            return f"method {name!r} learns from labels or from a student's own logits"
        if cls.shipped_model(options, "student", "teacher") != "student":
            return f"method {name!r} ships its teacher's classifier"
    phase = next((phase.name for phase in resolved.phases if not {*resolved.counted(phase)} - {"task"}), "")
    return f"method {resolved.name!r} has the phase {phase!r} for the task alone" if phase else ""


def _without_classifier(method: str, whose: str, networks: Mapping[str, Any]) -> str:
    """Why a method can't be used where a network has no classifier, and which methods can, with this pair."""

    def works(name: str) -> bool:
        try:
            needs = _made(get(name), get(name).Options(), networks)[0].needs
        except ValueError:
            return False
        if unlabelled and lacking_labels(resolve(name, {}, {})):
            return False
        return get(name).uses_teacher and not get(name).mutual and _of_features(needs)

    unlabelled = not networks["data"].classes
    others = [name for name in base.METHODS if works(name)]
    return f"{method}: {whose} gives features and has no classifier, and {method} uses its logits; use {joined(others, 'or')}"


def _refuse_other_logits(method: Method, teacher: NetSpec) -> None:
    """Refuse a teacher whose answer is not the logits of its classifier, if the method uses these.

    Raises:
        ValueError: the teacher answers with something else.
    """
    if method.needs.logits and teacher.altered:
        raise ValueError(f"{method.name}: teacher {teacher.name}: {teacher.altered}, or choose a method on feature maps, such as at")
    if "head" in method.needs.context and teacher.apart:
        raise ValueError(f"{method.name}: teacher {teacher.name}: {teacher.apart}, and {method.name} teaches by these; choose kd")


class Composed(Method):
    """Several methods at once: the terms of all of them."""

    name = "composed"

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__()
        self.methods = nn.ModuleList(methods)
        self.terms = tuple(term for method in methods for term in method.terms)
        self.vanishes_at_match = all(method.vanishes_at_match for method in methods)
        self.per_sample = all(method.per_sample for method in methods)
        self.uses_labels = any(method.uses_labels for method in methods)
        self.uses_teacher = any(method.uses_teacher for method in methods)
        self.mutual = any(method.mutual for method in methods)
        self.needs = functools.reduce(operator.or_, (method.needs for method in methods))

    @property
    def versions(self) -> dict[str, int]:
        """The versions of every part."""
        versions: dict[str, int] = {}
        for method in self.methods:
            assert isinstance(method, Method)
            versions |= method.versions
        return versions

    @property
    def whole_batch(self) -> bool:
        """Whether a part looks at the whole batch."""
        return any(method.whole_batch for method in self.methods.children() if isinstance(method, Method))

    def setup(self, context: MethodContext) -> None:
        """Set up every part."""
        for method in self.methods.children():
            assert isinstance(method, Method)
            method.setup(context)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """The terms of every part."""
        losses: dict[str, Tensor] = {}
        for method in self.methods:
            losses |= method(student, teacher, batch)
        return losses
