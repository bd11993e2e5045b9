"""The README says what is true: its figures come from committed results, its Python runs, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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


def test_the_figures_are_those_of_the_committed_results() -> None:
    included = runpy.run_path(str(ROOT / "docs" / "include.py"))["included"]
    assert README.count("<!-- include") == README.count("<!-- end -->") >= 3
    assert included(README) == README, "python docs/include.py"


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())
    assert all((ROOT / page).parent.joinpath(target).exists() for target in targets), targets
