"""nst: neuron selectivity transfer. Where each channel is active, as a distribution over the channels.

The authors' code leaves out the term of the teacher alone, a constant: its value can be negative, its gradient is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, Needs, Paper, at_least_float32, paired_stages, register, unit
from .fsp import match_sizes


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels of one stage under the kernel k(u, v) = <u, v>^2, mean over the batch.

    L = 1/N sum_n [mean_{c,c'} <t_c, t_c'>^2 + mean_{c,c'} <s_c, s_c'>^2 - 2 mean_{c,c'} <s_c, t_c'>^2], where s_c and t_c are the
    channels flattened over the image and L2-normalised (a channel of zeros stays so), and c' runs over all channels, c included.
    Huang and Wang 2017, the polynomial kernel with d = 2 and c = 0. The same number is
    1/N sum_n ||S^T S / C - T^T T / C'||_F^2 with the channels as rows of S and T. It is computed this way if the image has no more
    pixels than one of the networks has channels. If the two stages differ in size, the larger map is average-pooled to the smaller. In at
    least float32.

    Args:
        student: [N, C, H, W].
        teacher: [N, C', H', W']; its channels need not agree.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student gives {tuple(student.shape)}, teacher {tuple(teacher.shape)}; the batches must agree")
    ours, theirs = (unit(at_least_float32(x).flatten(2), 2) for x in match_sizes(student, teacher, "avg"))
    with full_precision(ours.device):
        if ours.shape[2] <= max(ours.shape[1], theirs.shape[1]):
            s, t = (x.transpose(1, 2) @ x / x.shape[1] for x in (ours, theirs))
            return (s - t).square().sum((1, 2)).mean()
        ss, tt, st = (a @ b.transpose(1, 2) for a, b in ((ours, ours), (theirs, theirs), (ours, theirs)))
    return tt.square().mean() + ss.square().mean() - 2 * st.square().mean()


@register
class NST(Method):
    """The student's channels look at the same places as the teacher's: the sum over the stages."""

    name = "nst"
    paper = Paper(
        "Z. Huang, N. Wang",
        "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        "arXiv",
        2017,
        "https://arxiv.org/abs/1707.01219",
    )
    terms = ("nst",)

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.stages = paired_stages(student, teacher, self.name)
        self.needs = Needs(frozenset(self.stages), frozenset(self.stages))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """50: the authors' code, on the last stage; RepDistiller and mdistiller on the sum of three. (KD-Zoo: 10 on the last.)"""
        return {"nst": 50.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``nst``."""
        return {"nst": torch.stack([nst_loss(student.maps[stage], teacher.maps[stage]) for stage in self.stages]).sum()}
