"""Modules given from Python: any nn.Module teaches or is taught, under a name of its own, and leaves a file as any network does."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.networks import Tied
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import flowdistill
from flowdistill import UserError, models
from flowdistill.models import foreign
from flowdistill.training.weights import hash_weights
from flowdistill.types import DataSpec


@pytest.fixture
def keys(small_npz: Path, tmp_path: Path) -> dict[str, Any]:
    train = {"epochs": 1, "batch_size": 64, "precision": "fp32"}
    return {"data": {"name": f"npz:{small_npz}", "pad": 1}, "runs": tmp_path / "runs", "train": train, "progress": False}


@pytest.fixture
def another_process() -> Iterator[Any]:
    """What was given from Python is gone, as it is in a process that starts."""
    given = dict(foreign.IN_MEMORY)

    def begin() -> None:
        foreign.IN_MEMORY.clear()
        foreign._factory.cache_clear()

    yield begin
    foreign.IN_MEMORY.update(given)


def test_any_module_teaches_any_module(keys: dict[str, Any]) -> None:
    teacher, student = Tied(8, seed=1).train(), Tied(seed=2)
    before = deepcopy(student.state_dict()), deepcopy(teacher.state_dict())
    result = flowdistill.distill(teacher, student, method="kd", **keys)
    assert result.run.student.startswith("module:Tied-")
    assert result.run.teacher.startswith("module:Tied-")
    assert result.run.student != result.run.teacher
    assert result.run.init_hash == hash_weights(before[0]), "the student goes on from the weights it has"
    for module, weights in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items()), "the user's modules stay as they are"
        assert not any(inner._forward_hooks for inner in module.modules())
        assert all(inner.training for inner in module.modules())


def lazy() -> nn.Module:
    net = Tied()
    net.fc = nn.LazyLinear(10)
    return net


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (lazy, "Tied: fc.weight has no size yet; run the module once on a batch of images"),
        (
            lambda: Tied().to("meta"),
            "Tied: stem.0.weight is on the meta device, without numbers; put the module on a device with .to_empty",
        ),
        (lambda: Tied().half(), "Tied: stem.0.weight is float16, images are float32; give the module in single precision, .float()"),
        (lambda: Tied().double(), "Tied: stem.0.weight is float64, images are float32; give the module in single precision, .float()"),
        (
            lambda: models.build("resnet8", DataSpec("", 0, 10, 1, 8, 8)).bfloat16(),
            "CifarResNet: conv1.weight is bfloat16, images are float32; give the module in single precision, .float()",
        ),
    ],
    ids=["lazy", "meta", "half", "double", "ours"],
)
def test_a_module_that_cannot_be_used_yet(keys: dict[str, Any], module: Any, line: str) -> None:
    calls = [
        lambda: flowdistill.train(module(), **keys),
        lambda: flowdistill.distill(module(), Tied(), method="kd", **keys),
        lambda: flowdistill.train("resnet8", init_from=module(), **keys),
        lambda: flowdistill.Distiller(None, module(), "base", images=(1, 8, 8)),
        lambda: flowdistill.Distiller(module(), Tied(), "kd", images=(1, 8, 8)),
    ]
    for call in calls:
        with pytest.raises(flowdistill.UserError) as caught:
            call()
        assert str(caught.value).startswith(line)
        assert len(str(caught.value).splitlines()) == 1


def test_the_cures_that_refusals_name_work(keys: dict[str, Any]) -> None:
    """What the lines say to do works; a buffer may be of any precision."""
    ready = lazy()
    ready(torch.zeros(2, 1, 8, 8))
    single = Tied().half().float()
    single.register_buffer("table", torch.ones(3, dtype=torch.float64))
    empty = Tied().to("meta").to_empty(device="cpu")
    empty.load_state_dict(Tied().state_dict())
    for module in (ready, single, empty):
        assert flowdistill.train(module, **keys).run.status == "finished"


def test_the_plain_module_comes_back_trained(keys: dict[str, Any]) -> None:
    student = Tied()
    result = flowdistill.train(student, **keys)
    module = result.module()
    assert type(module) is Tied
    assert module is not student
    assert not module.training
    assert module.second.weight is module.first.weight, "tied weights stay tied"
    assert hash_weights(module.state_dict()) == result.run.weights_hash != result.run.init_hash
    assert not any(inner._forward_hooks for inner in module.modules())
    assert result.run.parameters == sum(p.numel() for p in student.parameters()), "a weight that two layers share counts once"
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(images), result.student()(images).logits)


def test_the_module_of_a_registered_model_has_its_class(keys: dict[str, Any]) -> None:
    assert type(flowdistill.train("resnet8", **keys).module()) is type(models.build("resnet8", DataSpec("", 0, 10, 1, 8, 8)))


def test_what_was_trained_teaches_and_goes_on(keys: dict[str, Any]) -> None:
    teacher = flowdistill.train(Tied(8), **keys)
    by_result = flowdistill.distill(teacher, Tied(), method="kd", **keys)
    by_module = flowdistill.distill(teacher.module(), Tied(), method="kd", **keys)
    by_network = flowdistill.distill(teacher.student(), Tied(), method="kd", **keys)
    assert by_network.run.weights_hash == by_module.run.weights_hash == by_result.run.weights_hash
    again = flowdistill.train(teacher.module(), **keys)
    assert again.run.init_hash == teacher.run.weights_hash


def test_a_compiled_module_counts_as_the_one_that_was_compiled(keys: dict[str, Any]) -> None:
    plain, compiled = (flowdistill.train(module, **keys) for module in (Tied(), torch.compile(Tied())))
    assert compiled.run.no == plain.run.no == 1
    assert type(flowdistill.distill(torch.compile(Tied(8)), torch.compile(Tied(seed=2)), method="kd", **keys).module()) is Tied


@pytest.mark.parametrize("around", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)], ids=type)
def test_modes_around_the_call_change_nothing(keys: dict[str, Any], around: Any) -> None:
    plain = flowdistill.train(Tied(), **keys)
    with around:
        inside = flowdistill.train(Tied(), **keys, again=True)
    assert inside.run.weights_hash == plain.run.weights_hash


def test_a_teacher_of_other_classes_teaches_by_its_features(keys: dict[str, Any]) -> None:
    teacher = Tied(8)
    teacher.fc = nn.Linear(8, 7)
    result = flowdistill.distill(teacher, Tied(), method="at", weights={"at": 1.0}, **keys)
    assert (result.run.status, result.run.teacher_accuracy) == ("finished", None)
    with pytest.raises(UserError, match=r"kd: .* has 10 classes, .* 7; logits are compared class by class"):
        flowdistill.distill(teacher, Tied(), method="kd", **keys)
    with pytest.raises(UserError, match=r"7 classes, the data has 10; give a module with a classifier of the data's"):
        flowdistill.train(teacher, **keys)


def test_a_broken_student_is_told_from_a_broken_teacher(keys: dict[str, Any]) -> None:
    broken = Tied()
    broken.fc.weight.data[0, 0] = float("nan")
    said = "its weight fc.weight is not finite", r"its answer \(logits\) is not finite for 150 of 150 images"
    for teacher, student, line in ((Tied(8), broken, rf"student module:Tied-\w+: {said[0]}"), (broken, Tied(), rf"teacher .*: {said[1]}")):
        with pytest.raises(UserError, match=line):
            flowdistill.distill(teacher, student, method="kd", **keys)


def test_students_that_teach_each_other_begin_from_fresh_weights(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the students of 'dml' begin from fresh weights; name a model"):
        flowdistill.distill(None, Tied(), method="dml", **keys)


def test_a_module_that_cannot_be_copied_is_refused(keys: dict[str, Any]) -> None:
    module = Tied()
    module.seen = (torch.ones(2, requires_grad=True) * 2).sum()
    with pytest.raises(
        UserError, match=r"^Tied: can't be copied \(Only Tensors created explicitly .*\); give the function .* FILE.py:FUNCTION$"
    ):
        flowdistill.train(module, **keys)


def test_equal_modules_are_one_and_the_run_is_skipped(keys: dict[str, Any]) -> None:
    first = flowdistill.train(Tied(seed=3), **keys)
    assert flowdistill.train(Tied(seed=3), **keys).run.no == first.run.no
    assert flowdistill.train(Tied(seed=4), **keys).run.no != first.run.no
    frozen = Tied(seed=3)
    frozen.stem.requires_grad_(False)
    other = flowdistill.train(frozen, **keys)
    assert other.run.no != first.run.no, "what is not trained belongs to what the module is"
    assert torch.equal(other.module().stem[0].weight, frozen.stem[0].weight)
    assert not torch.equal(other.module().fc.weight, frozen.fc.weight)


def test_the_module_may_change_afterwards(keys: dict[str, Any]) -> None:
    student = Tied()
    result = flowdistill.train(student, **keys)
    student.fc = nn.Linear(4, 3)
    assert result.module().fc.out_features == 10


def test_a_run_that_was_cut_off_goes_on_by_the_same_call(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, another_process: Any
) -> None:
    keys["train"] |= {"epochs": 3}
    straight = flowdistill.train(Tied(), **{**keys, "runs": keys["runs"] / "straight"})
    monkeypatch.setattr("flowdistill.runner.execute.CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("flowdistill.runner.execute._save", _then_stop)
        with pytest.raises(KeyboardInterrupt):
            flowdistill.train(Tied(), **keys)
    another_process()
    result = flowdistill.train(Tied(), **keys)
    assert (result.run.no, result.run.resumed) == (1, 1)
    assert result.run.weights_hash == straight.run.weights_hash


def _then_stop(cohort: Any, *rest: Any) -> None:
    from flowdistill.training import checkpoint

    members, folder, _ = rest
    about = {str(m.no): {"key": m.job.key, "seconds": (0.0, 0.0)} for m in members}
    checkpoint.save(folder, cohort, {member.student: str(member.no) for member in members}, about)
    raise KeyboardInterrupt


@pytest.mark.usefixtures("no_kernels")
def test_compiled_equals_eager_with_tied_weights(keys: dict[str, Any]) -> None:
    found = [
        flowdistill.distill(Tied(8), Tied(), method="kd", engine=engine, **{**keys, "runs": keys["runs"] / engine})
        for engine in ("eager", "compiled")
    ]
    assert [result.run.engine for result in found] == ["eager", "compiled"]
    eager, compiled = (result.module() for result in found)
    torch.testing.assert_close(eager.first.weight, compiled.first.weight, rtol=1e-4, atol=1e-5)
    assert compiled.first.weight is compiled.second.weight


def test_a_module_gives_a_named_student_its_first_weights(keys: dict[str, Any]) -> None:
    import timm

    begun = timm.create_model("resnet18", num_classes=10, in_chans=1)
    result = flowdistill.train("timm:resnet18", init_from=begun, **{**keys, "train": {**keys["train"], "lr": 1e-30}})
    assert torch.equal(result.module().conv1.weight, begun.conv1.weight)
    with pytest.raises(flowdistill.UserError, match="does not fit resnet8: it lacks"):
        flowdistill.train("resnet8", init_from=Tied(), **keys)


@pytest.mark.parametrize("words", [["evaluate"], ["card"], ["export", "--to", "safetensors"], ["distill", "--method", "kd", "--teacher"]])
def test_another_process_does_not_have_the_module(keys: dict[str, Any], another_process: Any, words: list[str]) -> None:
    result = flowdistill.train(Tied(), **keys)
    another_process()
    data = ["--student", "resnet8", "--dataset", keys["data"]["name"]] if "--teacher" in words else []
    before, after = ([*words[:1]], words[1:]) if "--teacher" not in words else (words, [])
    said = command(result.folder.parent.parent, *before, str(result.run.no), *after, *data, "--runs", str(result.folder.parent))
    assert said.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"{result.run.student} was given from Python, and is in no file; give it from Python again" in said.err


def test_another_process_can_not_resume_it(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, another_process: Any) -> None:
    monkeypatch.setattr("flowdistill.runner.execute._save", _then_stop)
    with pytest.raises(KeyboardInterrupt):
        flowdistill.train(Tied(), **keys)
    another_process()
    said = command(keys["runs"].parent, "resume", "1", "--runs", str(keys["runs"]))
    assert said.code == 2
    assert "was given from Python, and is in no file; give it from Python again" in said.err


def test_what_this_process_has_it_exports(keys: dict[str, Any]) -> None:
    result = flowdistill.train(Tied(), **keys)
    path = result.export("torch-export", out=keys["runs"] / "it.pt2")
    images = torch.randint(256, (2, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.export.load(path).module()(images).shape == (2, 10)
    with pytest.raises(flowdistill.UserError, match="export to 'onx': did you mean 'onnx'"):
        result.export("onx")


class Extra(Tied):
    """A module whose state is not tensors alone."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (nn.Linear(2, 10), "no classifier of images of 1x8x8"),
        (Extra(), "Extra: its state has '_extra_state', which is no tensor; give a module whose state_dict holds tensors alone"),
        (Tied, "a class, not a network; call it: Tied(...)"),
    ],
)
def test_what_is_no_classifier_is_refused_in_one_line(keys: dict[str, Any], network: Any, line: str) -> None:
    with pytest.raises(flowdistill.UserError) as caught:
        flowdistill.train(network, **keys)
    assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class Failing(Tied):
    """Trains in no way, or not for long: torch's own words, and code of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.passes, self.unused, self.norm = how, 0, nn.Linear(2, 2), nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        x = self.stem(images)
        if self.training and self.how == "small":
            raise KeyError("mask")
        if self.training and self.how == "leaves" and len(images) > 2:
            raise SystemExit(0)
        if self.how == "checkpoint":
            x = checkpoint(self.first, x, use_reentrant=True)
        elif not (self.how == "skips" and self.passes > 2):
            x = self.first(x)
        x = self.second(x.relu()).relu().mean((2, 3))
        return self.fc(self.norm(x) if self.how == "norm" else x)


CANT = "student module:Failing-[0-9a-f]{8} can't be trained on a batch of"
IDLE = r"train\.freeze=fc,first,norm,second,stem leaves nothing to train that a loss of phase 'joint' depends on; freeze less"
UNTRAINABLE = [
    ("norm", {"batch_size": 1}, f"{CANT} 1: ValueError: Expected more than 1 value per channel when training, got input size"),
    ("small", {}, f"{CANT} 64: KeyError: 'mask'"),
    ("leaves", {}, f"{CANT} 64: SystemExit: 0"),
    ("checkpoint", {}, f"{CANT} 64: RuntimeError: When use_reentrant=True, torch.utils.checkpoint is incompatible with"),
    ("", {"freeze": "stem,first,second,norm,fc"}, f"{IDLE}$"),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("how", "changed", "line"), UNTRAINABLE, ids=[how or "freeze" for how, *_ in UNTRAINABLE])
def test_a_student_that_can_not_be_trained_is_told_before_training(keys: dict[str, Any], how: str, changed: Any, line: str) -> None:
    with pytest.raises(flowdistill.UserError, match=f"^{line}") as caught:
        flowdistill.train(Failing(how), **keys | {"train": {**keys["train"], **changed}})
    assert len(str(caught.value).splitlines()) == 1
    assert not (keys["runs"] / "ledger.db").exists(), "nothing is recorded"


def test_a_tap_that_training_skips_is_named(keys: dict[str, Any]) -> None:
    """The first gradients have it, the second step does not."""
    with pytest.raises(flowdistill.UserError, match=r"^tap stage\d=first: module:Failing-\w* did not call it on this batch; name a module"):
        flowdistill.distill(Tied(), Failing("skips"), method="at", weights={"at": 1.0}, engine="eager", **keys)


class Softmaxed(Tied):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


def test_probabilities_are_not_taken_for_logits(keys: dict[str, Any]) -> None:
    gives = "it gives probabilities, not the logits of its classifier fc; leave the softmax out"
    with pytest.raises(
        UserError, match=rf"^kd: teacher module:Softmaxed-\w{{8}}: {gives}, or choose a method on feature maps, such as at$"
    ):
        flowdistill.distill(Softmaxed(), Tied(), method="kd", **keys)
    with pytest.raises(UserError, match=rf"^student module:Softmaxed-\w{{8}}: {gives}$"):
        flowdistill.train(Softmaxed(), **keys)
    assert not (keys["runs"] / "ledger.db").exists(), "nothing is recorded"
    result = flowdistill.distill(Softmaxed(), Tied(), method="at", weights={"at": 1.0}, **keys)
    assert result.run.status == "finished"


class Observing(Tied):
    """A buffer takes the shape of what it sees, another is made in the first pass, a third is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("largest", None)
        self.register_buffer("mean", torch.zeros(1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            channels = self.stem(images).detach().mean((0, 2, 3))
            self.seen.resize_(len(channels)).copy_(channels)
            self.largest = channels.amax() if self.largest is None else torch.maximum(self.largest, channels.amax())
            self.mean = self.mean.mean() * 0.9 + channels * 0.1
            if not hasattr(self, "made"):
                self.register_buffer("made", torch.ones(3))
            self.made += 1
        return super().forward(images)


def quantised() -> nn.Module:
    net = Tied().train()
    net.qconfig = quantization.get_default_qat_qconfig("x86")  # of weights a scale for each channel
    return quantization.prepare_qat(net)


def traced_and_quantised() -> nn.Module:
    return prepare_qat_fx(Tied().train(), quantization.get_default_qat_qconfig_mapping("x86"), (torch.zeros(2, 1, 8, 8),))


GROWING = [quantised, traced_and_quantised, Observing]
noisy = pytest.mark.filterwarnings("ignore")  # torch.ao is said to be moving


@noisy
@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("make", GROWING)
def test_buffers_may_take_another_shape_in_the_first_pass(keys: dict[str, Any], make: Any, engine: str) -> None:
    """Trained, chosen among epochs, measured again and written: as any other."""
    student = make()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    result = flowdistill.distill(Tied(8, seed=1), student, method="at+kd", weights={"at": 1.0}, engine=engine, split="holdout", **keys)
    assert {name: value.shape for name, value in student.state_dict().items()} == {name: value.shape for name, value in before.items()}
    trained = result.module().state_dict()
    grown = {name for name, value in trained.items() if name not in before or value.shape != before[name].shape}
    assert grown
    assert hash_weights(trained) == result.run.weights_hash
    path = result.folder / "student.safetensors"
    assert flowdistill.runner.evaluate(path, torch.device("cpu")).correct == result.run.correct
    assert result.export("safetensors").is_file()
    teaching = flowdistill.distill(result, Tied(), method="kd", **keys)
    assert teaching.run.status == "finished"


@noisy
@pytest.mark.parametrize("make", GROWING)
def test_buffers_of_another_shape_go_on_where_they_were(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    keys["train"] |= {"epochs": 3}
    straight = flowdistill.train(make(), **{**keys, "runs": keys["runs"] / "straight"})
    monkeypatch.setattr("flowdistill.runner.execute.CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("flowdistill.runner.execute._save", _then_stop)
        with pytest.raises(KeyboardInterrupt):
            flowdistill.train(make(), **keys)
    result = flowdistill.train(make(), **keys)
    assert (result.run.no, result.run.resumed) == (1, 1)
    assert result.run.weights_hash == straight.run.weights_hash


@noisy
def test_what_was_hashed_can_still_be_resized() -> None:
    """numpy keeps the memory that it is shown from being resized, which an observer does."""
    module = quantised()
    hash_weights(module.state_dict())
    module(torch.zeros(2, 1, 8, 8))


FEW = (
    r"^student module:Failing-\w{8} can't be trained on a batch of 1: ValueError: Expected more than 1 value per channel when training, "
    r"got input size torch.Size\(\[1, 4\]\); so few images has the smallest batch: let the loader drop its last one \(drop_last=True\)$"
)


@pytest.mark.parametrize("kind", ["rest", "list", "sampler", "dropped", "even"])
def test_a_last_batch_that_the_layers_can_not_take_is_told_before_training(tmp_path: Path, kind: str) -> None:
    """Told before training; a loader that drops it, or has none, trains."""
    chance = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(33, 1, 8, 8, generator=chance), torch.arange(33) % 10)
    val = DataLoader(data, batch_size=16)
    train: Any = DataLoader(data, batch_size=16, shuffle=True, drop_last=kind == "dropped")
    if kind == "list":
        train = [(images, labels) for images, labels in val]
    elif kind == "sampler":
        train = DataLoader(data, batch_size=8, sampler=RandomSampler(data, num_samples=17))
    elif kind == "even":
        train = DataLoader(data, batch_size=8, sampler=RandomSampler(data, num_samples=16))
    keys: dict[str, Any] = {"runs": tmp_path / "runs", "train": {"epochs": 1, "precision": "fp32"}, "progress": False}
    calls = [
        lambda: flowdistill.train(Failing("norm"), train, val, **keys),
        lambda: flowdistill.distill(Tied(8), Failing("norm"), train, val, method="at+kd", weights={"at": 1.0}, **keys),
    ]
    for call in calls:
        if kind in ("dropped", "even"):
            assert call().run.status == "finished"
        else:
            with pytest.raises(UserError, match=FEW):
                call()
            assert not (tmp_path / "runs" / "ledger.db").exists(), "nothing is recorded"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [False, True])
def test_torchscript_is_refused_with_the_cure(keys: dict[str, Any], part: bool) -> None:
    traced = torch.jit.trace(Tied(), torch.zeros(1, 1, 8, 8))
    given = nn.Sequential(traced) if part else traced
    with pytest.raises(
        flowdistill.UserError, match=r"(its 0 is|: is) TorchScript, whose maps can't be looked at; give the nn.Module that it was"
    ):
        flowdistill.distill(given, Tied(seed=2), method="kd", **keys)
