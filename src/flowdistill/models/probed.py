"""A network with another classifier: a linear probe of its embedding, which is fitted to the data's classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..types import NetSpec, Outputs
from .base import Network

BACKBONE, PROBE = "backbone", "probe"  # paths of the network, and of its new classifier


def with_probe(spec: NetSpec, classes: int) -> NetSpec:
    """What a network offers whose logits are those of a probe."""
    taps = tuple(replace(tap, norm=f"{BACKBONE}.{tap.norm}" if tap.norm else "") for tap in spec.taps)
    return replace(spec, taps=taps, classes=classes, head=PROBE, altered="", apart="", labels=())


def without_probe(spec: NetSpec, own: NetSpec) -> NetSpec:
    """What the backbone of such a network offers: the taps of ``spec``, and its own classifier, if it has one.

    Args:
        own: what the backbone offers by itself.
    """
    return replace(own, taps=tuple(replace(tap, norm=tap.norm.removeprefix(f"{BACKBONE}.")) for tap in spec.taps))


class Probed(Network):
    """A frozen network whose logits are those of a linear layer on its embedding. Until this is fitted, its weights and its logits are NaN.

    Args:
        backbone: it may have a classifier of its own, which is then not asked.
        classes: the number of the data's classes.
    """

    def __init__(self, backbone: Network, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.probe = nn.Linear(backbone.spec.embedding, classes)
        nn.init.constant_(self.probe.weight, torch.nan)
        nn.init.constant_(self.probe.bias, torch.nan)
        self.spec = with_probe(backbone.spec, classes)
        self.taps, self.memory_format, self.layer_seed = backbone.taps, backbone.memory_format, backbone.layer_seed
        self.draws_always, self.unsettled, self.grown = backbone.draws_always, backbone.unsettled, backbone.grown

    def answer(self, images: Tensor) -> Outputs:
        """Images [N, C, H, W] as the data give them -> Outputs."""
        outputs = self.backbone(images)
        return Outputs(self.probe(outputs.embedding), outputs.embedding, outputs.maps)
