"""crd's negatives and memory banks."""

from __future__ import annotations

import pytest
import torch
from helpers.method_cases import method_context
from helpers.pairs import PAIRS
from helpers.scenes import scene
from torch import Tensor

from flowdistill.methods.crd import CRD
from flowdistill.randomness import seeded
from flowdistill.types import Batch, DataSpec, MethodContext

DATA = DataSpec("tiny", n_train=30, classes=5, channels=3, height=8, width=8)
STUDENT, TEACHER = PAIRS["even"]


def a_method(seed: int = 0, **options: object) -> CRD:
    with seeded(seed, "adapters"):
        method = CRD({"negatives": 600, "dim": 4, **options}, student=STUDENT, teacher=TEACHER, data=DATA)
    method.setup(method_context(TEACHER))
    return method


def banks(method: CRD) -> tuple[Tensor, Tensor]:
    return method.held("bank_student").clone(), method.held("bank_teacher").clone()


def test_negatives_are_all_images_of_other_classes_alike() -> None:
    method = a_method(negatives=24_000)
    labels = torch.arange(30) % 5
    found = method.negatives(labels[:7], torch.arange(7), 0)
    for image, row in enumerate(found):
        counts = row.bincount(minlength=30)
        assert (counts[labels == labels[image]] == 0).all()
        others = counts[labels != labels[image]].double()
        assert (others - 1000).abs().max() < 5 * 1000**0.5  # Poisson


def test_negatives_differ_by_image_epoch_and_seed_and_repeat_themselves() -> None:
    images = labels = torch.arange(2)
    method = a_method()
    first = method.negatives(labels, images, 0)
    assert torch.equal(first, a_method().negatives(labels, images, 0))
    assert not torch.equal(first[0], first[1])
    for other in (method.negatives(labels, images, 1), a_method(seed=1).negatives(labels, images, 0)):
        assert (other == first).double().mean() < 0.1


def test_a_step_moves_the_rows_of_its_images_alone_half_way_and_to_norm_1() -> None:
    method, given = a_method(), scene(PAIRS["even"])
    before = banks(method)
    method.double()(*given)
    rest = [row for row in range(30) if row not in (0, 3, 6)]
    parts = ((method.embed_student, given.student.embedding), (method.embed_teacher, given.teacher.embedding))
    for (layer, embedding), old, new in zip(parts, before, banks(method), strict=True):
        assert torch.equal(new[rest], old[rest].double())
        latest = layer(embedding)
        expected = 0.5 * old[[0, 3, 6]] + 0.5 * latest / latest.norm(dim=1, keepdim=True)
        torch.testing.assert_close(new[[0, 3, 6]], expected / expected.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-7)


def test_the_divisor_is_that_of_the_first_batch() -> None:
    method, given = a_method().double(), scene(PAIRS["even"])
    method(*given)
    mean = method.held("mean_student").clone()
    assert mean > 0
    method(given.student._replace(embedding=given.student.embedding.flip(0)), given.teacher, given.batch)
    assert torch.equal(method.held("mean_student"), mean)


def test_labels_that_can_not_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^crd: 29 labels for banks of 30 images; give both for the same training set$"):
        a_method().setup(MethodContext(labels=torch.arange(29) % 5))
    with pytest.raises(ValueError, match=r"^crd: all training images are of one class, so there are no negatives; choose other data "):
        a_method().setup(MethodContext(labels=torch.zeros(30, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"^crd: give Batch\(labels, indices\)"):
        a_method()(*scene(PAIRS["even"])[:2], Batch(torch.arange(3)))
