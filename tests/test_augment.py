"""Crops, flips and mixtures: torchvision's pixels, torchvision's distribution, and draws that depend on (seed, epoch) alone."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta, chi2_contingency, chisquare, kstest
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from flowdistill.data.augment import (
    AREA,
    ASPECT,
    Draws,
    crop_and_flip,
    draw_boxes,
    draw_epoch,
    draw_shares,
    mix,
    reflect_pad,
    resize_and_flip,
)

CPU = torch.device("cpu")
ALPHA = 1e-3  # a chi-square test fails below this p; all draws have fixed seeds, so each p is one fixed number
PAD = 4


def images(n: int, height: int, width: int, channels: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=chance)


def draw(n: int = 100, pad: int = PAD, flip: bool = True, seed: int = 0, epoch: int = 0) -> Draws:
    return draw_epoch(n, pad=pad, flip=flip, seed=seed, epoch=epoch, device=CPU)


@pytest.mark.parametrize(
    ("height", "width", "channels", "pad"), [(32, 32, 3, 4), (16, 16, 1, 2), (5, 9, 3, 4), (9, 5, 2, 1), (4, 4, 3, 3), (6, 7, 1, 0)]
)
def test_reflect_pad_is_numpys_and_torchs(height, width, channels, pad):
    plain = images(3, height, width, channels)
    padded = reflect_pad(plain, pad)
    assert padded.dtype == torch.uint8
    np.testing.assert_array_equal(padded.numpy(), np.pad(plain.numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect"))
    torchs = F.pad(plain.permute(0, 3, 1, 2).float(), (pad,) * 4, mode="reflect").permute(0, 2, 3, 1)
    assert torch.equal(padded.float(), torchs)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (10, 14)])
def test_crop_and_flip_gives_torchvisions_pixels_at_every_offset(height, width):
    """All 9 x 9 offsets, mirrored and not: the very pixels of torchvision's pad, crop and horizontal_flip."""
    plain = images(3, height, width, 3)
    padded = reflect_pad(plain, PAD)
    padded_by_torchvision = tv.pad(plain.permute(0, 3, 1, 2), [PAD] * 4, padding_mode="reflect")
    every = torch.arange(3)
    for row, column, flip in itertools.product(range(2 * PAD + 1), range(2 * PAD + 1), (False, True)):
        rows, columns, flips = torch.full((3,), row), torch.full((3,), column), torch.full((3,), flip)
        got = crop_and_flip(padded, every, rows, columns, flips, (height, width))
        want = tv.crop(padded_by_torchvision, row, column, height, width)
        want = tv.horizontal_flip(want) if flip else want
        assert torch.equal(got.permute(0, 3, 1, 2), want), (row, column, flip)


def test_crop_and_flip_treats_each_image_of_a_batch_by_its_own_draw():
    plain = images(5, 6, 8, 3)
    padded = reflect_pad(plain, 2)
    indices = torch.tensor([4, 0, 0, 3])
    rows, columns = torch.tensor([0, 4, 1, 2]), torch.tensor([3, 0, 4, 2])
    flips = torch.tensor([True, False, True, False])
    got = crop_and_flip(padded, indices, rows, columns, flips, (6, 8))
    for place, (i, y, x, flip) in enumerate(zip(indices, rows, columns, flips, strict=True)):
        want = padded[i, y : y + 6, x : x + 8]
        assert torch.equal(got[place], want.flip(1) if flip else want)
    assert torch.equal(got[3], plain[3])  # the middle offset is the image itself
    assert got.dtype == torch.uint8


def cell(rows: np.ndarray, columns: np.ndarray, flips: np.ndarray, pad: int = PAD) -> np.ndarray:
    """How often each (row, column, flip) came."""
    side = 2 * pad + 1
    assert rows.min() >= 0
    assert columns.min() >= 0
    return np.bincount((rows * side + columns) * 2 + flips, minlength=side * side * 2)


@pytest.mark.parametrize(("n", "epochs", "pad"), [(1000, 100, 4), (1000, 60, 2), (1, 6000, 2)])
def test_draws_are_uniform_and_independent(n, epochs, pad):
    """Chi-square of the joint count of (row, column, flip) and of each alone; n=1 asks the same across epochs only."""
    drawn = [draw(n, pad=pad, seed=3, epoch=epoch) for epoch in range(epochs)]
    rows, columns, flips = (torch.cat([getattr(d, part) for d in drawn]).numpy() for part in ("rows", "columns", "flips"))
    joint = cell(rows, columns, flips, pad)
    assert len(joint) == 2 * (2 * pad + 1) ** 2
    table = joint.reshape(2 * pad + 1, 2 * pad + 1, 2)
    for counts in (joint, table.sum((1, 2)), table.sum((0, 2)), table.sum((0, 1))):
        assert chisquare(counts).pvalue > ALPHA


def test_order_puts_every_image_everywhere_equally_often():
    places = torch.stack([draw(10, seed=4, epoch=epoch).order for epoch in range(4000)]).numpy()
    for place in range(10):
        assert chisquare(np.bincount(places[:, place], minlength=10)).pvalue > ALPHA


def recovered(shown: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row offset, column offset and flip of crops [N, H, W, 2] of an image whose channels hold its row and its column.

    Read in the middle, where no offset reaches the reflected border.
    """
    middle = shown.shape[1] // 2
    row, left, right = (shown[:, middle, x, c].numpy().astype(int) for x, c in ((middle, 0), (middle, 1), (middle + 1, 1)))
    flips = (right < left).astype(int)
    first = middle - flips  # a mirrored 32 wide crop shows its column 15 at 16
    return row - middle + PAD, left - first + PAD, flips


def position_image() -> torch.Tensor:
    """[32, 32, 2]: each pixel holds its row and its column."""
    return torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij"), -1).to(torch.uint8)


def test_recovery_reads_back_what_was_drawn():
    drawn = draw(500)
    padded = reflect_pad(position_image()[None], PAD)
    shown = crop_and_flip(padded, torch.zeros(500, dtype=torch.long), drawn.rows, drawn.columns, drawn.flips, (32, 32))
    for got, want in zip(recovered(shown), (drawn.rows, drawn.columns, drawn.flips), strict=True):
        np.testing.assert_array_equal(got, want.numpy())


def test_crops_and_flips_have_torchvisions_distribution():
    """Two-sample chi-square of our epochs against RandomCrop(32, 4, reflect) + RandomHorizontalFlip, both read off the pixels."""
    number = 20_000
    image = position_image()
    drawn = draw(number, seed=5)
    ours = crop_and_flip(
        reflect_pad(image[None], PAD), torch.zeros(number, dtype=torch.long), drawn.rows, drawn.columns, drawn.flips, (32, 32)
    )
    torchvisions = Compose([RandomCrop(32, padding=PAD, padding_mode="reflect"), RandomHorizontalFlip()])
    channels_first = image.permute(2, 0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        shown = torch.stack([torchvisions(channels_first) for _ in range(number)]).permute(0, 2, 3, 1)
    counts = np.stack([cell(*recovered(ours)), cell(*recovered(shown))])
    assert counts.shape == (2, 162)
    assert counts.sum(1).tolist() == [number, number]
    table = counts.reshape(2, 9, 9, 2)
    for two in (counts, table.sum((2, 3)), table.sum((1, 3)), table.sum((1, 2))):
        assert chi2_contingency(two, correction=False).pvalue > ALPHA


@pytest.mark.parametrize("n", [1, 2, 898])
def test_order_is_a_permutation(n):
    assert draw(n).order.sort().values.tolist() == list(range(n))


def test_shapes_types_and_ranges():
    drawn = draw(5000, pad=2)
    assert all(part.shape == (5000,) for part in (drawn.order, drawn.rows, drawn.columns, drawn.flips))
    assert drawn.flips.dtype == torch.bool
    for offsets in (drawn.rows, drawn.columns):
        assert (int(offsets.min()), int(offsets.max())) == (0, 4)


def test_no_flip_and_no_pad_draw_nothing_else():
    drawn = draw(1000, pad=0, flip=False)
    assert not drawn.flips.any()
    assert not drawn.rows.any()
    assert not drawn.columns.any()


PARTS = ("order", "rows", "columns", "flips")


def test_same_seed_and_epoch_draw_the_same():
    first, second = draw(seed=2, epoch=7), draw(seed=2, epoch=7)
    assert all(torch.equal(getattr(first, part), getattr(second, part)) for part in PARTS)


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (1, 1), (10, 0), (0, 10)])
def test_another_seed_or_epoch_draws_another(seed, epoch):
    first, second = draw(), draw(seed=seed, epoch=epoch)
    assert not any(torch.equal(getattr(first, part), getattr(second, part)) for part in PARTS)


def test_seed_and_epoch_are_not_mixed_up():
    assert not torch.equal(draw(seed=1, epoch=2).order, draw(seed=2, epoch=1).order)
    assert not torch.equal(draw(seed=1, epoch=11).order, draw(seed=11, epoch=1).order)


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False), (4, False), (7, True)])
def test_order_depends_on_neither_pad_nor_flip(pad, flip):
    assert torch.equal(draw(pad=pad, flip=flip, epoch=3).order, draw(epoch=3).order)


def test_flip_switch_moves_no_crop():
    with_flip, without = draw(), draw(flip=False)
    assert torch.equal(with_flip.rows, without.rows)
    assert torch.equal(with_flip.columns, without.columns)


def test_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw().order, first.order)


# Inception crops


def boxes(n: int = 100, size: tuple[int, int] = (32, 32), seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return draw_boxes(n, size, seed=seed, epoch=epoch, device=CPU)


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (10, 14, 1), (7, 5, 2)])
def test_a_box_is_enlarged_as_torchvision_does(height, width, channels):
    """Each image alone by resized_crop, on float64; ours in float32 may be off by a few steps of its 24 bits in 255."""
    plain, drawn = images(400, height, width, channels), boxes(400, (height, width), seed=1)
    flips = torch.arange(400) % 2 == 0
    got = resize_and_flip(plain, drawn, flips)
    assert (got.dtype, got.shape, got.is_contiguous()) == (torch.float32, plain.shape, True)
    for image, box, flip, ours in zip(plain, drawn.tolist(), flips, got, strict=True):
        want = tv.resized_crop(image.permute(2, 0, 1).double(), *box, [height, width], antialias=False)
        want = tv.horizontal_flip(want) if flip else want
        torch.testing.assert_close(ours.permute(2, 0, 1).double(), want, rtol=0, atol=1e-3)


def test_the_whole_image_as_a_box_is_the_image_and_a_pixel_fills_it():
    plain = images(3, 6, 8, 3)
    whole, pixel = torch.tensor([0, 0, 6, 8]).expand(3, 4), torch.tensor([5, 0, 1, 1]).expand(3, 4)
    still = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(resize_and_flip(plain, whole, still), plain.float())
    assert torch.equal(resize_and_flip(plain, whole, ~still), plain.flip(2).float())
    assert torch.equal(resize_and_flip(plain, pixel, still), plain[:, 5:, :1].float().expand(3, 6, 8, 3))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_boxes_have_torchvisions_distribution(size):
    """Two-sample chi-square of each part and of height with width, against RandomResizedCrop's own draws; rare values are put together."""
    number = 20_000
    ours = boxes(number, size, seed=5).numpy()
    image = torch.empty(1, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        theirs = np.array([RandomResizedCrop.get_params(image, AREA, ASPECT) for _ in range(number)])
    for part in (*(lambda b, i=i: b[:, i] for i in range(4)), lambda b: b[:, 2] // 4 * 64 + b[:, 3] // 4):
        counts = np.stack([np.bincount(part(drawn), minlength=2000) for drawn in (ours, theirs)])
        common = counts.sum(0) >= 50
        table = np.column_stack([counts[:, common], counts[:, ~common].sum(1)])
        table = table[:, table.sum(0) > 0]
        assert table.shape[1] > 8
        assert chi2_contingency(table, correction=False).pvalue > ALPHA


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (2, 2), (4, 60), (96, 8)])
def test_boxes_lie_in_the_image(size):
    """Also where next to none has the area and the aspect ratio: then it is the whole image."""
    top, left, height, width = boxes(3000, size).unbind(1)
    assert (int(min(height.min(), width.min())), int(min(top.min(), left.min()))) >= (1, 0)
    assert int((top + height).max()) <= size[0]
    assert int((left + width).max()) <= size[1]
    whole = float(((height == size[0]) & (width == size[1])).float().mean())
    assert whole < 0.02 if size == (32, 32) else whole > 0


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (1, 2), (2, 1)])
def test_boxes_and_shares_depend_on_seed_and_epoch_alone(seed, epoch):
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    assert torch.equal(boxes(seed=seed, epoch=epoch), boxes(seed=seed, epoch=epoch))
    assert not torch.equal(boxes(seed=seed, epoch=epoch), boxes())
    for mixup in (True, 0.2):
        shares = [draw_shares(50, mixup, seed=s, epoch=e, device=CPU) for s, e in ((seed, epoch), (seed, epoch), (0, 0))]
        assert torch.equal(shares[0], shares[1])
        assert not torch.equal(shares[0], shares[2])
    assert torch.equal(torch.get_rng_state(), before)


# Mixup


def test_shares_are_uniform():
    drawn = draw_shares(20_000, True, seed=3, epoch=0, device=CPU)
    assert drawn.dtype == torch.float32
    assert kstest(drawn.double().numpy(), "uniform").pvalue > ALPHA


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_of_an_alpha_are_beta_alpha_alpha(alpha):
    """By bins: of Beta(0.2, 0.2) 2 % are within 3e-8 of 1, which float32 rounds to 1."""
    drawn, edges = draw_shares(20_000, alpha, seed=3, epoch=0, device=CPU), np.linspace(0, 1, 21)
    assert drawn.dtype == torch.float32
    expected = np.diff(beta(alpha, alpha).cdf(edges)) * len(drawn)
    assert chisquare(np.histogram(drawn.numpy(), edges)[0], expected).pvalue > ALPHA


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e300])
def test_shares_of_an_extreme_alpha_are_shares(alpha):
    drawn = draw_shares(1000, alpha, seed=3, epoch=0, device=CPU)
    assert ((drawn >= 0) & (drawn <= 1)).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_each_image_is_mixed_with_the_one_before_it(share):
    plain = images(5, 3, 4, 2)
    got = mix(plain, torch.tensor([share]))
    want = [share * plain[i].double() + (1 - share) * plain[i - 1].double() for i in range(5)]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=0, atol=1e-4)
    assert torch.equal(mix(plain, torch.ones(1)), plain.float())
