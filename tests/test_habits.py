"""What the project promises to those who carry it on: workflows, templates, the container, and what is said where it can't run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w$()/.-]+):", (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTS = next(path for path in WORKFLOWS if path.name == "tests.yml")


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]  # type: ignore[no-any-return]


def commands(path: Path) -> Iterator[str]:
    """Every line that a workflow runs."""
    for job in jobs(path).values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_hash_beside_their_version(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_alone_and_says_that_it_has_not_run(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    asking = {name: job["permissions"] for name, job in jobs(path).items() if "permissions" in job}
    assert asking == ({"publish": {"id-token": "write"}} if path.name == "release.yml" else {})
    assert path.read_text().startswith("# Not run yet")
    assert all("timeout-minutes" in job for job in jobs(path).values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_makes_the_makefile_has(path: Path) -> None:
    made = {word for line in commands(path) if line.startswith("make ") for word in line.split()[1:]}
    assert made
    assert made <= TARGETS


def test_the_matrix_has_the_versions_that_the_project_admits() -> None:
    matrix = jobs(TESTS)["test"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    assert f">={matrix['python'][0]}" == PROJECT["requires-python"]
    lowest = dict(re.match(r"(torch|torchvision)>=(.*)", need).groups() for need in PROJECT["dependencies"] if need.startswith("torch"))
    (line,) = (line for line in commands(TESTS) if "pip install" in line)
    assert re.findall(r'"(\w+)==([\d.]+)\.\*"', line) == [*lowest.items()]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_an_issue_template_asks_for_something(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "labels", "body"} == form.keys()
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_the_container_s_file_is_sound() -> None:
    """It names a version of its image, runs as no root, copies what is there, and its entry is ``make demo``."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert re.fullmatch(r"python:3\.\d+-[\w-]+", steps[0][1])
    assert [rest for word, rest in steps if word == "USER"][-1:] == ["distiller"]
    assert "useradd --create-home distiller" in text
    assert dict(steps)["ENTRYPOINT"] == '["make"]'
    assert dict(steps)["CMD"] == '["demo"]'
    made = re.findall(r"make ([\w./-]+)", " ".join(rest for word, rest in steps if word == "RUN" and rest.startswith("make")))
    assert made == [".venv/installed"]
    assert {*made, "demo"} <= TARGETS
    needed = {"Makefile", "pyproject.toml", "src", "README.md", "LICENSE"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not needed & {*ignored}


def test_on_windows_one_line_says_that_it_does_not_run() -> None:
    program = "import sys; sys.platform = 'win32'; import flowdistill"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    line = "ImportError: Windows is not supported, for it lacks the file locks of Linux and macOS; use WSL 2"
    assert done.stderr.splitlines()[-1] == line
