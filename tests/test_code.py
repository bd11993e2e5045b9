"""What a network of one's own is made of: files, closures, attributes; and what it answers."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.models.code import contents, hashes, own_modules
from flowdistill.models.probe import difference, probe
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

DATA = DataSpec("data", 100, 5, 1, 8, 8)
scale = 2.0


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "nets.py"


def net(body: str, above: str = "") -> str:
    return f"""
import torch
from torch import nn
{above}

class Small(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.a, self.fc = nn.Conv2d(channels, 4, 3, 1, 1), nn.Linear(4, classes)

    def forward(self, x):
        {body}
"""


PLAIN = net("return self.fc(torch.relu(self.a(x)).mean((2, 3)))")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"nets.py": "import blocks", "blocks.py": "import numpy, json"}, {"nets.py", "blocks.py"}),
        ({"nets.py": "from blocks import act", "blocks.py": "from deep import b", "deep.py": ""}, {"nets.py", "blocks.py", "deep.py"}),
        ({"nets.py": "def f():\n    import blocks", "blocks.py": ""}, {"nets.py", "blocks.py"}),
        (
            {"nets.py": "from lib import layers", "lib/__init__.py": "", "lib/layers.py": "from . import act", "lib/act.py": ""},
            {"nets.py", "lib/__init__.py", "lib/layers.py", "lib/act.py"},
        ),
        (
            {
                "nets.py": "import lib.deep.x",
                "lib/__init__.py": "",
                "lib/deep/__init__.py": "",
                "lib/deep/x.py": "from ..y import z",
                "lib/y.py": "",
            },
            {"nets.py", "lib/__init__.py", "lib/deep/__init__.py", "lib/deep/x.py", "lib/y.py"},
        ),
        ({"nets.py": "import space.x", "space/x.py": ""}, {"nets.py", "space/x.py"}),
        ({"nets.py": "import importlib\nb = importlib.import_module('blocks')", "blocks.py": ""}, {"nets.py", "blocks.py"}),
        ({"nets.py": "try:\n    import nowhere\nexcept ImportError:\n    from blocks import *", "blocks.py": ""}, {"nets.py", "blocks.py"}),
        ({"nets.py": "import torch, timm, numpy.linalg, flowdistill"}, {"nets.py"}),
        ({"nets.py": "import blocks", "blocks.py": "import nets"}, {"nets.py", "blocks.py"}),
        ({"nets.py": "this is no Python"}, {"nets.py"}),
    ],
)
def test_own_code_is_the_file_and_all_that_it_imports_of_ones_own(tmp_path: Path, files: dict[str, str], found: set[str]) -> None:
    assert set(own_modules(write(tmp_path, files))) - {"nets/nets.py"} >= found
    assert {name.rpartition("nets.py")[0] for name in set(own_modules(tmp_path / "nets.py")) - found} <= {""}


def test_what_lies_on_the_path_and_in_an_editable_install_is_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "site", {"mine.py": "x = 1"})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert set(own_modules(write(tmp_path / "work", {"nets.py": "import mine"}))) == {"nets.py", "mine.py"}
    assert set(own_modules("mine")) == {"mine.py"}
    write(tmp_path / "site-packages", {"theirs.py": "x = 1"})
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    assert set(own_modules(write(tmp_path / "work", {"nets.py": "import theirs"}))) == {"nets.py"}


def test_a_changed_file_has_another_hash(tmp_path: Path) -> None:
    path = write(tmp_path, {"nets.py": "import blocks", "blocks.py": "a = 1"})
    before = hashes(own_modules(path))
    (tmp_path / "blocks.py").write_text("a = 22")
    after = hashes(own_modules(path))
    assert before["nets.py"] == after["nets.py"]
    assert before["blocks.py"] != after["blocks.py"]


# Neighbours


def answer(name: str) -> torch.Tensor:
    built = models.build(name, DATA, seed=1)
    return built.eval()(torch.ones(2, 1, 8, 8)).logits


def test_a_neighbour_can_be_imported_and_its_change_is_another_network(tmp_path: Path) -> None:
    blocks = "import torch\nact = torch.ACT\n"
    path = write(
        tmp_path,
        {"nets.py": net("return self.fc(beside.act(self.a(x)).mean((2, 3)))", "import beside"), "beside.py": blocks.replace("ACT", "relu")},
    )
    name = f"{path}:Small"
    before, said = models.made_of(name, DATA), answer(name)
    (tmp_path / "beside.py").write_text(blocks.replace("ACT", "sigmoid"))
    assert models.made_of(name, DATA) != before
    assert not torch.equal(answer(name), said), "the neighbour is imported anew"


def test_a_neighbour_that_is_imported_late_is_found(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "nets.py": net("import lately\n        return lately.head(self, x)"),
            "lately.py": "def head(net, x):\n    return net.fc(net.a(x).mean((2, 3)))\n",
        },
    )
    assert answer(f"{path}:Small").shape == (2, 5)


def test_neighbours_of_one_name_are_each_files_own(tmp_path: Path) -> None:
    text = net("return self.fc(same.act(self.a(x)).mean((2, 3)))", "import same")
    names = [
        f"{write(tmp_path / act, {'nets.py': text, 'same.py': f'import torch{chr(10)}act = torch.{act}'})}:Small"
        for act in ("relu", "tanh")
    ]
    relu, tanh, again = (answer(name) for name in (*names, names[0]))
    assert not torch.equal(relu, tanh)
    assert torch.equal(relu, again)


def test_a_neighbour_leaves_the_callers_module_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("taken")
    monkeypatch.setitem(sys.modules, "taken", own)
    text = net("return self.fc(taken.act(self.a(x)).mean((2, 3)))", "import taken")
    answer(f"{write(tmp_path, {'nets.py': text, 'taken.py': 'import torch; act = torch.relu'})}:Small")
    assert sys.modules["taken"] is own


def test_a_compiler_finds_the_neighbour_of_the_file_at_hand(tmp_path: Path) -> None:
    """It looks functions' globals up by the name of their module."""
    text = net("return self.fc(twice.act(self.a(x)).mean((2, 3)))", "import twice")
    parts = "import torch\nby = {}\ndef act(x):\n    return x * by\n"
    names = [f"{write(tmp_path / str(by), {'nets.py': text, 'twice.py': parts.replace('{}', str(by))})}:Small" for by in (2.0, 3.0)]
    nets = [models.build(name, DATA, seed=1).eval() for name in names]
    images = torch.ones(2, 1, 8, 8)
    for own in nets:
        compiled = torch.compile(own.body, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(images), own(images).logits)


def test_neighbours_that_are_imported_late_are_each_files_own(tmp_path: Path) -> None:
    text = net("import later\n        return self.fc(later.act(self.a(x)).mean((2, 3)))")
    names = [
        f"{write(tmp_path / act, {'nets.py': text, 'later.py': f'import torch{chr(10)}act = torch.{act}'})}:Small"
        for act in ("relu", "tanh")
    ]
    nets = [models.build(name, DATA, seed=1).eval() for name in names]
    relu, tanh, again = (nets[place](torch.ones(2, 1, 8, 8)).logits for place in (0, 1, 0))
    assert not torch.equal(relu, tanh)
    assert torch.equal(relu, again)
    assert "later" not in sys.modules
    copied = copy.deepcopy(nets[0])
    assert torch.equal(copied(torch.ones(2, 1, 8, 8)).logits, relu)


def test_a_file_and_a_neighbour_that_import_each_other(tmp_path: Path) -> None:
    text = net("return self.fc(circle.act(self.a(x)).mean((2, 3)))", "import circle")
    name = f"{write(tmp_path, {'nets.py': text, 'circle.py': 'import nets, torch; act = torch.relu'})}:Small"
    assert answer(name).shape == (2, 5)
    assert {"circle", "nets"} & sys.modules.keys() == set()


def test_a_package_that_changed_since_it_was_imported_is_not_taken_for_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"changing.py": PLAIN})
    monkeypatch.syspath_prepend(str(tmp_path))
    answer("changing:Small")
    (tmp_path / "changing.py").write_text(PLAIN.replace("relu", "sigmoid"))
    with pytest.raises(UserError, match=r"changing\.py changed since it was imported; begin a new process"):
        answer("changing:Small")


# What an object holds and calls


def acting(act: Any) -> nn.Module:
    class Acting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(act(x))

    return Acting()


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * scale


def with_attribute(value: Any) -> nn.Module:
    found = acting(torch.relu)
    found.held = value
    return found


class Options:
    def __init__(self, rate: float) -> None:
        self.rate = rate


def replaced(net: nn.Module, forward: Any) -> nn.Module:
    net.forward = types.MethodType(forward, net)
    return net


def hooked(hook: Any) -> nn.Module:
    found = acting(torch.relu)
    found.fc.register_forward_hook(hook)
    return found


def frozen() -> nn.Module:
    found = acting(torch.relu)
    found.fc.bias.requires_grad_(False)
    return found


def changed_scale() -> str:
    global scale
    scale = 3.0
    try:
        return contents(acting(scaled))
    finally:
        scale = 2.0


DIFFERENT = {
    "builtin": lambda: contents(acting(torch.tanh)),
    "lambda": lambda: contents(acting(lambda x: x + 1)),
    "another constant": lambda: contents(acting(lambda x: x + 2)),
    "another attribute": lambda: contents(acting(lambda x: x.sin())),
    "default": lambda: contents(acting(lambda x, by=1: x + by)),
    "another default": lambda: contents(acting(lambda x, by=2: x + by)),
    "partial": lambda: contents(acting(functools.partial(torch.add, other=1))),
    "another partial": lambda: contents(acting(functools.partial(torch.add, other=2))),
    "global": lambda: contents(acting(scaled)),
    "another global": changed_scale,
    "cached": lambda: contents(acting(functools.lru_cache(scaled))),
    "attribute": lambda: contents(with_attribute(1)),
    "another value": lambda: contents(with_attribute(2)),
    "kind of value": lambda: contents(with_attribute(1.0)),
    "text": lambda: contents(with_attribute("1")),
    "table": lambda: contents(with_attribute({"a": 1})),
    "another table": lambda: contents(with_attribute({"a": 2})),
    "tensor": lambda: contents(with_attribute(torch.ones(2))),
    "another tensor": lambda: contents(with_attribute(torch.tensor([1.0, 2.0]))),
    "object": lambda: contents(with_attribute(Options(0.1))),
    "another object": lambda: contents(with_attribute(Options(0.2))),
    "set": lambda: contents(with_attribute({"a", "b"})),
    "another set": lambda: contents(with_attribute({"a", "c"})),
    "weights": lambda: contents(nn.Sequential(acting(torch.relu), nn.Linear(2, 2))),
    "layer's option": lambda: contents(nn.Sequential(acting(torch.relu), nn.LeakyReLU(0.1))),
    "another layer's option": lambda: contents(nn.Sequential(acting(torch.relu), nn.LeakyReLU(0.2))),
    "forward": lambda: contents(replaced(acting(torch.relu), lambda self, x: self.fc(x))),
    "another forward": lambda: contents(replaced(acting(torch.relu), lambda self, x: -self.fc(x))),
    "hook": lambda: contents(hooked(lambda module, inputs, output: output * 2)),
    "another hook": lambda: contents(hooked(lambda module, inputs, output: output * 3)),
    "frozen": lambda: contents(frozen()),
}


def test_what_computes_otherwise_has_other_contents() -> None:
    found = {"plain": contents(acting(torch.relu))} | {name: make() for name, make in DIFFERENT.items()}
    alike = {(one, other) for one in found for other in found if one < other and found[one] == found[other]}
    assert not alike
    assert {name: make() for name, make in DIFFERENT.items() if name != "weights"} == {n: found[n] for n in DIFFERENT if n != "weights"}


def test_what_does_not_change_a_number_does_not_change_the_contents() -> None:
    own = acting(torch.relu)
    before = contents(own)
    own.eval()
    own(torch.ones(1, 2)).sum().backward()
    assert contents(own) == before == contents(copy.deepcopy(own)) == contents(acting(torch.relu))


def test_contents_are_equal_in_every_process(tmp_path: Path) -> None:
    """Whatever the hash seed of strings, and wherever objects lie in memory."""
    lines = [f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_code"]
    lines += ["print({name: make() for name, make in test_code.DIFFERENT.items() if name != 'weights'})"]
    script = "\n".join(lines)
    said = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed, "PATH": ""}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


# The probe


def probed(text: str, folder: Path, **changes: Any) -> dict[str, list[float]]:
    path = write(folder, {"nets.py": text})
    spec = models.spec(f"{path}:Small", DATA)
    return probe(models.build(f"{path}:Small", DATA, taps=tuple(tap.name for tap in spec.taps), seed=0), 1, 8, 8, trains=True)


def test_a_network_answers_as_it_did(tmp_path: Path) -> None:
    one = probed(PLAIN, tmp_path / "one")
    assert {name.partition(" ")[0] for name in one} == {"eval", "train", "buffers", "gradient"}
    assert difference(one, probed(PLAIN, tmp_path / "two")) == ""


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (PLAIN.replace("torch.relu(", "torch.tanh("), "logits in eval mode"),
        (PLAIN.replace("return self.fc", "return 1.001 * self.fc"), "logits in eval mode"),
        (PLAIN.replace("mean((2, 3)))", "mean((2, 3))).flip(1)"), "logits in eval mode"),
        (PLAIN.replace("mean((2, 3))", "mean((2, 3)).mul(1.1 if self.training else 1)"), "logits in train mode"),
        (PLAIN.replace("self.a(x))", "self.a(x).detach())"), "the gradient of a.weight"),
    ],
)
def test_another_computation_answers_otherwise(tmp_path: Path, text: str, what: str) -> None:
    found = difference(probed(PLAIN, tmp_path / "one"), probed(text, tmp_path / "two"))
    assert what in found


def test_another_gradient_is_another_answer(tmp_path: Path) -> None:
    lines = [
        "class R(torch.autograd.Function):",
        "    forward = staticmethod(lambda ctx, x: x.clone())",
        "    backward = staticmethod(lambda ctx, g: -g)",
    ]
    reversing = "\n".join(lines)
    one = probed(PLAIN, tmp_path / "one")
    other = probed(net("return self.fc(R.apply(torch.relu(self.a(x))).mean((2, 3)))", reversing), tmp_path / "two")
    assert difference(one, other).startswith("the gradient of a.weight: ")


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    one = probed(PLAIN, tmp_path / "one")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rounded = probed(PLAIN.replace("torch.relu(self.a(x))", "(torch.relu(self.a(x) * 3.0) / 3.0)"), tmp_path / f"two{threads}")
        assert difference(one, rounded) == ""
    torch.set_num_threads(1)
    assert difference({"eval logits": [float("nan")] * 4}, {"eval logits": [float("nan")] * 4}) == ""
    assert difference({"eval logits": [float("nan")] * 4}, {"eval logits": [1.0] * 4}) != ""
