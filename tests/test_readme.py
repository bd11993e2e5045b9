"""The README says what is true: its figures come from committed results, its Python runs, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from contextlib import closing
from pathlib import Path

import pytest
from helpers.command import command

from flowdistill.config import BASELINE
from flowdistill.ledger import Ledger
from flowdistill.methods import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("term", ["cohort", "fingerprint", "holdout", "lane", "ledger", "protocol", "taps?"])
def test_a_term_is_explained_where_the_front_page_has_it_first(term: str) -> None:
    prose = re.sub(r"```.*?```|\]\([^)]*\)|`[^`]*`", "", README, flags=re.DOTALL)
    first = re.search(rf"\b{term}\b", prose, re.IGNORECASE)
    assert first is None or prose[first.start() - 1] == prose[first.end()] == "*", prose[first.start() - 40 : first.end() + 40]


def test_what_is_read_out_of_the_table_stands_in_it() -> None:
    prose = README.split("Read it like this")[1].split("##")[0]
    row = next(line for line in (ROOT / "results" / "digits-cpu.md").read_text().splitlines() if line.startswith("| fsp "))
    figures = re.findall(r"[-+]?\d+\.\d+", prose)
    assert len(figures) == 3
    assert all(figure in row for figure in figures)


def test_the_python_example_runs_and_prints_what_stands_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures apart, which depend on the processor: but for the parameters they are of a teacher and a student that have learned."""
    ((code, shown),) = re.findall(r"```python\n(.*?)```\n.*?```\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line) for line in code.splitlines()) <= 8
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(code)
    names = runpy.run_path("example.py")
    accuracy = r"\d+\.\d\d %"
    printed = capsys.readouterr().out
    assert re.sub(accuracy, "", printed) == re.sub(accuracy, "", shown)
    assert names["result"].accuracy > 50
    assert names["result"].run.teacher == "resnet20"
    assert not names["student"].training


def test_the_three_commands_run_and_print_the_table_below(tmp_path: Path) -> None:
    """Of one epoch on few images: the same rows, with other figures."""
    ((block, shown),) = re.findall(r"```sh\n(flowdistill train.*?)```\n.*?\n\n(acc: .*?\n\n.*?)\n\n", README, re.DOTALL)
    lines = block.splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)[1:]
        if "--epochs" in words:
            words[words.index("--epochs") + 1] = "1"
            words += ["--set", "data.limit_train=100"]
        said = command(tmp_path, *words)
        assert said.code == 0, said.err
    assert rows(said.out) == rows(shown)


def rows(shown: str) -> list[object]:
    """A summary without its figures: the words above it, its columns, and of each row what it is about and over how many runs."""
    heading, table = shown.strip().split("\n\n")
    columns, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    kept = [dict(zip(columns, line, strict=True)) for line in lines]
    return [
        heading,
        columns,
        *([row["method"], row["pair"], row["acc (n)"].partition(" +- ")[2].partition(" ")[2], row["teacher"]] for row in kept),
    ]


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
    assert names["matrix"].shape == (8, 16, 16)
    assert float(names["fsp_alone"]) > 0
    assert names["fsp"].terms == ("fsp",)
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
    least = {"README.md": 1, "REPRODUCE.md": 1, "PERFORMANCE.md": 3, "VERIFICATION.md": 2, "PLUGINS.md": 5}.get(page.name, 0)
    assert text.count("<!-- include") == text.count("<!-- end -->") >= least
    assert INCLUDE["included"](text) == text, "python docs/include.py"


@pytest.mark.parametrize("name", ["planted-bugs.md", "golden-values.md"])
def test_what_the_suite_proves_is_what_its_own_lists_say(name: str) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "verification.py"))["PAGES"][name]
    assert (ROOT / "results" / name).read_text() == page(), "python docs/verification.py && python docs/include.py"


def test_the_page_of_methods_is_what_the_registry_says() -> None:
    methods = runpy.run_path(str(ROOT / "docs" / "methods.py"))
    assert methods["PAGE"].read_text() == methods["page"](), "python docs/methods.py"


def test_the_page_of_commands_is_what_the_command_line_says() -> None:
    commands = runpy.run_path(str(ROOT / "docs" / "commands.py"))
    assert commands["PAGE"].read_text() == commands["page"](), "python docs/commands.py"


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())
    assert all((ROOT / page).parent.joinpath(target).exists() for target in targets), targets


def test_links_into_a_page_lead_to_headings_that_exist() -> None:
    pages = {path: path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    headings = {path: {anchor(line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)} for path, text in pages.items()}
    targets = [(path, link) for path, text in pages.items() for link in re.findall(r"\]\(((?!https?:)[^)]*#[^)]+)\)", text)]
    assert len(targets) > 20
    for path, link in targets:
        file, heading = link.split("#")
        page = (path.parent / file).resolve() if file else path
        assert heading in headings.get(page, {heading}), f"{path.name}: {link}"


def anchor(heading: str) -> str:
    """As GitHub makes it: small letters, without punctuation, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_commands_of_the_verification_page_select_tests() -> None:
    commands = re.findall(r"`pytest (tests/test_\w+\.py)(?: -k (\w+|\"[^\"]+\"))?`", (ROOT / "docs" / "VERIFICATION.md").read_text())
    assert len(commands) >= 20
    for file, chosen in commands:
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
        assert names
        for word in set(re.findall(r"\w+", chosen)) - {"or"}:
            assert any(word in name for name in names), f"{file} -k {word}"


def test_the_readme_counts_the_methods_that_there_are() -> None:
    distilling = {*METHODS} - {BASELINE}
    assert re.findall(r"(\d+) others are there", README) == [str(len(distilling - {"kd", "fsp"}))]
    assert re.findall(r"Each of the (\d+) methods", README) == [str(len(distilling))]
