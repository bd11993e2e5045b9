"""rkd: relational knowledge distillation. Distances between two and angles between three images of a batch.

Deviations: MMRazor and a TensorFlow port L2-normalise the embeddings first. Common code takes distances from a Gram matrix and counts those
of repeated samples, which its rounding puts above 0, in the mean; here they are exactly 0 and don't count.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..device import full_precision
from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Needs, Paper, at_least_float32, register, same_shape, two_dimensions, unit


def distances(embedding: Tensor) -> Tensor:
    """Euclidean distances of the samples of a batch, exactly 0 for equal ones: [N, D] -> [N, N], in at least float32."""
    embedding = at_least_float32(embedding)
    with full_precision(embedding.device):
        return torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")


def angles(embedding: Tensor) -> Tensor:
    """Cosine at sample i of the triangle with samples j and k, 0 if j or k coincides with i: [N, D] -> [N, N, N].

    Park et al. 2019, section 3.2.2: A[i, j, k] = <u_ij, u_ik> with u_ij = (e_j - e_i) / ||e_j - e_i||. The differences are taken before
    anything is multiplied: of two images that are nearly alike, inner products would leave nothing but rounding. This keeps N N D
    numbers: 32 MiB for N = 128 and D = 512. Computed in at least float32.
    """
    embedding = at_least_float32(embedding)
    apart = embedding[None] - embedding[:, None]
    directions = unit(apart, 2, min_norm=0)
    with full_precision(embedding.device):
        return directions @ directions.transpose(1, 2)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance of the pairwise distances, each in units of its network's mean: L_D = 1/N^2 sum_{i,j} smooth_l1(D_s - D_t).

    Park et al. 2019, section 3.2.1: D[i, j] = d[i, j] / mu with mu the mean of the d that are above 0; the zeros of the diagonal count
    in the mean over pairs. smooth_l1(x) = x^2 / 2 for |x| < 1, else |x| - 1/2.

    Args:
        student: [N, D].
        teacher: [N, D']; D' need not be D.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = (_by_mean(distances(x)) for x in (student, teacher))
    same_shape(ours, theirs)
    return F.smooth_l1_loss(ours, theirs)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance of the angles: L_A = 1/N^3 sum_{i,j,k} smooth_l1(A_s - A_t), triples with a repeated sample included.

    Park et al. 2019, section 3.2.2. Keeps N^3 numbers, 64 MiB per network at N = 256, and those of ``angles``.

    Args:
        student: [N, D].
        teacher: [N, D']; D' need not be D.

    Returns:
        A scalar.

    Raises:
        ValueError: the batches differ.
    """
    ours, theirs = angles(student), angles(teacher)
    same_shape(ours, theirs)
    return F.smooth_l1_loss(ours, theirs)


def _by_mean(apart: Tensor) -> Tensor:
    mean = apart.sum() / (apart > 0).sum().clamp(min=1)
    return apart / mean.where(mean > 0, 1)


class RKDOptions(MethodOptions):
    """Options of rkd: the factors of L_D and L_A. A factor of 0 leaves its part out."""

    distance: float = Field(25.0, ge=0, strict=True)  # RepDistiller, mdistiller, KD-Zoo; the authors, in metric learning: 1
    angle: float = Field(50.0, ge=0, strict=True)  # RepDistiller, mdistiller, KD-Zoo; the authors, in metric learning: 2

    @model_validator(mode="after")
    def _something_is_left(self) -> RKDOptions:
        if self.distance == self.angle == 0:
            raise ValueError("distance=0 and angle=0 leave no loss; set one of them above 0")
        return self


@register
class RKD(Method):
    """The student's embeddings lie to each other as the teacher's do, up to scale and rotation."""

    name = "rkd"
    paper = Paper("W. Park, D. Kim, Y. Lu, M. Cho", "Relational Knowledge Distillation", "CVPR", 2019, "https://arxiv.org/abs/1904.05068")
    kind = "relations"
    terms = ("rkd",)
    Options = RKDOptions
    options: RKDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        if self.options.angle:
            why = "and points on a line have no angles; set options.rkd.angle=0 or choose a network with a wider embedding"
            for spec in (student, teacher):
                two_dimensions(spec, self.name, why)
        self.needs = Needs(embedding=True)

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """1: the factors of the two parts are options (25 and 50: RepDistiller, mdistiller, KD-Zoo)."""
        return {"rkd": 1.0}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``rkd``."""
        factors = ((self.options.distance, distance_loss), (self.options.angle, angle_loss))
        losses = [factor * loss(student.embedding, teacher.embedding) for factor, loss in factors if factor]
        return {"rkd": torch.stack(losses).sum()}
