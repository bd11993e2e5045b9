"""kdsvd: singular value decomposition of feature maps. The principal channel mixtures of a stage, and how they relate to the next one's.

The sign of a singular vector is a decomposition's whim and moves the loss; here each vector of the teacher has a sum of 0 or more, while
RepDistiller takes what LAPACK returns. mdistiller decomposes along the width of the image, which is another loss. The decomposition
waits for the device, so no CUDA graph holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, paired_stages, register, unit

CLOSE = 1e-5  # share of the largest eigenvalue: two that are closer have no directions of their own, and no gradient between them


def right_vectors(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of a map, as one HW x C matrix per sample, and their singular values, largest first.

    They are the eigenvectors of the C x C Gram matrix G. If G is not finite they are NaN, as no decomposition takes it. Their gradient is
    that of first-order perturbation: dv_i = sum_{j != i} v_j (v_j^T dG v_i) / (l_i - l_j). The terms of (nearly) equal eigenvalues are
    left out, as they have no limit. Computed in at least float32.

    Args:
        features: [N, C, H, W].
        count: how many, at most C.

    Returns:
        [N, C, count] vectors, [N, count] values without gradient.
    """
    x = at_least_float32(features).flatten(2)
    with full_precision(x.device):
        gram = x @ x.transpose(1, 2)
        constant = gram.detach()  # eigh's own gradient would divide by the gaps of equal eigenvalues too; it is built below
        finite = constant.isfinite().flatten(1).all(1)[:, None, None]
        values, vectors = (ascending.flip(-1) for ascending in torch.linalg.eigh(torch.where(finite, constant, 0.0)))
        vectors = torch.where(finite, vectors, torch.nan)
        first = vectors[:, :, :count]
        gaps = values[:, None, :count] - values[:, :, None]
        apart = gaps.abs() > CLOSE * values[:, :1, None]
        # turn - turn.detach() is 0 and has the gradient of v_j^T G v_i, so that ``moved`` gives the vectors theirs and leaves the values.
        # The inner ``where`` keeps 0 / 0 out of the backward pass: what the outer one drops would still be NaN there.
        turn = vectors.transpose(1, 2) @ gram @ first
        moved = vectors @ torch.where(apart, (turn - turn.detach()) / torch.where(apart, gaps, 1.0), 0.0)
    return first + moved, values[:, :count].clamp(min=0).sqrt()


def kdsvd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int = 1) -> Tensor:
    """Squared difference of the radial basis functions between the singular vectors of consecutive stages, mean over the batch.

    V_t [C, k] are the teacher's first k right vectors, signed so that each has a sum of 0 or more, times its singular values over their
    norm. V_s holds for each of them that one of the student's first k + 3 (fewer if it has fewer) with the largest |cosine|, with the sign
    of that cosine and the teacher's factor. With R^i[p, q, c] = exp(-(V^i[p, c] - V^{i-1}[q, c])^2 / 8),
    L = 1/N sum over consecutive stages, n, p, q, c of (R_s - R_t)^2. Lee et al. 2018. No gradient to the teacher. In at
    least float32.

    Args:
        student, teacher: maps [N, C, H, W] of two or more stages in order; the channels of a stage agree, the sizes need not.
        k: how many vectors, at most C and H W.

    Returns:
        A scalar.

    Raises:
        ValueError: batch or channels of a stage differ, or there is one stage only.
    """
    if len(student) < 2:
        raise ValueError(f"kdsvd_loss compares consecutive stages, so it wants two or more; got {len(student)}")
    ours, theirs = [], []
    for s, t in zip(student, teacher, strict=True):
        if s.shape[:2] != t.shape[:2]:
            raise ValueError(f"student gives {tuple(s.shape)}, teacher {tuple(t.shape)}; batch and channels must agree")
        wanted, strength = right_vectors(t.detach(), k)
        wanted = torch.where(wanted.sum(1, keepdim=True) < 0, -wanted, wanted)
        strength = unit(strength, 1)[:, None]
        ours.append(_aligned(right_vectors(s, min(k + 3, s.shape[1], s[0, 0].numel()))[0], wanted) * strength)
        theirs.append(wanted * strength)
    return torch.stack([(r - q).square().sum((1, 2, 3)).mean() for r, q in zip(_relations(ours), _relations(theirs), strict=True)]).sum()


def _aligned(vectors: Tensor, wanted: Tensor) -> Tensor:
    """For each wanted vector [N, C, k] the nearest line among [N, C, m], pointing its way."""
    with full_precision(vectors.device):
        cosines = wanted.transpose(1, 2) @ vectors.detach()
    nearest = cosines.abs().argmax(2, keepdim=True)
    signs = torch.where(cosines.gather(2, nearest) < 0, -1.0, 1.0).transpose(1, 2)
    return vectors.gather(2, nearest.transpose(1, 2).expand_as(wanted)) * signs


def _relations(vectors: Sequence[Tensor]) -> list[Tensor]:
    return [(-(after[:, :, None] - before[:, None]).square() / 8).exp() for before, after in pairwise(vectors)]


class KDSVDOptions(MethodOptions):
    """Options of kdsvd."""

    k: int = Field(1, ge=1, strict=True)  # RepDistiller and mdistiller; the authors' later code has 4 on maps before ReLU


@register
class KDSVD(Method):
    """The principal channel mixtures of consecutive stages relate as the teacher's do."""

    name = "kdsvd"
    paper = Paper(
        "S. H. Lee, D. H. Kim, B. C. Song",
        "Self-supervised Knowledge Distillation Using Singular Value Decomposition",
        "ECCV",
        2018,
        "https://arxiv.org/abs/1807.06819",
    )
    terms = ("kdsvd",)
    Options = KDSVDOptions
    options: KDSVDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        self.stages = paired_stages(student, teacher, self.name)
        self.needs = Needs(frozenset(self.stages), frozenset(self.stages))
        if len(self.stages) < 2:
            raise ValueError(
                f"kdsvd: {student.name} and {teacher.name} have one stage, {self.stages[0]!r}, and it compares consecutive stages; "
                f"choose networks with more stages, or a method on one such as nst"
            )
        for stage in self.stages:
            ours, theirs = student.tap(stage), teacher.tap(stage)
            if ours.channels != theirs.channels:
                raise ValueError(
                    f"kdsvd: tap {stage!r} is {ours.shape} in {student.name} and {theirs.shape} in {teacher.name}, and its vectors need "
                    f"equal channels; choose networks of equal width, or a method that takes any such as nst"
                )
            most = min(ours.channels, ours.height * ours.width, theirs.height * theirs.width)
            if self.options.k > most:
                raise ValueError(
                    f"kdsvd: tap {stage!r} is {ours.shape} in {student.name} and {theirs.shape} in {teacher.name}, which has {most} "
                    f"singular vectors; set options.kdsvd.k to {most} or less"
                )

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1: RepDistiller, mdistiller. (The authors clip its gradient to the norm of the task's, which nothing here does.)"""
        return {"kdsvd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``kdsvd``."""
        ours, theirs = ([outputs.maps[stage] for stage in self.stages] for outputs in (student, teacher))
        return {"kdsvd": kdsvd_loss(ours, theirs, self.options.k)}
