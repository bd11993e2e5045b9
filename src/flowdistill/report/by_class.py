"""Figures by class, and which classes are taken for which, as rows of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..metrics import Answers, Kept

CLASS, TRUE = "class", "true class"
MATRIX_CLASSES = 12  # up to so many classes the matrix itself is shown
CONFUSIONS = 10  # how many are named where there are more


def class_rows(kept: Kept, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class: how many images it has, the share of them that is right, and F1, in percent; of the test images, and of the held-out
    ones in columns of their own. None where a class has no image.
    """
    rows: list[dict[str, Any]] = [{CLASS: name} for name in names]
    for split, answers in kept._asdict().items():
        if answers is not None:
            counts = answers.by_class
            for row, images, recall, f1 in zip(rows, counts.images, counts.recall, counts.f1, strict=True):
                row |= {f"{split} images": int(images), f"{split} right %": _cell(recall), f"{split} F1 %": _cell(f1)}
    return rows


def _cell(percent: float) -> float | None:
    return None if math.isnan(percent) else round(float(percent), 2)


def confusion_rows(answers: Answers, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of few classes the matrix: one row a true class, one column for each class that its images are taken for. Of many the most frequent
    confusions, one a row; none if every image is right.
    """
    if len(names) <= MATRIX_CLASSES:
        columns = [name if names.count(name) == 1 and name != TRUE else f"{name} ({at})" for at, name in enumerate(names)]
        return [
            {TRUE: name, **dict(zip(columns, map(str, counts), strict=True))} for name, counts in zip(names, answers.matrix(), strict=True)
        ]
    images = answers.by_class.images
    return [
        {"confusion": f"{names[label]} taken for {names[said]}", "images": f"{times:,} of {images[label]:,}"}
        for label, said, times in answers.confusions(CONFUSIONS)
    ]
