"""Images without labels: the student learns from the teacher on them, and neither the task nor a figure counts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cohorts import a_cohort
from helpers.small import config
from helpers.task import STILL, answers, first_epoch, slow_task
from PIL import Image
from sklearn.datasets import load_digits

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.config import DataConfig, RunConfig, validate
from flowdistill.data import image_files
from flowdistill.data.batches import DeviceData, SeedBatches
from flowdistill.data.dataset import ImageData, Unlabelled
from flowdistill.data.sources import load, load_unlabelled
from flowdistill.ledger import Ledger
from flowdistill.methods.kd import kd_loss
from flowdistill.report import tables
from flowdistill.runner import run
from flowdistill.runner.evaluate import evaluate
from flowdistill.runner.plan import plan
from flowdistill.talk import Remarks
from flowdistill.training.gradients import first_gradients
from flowdistill.training.method_context import class_means
from flowdistill.training.task import task_loss
from flowdistill.types import NO_LABEL, Batch, Targets

CPU = torch.device("cpu")


def digits(n: int = 120) -> np.ndarray:
    """Real digits of 8x8 that the small data set has not."""
    return (load_digits().images[500 : 500 + n] * 15).astype(np.uint8)


@pytest.fixture(scope="module")
def both(data: ImageData) -> ImageData:
    """300 images with labels and 120 without."""
    return replace(data, pad=1, flip=False, unlabelled=Unlabelled("more", digits()[..., None]))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("more") / "more.npz"
    np.savez(path, x=digits())
    return path


def with_more(small_npz: Path, more: str, **keys: Any) -> RunConfig:
    """kd by run 1 on the small data and these unlabelled images."""
    plain = config(small_npz, **{"method": "kd", "teacher": "1", **keys})
    return validate(plain.model_dump() | {"data": plain.data.model_dump() | {"unlabelled": more}})


def test_an_epoch_shows_every_image_and_normalises_by_the_labelled(both: ImageData, data: ImageData) -> None:
    for split, labelled in (("full", 300), ("holdout", 270)):
        plain, found = (DeviceData(images, split, CPU) for images in (replace(data, pad=1, flip=False), both))
        assert (found.num_labelled, len(found.labels)) == (labelled, labelled + 120)
        assert found.normalisation == plain.normalisation
        assert torch.equal(found.labels[:labelled], plain.labels)
        assert torch.equal(found.epoch_images.labels, plain.epoch_images.labels)
        batches = [batch for _, batch in SeedBatches(found, 0, 10).epoch(0)]
        assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(labelled + 120))
        for batch in batches:
            assert batch.labels is None
            expected = found.labels[batch.indices].where(batch.indices < labelled, NO_LABEL)
            assert torch.equal(batch.targets.labels, expected)
            assert int(batch.targets.counted) == max(1, int((batch.indices < labelled).sum()))


LOGITS = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("labels", [[3, -1, 0, -1, 2], [-1, -1, 1, -1, -1], [-1] * 5])
def test_the_task_is_that_of_the_labelled_images_alone(labels: list[int], smoothing: float) -> None:
    logits, given = LOGITS.clone().requires_grad_(), torch.tensor(labels)
    counted = (given >= 0).sum().clamp(min=1)
    found = task_loss(logits, Batch(None, targets=Targets(given, counted)), smoothing)
    assert found.item() == pytest.approx(slow_task(LOGITS.numpy(), labels, smoothing), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient[given < 0].abs().sum() == 0
    assert (gradient[given >= 0].abs().sum(1) > 0).all()
    mixed = Targets(given, counted, given.roll(1), torch.tensor([0.25], dtype=torch.float64))
    own, other = (slow_task(LOGITS.numpy(), values, smoothing) for values in (labels, [labels[-1], *labels[:-1]]))
    assert float(task_loss(LOGITS, Batch(None, targets=mixed), smoothing)) == pytest.approx(0.25 * own + 0.75 * other, rel=1e-12)


def test_the_teacher_is_followed_on_all_images_and_the_task_on_the_labelled(both: ImageData, small_npz: Path) -> None:
    """An epoch of both terms against loops over its batches; the unlabelled images move the gradient of kd, and not that of the task."""
    cohort, (student,) = a_cohort(both, [config(small_npz, method="kd", teacher="-", train={**STILL, "batch_size": 20})])
    seed_group, task, kd, apart = cohort.seed_groups[0], [], [], []
    assert seed_group.teacher is not None
    for images, batch in seed_group.batches.epoch(0):
        logits, teacher_outputs = answers(student, images), seed_group.teacher.teach(images).logits
        task.append(slow_task(logits, batch.targets.labels.tolist()))
        kd.append(float(kd_loss(torch.from_numpy(logits), teacher_outputs, 4.0)))
        given = student.net.train()(images).logits
        gradient = torch.autograd.grad(kd_loss(given, teacher_outputs, 4.0), given)[0]
        apart.append(float(gradient[batch.targets.labels == NO_LABEL].abs().sum()))
    assert len(task) == 420 // 20
    assert first_epoch(cohort, student) == pytest.approx({"task": sum(task) / len(task), "kd": sum(kd) / len(kd)}, rel=1e-4)
    assert min(apart) > 0


def test_gradients_are_told_on_the_first_batch_with_a_label(both: ImageData, small_npz: Path) -> None:
    few = replace(both, x_train=both.x_train[:6], y_train=both.y_train[:6])
    cohort, (student,) = a_cohort(few, [config(small_npz, method="kd", teacher="-", train={"batch_size": 6})])
    student.begin_phase(0)
    assert not (next(cohort.seed_groups[0].batches.epoch(0))[1].targets.labels >= 0).any()
    assert 0 < first_gradients(cohort)[student]["kd"] < 1e6


def test_class_means_are_of_the_labelled_images(both: ImageData, data: ImageData) -> None:
    plain, found = (DeviceData(images, "full", CPU) for images in (replace(data, pad=1, flip=False), both))
    net = models.build("resnet14", data.spec, seed=9).eval()
    assert torch.equal(class_means(net, found, "fp32"), class_means(net, plain, "fp32"))


def test_a_run_is_recorded_beside_those_without_and_measured_on_the_same_test(small_npz: Path, more: Path, ledger: Ledger) -> None:
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 1}), config(small_npz)], ledger, CPU)
    plain, kd = run([config(small_npz, method="kd", teacher="1"), with_more(small_npz, f"npz:{more}")], ledger, CPU)
    assert (plain.variant, kd.variant) == ("", "unlabelled=more")
    assert kd.data_hash == plain.data_hash
    assert kd.fingerprint != plain.fingerprint
    assert (kd.images, kd.status) == (150, "finished")
    assert "unlabelled=more" in tables.summary_table(ledger.runs(), "last", "md")
    rows = tables.summary_rows(ledger.runs(), "last")
    assert [row["base"] is not None for row in rows if row["method"] == "kd"] == [True, True], "both are compared with base"
    more_again = run([with_more(small_npz, f"npz:{more}")], ledger, CPU)
    assert more_again == [kd]
    moved = more.rename(more.with_name("moved.npz"))
    assert evaluate(ledger.run_folder(kd.no) / "student.safetensors", CPU).data == "as trained"
    moved.rename(more)


def test_other_unlabelled_images_are_another_run(small_npz: Path, tmp_path: Path, ledger: Ledger) -> None:
    found = []
    for name, changed in (("a", 0), ("b", 0), ("c", 1)):
        images = digits()
        images[0, 0, 0] += changed
        np.savez(tmp_path / f"{name}.npz", x=images)
        teacher = {"method": "dml", "teacher": None}
        found.append(plan([with_more(small_npz, f"npz:{tmp_path / name}.npz", **teacher)], ledger, CPU)[0])
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert [job.variant for job in found] == [f"peer=resnet8, unlabelled={name}" for name in "abc"]
    assert found[0].method().needs.context == frozenset()


def test_files_are_read_in_any_folders_at_the_size_and_channels_of_the_labelled(
    tmp_path: Path, data: ImageData, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each against the same images as an array; a colour file of another size is made grey and resized."""
    pool = tmp_path / "pool"
    (pool / "deep" / "er").mkdir(parents=True)
    images = digits(3)
    for image, name in zip(images, ("a.png", "deep/b.png", "deep/er/c.bmp"), strict=True):
        Image.fromarray(image).save(pool / name)
    (pool / "notes.txt").write_text("no image")
    found = load_unlabelled(DataConfig(name="digits", unlabelled=f"folder:{pool}"), data, Remarks())
    assert (found.name, found.images.tolist()) == ("pool", images[..., None].tolist())
    assert capsys.readouterr().err == f"folder:{pool}: left out, as no image: notes.txt\n"
    large = Image.fromarray(np.kron(images[0], np.ones((4, 4), np.uint8))).convert("RGB")
    large.save(pool / "deep" / "large.png")
    again = load_unlabelled(DataConfig(name="digits", unlabelled=f"folder:{pool}"), data).images
    assert again.shape == (4, 8, 8, 1)
    assert np.abs(again[3].astype(int) - images[0][..., None]).mean() < 40


def test_files_that_memory_does_not_hold_are_refused(tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, image in enumerate(digits(3)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    wanted = DataConfig(name="digits", unlabelled=f"folder:{tmp_path}")
    monkeypatch.setattr(image_files, "memory", lambda: 2 * 3 * 64)
    assert len(load_unlabelled(wanted, data).images) == 3
    monkeypatch.setattr(image_files, "memory", lambda: 2 * 3 * 64 - 1)
    line = "3 images of 8x8x1 take 192 bytes, over half of this machine's memory (191); set data.size lower, or give fewer images"
    with pytest.raises(UserError) as told:
        load_unlabelled(wanted, data)
    assert str(told.value) == f"folder:{tmp_path}: {line}"


def test_broken_files_are_refused_or_skipped_even_if_all_are(tmp_path: Path, data: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"junk")
    wanted = {"name": "digits", "unlabelled": f"folder:{tmp_path}"}
    with pytest.raises(UserError, match=r"2 of 2 images can't be read: a\.png \(no image of a known format\), b\.png"):
        load_unlabelled(DataConfig.model_validate(wanted), data)
    with pytest.raises(UserError, match=r"no image .* is in it; name a folder with images"):
        load_unlabelled(DataConfig.model_validate(wanted | {"skip_broken": True}), data)
    Image.fromarray(digits(1)[0]).save(tmp_path / "b.png")
    capsys.readouterr()
    assert len(load_unlabelled(DataConfig.model_validate(wanted | {"skip_broken": True}), data, Remarks()).images) == 1
    assert "1 of 2 images can't be read: a.png" in capsys.readouterr().err


def test_loading_a_data_set_leaves_out_its_unlabelled_images(small_npz: Path) -> None:
    assert load(DataConfig(name=f"npz:{small_npz}", unlabelled="npz:none.npz")).unlabelled is None
