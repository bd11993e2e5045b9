"""Classes by the nearest training images: weighted k nearest neighbours, as backbones are measured in the literature.

Wu et al. 2018 (Unsupervised Feature Learning via Non-Parametric Instance Discrimination), section 3.4, with the temperature 0.07; k = 20 is
what DINO's evaluation reports (Caron et al. 2021, section 4.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
TEMPERATURE = 0.07
AT_ONCE = 1000  # images whose neighbours are looked for in one product


def nearest_classes(features: Tensor, train: Tensor, labels: Tensor, classes: int, k: int = NEIGHBOURS) -> Tensor:
    """[n] the class with the largest vote: v_c = sum over the k nearest i of class c of exp(cos(f, t_i) / T).

    Of classes with equal votes the lowest number is taken.

    Args:
        features: [n, D] of the images to be classified.
        train: [m, D] of the training images.
        labels: [m] their classes.
        classes: K.
        k: 1 to m.
    """
    known, answers = F.normalize(train), []
    for part in torch.split(F.normalize(features), AT_ONCE):
        similarity, nearest = (part @ known.T).topk(k, 1)
        weights = ((similarity - 1) / TEMPERATURE).exp()  # a common factor, so that none overflows
        votes = torch.zeros(len(part), classes, dtype=weights.dtype).scatter_add_(1, labels[nearest], weights)
        answers.append((votes == votes.amax(1, keepdim=True)).int().argmax(1))
    return torch.cat(answers)
