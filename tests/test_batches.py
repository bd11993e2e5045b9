"""The split, the statistics, and one stream of batches a seed."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from flowdistill.checks import UserError
from flowdistill.data.batches import DeviceData, Normalisation, SeedBatches
from flowdistill.data.dataset import ImageData
from flowdistill.data.splits import holdout_positions

CPU = torch.device("cpu")


def data(
    n: int = 100, classes: int = 5, channels: int = 3, pad: int = 1, flip: bool = True, y_train: np.ndarray | None = None
) -> ImageData:
    """Random images 6x8; label i mod classes unless given."""
    chance = np.random.default_rng(0)
    y_train = np.arange(n) % classes if y_train is None else y_train
    x_train = chance.integers(0, 256, (len(y_train), 6, 8, channels), dtype=np.uint8)
    x_test = chance.integers(0, 256, (20, 6, 8, channels), dtype=np.uint8)
    return ImageData("some", x_train, y_train, x_test, np.arange(20) % classes, classes, pad, flip)


def flat(n: int = 200, classes: int = 5, pad: int = 1) -> ImageData:
    """Image i is all pixels i, so that a batch tells which images it holds; labels in a random order."""
    values = np.arange(n, dtype=np.uint8)[:, None, None, None]
    labels = np.random.default_rng(1).permutation(np.arange(n) % classes)
    images = np.broadcast_to(values, (n, 6, 8, 1)).copy()
    return ImageData("flat", images, labels, images[:10], labels[:10], classes, pad)


def numbers(images: torch.Tensor, normalisation: Normalisation) -> list[int]:
    """Which of the flat images a normalised batch holds."""
    assert torch.equal(images, images[:, :, :1, :1].expand_as(images))
    pixels = (images[:, 0, 0, 0].double() * normalisation.std[0] + normalisation.mean[0]) * 255
    assert (pixels - pixels.round()).abs().max() < 1e-3
    return pixels.round().int().tolist()


UNBALANCED = np.random.default_rng(2).permutation(np.repeat(np.arange(4), [500, 100, 40, 10]))


def test_holdout_is_a_tenth_of_each_class():
    held = holdout_positions(UNBALANCED)
    assert np.bincount(UNBALANCED[held]).tolist() == [50, 10, 4, 1]
    assert held.dtype == np.int64
    assert len(set(held.tolist())) == len(held)
    assert held.tolist() == sorted(held)


def test_holdout_of_cifars_size_is_5000():
    held = holdout_positions(np.arange(50_000) % 10)
    assert np.bincount(held % 10).tolist() == [500] * 10


def test_holdout_is_fixed_and_reads_no_global_generator():
    np.random.seed(0)
    first = holdout_positions(UNBALANCED)
    np.random.seed(1)
    np.testing.assert_array_equal(holdout_positions(UNBALANCED), first)


def test_holdout_positions_are_the_ones_that_recorded_runs_kept_out():
    held = holdout_positions(UNBALANCED)
    assert held[:8].tolist() == [2, 5, 15, 41, 45, 61, 62, 73]
    assert hashlib.sha256(held.tobytes()).hexdigest()[:16] == "e5bbe166b62f0f2a"


def test_holdout_is_a_random_tenth_of_a_class_not_its_first_or_every_tenth():
    held = holdout_positions(np.zeros(1000, np.int64))
    assert len(held) == 100
    assert len(set(np.diff(held).tolist())) > 10
    assert held.min() < 100
    assert held.max() >= 900


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_numpys_in_float64(channels):
    images = data(channels=channels).x_train
    found = Normalisation.of(torch.from_numpy(images))
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), rtol=1e-12)
    assert len(found.mean) == len(found.std) == channels


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_values_type_shape_and_memory(channels):
    images = torch.from_numpy(data(channels=channels).x_train)
    found = Normalisation.of(images)
    before = images.clone()
    out = found.on(CPU)(images)
    want = (before.numpy().astype(np.float64) / 255 - found.mean) / found.std
    assert out.dtype == torch.float32
    assert out.shape == (100, channels, 6, 8)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.stride() == (6 * 8 * channels, 1, 8 * channels, channels)
    np.testing.assert_allclose(out.numpy(), want.transpose(0, 3, 1, 2), atol=2e-6)
    np.testing.assert_allclose(out.double().mean((0, 2, 3)).numpy(), 0, atol=1e-6)
    np.testing.assert_allclose(out.double().std((0, 2, 3), correction=0).numpy(), 1, atol=1e-6)
    assert torch.equal(images, before)


@pytest.mark.parametrize("value", [0, 7, 200, 255])
def test_constant_channel_stays_finite_and_leaves_the_others_alone(value):
    images = torch.from_numpy(data().x_train)
    alone = Normalisation.of(images).on(CPU)(images)
    images[..., 1] = value
    out = Normalisation.of(images).on(CPU)(images)
    assert torch.isfinite(out).all()
    assert out[:, 1].abs().max() < 1
    assert torch.equal(out[:, [0, 2]], alone[:, [0, 2]])


def test_full_run_trains_on_all_and_its_curve_is_test():
    own = data()
    found = DeviceData(own, "full", CPU)
    assert found.epoch_images is found.test
    np.testing.assert_array_equal(found.test.images.numpy(), own.x_test)
    assert found.test.labels.tolist() == own.y_test.tolist()
    assert found.labels.tolist() == own.y_train.tolist()
    assert found.padded.shape == (100, 8, 10, 3)
    np.testing.assert_array_equal(found.padded[:, 1:-1, 1:-1].numpy(), own.x_train)
    assert found.normalisation == Normalisation.of(torch.from_numpy(own.x_train))
    assert torch.equal(found.normalise(found.test.images), found.normalisation.on(CPU)(found.test.images))
    assert (found.spec, found.pad, found.flip) == (own.spec, 1, True)


def test_holdout_run_keeps_its_tenth_apart():
    own = data()
    held = holdout_positions(own.y_train)
    trained = [i for i in range(100) if i not in held]
    found = DeviceData(own, "holdout", CPU)
    np.testing.assert_array_equal(found.epoch_images.images.numpy(), own.x_train[held])
    assert found.epoch_images.labels.tolist() == own.y_train[held].tolist()
    np.testing.assert_array_equal(found.padded[:, 1:-1, 1:-1].numpy(), own.x_train[trained])
    assert found.labels.tolist() == own.y_train[trained].tolist()
    np.testing.assert_array_equal(found.test.images.numpy(), own.x_test)
    assert (len(found.labels), len(found.epoch_images.labels)) == (90, 10)


def test_statistics_are_those_of_the_trained_images_only():
    own = data()
    held = holdout_positions(own.y_train)
    own.x_train[held] = 255
    own.x_test[:] = 255
    pixels = np.delete(own.x_train, held, 0).astype(np.float64) / 255
    found = DeviceData(own, "holdout", CPU).normalisation
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("each", [1, 4])
def test_holdout_of_too_few_images_says_how_many_are_enough(each):
    """Whatever number the message asks for, that number works."""
    with pytest.raises(UserError) as caught:
        DeviceData(data(y_train=np.repeat(np.arange(3), each)), "holdout", CPU)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "--holdout" in message
    enough = int(next(word for word in message.split() if word.isdigit()))
    assert enough > each
    assert len(DeviceData(data(y_train=np.repeat(np.arange(3), enough)), "holdout", CPU).epoch_images.labels) >= 3


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(100, 10, 10), (100, 32, 3), (100, 100, 1), (100, 51, 1), (100, 1, 100)])
def test_the_last_partial_batch_is_dropped(n, batch_size, steps):
    stream = SeedBatches(DeviceData(data(n), "full", CPU), 0, batch_size)
    batches = list(stream.epoch(0))
    assert stream.steps == len(batches) == steps
    assert all(images.shape == (batch_size, 3, 6, 8) for images, _ in batches)


@pytest.mark.parametrize("split", ["full", "holdout"])
def test_batches_cover_distinct_images_and_agree_with_their_labels(split):
    """The image's own pixel, its index and its label tell the same image, through crop and flip."""
    own = flat()
    held = holdout_positions(own.y_train) if split == "holdout" else np.empty(0, np.int64)
    trained = np.setdiff1d(np.arange(200), held)
    device_data = DeviceData(own, split, CPU)
    seen = []
    for images, batch in SeedBatches(device_data, 0, 32).epoch(4):
        shown = numbers(images, device_data.normalisation)
        assert trained[batch.indices].tolist() == shown
        assert batch.labels.tolist() == own.y_train[shown].tolist()
        assert batch.epoch == 4
        seen += shown
    assert len(set(seen)) == len(seen) == len(trained) // 32 * 32
    assert not set(seen) & set(held.tolist())


def test_every_image_is_shown_over_some_epochs():
    device_data = DeviceData(flat(), "full", CPU)
    stream = SeedBatches(device_data, 0, 64)
    seen = {number for epoch in range(10) for images, _ in stream.epoch(epoch) for number in numbers(images, device_data.normalisation)}
    assert seen == set(range(200))


def test_batches_are_normalised_float32_channels_last():
    device_data = DeviceData(data(pad=0, flip=False), "full", CPU)
    for images, batch in SeedBatches(device_data, 0, 25).epoch(0):
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, device_data.normalise(device_data.padded[batch.indices]))


def test_padding_moves_the_images_and_flip_mirrors_some():
    plain = DeviceData(data(pad=0, flip=False), "full", CPU)
    mirrored = DeviceData(data(pad=0), "full", CPU)
    (unturned, _), (turned, _) = next(SeedBatches(plain, 0, 100).epoch(0)), next(SeedBatches(mirrored, 0, 100).epoch(0))
    same = (turned == unturned).all((1, 2, 3))
    assert torch.equal(turned[~same], unturned[~same].flip(3))
    assert 30 < int(same.sum()) < 70
    moved, _ = next(SeedBatches(DeviceData(data(pad=2), "full", CPU), 0, 100).epoch(0))
    assert int((moved == turned).all((1, 2, 3)).sum()) < 20


def first_order(seed: int, epoch: int = 0) -> list[int]:
    return torch.cat([batch.indices for _, batch in SeedBatches(DeviceData(flat(), "full", CPU), seed, 50).epoch(epoch)]).tolist()


def test_seed_0_is_a_seed():
    assert first_order(0) == first_order(0)
    assert first_order(0) != first_order(1)
    assert first_order(0) != list(range(200))


def test_epochs_differ_and_one_can_be_drawn_alone():
    stream = SeedBatches(DeviceData(flat(), "full", CPU), 0, 50)
    whole = [torch.cat([batch.indices for _, batch in stream.epoch(epoch)]).tolist() for epoch in range(3)]
    assert whole[0] != whole[1] != whole[2] != whole[0]
    assert first_order(0, epoch=2) == whole[2]


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_a_mixed_batch_is_its_plain_one_mixed_by_one_share_and_has_no_labels(crop):
    device_data = DeviceData(replace(data(pad=0), crop=crop), "full", CPU)
    plain, mixed, shares = SeedBatches(device_data, 0, 25), SeedBatches(device_data, 0, 25, mixup=True), []
    for (images, known), (mixture, batch) in zip(plain.epoch(3), mixed.epoch(3), strict=True):
        before = images.roll(1, 0)
        apart = images - before
        share = float(((mixture - before) * apart).sum() / apart.square().sum())
        torch.testing.assert_close(mixture, share * images + (1 - share) * before, rtol=0, atol=1e-5)
        assert mixture.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels is None
        assert torch.equal(batch.indices, known.indices)
        shares.append(share)
    assert len({round(share, 3) for share in shares}) == len(shares) == 4
    assert all(0 <= share <= 1 for share in shares)


def test_resized_crops_are_cut_from_images_without_a_border():
    """Each image of a later batch against torchvision, on its own box and flip."""
    own = replace(data(pad=0), crop="resized")
    device_data = DeviceData(own, "full", CPU)
    assert device_data.padded.shape == own.x_train.shape
    stream = SeedBatches(device_data, 0, 25)
    draws, (images, batch) = stream.draws(1), list(stream.epoch(1))[2]
    for place, (image, index) in enumerate(zip(images, batch.indices, strict=True), 50):
        shown = tv.resized_crop(
            torch.from_numpy(own.x_train[index]).permute(2, 0, 1).double(), *draws.boxes[place].tolist(), [6, 8], antialias=False
        )
        shown = shown.flip(2) if draws.flips[place] else shown
        pixels = shown.permute(1, 2, 0).numpy() / 255
        want = (pixels - device_data.normalisation.mean) / device_data.normalisation.std
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), want, atol=1e-5)
    assert 5 < int(draws.flips[50:75].sum()) < 20
    assert not torch.equal(draws.boxes, stream.draws(0).boxes)


@pytest.mark.parametrize(("split", "there"), [("full", 100), ("holdout", 90)])
def test_batch_size_beyond_the_data_is_told_in_one_line(split, there):
    device_data = DeviceData(data(), split, CPU)
    assert SeedBatches(device_data, 0, there).steps == 1
    with pytest.raises(UserError) as caught:
        SeedBatches(device_data, 0, there + 1)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert [word for word in (f"train.batch_size={there + 1}", str(there), "lower") if word not in message] == []
