"""One run to do: everything that it is made of, resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from .. import advice, methods, models
from ..checks import UserError, as_user_error
from ..config import RunConfig
from ..data.dataset import ImageData
from ..data.splits import trained_positions
from ..device import Precision
from ..methods import Method, Needs, ResolvedMethod
from ..models.foreign import is_foreign
from ..randomness import derive, seeded
from ..training.freeze import freeze
from ..training.synchronised import normalises_apart
from ..types import NetSpec
from .fingerprint import fingerprint
from .identity import Identities, Identity
from .pairing import Pairing, pair, with_several
from .references import NetworkRef
from .several import roles


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        config: with every default filled in.
        init_hash: of the student's initial weights.
        identities: says what its networks are.
        former_fingerprint: what an earlier version called the same run; a run that is resumed keeps it.
        ranks: how many processes share its batches out, if its numbers depend on that; else 1. A run that is resumed keeps the number
            with which it began.
    """

    config: RunConfig
    data: ImageData
    resolved: ResolvedMethod
    student: NetworkRef
    teacher: NetworkRef | None
    init_hash: str
    identities: Identities
    former_fingerprint: str = ""
    ranks: int = 1

    @property
    def data_hash(self) -> str:
        """Of the labelled images."""
        return self.data.hash

    @property
    def precision(self) -> Precision:
        """Arithmetic of its networks."""
        precision = self.config.train.precision
        assert precision != "auto", "the config has every default filled in"
        return precision

    def in_precision(self, precision: Precision) -> Job:
        """The same run in another arithmetic, as estimates compare it."""
        train = self.config.train.model_copy(update={"precision": precision})
        return replace(self, config=self.config.model_copy(update={"train": train}))

    @cached_property
    def fingerprint(self) -> str:
        """What the run's numbers depend on, without the seed."""
        if self.former_fingerprint:
            return self.former_fingerprint
        made_of = {role: network.covered for role, network in self.networks.items()}
        if self.config.peer is not None:
            peer = models.made_of(self.config.peer, self.student.seen(self.data.spec))
            made_of["peer"] = [peer] if peer else []
        return fingerprint(self, made_of)

    @cached_property
    def networks(self) -> Mapping[str, Identity]:
        """Student and teacher, by role, as they are now."""
        networks = {"student": self.identities(self.student, self.data.spec, trains=True)}
        if self.teacher is not None:
            for role, one in zip(roles(len(self.teacher.each)), self.teacher.each, strict=True):
                networks[role] = self.identities(one, self.data.spec, trains=False)
        return networks

    @cached_property
    def needs_and_versions(self) -> tuple[Needs, Mapping[str, int]]:
        """What its method needs of the networks, and the version of each of its parts, for this pair.

        Raises:
            UserError: student and teacher can't be paired.
        """
        method = self.method()
        return method.needs, method.versions

    @cached_property
    def normalises_apart(self) -> bool:
        """Whether its numbers depend on how many processes share its batches out, for each would normalise its own images alone."""
        spec, train, method = self.data.spec, self.config.train, self.method()
        ours = self.shipped_model == self.student.model
        net = (self.student.build(spec) if ours else models.build(self.shipped_model, spec)).train()
        for module in freeze(net, train.freeze):
            module.eval()
        peer = [models.build(self.config.peer, self.student.seen(spec)).train()] if self.config.peer is not None else []
        teacher = [self.teacher.build(spec).eval()] if self.teacher is not None else []
        own_parts = [] if method.whole_batch else [method]  # else they are given the whole batch
        return any(normalises_apart(module, train) for module in (net, *peer, *teacher, *own_parts))

    @property
    def phase_epochs(self) -> tuple[int, ...]:
        """Epochs of each phase."""
        return tuple(phase.epochs or self.config.train.epochs for phase in self.resolved.phases)

    @property
    def key(self) -> tuple[str, int]:
        """Two jobs with one key would give one and the same student."""
        return self.fingerprint, self.config.seed

    @property
    def model_names(self) -> list[str]:
        """The models of all networks that take part."""
        teachers = [one.model for one in self.teacher.each] if self.teacher else []
        return [self.student.model, *teachers, *([self.config.peer] if self.config.peer else [])]

    @property
    def shipped_model(self) -> str:
        """The model that is trained and ships: the student, unless its method builds another on it."""
        return self.resolved.shipped_model(self.student.model, self.teacher.model if self.teacher else "")

    @property
    def variant(self) -> str:
        """What differs from the method's defaults, as tables print it; of two that teach each other which one this is, and what ships
        where that is not the student; what it begins from, what of it is frozen, which images and taps were given to whom, whether it
        may stop early, and how many processes normalised parts of a batch, each by itself.
        """
        notes = (
            [self.resolved.variant] + ["probe"] * self.config.probe + ["teacher_shares=holdout"] * (self.config.teacher_shares == "holdout")
        )
        if self.data.unlabelled is not None:
            notes = [*notes, f"unlabelled={self.data.unlabelled.name}"]
        if self.config.peer is not None:
            notes = ["second"] * (self.config.side == 2) + [f"peer={self.config.peer}", *notes]
        if self.shipped_model != self.student.model:
            notes = [f"ships {self.shipped_model}", *notes]
        if self.student.init:
            notes.append(f"init={self.student.origin}")
        if self.config.train.freeze:
            notes.append(f"freeze={','.join(self.config.train.freeze)}")
        tables = {
            "inputs": {role: input_config.model_dump(mode="json", exclude_none=True) for role, input_config in self.config.inputs.items()},
            "taps": self.config.taps,
        }
        for name, table in tables.items():
            notes += [f"{name}.{role}.{key}={value}" for role, values in table.items() for key, value in values.items()]
        notes += [f"patience={self.config.train.patience}"] * (self.config.train.patience is not None)
        notes += [f"ranks={self.ranks}"] * (self.ranks > 1)
        return ", ".join(note for note in notes if note)

    @property
    def label(self) -> str:
        """As messages name it."""
        pair = f"{self.student.model} <- {self.teacher.model}" if self.teacher else self.student.model
        return f"{self.resolved.name} {pair} seed {self.config.seed}"

    @cached_property
    def pairing(self) -> Pairing | None:
        """What is trained and its teacher, with stages of the same names; None without a teacher.

        Raises:
            UserError: the taps that were named do not go together, or what is trained can't be made of these two.
        """
        if self.shipped_model != self.student.model:
            self._refuse_parts()
        if self.teacher is None:
            return None
        data = self.data.spec
        ours, named = self.student.seen(data), bool(self.student.taps or self.teacher.taps)
        pairs = [pair(self.student_spec, one.spec(data), ours, one.seen(data), named=named) for one in self.teacher.each]
        return pairs[0] if len(pairs) == 1 else with_several(pairs)

    def _refuse_parts(self) -> None:
        """A network that is built of student and teacher is built of registered ones as they are."""
        parts = [part.model for part in (self.student, *(self.teacher.each if self.teacher else ()))]
        if len(parts) > 2:
            raise UserError(f"{self.resolved.name} builds its network of one teacher, and {' and '.join(parts[1:])} are several; name one")
        if foreign := next(filter(is_foreign, parts), ""):
            raise UserError(
                f"{self.resolved.name} needs registered models as student and teacher, {foreign} is none; name two that "
                f"{advice.command('models')} lists, or choose another method"
            )
        if self.teacher and self.teacher.probed:
            raise UserError(f"{self.resolved.name} ships its teacher's own classifier, not that of a probe; leave --probe out")
        if self.student.taps or self.config.inputs.get("student"):
            raise UserError(
                f"{self.resolved.name} trains another network than {self.student.model}; leave taps and inputs of the student out"
            )

    @property
    def student_spec(self) -> NetSpec:
        """What is trained, under its own names."""
        if self.shipped_model == self.student.model:
            return self.student.spec(self.data.spec)
        return models.spec(self.shipped_model, self.data.spec)

    @property
    def student_taps(self) -> NetSpec:
        """What is trained, its stages named as those of the teacher that they learn from."""
        return self.pairing.student if self.pairing else self.student_spec

    def _labelled(self, spec: NetSpec, teacher: NetworkRef) -> NetSpec:
        """What a teacher offers, with the names of its classes; the data's own where it, or its probe, learnt from these very images and
        labels, whatever their names were then.
        """
        own = teacher.probed or (teacher.trained_on is not None and teacher.trained_on.data_hash == self.data_hash)
        return replace(spec, labels=self.data.class_names if own else teacher.labels)

    @property
    def _teacher_spec(self) -> NetSpec | None:
        """What its teacher offers the method; of several the names of their classes are those of the first that knows them."""
        if self.teacher is None or self.pairing is None:
            return None
        spec = self.pairing.teacher
        if not spec.parts:
            return self._labelled(spec, self.teacher)
        parts = tuple(self._labelled(part, one) for part, one in zip(spec.parts, self.teacher.each, strict=True))
        return replace(spec, parts=parts, labels=next((part.labels for part in parts if part.labels), ()))

    def method(self) -> Method:
        """The method's module, its adapters drawn from the seed.

        Raises:
            UserError: student and teacher can't be paired.
        """
        unlabelled = self.data.unlabelled.images if self.data.unlabelled is not None else ()
        n_train = len(trained_positions(self.data.y_train, self.config.split)) + len(unlabelled)
        spec = replace(self.data.spec, n_train=n_train)
        with as_user_error(), seeded(self.config.seed, "adapters"):
            return methods.build(
                self.resolved,
                student=replace(self.student_taps, labels=self.data.class_names),
                teacher=self._teacher_spec,
                data=spec,
            )


def other_side(config: RunConfig) -> RunConfig:
    """The config of the student that this one teaches and is taught by."""
    return config.model_copy(update={"student": config.peer, "peer": config.student, "side": 3 - config.side})


def weights_seed(config: RunConfig) -> int:
    """What fresh weights are drawn from: the run's seed, and for the second of two students one that follows from it."""
    return config.seed if config.side == 1 else derive(config.seed, "second side")
