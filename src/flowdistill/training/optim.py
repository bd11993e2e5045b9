"""The optimiser of one phase, over the student, and over the method's adapters if a term of the method counts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import UserError, did_you_mean, first_line
from ..config import TrainConfig
from ..methods import Method, Phase
from ..models import Network

FUSED = ("sgd", "adamw")  # those that every engine trains with; a CUDA graph can hold their fused forms
FACTOR = "factor"  # key of a group: what the rate is multiplied by for it
ENGINES_OWN = {"params", "foreach", "fused", "capturable", "differentiable", "maximize"}
"""Arguments of torch's classes that say how a step is computed, or that it climbs."""

CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): cls for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
}


def trainable_parameters(net: Network, method: Method, phase: Phase) -> list[nn.Parameter]:
    """What a phase moves: the network, without its head if the phase leaves that out, and the adapters if a term of the method counts.

    Other parameters get no step and no weight decay.
    """
    head = f"{net.spec.head}."
    parameters = [p for name, p in net.body.named_parameters() if p.requires_grad and (phase.head or not name.startswith(head))]
    if any(phase.counts(term) for term in method.terms):
        parameters += method.parameters()
    return parameters


def build_optimizer(net: Network, method: Method, phase: Phase, train: TrainConfig) -> torch.optim.Optimizer:
    """A fresh optimiser. Weight decay is on all parameters, batch normalisation included (He et al. 2016 and the reference log), unless
    ``decay_norm_and_bias`` is off.

    SGD and AdamW are the fused forms, which a CUDA graph can hold, and they remember zeros from the start: a graph needs that to be in its
    place, and in the parameter's memory layout. From another layout the fused forms compute wrong updates, silently.
    """
    parameters, factors = trainable_parameters(net, method, phase), rate_factors(net, train.layer_decay)
    optimizer = _made(_groups(parameters, factors, train), phase.lr or train.lr, train)
    for parameter in parameters_of(optimizer):
        if train.optimizer == "sgd" and train.momentum:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        elif train.optimizer == "adamw":
            means = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if optimizer.defaults["amsgrad"] else ("exp_avg", "exp_avg_sq")
            step = torch.zeros((), device=parameter.device)
            optimizer.state[parameter] = {"step": step} | {mean: torch.zeros_like(parameter, requires_grad=False) for mean in means}
    return optimizer


def rate_factors(net: Network, decay: float) -> dict[nn.Parameter, float]:
    """What the rate of each of the network's parameters is multiplied by; 1 for those that are not there, as adapters are.

    The last layer, which has the classifier, has the factor 1, and each layer before it ``decay`` times that of the next.

    Raises:
        UserError: nothing says the order of its layers.
    """
    if decay == 1:
        return {}
    layers = net.layer_numbers()
    if not layers:
        raise UserError(
            f"train.layer_decay={decay:g}: nothing says in which order the layers of {net.spec.name} stand, for it has neither stages nor "
            f"timm's group_matcher; leave layer_decay out, or choose another student"
        )
    last = max(layers.values())
    return {parameter: decay ** (last - layers[name]) for name, parameter in net.body.named_parameters()}


def _groups(parameters: Sequence[nn.Parameter], factors: Mapping[nn.Parameter, float], train: TrainConfig) -> list[dict[str, Any]]:
    """One for each factor of the rate, in two where a part is without weight decay: that of at most one dimension, as scales and biases."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter in parameters:
        factor, thin = factors.get(parameter, 1.0), not train.decay_norm_and_bias and parameter.ndim <= 1
        group = {"params": [], FACTOR: factor} | ({"weight_decay": 0.0} if thin else {})
        groups.setdefault((factor, thin), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _made(parameters: Iterable[Tensor] | list[dict[str, Any]], lr: float, train: TrainConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": lr, "weight_decay": train.weight_decay, **train.optimizer_options}
    if train.optimizer == "sgd":
        options |= {"momentum": train.momentum, "nesterov": train.nesterov, "fused": True}
    elif train.optimizer == "adamw":
        options |= {"fused": True, "capturable": True}
    return CLASSES[train.optimizer](parameters, **options)


def refuse_optimizer(train: TrainConfig) -> None:
    """Refuse an optimiser that can't train here.

    Raises:
        UserError: torch.optim has none of that name; it does not take a rate and a weight decay; or it can't work with its options, or
            with parameters of any shape.
    """
    name, usable = train.optimizer, {name: cls for name, cls in CLASSES.items() if {"lr", "weight_decay"} <= _arguments(cls)}
    if name not in CLASSES:
        raise UserError(f"train.optimizer={name}: {did_you_mean(name, usable)}")
    if name not in usable:
        own = f"torch.optim.{CLASSES[name].__name__} does not take a rate and a weight decay, which every optimizer is given"
        raise UserError(f"train.optimizer={name}: {own}; choose from: {', '.join(sorted(usable))}")
    allowed = sorted(_arguments(usable[name]) - ENGINES_OWN - {"lr", "weight_decay"})
    if unknown := next((option for option in train.optimizer_options if option not in allowed), None):
        raise UserError(f"train.optimizer_options.{unknown}: {name} has no such option; {did_you_mean(unknown, allowed)}")
    try:
        some = [torch.zeros([1] * dimensions, requires_grad=True) for dimensions in (1, 2, 4)]
        for parameter in some:
            parameter.grad = torch.zeros_like(parameter)
        _made(some, train.lr, train).step()
    except Exception as error:  # whatever torch's class says of its options
        raise UserError(f"train.optimizer={name}: torch.optim.{CLASSES[name].__name__} refuses: {first_line(error)}") from None


def _arguments(cls: type[torch.optim.Optimizer]) -> set[str]:
    return set(inspect.signature(cls).parameters)


def set_rate(optimizer: torch.optim.Optimizer, lr: Tensor) -> None:
    """Set the rate of the next step, a scalar, for each group by its factor. The fused forms read it on the device; the others are given a
    number.
    """
    for group in optimizer.param_groups:
        factor = group.get(FACTOR, 1)
        rate = lr if factor == 1 else lr * factor
        group["lr"] = rate if group.get("fused") else float(rate)


def clip(parameters: Sequence[nn.Parameter], largest: float | None) -> None:
    """Scale all gradients by one factor, so that their global norm is at most ``largest``; None leaves them. Nothing waits."""
    if largest is not None:
        nn.utils.clip_grad_norm_(parameters, largest)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that it moves, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def memory(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that it remembers, such as ``exp_avg.3`` of its parameter number 3. The tensors are not copies."""
    of_parameters = [optimizer.state.get(parameter, {}) for parameter in parameters_of(optimizer)]
    return {f"{name}.{number}": value for number, state in enumerate(of_parameters) for name, value in state.items() if value is not None}


def remember(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``memory`` gave, in the parameters' memory layout."""
    parameters, fresh = parameters_of(optimizer), optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = fresh["state"]
    for key, value in tensors.items():
        name, _, number = key.rpartition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        state.setdefault(int(number), {})[name] = value.clone()
    optimizer.load_state_dict(fresh)  # puts each where its class wants it: some count their steps on the CPU
