"""What a method is: a module that turns the outputs of student and teacher into named, unweighted loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import MAX_EPOCHS, Frozen, parse_as
from ..registry import Registry
from ..types import Batch, MethodContext, NetSpec, Outputs, unnumbered


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
        return ", ".join(
            f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.model_dump().items() if v != fields[k].default
        )


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
        """Whether a term has weight in this phase; of several teachers, each one's."""
        term = unnumbered(term)
        return term not in self.without and (self.only is None or term in self.only)


def then_the_task(first: Phase) -> tuple[Phase, Phase]:
    """A first phase, and the labels alone after it."""
    return (first, Phase("task", without=first.only or frozenset()))


class StagedOptions(MethodOptions):
    """Options of a method that trains jointly or in two stages; ``stage_epochs`` belongs to stage one of ``schedule=two-stage``."""

    schedule: Literal["joint", "two-stage"] = "joint"
    stage_epochs: int = Field(30, ge=1, le=MAX_EPOCHS, strict=True)

    @model_validator(mode="after")
    def _stage_one_exists(self) -> Self:
        if self.schedule == "joint" and self.stage_epochs != type(self).model_fields["stage_epochs"].default:
            raise ValueError("stage_epochs belongs to schedule=two-stage; set that too, or leave it out")
        return self


ContextItem = Literal["head", "norms", "class_means", "labels"]


class Needs(NamedTuple):
    """What a method wants of each network beside the student's logits and embedding, which it always has.

    Attributes:
        student, teacher: taps.
        logits, embedding: the teacher's.
        context: attributes of ``MethodContext`` that it is set up with before training.
    """

    student: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()
    logits: bool = False
    embedding: bool = False
    context: frozenset[ContextItem] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        """What either wants."""
        return Needs(
            self.student | other.student,
            self.teacher | other.teacher,
            self.logits or other.logits,
            self.embedding or other.embedding,
            self.context | other.context,
        )


class Method(nn.Module):
    """One paper, one file, one registered name.

    A method sees only those of the teacher's outputs that its ``needs`` name. It keeps its state in registered buffers and updates them in
    place, so that every engine and a checkpoint see it.

    Class facts:
        paper: where the formula comes from.
        version: raised when the number it computes changes; part of every run's fingerprint. An instance keeps an older version if the
            number is unchanged for its pair.
        kind: what it compares: ``logits``, ``features`` of an image, or ``relations`` between images.
        terms: the keys of what ``forward`` returns.
        vanishes_at_match: every term is 0, with gradient 0, if student equals teacher.
        per_sample: repeating the batch changes nothing.
        mutual: whether the students of two runs teach each other; each finds the other's outputs among ``Batch.peers``.
        uses_labels: whether it reads the batch's labels. If so it can't take mixed images, which have no labels of their own.
        uses_teacher: whether it has a teacher. If not, its ``forward`` may get None for it.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    version: int = 1
    kind: ClassVar[Literal["logits", "features", "relations"]] = "features"
    terms: tuple[str, ...] = ()
    vanishes_at_match: bool = True
    per_sample: bool = True
    mutual: bool = False
    uses_labels: bool = False
    uses_teacher: bool = True
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    needs: Needs = Needs()

    def __init__(self, options: Mapping[str, Any] | MethodOptions | None = None, **networks: Any) -> None:
        """Check the pair and build adapters.

        Args:
            options: values for ``Options``, or an instance of it.
            networks: ``student: NetSpec, teacher: NetSpec`` and, if the method wants it, ``data: DataSpec``.

        Raises:
            UserError: an option is unknown or out of range.
            ValueError: this student and this teacher can't be paired. The message names the tap, both shapes and what to do.
        """
        super().__init__()
        if not isinstance(options, MethodOptions):
            options = parse_as(self.Options, options or {}, f"options.{self.name}.")
        self.options = options

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """The factor of each term, for these options."""
        raise NotImplementedError

    @property
    def versions(self) -> dict[str, int]:
        """The version of each part, for this pair: what a fingerprint holds."""
        return {self.name: self.version}

    @property
    def whole_batch(self) -> bool:
        """Whether its terms are no means over images, each by itself. Then processes that share a batch out must put it together again."""
        return self.kind == "relations" or not self.per_sample

    @classmethod
    def phases(cls, options: Any) -> tuple[Phase, ...]:
        """The phases of training; one, unless the paper trains in stages."""
        return (Phase("joint"),)

    @classmethod
    def shipped_model(cls, options: Any, student: str, teacher: str) -> str:
        """The model that is trained and ships: the student, unless the paper builds another on it."""
        return student

    def setup(self, context: MethodContext) -> None:
        """Copy what the method needs of the context by ``hold``, on the context's device. Called once, before training."""

    def hold(self, **tensors: Tensor) -> None:
        """Hold copies of tensors in buffers of these names."""
        for name, value in tensors.items():
            self.register_buffer(name, value.detach().clone())

    def held(self, name: str) -> Tensor:
        """The buffer of that name.

        Raises:
            RuntimeError: the method was not set up yet.
        """
        if name not in self._buffers:
            raise RuntimeError(
                f"{self.name} was not told of the {', '.join(sorted(self.needs.context))}: call setup(MethodContext(...)) first"
            )
        return self.get_buffer(name)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """Unweighted float32 scalars by term, the cross-entropy not among them."""
        raise NotImplementedError


class LogitMethod(Method):
    """Base of the methods that compare logits, class by class.

    Class facts:
        probabilities: whether it compares probabilities, for which it needs two classes or more.
    """

    kind = "logits"
    probabilities: ClassVar[bool] = True

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        same_classes(student, teacher, self.name)
        if self.probabilities:
            two_classes(student, self.name)
        self.needs = Needs(logits=True)


METHODS: Registry[type[Method]] = Registry("method", "flowdistill.methods")


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: file the method under its name."""
    return METHODS.register(cls.name)(cls)


def get(name: str) -> type[Method]:
    """A method's class.

    Raises:
        UserError: no such method.
    """
    return METHODS[name]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is that: sums, norms, exp and log are never taken in half precision."""
    return x if x.dtype == torch.float64 else x.float()


MIN_NORM = 1e-12  # up to this norm a vector has no direction; F.normalize and every other collection have the same
MIN_PRODUCT_NORM = 1e-18  # the same for products of features, whose scale is that of the features squared


def unit(x: Tensor, dim: int, min_norm: float = MIN_NORM) -> Tensor:
    """x over its L2 norm along a dimension. A vector of norm ``min_norm`` or less has no direction and gives zeros, without a gradient.

    A division by max(norm, min_norm) would give zeros a gradient of 1 / min_norm. A vector whose norm overflows gives NaN, not the zeros
    of a division by infinity.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(norm <= min_norm, torch.inf, torch.where(norm == torch.inf, torch.nan, norm))


def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """sum_k p[k] v[k] along the last dimension: [..., K], [..., K] -> [...]. A class without probability counts for nothing.

    A logit of -inf, a class that a network never says, gives log p = -inf and p = 0. Its term is 0 whatever the value, as 0 log 0 is, and
    neither side gets a gradient from it.

    Args:
        log_p: log-probabilities.
        values: such as log p - log q for the divergence KL(p || q), or log q for a cross-entropy.
    """
    p = log_p.exp()
    return (p * torch.where(p > 0, values, 0.0)).sum(-1)


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) = sum_k p[k] (log p[k] - log q[k]), q the student's and p the teacher's: log-probabilities [..., K] -> [...].

    0 log 0 = 0. The result is infinite if q gives no probability to a class to which p gives some.
    """
    return expectation(log_p, log_p - log_q)


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors that torch would silently broadcast.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student gives {tuple(student.shape)}, teacher {tuple(teacher.shape)}; the shapes must agree")


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1/n sum (s - t)^2 over all n entries, in at least float32.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


def same_classes(student: NetSpec, teacher: NetSpec, method: str) -> None:
    """Refuse a pair whose logits can't be compared.

    Raises:
        ValueError: the numbers of classes differ or, if both are known, the names or their order.
    """
    cure = "logits are compared class by class, so train both on the same classes or use a method on feature maps"
    if student.classes != teacher.classes:
        raise ValueError(f"{method}: {student.name} has {student.classes} classes, {teacher.name} {teacher.classes}; {cure}")
    for number, (ours, theirs) in enumerate(zip(student.labels, teacher.labels, strict=False)):
        if ours != theirs:
            raise ValueError(f"{method}: class {number} of {student.name} is {ours!r}, of {teacher.name} {theirs!r}; {cure}")


def two_classes(student: NetSpec, method: str) -> None:
    """Refuse a student of a single class.

    Raises:
        ValueError: the student has one class.
    """
    if student.classes < 2:
        raise ValueError(
            f"{method}: {student.name} has one class, whose probability is 1 whatever its logit, so nothing would be learned; choose other "
            f"data"
        )


def two_dimensions(spec: NetSpec, method: str, why: str) -> None:
    """Refuse an embedding of a single number, which has no direction.

    Args:
        why: what the method lacks there, and what to do.

    Raises:
        ValueError: the embedding has fewer than 2 dimensions.
    """
    if spec.embedding < 2:
        raise ValueError(f"{method}: the embedding of {spec.name} has width {spec.embedding}, {why}")


def paired_stages(student: NetSpec, teacher: NetSpec, method: str) -> tuple[str, ...]:
    """The stage ends that both networks have.

    Raises:
        ValueError: none, or not the same ones.
    """
    if not student.stages or student.stages != teacher.stages:
        ours, theirs = (", ".join(map(repr, spec.stages)) or _without_stages(spec) for spec in (student, teacher))
        raise ValueError(
            f"{method}: the stages of {student.name} are {ours}, those of {teacher.name} {theirs}; choose networks with the same "
            f"stages, or a method on logits such as kd"
        )
    return student.stages


def _without_stages(spec: NetSpec) -> str:
    return f"none ({spec.unread})" if spec.unread else "none"


def after_relu(spec: NetSpec, stages: tuple[str, ...]) -> tuple[str, ...]:
    """The taps of stage ends after a ReLU: the ends themselves or, if those are plain sums, what the next layer's ReLU makes of them."""
    taps = {tap.name for tap in spec.taps}
    return tuple(f"{stage}.post" if f"{stage}.post" in taps else stage for stage in stages)


def before_relu(spec: NetSpec, stages: tuple[str, ...], method: str) -> tuple[str, ...]:
    """The taps of stage ends before their ReLU.

    Raises:
        ValueError: the network lacks one of them.
    """
    taps = tuple(f"{stage}.pre" for stage in stages)
    missing = [repr(tap) for tap in taps if tap not in {tap.name for tap in spec.taps}]
    if missing:
        raise ValueError(
            f"{method}: {spec.name} has no tap {', '.join(missing)}, and its maps are taken before ReLU; choose a network whose stages end "
            f"in one, or a method on maps after it such as at"
        )
    return taps
