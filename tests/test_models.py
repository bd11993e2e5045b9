"""Registered networks: sizes, declared taps, seeds; and ResNet-20 against a second implementation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.models import Network
from flowdistill.types import DataSpec

CIFAR = DataSpec("cifar10", 50_000, 10, 3, 32, 32)
DIGITS = DataSpec("digits", 898, 10, 1, 16, 16)
GREY = DataSpec("grey", 60_000, 7, 1, 28, 28)
ODD = DataSpec("odd", 100, 5, 3, 17, 23)
ALL_TAPS = ("stem", *(f"stage{n}{part}" for n in (1, 2, 3) for part in (".first", ".pre", "")))
COUNTS = {  # at 100 classes, as the CRD benchmark's networks have them
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet26": 375_540,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet14x4": 2_783_620,
    "resnet32x4": 7_433_860,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
    "wrn-16-1": 180_916,
    "wrn-16-2": 703_284,
    "wrn-40-1": 569_780,
    "wrn-40-2": 2_255_156,
    "wrn-28-10": 36_536_884,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
FAMILIES = ("resnet14", "resnet8x4", "resnet18", "resnet50", "wrn-16-2", "vgg8", "vgg13", "mobilenetv2", "shufflenetv1", "shufflenetv2")


FOUR_STAGES = ("resnet18", "resnet34", "resnet50", "mobilenetv2")


def images(data: DataSpec, n: int = 2) -> Tensor:
    return torch.randn(n, data.channels, data.height, data.width, generator=torch.Generator().manual_seed(0))


def lived(net: Network) -> Network:
    """The network in eval mode, with scales, shifts and statistics that are no longer 0 and 1."""
    chance = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data = torch.rand(value.shape, generator=chance) + 0.5
    return net.eval()


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_parameter_counts(name):
    hundred = DataSpec("cifar100", 50_000, 100, 3, 32, 32)
    assert sum(p.numel() for p in models.build(name, hundred).parameters()) == COUNTS[name]


def test_parameter_count_follows_classes_and_channels():
    count = sum(p.numel() for p in models.build("resnet20", DataSpec("a", 1, 100, 1, 32, 32)).parameters())
    assert count == 272_474 + 90 * 65 - 2 * 16 * 9


@pytest.mark.parametrize("data", [CIFAR, DIGITS, GREY, ODD], ids=lambda data: data.name)
@pytest.mark.parametrize("name", list(models.MODELS))
def test_declared_sizes_are_the_real_ones(name, data):
    spec = models.spec(name, data)
    declared = {tap.name: (tap.channels, tap.height, tap.width) for tap in spec.taps}
    net = models.build(name, data, taps=tuple(declared)).eval()
    with torch.no_grad():
        out = net(images(data))
    assert {tap: tuple(value.shape) for tap, value in out.maps.items()} == {tap: (2, *shape) for tap, shape in declared.items()}
    assert out.embedding.shape == (2, spec.embedding)
    assert out.logits.shape == (2, spec.classes) == (2, data.classes)
    assert (spec.name, net.spec) == (name, spec)
    assert spec.stages == tuple(f"stage{n}" for n in range(1, 5 if name.startswith("vgg") or name in FOUR_STAGES else 4))
    head = net.get_submodule(spec.head)
    torch.testing.assert_close(head(out.embedding), out.logits)


def test_declared_modules_exist():
    """``TapSpec.module`` is a path inside the network, or nothing."""
    nets = [models.build(name, DIGITS) for name in models.MODELS]
    paths = {net.spec.name: {path for path, _ in net.named_modules()} for net in nets}
    wrong = {(tap.name, tap.module) for net in nets for tap in net.spec.taps if tap.module and tap.module not in paths[net.spec.name]}
    assert wrong == set()


@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_model_says_what_it_is(name):
    assert models.MODELS[name].about


@pytest.mark.parametrize("taps", [(), ("stage2",), ("stage3", "stem"), ALL_TAPS])
def test_only_the_taps_asked_for_are_given(taps):
    net = models.build("resnet8", DIGITS, taps=taps)
    assert tuple(net(images(DIGITS)).maps) == net.taps == taps


def test_unknown_tap_lists_those_there():
    with pytest.raises(ValueError, match=r"resnet8 has no tap 'stage4'; it has: stem, stage1\.first, stage1\.pre, stage1, "):
        models.build("resnet8", DIGITS, taps=("stage4",))


@pytest.mark.parametrize("training", [False, True])
def test_taps_change_neither_weights_nor_outputs(training):
    plain, tapped = models.build("resnet8", DIGITS, seed=5), models.build("resnet8", DIGITS, taps=ALL_TAPS, seed=5)
    assert equal_weights(plain, tapped)
    one, other = (net.train(training)(images(DIGITS, 4)) for net in (plain, tapped))
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.embedding, other.embedding)
    assert equal_weights(plain, tapped)


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_first_of_a_stage_is_not_its_end(name, stage):
    """Same shape, another tensor, both after ReLU; even where the stage is a single block."""
    maps = models.build(name, DIGITS, taps=ALL_TAPS)(images(DIGITS)).maps
    first, end = maps[f"stage{stage}.first"], maps[f"stage{stage}"]
    assert first.shape == end.shape
    assert not torch.allclose(first, end)
    for value in (first, end, maps["stem"]):
        assert value.min() == 0
        assert value.max() > 0


def test_embedding_is_the_mean_of_the_last_stage():
    out = models.build("resnet14", ODD, taps=("stage3",))(images(ODD))
    torch.testing.assert_close(out.embedding, out.maps["stage3"].mean((2, 3)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pre_tap_is_its_stage_before_the_relu(name):
    """Bottlenecks of MobileNetV2 are linear: they have no ReLU to be before."""
    spec = models.spec(name, CIFAR)
    net = lived(models.build(name, CIFAR, taps=tuple(tap.name for tap in spec.taps)))
    maps = net(images(CIFAR)).maps
    signed = [stage for stage in spec.stages if maps[stage].min() < 0]
    sums = name.startswith("wrn")
    assert signed == (list(spec.stages) if name == "mobilenetv2" or sums else [])
    pres = [tap for tap in maps if tap.endswith(".pre")]
    assert len(pres) == (0 if name == "mobilenetv2" else len(spec.stages))
    for tap in pres:
        assert torch.equal(F.relu(maps[tap]), maps[tap.removesuffix(".pre") + (".post" if sums else "")])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stage_that_is_seen_is_the_stage_that_goes_on(name):
    """Its gradient reaches the stem, and from it the logits come: the last stage decides them."""
    spec = models.spec(name, DIGITS)
    net = models.build(name, DIGITS, taps=spec.stages, seed=1)
    out = net(images(DIGITS, 4))
    found = torch.autograd.grad(out.logits.square().sum(), [out.maps[stage] for stage in spec.stages])
    assert all(gradient.norm() > 0 for gradient in found)


@pytest.mark.parametrize(("alias", "name"), [("resnet_32_20", "resnet20"), ("resnet_32_110", "resnet110"), ("resnet20", "resnet20")])
def test_an_alias_names_the_same_model(alias, name):
    assert models.canonical(alias) == name
    assert models.spec(alias, CIFAR) == models.spec(name, CIFAR)


def test_alias_builds_the_same_network():
    assert equal_weights(models.build("resnet_32_8", DIGITS, seed=3), models.build("resnet8", DIGITS, seed=3))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnt20", "unknown model 'resnt20': did you mean 'resnet20'?"),
        ("resnet_32_21", "unknown model 'resnet21': did you mean 'resnet"),
        ("zzz", "unknown model 'zzz': choose from: resnet8, "),
        ("", "unknown model '': choose from: resnet8, "),
    ],
)
@pytest.mark.parametrize("call", [models.canonical, lambda name: models.build(name, CIFAR), lambda name: models.spec(name, CIFAR)])
def test_an_unknown_model_is_told_in_one_line(call, name, words):
    with pytest.raises(UserError) as caught:
        call(name)
    assert str(caught.value).startswith(words)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_are_a_function_of_the_seed():
    nets = {seed: models.build("resnet8", DIGITS, seed=seed) for seed in (0, 1)}
    assert equal_weights(nets[0], models.build("resnet8", DIGITS, seed=0))
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other) == ("bn" in name or "downsample.1" in name), name


def test_building_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = models.build("resnet8", DIGITS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert equal_weights(models.build("resnet8", DIGITS), first)


def test_initial_weights_are_those_of_he():
    """Convolutions normal with variance 2 / fan-out (kernel area x outputs), batch normalisation at 1 and 0."""
    net = models.build("resnet56", CIFAR, seed=0)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0]
            scaled = module.weight.detach() * (kernel**2 * module.out_channels / 2) ** 0.5
            sigma = 5 / scaled.numel() ** 0.5  # five standard errors
            assert abs(scaled.mean()) < sigma, name
            assert abs(scaled.var() - 1) < sigma * 2**0.5, name
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


def test_shortcut_is_projected_only_where_the_shape_changes():
    names = models.build("resnet20", CIFAR).state_dict()
    assert {name.split(".downsample")[0] for name in names if "downsample" in name} == {"layer2.0", "layer3.0"}
    assert names["layer2.0.downsample.0.weight"].shape == (32, 16, 1, 1)
    assert names["layer3.0.downsample.0.weight"].shape == (64, 32, 1, 1)


def he_resnet(weights: dict[str, Tensor], x: Tensor, depth: int, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and taps by He et al. 2016, section 4.2, option B, written from the paper and a state_dict."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        else:
            mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        column = (1, -1, 1, 1)
        standard = (x - mean.view(column)) / (var.view(column) + 1e-5).sqrt()
        return standard * weights[f"{name}.weight"].view(column) + weights[f"{name}.bias"].view(column)

    x = norm(conv(x, "conv1"), "bn1").relu()
    maps = {"stem": x}
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            own = f"layer{stage}.{block}"
            shrinks = stage > 1 and block == 0
            inner = norm(conv(x, f"{own}.conv1", 2 if shrinks else 1), f"{own}.bn1").relu()
            maps.setdefault(f"stage{stage}.first", inner)
            inner = norm(conv(inner, f"{own}.conv2"), f"{own}.bn2")
            shortcut = norm(conv(x, f"{own}.downsample.0", 2), f"{own}.downsample.1") if shrinks else x
            before = inner + shortcut
            x = before.relu()
        maps[f"stage{stage}.pre"], maps[f"stage{stage}"] = before, x
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"], maps


@pytest.mark.parametrize("name", ["wrn-16-1", "wrn-16-2"])
def test_the_stages_of_a_wrn_are_the_plain_sums_that_publications_compare(name):
    """Zagoruyko and Komodakis 2016 written again from the paper and a state_dict: stem and stages before the normalisation that follows."""
    net = lived(models.build(name, CIFAR, taps=tuple(tap.name for tap in models.spec(name, CIFAR).taps if tap.name != "cam"))).double()
    weights, batch = net.state_dict(), images(CIFAR, 4).double()

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=weights[f"{name}.weight"].shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift, mean, var = (weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = conv(batch, "conv1")
    expected = {"stem": x, "stem.post": norm(x, "layer1.0.bn1").relu()}
    for stage in (1, 2, 3):
        for block in (0, 1):
            own, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            active = norm(x, f"{own}.bn1").relu()
            first = norm(conv(active, f"{own}.conv1", stride), f"{own}.bn2").relu()
            expected.setdefault(f"stage{stage}.first", first)
            shortcut = conv(active, f"{own}.shortcut", stride) if f"{own}.shortcut.weight" in weights else x
            x = conv(first, f"{own}.conv2") + shortcut
        after = norm(x, f"layer{stage + 1}.0.bn1" if stage < 3 else "bn1")
        expected |= {f"stage{stage}": x, f"stage{stage}.pre": after, f"stage{stage}.post": after.relu()}
    out = net(batch)
    assert out.maps.keys() == expected.keys()
    for tap, value in expected.items():
        torch.testing.assert_close(out.maps[tap], value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.embedding, out.maps["stage3.post"].mean((2, 3)))


def test_the_taps_of_a_wrn_have_a_version_and_keep_it_under_other_names():
    assert models.spec("wrn-16-1", CIFAR).version == models.spec("reused(wrn-16-1,resnet8,2)", CIFAR).version == 2
    assert models.spec("wrn-16-1", CIFAR, {"stage1": "stage1.post"}).version == 2
    others = [name for name in models.MODELS if not name.startswith("wrn")]
    assert {models.spec(name, CIFAR).version for name in others} == {1}


@pytest.mark.parametrize(
    ("source", "own"),
    [("stage2", "stage2"), ("stage2.post", "stage2.post"), ("layer3.0.bn1", "stage2.post"), ("layer2.1", "stage2"), ("bn1", "stage3.post")],
)
def test_a_wrns_taps_by_name_or_by_module(source, own):
    """A module is named for what it gives, a ReLU after it included."""
    assert models.spec("wrn-16-1", CIFAR, {"stage1": source}).tap("stage1").own == own


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("data", [CIFAR, GREY], ids=lambda data: data.name)
def test_resnet20_equals_a_second_implementation(data, training):
    net = lived(models.build("resnet20", data, taps=ALL_TAPS)).double()
    weights, batch = {name: value.clone() for name, value in net.state_dict().items()}, images(data, 4).double()
    logits, maps = he_resnet(weights, batch, 20, training=training)
    out = net.train(training)(batch)
    torch.testing.assert_close(out.logits, logits, rtol=1e-9, atol=1e-9)
    assert logits.std() > 1e-3
    assert out.maps.keys() == maps.keys()
    for tap in ALL_TAPS:
        torch.testing.assert_close(out.maps[tap], maps[tap], rtol=1e-9, atol=1e-9)


def test_batch_normalisation_in_eval_mode_uses_and_keeps_its_statistics():
    net = lived(models.build("resnet8", DIGITS))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batch = images(DIGITS, 4)
    together, alone = net(batch).logits, net(batch[:1]).logits
    torch.testing.assert_close(alone, together[:1])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_batch_normalisation_in_train_mode_uses_the_batch_and_moves_its_statistics():
    net = lived(models.build("resnet8", DIGITS)).train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    batch = images(DIGITS, 4)
    assert not torch.allclose(net(batch).logits[:1], net(batch[:1]).logits)
    assert [name for name, value in net.named_buffers() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet110", *FAMILIES])
def test_gradients_reach_every_parameter(name):
    net = models.build(name, DIGITS)
    F.cross_entropy(net(images(DIGITS, 4)).logits, torch.arange(4)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []


@pytest.mark.parametrize("tap", ALL_TAPS)
def test_gradient_of_a_tap_reaches_the_stem(tap):
    net = models.build("resnet8", DIGITS, taps=(tap,))
    net(images(DIGITS)).maps[tap].square().mean().backward()
    assert net.conv1.weight.grad.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_activation_maps_average_to_the_logits_less_the_bias(name):
    net = lived(models.build(name, CIFAR, taps=("cam",)))
    out = net(images(CIFAR))
    torch.testing.assert_close(out.maps["cam"].mean((2, 3)) + net.get_parameter(f"{net.spec.head}.bias"), out.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_the_norm_of_a_map_before_its_relu_is_the_normalisation_that_gave_it(name):
    """Where nothing is added to it, the map is the normalisation's output; where a shortcut is, they have equal channels."""
    net = models.build(name, CIFAR, taps=tuple(tap.name for tap in models.spec(name, CIFAR).taps if tap.norm)).eval()
    seen = {}
    for tap in net.taps:
        norm = net.get_submodule(net.spec.tap(tap).norm)
        assert isinstance(norm, torch.nn.BatchNorm2d)
        norm.register_forward_hook(lambda _module, _inputs, output, tap=tap: seen.__setitem__(tap, output))
    maps = net(images(CIFAR)).maps
    expected = 0 if name in ("mobilenetv2", "shufflenetv2") else len(net.spec.stages)  # linear ends; two branches
    assert len(maps) == expected
    for tap, value in maps.items():
        assert value.shape == seen[tap].shape
        if name.startswith(("wrn", "vgg")):
            assert torch.equal(value, seen[tap])
