"""What a user's own network is made of: the files of its code, and what an object of it holds and calls.

Own code is neither in the standard library nor installed from a package index. A library is known by its version, not by its content.
"""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import importlib.util
import json
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..checks import FAILURES, pass_on_shortage

INSTALLED = {"site-packages", "dist-packages"}  # folders that installers put packages in
LARGEST = 64 << 20  # bytes of a file that counts as code
LONGEST = 10_000  # characters of what a library's object prints of itself


class Module:
    """A file of code, and the name by which it is imported; the name is empty for a file that a user names."""

    def __init__(self, file: Path, name: str = "") -> None:
        self.file, self.name = file, name

    @property
    def label(self) -> str:
        """Its name in messages: ``nets.py``, ``lib/layers.py``. It is the same wherever the folder lies."""
        if not self.name:
            return self.file.name
        inside = self.name.replace(".", "/")
        return f"{inside}/{self.file.name}" if self.file.stem == "__init__" else f"{inside}{''.join(self.file.suffixes[-1:])}"

    @property
    def package(self) -> str:
        """The package at which its relative imports begin."""
        return self.name if self.file.stem == "__init__" else self.name.rpartition(".")[0]

    def imports(self) -> Iterator[str]:
        """Names of the modules that it may import, anywhere in the file; for ``from a import b`` both a and a.b."""
        if self.file.suffix != ".py":
            return
        for name, level in _imported(*_signature(self.file)):
            above = self.package.split(".")[: len(self.package.split(".")) - level + 1] if level else []
            yield ".".join([*above, *([name] if name else [])])


def own_modules(root: str | Path) -> dict[str, Module]:
    """The own code that a module needs: itself and every module that it or one of those imports, by label.

    It reads the import statements, and imports and executes nothing. It does not see an import whose name is computed.

    Args:
        root: a file, whose neighbours are found first, or the name of a module.
    """
    folder = root.parent if isinstance(root, Path) else None
    modules: dict[str, Module] = {}
    waiting: deque[Module] = deque([Module(root)] if isinstance(root, Path) else _named(root, None))
    while waiting:
        module = waiting.popleft()
        if module.label not in modules:
            modules[module.label] = module
            waiting.extend(inner for name in module.imports() for inner in _named(name, folder))
    return modules


def place_of(where: str) -> str:
    """Where the code of a name lies: the path of a file, or of the module or package that a dotted name begins with. Nothing is run."""
    if where.endswith(".py"):
        return str(Path(where).expanduser().resolve())
    spec = _top(where.partition(".")[0], None)
    return spec.origin if spec and spec.origin and Path(spec.origin).is_file() else where


def hashes(modules: Mapping[str, Module]) -> dict[str, str]:
    """SHA-256 of each file, by label."""
    return {label: _code_hash(*_signature(modules[label].file)) for label in sorted(modules)}


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest(parts: object) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _named(name: str, folder: Path | None) -> list[Module]:
    """The own modules that importing a name executes: its packages and itself."""
    parts = name.split(".")
    if not parts[0] or parts[0] in sys.stdlib_module_names or parts[0] == __package__.split(".")[0]:
        return []
    modules: list[Module] = []
    spec: ModuleSpec | None = None
    for length in range(1, len(parts) + 1):
        full = ".".join(parts[:length])
        spec = _top(full, folder) if length == 1 else _below(full, spec)
        if spec is None:
            break
        if spec.origin and (file := Path(spec.origin)).is_file():
            if not is_own(file, parts[0]):
                return []
            modules.append(Module(file, full))
    return modules


def _top(name: str, folder: Path | None) -> ModuleSpec | None:
    """Where an import finds a name without dots; it looks into the file's folder first."""
    beside = PathFinder.find_spec(name, [str(folder)]) if folder is not None else None
    if beside is not None:
        return beside
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that says nothing of where it came from
        return None


def _below(name: str, package: ModuleSpec | None) -> ModuleSpec | None:
    folders = package.submodule_search_locations if package is not None else None
    return PathFinder.find_spec(name, list(folders)) if folders is not None else None


def is_own(file: Path, top: str) -> bool:
    """Whether a file is own code; ``top`` is the first part of its module's name."""
    return not INSTALLED.intersection(file.parts) or top in _from_folders()


@functools.cache
def _from_folders() -> frozenset[str]:
    """Top-level modules of what was installed from a folder of this machine, and so from no index."""
    names: set[str] = set()
    for distribution in distributions():
        if "dir_info" in (distribution.read_text("direct_url.json") or ""):
            names.update(file.parts[0].removesuffix(".py") for file in distribution.files or ())
    return frozenset(names)


def _signature(file: Path) -> tuple[Path, int, int, int]:
    """What stays the same as long as the file does: its path, time, size and inode."""
    status = file.stat()
    return file, status.st_mtime_ns, status.st_size, status.st_ino


@functools.lru_cache(maxsize=4096)
def _code_hash(file: Path, *_signature: int) -> str:
    """``file_hash``, cached, since every look at a network asks for it."""
    return file_hash(file)


@functools.lru_cache(maxsize=4096)
def _imported(file: Path, _time: int, size: int, _inode: int) -> tuple[tuple[str, int], ...]:
    """The names in a file's import statements, and how many packages above each begins; empty if the file is no Python."""
    try:
        tree = ast.parse(file.read_bytes()) if size <= LARGEST else ast.Module([], [])
    except (SyntaxError, ValueError, RecursionError):
        return ()
    imports: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imports += [(alias.name, 0) for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                base = module or ""
                imports += [(base, level)] + [(f"{base}.{alias.name}".lstrip("."), level) for alias in names if alias.name != "*"]
            case ast.Call(func=ast.Name(id="__import__" | "import_module"), args=[ast.Constant(value=str(name)), *_]):
                imports.append((name, 0))
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                imports.append((name, 0))
    return tuple(dict.fromkeys(imports))


def contents(value: object, *, exact: bool = True) -> str:
    """SHA-256 of what a network holds and calls.

    It covers classes and functions of own code by their bytecode, what these close over and which globals they name; attributes, weights,
    buffers and hooks; and what libraries made by its name and its ``repr``. Mode, gradients and hooks of this package do
    not count. The result is equal in every process of one Python version.

    Args:
        value: the network, or what it holds.
        exact: whether weights count in full. Else their norms count to two digits, as for fresh weights, which another processor rounds
            differently. Default: True.
    """
    reader = _Contents(exact)
    reader.take(value)
    return reader.digest.hexdigest()


MODULE_STATE = frozenset({*vars(nn.Module()), "_is_torch_compile", "_compiled_call_impl"})  # modes, hooks, marks of the compiler
SKIPPED = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl", "__firstlineno__"}
SKIPPED |= {"__static_attributes__", "__parameters__", "__orig_bases__", "__dataclass_fields__", "__annotate_func__", "__annotate__"}
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
PRINTED = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, PurePath, range, slice, re.Pattern)


class _Contents:
    """A digest to which values are added. A value that it met before adds its number alone, so that cycles end."""

    def __init__(self, exact: bool) -> None:
        self.digest, self.exact = hashlib.sha256(), exact
        self.met: dict[int, tuple[int, object]] = {}

    def say(self, *words: object) -> None:
        for word in words:
            encoded = str(word).encode(errors="surrogatepass")
            self.digest.update(len(encoded).to_bytes(8, "big") + encoded)

    def take(self, value: object) -> None:
        if type(value) in PLAIN:
            self.say(type(value).__name__, repr(value))
        elif id(value) in self.met:
            self.say("again", self.met[id(value)][0])
        else:
            self.met[id(value)] = len(self.met), value  # held, so that no other gets its id
            try:
                self._taker(value)(value)
            except FAILURES as error:  # of its own code, or nested without end
                pass_on_shortage(error)
                self._printed(value)

    def _taker(self, value: object) -> Callable[[Any], None]:
        takers: list[tuple[Any, Callable[[Any], None]]] = [
            (torch.jit.ScriptModule, self._script),
            (nn.Module, self._module),
            (Tensor, self._tensor),
            (np.ndarray, self._array),
            (type, self._class),
            (types.FunctionType, self._function),
            (types.CodeType, self._code),
            (types.MethodType, lambda bound: self.each("bound", bound.__func__, bound.__self__)),
            (types.ModuleType, self._imported),
            ((staticmethod, classmethod), lambda wrapped: self.each(type(wrapped).__name__, wrapped.__func__)),
            (property, lambda prop: self.each("property", prop.fget, prop.fset, prop.fdel)),
            (functools.cached_property, lambda prop: self.each("property", prop.func)),
            (functools._lru_cache_wrapper, lambda cached: self.each("cached", cached.__wrapped__)),
            (functools.partial, lambda part: self.each("partial", part.func, part.args, part.keywords)),
            (enum.Enum, lambda member: self.say(type(member).__qualname__, member.name)),
            (PRINTED, self._printed),
            ((dict, types.MappingProxyType), self._table),
            ((set, frozenset), lambda members: self.say("set", *sorted(contents(member, exact=self.exact) for member in members))),
            ((list, tuple, deque), lambda row: self.each(type(row).__name__, len(row), *row)),
        ]
        taker = next((taker for kinds, taker in takers if isinstance(value, kinds)), None)
        return taker or (self._object if _owned(type(value).__module__) or isinstance(value, types.SimpleNamespace) else self._printed)

    def each(self, kind: str, *values: object) -> None:
        self.say(kind)
        for value in values:
            self.take(value)

    def _table(self, table: Mapping[Any, Any]) -> None:
        self.each("table", len(table), *(part for item in table.items() for part in item))

    def _printed(self, value: object) -> None:
        try:
            printed = repr(value)
        except Exception as error:  # of anyone's code
            pass_on_shortage(error)
            printed = ""
        self.say(type(value).__qualname__, re.sub(r" at 0x[0-9a-f]+", "", printed)[:LONGEST])

    def _object(self, value: object) -> None:
        slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
        held = {name: getattr(value, name) for name in slots if name not in SKIPPED and hasattr(value, name)}
        self.each("object", type(value), dict(sorted((held | getattr(value, "__dict__", {})).items())))

    def _tensor(self, value: Tensor) -> None:
        self.say("tensor", value.dtype, tuple(value.shape), isinstance(value, nn.Parameter) and not value.requires_grad)
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            self._printed(value)
        elif not self.exact and value.is_floating_point():
            self.say(f"{value.detach().double().norm().item():.1e}")
        else:
            plain = value.detach().to("cpu").contiguous().flatten()
            self.digest.update(plain.resolve_conj().view(torch.uint8).numpy().data)

    def _array(self, value: np.ndarray[Any, Any]) -> None:
        self.say("array", value.dtype, value.shape)
        if value.dtype.hasobject:
            self.take(value.tolist())
        else:
            self.digest.update(value.tobytes())

    def _module(self, net: nn.Module) -> None:
        self.each("module", type(net), dict(sorted(net._parameters.items())), dict(sorted(net._buffers.items())))
        self.each("inner", *(part for name, inner in net._modules.items() for part in (name, inner)))
        hooks = [*net._forward_pre_hooks.values(), *net._forward_hooks.values()]
        hooks += [*net._backward_pre_hooks.values(), *net._backward_hooks.values()]
        self.each("hooks", *(hook for hook in hooks if not _of_this_package(hook)))
        self.take({name: value for name, value in sorted(vars(net).items()) if name not in MODULE_STATE})
        if isinstance(net, fx.GraphModule):
            self.say(net.code)

    def _script(self, net: torch.jit.ScriptModule) -> None:
        for path, inner in net.named_modules():
            self.say(path, getattr(inner, "code", ""))
        self.take(dict(sorted(net.state_dict().items())))

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            self.say(base.__qualname__)
            if not _owned(base.__module__):
                self.say(base.__module__)
                continue
            for name, value in sorted(vars(base).items()):
                if name not in SKIPPED and not isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
                    self.say(name)
                    self.take(value)

    def _function(self, function: types.FunctionType) -> None:
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        if not _owned(function.__module__):
            self.each("library", function.__module__, function.__qualname__, *cells)
            return
        defaults = (function.__defaults__, function.__kwdefaults__)
        attributes = {name: value for name, value in sorted(vars(function).items()) if name != "__wrapped__"}
        self.each("function", function.__code__, *defaults, attributes, *cells)
        for name in sorted(set(_global_names(function.__code__))):
            if name in function.__globals__:
                self.say(name)
                self.take(function.__globals__[name])

    def _code(self, code: types.CodeType) -> None:
        self.say("code", code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_kwonlyargcount)
        self.each("constants", *code.co_consts)

    def _imported(self, module: types.ModuleType) -> None:
        file = getattr(module, "__file__", None)
        self.say("import", module.__name__ if file is None or not _owned(module.__name__) else Path(file).name)
        if file is not None and _owned(module.__name__):
            self.take(hashes(own_modules(Path(file))))


def _names(slots: str | tuple[str, ...]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _cell(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return "empty"


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _of_this_package(value: object) -> bool:
    return type(value).__module__.split(".")[0] == __package__.split(".")[0]


def _owned(name: str | None) -> bool:
    """Whether the module that a class or function says it is from is own code; what was typed into a session is."""
    top = (name or "").split(".")[0]
    if not top or top == "__main__":
        return True
    if top in sys.stdlib_module_names or top == __package__.split(".")[0]:
        return False
    loaded = sys.modules.get(name or "") or sys.modules.get(top)
    if loaded is None:
        return True
    file = getattr(loaded, "__file__", None)
    return file is not None and is_own(Path(file), top)
