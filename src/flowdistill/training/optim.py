"""The optimiser of one phase: SGD over the student, and over the method's adapters if a term of the method counts."""

from __future__ import annotations

import torch
from torch import nn

from ..config import TrainConfig
from ..methods import Method, Phase
from ..models import Network


def trainable_parameters(net: Network, method: Method, phase: Phase) -> list[nn.Parameter]:
    """What a phase moves: the network, without its head if the phase leaves that out, and the adapters if a term of the method counts.

    Other parameters get no step and no weight decay.
    """
    head = f"{net.spec.head}."
    parameters = [p for name, p in net.body.named_parameters() if p.requires_grad and (phase.head or not name.startswith(head))]
    if any(phase.counts(term) for term in method.terms):
        parameters += method.parameters()
    return parameters


def build_optimizer(net: Network, method: Method, phase: Phase, train: TrainConfig) -> torch.optim.SGD:
    """A fresh SGD; weight decay is on all parameters, batch normalisation included (He et al. 2016 and the reference log).

    It is the fused form, which a CUDA graph can hold.
    """
    optimizer = torch.optim.SGD(
        trainable_parameters(net, method, phase),
        lr=phase.lr or train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        nesterov=train.nesterov,
        fused=True,
    )
    if train.momentum:
        # Zeros in the parameter's memory layout, before the first step makes a momentum in the gradient's: from another layout than the
        # parameter's, fused SGD computes wrong updates, silently.
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer
