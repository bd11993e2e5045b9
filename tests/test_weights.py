"""Weights on disk: bit for bit, whole or not at all, and nothing of a foreign file is executed."""

import errno
import json
import os
from pathlib import Path
from zipfile import is_zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.models import Network
from flowdistill.runner.references import named
from flowdistill.training.fitting import misfit, named_as_in, registered
from flowdistill.training.weights import fill, hash_weights, load_weights, save_weights, write_whole
from flowdistill.types import DataSpec

DATA = DataSpec("some", 100, 10, 3, 8, 8)


def a_net(seed: int = 0, layout: torch.memory_format = torch.contiguous_format) -> Network:
    """A ResNet-8 after one batch, so that its statistics and its counter are not those of a fresh one."""
    net = models.build("resnet8", DATA, seed=seed).to(memory_format=layout)
    with torch.no_grad():
        net(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return net


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert value.shape == second[name].shape, name
        one, other = (v.contiguous().reshape(-1).view(torch.uint8) for v in (value, second[name]))
        assert torch.equal(one, other), name


def mistake(call) -> str:
    """The message of the UserError that a call raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_round_trip_is_bitwise(tmp_path, layout):
    net = a_net(layout=layout)
    path = tmp_path / "weights.safetensors"
    save_weights(path, net.state_dict(), {})
    loaded, _ = load_weights(path)
    assert_same_bits(net.state_dict(), loaded)
    assert_same_bits(load_file(path), loaded)

    other = a_net(seed=1, layout=layout)
    strides = {name: value.stride() for name, value in other.state_dict().items()}
    fill(other, loaded, "it")
    assert_same_bits(net.state_dict(), other.state_dict())
    assert {name: value.stride() for name, value in other.state_dict().items()} == strides
    batch = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(net.eval()(batch).logits, other.eval()(batch).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_round_trip_of_other_types(tmp_path, dtype):
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.tensor(1).to(dtype), "none": torch.empty(0, 3, dtype=dtype)}
    save_weights(tmp_path / "a.safetensors", tensors, {})
    assert_same_bits(tensors, load_weights(tmp_path / "a.safetensors")[0])


def test_round_trip_of_special_values(tmp_path):
    tensors = {"a": torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45])}
    save_weights(tmp_path / "a.safetensors", tensors, {})
    assert_same_bits(tensors, load_weights(tmp_path / "a.safetensors")[0])


def test_weights_with_gradient_are_saved_as_values(tmp_path):
    parameter = nn.Parameter(torch.randn(3))
    save_weights(tmp_path / "a.safetensors", {"a": parameter}, {})
    loaded = load_weights(tmp_path / "a.safetensors")[0]["a"]
    assert not loaded.requires_grad
    assert torch.equal(loaded, parameter.detach())


def test_metadata_come_back_and_are_json_in_the_file(tmp_path):
    about = {"model": "resnet20", "classes": 10, "mean": [0.1, 0.25], "no": None, "nested": {"ü": True}}
    save_weights(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, about)
    assert load_weights(tmp_path / "a.safetensors")[1] == about
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["flowdistill"]) == about
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_has_no_metadata_of_ours(tmp_path, metadata):
    (tmp_path / "a.safetensors").write_bytes(save({"a": torch.ones(2)}, metadata))
    loaded, about = load_weights(tmp_path / "a.safetensors")
    assert about == {}
    assert loaded["a"].tolist() == [1, 1]


def test_write_whole_makes_the_folder_and_leaves_no_draft(tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_write_whole_does_not_make_the_folder_of_a_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "gone" / "file", b"one", make_folder=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    """The disk is full before the last byte is safe, or the rename fails: readers still find the old content."""
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[call], full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_content_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """At the moment of fsync the whole content is in the draft, and the file is still the old one."""
    path = tmp_path / "file"
    write_whole(path, b"old")
    seen = []
    really = os.fsync

    def watching(descriptor):
        seen.append((os.fstat(descriptor).st_size, path.read_bytes()))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    write_whole(path, b"new content")
    assert seen[0] == (len(b"new content"), b"old")
    assert path.read_bytes() == b"new content"


def test_save_weights_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_weights(path, {"a": torch.zeros(2)}, {"epoch": 1})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, {"a": torch.ones(2)}, {"epoch": 2})
    loaded, about = load_weights(path)
    assert (loaded["a"].tolist(), about) == ([0, 0], {"epoch": 1})


def test_hash_does_not_depend_on_memory_layout_order_or_gradient():
    state = a_net().state_dict()
    turned = {name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for name, value in state.items()}
    assert any(turned[name].stride() != state[name].stride() for name in state)
    wanted = hash_weights(state)
    assert hash_weights(turned) == wanted
    assert hash_weights(dict(reversed(state.items()))) == wanted
    assert hash_weights({name: v.clone().requires_grad_() if v.is_floating_point() else v for name, v in state.items()}) == wanted
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in state.items()}
    assert hash_weights(strided) == wanted


def one_bit_off(value: Tensor, bit: int) -> Tensor:
    changed = value.clone()
    changed.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return changed


@pytest.mark.parametrize("bit", [0, 13, 31, 32 * 95 + 31])
def test_hash_sees_every_single_bit(bit):
    value = torch.randn(4, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    assert hash_weights({"a": one_bit_off(value, bit)}) != hash_weights({"a": value})


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_mean", "layer2.0.bn1.num_batches_tracked", "fc.bias"])
def test_hash_of_a_network_sees_one_bit_of_weights_statistics_and_counters(name):
    state = a_net().state_dict()
    assert hash_weights(state | {name: one_bit_off(state[name].reshape(-1), 0).reshape(state[name].shape)}) != hash_weights(state)


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "other",
    [
        {"b": ZEROS},
        {"a": ZEROS.reshape(3, 2)},
        {"a": ZEROS.reshape(6)},
        {"a": ZEROS.to(torch.int32)},
        {"a": -ZEROS},
        {"a": ZEROS, "b": torch.zeros(0)},
        {},
    ],
    ids=["name", "shape", "axes", "type", "sign of zero", "one more", "none"],
)
def test_hash_sees_names_shapes_and_types(other):
    assert hash_weights(other) != hash_weights({"a": ZEROS})


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path / "none.pt"):
        assert mistake(lambda path=path: load_weights(path)) == f"weights file {path}: no such file"


def a_safetensors_file(path: Path) -> bytes:
    save_weights(path, a_net().state_dict(), {"model": "resnet8"})
    return path.read_bytes()


def a_pt_file(path: Path, content: object = None) -> bytes:
    torch.save(a_net().state_dict() if content is None else content, path)
    return path.read_bytes()


DAMAGE = {
    "junk.safetensors": lambda path: b"no weights here, " * 99,
    "empty.safetensors": lambda path: b"",
    "truncated.safetensors": lambda path: a_safetensors_file(path)[:-100],
    "head only.safetensors": lambda path: a_safetensors_file(path)[:50],
    "metadata no json.safetensors": lambda path: save({"a": torch.zeros(1)}, {"flowdistill": "{broken"}),
    "junk.pt": lambda path: b"no weights here, " * 99,
    "junk.pth": lambda path: bytes(range(256)) * 4,
    "empty.pt": lambda path: b"",
    "truncated.pt": lambda path: a_pt_file(path)[:-100],
    "half.pt": lambda path: (content := a_pt_file(path))[: len(content) // 2],
    "a list.pt": lambda path: a_pt_file(path, [torch.zeros(2)]),
    "a tensor.pt": lambda path: a_pt_file(path, torch.zeros(2)),
    "numbers.pt": lambda path: a_pt_file(path, {"a": torch.zeros(2), "epoch": 3}),
    "nested.pt": lambda path: a_pt_file(path, {"model": {"a": torch.zeros(2)}}),
    "a whole module.pt": lambda path: a_pt_file(path, nn.Linear(2, 2)),
    "names that are none.pt": lambda path: a_pt_file(path, {0: torch.zeros(2), "a": torch.zeros(2)}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_unusable_files_are_told_in_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGE[name](path))
    assert mistake(lambda: load_weights(path)).startswith(f"weights file {path}: ")


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3, "arch": "resnet8"}])
def test_pickled_tensors_load(tmp_path, suffix, wrap):
    net = a_net()
    path = tmp_path / f"a{suffix}"
    torch.save(wrap(net.state_dict()), path)
    loaded, about = load_weights(path)
    assert about == {}
    assert_same_bits(net.state_dict(), dict(loaded))
    fill(a_net(seed=1), loaded, "it")


class Evil:
    """Unpickling it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"a": torch.zeros(1), "b": evil}, lambda evil: {"state_dict": evil}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, wrap, zipped):
    path, mark = tmp_path / "a.pt", tmp_path / "executed"
    torch.save(wrap(Evil(mark)), path, _use_new_zipfile_serialization=zipped)
    assert mistake(lambda: load_weights(path)).startswith(f"weights file {path}: it holds {os.mkdir.__module__}.mkdir, ")
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the trap is armed: whoever unpickles it makes the directory
    assert mark.exists()


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


MISFITS = {
    "missing": (lambda state: without(state, "layer2.0.conv1.weight"), ["lacks 'layer2.0.conv1.weight'"]),
    "missing statistics": (lambda state: without(state, "bn1.running_var"), ["lacks 'bn1.running_var'"]),
    "extra": (lambda state: state | {"fc2.weight": torch.zeros(1)}, ["has 'fc2.weight', which the network has not"]),
    "two networks": (lambda state: {f"{net}.{name}": value for net in "ab" for name, value in state.items()}, ["begin with 'a', 'b' fit"]),
    "shape": (lambda state: state | {"fc.weight": torch.zeros(100, 64)}, ["fc.weight is (100, 64)", "needs (10, 64)", "10 classes"]),
    "axes": (lambda state: state | {"conv1.weight": torch.zeros(16, 27)}, ["conv1.weight is (16, 27)", "needs (16, 3, 3, 3)"]),
    "nothing": (lambda state: {}, ["lacks 'conv1.weight', 'bn1.weight' and "]),
}


@pytest.mark.parametrize(("change", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_that_do_not_fit_are_told_in_one_line_and_change_nothing(change, words):
    net, other = a_net(), a_net(seed=1)
    before = hash_weights(net.state_dict())
    message = mistake(lambda: fill(net, change(other.state_dict()), "weights file a.pt"))
    assert message.startswith("weights file a.pt does not fit resnet8")
    assert [word for word in words if word not in message] == []
    assert hash_weights(net.state_dict()) == before


def test_filling_a_network_copies_the_values():
    net, state = a_net(), dict(a_net(seed=1).state_dict())
    fill(net, state, "it")
    state["fc.bias"].add_(1)
    assert not torch.equal(net.fc.bias, state["fc.bias"])


SOUND = {
    "bare.ckpt": lambda state: state,
    "module.bin": lambda state: {f"module.{name}": value for name, value in state.items()},
    "lightning.ckpt": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "loops": {"epoch": 3}},
    "all.th": lambda state: {"net": {f"_orig_mod.model.module.network.{name}": value for name, value in state.items()}},
    "inside": lambda state: {name.replace("layer1.", "layer1._orig_mod.").replace("fc.", "fc.module."): v for name, v in state.items()},
    "no counters.pth.tar": lambda state: {"a": [{"net": {name: v for name, v in state.items() if "num_batches" not in name}}]},
    "beside.pkl": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": [{"lr": 0.1}]},
        "metrics": {"accuracy": torch.tensor(0.9), "confusion": torch.zeros(3, 3, dtype=torch.int64)},
        "rng": torch.get_rng_state(),
        "epoch": 3,
    },
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", SOUND)
def test_the_one_network_of_a_file_is_found_by_content(tmp_path, name, zipped):
    """Whatever the file is called, whatever lies beside the network in it, and whatever stands before its names."""
    state = a_net().state_dict()
    counters = {key: value * 0 for key, value in state.items() if "num_batches" in key} if name.startswith("no counters") else {}
    torch.save(SOUND[name](state), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert is_zipfile(tmp_path / name) == zipped
    net = a_net(seed=1)
    ref = named(f"resnet8@{tmp_path / name}").fitted(DATA)
    assert ref.fingerprint == f"file:{hash_weights({**state, **counters})}"
    fill(net, ref.weights, "it")
    assert_same_bits({**state, **counters}, net.state_dict())
    assert_same_bits({**state, **counters}, ref.build(DATA).state_dict())


def test_safetensors_and_pickles_are_told_by_content(tmp_path):
    state = a_net().state_dict()
    save_weights(tmp_path / "model.bin", state, {"model": "resnet8"})
    torch.save(state, tmp_path / "x.safetensors")
    for name in ("model.bin", "x.safetensors"):
        assert_same_bits(dict(state), load_weights(tmp_path / name)[0])
    assert load_weights(tmp_path / "model.bin")[1] == {"model": "resnet8"}


class Inner(nn.Module):
    """A network whose own names begin as wrappers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"module": nn.Linear(3, 2)})


def test_prefixes_of_the_networks_own_names_stay():
    inner = Inner()
    inner.spec, inner.grown = models.spec("resnet8", DATA), frozenset()
    state = inner.state_dict()
    assert list(state) == ["model.module.weight", "model.module.bias"]
    assert named_as_in(inner, state) is state
    for begin in ("module.", "module.model.", "_orig_mod.net."):
        assert list(named_as_in(inner, {f"{begin}{name}": value for name, value in state.items()})) == list(state)
    bare = {name.removeprefix("model.module."): value for name, value in state.items()}
    assert named_as_in(inner, bare) is bare
    assert misfit(inner, bare, "it").startswith("it does not fit resnet8: it lacks 'model.module.weight', 'model.module.bias' and it has ")


def test_a_key_chooses_one_of_several_networks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = a_net().state_dict(), a_net(seed=1).state_dict()
    both = {f"student.{name}": value for name, value in one.items()} | {f"teacher.{name}": value for name, value in other.items()}
    torch.save({"model": one, "ema": {"module": other}}, "w#1.pt")
    torch.save({"state_dict": both}, "a@b.pt")
    torch.save(other, "resnet8@w#1.pt")
    for reference, wanted in {
        "resnet8@./w#1.pt#model": one,
        "resnet8@./w#1.pt#ema.module": other,
        "resnet8@a@b.pt#state_dict.student": one,
        "resnet8@a@b.pt#teacher": other,
        "resnet8@resnet8@w#1.pt": other,
    }.items():
        assert named(reference).fingerprint == f"file:{hash_weights(wanted)}", reference
    assert mistake(lambda: named("resnet8@./w#1.pt")).endswith("choose one as FILE#KEY, such as 'w#1.pt#model'")
    assert mistake(lambda: named("resnet8@w#1.pt")).endswith("its weights are those of a resnet8: write 'resnet8@resnet8@w#1.pt'"), (
        "it exists"
    )


@pytest.mark.parametrize("name", ["weights", "best.ckpt", "a@b.pth", "timm", "c#d"])
def test_a_file_that_exists_is_meant_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / name, a_net().state_dict(), {"model": "resnet8"})
    assert named(name).origin == name
    (tmp_path / "resnet14").write_bytes((tmp_path / name).read_bytes())
    assert (named("resnet14").model, named("resnet14").weights) == ("resnet14", None)
    assert named("./resnet14").model == "resnet8"


def test_a_file_whose_table_holds_itself_is_read(tmp_path):
    state: dict[str, object] = {"model": dict(a_net().state_dict())}
    state["me"] = [state]
    torch.save(state, tmp_path / "it.pt")
    assert_same_bits(dict(a_net().state_dict()), load_weights(tmp_path / "it.pt")[0])


def test_lines_on_misfits_are_short():
    net = models.build("resnet8", DATA)
    long = {f"{'blocks.attention.' * 20}{name}": value for name, value in net.state_dict().items()} | {"x" * 999: torch.zeros(2, 2)}
    assert len(misfit(net, long, "it.pt")) < 600
    assert registered(models.build("vgg11", DATA).state_dict()) == "vgg11"
    assert registered(long) == ""
