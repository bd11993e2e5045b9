"""dkd: kd taken apart into the target class and the others, with a weight each.

Other code hides the target by taking 1000 from its logit and the log of a softmax, which is NaN in float16 and in the teacher's gradient;
here the target's column is taken out, and all is done in logarithms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..types import Batch, Outputs
from .base import LogitMethod, MethodOptions, Paper, at_least_float32, divergence, register, same_shape


def other_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits without those of the labels: [N, K], [N] -> [N, K-1], in the order of the classes."""
    classes = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, classes + (classes >= labels[:, None]))


def log_others(others: Tensor) -> Tensor:
    """Log-probabilities among the classes other than the label: [N, K-1] logits -> [N, K-1]. If all are -inf they stay so."""
    nothing = (others == -torch.inf).all(1, keepdim=True)
    return F.log_softmax(others.masked_fill(nothing, 0), dim=1).masked_fill(nothing, -torch.inf)


def given_labels(batch: Batch | None, method: str) -> Tensor:
    """The batch's labels.

    Raises:
        ValueError: there is no batch, or its images are mixed.
    """
    if batch is None or batch.labels is None:
        raise ValueError(f"{method} needs the labels; call it with Batch(labels) as third argument")
    return batch.labels


class Decoupled(NamedTuple):
    """The two divergences of every sample, [N] each."""

    target: Tensor
    others: Tensor


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Decoupled:
    """T^2 KL(b_t || b_s) and T^2 KL(q_t || q_s) of every sample.

    With p = softmax(z / T): b = (p[y], 1 - p[y]), the target against all others, and q = softmax over the classes k != y of z / T. Zhao et
    al. 2022, section 3.1: kd of a sample is the first plus (1 - p_t[y]) times the second. A class for which the teacher's logit is -inf has
    no probability, and its term is 0; if that is every other class, the second is 0. Computed in at least float32.

    Args:
        student, teacher: [N, K] logits.
        labels: [N] class numbers.
        temperature: T.

    Returns:
        ``target`` and ``others``, [N] each.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    log_b, log_q = [], []
    for logits in (student, teacher):
        scaled = at_least_float32(logits) / temperature
        others = other_logits(scaled, labels)
        margin = scaled.gather(1, labels[:, None]).squeeze(1) - others.logsumexp(1)
        log_b.append(torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], dim=1))
        log_q.append(log_others(others))
    target, rest = (divergence(ours, theirs) * temperature**2 for ours, theirs in (log_b, log_q))
    return Decoupled(target, rest)


def dkd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """alpha TCKD + beta NCKD: the two divergences of ``decoupled``, mean over the batch (Zhao et al. 2022, section 3.2).

    Args:
        student, teacher: [N, K] logits.
        labels: [N] class numbers.
        temperature: T.
        alpha, beta: the weights of the target class and of the others.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    divergences = decoupled(student, teacher, labels, temperature)
    return (alpha * divergences.target + beta * divergences.others).mean()


class DKDOptions(MethodOptions):
    """Options of dkd. ``warmup``: the epochs over which the loss grows, from 1/warmup in the first; 1 gives all of it at once."""

    T: float = Field(4.0, gt=0, strict=True)  # the authors' code for CIFAR-100; 1 for ImageNet
    alpha: float = Field(1.0, ge=0, strict=True)  # the authors' code
    beta: float = Field(8.0, ge=0, strict=True)  # the authors' code for most pairs on CIFAR-100; 6 or 2 for similar ones, 0.5 for ImageNet
    warmup: int = Field(20, ge=1, strict=True)  # the authors' code, of 240 epochs on CIFAR-100; 1 for ImageNet


@register
class DKD(LogitMethod):
    """The student matches how sure the teacher is of the target, and, weighted by itself, what it thinks of the other classes."""

    name = "dkd"
    paper = Paper(
        "B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang", "Decoupled Knowledge Distillation", "CVPR", 2022, "https://arxiv.org/abs/2203.08679"
    )
    terms = ("dkd",)
    uses_labels = True
    Options = DKDOptions
    options: DKDOptions

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, beside a task weight of 1: the authors' code. What balances the parts are ``alpha`` and ``beta``."""
        return {"dkd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``dkd``, times min((epoch + 1) / warmup, 1) if the batch has an epoch."""
        labels, chosen = given_labels(batch, self.name), self.options
        loss = dkd_loss(student.logits, teacher.logits, labels, chosen.T, chosen.alpha, chosen.beta)
        if batch is not None and batch.epoch is not None:
            loss = loss * ((batch.epoch + 1).to(loss.dtype) / chosen.warmup).clamp(max=1)
        return {"dkd": loss}
