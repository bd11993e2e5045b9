"""dml: deep mutual learning. Two students, both from fresh weights, teach each other while they learn from the labels.

Both learn from the same forward pass of the same batch, as KD-Zoo has it; the authors update them in turn, each step on a new batch, and
add 1e-8 inside the logarithm. Each of the two is a run of its own. There is no teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Batch, NetSpec, Outputs
from .base import Method, Paper, register, two_classes
from .kd import kd_loss


def mutual_loss(student: Tensor, peer: Tensor) -> Tensor:
    """KL of the student's prediction from the peer's, mean over the batch: L = 1/N sum_n sum_k p_k (log p_k - log q_k) with p the peer's.

    Zhang et al. 2018, equation 4: kd at temperature 1. The peer gets no gradient. Computed in at least float32.

    Args:
        student: [N, K] logits.
        peer: [N, K] logits.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return kd_loss(student, peer.detach(), 1.0)


@register
class DML(Method):
    """The sum of ``mutual_loss`` over the peers."""

    name = "dml"
    paper = Paper("Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu", "Deep Mutual Learning", "CVPR", 2018, "https://arxiv.org/abs/1706.00384")
    kind = "logits"
    terms = ("dml",)
    uses_teacher = False
    mutual = True

    def __init__(self, options: Any = None, *, student: NetSpec, **_: Any) -> None:
        super().__init__(options)
        two_classes(student, self.name)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1: the authors' code, and KD-Zoo."""
        return {"dml": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``dml``.

        Raises:
            ValueError: there are no peers.
        """
        if batch is None or not batch.peers:
            raise ValueError("dml needs the outputs of the other student; call it with Batch(labels, peers=(outputs,)) as third argument")
        return {"dml": torch.stack([mutual_loss(student.logits, peer.logits) for peer in batch.peers]).sum()}
