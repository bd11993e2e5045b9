"""crd: contrastive representation distillation. Of many images, the student's embedding must find the one that the teacher's shows.

Two memory banks hold, for every training image, the last embedding of either network. The authors draw the negatives of an image
without replacement, on the host; here they are drawn with it, as the noise of the estimate that the loss is, by a hash of seed, epoch and
image (``hashed.py``). The authors' second form of positives (another image of the class) is not here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..device import full_precision
from ..types import Batch, DataSpec, MethodContext, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, register, unit
from .dkd import given_labels
from .hashed import of_batch, salt, words

EPS = 1e-7  # the authors' code


def similarities(anchors: Tensor, transposed: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """exp(<m_j, a_i> / T) of every image i and its rows j of the bank.

    Tian et al. 2020, equation 19, before its normalisation. This is one matrix product with the whole bank: picking the rows first would
    copy each of them for each image.

    Args:
        anchors: [N, D] of norm 1.
        transposed: [D, M] the bank, whose rows of norm 1 are the columns here.
        rows: [N, J] numbers of rows of the bank.
        temperature: T.

    Returns:
        [N, J].
    """
    with full_precision(anchors.device):
        return ((anchors @ transposed).gather(1, rows) / temperature).exp()


def nce_loss(scores: Tensor, images: int) -> Tensor:
    """Noise-contrastive estimation: L = -1/N sum_n [log(o_+ / (o_+ + c)) + sum_j log(q / (o_j + c))], q = K/M, c = q + 1e-7.

    Tian et al. 2020, equation 18, as the authors' code has it.

    Args:
        scores: [N, 1 + K] normalised scores o, the positive first.
        images: M, of the training set.

    Returns:
        A scalar.
    """
    noise = (scores.shape[1] - 1) / images
    positive, negative = scores[:, 0], scores[:, 1:]
    log_likelihoods = (positive / (positive + noise + EPS)).log() + (noise / (negative + noise + EPS)).log().sum(1)
    return -log_likelihoods.mean()


def moved(bank: Tensor, rows: Tensor, latest: Tensor, momentum: float) -> Tensor:
    """What a step makes of the bank's ``rows`` [N]: momentum times the old, the rest of the latest [N, D], brought to norm 1; [N, D]."""
    return unit(momentum * bank[rows] + (1 - momentum) * latest, 1)


class CRDOptions(MethodOptions):
    """Options of crd. ``negatives``: K, the number per image. ``dim``: the width of the compared space. ``momentum``: that of the banks."""

    negatives: int = Field(16384, ge=1, strict=True)  # the authors' code, as the three that follow
    T: float = Field(0.07, gt=0, strict=True)
    momentum: float = Field(0.5, ge=0, lt=1, strict=True)
    dim: int = Field(128, ge=2, strict=True)


@register
class CRD(Method):
    """Both embeddings, each through a linear layer and brought to norm 1, are scored against the other network's bank.

    The scores are divided by a constant, M times their mean over the first batch.
    """

    name = "crd"
    paper = Paper(
        "Y. Tian, D. Krishnan, P. Isola", "Contrastive Representation Distillation", "ICLR", 2020, "https://arxiv.org/abs/1910.10699"
    )
    kind = "relations"
    terms = ("crd",)
    vanishes_at_match = False
    per_sample = False
    uses_labels = True
    Options = CRDOptions
    options: CRDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, data: DataSpec, **_: Any) -> None:
        super().__init__(options)
        self.needs = Needs(embedding=True, context=frozenset({"labels"}))
        self.images, dim = data.n_train, self.options.dim
        self.embed_student, self.embed_teacher = nn.Linear(student.embedding, dim), nn.Linear(teacher.embedding, dim)
        bound = 1 / math.sqrt(dim / 3)
        self.hold(bank_student=torch.empty(self.images, dim).uniform_(-bound, bound))
        self.hold(bank_teacher=torch.empty(self.images, dim).uniform_(-bound, bound))
        self.hold(mean_student=torch.zeros(()), mean_teacher=torch.zeros(()), salt=salt())

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """0.8, beside a task weight of 1: the authors' code. (With kd: 1 for that.)"""
        return {"crd": 0.8}

    def setup(self, context: MethodContext) -> None:
        """Sort the training images by class, so that ``negatives`` finds those of other classes.

        Raises:
            ValueError: there are more or fewer labels than training images, or all are of one class.
        """
        assert context.labels is not None
        if len(context.labels) != self.images:
            raise ValueError(f"crd: {len(context.labels)} labels for banks of {self.images} images; give both for the same training set")
        order, counts = context.labels.argsort(stable=True), context.labels.bincount()
        if counts.max() == self.images:
            raise ValueError("crd: all training images are of one class, so there are no negatives; choose other data or another method")
        self.hold(order=order, counts=counts, starts=counts.cumsum(0) - counts)

    def negatives(self, labels: Tensor, indices: Tensor, epoch: Tensor | int) -> Tensor:
        """[N, K] images of other classes than the labels [N], all equally likely."""
        same_class = self.held("counts")[labels][:, None]
        drawn = words(self.held("salt"), epoch, indices, self.options.negatives)
        rank = (drawn * (self.images - same_class)) >> 32  # among the images of other classes, from 32 random bits
        # ``order`` holds the images class by class, so that a rank from the start of the image's own class on skips that class.
        return self.held("order")[torch.where(rank < self.held("starts")[labels][:, None], rank, rank + same_class)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``crd``: the sum over both networks; the banks then move towards this batch.

        Raises:
            ValueError: the batch has no labels or no indices.
        """
        labels = given_labels(batch, self.name)
        if batch is None or batch.indices is None:
            raise ValueError("crd: give Batch(labels, indices): positions of the images in the training set, which its banks are sorted by")
        indices, epoch = of_batch(batch, student.embedding)
        rows = torch.cat([indices[:, None], self.negatives(labels, indices, epoch)], 1)  # the image itself is the positive
        with full_precision(student.embedding.device):
            ours = unit(self.embed_student(at_least_float32(student.embedding)), 1)
            theirs = unit(self.embed_teacher(at_least_float32(teacher.embedding)), 1)
        losses = []
        for anchors, bank_name, mean_name in ((ours, "bank_teacher", "mean_student"), (theirs, "bank_student", "mean_teacher")):
            # A copy, since the bank moves before the backward pass reads it; inductor would drop a plain clone (docs/LOG.md).
            transposed = self.held(bank_name).T.contiguous()
            scores = similarities(anchors, transposed, rows, self.options.T)
            # The first batch sets the normalising constant, which is 0 until then. A CUDA graph holds no branch, so ``where`` decides.
            mean_score = self.held(mean_name)
            mean_score.copy_(torch.where(mean_score > 0, mean_score, scores.detach().mean()))
            # A clone, since the backward pass needs the value and the next forward pass writes to the buffer in place.
            losses.append(nce_loss(scores / (self.images * mean_score.clone()), self.images))
        # The banks move last: both losses are of the banks as they were before this batch.
        for bank_name, latest in (("bank_student", ours), ("bank_teacher", theirs)):
            bank = self.held(bank_name)
            bank.index_copy_(0, indices, moved(bank, indices, latest.detach(), self.options.momentum).to(bank.dtype))
        return {"crd": torch.stack(losses).sum()}
