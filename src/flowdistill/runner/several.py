"""The teacher of a run: one network, or several that teach together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checks import UserError
from ..config import RunConfig, validate
from ..data.dataset import ImageData
from ..data.normalisation import Normalisation
from ..ledger import Ledger, Run
from ..models import Network
from ..models.joined import Joined, joined_spec
from ..training.weights import hash_weights
from ..types import DataSpec, NetSpec, of_number
from .references import NetworkRef, TeacherQuery, as_configured, by_name, choose_teacher, recorded_teacher

MEAN = "mean"  # all count alike
SHARE = "share"  # key of a network's record: its share in the mean of the logits


@dataclass(frozen=True)
class Several(NetworkRef):
    """Networks that were named together, as one teacher.

    Attributes:
        each: the networks, in the order in which they were named.
        shares: each one's share in the mean of their logits; None until the held-out images tell.
    """

    each: tuple[NetworkRef, ...] = ()
    shares: tuple[float, ...] | None = None

    @property
    def described(self) -> str:
        """Where they come from, as messages say it."""
        return " + ".join(one.described for one in self.each)

    def seen(self, data: DataSpec) -> DataSpec:
        """The data with as many classes as their mean logits have, 0 if one of them has no classifier; each sees it in its own size."""
        return replace(data, classes=self.spec(data).classes)

    def spec(self, data: DataSpec) -> NetSpec:
        """What they offer for such data together."""
        return joined_spec([one.spec(data) for one in self.each])

    def other_classes(self, data: ImageData) -> str:
        """How the classes of one of them differ from those of the data; empty where they do not."""
        return next((other for one in self.each if (other := one.other_classes(data))), "")

    def build(
        self, data: DataSpec, *, taps: tuple[str, ...] = (), seed: int = 0, spec: NetSpec | None = None, given: Normalisation | None = None
    ) -> Network:
        """The networks with their weights as one, with equal shares where none are known yet.

        Raises:
            UserError: weights do not fit their model on this data.
        """
        numbers = range(1, len(self.each) + 1)
        own_taps = [tuple(of_number(dict.fromkeys(taps), number)) for number in numbers]
        own_specs = spec.parts if spec else [None] * len(self.each)
        nets = [
            one.build(data, taps=own, seed=seed, spec=own_spec, given=given)
            for one, own, own_spec in zip(self.each, own_taps, own_specs, strict=True)
        ]
        return Joined(nets, self.shares or _equal(self.each))


def teacher_of(config: RunConfig, query: TeacherQuery, ledger: Ledger, data: DataSpec, *, stand_in: bool = False) -> NetworkRef:
    """The teacher that a config names, which must name one.

    Raises:
        UserError: as ``choose_teacher``; or of several one is named by model, or they do not go together.
    """
    names = config.teachers
    if len(names) > 1 and (model := next((name for name in names if by_name(name)), None)):
        cure = f"write the run whose network it is, a weights file, or published weights in its place, or --teacher {model} alone"
        raise UserError(f"teacher {config.teacher}: {model} is the name of a model, and does not say which of its runs; {cure}")
    found = [as_configured(choose_teacher(name, query, ledger, stand_in=stand_in), config, "teacher", data) for name in names]
    return _together(found, config, data)


def teacher_of_run(run: Run, ledger: Ledger, data: DataSpec) -> NetworkRef | None:
    """The teacher that a run began with, and of several the shares that they had; None without one."""
    config = validate(run.config)
    found = [as_configured(recorded_teacher(name, run, ledger), config, "teacher", data) for name in config.teachers]
    if not found:
        return None
    records = [(run.networks or {}).get(role, {}) for role in roles(len(found))]
    return _together(found, config, data, tuple(record[SHARE] for record in records if SHARE in record))


def unasked(teacher: NetworkRef) -> NetworkRef:
    """The teacher without probes and chosen shares, which change nothing for a method that asks for no logits."""
    if isinstance(teacher, Several):
        each = tuple(replace(one, probed=False) for one in teacher.each)
        return replace(teacher, each=each, shares=_equal(each), fingerprint=_fingerprint(each, MEAN))
    return replace(teacher, probed=False)


def roles(count: int) -> list[str]:
    """The roles of so many teachers in a run's record: ``teacher``, ``teacher 2``, ..."""
    return ["teacher", *(f"teacher {number}" for number in range(2, count + 1))]


def _together(found: Sequence[NetworkRef], config: RunConfig, data: DataSpec, shares: tuple[float, ...] = ()) -> NetworkRef:
    """One network as it is; several as one teacher.

    Raises:
        UserError: two are the same network, or have other classes.
    """
    if len(found) == 1:
        return found[0]
    known: dict[tuple[str, str], NetworkRef] = {}
    for one in found:
        if (same := known.setdefault((one.model, hash_weights(one.weights or {})), one)) is not one:
            raise UserError(f"teacher {config.teacher}: {same.origin} and {one.origin} are the same network; name each once")
    _refuse_other_classes(found, config, data)
    equal = _equal(found) if config.teacher_shares == MEAN else None
    return Several(
        model="+".join(one.model for one in found),
        weights={},
        fingerprint=_fingerprint(found, config.teacher_shares),
        origin=" + ".join(one.origin for one in found),
        each=tuple(found),
        shares=shares or equal,
    )


def _equal(each: Sequence[NetworkRef]) -> tuple[float, ...]:
    return (1 / len(each),) * len(each)


def _fingerprint(each: Sequence[NetworkRef], shares: str) -> str:
    return "+".join([*(one.fingerprint for one in each), shares])


def _refuse_other_classes(found: Sequence[NetworkRef], config: RunConfig, data: DataSpec) -> None:
    """Refuse teachers whose logits can't be averaged, since they stand for different classes."""
    known = [(one, one.spec(data).classes, () if one.probed else one.labels) for one in found]
    known = [(one, classes, labels) for one, classes, labels in known if classes]
    for (one, classes, labels), (other, other_classes, other_labels) in itertools.pairwise(known):
        apart = f"{classes} classes and {other_classes}" if classes != other_classes else ""
        if not apart:
            apart = next((f"{a!r} and {b!r} as one class" for a, b in zip(labels, other_labels, strict=False) if a != b), "")
        if apart:
            cure = "join teachers of the same classes, or give each a classifier for the data's by --probe"
            raise UserError(f"teacher {config.teacher}: {one.origin} and {other.origin} have {apart}; {cure}")
