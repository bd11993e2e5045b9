"""The README says what is true: its figures come from committed results, its Python runs, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from contextlib import closing
from pathlib import Path

import pytest
from helpers.command import command

from flowdistill.ledger import Ledger

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(code)
    names = runpy.run_path("example.py")
    if "result" in names:
        assert 10 < names["result"].accuracy <= 100
        assert names["result"].run.teacher == "resnet20"
        assert not names["network"].training
    else:
        assert names["matrix"].shape == (8, 16, 16)
        assert float(names["loss"]) > 0
    assert capsys.readouterr().out


def test_the_page_on_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text("".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PYTHON.md").read_text(), re.DOTALL)))
    names = runpy.run_path("page.py")
    assert type(names["module"]) is names["Student"]
    assert names["result"].run.teacher.startswith("module:ResNet-")
    assert names["result"].accuracy > 20
    assert len((tmp_path / "runs" / "3" / "metrics.csv").read_text().splitlines()) == 3
    assert (tmp_path / "student.pt2").is_file()
    assert not any(module._forward_hooks for module in names["student"].modules())
    assert set(names["terms"]) == {"task", "at", "kd"}
    out = capsys.readouterr().out
    assert "best" not in out, "progress is no data"
    assert "# Compression card: run 2, kd module:ResNet" in out


def test_the_chain_of_assistants_runs(tmp_path: Path) -> None:
    """Its commands as they stand, each with one epoch and on few images."""
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "ASSISTANTS.md").read_text(), re.DOTALL)
    options = shlex.split(re.search(r'^O="(.*)"$', block, re.MULTILINE)[1])  # type: ignore[index]
    lines = [line.replace("$O", "") for line in block.splitlines() if line.startswith("flowdistill ")]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if "--epochs" in words:
            words[words.index("--epochs") + 1] = "1"
            words += [*options, "--set", "data.limit_train=100"]
        said = command(tmp_path, *words)
        assert said.code == 0, said.err
    with closing(Ledger(tmp_path / "runs")) as ledger:
        pairs = [(run.student, run.teacher_run) for run in ledger.runs()]
    assert pairs[:2] == [("resnet20", None), ("resnet14", 1)]
    assert pairs[2:] == [("resnet8", None)] * 3 + [("resnet8", 1)] * 3 + [("resnet8", 2)] * 3


INCLUDE = runpy.run_path(str(ROOT / "docs" / "include.py"))


@pytest.mark.parametrize("page", INCLUDE["PAGES"], ids=lambda page: page.name)
def test_the_figures_are_those_of_the_committed_results(page: Path) -> None:
    text = page.read_text()
    least = {"README.md": 3, "VERIFICATION.md": 2, "PLUGINS.md": 5}.get(page.name, 0)
    assert text.count("<!-- include") == text.count("<!-- end -->") >= least
    assert INCLUDE["included"](text) == text, "python docs/include.py"


@pytest.mark.parametrize("name", ["planted-bugs.md", "golden-values.md"])
def test_what_the_suite_proves_is_what_its_own_lists_say(name: str) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "verification.py"))["PAGES"][name]
    assert (ROOT / "results" / name).read_text() == page(), "python docs/verification.py && python docs/include.py"


def test_the_page_of_methods_is_what_the_registry_says() -> None:
    methods = runpy.run_path(str(ROOT / "docs" / "methods.py"))
    assert methods["PAGE"].read_text() == methods["page"](), "python docs/methods.py"


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())
    assert all((ROOT / page).parent.joinpath(target).exists() for target in targets), targets


def test_the_commands_of_the_verification_page_select_tests() -> None:
    commands = re.findall(r"`pytest (tests/test_\w+\.py)(?: -k (\w+|\"[^\"]+\"))?`", (ROOT / "docs" / "VERIFICATION.md").read_text())
    assert len(commands) >= 20
    for file, chosen in commands:
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
        assert names
        for word in set(re.findall(r"\w+", chosen)) - {"or"}:
            assert any(word in name for name in names), f"{file} -k {word}"
