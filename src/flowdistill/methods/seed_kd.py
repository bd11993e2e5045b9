"""seed_kd: pseudo-labels by similarity. The student's embedding is as near to each of many embeddings of the teacher as the teacher's is.

Made for teachers without a classifier: the image's own embedding and a queue of the teacher's last ones, all of norm 1, take the place of
classes. At the start the queue holds random directions, as the authors' does; each batch replaces the oldest rows, after its loss is known.
The queue is no longer than the training set (where its size is known), or it would hold images twice. The authors compare heads of 128
dimensions that the teacher was trained with, and use no labels; here the teacher's embedding is taken as it is, beside the task. Their code
has a temperature of 0.0001 for the teacher where none is given, which leaves the image's own row alone; the paper has 0.01.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, DataSpec, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, expectation, register, same_shape, two_dimensions, unit


def similarity_loss(student: Tensor, teacher: Tensor, transposed: Tensor, temperature: float, teacher_temperature: float) -> Tensor:
    """Cross-entropy of similarities as probabilities: L = -1/N sum_n sum_j p_t[n, j] log p_s[n, j], p = softmax_j(<z_n, d_j> / T).

    d_0 is the teacher's own embedding of image n, the others are the queue's. Fang et al. 2021, equations 3 to 5, mean over the batch.

    Args:
        student: [N, D] of norm 1.
        teacher: [N, D] of norm 1.
        transposed: [D, K] the queue, whose rows of norm 1 are the columns here.
        temperature: T of the student.
        teacher_temperature: T of the teacher.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    log_s, log_t = (
        (torch.cat([(z * teacher).sum(1, keepdim=True), z @ transposed], 1) / t).log_softmax(1)
        for z, t in ((student, temperature), (teacher, teacher_temperature))
    )
    return -expectation(log_t, log_s).mean()


class SEEDOptions(MethodOptions):
    """Options of seed_kd. ``queue``: K, the rows of the queue. ``T``, ``T_teacher``: the temperatures of the student and of the teacher."""

    queue: int = Field(65536, ge=1, strict=True)  # the paper and the authors' code
    T: float = Field(0.2, ge=1e-3, strict=True)  # the paper and the authors' code
    T_teacher: float = Field(0.01, ge=1e-4, strict=True)  # the paper


@register
class SEED(Method):
    """The student's embedding, through two layers and brought to norm 1, is as near to the rows of a queue as the teacher's is."""

    name = "seed_kd"
    paper = Paper(
        "Z. Fang, J. Wang, L. Wang, L. Zhang, Y. Yang, Z. Liu",
        "SEED: Self-supervised Distillation For Visual Representation",
        "ICLR",
        2021,
        "https://arxiv.org/abs/2101.04731",
    )
    kind = "relations"
    terms = ("seed_kd",)
    vanishes_at_match = False  # a cross-entropy has the teacher's entropy left, and a projector stands between the two
    Options = SEEDOptions
    options: SEEDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, data: DataSpec, **_: Any) -> None:
        super().__init__(options)
        two_dimensions(teacher, self.name, "which leaves no direction to learn; choose a teacher with a wider embedding")
        self.needs = Needs(embedding=True)
        self.projector = nn.Sequential(
            nn.Linear(student.embedding, student.embedding), nn.ReLU(), nn.Linear(student.embedding, teacher.embedding)
        )
        rows = min(self.options.queue, data.n_train or self.options.queue)
        self.hold(queue=unit(torch.randn(rows, teacher.embedding), 1), oldest=torch.tensor(0))

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1, beside a task weight of 1: the paper's loss as it is, which has no task."""
        return {"seed_kd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``seed_kd``; this batch then takes the place of the queue's oldest rows."""
        queue, oldest = self.held("queue"), self.held("oldest")
        # A copy, since the queue moves before the backward pass reads it; inductor would drop a plain clone (docs/LOG.md).
        transposed = queue.T.contiguous()
        with full_precision(student.embedding.device):
            ours = unit(self.projector(at_least_float32(student.embedding)), 1)
            theirs = unit(at_least_float32(teacher.embedding), 1).detach()
            loss = similarity_loss(ours, theirs, transposed, self.options.T, self.options.T_teacher)
        latest = theirs[-len(queue) :].to(queue.dtype)
        queue.index_copy_(0, (oldest + torch.arange(len(latest), device=oldest.device)) % len(queue), latest)
        oldest.copy_((oldest + len(latest)) % len(queue))
        return {"seed_kd": loss}
