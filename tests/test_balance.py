"""Classes of unequal size: scikit-learn's weights, torch's weighted loss in parts and on ranks, epochs that show each class as often."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cohorts import CPU, a_cohort
from helpers.small import config
from helpers.task import STILL, answers, first_epoch
from scipy.stats import chisquare
from sklearn.utils.class_weight import compute_class_weight

from flowdistill import UserError, ranks
from flowdistill.data.balance import weighted, weights_of
from flowdistill.data.batches import DeviceData, SeedBatches, StreamedData
from flowdistill.data.dataset import ImageData, Unlabelled
from flowdistill.data.streaming import Shot
from flowdistill.ledger import Ledger
from flowdistill.ranks import Ranks
from flowdistill.runner import run
from flowdistill.runner.plan import refuse_classes
from flowdistill.training.gathering import whole_batch
from flowdistill.training.parts import cut
from flowdistill.training.task import task_loss
from flowdistill.types import NO_LABEL, Batch, Targets

COUNTS = [50, 30, 7, 1]
LABELS = np.repeat(np.arange(4), COUNTS)
WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
CHANCE = torch.Generator().manual_seed(0)
LOGITS = torch.randn(12, 4, dtype=torch.float64, generator=CHANCE) * 3
SOME = torch.tensor([0, 0, 0, 1, 2, 0, 1, 3, 0, 1, 0, 2])


def uneven() -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (88, 6, 5, 1), dtype=np.uint8)
    return ImageData("uneven", images, LABELS, images[:8], np.arange(8) % 4, 4, pad=1)


# Weights


@pytest.mark.parametrize("counts", [COUNTS, [3, 3], [5], [1, 1]])
def test_balanced_weights_are_scikit_learns(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    found = weights_of("balanced", torch.from_numpy(labels), len(counts))
    assert found is not None
    np.testing.assert_allclose(found.numpy(), compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels), rtol=1e-6)
    assert float(found[labels].mean()) == pytest.approx(1)


def test_weights_are_those_of_the_images_trained_on() -> None:
    """Not of the held-out tenth, nor of images without a label."""
    data = replace(uneven(), unlabelled=Unlabelled("more", uneven().x_test))
    stream = SeedBatches(DeviceData(data, "holdout", CPU), 0, 8, class_weights="balanced")
    labels = stream.data.labels[stream.data.labels != NO_LABEL].numpy()
    assert len(labels) == 88 - 5 - 3 - 1
    np.testing.assert_allclose(stream.weights.numpy(), compute_class_weight("balanced", classes=np.arange(4), y=labels), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_weighted_task_is_torchs_and_a_loop_s(smoothing: float) -> None:
    found = task_loss(LOGITS, Batch(SOME, targets=weighted(SOME, WEIGHTS)), smoothing)
    assert float(found) == pytest.approx(float(F.cross_entropy(LOGITS, SOME, WEIGHTS, label_smoothing=smoothing)), rel=1e-12)
    total = weight = 0.0
    for row, label in zip(LOGITS.log_softmax(1).tolist(), SOME.tolist(), strict=True):
        q = [(1 - smoothing) * (k == label) + smoothing / 4 for k in range(4)]
        total -= sum(float(WEIGHTS[k]) * q[k] * row[k] for k in range(4))
        weight += float(WEIGHTS[label])
    assert float(found) == pytest.approx(total / weight, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_of_mixed_labels_it_is_torchs_for_probabilities(smoothing: float) -> None:
    """Which divides by the number of images, not by their weights."""
    partners, share = SOME.roll(1), torch.tensor([0.3], dtype=torch.float64)
    found = task_loss(LOGITS, Batch(None, targets=Targets(SOME, torch.tensor(12), partners, share, WEIGHTS)), smoothing)
    probabilities = 0.3 * F.one_hot(SOME, 4).double() + 0.7 * F.one_hot(partners, 4).double()
    assert float(found) == pytest.approx(float(F.cross_entropy(LOGITS, probabilities, WEIGHTS, label_smoothing=smoothing)), rel=1e-12)


def test_equal_weights_of_any_size_are_the_plain_task() -> None:
    for weight in (1.0, 7.0):
        batch = Batch(SOME, targets=weighted(SOME, torch.full((4,), weight, dtype=torch.float64)))
        assert float(task_loss(LOGITS, batch)) == pytest.approx(float(task_loss(LOGITS, Batch(SOME))), rel=1e-12)


def test_images_without_a_label_weigh_nothing() -> None:
    labels = SOME.clone()
    labels[3:] = NO_LABEL
    found = task_loss(LOGITS, Batch(None, targets=weighted(labels, WEIGHTS)))
    assert float(found) == pytest.approx(float(F.cross_entropy(LOGITS[:3], labels[:3], WEIGHTS)), rel=1e-12)
    labels[:] = NO_LABEL
    assert float(task_loss(LOGITS, Batch(None, targets=weighted(labels, WEIGHTS)))) == 0


def test_bf16_logits_are_weighed_in_float32() -> None:
    found = task_loss(LOGITS.bfloat16(), Batch(SOME, targets=weighted(SOME, WEIGHTS.float())))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(F.cross_entropy(LOGITS.bfloat16().float(), SOME, WEIGHTS.float())), rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_mean_over_parts_and_over_ranks_is_the_whole_batch_s(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts weigh differently, so that each one's own weighted mean would be another figure."""
    how = {"class_weights": (0.5, 1.0, 3.0, 20.0), **({"mixup": 0.4, "cutmix": 1.0} if mixed else {})}
    on_device = DeviceData(uneven(), "full", CPU)
    logits = torch.randn(88, 4, generator=torch.Generator().manual_seed(1))  # by the image's index
    whole = [batch for _, batch in SeedBatches(on_device, 0, 24, **how).epoch(0)]
    tasks = [float(task_loss(logits[batch.indices], batch, 0.1)) for batch in whole]
    if not mixed:
        torchs = [
            float(F.cross_entropy(logits[b.indices], b.labels, torch.tensor(how["class_weights"]), label_smoothing=0.1)) for b in whole
        ]
        assert tasks == pytest.approx(torchs, rel=1e-5)
        apart = [
            np.mean(
                [float(F.cross_entropy(logits[i], on_device.labels[i], torch.tensor(how["class_weights"]))) for i in b.indices.chunk(3)]
            )
            for b in whole
        ]
        assert apart != pytest.approx(torchs, rel=1e-2)
    for batch, task in zip(whole, tasks, strict=True):
        parts = [float(task_loss(logits[own.indices], own, 0.1)) for _, _, own in cut(3, batch.indices, None, batch)]
        assert sum(parts) / 3 == pytest.approx(task, rel=1e-5)
    of_ranks = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "_current", Ranks(rank, 2))
        of_ranks.append([batch for _, batch in SeedBatches(on_device, 0, 24, **how).epoch(0)])
    for task, *parts in zip(tasks, *of_ranks, strict=True):
        assert [len(own.indices) for own in parts] == [12, 12]
        assert mixed or all(torch.equal(own.labels, on_device.labels[own.indices]) for own in parts)
        assert np.mean([float(task_loss(logits[own.indices], own, 0.1)) for own in parts]) == pytest.approx(task, rel=1e-5)
        in_parts = [float(task_loss(logits[o.indices], o, 0.1)) for own in parts for _, _, o in cut(2, own.indices, None, own)]
        assert np.mean(in_parts) == pytest.approx(task, rel=1e-5)


def test_what_ranks_put_together_again_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(SOME, torch.arange(12), targets=weighted(SOME, WEIGHTS))

    class Doubled(Ranks):
        def gathered(self, own: torch.Tensor) -> torch.Tensor:
            return torch.cat([own, own])

    together = whole_batch(replace(batch, targets=batch.targets._replace(counted=batch.targets.counted / 2)), Doubled(0, 2))
    assert float(together.targets.counted) == float(batch.targets.counted)
    assert together.targets.weights is batch.targets.weights
    assert together.targets.labels.tolist() == SOME.tolist() * 2


def test_training_weighs_the_task_and_no_term_of_a_method(data: ImageData, small_npz: Path) -> None:
    terms = []
    for weights in ("none", "balanced", [1.0, 9.0, *[1.0] * 8]):
        run_ = config(small_npz, method="kd+dkd", teacher="-", train={**STILL, "class_weights": weights})
        cohort, (student,) = a_cohort(data, [run_])
        each = compute_class_weight("balanced", classes=np.arange(10), y=data.y_train) if weights == "balanced" else weights
        slow = []
        for images, batch in cohort.seed_groups[0].batches.epoch(0):
            given = None if weights == "none" else torch.tensor(each, dtype=torch.float64)
            slow.append(float(F.cross_entropy(torch.from_numpy(answers(student, images)), batch.labels, given)))
        terms.append(first_epoch(cohort, student))
        assert terms[-1]["task"] == pytest.approx(sum(slow) / len(slow), rel=1e-6)
    assert len({round(found["task"], 5) for found in terms}) == 3
    assert [[found[term] for term in ("kd", "dkd")] for found in terms] == [[terms[0][term] for term in ("kd", "dkd")]] * 3


# Draws


@pytest.mark.parametrize("kind", [DeviceData, StreamedData])
def test_an_epoch_shows_as_many_images_of_each_class(kind: Any) -> None:
    """88 draws of 4 classes are 22 of each; every image of a class comes equally often, or once more."""
    data = uneven()
    stream = SeedBatches(kind(data, "full", CPU, 0), 0, 8, balanced=True)
    orders = []
    for number in range(3):
        shown = [batch for _, batch in stream.epoch(number)]
        indices = torch.cat([batch.indices for batch in shown]).numpy()
        assert (stream.steps, len(indices)) == (11, 88)
        assert np.bincount(LABELS[indices]).tolist() == [22] * 4
        assert torch.cat([batch.labels for batch in shown]).tolist() == LABELS[indices].tolist()
        for label, count in enumerate(COUNTS):
            times = np.bincount(indices, minlength=88)[label == LABELS]
            assert {22 // count} <= {*times} <= {22 // count, -(-22 // count)}
        orders.append(indices.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert (
        orders[1]
        == torch.cat([batch.indices for _, batch in SeedBatches(kind(data, "full", CPU, 0), 0, 8, balanced=True).epoch(1)]).tolist()
    )
    assert (
        orders[1]
        != torch.cat([batch.indices for _, batch in SeedBatches(kind(data, "full", CPU, 0), 1, 8, balanced=True).epoch(1)]).tolist()
    )


def test_what_does_not_divide_goes_to_classes_at_random() -> None:
    data = replace(uneven(), x_train=uneven().x_train[:-2], y_train=np.repeat(np.arange(3), [50, 30, 6]), classes=3)
    stream = SeedBatches(DeviceData(data, "full", CPU), 0, 86, balanced=True)
    counts = np.array([np.bincount(data.y_train[stream.draws(number).order]) for number in range(600)])
    assert {*counts.flatten()} == {28, 29}
    assert (counts.sum(1) == 86).all()
    assert chisquare((counts == 28).sum(0)).pvalue > 1e-3
    places = np.stack([data.y_train[stream.draws(number).order][:1] for number in range(600)])
    assert chisquare(np.bincount(places[:, 0])).pvalue > 1e-3, "classes are shuffled, not in turn"


def test_crops_are_those_of_a_shuffled_epoch_and_even_classes_lose_nobody() -> None:
    data = replace(uneven(), y_train=np.arange(88) % 4)
    plain, balanced = (SeedBatches(DeviceData(data, "full", CPU), 0, 8, balanced=even).draws(3) for even in (False, True))
    assert balanced.order.sort().values.tolist() == list(range(88))
    assert not balanced.times.any()
    assert plain.times is None
    for part in ("rows", "columns", "flips"):
        assert torch.equal(getattr(plain, part), getattr(balanced, part))


def test_a_streamed_image_that_comes_again_is_augmented_anew() -> None:
    images = replace(uneven(), crop="resized", pad=0, x_train=np.random.default_rng(1).integers(0, 256, (88, 16, 16, 1), dtype=np.uint8))
    stream = SeedBatches(StreamedData(images, "full", CPU, 0), 0, 88, balanced=True)
    ((shown, batch),) = stream.epoch(0)
    same = shown[batch.indices == 87]  # the only one of its class
    assert len(same) == 22
    assert len({one.numpy().tobytes() for one in same}) > 15
    assert Shot(0, 5).named == Shot(0, 5, 0).named == "5"  # as it was when each image came once
    assert len({Shot(0, 5, 1).named, Shot(0, 5, 2).named, Shot(0, 51).named, "5"}) == 4


@pytest.mark.parametrize("kind", [DeviceData, StreamedData])
def test_two_ranks_are_shown_the_balanced_images_of_one(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = replace(uneven(), crop="resized", pad=0)
    how = {"balanced": True, "random_erasing": 0.5}
    whole = list(SeedBatches(kind(images, "full", CPU, 0), 0, 8, **how).epoch(1))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "_current", Ranks(rank, 2))
        parts.append(list(SeedBatches(kind(images, "full", CPU, 0), 0, 8, **how).epoch(1)))
    for (shown, batch), (one, its), (other, others) in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([one, other]), shown)
        assert torch.equal(torch.cat([its.labels, others.labels]), batch.labels)


# What can't be had


@pytest.mark.parametrize("key", ["class_weights", "sampling"])
@pytest.mark.parametrize(("names", "which"), [((), "3, 4"), (("a", "b", "c", "d", "e"), "d, e")])
def test_a_class_without_an_image_is_refused(small_npz: Path, key: str, names: tuple[str, ...], which: str) -> None:
    """Such as a Hugging Face data set or a folder may name."""
    gap = replace(uneven(), y_train=LABELS.clip(max=2), classes=5, class_names=names)
    with pytest.raises(UserError) as caught:
        refuse_classes(config(small_npz, train={key: "balanced"}), gap)
    assert str(caught.value) == f"train.{key}=balanced: no image to train on has class {which}; add some, or leave it out"


def test_weights_are_one_for_each_class(ledger: Ledger, small_npz: Path) -> None:
    with pytest.raises(UserError) as caught:
        run([config(small_npz, train={"class_weights": [1, 2, 3]})], ledger, CPU)
    assert str(caught.value) == f"train.class_weights: 3 numbers for the 10 classes of {small_npz.stem}; give one for each"


def test_a_method_that_remembers_each_image_is_refused(ledger: Ledger, small_npz: Path) -> None:
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 1})], ledger, CPU)
    with pytest.raises(UserError) as caught:
        run([config(small_npz, method="crd", teacher="1", train={"sampling": "balanced"})], ledger, CPU)
    why = "method 'crd' remembers each image by itself, and a batch may have one twice"
    assert str(caught.value) == f"train.sampling=balanced: {why}; leave one of them out"


def test_a_run_counts_the_images_that_it_was_shown(ledger: Ledger, small_npz: Path) -> None:
    """An epoch is as many draws as there are images, whatever they are."""
    made = [run([config(small_npz, train={"epochs": 1, "sampling": how})], ledger, CPU)[0] for how in ("shuffled", "balanced")]
    assert [round(one.images_per_second * one.train_seconds) for one in made] == [256, 256]
    assert made[0].fingerprint != made[1].fingerprint
