"""The dry run: where stages end, what the stem and the classifier are, in networks that nobody prepared."""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.models.survey import survey
from flowdistill.models.watching import Layout, layout_of
from flowdistill.randomness import states


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Expanding(nn.Module):
    """Each block widens its input at the old size before it shrinks it: that map is no stage's end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.blocks = nn.Sequential(*(nn.Sequential(conv(4, 24), conv(24, 24, stride), nn.Conv2d(24, 4, 1)) for stride in (1, 2, 2)))
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(images)).mean((2, 3)))


class Functional(nn.Module):
    """No stages, no names, pooling and ReLU as functions, one module used twice, and a branch that tracing can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(images)), 2)
        x = F.relu(self.c(F.relu(self.b(x))))
        x = F.max_pool2d(F.relu(self.c(x)), 2)
        if x.mean() > 1e9:
            x = x / 2
        return self.out(x.mean((2, 3)))


class Tokens(nn.Module):
    """A class token, and blocks of one size."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True) for _ in range(depth))
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Gated(nn.Module):
    """Squeeze and excitation: its inner maps of one position are no stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 4), conv(4, 8, 2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.second(self.first(images))
        return self.fc(self.pool(x * self.gate(x)).flatten(1))


def found(net: nn.Module, size: int = 32) -> dict[str, tuple[str, str]]:
    return {tap.name: (tap.module, tap.shape) for tap in survey(net, 3, size, size).taps}


def test_a_block_that_widens_before_it_shrinks():
    assert found(Expanding()) == {
        "stem": ("stem", "4x32x32"),
        "stage1": ("blocks.0", "4x32x32"),
        "stage2": ("blocks.1", "4x16x16"),
        "stage3": ("blocks", "4x8x8"),
    }


def test_stages_are_found_with_functions_between_modules():
    assert found(Functional()) == {"stem": ("a", "4x32x32"), "stage1": ("c", "8x16x16")}


def test_four_stages_are_spread_over_blocks_of_one_size():
    taps = found(Tokens())
    assert taps.pop("stem") == ("patches", "12x8x8")
    assert taps == {f"stage{number}": (f"blocks.{block}", "12x8x8") for number, block in enumerate((1, 2, 4, 5), 1)}


def test_gates_are_no_stage():
    assert found(Gated()) == {"stem": ("first", "4x32x32"), "stage1": ("second", "8x16x16")}


def test_maps_of_one_position_are_left_out():
    """At 4x4 the last stage has shrunk to one; the larger run still tells the others apart."""
    assert list(found(Expanding(), size=4)) == ["stem", "stage1", "stage2"]


@pytest.mark.parametrize(("size", "path"), [(4, ""), (2, "blocks.2.1.0")])
def test_a_stride_that_is_larger_than_its_map_is_seen(size, path):
    assert survey(Expanding(), 3, size, size).overstepped == path


def test_a_depthwise_stride_counts_for_nothing():
    net = Expanding()
    net.blocks[2][1][0] = nn.Conv2d(24, 24, 3, 2, padding=1, groups=24)
    assert survey(net, 3, 2, 2).overstepped == ""


def test_the_classifier_is_the_layer_whose_output_the_logits_are():
    net = Functional()
    seen = survey(net, 3, 32, 32)
    assert (seen.head, seen.embedding, seen.classes, seen.named) == ("out", 8, 5, False)


def test_the_dry_run_leaves_no_trace():
    net = Expanding().train()
    net.stem.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    survey(net, 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (net.training, net.stem.training, net.blocks.training) == (True, False, True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Attentive(nn.Module):
    """Each block multiplies its tokens by a softmax over all pairs of them, 196 x 196: nearly as large as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.softmax = nn.Conv2d(3, 12, 16, 16), nn.Softmax(-1)
        self.mix, self.fc = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        pairs = self.softmax((x @ x.transpose(1, 2))[:, None])
        return self.fc(self.mix((pairs @ x[:, None])[:, 0]).mean(1))


def test_attention_maps_are_no_stage():
    assert found(Attentive(), size=224) == {"stem": ("patches", "12x14x14"), "stage1": ("mix", "12x14x14")}


class Talking(nn.Module):
    """Attention whose heads are mixed by a linear layer, [N, T, T, heads], and then dropped, [N, heads, T, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.drop, self.out = nn.Linear(4, 4), nn.Dropout(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (4, 3)).transpose(1, 2)
        pairs = self.mix((heads @ heads.transpose(2, 3)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out((self.drop(pairs.softmax(-1)) @ heads).transpose(1, 2).flatten(2))


class Mixing(nn.Module):
    """A token for each of 4x4 positions."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patches, self.fc = nn.Conv2d(3, 12, 16, 16), nn.Linear(12, 5)
        self.blocks = nn.Sequential(*(Talking() for _ in range(depth)))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


def test_attention_maps_of_few_tokens_are_no_stage():
    """16 tokens, whose pairs are a map of 16x16, a quarter of the image."""
    taps = {"stem": ("patches", "12x4x4"), "stage1": ("blocks.0", "12x4x4"), "stage2": ("blocks", "12x4x4")}
    assert found(Mixing(), size=64) == taps
    assert not {"blocks.0.mix", "blocks.0.drop"} & survey(Mixing(), 3, 64, 64).layouts.keys()


class Bare(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> object:
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda images: images, "gives a tensor (2, 3, 8, 8), not logits [N, classes]"),
        (lambda images: [images], "gives a list, not logits"),
        (lambda images: images.mean((2, 3)), "its 3 logits are not those of a linear layer on a vector"),
    ],
)
def test_what_is_no_classifier_is_refused(answer, words):
    with pytest.raises(ValueError) as caught:
        survey(Bare(answer), 3, 8, 8)
    assert words in str(caught.value)


class Headed(nn.Module):
    """The logits are some function of two linear layers; a gate has as many outputs as there are classes."""

    def __init__(self, logits: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.one, self.other, self.logits = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5), logits

    def forward(self, images: Tensor) -> Tensor:
        x = self.gate(images.mean((2, 3)))
        return self.logits(self.one(input=x), self.other(x * x))


@pytest.mark.parametrize(
    "logits",
    [
        lambda one, _: one,
        lambda one, _: one[:, None].double().squeeze(1),
        lambda one, _: 30 * one.half().float(),
        lambda one, _: one.log_softmax(1),
    ],
)
def test_the_classifier_is_the_layer_that_tells_the_logits(logits):
    assert survey(Headed(logits), 3, 8, 8).head == "one"


def test_of_classifiers_that_are_averaged_it_is_the_last():
    net = Headed(lambda one, other: (one + other) / 2)
    net.gate = nn.Linear(3, 6)
    net.one, net.other = nn.Linear(6, 5), nn.Linear(6, 5)
    assert survey(net, 3, 8, 8).head == "other"


@pytest.mark.parametrize("logits", [lambda one, other: 0.7 * one + 0.3 * other, lambda one, other: torch.maximum(one, other)])
def test_logits_of_several_layers_are_refused(logits):
    words = r"its 5 logits are made of several layers' \(gate, one, other\), not those of one linear layer on a vector"
    with pytest.raises(ValueError, match=words):
        survey(Headed(logits), 3, 8, 8)


class Answering(nn.Module):
    """One classifier, and what becomes of the numbers that it gives; in one mode, where that is said."""

    def __init__(self, become: Callable[[Tensor], Tensor], *, mode: bool | None = None, size: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc, self.become, self.mode = nn.BatchNorm2d(3), nn.Linear(3, 5), become, mode
        self.fc.weight.data.mul_(size)
        self.fc.bias.data.mul_(size)
        self.after = nn.BatchNorm1d(5)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(self.norm(images).mean((2, 3)))
        return self.become(logits) if self.mode in (None, self.training) else logits


ALLOWED = {
    "itself": lambda z: z,
    "colder": lambda z: z / 4,
    "hotter": lambda z: 100 * z,
    "log-softmax": lambda z: z.log_softmax(1),
    "log-softmax of warmer": lambda z: (z / 4).log_softmax(1),
    "centred": lambda z: z - z.mean(1, keepdim=True),
    "less the largest": lambda z: z - z.amax(1, keepdim=True),
    "float16": lambda z: z.half().float(),
    "bfloat16": lambda z: z.bfloat16(),
    "float64": lambda z: z.double(),
    "8 bits": lambda z: torch.fake_quantize_per_tensor_affine(z, float(z.detach().abs().max()) / 127, 0, -127, 127),
    "masked": lambda z: z.masked_fill(torch.arange(5) == 2, -torch.inf),
    "masked by a number": lambda z: z.masked_fill(torch.arange(5) == 2, -1e9),
    "in place": lambda z: z.mul_(2.0),
}


@pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("become", ALLOWED.values(), ids=ALLOWED)
def test_harmless_changes_of_logits_are_allowed(become, size):
    found = survey(Answering(become, size=size), 3, 8, 8)
    assert (found.head, found.altered) == ("fc", "")


def test_logits_in_eight_bits_are_allowed():
    found = survey(Answering(lambda z: torch.fake_quantize_per_tensor_affine(z, 0.01, 0, -128, 127)), 3, 8, 8)
    assert (found.head, found.altered) == ("fc", "")


OTHERWISE = r"something else than the logits of its classifier fc \(a positive factor and a shift of each image aside\); let it give these"
PROBABILITIES = "probabilities, not the logits of its classifier fc; leave the softmax out"
UNIT = "numbers from 0 to 1, not the logits of its classifier fc; leave the sigmoid out"
REFUSED = {
    "softmax": (lambda z: z.softmax(1), PROBABILITIES),
    "softmax of warmer": (lambda z: (z / 20).softmax(1), PROBABILITIES),
    "softmax in half": (lambda z: z.softmax(1).half(), PROBABILITIES),
    "sigmoid": (lambda z: z.sigmoid(), UNIT),
    "hard sigmoid": (F.hardsigmoid, UNIT),
    "softmax in percent": (lambda z: 100 * z.softmax(1), OTHERWISE),
    "square root of softmax": (lambda z: z.softmax(1).sqrt(), PROBABILITIES),
    "normalised": (lambda z: F.normalize(z), OTHERWISE),
    "standardised": (lambda z: F.layer_norm(z, (5,)), OTHERWISE),
    "tanh": (lambda z: z.tanh(), OTHERWISE),
    "capped": (lambda z: 30 * (z / 30).tanh(), OTHERWISE),
    "ReLU": (lambda z: z.relu(), OTHERWISE),
    "leaky ReLU": (lambda z: F.leaky_relu(z, 0.5), OTHERWISE),
    "log-sigmoid": (F.logsigmoid, OTHERWISE),
    "clamped": (lambda z: z.clamp(-10, 10), OTHERWISE),
    "turned": (lambda z: -z, OTHERWISE),
    "softmin": (lambda z: (-z).softmax(1), PROBABILITIES),
    "a factor of each class": (lambda z: z * torch.tensor([1.0, 1.0, 1.1, 1.0, 1.0]), OTHERWISE),
    "another order": (lambda z: z[:, [1, 0, 2, 3, 4]], OTHERWISE),
    "sorted": (lambda z: z.sort(1).values, OTHERWISE),
    "a number of each class": (lambda z: z + torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0]), OTHERWISE),
    "exponential": (lambda z: z.exp(), OTHERWISE),
    "squared": (lambda z: z.square(), OTHERWISE),
    "the largest alone": (lambda z: F.one_hot(z.argmax(1), 5).float(), PROBABILITIES),
    "dropped": (lambda z: F.dropout(z, 0.5), OTHERWISE),
    "by the batch": (lambda z: z - z.mean(0), OTHERWISE),
}


@pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize(("become", "gives"), REFUSED.values(), ids=REFUSED)
def test_changes_that_leave_no_logits_are_seen(become, gives, size):
    """However small the logits are: a softmax of numbers near 0 is a factor and a shift, but for what training makes of it."""
    found = survey(Answering(become, size=size), 3, 8, 8)
    assert found.head == "fc"
    assert re.fullmatch(f"it gives {gives}", found.altered)


@pytest.mark.parametrize("training", [True, False])
def test_probabilities_in_one_mode_are_seen(training):
    found = survey(Answering(lambda z: z.softmax(1), mode=training), 3, 8, 8)
    assert found.altered == f"{'in train mode ' * training}it gives {PROBABILITIES}"


def test_a_normalisation_of_logits_is_seen_before_it_has_learnt_anything():
    net = Answering(lambda z: z)
    net.become = net.after
    assert re.fullmatch(f"in train mode it gives {OTHERWISE}", survey(net, 3, 8, 8).altered)


def test_the_layers_own_hooks_come_first():
    """What a hook makes of the output is the output; the weights alone do not make these logits."""
    net = Answering(lambda z: z)
    assert survey(net, 3, 8, 8).apart == ""
    hook = net.fc.register_forward_hook(lambda _m, _i, logits: logits.softmax(1))
    found = survey(net, 3, 8, 8)
    assert (found.altered, found.apart) == ("", "its logits are not what the weights of its classifier fc make of the embedding")
    hook.remove()
    for normed in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm):
        net = Answering(lambda z: z)
        normed(net.fc)
        found = survey(net, 3, 8, 8)
        assert (found.head, found.altered, found.apart) == ("fc", "", "")


def test_logits_that_the_weights_do_not_make_are_seen():
    assert survey(Answering(lambda z: z.half().float()), 3, 8, 8).apart == ""
    for become in (lambda z: 2 * z, lambda z: z.log_softmax(1)):
        assert "make of the embedding" in survey(Answering(become), 3, 8, 8).apart


class Gate(nn.Module):
    """A layer with as many outputs as there are classes that is none: the classifier is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(3, 5), nn.Parameter(torch.randn(5, 5))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(self.gate(images.mean((2, 3))), self.weight)


class Beside(nn.Module):
    """Its classifier, and something of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.factor = nn.Linear(3, 5), nn.Parameter(torch.randn(5))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean((2, 3))) + images.mean((1, 2, 3))[:, None] * self.factor


def test_the_only_layer_of_so_many_outputs_need_not_be_the_classifier():
    with pytest.raises(ValueError, match=r"its 5 logits are not those of a linear layer on a vector \[N, D\]"):
        survey(Beside(), 3, 8, 8)
    assert survey(Gate(), 3, 8, 8).altered


class Crops(nn.Module):
    """The mean over an image and its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        one, other = (self.fc(self.conv(x).relu().mean((2, 3))) for x in (images, images.flip(3)))
        return (one + other) / 2


def test_the_mean_of_two_crops_is_allowed():
    found = survey(Crops(), 3, 8, 8)
    assert (found.head, found.altered) == ("fc", "")


class Forgetful(nn.Module):
    """Draws from a generator of its own in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.chance = nn.Linear(3, 5), torch.Generator()

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean((2, 3))
        return self.fc(x * torch.rand(x.shape, generator=self.chance))


def test_draws_that_nobody_can_seed_are_refused():
    with pytest.raises(ValueError, match=r"^in eval mode it answers the same images otherwise when it is asked again; let it draw from"):
        survey(Forgetful(), 3, 8, 8)


DRAWING = {
    "torch": lambda x: F.dropout(x, 0.5),
    "numpy": lambda x: x * float(np.random.rand()),
    "python": lambda x: x * random.random(),
    "nothing": lambda x: x,
}


@pytest.mark.parametrize(("draw", "draws"), [(draw, name != "nothing") for name, draw in DRAWING.items()], ids=DRAWING)
def test_a_network_that_draws_in_eval_mode_is_seen(draw, draws):
    net = Answering(lambda z: z)
    net.norm.register_forward_hook(lambda _m, _i, x: draw(x))
    before = states()
    found = survey(net, 3, 8, 8)
    assert states() == before
    assert (found.draws, found.draws_always, found.head, found.altered) == (draws, draws, "fc", "")


class Counting(nn.Module):
    """Observes: one buffer takes the shape of what it sees, another is not there before a pass, a third is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("later", None)
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean((2, 3))
        self.seen.resize_(3).copy_(x[0])
        self.later = x[1].detach()
        self.passes += 1
        return self.fc(x)


def test_buffers_that_take_another_shape_are_seen():
    net = Counting()
    seen = net.seen
    assert survey(net, 3, 8, 8).grown == {"seen", "later"}
    assert net.seen is seen
    assert (net.seen.shape, net.later, net.passes) == ((0,), None, 0)


class Training(nn.Module):
    """Gives logits, and in train mode what is made of them."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fc, self.norm, self.answer = nn.Linear(3, 5), nn.BatchNorm1d(5), answer

    def forward(self, images: Tensor) -> object:
        logits = self.fc(images.mean((2, 3)))
        return self.answer(logits) if self.training else logits


class Named(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


@pytest.mark.parametrize(
    ("answer", "gives"),
    [
        (lambda logits: (logits, logits), "a tuple"),
        (lambda logits: Named(logits, logits), "a Named"),
        (lambda logits: {"logits": logits}, "a dict"),
        (lambda logits: torch.cat([logits, logits]), r"logits \[4, 5\]"),
    ],
)
def test_another_answer_in_train_mode_is_refused(answer, gives):
    net = Training(answer)
    cure = r"switch its auxiliary heads off \(such as aux_logits=False\), or wrap it so that it gives logits alone"
    with pytest.raises(ValueError, match=f"^in train mode it gives {gives}, in eval mode logits \\[2, 5\\]; {cure}$"):
        survey(net, 3, 8, 8)
    assert net.training


def test_a_batch_that_is_too_small_to_train_on_is_not_judged():
    def too_small(logits: Tensor) -> Tensor:
        return nn.functional.batch_norm(logits[:1], None, None, training=True)

    assert survey(Training(too_small), 3, 8, 8).draws


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 5, 8, 8), Layout("nchw", 5, 8, 8)),
        ((2, 8, 8, 5), Layout("nhwc", 5, 8, 8)),
        ((2, 64, 5), Layout("tokens", 5, 8, 8)),
        ((2, 65, 5), Layout("tokens", 5, 8, 8, 1)),
        ((2, 66, 5), Layout("tokens", 5, 8, 8, 2)),
        ((2, 5, 8, 7), None),
        ((2, 60, 5), None),
        ((4, 5, 8, 8), None),  # windows: more than the images
        ((2, 5), None),
    ],
)
def test_the_layout_of_an_output_is_known(shape, expected):
    output = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert layout_of(output, nn.Identity(), 32, 32) == expected
    if expected is not None:
        assert expected.map(output).shape == (2, 5, 8, 8)


def test_tokens_keep_their_places():
    """Token prefix + y W + x is the position (y, x)."""
    tokens = torch.arange(2 * 7 * 3).reshape(2, 7, 3)
    image = Layout("tokens", 3, 2, 3, 1).map(tokens)
    assert all(torch.equal(image[:, :, y, x], tokens[:, 1 + 3 * y + x]) for y in range(2) for x in range(3))


def test_the_layout_of_images_that_are_not_square_is_known():
    assert layout_of(torch.zeros(2, 7, 8, 12), nn.Identity(), 32, 48) == Layout("nchw", 7, 8, 12)
    assert layout_of(torch.zeros(2, 97, 7), nn.Identity(), 32, 48) == Layout("tokens", 7, 8, 12, 1)
