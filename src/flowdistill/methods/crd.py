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


def similarities(anchors: Tensor, turned: Tensor, places: Tensor, temperature: float) -> Tensor:
    """exp(<m_j, a_i> / T) of every image i and the rows j of the bank that its places name.

    Tian et al. 2020, equation 19, before its normalisation. One matrix product with the whole bank: picking the rows first would copy
    each of them for each image.

    Args:
        anchors: [N, D] of norm 1.
        turned: [D, M] the bank, its rows of norm 1 as columns.
        places: [N, J] rows of the bank.

    Returns:
        [N, J].
    """
    with full_precision(anchors.device):
        return ((anchors @ turned).gather(1, places) / temperature).exp()


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
    found = (positive / (positive + noise + EPS)).log() + (noise / (negative + noise + EPS)).log().sum(1)
    return -found.mean()


def moved(bank: Tensor, places: Tensor, latest: Tensor, momentum: float) -> Tensor:
    """The rows [N, D] of the bank at ``places`` [N] after a step: momentum of the old, the rest of the latest [N, D], to norm 1."""
    return unit(momentum * bank[places] + (1 - momentum) * latest, 1)


class CRDOptions(MethodOptions):
    """Options of crd. ``negatives``: K of each image. ``dim``: of the space that is compared. ``momentum``: of the banks."""

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
        """Which images are of other classes.

        Raises:
            ValueError: not as many labels as training images, or they are all of one class.
        """
        assert context.labels is not None
        if len(context.labels) != self.images:
            raise ValueError(f"crd: {len(context.labels)} labels for banks of {self.images} images; give both for the same training set")
        order, counts = context.labels.argsort(stable=True), context.labels.bincount()
        if counts.max() == self.images:
            raise ValueError("crd: all training images are of one class, so there are no negatives; choose other data or another method")
        self.hold(order=order, counts=counts, starts=counts.cumsum(0) - counts)

    def negatives(self, labels: Tensor, indices: Tensor, epoch: Tensor | int) -> Tensor:
        """[N, K] images of other classes, each as likely as the other."""
        own = self.held("counts")[labels][:, None]
        drawn = words(self.held("salt"), epoch, indices, self.options.negatives)
        rank = (drawn * (self.images - own)) >> 32
        return self.held("order")[torch.where(rank < self.held("starts")[labels][:, None], rank, rank + own)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``crd``: the sum over both networks; the banks then move towards this batch.

        Raises:
            ValueError: the batch does not know which images it holds.
        """
        labels = given_labels(batch, self.name)
        if batch is None or batch.indices is None:
            raise ValueError("crd: give Batch(labels, indices): positions of the images in the training set, which its banks are sorted by")
        indices, epoch = of_batch(batch, student.embedding)
        places = torch.cat([indices[:, None], self.negatives(labels, indices, epoch)], 1)
        with full_precision(student.embedding.device):
            ours = unit(self.embed_student(at_least_float32(student.embedding)), 1)
            theirs = unit(self.embed_teacher(at_least_float32(teacher.embedding)), 1)
        losses = []
        for anchors, bank, mean in ((ours, "bank_teacher", "mean_student"), (theirs, "bank_student", "mean_teacher")):
            turned = self.held(bank).T.contiguous()  # a copy, for the bank moves before the backward pass; inductor drops a plain clone
            scores = similarities(anchors, turned, places, self.options.T)
            first = self.held(mean)
            first.copy_(torch.where(first > 0, first, scores.detach().mean()))
            losses.append(nce_loss(scores / (self.images * first.clone()), self.images))
        for bank, latest in (("bank_student", ours), ("bank_teacher", theirs)):
            held = self.held(bank)
            held.index_copy_(0, indices, moved(held, indices, latest.detach(), self.options.momentum).to(held.dtype))
        return {"crd": torch.stack(losses).sum()}
