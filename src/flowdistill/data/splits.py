"""Which images of a data set are trained on: a fixed choice, the same for every run."""

from __future__ import annotations

import numpy as np

from .dataset import Labels

CHOICE_SEED = 0  # fixed: every run of a data set gets the same images
HOLDOUT_PART = 10  # a tenth of each class is held out


def stratified(labels: Labels, part: int, whole: int, *, least: int = 0) -> Labels:
    """Positions of a fixed random choice of images: ``part``/``whole`` of each class, rounded half up, and at least ``least``."""
    chance = np.random.default_rng(CHOICE_SEED)
    chosen = []
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        chosen.append(chance.permutation(positions)[: max(least, (2 * len(positions) * part + whole) // (2 * whole))])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def holdout_positions(labels: Labels) -> Labels:
    """Positions of the held-out images of a training set: a tenth of each class, rounded half up, the same for every run."""
    return stratified(labels, 1, HOLDOUT_PART)


def trained_positions(labels: Labels, split: str) -> Labels:
    """Positions of the images that a run of this split trains on."""
    positions = np.arange(len(labels))
    return np.setdiff1d(positions, holdout_positions(labels)) if split == "holdout" else positions
