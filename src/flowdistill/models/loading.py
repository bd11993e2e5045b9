"""Execute a user's own code: a file with its neighbours, or a module of a package. What runs must be what lies on the disk."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ..checks import FAILURES, UserError, regular_file, summary
from .code import Module, digest, file_hash, hashes, own_modules


class Neighbours:
    """The modules beside a file. They are executed for this file alone, since another folder may have modules of the same names.

    Args:
        owner: the name of the file's module.
        file: the file; None where there is none.
        modules: those that it may import, by name.

    Attributes:
        late: whether the file did not import all of them when it was executed. Its functions may import the rest when they are called.
    """

    def __init__(self, owner: str = "", file: Path | None = None, modules: Mapping[str, Module] | None = None) -> None:
        self.owner, self.file, self.modules = owner, file, modules or {}
        self._tops = {name.partition(".")[0] for name in self.modules} | ({file.stem} if file else set())  # they may import it, too
        self._loaded: dict[str, ModuleType] = {}
        self.late = False

    def __deepcopy__(self, _: object) -> Neighbours:
        return self

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside, imports find them by their names, before all others; what is imported under these names is one of them. Outside, their
        names are free.

        ``sys.modules`` also has each under a name that only this file uses, by which a compiler finds it.
        """
        if self.file is None or not self.modules:
            yield
            return
        others = {name: sys.modules.pop(name) for name in self._named()}
        sys.modules.update(self._loaded)
        sys.path.insert(0, str(self.file.parent))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(self.file.parent))
            for name in self._named():
                loaded = sys.modules.pop(name)
                if name not in self._loaded:
                    vars(loaded)["__name__"] = f"{self.owner}.{name}"
                    self._loaded[name] = sys.modules[f"{self.owner}.{name}"] = loaded
            sys.modules.update(others)

    def executed(self) -> None:
        """Note that the file was executed."""
        self.late = not self.modules.keys() <= self._loaded.keys()

    def _named(self) -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in self._tops]


FILES: dict[str, tuple[ModuleType, Neighbours]] = {}
"""The files that were executed, by the hash of their code and of that of their neighbours."""
AS_IMPORTED: dict[str, str] = {}
"""Name of a module of own code that is no neighbour -> the hash of its file when it was imported for a network."""


def of_file(path: Path) -> tuple[ModuleType, Neighbours]:
    """The module of a file, executed once for each state of its code. It can import its neighbours, as with ``python FILE.py``.

    Raises:
        UserError: there is no such file, its code fails, or it imports a module that is not what lies on the disk.
    """
    file = regular_file(path, f"{path}").resolve()
    modules = own_modules(file)
    name = f"flowdistill_given_{digest([str(file), hashes(modules)])[:16]}"
    if name in FILES:
        return FILES[name]
    in_folder = {module.name: module for module in modules.values() if module.name and module.file.resolve().is_relative_to(file.parent)}
    elsewhere = [module for module in modules.values() if module.name and module.name not in in_folder]
    _refuse_changed(elsewhere, f"{path}")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module, neighbours = importlib.util.module_from_spec(spec), Neighbours(name, file, in_folder)
    sys.modules[name] = module
    try:
        with neighbours.at_hand():
            spec.loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[name]
        raise UserError(f"{path}: can't be run: {summary(error)}") from None
    neighbours.executed()
    _remember(elsewhere)
    FILES[name] = module, neighbours
    return FILES[name]


def of_package(name: str) -> ModuleType:
    """A module by its name, as Python imports it.

    Raises:
        UserError: it can't be imported, or it changed since it was, or a module of own code that it needs did.
    """
    modules = own_modules(name).values()
    _refuse_changed(modules, name)
    try:
        module = importlib.import_module(name)
    except FAILURES as error:  # missing, or its own code
        raise UserError(f"{name}: can't be imported: {summary(error)}; write FILE.py:FUNCTION for a file") from None
    _remember(modules)
    return module


def _remember(modules: Iterable[Module]) -> None:
    for module in modules:
        if module.name in sys.modules:
            AS_IMPORTED.setdefault(module.name, file_hash(module.file))


def _refuse_changed(modules: Iterable[Module], label: str) -> None:
    """Refuse modules that are not what lies on the disk: Python imports each of them once.

    Raises:
        UserError: a module of that name was loaded from elsewhere, or it changed since.
    """
    for module in modules:
        loaded = getattr(sys.modules.get(module.name), "__file__", None)
        if loaded is not None and Path(loaded).resolve() != module.file.resolve():
            other = f"{loaded} of that name is loaded"
            raise UserError(f"{label}: it imports {module.name} from {module.file}, but {other}; rename one of the two")
        if AS_IMPORTED.get(module.name, now := file_hash(module.file)) != now:
            raise UserError(f"{label}: {module.file} changed since it was imported; begin a new process, in a notebook a new kernel")
