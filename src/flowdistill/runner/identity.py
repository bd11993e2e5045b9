"""Which network it is: its name, weights, code, and what it answers to a fixed batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import models
from ..ledger import Ledger, Run
from ..models.code import digest
from ..models.probe import Answers, difference, probe
from ..training.weights import hash_weights
from ..types import DataSpec
from .integrity import newer
from .references import NetworkRef


@dataclass(frozen=True)
class Identity:
    """A network as a run begins with it.

    Attributes:
        key: the hash of its name, weights, code and sizes.
        made_of: of own code the hash of that and of what it makes; else empty.
        number: 0, or where networks of this key answered otherwise in earlier runs, which of the different ones it is.
        code: SHA-256 of each file of own code.
        answers: its probe.
        remark: why it is another one than that of an earlier run; else empty.
    """

    key: str
    made_of: str
    number: int
    code: Mapping[str, str]
    answers: Answers
    remark: str = ""

    @property
    def covered(self) -> list[Any]:
        """What a fingerprint has of it beside the name and the weights."""
        return [part for part in (self.made_of, self.number) if part]

    @property
    def record(self) -> dict[str, Any]:
        """What the ledger keeps."""
        return {name: getattr(self, name) for name in ("key", "made_of", "number", "code", "answers")}


class Identities:
    """The networks of one plan, each looked at once and held against those that the ledger knows."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._found: dict[object, Identity] = {}
        self._known: dict[str, dict[int, tuple[Answers, Run]]] | None = None

    def __call__(self, network: NetworkRef, data: DataSpec, *, trains: bool) -> Identity:
        """The identity of a network for images of such sizes. First weights that others trained are known by their own fingerprint: the
        network is looked at with fresh ones.
        """
        bare = replace(network, weights=None, head=True) if network.init else replace(network, probed=False)
        sizes = bare.seen(data)
        key = (
            bare.model,
            bare.fingerprint,
            bare.origin,
            bare.run,
            bare.input_spec,
            tuple(bare.taps.items()),
            replace(sizes, name="", n_train=0),
        )
        if key not in self._found:
            self._found[key] = self._look(bare, data, sizes, trains)
        return self._found[key]

    def _look(self, network: NetworkRef, data: DataSpec, sizes: DataSpec, trains: bool) -> Identity:
        made_of = models.made_of(network.model, sizes)
        weights = hash_weights(network.weights) if network.weights is not None else ""
        shape = (sizes.channels, sizes.height, sizes.width)
        key = digest([network.model, weights, made_of, *shape, sizes.classes])
        spec = network.spec(data)
        net = network.build(data, taps=tuple(tap.name for tap in spec.taps), spec=spec)
        answers = probe(net, *shape, trains=trains)
        remark = ""
        known = self._recorded().get(key, {})
        for number, (then, run) in sorted(known.items()):
            if not (apart := difference(then, answers)):
                return Identity(key, made_of, number, models.own_code(network.model), answers)
            remark = f"{network.model} is not what it was in run {run.no}, which is another run therefore ({apart}{newer(run.versions)})"
        number = max(known) + 1 if known else 0
        return Identity(key, made_of, number, models.own_code(network.model), answers, remark)

    def _recorded(self) -> dict[str, dict[int, tuple[Answers, Run]]]:
        if self._known is None:
            self._known = {}
            for run in self._ledger.runs():
                for network in (run.networks or {}).values():
                    self._known.setdefault(network["key"], {}).setdefault(network["number"], (network["answers"], run))
        return self._known
