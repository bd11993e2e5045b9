"""Networks of others: how they are named and made, what their hooks give, in every way that training uses them."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.methods import Needs
from flowdistill.models.foreign import adopt
from flowdistill.training.teacher import Teacher
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

DATA = DataSpec("some", 100, 7, 3, 64, 64)
GREY = DataSpec("grey", 100, 7, 1, 32, 32)
NAMES = ("timm:resnet18", "timm:mobilenetv3_small_050", "timm:vit_tiny_patch16_224", "timm:convnext_atto", "torchvision:shufflenet_v2_x0_5")

FILE = """
import sys
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_chans, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(6, num_classes)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))

def small(classes=3, channels=1):
    return Small(classes, channels)

def three():
    return Small(3, 1)

def number():
    return 3

def fails(classes):
    raise RuntimeError("no such thing\\nsecond line")

def leaves():
    sys.exit(0)

class Leaving(Small):
    def forward(self, images):
        sys.exit()

class LeavingTraining(Small):
    def forward(self, images):
        return sys.exit(3) if self.training else super().forward(images)

class Stated(Small):
    def get_extra_state(self):
        return {"steps": 3}

def lazy(classes):
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(classes))

def meta(classes):
    return Small(classes, 1).to("meta")
"""


def images(data: DataSpec, n: int = 4) -> Tensor:
    return torch.randn(n, data.channels, data.height, data.width, generator=torch.Generator().manual_seed(0))


def whole(name: str, data: DataSpec = DATA) -> models.Network:
    return models.build(name, data, taps=tuple(tap.name for tap in models.spec(name, data).taps), seed=1).eval()


@pytest.mark.parametrize("name", NAMES)
def test_declared_sizes_are_the_real_ones(name):
    spec, net = models.spec(name, DATA), whole(name)
    with torch.no_grad():
        out = net(images(DATA))
    assert {tap: tuple(value.shape[1:]) for tap, value in out.maps.items()} == {t.name: (t.channels, t.height, t.width) for t in spec.taps}
    assert len(spec.stages) >= 3
    assert out.embedding.shape == (4, spec.embedding)
    torch.testing.assert_close(net.body.get_submodule(spec.head)(out.embedding), out.logits)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_change_nothing_and_survive_a_copy(name):
    net = whole(name)
    other = deepcopy(net)
    with torch.no_grad():
        plain = net.body(images(DATA))
        out, again = net(images(DATA)), other(images(DATA))
        other.body.get_submodule(other.spec.head).weight.zero_()
        changed = other(images(DATA))
    assert torch.equal(out.logits, plain)
    assert torch.equal(again.logits, plain)
    assert all(torch.equal(out.maps[tap], again.maps[tap]) for tap in out.maps)
    assert not torch.equal(changed.logits, plain)
    assert net.seen == {} == other.seen


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name):
    """In one graph, and a second batch gives its own maps."""
    net = whole(name)
    compiled = torch.compile(lambda batch: net(batch), fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        for batch in (images(DATA), images(DATA) * 0.5 + 1):
            out, expected = compiled(batch), net(batch)
            torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
            for tap in expected.maps:
                torch.testing.assert_close(out.maps[tap], expected.maps[tap], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_that_is_trimmed_and_folded_gives_the_same(name):
    net = whole(name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
            module.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = net(images(DATA))
    teacher = Teacher(deepcopy(net), Needs(teacher=frozenset({"stem", "stage2"}), logits=True), "fp32")
    assert teacher.whole == ""
    out = teacher.teach(images(DATA))
    assert out.embedding is None
    assert set(out.maps) == {"stem", "stage2"}
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-3, atol=1e-4)
    for tap in out.maps:
        torch.testing.assert_close(out.maps[tap], expected.maps[tap], rtol=1e-3, atol=1e-4)
    assert not any(module._forward_hooks for module in teacher.net.modules())


def test_a_teacher_that_can_not_be_traced_runs_whole():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc(x.mean((2, 3)) if x.mean() < 9 else x.amax((2, 3)))

    net = whole(adopt(Branching(), "b"))
    teacher = Teacher(net, Needs(teacher=frozenset({"stem"}), logits=True), "fp32")
    assert "control flow" in teacher.whole
    assert torch.equal(teacher.teach(images(DATA)).logits, net(images(DATA)).logits)


def test_what_a_teachers_own_hooks_change_stays_changed():
    """Hooks of layers are called when it is traced; what they give is what the layer gave."""
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
    inner[0].register_forward_hook(lambda _m, _i, x: 2 * x)
    inner[4].register_forward_hook(lambda _m, _a, _k, x: x - 1, with_kwargs=True)
    net = whole(adopt(inner, "hooked"))
    expected = net(images(DATA))
    teacher = Teacher(net, Needs(logits=True, embedding=True), "fp32")
    assert teacher.whole == ""
    found = teacher.teach(images(DATA))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.embedding, expected.embedding)


class Untidy(nn.Module):
    """It changes its images and its own maps in place, and flattens by ``view``, which takes no channels_last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2, 1)
        self.fc = nn.Linear(6 * 8 * 8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.mul_(2).sub_(0.5)))
        x = self.second(F.relu(x, inplace=True))
        x = F.max_pool2d(x, 2)
        return self.fc(x.view(x.size(0), -1))


@pytest.fixture(params=["eager", "compiled", "teacher"])
def untidy(request):
    """The network, and how it is called: as training calls a student, compiled, and a teacher."""
    net = whole(adopt(Untidy(), "untidy")).on(torch.device("cpu"))
    if request.param == "teacher":
        teacher = Teacher(deepcopy(net), Needs(teacher=frozenset(net.taps), logits=True), "fp32")
        assert teacher.whole == ""
        return net, teacher.teach
    return net, net if request.param == "eager" else torch.compile(net, backend="aot_eager")


def test_a_tap_is_what_its_module_gave_before_that_was_changed_in_place(untidy):
    net, answer = untidy
    assert {tap.name: tap.module for tap in net.spec.taps} == {"stem": "norm", "stage1": "second"}
    given = []
    net.body.norm.register_forward_hook(lambda module, inputs, output: given.append(output.clone()))
    with torch.no_grad():
        net.body(images(DATA))
        found = answer(images(DATA)).maps["stem"]
    assert (given[0] < 0).any()
    torch.testing.assert_close(found, given[0], rtol=1e-4, atol=1e-5)


def test_images_are_left_as_they_came(untidy):
    _, answer = untidy
    given = images(DATA).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        answer(given)
    assert torch.equal(given, images(DATA))


def test_a_network_that_channels_last_breaks_stays_contiguous(untidy):
    net, answer = untidy
    assert net.body.first.weight.is_contiguous()
    with pytest.raises(RuntimeError, match="view size"):
        net.body(images(DATA).contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        expected = net.body(images(DATA))
        found = answer(images(DATA).contiguous(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert whole("timm:resnet18").on(torch.device("cpu")).body.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_dry_run_compiles_nothing():
    net = Untidy()
    net.first = torch.compile(net.first)
    torch._dynamo.utils.counters.clear()
    assert models.spec(adopt(net, "compiled"), DATA).stages
    assert not torch._dynamo.utils.counters["stats"]


def test_weights_have_the_names_that_the_library_gives_them():
    import timm

    net, own = whole("timm:resnet18"), timm.create_model("resnet18", num_classes=7)
    assert net.state_dict().keys() == own.state_dict().keys()
    own.load_state_dict(net.state_dict())
    other = models.build("timm:resnet18", DATA, seed=2)
    other.load_state_dict(own.state_dict())
    assert torch.equal(other.body.conv1.weight, own.conv1.weight)


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (models.build("timm:resnet18", GREY, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.body.conv1.weight, same.body.conv1.weight)
    assert not torch.equal(one.body.conv1.weight, other.body.conv1.weight)


def test_a_transformer_takes_the_size_of_the_data():
    assert [tap.shape for tap in models.spec("timm:vit_tiny_patch16_224", DATA).taps] == ["192x4x4"] * 5


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("function", ["small", "Small"])
def test_a_function_or_class_of_a_file_makes_a_network(nets, function):
    name = f"{nets}:{function}"
    assert models.canonical(name) == name
    spec = models.spec(name, GREY)
    assert [(tap.name, tap.module, tap.shape) for tap in spec.taps] == [("stem", "body.1", "4x32x32"), ("stage1", "body", "6x16x16")]
    assert whole(name, GREY)(images(GREY)).logits.shape == (4, 7)


def test_a_changed_file_is_another_network(nets, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(FILE.replace("nn.ReLU()", "nn.Tanh()"))
    assert len({models.made_of(name, GREY) for name in (f"{nets}:small", f"{other}:small", "timm:resnet18")}) == 3
    assert models.made_of("timm:resnet18", GREY) == "" == models.made_of("resnet20", GREY)
    assert models.own_code(f"{nets}:small").keys() == {"nets.py"}
    assert models.own_code("timm:resnet18") == {} == models.own_code("resnet20")


def test_a_function_of_a_package_makes_a_network(nets, monkeypatch):
    monkeypatch.syspath_prepend(str(nets.parent))
    assert models.spec("nets:small", GREY).classes == 7


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet1", "unknown model 'timm:resnet1': did you mean 'resnet"),
        ("torchvision:resnet1", "unknown model 'torchvision:resnet1': did you mean 'resnet"),
        ("{nets}:smal", "has no function of that name; did you mean 'small'?"),
        ("{nets}:number", "gives a int; it must give an nn.Module"),
        ("{nets}:fails", "can't be made for images of 1x32x32 and 7 classes: RuntimeError: no such thing"),
        ("{nets}:leaves", "can't be made for images of 1x32x32 and 7 classes: SystemExit: 0"),
        ("{nets}:Leaving", "no classifier of images of 1x32x32: SystemExit"),
        ("{nets}:LeavingTraining", "no classifier of images of 1x32x32: SystemExit: 3"),
        ("{nets}:Stated", "its state has '_extra_state', which is no tensor; give a module whose state_dict holds tensors alone"),
        ("{nets}:lazy", "nets.py:lazy: 0.weight has no size yet; run the module once on a batch of images"),
        ("{nets}:meta", "nets.py:meta: body.0.weight is on the meta device, without numbers; put the module on a device"),
        ("math:hypot", "math:hypot: does not say what its parameters are; write a function or class in Python"),
        ("builtins:dict", "builtins:dict: does not say what its parameters are; write a function or class in Python"),
        ("{nets}x.py:small", "no such file"),
        ("no_such_package:small", "can't be imported: ModuleNotFoundError"),
        ("torchvision:resnet18", "takes 3 channels, the images have 1; set data.channels=3"),
        ("module:Gone-1", "was given from Python, and is in no file; give it from Python again"),
        ("timm:inception_v3", "no classifier of images of 1x32x32"),
    ],
)
def test_mistakes_are_one_line(nets, name, words):
    with pytest.raises(UserError) as caught:
        models.spec(name.format(nets=nets), GREY)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("content", "why"), [("1 / 0\n", "ZeroDivisionError"), ("import sys\nsys.exit(0)\n", "SystemExit: 0")])
def test_a_file_that_fails_is_told_each_time(tmp_path, content, why):
    (tmp_path / "broken.py").write_text(content)
    for _ in range(2):
        with pytest.raises(UserError, match=f"can't be run: {why}"):
            models.spec(f"{tmp_path}/broken.py:small", GREY)


def test_a_package_that_leaves_is_told(tmp_path, monkeypatch):
    (tmp_path / "leaving_package.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"^leaving_package: can't be imported: SystemExit: 0; write FILE.py:FUNCTION for a file$"):
        models.spec("leaving_package:small", GREY)


def test_an_interrupt_goes_through(tmp_path):
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        models.spec(f"{tmp_path}/interrupted.py:small", GREY)


class Skipping(nn.Module):
    """Its second convolution, or its classifier, is left out once told so; the classifier is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Linear(4, 7)
        self.skipped = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x if self.skipped == "second" else self.second(x)
        x = x.mean((2, 3))
        return x.repeat(1, 2)[:, :7] if self.skipped == "fc" else self.fc(input=x)


def test_a_module_that_is_not_called_is_named():
    net = models.build(adopt(Skipping(), "skips"), DATA, taps=("stage1",))
    assert net(images(DATA)).maps["stage1"].shape == (4, 4, 16, 16)
    net.body.skipped = "second"
    with pytest.raises(UserError, match=r"^tap stage1=second: module:Skipping-skips did not call it on this batch; name a module"):
        net(images(DATA))
    net.body.skipped = "fc"
    with pytest.raises(UserError, match=r"^module:Skipping-skips did not call its classifier fc on this batch; switch off"):
        net(images(DATA))


def test_a_classifier_that_is_called_by_keyword():
    net = whole(adopt(Skipping(), "keyword"))
    out = net(images(DATA))
    teacher = Teacher(deepcopy(net), Needs(logits=True, embedding=True), "fp32")
    assert teacher.whole == ""
    torch.testing.assert_close(teacher.teach(images(DATA)).embedding, out.embedding)
    torch.testing.assert_close(net.body.fc(out.embedding), out.logits)


def test_a_function_gives_the_classes_that_are_wanted_and_a_module_those_that_it_has(nets):
    with pytest.raises(UserError, match="gives 3 classes where 7 are wanted; let it take their number as `classes`"):
        models.spec(f"{nets}:three", GREY)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
    assert models.spec(adopt(net, "five"), GREY).classes == 5


class TestTables:
    """Taps that the user names."""

    def test_taps_are_named_by_paths_and_wildcards(self):
        spec = models.spec("timm:resnet18", DATA, {"first": "conv1", "stage": "layer?", "deep": "stage4"})
        assert [(tap.name, tap.module) for tap in spec.taps] == [
            ("first", "conv1"),
            *((f"stage{n}", f"layer{n}") for n in (1, 2, 3, 4)),
            ("deep", "layer4"),
        ]
        assert spec.stages == ("stage1", "stage2", "stage3", "stage4")
        net = models.build("timm:resnet18", DATA, taps=("first", "stage2"), spec=spec).eval()
        assert [tuple(value.shape) for value in net(images(DATA)).maps.values()] == [(4, 64, 32, 32), (4, 128, 8, 8)]

    def test_a_wildcard_stays_on_its_level(self):
        assert [tap.module for tap in models.spec("timm:resnet18", DATA, {"b": "layer1.*"}).taps] == ["layer1.0", "layer1.1"]

    @pytest.mark.parametrize("path", ["layer9", "fc", "global_pool"])
    def test_a_path_that_gives_no_map_is_refused(self, path):
        with pytest.raises(UserError, match=f"tap a={path}: timm:resnet18 has no such module that gives a map; "):
            models.spec("timm:resnet18", DATA, {"a": path})

    def test_taps_of_a_registered_network_are_renamed(self):
        spec = models.spec("resnet20", DATA, {"stage1": "stage2", "stage2": "stage3"})
        assert spec.stages == ("stage1", "stage2")
        net = models.build("resnet20", DATA, taps=("stage1",), spec=spec).eval()
        own = models.build("resnet20", DATA, taps=("stage2",)).eval()
        assert torch.equal(net(images(DATA)).maps["stage1"], own(images(DATA)).maps["stage2"])
        with pytest.raises(UserError, match="resnet20 has no tap 'stage7'; it has: stem"):
            models.spec("resnet20", DATA, {"stage1": "stage7"})
