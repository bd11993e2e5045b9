"""Stages of two networks that do not have the same, and images that a network was not made for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.pairs import network

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.models.input_adapter import InputSpec, input_adapter
from flowdistill.runner.pairing import compared, pair
from flowdistill.types import DataSpec

SMALL = DataSpec("small", 10, 5, 3, 32, 32)
LARGE = DataSpec("large", 10, 5, 3, 64, 64)


def net(name: str, *heights: int):
    return network(name, channels=(2, *range(3, 3 + len(heights))), sizes=((64, 64), *((h, h) for h in heights)))


def stages(spec):
    return [(tap.name, tap.own, tap.height) for tap in spec.taps if "." not in tap.name and tap.name != "stem"]


def test_as_many_stages_are_paired_in_order():
    pairing = pair(net("a", 32, 16, 8), net("b", 16, 8, 4), LARGE, LARGE)
    assert (pairing.student, pairing.teacher, pairing.why) == (net("a", 32, 16, 8), net("b", 16, 8, 4), "")


def test_equal_strides_are_paired():
    pairing = pair(net("a", 32, 16, 8, 4), net("b", 16, 8, 4), LARGE, LARGE)
    assert pairing.why == "by stride"
    assert stages(pairing.student) == [("stage1", "stage2", 16), ("stage2", "stage3", 8), ("stage3", "stage4", 4)]
    assert stages(pairing.teacher) == [("stage1", "stage1", 16), ("stage2", "stage2", 8), ("stage3", "stage3", 4)]


def test_a_stride_is_of_the_networks_own_images():
    pairing = pair(net("a", 16, 8, 4, 2), net("b", 16, 8, 4), SMALL, LARGE)
    assert stages(pairing.student) == [("stage1", "stage2", 8), ("stage2", "stage3", 4), ("stage3", "stage4", 2)]


def test_other_stages_are_paired_from_the_last():
    pairing = pair(net("a", 64, 32), net("b", 8, 4, 2), LARGE, LARGE)
    assert pairing.why == "the last ones, in order"
    assert [own for _, own, _ in stages(pairing.teacher)] == ["stage2", "stage3"]
    assert [own for _, own, _ in stages(pairing.student)] == ["stage1", "stage2"]


def test_what_belongs_to_a_stage_goes_with_it_and_the_stem_stays():
    pairing = pair(net("a", 32, 16, 8, 4), net("b", 16, 8, 4), LARGE, LARGE)
    assert [(tap.name, tap.own) for tap in pairing.student.taps][:3] == [
        ("stem", "stem"),
        ("stage1.first", "stage2.first"),
        ("stage1", "stage2"),
    ]


def test_a_renamed_network_gives_the_maps_of_its_own_stages():
    ours, theirs = models.spec("resnet20", SMALL), models.spec("resnet18", SMALL)
    pairing = pair(ours, theirs, SMALL, SMALL)
    assert pairing.why == "by stride"
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = models.build("resnet18", SMALL, taps=("stage3", "stage1.pre"), spec=pairing.teacher).eval()
    own = models.build("resnet18", SMALL, taps=("stage3", "stage1.pre")).eval()
    assert torch.equal(net(images).maps["stage3"], own(images).maps["stage3"])
    last = pair(theirs, models.spec("wrn-16-1", SMALL), SMALL, SMALL)
    assert stages(last.student)[0][:2] == ("stage1", "stage1")


def test_named_stages_are_taken_as_they_are_or_refused():
    assert pair(net("a", 16, 8), net("b", 32, 4), LARGE, LARGE, named=True).why == ""
    with pytest.raises(UserError) as caught:
        pair(net("a", 16, 8, 4), net("b", 32, 4), LARGE, LARGE, named=True)
    assert "the stages of a (stem stem 2x64x64, stage1.first layer1.0 3x16x16, " in str(caught.value)
    assert "are not named alike; name those that belong together stage1, stage2, ... in both tables" in str(caught.value)


def test_stages_that_grow_are_refused():
    with pytest.raises(UserError, match=r"a: stage2 \(layer2.1 4x16x16\) is larger than stage1 \(layer1.1 3x8x8\) before it; number the"):
        pair(net("a", 8, 16), net("b", 16, 8), LARGE, LARGE)


def test_without_stages_the_method_says_so():
    bare = replace(net("a", 8), taps=())
    assert pair(bare, net("b", 16, 8), LARGE, LARGE).student == bare


def test_the_lines_name_paired_taps_and_what_differs():
    pairing = pair(net("a", 32, 16, 8), net("b", 16, 8), LARGE, LARGE)
    assert compared(pairing, frozenset({"stage1", "stage2", "stem"}), frozenset({"stage1", "stage2"})) == [
        "taps of a <- b, stages paired by stride",
        "  stage1: layer2.1 4x16x16 <- layer1.1 3x16x16; channels 4 <- 3",
        "  stage2: layer3.1 5x8x8 <- layer2.1 4x8x8; channels 5 <- 4",
        "  stem: stem 2x64x64 <- -",
    ]
    same = pair(net("a", 32, 16), net("b", 16, 16), LARGE, LARGE)
    assert (
        compared(same, frozenset({"stage1"}), frozenset({"stage1"}))[1]
        == "  stage1: layer1.1 3x32x32 <- layer1.1 3x16x16; sizes 32x32 <- 16x16"
    )


GIVEN = InputSpec(3, 8, 8, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


def pixels(channels=3, size=8):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def normalised(pixels, view):
    mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
    return (pixels - mean) / std


def test_equal_inputs_need_no_adapter():
    assert input_adapter(GIVEN, InputSpec()) is None
    assert input_adapter(GIVEN, GIVEN) is None


def test_another_normalisation():
    own = InputSpec(mean=(0.1, 0.2, 0.9), std=(0.5, 0.25, 1.0))
    found = input_adapter(GIVEN, own)(normalised(pixels(), GIVEN))
    torch.testing.assert_close(found, normalised(pixels(), own))


@pytest.mark.parametrize("size", [5, 20])
def test_images_are_resized_to_the_networks_size(size):
    own = InputSpec(height=size, width=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = input_adapter(GIVEN, own)(normalised(pixels(), GIVEN))
    expected = F.interpolate(pixels(), (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected)


def test_grey_images_are_repeated_for_three_channels():
    grey, own = InputSpec(1, 8, 8, (0.5,), (0.25,)), InputSpec(3, mean=(0.1, 0.2, 0.9), std=(0.5, 0.25, 1.0))
    found = input_adapter(grey, own)(normalised(pixels(1), grey))
    torch.testing.assert_close(found, normalised(pixels(1).expand(-1, 3, -1, -1), own))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (InputSpec(1), "the network takes 1 channels, the images have 3; set data.channels=1"),
        (InputSpec(mean=(0.5, 0.5)), "inputs: mean has 2 values for 3 channels; give one for each"),
    ],
)
def test_images_that_a_network_can_not_take_are_refused(own, words):
    with pytest.raises(UserError, match=words):
        input_adapter(GIVEN, own)


def test_an_input_adapter_has_no_weights():
    assert input_adapter(GIVEN, InputSpec(height=4, width=4)).state_dict() == {}
