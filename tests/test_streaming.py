"""Images that memory does not hold: decoded batch by batch, the same whatever decodes them, and trained on as those in memory are."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
from helpers.command import command
from helpers.image_files import NAMES, csv_data, digits, folder_data, on, write
from helpers.interruptions import Cut, Scissors, outcome
from helpers.small import config
from PIL import Image
from torch.utils.data._utils import signal_handling

from flowdistill.checks import UserError
from flowdistill.data import image_files, normalisation
from flowdistill.data.augment import boxes
from flowdistill.data.batches import DeviceData, SeedBatches, StreamedData, to_device
from flowdistill.data.dataset import ImageData, Unlabelled
from flowdistill.data.lazy_images import Pictures
from flowdistill.data.sources import read_npz
from flowdistill.data.streaming import StreamedSet
from flowdistill.ledger import Ledger
from flowdistill.lock import held
from flowdistill.randomness import generator, seeded
from flowdistill.runner import evaluate, execute, export, resume, run
from flowdistill.runner.card import measure
from flowdistill.types import NO_LABEL

CPU = torch.device("cpu")
SIDES = [(9, 12), (20, 8), (8, 8), (15, 31), (16, 16), (11, 10)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """90 digits to train on and 30 to test on, in folders."""
    write(tmp_path / "birds" / "train", *digits(90))
    write(tmp_path / "birds" / "test", *digits(30, 90))
    return tmp_path / "birds"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Colour images of several sizes: 24 to train on, 12 to test on."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, number in itertools.product(NAMES, range(count)):
            path = tmp_path / "mixed" / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 256, (*SIDES[number % 6], 3), dtype=np.uint8)).save(path)
    return tmp_path / "mixed"


def epoch(data: ImageData, number: int = 0, *, seed: int = 0, workers: int = 0, split: str = "full", **keys: Any) -> list[Any]:
    """An epoch's batches of ten: images, labels, indices."""
    stream = SeedBatches(to_device(data, split, CPU, workers), seed, 10, **keys)
    found = [(images, batch.labels, batch.indices) for images, batch in stream.epoch(number)]
    stream.close()
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    """To the bit and in memory alike, so that no engine computes from one what it would not from the other."""
    pairs = [(a, b) for batch, its in zip(one, other, strict=True) for a, b in zip(batch, its, strict=True)]
    return all(a is b or (torch.equal(a, b) and a.stride() == b.stride()) for a, b in pairs)


def images(found: list[Any]) -> torch.Tensor:
    return torch.cat([batch[0] for batch in found])


# The same pixels as in memory


def test_images_are_evaluated_as_they_are_in_memory(mixed: Path) -> None:
    held, streamed = folder_data(mixed, size=7), folder_data(mixed, size=7, stream=True)
    assert isinstance(streamed.x_train, Pictures)
    np.testing.assert_array_equal(streamed.x_train[:], held.x_train)
    np.testing.assert_array_equal(streamed.x_test[np.array([3, 1])], held.x_test[[3, 1]])
    for split in ("full", "holdout"):
        streamed_data, held_data = to_device(streamed, split, CPU, 0), to_device(held, split, CPU)
        assert (streamed_data.normalisation, streamed_data.spec) == (held_data.normalisation, held_data.spec)
        for streamed_set, held_set in (
            (streamed_data.test, held_data.test),
            (streamed_data.epoch_images, held_data.epoch_images),
            (streamed_data.train_eval, held_data.train_eval),
        ):
            assert same(list(streamed_set.batches()), list(held_set.batches()))
            assert len(streamed_set) == len(held_set)


def test_evaluation_goes_by_batches_that_cover_all_images_once(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.data.interfaces.BATCH_PIXELS", 5 * 7 * 7)
    test = to_device(folder_data(mixed, size=7, stream=True), "full", CPU, 0).test
    assert isinstance(test, StreamedSet)
    parts = list(test.batches())
    assert [len(labels) for _, labels in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([labels for _, labels in parts]), torch.arange(3).repeat_interleave(4))


@pytest.mark.parametrize("keys", [{"pad": 1}, {"pad": 0, "flip": False}, {"pad": 2, "limit_train": 60}], ids=str)
@pytest.mark.parametrize("mixup", [False, True])
def test_shifted_batches_are_those_of_memory_bit_for_bit(small: Path, keys: dict[str, Any], mixup: bool) -> None:
    held, streamed = (folder_data(small, **keys, **more) for more in ({}, {"stream": True}))
    assert streamed.crop == "shift"
    for number, split in ((0, "full"), (3, "holdout")):
        assert same(*(epoch(data, number, split=split, mixup=mixup) for data in (held, streamed)))


@pytest.mark.parametrize("method", ["base", "dml"])
def test_training_is_that_of_memory_bit_for_bit(small: Path, ledger: Ledger, method: str) -> None:
    """A method whose two students are measured in one pass, too."""
    held, streamed = (run([on(f"folder:{small}", method=method, data=data)], ledger, CPU, workers=0)[0] for data in ({}, {"stream": True}))
    assert (held.weights_hash, held.correct, held.images) == (streamed.weights_hash, streamed.correct, streamed.images)
    assert ledger.epochs(held.no)[0].terms == ledger.epochs(streamed.no)[0].terms
    assert held.fingerprint != streamed.fingerprint


def test_mixed_and_smoothed_training_is_that_of_memory_bit_for_bit(small: Path, ledger: Ledger) -> None:
    """With RandAugment and without, by processes and by none."""
    train = {"epochs": 2, "batch_size": 30, "lr": 0.05, "precision": "fp32", "mixup": 0.2, "label_smoothing": 0.1}

    def done(workers: int, data: dict[str, Any], **changed: Any) -> tuple[Any, Any]:
        (one,) = run([on(f"folder:{small}", data=data, train=train | changed)], ledger, CPU, workers=workers, again=True)
        return one.weights_hash, [epoch.terms for epoch in ledger.epochs(one.no)]

    for augmented in ({}, {"randaugment": 9}):
        held = done(0, augmented)
        assert held == done(0, augmented | {"stream": True, "crop": "shift"})
        assert held == done(2, augmented | {"stream": True, "crop": "shift", "size": 8})
        for changed in ({"mixup": False}, {"label_smoothing": 0.0}):
            assert held[0] != done(0, augmented, **changed)[0]
    assert done(0, {})[0] != held[0]


def test_class_means_are_those_of_memory(small: Path, ledger: Ledger) -> None:
    """A method that is told of every training image before it begins."""
    run([on(f"folder:{small}", seed=9), on(f"folder:{small}", seed=9, data={"stream": True})], ledger, CPU, workers=0)
    held, streamed = (
        run([on(f"folder:{small}", method="nd", teacher="resnet8", data=data)], ledger, CPU, workers=0)[0]
        for data in ({}, {"stream": True})
    )
    assert held.weights_hash == streamed.weights_hash


# A function of seed, epoch and place alone


KINDS: dict[str, dict[str, Any]] = {
    "resized": {"size": 7},
    "resized, with RandAugment": {"size": 7, "randaugment": 9},
    "shifted, with RandAugment": {"size": 7, "randaugment": 9, "pad": 1},
}


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS.keys())
def test_the_number_of_workers_changes_nothing(mixed: Path, keys: dict[str, Any]) -> None:
    data = folder_data(mixed, **{"pad": None} | keys, stream=True)
    state = torch.get_rng_state()
    plain = epoch(data, 1)
    assert torch.equal(torch.get_rng_state(), state)
    for workers in (1, 2):
        assert same(epoch(data, 1, workers=workers), plain)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    for other in (epoch(data, 2), epoch(data, 1, seed=1)):
        assert not torch.equal(images(other), images(plain))


def test_an_epoch_can_be_left_and_others_follow(mixed: Path) -> None:
    """By the processes that were kept: what they had decoded ahead belongs to no other epoch."""
    stream = SeedBatches(to_device(folder_data(mixed, size=7, stream=True, pad=None), "full", CPU, 2), 0, 4)
    want = {number: [batch for batch, _ in stream.epoch(number)] for number in range(3)}
    for number in (2, 0, 1):
        next(stream.epoch(0))
        assert all(torch.equal(one, other) for (one, _), other in zip(stream.epoch(number), want[number], strict=True))
    stream.close()
    gc.collect()
    assert torch.equal(next(stream.epoch(1))[0], want[1][0])


def test_a_box_of_the_decoded_image_is_enlarged_as_torchvision_does(mixed: Path) -> None:
    data = folder_data(mixed, size=7, stream=True, pad=None, flip=False)
    assert (data.crop, data.pad) == ("resized", 0)
    on_device = to_device(data, "full", CPU, 0)
    assert isinstance(on_device, StreamedData)
    for shown, _, indices in epoch(data, 2, seed=5):
        for image, index in zip(shown, indices.tolist(), strict=True):
            whole = Image.open(mixed / "train" / NAMES[index // 8] / f"{index % 8}.png")
            box = boxes(1, (whole.height, whole.width), generator(5, f"box {index}", 2))[0].tolist()
            want = tv.functional.resized_crop(whole, *box, size=[7, 7])
            assert torch.equal(image, on_device.normalise(torch.from_numpy(np.array(want))[None])[0])


def test_a_flip_is_drawn_for_each_image(mixed: Path) -> None:
    turned, plain = (images(epoch(folder_data(mixed, size=7, stream=True, pad=None, flip=flip))) for flip in (True, False))
    mirrored = [bool(torch.equal(one, other.flip(2))) for one, other in zip(turned, plain, strict=True)]
    assert all(torch.equal(one, other) != flip for one, other, flip in zip(turned, plain, mirrored, strict=True))
    assert 3 < sum(mirrored) < 17


@pytest.mark.parametrize("crop", ["shift", "resized"])
@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_of_images_in_memory_is_torchvisions(small_npz: Path, crop: str, channels: int) -> None:
    data = replace(read_npz(small_npz), pad=0, flip=False)
    data = replace(data, x_train=data.x_train.repeat(channels, 3), x_test=data.x_test.repeat(channels, 3))
    on_device, plain = to_device(replace(data, randaugment=9), "full", CPU, 0), to_device(data, "full", CPU)
    shown, batch = next(SeedBatches(on_device, 3, 20).epoch(1))
    for image, index in zip(shown, batch.indices.tolist(), strict=True):
        with seeded(3, f"randaugment {index}", 1):
            want = tv.RandAugment(2, 9)(Image.fromarray(data.x_train[index].squeeze()))
        assert torch.equal(image, plain.normalise(torch.from_numpy(np.array(want).reshape(1, 8, 8, channels)))[0])
    assert on_device.normalisation == plain.normalisation
    assert same(list(on_device.test.batches()), list(plain.test.batches()))
    assert torch.equal(batch.labels, torch.from_numpy(data.y_train)[batch.indices])
    cropped = replace(data, randaugment=0, crop=crop)
    assert same(epoch(cropped), epoch(cropped, workers=1))


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_unlabelled_images_are_augmented_beside_the_labelled(small_npz: Path, crop: str) -> None:
    """As if they had labels; what is measured, and told of classes, is of the labelled alone."""
    whole = replace(read_npz(small_npz), pad=0, flip=False, crop=crop, randaugment=9)
    some = replace(whole, x_train=whole.x_train[:200], y_train=whole.y_train[:200])
    both = replace(some, unlabelled=Unlabelled("more", whole.x_train[200:]))
    with_unlabelled, labelled, all_labelled = (to_device(data, "full", CPU, 0) for data in (both, some, whole))
    assert with_unlabelled.normalisation == labelled.normalisation != all_labelled.normalisation
    assert same(list(with_unlabelled.train_eval.batches()), list(labelled.train_eval.batches()))
    labels = torch.from_numpy(whole.y_train)
    labels[200:] = NO_LABEL
    all_labelled.normalise = with_unlabelled.normalise
    for (shown, batch), (wanted, known) in zip(
        SeedBatches(with_unlabelled, 3, 20).epoch(1), SeedBatches(all_labelled, 3, 20).epoch(1), strict=True
    ):
        assert torch.equal(shown, wanted)
        assert torch.equal(batch.indices, known.indices)
        assert (batch.labels, batch.targets.labels.tolist()) == (None, labels[batch.indices].tolist())
    assert same(epoch(both), epoch(both, workers=1))


def test_randaugment_belongs_to_the_recipe(small_npz: Path, ledger: Ledger) -> None:
    def with_(randaugment: int | None) -> Any:
        own = config(small_npz, train={"epochs": 1})
        return own.model_copy(update={"data": own.data.model_copy(update={"randaugment": randaugment})})

    plain, weak, strong = run([with_(magnitude) for magnitude in (None, 1, 9)], ledger, CPU, workers=0)
    assert len({one.fingerprint for one in (plain, weak, strong)}) == len({one.weights_hash for one in (plain, weak, strong)}) == 3
    assert plain.data_hash == weak.data_hash
    assert ("randaugment" in plain.config["data"], strong.config["data"]["randaugment"]) == (False, 9)


# What does not fit into memory


def few(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(image_files, "memory", lambda: memory)


def test_what_does_not_fit_is_streamed_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "test"), NAMES, range(40)):
        path = tmp_path / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    taken = 240 * 64 * 64 * 3
    few(monkeypatch, 2 * taken - 2)
    for name, value in (("MEASURED", 8), ("AT_ONCE", 4)):
        monkeypatch.setattr(normalisation, name, value)
    monkeypatch.setattr("flowdistill.data.interfaces.BATCH_PIXELS", 10 * 64 * 64)
    epoch(folder_data(tmp_path, pad=None, limit_train=12))  # imports what it needs
    peaks = []
    for _ in range(2):  # twice, for the interpreter's table of interned names may grow by megabytes in one of them
        gc.collect()
        tracemalloc.start()
        data = folder_data(tmp_path, pad=None)
        on_device = to_device(data, "full", CPU, 0)
        shown = [len(batch.indices) for _, batch in SeedBatches(on_device, 0, 10).epoch(0)]
        tested = sum(len(labels) for _, labels in on_device.test.batches())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (data.streamed, data.crop, sum(shown), tested) == (True, "resized", 120, 120)
        assert (on_device.resident, hasattr(on_device, "padded")) == (False, False)
    assert min(peaks) < taken / 3


def test_a_run_that_memory_made_streamed_stays_streamed_where_memory_is_larger(
    small: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        few(patch, 10_000)
        (done,) = run([on(f"folder:{small}", data={"pad": None})], ledger, CPU, workers=0)
    line = f"folder:{small}: 120 images of 8x8x1 take 7,680 bytes, over half of this machine's memory (5,000): they are streamed\n"
    assert line in capsys.readouterr().err
    assert {key: done.config["data"][key] for key in ("stream", "crop", "pad", "flip")} == {
        "stream": True,
        "crop": "resized",
        "pad": 0,
        "flip": False,
    }
    (again,) = run([on(f"folder:{small}", data={"pad": None, "stream": True, "crop": "resized"})], ledger, CPU, workers=0)
    assert again.no == done.no
    measured = evaluate(ledger.run_folder(done.no) / "student.safetensors", CPU, workers=0)
    assert (measured.correct, measured.data) == (done.correct, "as trained")


def test_what_fits_is_held(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, 2 * 120 * 64)
    data = folder_data(small)
    assert (data.streamed, type(to_device(data, "full", CPU))) == (False, DeviceData)


def test_the_hash_is_of_names_sizes_and_classes(small: Path) -> None:
    before = folder_data(small, stream=True).hash
    assert before == folder_data(small, stream=True).hash != folder_data(small).hash
    assert before != folder_data(small, stream=True, size=7).hash != folder_data(small, stream=True, limit_train=80).hash != before
    first = small / "train" / "ant" / "0000.png"
    content = first.read_bytes()
    first.write_bytes(content + b"\0")
    assert folder_data(small, stream=True).hash != before
    first.write_bytes(content)
    assert folder_data(small, stream=True).hash == before
    first.rename(first.with_name("0000a.png"))
    assert folder_data(small, stream=True).hash != before


def test_without_a_split_the_streamed_fifth_is_chosen_by_the_names(tmp_path: Path) -> None:
    shown, labels = digits(60)
    write(tmp_path / "a", shown, labels)
    before = folder_data(tmp_path / "a", stream=True).x_test[:]
    for path in sorted((tmp_path / "a").rglob("*.png")):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    after = folder_data(tmp_path / "a", stream=True)
    assert len(after.y_test) == len(folder_data(tmp_path / "a").y_test)
    np.testing.assert_array_equal(after.x_test[:], 255 - before)


def test_a_csv_is_streamed_too(small: Path) -> None:
    rows = [f"{path.relative_to(small)},{path.parent.name},{path.parts[-3]}" for path in sorted(small.rglob("*.png"))]
    (small / "a.csv").write_text("\n".join(["path,label,split", *rows]))
    held, streamed = csv_data(small / "a.csv"), csv_data(small / "a.csv", stream=True)
    np.testing.assert_array_equal(streamed.x_train[:], held.x_train)


def test_unlabelled_images_beside_streamed_ones_are_refused(small: Path, ledger: Ledger) -> None:
    beside = on(f"folder:{small}", method="kd", teacher="resnet8", data={"stream": True, "unlabelled": f"folder:{small}"})
    with pytest.raises(UserError) as told:
        run([beside], ledger, CPU)
    assert str(told.value) == (
        f"data.unlabelled=folder:{small}: unlabelled images are held in memory beside the labelled ones, but folder:{small} is streamed; "
        f"leave data.stream out or set data.size lower, so that it is held, or leave unlabelled out"
    )
    assert ledger.runs() == []


# Runs


def configs(small: Path, **keys: Any) -> list[Any]:
    train = {"epochs": 2, "batch_size": 30, "lr": 0.05, "precision": "fp32"}
    data = {"stream": True, "crop": "resized", "pad": 0, "flip": True, "randaugment": 5, "size": 7}
    return [on(f"folder:{small}", data=data, train=train, seed=seed, **keys) for seed in (0, 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_straight(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)
    straight, cut = (Ledger(tmp_path / name, create=True) for name in ("straight", "cut"))
    done = run(configs(small), straight, CPU, workers=0)
    with pytest.raises(Cut):
        run(configs(small), cut, CPU, workers=workers, watcher=Scissors(5))
    assert len(cut.epochs(1)) == 1
    resumed = resume(cut, CPU, workers=0)
    assert [outcome(one, cut) for one in resumed] == [outcome(one, straight) for one in done]
    straight.close()
    cut.close()


def test_a_student_does_not_depend_on_its_company(small: Path, ledger: Ledger) -> None:
    (teacher,) = run([on(f"folder:{small}", seed=9, data={"stream": True, "size": 7})], ledger, CPU, workers=0)
    alone = run(configs(small)[:1], ledger, CPU, workers=0)[0]
    together = run([*configs(small), *configs(small, method="kd", teacher=str(teacher.no))], ledger, CPU, workers=0, again=True)
    assert together[0].weights_hash == alone.weights_hash
    assert together[0].cohort is not None


def test_a_streamed_student_is_carded_and_exported(small: Path, ledger: Ledger) -> None:
    (done,) = run(configs(small)[:1], ledger, CPU, workers=0)
    path = ledger.run_folder(done.no) / "student.safetensors"
    assert measure(done.no, ledger, CPU, batch_size=2).score.correct == done.correct
    assert export(path, "safetensors").images == 30


def test_the_command_line_streams(small: Path) -> None:
    words = "train --model resnet8 --dataset folder:birds --set data.stream=true --set data.size=8 --epochs 1 --batch-size 30 --workers 1"
    said = command(small.parent, *words.split(), "--precision", "fp32")
    assert (said.code, "finished" in said.out) == (0, True), said.err
    assert command(small.parent, *["resume", "--workers", "0"]).code == 0


# Files that can't be decoded


def spoil(path: Path) -> bytes:
    """A file whose header is sound and whose pixels are not, of the size that it had; what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[:45] + bytes(len(whole) - 45))
    return whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_decoded_ends_the_run_which_goes_on_when_it_is_mended(small: Path, tmp_path: Path, workers: int) -> None:
    straight, cut = (Ledger(tmp_path / name, create=True) for name in ("straight", "cut"))
    done = run(configs(small), straight, CPU, workers=0)
    broken = small / "test" / "bee" / f"{np.flatnonzero(digits(30, 90)[1] == 1)[2]:04}.png"
    whole = spoil(broken)
    with pytest.raises(UserError) as told:
        run(configs(small), cut, CPU, workers=workers)
    name = broken.relative_to(small)
    assert str(told.value).startswith(f"folder:{small}: {name} can't be decoded (")
    assert str(told.value).endswith("mend it, or replace such images with --set data.skip_broken=true")
    assert "\n" not in str(told.value)
    assert [(one.status, one.error) for one in cut.runs()] == [("interrupted", str(told.value))] * 2
    broken.write_bytes(whole)
    assert [outcome(one, cut) for one in resume(cut, CPU, workers=0)] == [outcome(one, straight) for one in done]
    straight.close()
    cut.close()


def test_a_file_that_cannot_be_decoded_is_replaced_by_the_next_of_its_class(small: Path, ledger: Ledger) -> None:
    before = folder_data(small)
    bees = sorted((small / "train" / "bee").iterdir())
    first, last = (np.flatnonzero(before.y_train == 1)[to_device] for to_device in (0, -1))
    for path in (bees[0], bees[1], bees[-1]):
        spoil(path)
    data = folder_data(small, stream=True, skip_broken=True)
    np.testing.assert_array_equal(data.x_train[np.array([first, last])], before.x_train[np.array([first + 2, first + 2])])
    on_device = to_device(data, "full", CPU, 1)
    shown = [batch for _, batch in SeedBatches(on_device, 0, 90).epoch(0)]
    assert on_device.remarks() == [
        "3 images could not be decoded, and others of their classes took their places: "
        + ", ".join(str(path.relative_to(small)) for path in (bees[0], bees[1], bees[-1]))
    ]
    assert torch.equal(shown[0].labels, torch.from_numpy(before.y_train)[shown[0].indices])
    watcher = Scissors()
    run([on(f"folder:{small}", data={"stream": True, "skip_broken": True})], ledger, CPU, workers=0, watcher=watcher)
    assert next(line for line in watcher.lines if "3 images could not be decoded" in line).startswith("run 1: ")


def test_a_class_of_broken_files_is_told(small: Path) -> None:
    for path in (small / "train" / "bee").iterdir():
        spoil(path)
    data = folder_data(small, stream=True, skip_broken=True)
    with pytest.raises(UserError, match=r"train/bee/\d+.png can't be decoded \(.*\); no image of its class can be"):
        to_device(data, "full", CPU, 0)


def test_an_image_of_another_size_than_its_header_said_is_told(small: Path) -> None:
    """A file that was written anew since."""
    shutil.rmtree(small / "test")
    for path in small.rglob("*.png"):
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(path)
    data = folder_data(small / "train", stream=True)
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(next((small / "train" / "bee").iterdir()))
    with pytest.raises(UserError, match="8x9 pixels where others have 9x8"):
        to_device(data, "full", CPU, 0)


def test_a_process_that_decodes_holds_no_lock_of_its_parent(ledger: Ledger, mixed: Path) -> None:
    """Else a run that was killed would count as running for as long as they live."""
    stream = SeedBatches(to_device(folder_data(mixed, size=7, stream=True, pad=None), "full", CPU, 1), 0, 4)
    with ledger.lock(1):
        list(stream.epoch(0))
        assert held(ledger.lock(1).path)
    assert not held(ledger.lock(1).path)
    assert len(list(stream.epoch(1))) == 6, "by the same process"


def test_a_worker_that_is_killed_is_told_in_one_line(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SeedBatches(to_device(folder_data(mixed, size=7, stream=True, pad=None), "full", CPU, 0), 0, 4)
    stream._fetch.workers.count = 1
    monkeypatch.setattr(Pictures, "shown", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a process that decodes was killed \(.*\); resume with fewer --workers, or 0"):
        list(stream.epoch(0))


def test_a_worker_that_is_killed_between_two_batches_stops_nothing_else(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that computes may be anywhere, in the ledger's transaction too."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a process that had no other loader
    stream = SeedBatches(to_device(folder_data(mixed, size=7, stream=True, pad=None), "full", CPU, 1), 0, 4)
    others = multiprocessing.active_children()
    list(stream.epoch(0))
    (worker,) = [child for child in multiprocessing.active_children() if child not in others]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)  # torch's handler would raise here
    with pytest.raises(UserError, match=r"a process that decodes was killed \(.*\); resume with fewer --workers, or 0"):
        list(stream.epoch(1))
