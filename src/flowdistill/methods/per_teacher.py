"""A method that has several teachers: by their mean logits if it compares logits, else with one term for each teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..types import Batch, MethodContext, NetSpec, Outputs, numbered, of_number
from .base import Method


def terms_of(cls: type[Method], defaults: Mapping[str, float], teachers: int) -> dict[str, float]:
    """The weights of a method's terms. Each of several teachers has a term of its own, and an equal share of the weight."""
    if teachers == 1 or cls.kind == "logits" or not cls.uses_teacher:
        return dict(defaults)
    return {numbered(term, number): weight / teachers for term, weight in defaults.items() for number in range(1, teachers + 1)}


class OfOne(Method):
    """A method that learns from one of several teachers.

    Args:
        method: made for the student and this teacher.
        number: the teacher's, from 1.
        teachers: what each of them offers.
    """

    name = "of one teacher"

    def __init__(self, method: Method, number: int, teachers: Sequence[NetSpec]) -> None:
        super().__init__()
        self.method, self.number = method, number
        start = sum(spec.embedding for spec in teachers[: number - 1])
        self.own = slice(start, start + teachers[number - 1].embedding)
        self.terms = tuple(numbered(term, number) for term in method.terms)
        self.vanishes_at_match, self.per_sample, self.uses_labels = method.vanishes_at_match, method.per_sample, method.uses_labels
        student, teacher = (frozenset(numbered(tap, number) for tap in own) for own in (method.needs.student, method.needs.teacher))
        self.needs = method.needs._replace(student=student, teacher=teacher)

    @property
    def versions(self) -> dict[str, int]:
        """The version of the method."""
        return self.method.versions

    @property
    def whole_batch(self) -> bool:
        """Whether the method looks at the whole batch."""
        return self.method.whole_batch

    def setup(self, context: MethodContext) -> None:
        """Set up the method with what belongs to its teacher."""
        means = None if context.class_means is None else context.class_means[:, self.own]
        self.method.setup(replace(context, norms=of_number(context.norms, self.number), class_means=means))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """The method's terms under this teacher's number."""
        embedding = teacher.embedding[:, self.own] if self.needs.embedding else teacher.embedding
        own_teacher = teacher._replace(embedding=embedding, maps=of_number(teacher.maps, self.number))
        terms = self.method(student._replace(maps=of_number(student.maps, self.number)), own_teacher, batch)
        return {numbered(term, self.number): value for term, value in terms.items()}
