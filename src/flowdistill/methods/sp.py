"""sp: similarity preserving. Which images of a batch a network finds alike.

Deviations: torchdistill divides the rows by their L1 norm; KD-Zoo averages over three stages (``stages=all``).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import MIN_PRODUCT_NORM, Method, MethodOptions, Needs, Paper, at_least_float32, mse_loss, paired_stages, register, unit


def similarity(features: Tensor) -> Tensor:
    """Inner products of the samples of a batch, every row L2-normalised: [N, ...] -> [N, N].

    Tung and Mori 2019, section 3: G = Q Q^T with Q the features reshaped to [N, C H W], then G[i, :] / ||G[i, :]||_2. A sample of zeros
    gives zeros. Computed in at least float32.
    """
    flat = at_least_float32(features).flatten(1)
    with full_precision(flat.device):
        gram = flat @ flat.T
    return unit(gram, 1, MIN_PRODUCT_NORM)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the similarities, mean over the pairs of samples: L = 1/N^2 ||G_t - G_s||_F^2.

    Tung and Mori 2019, section 3, for one stage.

    Args:
        student: [N, ...].
        teacher: [N, ...]; beside the batch its shape need not agree.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = similarity(student), similarity(teacher)
    return mse_loss(ours, theirs)


class SPOptions(MethodOptions):
    """Options of sp. ``stages``: the last stage end, or the mean over all of them."""

    stages: Literal["last", "all"] = "last"  # RepDistiller and mdistiller; all: KD-Zoo


@register
class SP(Method):
    """Images that are alike to the teacher become alike to the student."""

    name = "sp"
    paper = Paper(
        "F. Tung, G. Mori",
        "Similarity-Preserving Knowledge Distillation",
        "ICCV",
        2019,
        "https://arxiv.org/abs/1907.09682",
    )
    kind = "relations"
    terms = ("sp",)
    per_sample = False
    Options = SPOptions
    options: SPOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        if self.options.stages == "all":
            stages = paired_stages(student, teacher, self.name)
            self.pairs = tuple(zip(stages, stages, strict=True))
        else:
            for spec in (student, teacher):
                if not spec.stages:
                    raise ValueError(
                        f"sp: {spec.name} has no stage whose samples could be compared; choose a network with stages, or a method on "
                        f"embeddings such as pkt"
                    )
            self.pairs = ((student.stages[-1], teacher.stages[-1]),)
        self.needs = Needs(frozenset(ours for ours, _ in self.pairs), frozenset(theirs for _, theirs in self.pairs))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """3000: RepDistiller and mdistiller on the last stage, KD-Zoo on the mean of three."""
        return {"sp": 3000.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``sp``."""
        losses = [similarity_loss(student.maps[ours], teacher.maps[theirs]) for ours, theirs in self.pairs]
        return {"sp": torch.stack(losses).mean()}
