"""What a network's answers to labelled images are worth: in all, by class, and which classes it takes for which. Torch-free.

A finished run keeps its answers in ``predictions.npz``, which this module writes and reads.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TOP = 5  # an image counts for top-5 if its class is among so many most probable
UNANSWERED = -1  # stands for the class of an image whose logits are not finite
HOLDOUT = "holdout_"  # begins the keys of the answers to held-out images

Classes = npt.NDArray[np.integer]
Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.floating]


class Figures(NamedTuple):
    """Figures over a set of images.

    Attributes:
        images: number of images.
        correct: how many of them the network gets right.
        top5: for how many the true class is among the five most probable; None if there are no more than five classes.
        macro_f1: percent; the mean of F1 over the classes that an image has or was taken for.
        balanced_accuracy: percent; the mean over the classes that an image has of the share of their images that is right.
    """

    images: int
    correct: int
    top5: int | None
    macro_f1: float
    balanced_accuracy: float

    @property
    def accuracy(self) -> float:
        """Percent of the images that are right."""
        return 100 * self.correct / self.images

    @property
    def top5_accuracy(self) -> float | None:
        """Percent of the images whose class is among the five most probable; None if there are no more than five classes."""
        return None if self.top5 is None else 100 * self.top5 / self.images


class ByClass(NamedTuple):
    """Counts of each class [K].

    Attributes:
        images: how many images have it.
        taken: how many images were taken for it.
        right: how many both.
    """

    images: Counts
    taken: Counts
    right: Counts

    @property
    def recall(self) -> Values:
        """[K] the share of a class's images that is right, in percent; NaN for a class that no image has."""
        return _percent(self.right, self.images)

    @property
    def precision(self) -> Values:
        """[K] the share that is right of what was taken for a class, in percent; NaN for a class that nothing was taken for."""
        return _percent(self.right, self.taken)

    @property
    def f1(self) -> Values:
        """[K] the harmonic mean of recall and precision, in percent: 0 where nothing is right, NaN where both are NaN."""
        return _percent(2 * self.right, self.images + self.taken)


class Confusion(NamedTuple):
    """How often images of class ``label`` were taken for class ``said``."""

    label: int
    said: int
    times: int


@dataclass(frozen=True, eq=False)
class Answers:
    """A network's answers to labelled images.

    Attributes:
        labels: [N] the true classes.
        classes: [N] the most probable classes; ``UNANSWERED`` for an image whose logits are not finite, which never counts as right.
        probabilities: [N] their probabilities; NaN for such an image.
        in_top5: [N] whether the true class is among the five most probable.
        num_classes: K.
    """

    labels: Classes
    classes: Classes
    probabilities: Values
    in_top5: npt.NDArray[np.bool_]
    num_classes: int

    @cached_property
    def figures(self) -> Figures:
        """The figures over all images."""
        counts = self.by_class
        top5 = int(self.in_top5.sum()) if self.num_classes > TOP else None
        return Figures(len(self.labels), int(counts.right.sum()), top5, float(np.nanmean(counts.f1)), float(np.nanmean(counts.recall)))

    @cached_property
    def by_class(self) -> ByClass:
        """The counts of each class."""
        answered = self.classes[self.classes != UNANSWERED]
        right = self.labels[self.labels == self.classes]
        return ByClass(*(np.bincount(classes, minlength=self.num_classes) for classes in (self.labels, answered, right)))

    def confusions(self, most: int) -> list[Confusion]:
        """The ``most`` frequent confusions of one class with another; of equally frequent ones those of lower class numbers first."""
        wrong = (self.labels != self.classes) & (self.classes != UNANSWERED)
        pairs, times = np.unique(self.labels[wrong].astype(np.int64) * self.num_classes + self.classes[wrong], return_counts=True)
        order = np.argsort(-times, kind="stable")[:most]
        return [Confusion(*divmod(int(pairs[place]), self.num_classes), int(times[place])) for place in order]

    def matrix(self) -> Counts:
        """[K, K] how many images of the row's class were taken for the column's class."""
        answered = self.classes != UNANSWERED
        pairs = self.labels[answered].astype(np.int64) * self.num_classes + self.classes[answered]
        return np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)


def _percent(part: Counts, whole: Counts) -> Values:
    percent: Values = np.divide(100.0 * part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return percent


class Kept(NamedTuple):
    """What a run keeps of its answers.

    Attributes:
        test: to the test images.
        holdout: to the held-out images; None for a run that held none out.
    """

    test: Answers
    holdout: Answers | None = None


def packed(kept: Kept) -> bytes:
    """The bytes of ``predictions.npz``: for every test image its label, the most probable class, that class's probability, and whether the
    label is among the five most probable. The held-out images' have keys of their own.
    """
    arrays = {"num_classes": np.uint32(kept.test.num_classes)} | _arrays(kept.test, "")
    if kept.holdout is not None:
        arrays |= _arrays(kept.holdout, HOLDOUT)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _arrays(answers: Answers, prefix: str) -> dict[str, npt.NDArray[np.generic]]:
    answered, number = answers.classes != UNANSWERED, np.uint16 if answers.num_classes <= 1 << 16 else np.uint32
    return {
        f"{prefix}classes": np.where(answered, answers.classes, 0).astype(number),
        f"{prefix}probabilities": np.where(answered, answers.probabilities, np.nan).astype(np.float32),
        f"{prefix}labels": answers.labels.astype(number),
        f"{prefix}in_top5": answers.in_top5,
    }


def unpacked(path: Path) -> Kept | None:
    """What a run's ``predictions.npz`` holds; None if it has no labels, as that of a run which an older version recorded.

    Raises:
        OSError: it can't be read.
        ValueError: it is not what a run writes.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "labels" not in arrays:
                return None
            count = int(arrays["num_classes"])
            test, holdout = (
                _answers({name: arrays[f"{prefix}{name}"] for name in _KINDS}, count) if f"{prefix}labels" in arrays else None
                for prefix in ("", HOLDOUT)
            )
    except (LookupError, TypeError, AttributeError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"not a file of arrays ({error})") from None
    assert test is not None, "its labels are there"
    return Kept(test, holdout)


_KINDS = {"labels": "u", "classes": "u", "probabilities": "f", "in_top5": "b"}  # numpy's letters for types of any width


def _answers(arrays: Mapping[str, npt.NDArray[Any]], count: int) -> Answers:
    """Answers that are read from a file.

    Raises:
        ValueError: the arrays do not fit each other.
    """
    labels, classes = arrays["labels"], arrays["classes"]
    if any(array.dtype.kind != _KINDS[name] for name, array in arrays.items()):
        raise ValueError("its arrays are of other types")
    if len({array.shape for array in arrays.values()}) > 1 or labels.ndim != 1 or not len(labels):
        raise ValueError("its arrays are of different lengths")
    if max(labels.max(), classes.max()) >= count:
        raise ValueError(f"it has a class beyond its {count}")
    said = np.where(np.isfinite(arrays["probabilities"]), classes.astype(np.int64), UNANSWERED)
    return Answers(labels.astype(np.int64), said, arrays["probabilities"], arrays["in_top5"], count)
