"""The house: which module may know which, read from the imports alone. Nothing here imports the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "flowdistill"
TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / PACKAGE

ROOMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ground": (0, ("advice", "checks", "registry", "randomness", "device", "env", "interrupt", "lock", "ranks", "talk", "trust")),
    "vocabulary": (1, ("config", "config_keys", "types")),
    "data": (2, ("data",)),
    "models": (2, ("models",)),
    "methods": (3, ("methods",)),
    "metrics": (3, ("metrics",)),
    "training": (4, ("training",)),
    "ledger": (4, ("ledger",)),
    "stats": (4, ("stats",)),
    "runner": (5, ("runner",)),
    "top": (
        6,
        (
            "api",
            "bench",
            "cli",
            "cli_errors",
            "cli_options",
            "demo",
            "distiller",
            "recipes",
            "report",
            "reproduce",
            "trackers",
            "__main__",
            "",
        ),
    ),
}
"""Room: floor and modules or folders; the empty name is the package's own ``__init__``. Rooms of one floor do not know each other."""

STRANGERS = {("methods", "models"), ("methods", "data")}
"""Lower rooms that a room must not know all the same."""

TORCH_FREE = (
    *("", "__main__", "advice", "checks", "cli", "cli_errors", "cli_options", "config", "config_keys", "env", "interrupt", "ledger"),
    *("lock", "metrics", "ranks", "recipes", "registry", "trust"),
    *("report", "report.by_class", "report.card", "report.pages", "report.reference", "report.tables", "stats", "talk"),
)
"""Modules that must not bring torch in when they are imported."""

RUN_OTHERS = {"test_adding.py", "test_planted.py"}
"""Test files that run the tests of others: on the example of a new method, and on planted bugs. The rest share ``tests/helpers``."""

HEAVY = ("torch", "torchvision", "safetensors.torch")
SHARED_WORDS = {"at", "base", "logits"}  # words of English or of the vocabulary: refused only where they are the whole string


@dataclass(frozen=True)
class Import:
    """One import: of which module (``flowdistill.config`` is ``config``), which names, when it runs."""

    module: str
    names: tuple[str, ...]
    own: bool
    lazy: bool


def sources() -> dict[str, str]:
    """Module name less the package's -> text."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, text: str, modules: Mapping[str, str]) -> Iterator[Import]:
    """Every import that can run; those under ``if TYPE_CHECKING`` can't."""
    is_package = not module or any(name.startswith(f"{module}.") for name in modules)
    package = module.split(".") if module and is_package else module.split(".")[:-1]
    for node, lazy in _nodes(ast.parse(text), lazy=False):
        if isinstance(node, ast.Import):
            yield from (_absolute(alias.name, (), lazy) for alias in node.names)
        elif node.level == 0:
            yield _absolute(node.module or "", tuple(alias.name for alias in node.names), lazy)
        else:
            base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
            yield Import(".".join(base), tuple(alias.name for alias in node.names), own=True, lazy=lazy)


def _nodes(tree: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _nodes(ast.Module([other], []), lazy=lazy)
        else:
            yield from _nodes(child, lazy=lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def _absolute(name: str, names: tuple[str, ...], lazy: bool) -> Import:
    own = name == PACKAGE or name.startswith(f"{PACKAGE}.")
    return Import(name.removeprefix(PACKAGE).lstrip(".") if own else name, names, own, lazy)


def known(module: str, modules: Mapping[str, str], *, lazy: bool = True) -> set[str]:
    """The package's modules that a module imports; ``from . import x`` is an import of x where x is a module."""
    found = set()
    for entry in imports(module, modules[module], modules):
        if entry.own and (lazy or not entry.lazy):
            below = {f"{entry.module}.{name}".lstrip(".") for name in entry.names}
            found |= (below & modules.keys()) or {entry.module}
            if not below <= modules.keys():
                found.add(entry.module)
    return found - {module}


def room_of(module: str) -> str | None:
    first = module.split(".")[0]
    return next((room for room, (_, members) in ROOMS.items() if first in members), None)


def wrong_imports(modules: Mapping[str, str]) -> list[str]:
    """What breaks the table: unknown modules, and imports that go up, across or to strangers."""
    found = [f"{module or PACKAGE} has no floor" for module in modules if room_of(module) is None]
    for module in modules:
        for other in sorted(known(module, modules)):
            room, other_room = room_of(module), room_of(other)
            if room is None or other_room is None or room == other_room:
                continue
            if ROOMS[other_room][0] >= ROOMS[room][0] or (room, other_room) in STRANGERS:
                found.append(f"{module or PACKAGE} imports {other or PACKAGE}")
    return found


def circles(modules: Mapping[str, str]) -> list[list[str]]:
    """Every way that leads by imports from a module back to it, once for each closing import."""
    graph = {module: known(module, modules) & modules.keys() for module in modules}
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> None:
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            for other in sorted(graph[module]):
                walk(other, [*way, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


def brings_torch(module: str, modules: Mapping[str, str]) -> list[str]:
    """The modules that import torch when ``module`` is imported; importing ``a.b`` runs ``a`` too."""
    reached, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current in reached or current not in modules:
            continue
        reached.add(current)
        todo += known(current, modules, lazy=False)
        todo += [".".join(current.split(".")[:depth]) for depth in range(current.count(".") + 1)]
    return sorted(found or PACKAGE for found in reached if _imports_heavy(found, modules))


def _imports_heavy(module: str, modules: Mapping[str, str]) -> bool:
    outside = [entry.module for entry in imports(module, modules[module], modules) if not entry.own and not entry.lazy]
    return any(name == heavy or name.startswith(f"{heavy}.") for name in outside for heavy in HEAVY)


def method_names(modules: Mapping[str, str]) -> set[str]:
    """Names of the method files, and the names that their classes are registered under."""
    found = set()
    for module, text in modules.items():
        if module.startswith("methods.") and module != "methods.base":
            found.add(module.removeprefix("methods."))
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef) and any("register" in ast.unparse(mark) for mark in node.decorator_list):
                    found |= {ast.literal_eval(line.value) for line in node.body if isinstance(line, ast.Assign) and _is_name(line)}
    return found


def _is_name(line: ast.Assign) -> bool:
    return ast.unparse(line.targets[0]) == "name"


def mentioned(text: str, names: set[str]) -> set[str]:
    """Method names among the strings (less docstrings), the imports and the variables of a module."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node) is not None}  # type: ignore[attr-defined]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = set(re.split(r"\W+", node.value)) - SHARED_WORDS
            found |= names & (words | set(re.split(r"[+,]", node.value.strip())))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            parts = [*(getattr(node, "module", None) or "").split("."), *(alias.name for alias in node.names)]
            found |= names & {word for part in parts for word in part.split(".")} - {"base"}  # methods.base is the contract
        elif isinstance(node, ast.Name):
            found |= names & {node.id} - SHARED_WORDS
    return found


def suites_imported(text: str) -> set[str]:
    """The test files that a text imports, wherever in it."""
    return {entry.module for entry in imports("", text, {}) if entry.module.startswith("test_")}


MODULES = sources()


# The house as it stands


def test_the_source_was_found() -> None:
    assert {"", "cli", "config", "methods.base", "methods.fsp", "training.step", "report.tables"} <= MODULES.keys()
    assert {"fsp", "kd", "at", "base", "logits", "attention", "supervised"} <= method_names(MODULES)


def test_every_import_goes_down_or_stays_in_its_room() -> None:
    assert wrong_imports(MODULES) == []


def test_no_circles() -> None:
    assert circles(MODULES) == []


@pytest.mark.parametrize("module", TORCH_FREE, ids=lambda module: module or PACKAGE)
def test_torch_free(module: str) -> None:
    assert module in MODULES
    assert brings_torch(module, MODULES) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] == "training"])
def test_training_holds_no_method_name(module: str) -> None:
    assert mentioned(MODULES[module], method_names(MODULES)) == set()


def test_only_a_folder_imports_by_name() -> None:
    """A module imported by a computed name would escape this file; a folder gathering its own files may, and what runs a user's code."""
    dynamic = {module for module, text in MODULES.items() if "import_module(" in text or "__import__(" in text}
    assert dynamic <= {"", "data.sources", "methods", "models", "models.loading"}


def test_no_test_file_imports_from_another() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py") if path.parent.name != "planted"}
    assert {name for name, text in texts.items() if suites_imported(text)} == RUN_OTHERS


# The test, tested: each bad module must be seen


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("checks", "from .config import validate", "checks imports config"),
        ("config", "def f():\n    from .data import sources", "config imports data.sources"),
        ("types", "import flowdistill.models", "types imports models"),
        ("data.batches", "from ..models import build", "data.batches imports models"),
        ("models.vgg", "from .. import data", "models.vgg imports data"),
        ("methods.rkd", "from flowdistill.models import build", "methods.rkd imports models"),
        ("methods.rkd", "from ..data.batches import Stream", "methods.rkd imports data.batches"),
        ("training.step", "from .. import runner", "training.step imports runner"),
        ("training.step", "try:\n    from ..ledger import Ledger\nexcept ImportError:\n    pass", "training.step imports ledger"),
        ("ledger.store", "from ..training.step import Student", "ledger.store imports training.step"),
        ("ledger.store", "from .. import stats", "ledger.store imports stats"),
        ("stats", "from . import ledger", "stats imports ledger"),
        ("runner.plan", "from ..report import tables", "runner.plan imports report.tables"),
        ("runner.plan", "from .. import __all__", f"runner.plan imports {PACKAGE}"),
        ("utils", "", "utils has no floor"),
        ("common.helpers", "", "common.helpers has no floor"),
    ],
)
def test_a_bad_import_is_seen(module: str, text: str, complaint: str) -> None:
    assert wrong_imports({**MODULES, module: text}) == [complaint]


@pytest.mark.parametrize(
    "text",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .runner import run",
        "import typing\nif typing.TYPE_CHECKING:\n    import torch\n    from .runner import run",
        "from .checks import UserError",
    ],
)
def test_a_good_import_is_left_alone(text: str) -> None:
    changed = {**MODULES, "ledger": text}
    assert wrong_imports(changed) == []
    assert brings_torch("ledger", changed) == []


@pytest.mark.parametrize(
    "text",
    [
        "import test_cli",
        "import test_cli as suite",
        "from test_cli import x",
        "def f():\n    from test_cli import x",
        "import os, test_cli",
    ],
)
def test_an_import_of_a_test_file_is_seen(text: str) -> None:
    assert suites_imported(f"import torch\nfrom helpers.small import config\n{text}") == {"test_cli"}


def test_the_other_branch_of_type_checking_counts() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    from ..runner import run"
    assert wrong_imports({**MODULES, "ledger.store": text}) == ["ledger.store imports runner"]


@pytest.mark.parametrize(
    ("added", "circle"),
    [
        ({"training.a": "from .b import x", "training.b": "from .a import y"}, ["training.a", "training.b", "training.a"]),
        (
            {
                "training.a": "from .b import x",
                "training.b": "from . import c",
                "training.c": "def f():\n    import flowdistill.training.a",
            },
            ["training.a", "training.b", "training.c", "training.a"],
        ),
    ],
)
def test_a_circle_is_seen(added: dict[str, str], circle: list[str]) -> None:
    assert circles({**MODULES, **added}) == [circle]


@pytest.mark.parametrize(
    ("module", "text", "through"),
    [
        ("ledger", "import torch", "ledger"),
        ("report.tables", "from torch.nn import functional", "report.tables"),
        ("report", "from ..models import Network", "models.base"),
        ("stats", "from .device import Precision", "device"),
        ("cli", "from .methods.base import Phase", "methods.base"),
        ("env", "try:\n    import torchvision.datasets\nexcept ImportError:\n    pass", "env"),
    ],
)
def test_torch_is_seen(module: str, text: str, through: str) -> None:
    assert through in brings_torch(module, {**MODULES, module: text})


def test_torch_inside_a_function_is_no_harm() -> None:
    assert brings_torch("ledger", {**MODULES, "ledger": "def f():\n    import torch"}) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("if method == 'fsp':\n    pass", "fsp"),
        ("special = {'at+kd': 1}", "kd"),
        ("weights['at'] = 1000", "at"),
        ("plain = name == 'base'", "base"),
        ("key = f'options.{x}.fsp.pool'", "fsp"),
        ("from ..methods.fsp import FSP", "fsp"),
        ("from ..methods import attention", "attention"),
        ("import flowdistill.methods.kd", "kd"),
        ("fsp = 1", "fsp"),
    ],
)
def test_a_method_name_in_training_is_seen(text: str, name: str) -> None:
    assert name in mentioned(text, method_names(MODULES))


@pytest.mark.parametrize(
    "text",
    [
        '"""The fsp of kd."""\nx = 1',
        "error = 'looked at the base learning rate'",
        "from ..methods.base import at_least_float32",
        "loss = outputs.logits",
        "x = 'fspace'",
    ],
)
def test_other_words_in_training_are_left_alone(text: str) -> None:
    assert mentioned(text, method_names(MODULES)) == set()
