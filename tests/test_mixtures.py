"""CutMix and random erasing: the authors' boxes, torchvision's distribution, and what a batch of them is, by loops over its pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2_contingency
from timm.data.mixup import rand_bbox
from torchvision.transforms import RandomErasing

from flowdistill.data.augment import ERASED_AREA, ERASED_ASPECT, cut_and_mix, draw_erased, draw_pasted, draw_shares, erase
from flowdistill.data.batches import DeviceData, SeedBatches, StreamedData
from flowdistill.data.dataset import ImageData, Unlabelled
from flowdistill.randomness import derive
from flowdistill.types import NO_LABEL

CPU = torch.device("cpu")
ALPHA = 1e-3  # a chi-square test fails below this p; all draws have fixed seeds
BATCH = 8
BOTH = {"mixup": 0.8, "cutmix": 1.0}
ALL = {**BOTH, "random_erasing": 0.5}


def data(height: int = 5, width: int = 7, channels: int = 1, n: int = 40, classes: int = 4) -> ImageData:
    chance = np.random.default_rng(0)
    x_train, x_test = (chance.integers(0, 256, (count, height, width, channels), dtype=np.uint8) for count in (n, 8))
    return ImageData("odd", x_train, np.arange(n) % classes, x_test, np.arange(8) % classes, classes, pad=0, flip=False)


def epoch(images: ImageData, number: int = 0, kind: type[DeviceData] = DeviceData, **how):
    on_device = kind(images, "full", CPU, *([0] if kind is StreamedData else []))
    stream = SeedBatches(on_device, 3, BATCH, **how)
    return stream, list(stream.epoch(number))


@pytest.mark.parametrize("size", [(32, 32), (5, 7), (3, 3), (1, 1)])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_boxes_of_cutmix_are_timms(size: tuple[int, int], alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's function is given the share and the middle that were drawn here."""
    drawn = draw_pasted(300, size, alpha, seed=2, epoch=5, device=CPU)
    chance = np.random.default_rng(derive(2, "cutmix", 5))
    shares, middles = chance.beta(alpha, alpha, 300), chance.integers(0, np.array(size), (300, 2))
    for box, share, middle in zip(drawn.tolist(), shares, middles, strict=True):
        given = iter(middle)
        monkeypatch.setattr(np.random, "randint", lambda low, high, size=None, given=given: next(given))
        top, bottom, left, right = (int(side) for side in rand_bbox((1, 1, *size), share))
        assert box == [top, left, bottom - top, right - left]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_of_cutmix_is_pasted_pixel_by_pixel_and_its_share_is_the_area_that_was_left(channels: int) -> None:
    images = data(channels=channels)
    stream, mixed = epoch(images, cutmix=1.0)
    draws, norm = stream.draws(0), stream.data.normalisation
    shares = []
    for step, (shown, batch) in enumerate(mixed):
        top, left, height, width = draws.pasted[step * BATCH].tolist()
        order = draws.order[step * BATCH : (step + 1) * BATCH].tolist()
        left_over = 35
        for place, index in enumerate(order):
            for y in range(5):
                for x in range(7):
                    inside = top <= y < top + height and left <= x < left + width
                    left_over -= inside and place == 0
                    pixel = images.x_train[order[place - 1] if inside else index, y, x] / 255
                    np.testing.assert_allclose(shown[place, :, y, x].numpy(), (pixel - norm.mean) / norm.std, atol=1e-5)
        assert batch.labels is None
        assert batch.indices.tolist() == order
        assert batch.targets.labels.tolist() == [int(images.y_train[index]) for index in order]
        assert batch.targets.partners.tolist() == [int(images.y_train[order[place - 1]]) for place in range(BATCH)]
        assert float(batch.targets.share) == pytest.approx(left_over / 35)
        assert shown.is_contiguous(memory_format=torch.channels_last)
        shares.append(left_over / 35)
    assert len(set(shares)) > 2


def test_with_mixup_beside_it_half_of_the_batches_are_of_either() -> None:
    """A batch is pasted with the area's share, or mixed evenly by mixup's own share, never both."""
    stream, _ = epoch(data(16, 16, n=2000), **BOTH)
    draws = stream.draws(1)
    cut = draws.pasted[:, 2:].prod(1) > 0
    even = draw_shares(2000, 0.8, seed=3, epoch=1, device=CPU)
    mixup = (draws.shares == even) & ~cut
    neither = ~cut & ~mixup  # CutMix with an empty box
    assert binomtest(int(mixup.sum()), 2000).pvalue > ALPHA
    assert (draws.shares[neither] == 1).all()
    assert int(neither.sum()) < 100
    areas = draws.pasted[:, 2:].prod(1)[cut] / 256
    torch.testing.assert_close(draws.shares[cut], 1 - areas)
    plain = torch.rand(3, 16, 16, 1)
    none, box = torch.tensor([[5, 5, 0, 0]]), torch.tensor([[2, 3, 4, 5]])
    torch.testing.assert_close(cut_and_mix(plain, torch.tensor([0.3]), none), 0.3 * plain + 0.7 * plain.roll(1, 0))
    pasted = plain.clone()
    pasted[:, 2:6, 3:8] = plain.roll(1, 0)[:, 2:6, 3:8]
    assert torch.equal(cut_and_mix(plain, torch.tensor([0.3]), box), pasted)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_erased_boxes_have_torchvisions_distribution(size: tuple[int, int]) -> None:
    """Two-sample chi-square of each part and of height with width, against RandomErasing's own draws; rare values are put together."""
    number = 20_000
    ours = draw_erased(number, size, 1.0, seed=5, epoch=0, device=CPU).numpy()
    image = torch.empty(1, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        drawn = [RandomErasing.get_params(image, ERASED_AREA, ERASED_ASPECT, [0.0]) for _ in range(number)]
    theirs = np.array([box[:4] for box in drawn])
    default = RandomErasing()
    assert (default.scale, default.ratio, default.value) == (ERASED_AREA, ERASED_ASPECT, 0)
    for part in (*(lambda b, i=i: b[:, i] for i in range(4)), lambda b: b[:, 2] // 4 * 64 + b[:, 3] // 4):
        counts = np.stack([np.bincount(part(boxes), minlength=2000) for boxes in (ours, theirs)])
        common = counts.sum(0) >= 50
        table = np.column_stack([counts[:, common], counts[:, ~common].sum(1)])
        assert chi2_contingency(table[:, table.sum(0) > 0], correction=False).pvalue > ALPHA


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 50), (7, 5)])
def test_erased_boxes_lie_in_the_image_and_come_as_often_as_asked(size: tuple[int, int]) -> None:
    top, left, height, width = draw_erased(3000, size, 0.25, seed=1, epoch=0, device=CPU).unbind(1)
    assert int(min(part.min() for part in (top, left, height, width))) >= 0
    assert int((top + height).max()) <= size[0]
    assert int((left + width).max()) <= size[1]
    there = int((height * width > 0).sum())
    assert there <= 3000 * 0.25 + 100
    assert there > 0 or size == (1, 1)
    assert not draw_erased(50, size, 0.0, seed=1, epoch=0, device=CPU).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_erased_is_the_mean_colour_and_nothing_else_changes(channels: int) -> None:
    stream, erased = epoch(data(channels=channels), random_erasing=0.5)
    _, plain = epoch(data(channels=channels))
    draws, hit = stream.draws(0), 0
    for step, ((shown, batch), (images, known)) in enumerate(zip(erased, plain, strict=True)):
        assert torch.equal(batch.labels, known.labels)
        assert torch.equal(batch.indices, known.indices)
        for place in range(BATCH):
            top, left, height, width = draws.erased[step * BATCH + place].tolist()
            expected = images[place].clone()
            expected[:, top : top + height, left : left + width] = 0
            torch.testing.assert_close(shown[place], expected, rtol=0, atol=1e-6)
            hit += height * width > 0
    assert 8 < hit < 32


def test_images_are_erased_before_they_are_mixed() -> None:
    """As timm and DeiT have it: a mixture of erased images, each with its own box."""
    _, mixed = epoch(data(), random_erasing=0.8, mixup=0.4)
    _, erased = epoch(data(), random_erasing=0.8)
    for (mixture, batch), (images, _) in zip(mixed, erased, strict=True):
        share = batch.targets.share
        torch.testing.assert_close(mixture, share * images + (1 - share) * images.roll(1, 0), rtol=0, atol=1e-5)


def test_the_other_draws_are_those_without() -> None:
    """Order and share of mixup; and the epochs differ, each a function of its number."""
    stream, _ = epoch(data(), **ALL)
    plain, _ = epoch(data(), mixup=0.8)
    drawn, other, again = stream.draws(2), stream.draws(3), stream.draws(2)
    assert torch.equal(drawn.order, plain.draws(2).order)
    for part in ("pasted", "erased", "shares"):
        assert torch.equal(getattr(drawn, part), getattr(again, part))
        assert not torch.equal(getattr(drawn, part), getattr(other, part))
    alone, _ = epoch(data(), cutmix=1.0)  # beside mixup the batches that are pasted differ too
    assert not torch.equal(alone.draws(2).pasted, alone.draws(3).pasted)


@pytest.mark.parametrize("how", [{"cutmix": 1.0}, ALL, {"random_erasing": 0.7, "balanced": True}], ids=str)
def test_streamed_images_are_erased_and_mixed_as_those_in_memory(how: dict) -> None:
    for (one, batch), (other, known) in zip(epoch(data(), 1, **how)[1], epoch(data(), 1, StreamedData, **how)[1], strict=True):
        assert torch.equal(one, other)
        assert torch.equal(batch.indices, known.indices)


def test_a_partner_without_a_label_counts_for_nothing() -> None:
    more = replace(data(), unlabelled=Unlabelled("more", data().x_test))
    for _, batch in epoch(more, cutmix=1.0)[1]:
        assert int(batch.targets.counted) == int((batch.targets.labels != NO_LABEL).sum())
        assert torch.equal(batch.targets.partners, batch.targets.labels.roll(1))


def test_few_images_and_one_class_do_not_end_it() -> None:
    """A batch of one is its own partner; two images; an image of one pixel has no box."""
    for images, size in ((data(n=2, classes=1), 1), (data(n=2, classes=1), 2), (data(1, 1, 3), 1), (data(1, 1, 3), 8)):
        stream = SeedBatches(DeviceData(images, "full", CPU), 0, size, **ALL, balanced=True)
        for shown, batch in stream.epoch(0):
            assert shown.isfinite().all()
            assert 0 <= float(batch.targets.share) <= 1
            assert size > 1 or torch.equal(batch.targets.labels, batch.targets.partners)


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = epoch(data(), **ALL, balanced=True)[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numbers).all()
    torch.manual_seed(1)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(first, epoch(data(), **ALL, balanced=True)[1], strict=True))


def test_erasing_takes_colours_of_any_number_of_channels() -> None:
    images, box = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([[0, 0, 2, 2], [1, 1, 0, 0]])
    got = erase(images, box, torch.tensor([1.0, 2.0, 3.0]))
    assert got[0, 1, 1].tolist() == [1, 2, 3]
    assert float(got.sum()) == 4 * 6
