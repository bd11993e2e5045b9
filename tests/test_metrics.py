"""Top-5, macro-F1, balanced accuracy and confusions: against other libraries, by hand, and as a run keeps them."""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support, top_k_accuracy_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from flowdistill.metrics import UNANSWERED, Answers, Confusion, Kept, packed, unpacked
from flowdistill.training.evaluate import among_top

RNG = np.random.default_rng(0)


def answers(labels: list[int] | np.ndarray, classes: list[int] | np.ndarray, count: int, in_top5: np.ndarray | None = None) -> Answers:
    found = np.asarray(classes)
    probabilities = np.where(found == UNANSWERED, np.nan, 0.5).astype(np.float32)
    top5 = np.asarray(labels) == found if in_top5 is None else in_top5
    return Answers(np.asarray(labels), found, probabilities, top5, count)


def random_case(images: int, count: int, absent: int, skill: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels and answers; ``absent`` classes are nobody's label, and ``skill`` of the answers are right."""
    labels = RNG.integers(0, count - absent, images)
    return labels, np.where(RNG.random(images) < skill, labels, RNG.integers(0, count, images))


CASES = {
    "many": random_case(2_000, 100, 0, 0.7),
    "absent from the labels": random_case(300, 12, 4, 0.5),
    "more classes than images": random_case(20, 1_000, 500, 0.3),
    "two classes, unequal": (np.array([0] * 95 + [1] * 5), np.array([0] * 100)),
    "one class in all labels": (np.zeros(30, int), RNG.integers(0, 3, 30)),
    "one answer for all": (RNG.integers(0, 7, 50), np.full(50, 3)),
    "all wrong": (np.arange(10), (np.arange(10) + 1) % 10),
    "all right": (np.arange(10), np.arange(10)),
    "one image": (np.array([2]), np.array([1])),
    "a class that is neither": (np.array([0, 0, 2, 2]), np.array([0, 2, 2, 0])),
}


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_scikit_learn(name: str) -> None:
    labels, classes = CASES[name]
    count = int(max(labels.max(), classes.max())) + 1
    found = answers(labels, classes, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn warns of classes that no image has
        balanced, f1 = balanced_accuracy_score(labels, classes), f1_score(labels, classes, average="macro", zero_division=0)
        by_class = precision_recall_fscore_support(labels, classes, labels=range(count), zero_division=np.nan)
    assert found.figures.macro_f1 == pytest.approx(100 * f1)
    assert found.figures.balanced_accuracy == pytest.approx(100 * balanced)
    assert found.figures.accuracy == pytest.approx(100 * (labels == classes).mean())
    for mine, theirs in zip((found.by_class.precision, found.by_class.recall, found.by_class.f1), by_class, strict=False):
        np.testing.assert_allclose(mine, 100 * theirs)
    np.testing.assert_array_equal(found.by_class.images, by_class[3])
    np.testing.assert_array_equal(found.matrix(), confusion_matrix(labels, classes, labels=range(count)))


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_torchmetrics(name: str) -> None:
    """Its macro accuracy also counts a class that no image has and one was taken for, so it is compared where there is none."""
    labels, classes = CASES[name]
    count = int(max(labels.max(), classes.max())) + 1
    found, how = answers(labels, classes, count).figures, {"num_classes": count, "average": "macro"}
    if count > 1:
        tensors = torch.from_numpy(classes), torch.from_numpy(labels)
        assert found.macro_f1 == pytest.approx(100 * float(multiclass_f1_score(*tensors, **how)), rel=1e-5)
        if set(classes) <= set(labels):
            assert found.balanced_accuracy == pytest.approx(100 * float(multiclass_accuracy(*tensors, **how)), rel=1e-5)


def test_figures_by_hand() -> None:
    """Class 0: 3 images, 2 right, taken for it 3; class 1: 1 image, right, taken for it 1; class 2: nobody's, taken for it 0."""
    found = answers([0, 0, 0, 1, 3], [0, 0, 3, 1, 0], 4)
    assert found.figures.balanced_accuracy == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert found.figures.macro_f1 == pytest.approx(100 * (2 * 2 / (3 + 3) + 1 + 0) / 3)
    np.testing.assert_allclose(found.by_class.recall, [200 / 3, 100, np.nan, 0])


def test_guessing_the_frequent_class_has_the_accuracy_and_not_the_balance() -> None:
    figures = answers(*CASES["two classes, unequal"], 2).figures
    assert (figures.accuracy, figures.balanced_accuracy) == (95, 50)


def test_an_unanswered_image_is_nobodys_prediction() -> None:
    found = answers([0, 1, 1], [0, UNANSWERED, 1], 6)
    assert found.figures.correct == 2
    assert found.by_class.images.tolist() == [1, 2, 0, 0, 0, 0]
    assert found.by_class.taken.tolist() == [1, 1, 0, 0, 0, 0]
    assert found.figures.balanced_accuracy == 75
    assert found.matrix().sum() == 2
    assert found.confusions(10) == []


# Top-5


def top5(logits: list[list[float]] | Tensor, labels: list[int]) -> list[bool]:
    return among_top(torch.as_tensor(logits), torch.tensor(labels)).tolist()


@pytest.mark.parametrize("count", [6, 10, 1_000])
def test_top5_is_that_of_scikit_learn(count: int) -> None:
    logits, labels = RNG.normal(size=(400, count)), RNG.integers(0, count, 400)
    logits[np.arange(400), labels] += 1
    found = np.array(top5(torch.from_numpy(logits), labels.tolist()))
    assert found.mean() == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(count)))
    assert found[logits.argmax(1) == labels].all()


def test_of_equally_probable_classes_lower_numbers_come_first() -> None:
    even = torch.zeros(8, 8)
    assert top5(even, list(range(8))) == [True] * 5 + [False] * 3
    sure = [[9.0, 0, 0, 0, 0, 0, 0]] * 7
    assert top5(sure, list(range(7))) == [True] * 5 + [False] * 2
    last_is_sure = [[0.0, 0, 0, 0, 0, 0, 9]] * 7
    assert top5(last_is_sure, list(range(7))) == [True] * 4 + [False] * 2 + [True]


def test_ties_are_told_apart_as_the_most_probable_class_is() -> None:
    """Few values, so that many are equal: top-1 by this rule is argmax."""
    logits, labels = torch.from_numpy(RNG.integers(0, 3, (500, 9))).float(), torch.from_numpy(RNG.integers(0, 9, 500))
    np.testing.assert_array_equal(among_top(logits, labels, 1), logits.max(1).indices == labels)
    np.testing.assert_array_equal(
        among_top(logits, labels), (torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :5] == labels[:, None]).any(1)
    )


@pytest.mark.parametrize(("count", "shown"), [(2, None), (5, None), (6, 3)])
def test_top5_says_nothing_of_five_classes(count: int, shown: int | None) -> None:
    figures = answers([0, 1, 0], [0, 0, 1], count, np.ones(3, bool)).figures
    assert figures.top5 == shown
    assert figures.top5_accuracy == (None if shown is None else 100)


# Confusions


def test_the_most_frequent_confusions_come_first_and_ties_by_number() -> None:
    labels = [0] * 3 + [1] * 5 + [2] * 4
    classes = [1, 1, 0, 1, 1, 1, 2, 2, 0, 2, 2, UNANSWERED]
    found = answers(labels, classes, 3)
    assert found.confusions(10) == [Confusion(0, 1, 2), Confusion(1, 2, 2), Confusion(2, 0, 1)]
    assert found.confusions(1) == [Confusion(0, 1, 2)]


def test_confusions_of_many_classes_need_no_matrix() -> None:
    labels = np.array([59_999, 59_999, 1])
    assert answers(labels, np.array([59_998, 59_998, 1]), 60_000).confusions(3) == [Confusion(59_999, 59_998, 2)]


# The file


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    test, held = answers([0, 1, 6], [0, UNANSWERED, 5], 7), answers([6, 6], [6, 0], 7, np.array([True, True]))
    (tmp_path / "predictions.npz").write_bytes(packed(Kept(test, held)))
    found = unpacked(tmp_path / "predictions.npz")
    assert found is not None
    for before, after in zip((test, held), found, strict=True):
        assert after is not None
        for field in dataclasses.fields(Answers):
            np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))
        assert after.figures == before.figures
    assert packed(found) == packed(Kept(test, held))


def test_more_classes_than_two_bytes_count_come_back(tmp_path: Path) -> None:
    (tmp_path / "predictions.npz").write_bytes(packed(Kept(answers([69_999, 4], [4_463, 69_999], 70_000))))
    found = unpacked(tmp_path / "predictions.npz")
    assert found is not None
    assert (found.test.labels.tolist(), found.test.classes.tolist()) == ([69_999, 4], [4_463, 69_999])


def test_what_an_older_version_kept_has_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "old.npz", classes=np.zeros(3, np.uint16), probabilities=np.ones(3, np.float32))
    assert unpacked(tmp_path / "old.npz") is None


SOUND = {
    "num_classes": np.uint16(6),
    "labels": np.array([0, 5], np.uint16),
    "classes": np.array([0, 1], np.uint16),
    "probabilities": np.ones(2, np.float32),
    "in_top5": np.ones(2, bool),
}


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.array([0, 6], np.uint16)},
        {"classes": np.array([0, 7], np.uint16)},
        {"labels": np.array([0], np.uint16)},
        {"labels": np.array([0.0, 1.0])},
        {"in_top5": np.ones(2, np.float32)},
        {"num_classes": np.array([1, 2])},
        {name: np.zeros((1, 2), array.dtype) for name, array in SOUND.items() if name != "num_classes"},
        {name: array[:0] for name, array in SOUND.items() if name != "num_classes"},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(change: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **(SOUND | change))
    with pytest.raises(ValueError):
        unpacked(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no arrays", "missing", "cut"])
def test_what_is_no_file_of_arrays_is_refused(content: bytes | str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    kept = {name: array for name, array in SOUND.items() if content != "missing" or name != "in_top5"}
    np.savez(buffer, **kept)
    whole = buffer.getvalue()
    (tmp_path / "bad.npz").write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2] if content == "cut" else whole)
    with pytest.raises(ValueError):
        unpacked(tmp_path / "bad.npz")
