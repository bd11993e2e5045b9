"""Several frozen networks as one teacher: the weighted mean of their logits, and the features of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..types import NetSpec, Outputs, TapSpec, numbered
from .base import Network


class Joined(Network):
    """Networks that see the same images and answer together.

    Its logits [N, K] are the mean of theirs, weighted by ``shares``. Its embedding [N, D1 + D2 + ...] is theirs, one after the other. Its
    maps have their networks' numbers in their names: ``stage1@2`` is ``stage1`` of the second.

    Args:
        nets: at least two, which have the same classes, or no classifier.
        shares: each network's share in the mean, which add up to 1.
    """

    def __init__(self, nets: Sequence[Network], shares: Sequence[float]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.shares: Tensor
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float32))
        self.spec = joined_spec([net.spec for net in nets])
        self.taps = tuple(numbered(tap, number) for number, net in enumerate(nets, 1) for tap in net.taps)
        self.draws_always, self.unsettled = any(net.draws_always for net in nets), any(net.unsettled for net in nets)
        self.grown = frozenset(f"nets.{place}.{name}" for place, net in enumerate(nets) for name in net.grown)
        formats = {net.memory_format for net in nets}
        self.memory_format = formats.pop() if len(formats) == 1 else torch.contiguous_format

    @property
    def parts(self) -> list[Any]:
        """Its networks, in order."""
        return list(self.nets)

    def on(self, device: torch.device) -> Network:
        """On a device, the weights of each network in its own memory format."""
        for net in self.parts:
            net.on(device)
        return self.to(device=device)

    def answer(self, images: Tensor) -> Outputs:
        """Images [N, C, H, W] as the data give them -> Outputs."""
        outputs = [net(images) for net in self.nets]
        shares, logits = self.shares[:, None, None], torch.stack([each.logits.float() for each in outputs])
        mean = torch.where(shares > 0, shares * logits, 0.0).sum(0)  # a logit of -inf that has no share counts for nothing
        maps = {numbered(name, number): value for number, each in enumerate(outputs, 1) for name, value in each.maps.items()}
        return Outputs(mean, torch.cat([each.embedding for each in outputs], 1), maps)


def joined_spec(specs: Sequence[NetSpec]) -> NetSpec:
    """What several networks offer together. If one has no classifier, they have none together."""
    classes = min(spec.classes for spec in specs)
    return NetSpec(
        name="+".join(spec.name for spec in specs),
        taps=tuple(_numbered(specs)),
        embedding=sum(spec.embedding for spec in specs),
        classes=classes,
        labels=next((spec.labels for spec in specs if spec.labels), ()),
        version=max(spec.version for spec in specs),
        parts=tuple(specs),
    )


def student_of(specs: Sequence[NetSpec]) -> NetSpec:
    """The student of several teachers. Each spec is the student's own, with the stages named as those of one of the teachers."""
    return replace(specs[0], taps=tuple(_numbered(specs)), parts=tuple(specs))


def _numbered(specs: Sequence[NetSpec]) -> Iterable[TapSpec]:
    for number, spec in enumerate(specs, 1):
        yield from (replace(tap, name=numbered(tap.name, number), source=tap.own) for tap in spec.taps)
