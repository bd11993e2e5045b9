"""Listing starts at once: torch is not imported before something is to be computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.rows import row

from flowdistill.ledger import Epoch, Ledger

REPORT = "import json, sys; sys.stderr.write(json.dumps({'code': code, 'torch': sorted({'torch', 'torchvision'} & sys.modules.keys())}))"
COMMAND = f"""
import sys
sys.argv = ["flowdistill", *sys.argv[1:]]
code = 0
try:
    from flowdistill.cli import main
    main()
except SystemExit as end:
    code = end.code
{REPORT}
"""


def python(program: str, *arguments: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lazy") / "runs"
    ledger = Ledger(folder, create=True)
    ledger.register([row(seed=seed, method=method, correct=9_200 + seed) for method in ("base", "fsp") for seed in range(3)])
    ledger.add_epochs({1: Epoch(1, "joint", 0.1, {"task": 1.5}, 91, 100, 0.5)})
    ledger.close()
    return folder


@pytest.mark.parametrize("module", ["flowdistill", "flowdistill.cli"])
def test_import_without_torch(module: str) -> None:
    _, told = python(f"import {module}\ncode = 0\n{REPORT}")
    assert json.loads(told) == {"code": 0, "torch": []}


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["runs"], "resnet20"),
        (["table"], "### ResNet20>>20/Cifar10 (92.0)"),
        (["table", "--summary"], "detectable"),
        (["show", "1"], "joint"),
    ],
    ids=" ".join,
)
def test_command_on_a_ledger_without_torch(command: list[str], shown: str, runs: Path) -> None:
    printed, told = python(COMMAND, *command, "--runs", str(runs))
    *_, report = told.splitlines()  # show says before it that there is no file of answers
    assert json.loads(report) == {"code": 0, "torch": []}
    assert shown in printed


@pytest.mark.parametrize(("command", "shown"), [("--version", "0."), ("datasets", "cifar10")])
def test_command_without_a_ledger_without_torch(command: str, shown: str) -> None:
    printed, told = python(COMMAND, command)
    assert json.loads(told) == {"code": 0, "torch": []}
    assert shown in printed


def test_the_check_sees_torch() -> None:
    _, told = python(f"import flowdistill\nflowdistill.fsp_loss\ncode = 0\n{REPORT}")
    assert "torch" in json.loads(told)["torch"]


def test_all_names_resolve_and_dir_lists_them() -> None:
    program = """
import json, flowdistill
found = {name: type(getattr(flowdistill, name)).__name__ for name in flowdistill.__all__}
print(json.dumps([found, dir(flowdistill), sorted(flowdistill.__all__)]))
"""
    found, listed, promised = json.loads(python(program)[0])
    assert list(found) == promised == listed
    assert (found["methods"], found["train"], found["UserError"]) == ("module", "function", "type")


def test_an_unknown_name_is_an_attribute_error() -> None:
    printed, _ = python("import flowdistill\ntry:\n    flowdistill.nothing\nexcept AttributeError as error:\n    print(error)")
    assert printed.strip() == "module 'flowdistill' has no attribute 'nothing'"
