"""What other packages add by entry points: found without a word of theirs, loaded by need, and never worth more than their own names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from helpers.command import command
from helpers.rows import row

from flowdistill import UserError, registry
from flowdistill.api import FORMATS
from flowdistill.config import validate
from flowdistill.data.sources import load
from flowdistill.ledger import Ledger
from flowdistill.methods import METHODS
from flowdistill.registry import Registry

TESTS = Path(__file__).parent
GROUP = "tests.tools"


# A package as another would write it, installed and used from a shell


def test_a_package_adds_a_method_networks_data_and_a_format(tmp_path: Path) -> None:
    site, source = tmp_path / "site", tmp_path / "source"
    shutil.copytree(TESTS / "plugin", source)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)], check=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(TESTS.parent / "src")])}

    def shell(words: str, *python: str) -> tuple[str, str]:
        told = subprocess.run(
            [sys.executable, *python, "-m", "flowdistill", *words.split()],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert told.returncode == 0, told.stderr
        return told.stdout, told.stderr

    training = "--dataset stripes:240 --epochs 1 --batch-size 16 --precision fp32"
    shell(f"train --model stripes8 --seeds 9 {training}")
    shell(f"distill --method cosine --student stripes4 --teacher stripes8 {training}")
    exported = json.loads(shell("export 2 --to npz --format json")[0])[0]

    assert "\ncosine " in shell("methods")[0]
    assert [row["name"] for row in json.loads(shell("models stripes* --format json")[0])] == ["stripes4", "stripes8"]
    listed, imported = shell("datasets", "-X", "importtime")
    assert "\nstripes:COUNT  an example: " in listed
    assert not re.search(r"\| +torch$", imported, re.MULTILINE), "data sets are listed without it"

    runs = Ledger(tmp_path / "runs").runs()
    assert [(run.status, run.method, run.student, run.teacher_run, run.dataset) for run in runs] == [
        ("finished", "base", "stripes8", None, "stripes"),
        ("finished", "cosine", "stripes4", 1, "stripes"),
    ]
    for run in runs:
        record = json.loads((tmp_path / "runs" / str(run.no) / "run.json").read_text())
        assert run.versions["flowdistill-stripes"] == record["versions"]["flowdistill-stripes"] == "0.3.1"
        assert record["config"]["data"]["name"] == "stripes:240"
    trained = safetensors.numpy.load_file(tmp_path / "runs" / "2" / "student.safetensors")
    with np.load(tmp_path / exported["file"]) as file:
        assert all(np.array_equal(file[f"net.{name}"], value) for name, value in trained.items())
        assert dict(file["metadata"])["model"] == '"stripes4"'

    without = command(tmp_path, "table")  # in this process, which does not have the package
    assert without.code == 0
    assert "| stripes4 | stripes8 |" in without.out
    lost = command(tmp_path, "evaluate", "2")
    assert (lost.code, lost.out) == (2, "")
    assert "unknown model 'stripes4': choose from: resnet8, " in lost.err


# Packages that tests lay down


class Installed(NamedTuple):
    """What is asked for entry points, and what lays down a package of one module that has some."""

    asked: list[str]
    install: Callable[..., None]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Nothing is loaded yet, and only what is laid down here is installed."""
    site, asked = tmp_path / "site", list[str]()

    def entry_points(group: str) -> list[metadata.EntryPoint]:
        asked.append(group)
        return [point for found in metadata.distributions(path=[str(site)]) for point in found.entry_points.select(group=group)]

    def install(name: str, code: str, *groups: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
        del sys.modules[name]  # and once more when the test ends
        (site / f"{name}.py").write_text(code)
        about = site / f"{name}-1.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (about / "entry_points.txt").write_text("".join(f"[{group}]\nthings = {name}\n" for group in groups))

    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(registry, "_FAILURES", {})
    monkeypatch.setattr(registry, "PLUGINS", {})
    monkeypatch.setattr(registry, "entry_points", entry_points)
    return Installed(asked, install)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """A registry that packages can add to: ``flowdistill.registry.tools``."""
    made: Registry[str] = Registry("tool", GROUP)
    made.register("hammer")("a hammer")
    monkeypatch.setattr(registry, "tools", made, raising=False)
    return made


ADDS = "from flowdistill.registry import tools\ntools.register('{0}')('a {0}')\n"


def failure(name: str, why: str, group: str = GROUP) -> str:
    return f"package {name}: its entry point things = {name} of {group} can't be loaded ({why}); mend the package, or uninstall it"


def test_known_names_load_nothing_and_an_unknown_one_loads_once(packages: Installed, tools: Registry[str]) -> None:
    packages.install("with_a_saw", ADDS.format("saw"), GROUP)
    assert tools["hammer"] == "a hammer"
    assert "hammer" in tools
    assert packages.asked == []
    assert "with_a_saw" not in sys.modules
    assert tools["saw"] == "a saw"
    assert registry.PLUGINS == {"with_a_saw": "1.5"}
    assert list(tools) == ["hammer", "saw"]
    assert "tongs" not in tools
    assert packages.asked == [GROUP]


def test_a_registry_without_a_group_loads_nothing(packages: Installed) -> None:
    assert list(Registry[str]("tool")) == []
    assert packages.asked == []


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raise RuntimeError('no luck\\nat all')", "RuntimeError: no luck"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def", "SyntaxError: invalid syntax (with_a_fault.py, line 3)"),
        ("tools.register('hammer')('mine')", "ValueError: two entries named 'hammer' in the registry of tools"),
    ],
)
def test_a_package_that_fails_costs_its_own_entries_alone(packages: Installed, tools: Registry[str], fault: str, why: str) -> None:
    packages.install("with_a_fault", ADDS.format("axe") + fault, GROUP)
    packages.install("with_a_saw", ADDS.format("saw"), GROUP)
    assert {name: tools[name] for name in tools} == {"hammer": "a hammer", "saw": "a saw"}
    assert registry.PLUGINS == {"with_a_saw": "1.5"}
    assert tools.failures == [failure("with_a_fault", why)]
    with pytest.raises(UserError) as error:
        tools["axe"]
    assert str(error.value) == f"unknown tool 'axe': choose from: hammer, saw; {failure('with_a_fault', why)}"


def test_registries_of_one_group_load_it_once_between_them(packages: Installed, tools: Registry[str]) -> None:
    handles: Registry[str] = Registry("handle", GROUP)
    packages.install("with_a_fault", "raise RuntimeError('first')", GROUP)
    assert "axe" not in tools
    assert "axe" not in handles
    assert handles.failures == tools.failures == [failure("with_a_fault", "RuntimeError: first")]
    assert packages.asked == [GROUP]


def test_a_module_may_ask_while_it_is_loaded(packages: Installed, tools: Registry[str]) -> None:
    packages.install("with_a_saw", ADDS.format("saw") + "assert 'axe' not in tools and 'saw' in list(tools)", GROUP)
    assert list(tools) == ["hammer", "saw"]
    assert tools.failures == []


def test_what_is_registered_inside_restored_is_gone_after(packages: Installed, tools: Registry[str]) -> None:
    packages.install("with_a_saw", ADDS.format("saw"), GROUP)
    entries = tools._entries

    def borrow() -> None:
        with tools.restored():
            tools.register("axe")("an axe")
            assert list(tools) == ["hammer", "saw", "axe"]
            raise KeyError

    with pytest.raises(KeyError):
        borrow()
    assert list(tools) == ["hammer", "saw"]
    assert tools._entries is entries, "planted bugs hold it"
    tools.register("axe")("another axe")


def test_listing_goes_on_and_tells_what_failed(packages: Installed, tmp_path: Path) -> None:
    before = command(tmp_path, "methods")
    registry._FAILURES.clear()
    packages.install("with_a_fault", "raise RuntimeError('no luck')", "flowdistill.methods")
    assert command(tmp_path, "methods", "fsp").err == "", "a known name needs no package"
    assert command(tmp_path, "methods") == before._replace(
        err=failure("with_a_fault", "RuntimeError: no luck", "flowdistill.methods") + "\n"
    )


@pytest.mark.parametrize(
    ("words", "group"),
    [
        (["methods", "fspp"], "methods"),
        (["models", "with_a*"], "models"),
        (["taps", "with_a_net"], "models"),
        (["table", "--dataset", "with_a:40"], "data"),
    ],
)
def test_the_failure_stands_where_a_name_is_refused(
    packages: Installed, ledger: Ledger, tmp_path: Path, words: list[str], group: str
) -> None:
    ledger.register([row()])
    packages.install("with_a_fault", "raise RuntimeError('no luck')", f"flowdistill.{group}")
    said = command(tmp_path, *words)
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert said.err.endswith(f"; {failure('with_a_fault', 'RuntimeError: no luck', f'flowdistill.{group}')}\n")


def test_the_failure_stands_where_data_are_refused(packages: Installed) -> None:
    packages.install("with_a_fault", "raise RuntimeError('no luck')", "flowdistill.data")
    with pytest.raises(UserError) as error:
        load(validate({"data": {"name": "with_a:40"}}).data)
    assert str(error.value).startswith("unknown data set 'with_a:40': choose from: digits, ")
    assert str(error.value).endswith(f"; {failure('with_a_fault', 'RuntimeError: no luck', 'flowdistill.data')}")
    assert packages.asked == ["flowdistill.data"]


def test_every_registry_of_the_package_is_left_as_it_was() -> None:
    """The tests above lend their packages; none may stay."""
    assert METHODS.failures == FORMATS.failures == []
    assert not [name for name in sys.modules if name.startswith("with_a_")]
