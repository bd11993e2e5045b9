"""Batch normalisation by the whole batch, where several ranks share it out: the statistics of all ranks' images, with their gradients.

torch's own ``SyncBatchNorm`` refuses a CPU. Here the function is replaced that every batch normalisation calls, not the layers: names and
state dicts stay, and a library's own layers, which call it too, are covered. ``train.batch_norm`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from ..config import TrainConfig
from ..ranks import Ranks, current


def needed(train: TrainConfig, ranks: Ranks) -> bool:
    """Whether these ranks are to normalise a batch together."""
    return train.batch_norm == "synchronised" and ranks.several and not ranks.apart


def together(wanted: bool) -> AbstractContextManager[Any]:
    """Inside, a batch is normalised by the images of all ranks; if that is not wanted, by those of each rank alone."""
    return _Together(current()) if wanted else nullcontext()


class _Together(TorchFunctionMode):
    """Inside, ``F.batch_norm`` normalises by the images of all ranks where it would by those of its input."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or what takes its place."""
        given = kwargs or {}
        return batch_norm(self.ranks, *args, **given) if func is F.batch_norm else func(*args, **given)


def batch_norm(
    ranks: Ranks,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` of x [N, C, ...] as one process would compute it of the rows of all ranks, [world * N, C, ...].

    The running statistics move as there: the variance is divided by the number of all values but one.

    Args:
        ranks: N is the same on each.
        momentum: share of this batch in the new running statistics.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    y, mean, variance = _Normalised.apply(x, weight, bias, eps, ranks)
    if running_mean is not None and running_var is not None:
        count = ranks.world * x.numel() // x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    normalised: Tensor = y
    return normalised


class _Normalised(torch.autograd.Function):
    """x over the statistics of all ranks' images, times ``weight``, plus ``bias``.

    With xh the normalised values and g the gradient for them, the gradient for x is (g - mean g - xh mean(g xh)) / sqrt(variance + eps),
    the means being over the values of all ranks, as the statistics are. What a rank passes on is the gradient of the sum of the ranks'
    losses; the mean over the ranks, taken later of the gradients of the weights, makes that the gradient of the mean loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        """The result in x's type; mean and variance [C] in at least float32. Ranks have equally many values, so that means are of means."""
        wide = _wide(x)
        variance, mean = torch.var_mean(wide, _but_channels(x), correction=0)
        means, variances = ranks.gathered(torch.stack([mean, variance])[None]).unbind(1)  # [world, C] each
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        scale = (variance + eps).rsqrt()
        normalised = (wide - _along(mean, x)) * _along(scale, x)
        y = normalised if weight is None else normalised * _along(weight, x)
        y = y if bias is None else y + _along(bias, x)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """The gradients for x, weight and bias."""
        (x, weight, mean, scale), gradient = ctx.saved_tensors, _wide(gradients[0])
        others = _but_channels(x)
        normalised = (_wide(x) - _along(mean, x)) * _along(scale, x)
        own, own_with_x = gradient.mean(others), (gradient * normalised).mean(others)
        count = x.numel() // x.shape[1]
        for_weight = (own_with_x * count).to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        for_bias = own * count if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, for_weight, for_bias, None, None
        means = torch.stack([own, own_with_x])
        ctx.ranks.mean_([means])
        centred = gradient - _along(means[0], x) - normalised * _along(means[1], x)
        for_x = centred * _along(scale if weight is None else scale * weight, x)
        return for_x.to(x.dtype), for_weight, for_bias, None, None


def _wide(x: Tensor) -> Tensor:
    """x in at least float32: sums are never taken in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _but_channels(x: Tensor) -> list[int]:
    return [dimension for dimension in range(x.dim()) if dimension != 1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], with as many dimensions as x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def normalises_apart(module: nn.Module, train: TrainConfig) -> bool:
    """Whether a part of a module, in the mode in which it is, normalises by a rank's own images where ranks share a batch out.

    A layer that keeps a ``running_var`` without being one of torch's batch normalisations is taken for one that can't be synchronised.
    """
    return any(_by_batch(part) and not (train.batch_norm == "synchronised" and isinstance(part, _BatchNorm)) for part in module.modules())


def _by_batch(part: nn.Module) -> bool:
    if isinstance(part, _BatchNorm):
        return part.training or part.running_mean is None
    return part.training and "running_var" in part._buffers and not isinstance(part, _InstanceNorm)
