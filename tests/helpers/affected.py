"""``pytest --affected``: only the tests that a change can break, nearest first, for ``--seconds``. ``make check`` runs it.

git says what changed. What a file reaches is read from its text, and nothing is imported: its imports, also those inside functions, and
what names a module or a file in a string, or a folder in a path. The nearer the change, the sooner a test file runs; of two that are as
near, the one that reaches less.
"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pytest

MAIN = "main"
ROOTS = ("src", "tests")  # the folders that imports start from
ALWAYS = "tests/test_floors.py"  # it reads every source, takes a second, and is what runs when nothing changed
SETTINGS = "pyproject.toml"  # pytest's own among them
FAR = 1000  # farther than any chain of imports: of what holds for all tests

Node = tuple[str, Literal["used", "run", "read"]]
"""A file, and what of it counts: all; nothing in functions, for a package that runs because a module in it is imported; its text alone."""


# What changed


def changed_files(root: Path) -> set[str]:
    """What differs from where this branch left main, files that git does not know yet too; on main with nothing new, its last commit."""
    main = next((name for name in (MAIN, f"origin/{MAIN}") if _is_commit(root, name)), "HEAD")
    found = _differing(root, _git(root, "merge-base", "HEAD", main)) | set(_names(root, "ls-files", "--others", "--exclude-standard"))
    if not found and _git(root, "rev-parse", "--abbrev-ref", "HEAD") == MAIN and _is_commit(root, "HEAD~1"):
        return _differing(root, "HEAD~1")
    return found


def files_of(root: Path) -> set[str]:
    """Every file that git knows or would add."""
    return {name for name in _names(root, "ls-files", "--cached", "--others", "--exclude-standard") if (root / name).is_file()}


def _differing(root: Path, commit: str) -> set[str]:
    return set(_names(root, "diff", "--name-only", "--no-renames", "--relative", commit))


def _names(root: Path, *words: str) -> list[str]:
    return _git(root, *words, "-z").split("\0")[:-1]


def _is_commit(root: Path, name: str) -> bool:
    return bool(_git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", may_fail=True))


def _git(root: Path, *words: str, may_fail: bool = False) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise pytest.UsageError(f"--affected asks git what changed, and git {words[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip("\n")


# What reaches it


def nearest_first(texts: Mapping[str, str], changed: Collection[str]) -> list[str]:
    """The test files among ``texts`` (path -> text, empty where it is not Python) that reach a changed file."""
    tree = Tree(texts, changed)
    by_all = {path: tree.steps_from(path) for path in tree.files if path.endswith("/conftest.py")}
    order = []
    for path in texts:
        if path.startswith("tests/") and fnmatchcase(path, "*/test_*.py"):
            steps = tree.steps_from(path)
            near = [steps[name] for name in changed if name in steps]
            if path == ALWAYS:
                near.append(1)
            if SETTINGS in changed:
                near.append(FAR)
            for conftest in by_all.keys() & {str(folder / "conftest.py") for folder in PurePosixPath(path).parents}:
                near += [FAR + by_all[conftest][name] for name in changed if name in by_all[conftest]]
            if near:
                order.append((min(near), len(steps), path))
    return [path for *_, path in sorted(order)]


class Tree:
    """The files of the project, and which reaches which."""

    def __init__(self, texts: Mapping[str, str], changed: Collection[str] = ()) -> None:
        self.texts = texts
        self.files = {*texts, *changed}  # a file that was deleted is still imported
        self.modules = {name: path for path in self.files if (name := _module_name(path)) is not None}
        self.others = sorted(self.files - {*self.modules.values()})
        self.below = defaultdict(set)
        self.inside = defaultdict(set)
        for path in self.files:
            for folder in list(PurePosixPath(path).parents)[:-1]:
                self.below[str(folder)].add(path)
        for name, path in self.modules.items():
            self.inside[name.rpartition(".")[0]].add(path)
        self._known: dict[Node, set[Node]] = {}

    def steps_from(self, path: str) -> dict[str, int]:
        """Every file that a file reaches, and by how many steps."""
        steps: dict[str, int] = {}
        seen: set[Node] = set()
        edge: set[Node] = {(path, "used")}
        step = 0
        while edge:
            for name, _ in edge:
                steps.setdefault(name, step)
            seen |= edge
            edge = set().union(*map(self._reached, edge)) - seen
            step += 1
        return steps

    def _reached(self, node: Node) -> set[Node]:
        if node not in self._known:
            self._known[node] = set(self._read(*node))
        return self._known[node]

    def _read(self, path: str, how: str) -> Iterator[Node]:
        if how == "read" or not path.endswith(".py"):
            return
        try:
            parsed = ast.parse(self.texts.get(path, ""))
        except SyntaxError:  # to be told by whoever runs it
            return
        own = _module_name(path) or ""
        package = own if path.endswith("/__init__.py") else own.rpartition(".")[0]
        inner_paths: set[int] = set()
        for node in _nodes(parsed, how == "used"):
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        yield from self._module(alias.name)
                case ast.ImportFrom(module=module, names=names, level=level):
                    parts = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                    base = ".".join([*parts, *([module] if module else [])])
                    inner = [name for alias in names if (name := f"{base}.{alias.name}") in self.modules]
                    for name in inner if len(inner) == len(names) else [*inner, base]:
                        yield from self._module(name)
                case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[ast.JoinedStr() as name, *_]):
                    start = name.values[0]
                    folder = start.value.strip(".") if isinstance(start, ast.Constant) else ""  # f".{name}": of the own folder
                    yield from ((found, "used") for found in self.inside[folder or package] - {path})
                case ast.List(elts=elements) | ast.Tuple(elts=elements):
                    words = [element.value for element in elements if isinstance(element, ast.Constant)]
                    for flag, name in itertools.pairwise(words):
                        if flag == "-m" and f"{name}.__main__" in self.modules:
                            yield from self._module(f"{name}.__main__")
                case ast.BinOp(left=left, op=ast.Div(), right=right):
                    inner_paths.add(id(left))
                    if id(node) not in inner_paths:
                        yield from self._below(_words_of(left, right), path)
                case ast.Constant(value=str(text)):
                    yield from self._named(text)

    def _module(self, name: str) -> Iterator[Node]:
        """A module and the packages that run before it."""
        if name in self.modules:
            yield self.modules[name], "used"
        while name := name.rpartition(".")[0]:
            if name in self.modules:
                yield self.modules[name], "run"

    def _named(self, text: str) -> Iterator[Node]:
        """What a string names: ``package.module.attribute``, ``LOG.md`` or ``docs/*.md``."""
        if re.fullmatch(r"\w+(\.\w+)+", text):
            parts = text.split(".")
            longest = next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in self.modules), "")
            yield from self._module(longest)
        if re.fullmatch(r".*[\w*]\.\w+", text):
            yield from ((path, "read" if "*" in text else "used") for path in self.others if fnmatchcase(f"/{path}", f"*/{text}"))

    def _below(self, folder: str, by: str) -> Iterator[Node]:
        """Every file of a folder, from the top or from where the path stands."""
        for name in {folder, str(PurePosixPath(by).parent / folder)} if folder else ():
            yield from ((path, "read") for path in self.below.get(name, set()) - {by})


def _nodes(tree: ast.AST, whole: bool) -> Iterator[ast.AST]:
    """What can run: nothing under ``if TYPE_CHECKING``, and in functions only where ``whole`` counts."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _nodes(ast.Module(child.orelse, []), whole)
        elif whole or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _nodes(child, whole)


def _words_of(left: ast.expr, right: ast.expr) -> str:
    """The first words in a row of a path: ``docs/pages`` of ``ROOT / "docs" / "pages" / name``."""
    operands = [right]
    while isinstance(left, ast.BinOp):
        operands.insert(0, left.right)
        left = left.left
    values = [operand.value if isinstance(operand, ast.Constant) else None for operand in operands]
    words = itertools.takewhile(lambda value: isinstance(value, str), itertools.dropwhile(lambda value: value is None, values))
    return "/".join(words)


def _module_name(path: str) -> str | None:
    root, *parts = PurePosixPath(path).with_suffix("").parts
    if root not in ROOTS or not path.endswith(".py") or not parts:
        return None
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# In pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("affected")
    group.addoption("--affected", action="store_true", help="run only the tests that a change can break, nearest first")
    group.addoption("--seconds", type=float, default=40, help="with --affected: begin no test later, but for the nearest file")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.affected:
        return
    begun = time.time()
    changed: set[str] = set()
    if hasattr(config, "workerinput"):  # a worker of xdist
        config.args[:], begun = config.workerinput["affected"]
    else:
        if config.args_source is config.ArgsSource.ARGS:
            raise pytest.UsageError("--affected finds the files itself: name none beside it")
        root = config.rootpath
        changed = changed_files(root)
        texts = {name: (root / name).read_text("utf-8") if name.endswith(".py") else "" for name in sorted(files_of(root))}
        config.args[:] = [str(root / name) for name in nearest_first(texts, changed)]
    config.pluginmanager.register(Affected(config, bool(changed), begun))


class Affected:
    """Runs what was found in its order, until the time is up."""

    def __init__(self, config: pytest.Config, anything: bool, begun: float) -> None:
        self.config, self.anything, self.begun = config, anything, begun
        self.seconds: float = config.option.seconds
        self.not_run = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Some order fixtures by their own; within a file it stays."""
        place = {Path(name): place for place, name in enumerate(self.config.args)}
        items.sort(key=lambda item: place[item.path])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Not skipped: a test that is too late has no result. The workers stop at one time, or the last would go on far from the change."""
        if time.time() - self.begun < self.seconds or item.path == Path(self.config.args[0]):
            return None
        self.not_run += 1
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker of xdist is about to begin."""
        node.workerinput["affected"] = (self.config.args, self.begun)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of xdist has ended."""
        self.not_run += getattr(node, "workeroutput", {}).get("not_run", 0)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["not_run"] = self.not_run
        result = yield
        if reporter := self.config.pluginmanager.get_plugin("terminalreporter"):
            reporter.write_line(self.told({name: len(reports) for name, reports in reporter.stats.items()}))
        return result

    def told(self, counts: Mapping[str, int]) -> str:
        """The one line at the end."""
        passed, bad = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
        if not self.anything:
            line = f"nothing differs from {MAIN}: {PurePosixPath(ALWAYS).name} alone was run"
        elif bad:
            line = f"{bad:,} of {_tests(passed + bad)} that the change can break failed"
        else:
            line = f"{_tests(passed)} that the change can break passed"
        if self.not_run:
            line += f"; not run in {self.seconds:g} s: {_tests(self.not_run)} farther from it (make test runs all)"
        return line


def _tests(count: int) -> str:
    return f"{count:,} test{'' if count == 1 else 's'}"
