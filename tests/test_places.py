"""Dense maps of two networks lie on each other: a part of the image is the same part of both, whatever kind of network gives the map."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill import methods, models
from flowdistill.checks import UserError
from flowdistill.methods.attention import attention_loss
from flowdistill.methods.cwd import cwd_loss
from flowdistill.methods.fsp import match_sizes
from flowdistill.methods.nst import nst_loss
from flowdistill.methods.radio import interpolated
from flowdistill.models.features import pooling_of
from flowdistill.models.foreign import IN_MEMORY, adopt
from flowdistill.models.survey import survey
from flowdistill.models.watching import Layout
from flowdistill.runner.pairing import pair
from flowdistill.types import DataSpec

CLASSES = 5
NUMBERS = itertools.count()  # of the modules in memory, which need names of their own


class Means(nn.Module):
    """[N, 3, H, W] -> the mean of each patch, by a convolution, so that a map's features are those of its place."""

    def __init__(self, patch: int, width: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch, bias=False)
        with torch.no_grad():
            self.proj.weight.copy_(torch.eye(width, 3)[:, :, None, None].expand(-1, -1, patch, patch) / patch**2)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class Same(nn.Module):
    """A block of a transformer that has learnt nothing yet: what its branch adds is zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.branch(tokens)


class Tokens(nn.Module):
    """A vision transformer whose tokens are the means of their patches.

    Args:
        before, behind: tokens that stand for no position.
        columns: whether the positions are in the order of columns.
    """

    def __init__(self, patch: int, before: int = 0, behind: int = 0, *, columns: bool = False, width: int = 3, head: bool = True) -> None:
        super().__init__()
        self.embed, self.blocks, self.columns = Means(patch, width), nn.Sequential(*[Same(width) for _ in range(4)]), columns
        self.before, self.behind = (nn.Parameter(torch.full((1, count, width), 9.0)) for count in (before, behind))
        self.head = nn.Linear(width, CLASSES) if head else None

    def forward(self, images: Tensor) -> Tensor:
        positions = self.embed(images)
        tokens = (positions.transpose(2, 3) if self.columns else positions).flatten(2).transpose(1, 2)
        tokens = torch.cat(
            [extra.expand(len(images), -1, -1) for extra in (self.before,)] + [tokens, self.behind.expand(len(images), -1, -1)], 1
        )
        tokens = self.blocks(tokens)
        return self.head(tokens.mean(1)) if self.head is not None else tokens


class Last(Tokens):
    """The same with [N, H, W, C] between its blocks, as a Swin has."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images).permute(0, 2, 3, 1)).mean((1, 2)))


class Convolutional(nn.Module):
    """A convolutional network whose maps are the means of their places: 4 stages at one size."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.embed, self.blocks = Means(patch), nn.Sequential(*[nn.Conv2d(3, 3, 1, bias=False) for _ in range(4)])
        for block in self.blocks:
            nn.init.dirac_(block.weight)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images)).mean((2, 3)))


def bright(height: int, width: int, *, at: tuple[int, int], patch: int) -> Tensor:
    """Images of a gradient in two channels, and of one bright patch in the third."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(height, width)])
    y, x = (index * patch for index in at)
    image[2, y : y + patch, x : x + patch] = 1.0
    return image[None].repeat(2, 1, 1, 1)


def maps(net: nn.Module, images: Tensor, stage: str = "stage4") -> Tensor:
    """The map of a stage, as a method gets it."""
    name = adopt(net, f"place-{next(NUMBERS)}")
    try:
        data = DataSpec("some", 10, CLASSES, 3, *images.shape[2:])
        with torch.no_grad():
            return models.build(name, data, taps=(stage,)).eval()(images).maps[stage]
    finally:
        del IN_MEMORY[name.partition(":")[2]]


SIZES = [(56, 56), (56, 88)]
TOKENS: dict[str, Any] = {
    "bare": lambda patch: Tokens(patch),
    "class token": lambda patch: Tokens(patch, 1),
    "distilled": lambda patch: Tokens(patch, 2),
    "registers": lambda patch: Tokens(patch, 5),
    "class token behind": lambda patch: Tokens(patch, 0, 1),
    "one before, one behind": lambda patch: Tokens(patch, 1, 1),
    "channels last": lambda patch: Last(patch),
    "wrapped": lambda patch: Wrapped(Tokens(patch, 1)),
}


class Wrapped(nn.Module):
    """A network in another module, as users put it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", TOKENS)
def test_a_transformers_map_lies_on_a_convolutional_one(kind: str, size: tuple[int, int]) -> None:
    """Of one size and of half the size: the dense losses between them are 0, and the bright patch is where it is in the image."""
    images = bright(*size, at=(1, 2), patch=8)
    small = maps(Convolutional(8), images)
    assert small.shape[2:] == (size[0] // 8, size[1] // 8)
    assert torch.nonzero(small[0, 2] > 0.99).tolist() == [[1, 2]]
    for patch in (8, 4):
        tokens = maps(TOKENS[kind](patch), images)
        assert tokens.shape == (2, 3, size[0] // patch, size[1] // patch)
        ours, theirs = match_sizes(small, tokens, "avg")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        ours, theirs = ours.double(), theirs.double()  # the losses are to show the rounding of the maps, and none of their own
        for loss in (attention_loss, nst_loss, cwd_loss):
            matched, mirrored, moved = (abs(float(loss(ours, other))) for other in (theirs, theirs.flip(3), theirs.roll(1, 3)))
            assert matched < 1e-9
            assert min(mirrored, moved) > 1e-6


def test_a_method_sees_maps_that_lie_on_each_other() -> None:
    """at, through specs and pairing: a transformer teaches a convolutional network of half its map's size, and is taught by one."""
    images = bright(56, 56, at=(4, 1), patch=8)
    data = DataSpec("some", 10, CLASSES, 3, 56, 56)
    for student, teacher in [(Convolutional(8), Tokens(4, 1)), (Tokens(4, 0, 1), Convolutional(8)), (Tokens(8, 5), Tokens(4, 2))]:
        nets = [
            models.build(adopt(net, f"place-{next(NUMBERS)}"), data, taps=("stage1", "stage2", "stage3", "stage4")).eval()
            for net in (student, teacher)
        ]
        pairing = pair(nets[0].spec, nets[1].spec, data, data)
        at = methods.build(methods.resolve("at", {}, {}), student=pairing.student, teacher=pairing.teacher, data=data)
        with torch.no_grad():
            assert float(at(nets[0](images), nets[1](images))["at"]) < 1e-9


def test_a_map_that_no_division_makes() -> None:
    """16x16 and 14x14 positions, as of patches of 14 and of 16 in 224 pixels, on images of a gradient, whose features are places.

    Interpolated, both are the same but for the rim. Pooled, a position is off by less than half of the larger map's.
    """
    images = bright(224, 224, at=(0, 0), patch=1)[:, :2]
    images = F.pad(images, (0, 0, 0, 0, 0, 1))
    large, small = maps(Tokens(14, 1), images), maps(Convolutional(16), images)
    assert (large.shape[2:], small.shape[2:]) == ((16, 16), (14, 14))
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(interpolated(small, (16, 16))[inside], large[inside], rtol=0, atol=1e-5)
    ours, theirs = match_sizes(small, large, "avg")
    assert float((ours - theirs).abs().max()) < 0.5 / 16
    assert float((ours - theirs).mean().abs()) < 1e-4, "and no direction is preferred"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_in_another_order_are_no_map(size: tuple[int, int]) -> None:
    found = survey(Tokens(8, 1, columns=True), 3, *size)
    assert [name for name in found.ends if name != "stem"] == []
    assert found.unread.startswith("the ")
    assert f"tokens of blocks.0.branch are not in the order of the positions of a {size[0]}x{size[1]} image" in found.unread


def test_tokens_that_fill_no_grid_are_told_in_one_line() -> None:
    class Odd(Tokens):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.embed(images).flatten(2).transpose(1, 2)[:, :31]
            return self.head(self.blocks(tokens).mean(1))

    data = DataSpec("some", 10, CLASSES, 3, 48, 48)
    spec = models.spec(adopt(Odd(8), "odd"), data)
    student = models.spec("resnet8", data)
    with pytest.raises(ValueError) as caught:
        methods.build(methods.resolve("at", {}, {}), student=student, teacher=spec, data=data)
    told = str(caught.value)
    assert "those of module:Odd-odd none (the 31 tokens of blocks.0.branch fill no grid of the shape of a 48x48 image); choose " in told
    assert "\n" not in told


def test_as_many_channels_as_rows_and_columns() -> None:
    """[N, 7, 7, 7] is read by what answers, not by what comes first."""
    images = bright(56, 56, at=(1, 2), patch=8)

    class Seven(Last):
        def __init__(self) -> None:
            super().__init__(8, width=7)

    found = maps(Seven(), images)
    assert torch.nonzero(found[0, 2] > 0.99).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("timm:hiera_tiny_224", set()),  # its blocks have the order of windows within windows
        ("timm:nest_tiny", {"levels.0", "levels.1"}),  # in a level [N, windows, positions, C] looks like [N, H, W, C]
        ("timm:cait_xxs24_224", {"blocks.5", "blocks.11", "blocks.17", "blocks"}),  # declares a class token that comes later
    ],
)
def test_networks_of_timm_whose_shapes_mislead(name: str, stages: set[str]) -> None:
    spec = models.spec(name, DataSpec("some", 10, CLASSES, 3, 64, 64))
    found = {tap.module for tap in spec.taps if tap.name != "stem"}
    assert stages <= found
    assert not any(module.startswith("blocks.") for module in found - stages - {"blocks.11"}), "blocks.11 of hiera is in order again"


@pytest.mark.parametrize("registers", [0, 4])
def test_a_transformer_of_timm_puts_a_patch_where_it_is(registers: int) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(img_size=(32, 48), patch_size=8, num_classes=CLASSES, embed_dim=24, depth=4, num_heads=2, reg_tokens=registers)
    plain = torch.rand(2, 3, 32, 48)
    for y, x in [(0, 5), (3, 0), (1, 4)]:
        changed = plain.clone()
        changed[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 1
        difference = (maps(net, changed) - maps(net, plain)).norm(dim=1)[0]
        assert divmod(int(difference.argmax()), 6) == (y, x)


@pytest.mark.parametrize(
    ("before", "behind", "expected"),
    [(0, 0, "mean"), (1, 0, "first"), (5, 0, "first"), (0, 1, "mean")],
    ids=["none", "class", "reg", "behind"],
)
def test_the_embedding_of_tokens(before: int, behind: int, expected: str) -> None:
    """A class token that stands behind the positions is not among them, and a position is never taken for one."""
    images = bright(56, 56, at=(1, 2), patch=8)
    net = Tokens(8, before, behind, head=False)
    found = survey(net, 3, 56, 56, CLASSES)
    assert found.pooling is not None
    tokens = net(images)
    positions = net.embed(images).mean((2, 3))
    torch.testing.assert_close(found.pooling(tokens), tokens[:, 0] if expected == "first" else positions)


def test_registers_are_no_class_token() -> None:
    from timm.models.vision_transformer import VisionTransformer

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
            self.vit = VisionTransformer(**sizes, num_classes=0, class_token=False, reg_tokens=4, global_pool="avg")

        def forward(self, images: Tensor) -> Tensor:
            return self.vit.forward_features(images)

    net = Backbone().eval()
    tokens = net(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(pooling_of(tokens, [], net, 32, 32)(tokens), tokens[:, 4:].mean(1))


def test_what_is_behind_the_positions_is_left_out() -> None:
    tokens = torch.arange(2 * 8 * 3).reshape(2, 8, 3)
    assert torch.equal(Layout("tokens", 3, 2, 3, 1).map(tokens), Layout("tokens", 3, 2, 3).map(tokens[:, 1:7]))


def test_a_network_whose_layers_draw_in_eval_mode_is_read_by_its_shape() -> None:
    class Drawing(Tokens):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + F.dropout(torch.ones(CLASSES), training=True) * 0

    assert survey(Drawing(8, 1), 3, 56, 56).layouts["blocks"] == Layout("tokens", 3, 7, 7, 1)


def test_named_taps_of_another_order_are_refused() -> None:
    name = adopt(Tokens(8, 1, columns=True), "columns")
    with pytest.raises(UserError, match=r"tap stage1=blocks\.1: .* has no such module that gives a map"):
        models.spec(name, DataSpec("some", 10, CLASSES, 3, 56, 56), {"stage1": "blocks.1"})
