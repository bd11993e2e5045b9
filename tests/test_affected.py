"""``pytest --affected``, on a small project: what git says changed, which test files reach it, and what is run of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.affected import changed_files, files_of, nearest_first

TOY = {
    "README.md": "",
    "docs/LOG.md": "",
    "docs/make.py": "import pkg.low",
    "pyproject.toml": "[tool.pytest.ini_options]\ntestpaths = ['tests']",
    ".gitignore": "ignored.py\n__pycache__/",
    "src/pkg/__init__.py": "def anything():\n    from . import top",
    "src/pkg/__main__.py": "",
    "src/pkg/low.py": "x = 1",
    "src/pkg/middle.py": "from .low import x",
    "src/pkg/top.py": "def f():\n    from . import middle",
    "src/pkg/kinds/__init__.py": "import importlib\nfor name in ('a',):\n    importlib.import_module(f'{__name__}.{name}')",
    "src/pkg/kinds/a.py": "",
    "src/pkg/kinds/inner.py": "from ..low import x",
    "tests/conftest.py": "",
    "tests/data/small.json": "",
    "tests/shared/__init__.py": "",
    "tests/shared/made.py": "from pkg import middle",
    "tests/test_alone.py": "def test_alone(): pass",
    "tests/test_floors.py": "def test_floors(): pass",
    "tests/test_low.py": "from pkg.low import x\ndef test_low(): assert x == 1",
    "tests/test_middle.py": "import pkg.middle\ndef test_middle(): assert pkg.middle.x == 1",
    "tests/test_shared.py": "from shared.made import middle\ndef test_shared(): pass",
    "tests/test_top.py": "from pkg.top import f\ndef test_top(): pass",
}


def names(found: list[str]) -> list[str]:
    """Less the file that is always among them."""
    return [path.removeprefix("tests/test_").removesuffix(".py") for path in found if path != "tests/test_floors.py"]


def reaching(*changed: str, **more: str) -> list[str]:
    return names(nearest_first(TOY | {f"tests/test_{name}.py": text for name, text in more.items()}, changed))


# Which test files reach a change


@pytest.mark.parametrize(
    ("changed", "order"),
    [
        (["src/pkg/low.py"], ["low", "middle", "top", "shared"]),
        (["src/pkg/middle.py"], ["middle", "top", "shared"]),
        (["src/pkg/top.py"], ["top"]),
        (["tests/shared/made.py"], ["shared"]),
        (["tests/test_alone.py"], ["alone"]),
        (["tests/test_shared.py", "src/pkg/low.py"], ["shared", "low", "middle", "top"]),
        (["src/pkg/__init__.py"], ["low", "middle", "top", "shared"]),
        (["src/pkg/kinds/a.py"], []),
        (["docs/LOG.md"], []),
        (["src/pkg/new.py"], []),
    ],
)
def test_nearest_first(changed: list[str], order: list[str]) -> None:
    assert reaching(*changed) == order


def test_of_two_that_are_as_near_the_one_that_reaches_less_is_first() -> None:
    assert reaching("src/pkg/low.py", abc="from pkg import low, middle, top")[:2] == ["low", "abc"]


@pytest.mark.parametrize("changed", ["tests/conftest.py", "pyproject.toml"])
def test_what_all_tests_run_under_reaches_all(changed: str) -> None:
    assert sorted(reaching(changed)) == ["alone", "low", "middle", "shared", "top"]
    assert reaching(changed, "src/pkg/low.py") == ["low", "middle", "top", "shared", "alone"]


def test_what_conftest_alone_brings_in_is_farthest() -> None:
    texts = TOY | {"tests/conftest.py": "from pkg import top"}
    assert names(nearest_first(texts, ["src/pkg/low.py"])) == ["low", "middle", "top", "shared", "alone"]


def test_the_floors_are_always_among_them() -> None:
    assert nearest_first(TOY, []) == ["tests/test_floors.py"]
    assert nearest_first(TOY, ["README.md"]) == ["tests/test_floors.py"]
    assert nearest_first(TOY, ["src/pkg/top.py"]) == ["tests/test_floors.py", "tests/test_top.py"]


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("import pkg.kinds.inner", "src/pkg/kinds/inner.py"),
        ("import pkg.kinds.inner", "src/pkg/kinds/a.py"),  # the package runs, and gathers its files
        ("import pkg.kinds.inner", "src/pkg/low.py"),
        ("def f():\n    from pkg import low", "src/pkg/low.py"),
        ("from pkg import anything", "src/pkg/top.py"),
        ("from pkg import low, anything", "src/pkg/top.py"),
        ("try:\n    from pkg import low\nexcept ImportError:\n    pass", "src/pkg/low.py"),
        ("if not TYPE_CHECKING:\n    pass\nelse:\n    import pkg.low", "src/pkg/low.py"),
        ("import shared.made", "tests/shared/__init__.py"),
        ("import pkg.gone", "src/pkg/gone.py"),
        ("from pkg import gone", "src/pkg/gone.py"),
        ("patch('pkg.low.x', 2)", "src/pkg/low.py"),
        ("run([python, '-m', 'pkg', word])", "src/pkg/__main__.py"),
        ("(ROOT / 'README.md').read_text()", "README.md"),
        ("open('docs/LOG.md')", "docs/LOG.md"),
        ("(ROOT / 'docs' / 'LOG.md').read_text()", "docs/LOG.md"),
        ("ROOT.glob('docs/*.md')", "docs/LOG.md"),
        ("(ROOT / 'docs').iterdir()", "docs/LOG.md"),
        ("(ROOT / 'docs' / name).read_text()", "docs/LOG.md"),
        ("(HERE / 'data' / name).read_text()", "tests/data/small.json"),
        ("(ROOT / 'src' / 'pkg').rglob('*.py')", "src/pkg/top.py"),
        ("run_path(str(ROOT / 'docs' / 'make.py'))", "src/pkg/low.py"),
    ],
)
def test_a_way_to_a_file_is_seen(text: str, changed: str) -> None:
    assert "new" not in reaching(changed, new="")
    assert "new" in reaching(changed, new=text)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("import pkg.low", "src/pkg/top.py"),  # the package runs, but not what its functions import
        ("from pkg import low", "src/pkg/top.py"),
        ("from pkg import low", "src/pkg/kinds/a.py"),
        ("if TYPE_CHECKING:\n    import pkg.low", "src/pkg/low.py"),
        ("x = 'low'", "src/pkg/low.py"),
        ("x = {'docs', 'README'}", "docs/LOG.md"),
        ("(ROOT / 'docs' / 'README.md').read_text()", "docs/LOG.md"),
        ("(ROOT / 'docs').glob('*.py')", "src/pkg/low.py"),  # it reads that script; nothing runs it
        ("(HERE / name).read_text()", "tests/data/small.json"),
        ("import os.path, numpy", "src/pkg/low.py"),
        ("from pkg import (", "src/pkg/low.py"),
    ],
)
def test_no_way_is_made_up(text: str, changed: str) -> None:
    assert "new" not in reaching(changed, new=text)


# What changed


@pytest.fixture(autouse=True)
def _no_other_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of git runs its commands, tests among them, with GIT_DIR set; pytest's own variables are of the session around."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "PYTEST_"))]:
        monkeypatch.delenv(name)


def git(folder: Path, *words: str) -> None:
    alone = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    subprocess.run(["git", *alone, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--message", "x")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """On a branch that has nothing of its own yet."""
    folder = tmp_path / "toy"
    for name, text in TOY.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    git(tmp_path, "init", "--initial-branch", "main", "toy")
    commit(folder)
    git(folder, "checkout", "-b", "work")
    return folder


def test_a_clean_branch_differs_in_nothing(toy: Path) -> None:
    (toy / "README.md").write_text("before the branch\n")
    commit(toy)
    git(toy, "branch", "--force", "main")
    assert changed_files(toy) == set()
    assert files_of(toy) == TOY.keys()


def test_changed_added_and_removed_files_are_found_committed_or_not(toy: Path) -> None:
    (toy / "src/pkg/top.py").write_text("y = 1\n")
    (toy / "docs/LOG.md").unlink()
    commit(toy)
    (toy / "src/pkg/low.py").write_text("x = 2\n")
    git(toy, "add", "src/pkg/low.py")
    (toy / "README.md").write_text("more\n")
    (toy / "src/pkg/middle.py").unlink()
    (toy / "tests/test_é new.py").write_text("")
    (toy / "ignored.py").write_text("")
    gone = {"docs/LOG.md", "src/pkg/middle.py"}
    assert changed_files(toy) == {"src/pkg/top.py", "src/pkg/low.py", "README.md", "tests/test_é new.py"} | gone
    assert files_of(toy) == (TOY.keys() | {"tests/test_é new.py"}) - gone


def test_both_names_of_a_moved_file_are_found(toy: Path) -> None:
    git(toy, "mv", "src/pkg/low.py", "src/pkg/bottom.py")
    assert changed_files(toy) == {"src/pkg/low.py", "src/pkg/bottom.py"}


def test_what_others_did_on_main_since_is_not_a_change_of_this_branch(toy: Path) -> None:
    (toy / "README.md").write_text("mine\n")
    commit(toy)
    git(toy, "checkout", "main")
    (toy / "src/pkg/low.py").write_text("theirs = 1\n")
    commit(toy)
    git(toy, "checkout", "work")
    assert changed_files(toy) == {"README.md"}


def test_on_main_the_last_commit_counts_until_something_is_new(toy: Path) -> None:
    git(toy, "checkout", "main")
    assert changed_files(toy) == set()  # the first commit follows none
    (toy / "src/pkg/low.py").write_text("x = 2\n")
    commit(toy)
    assert changed_files(toy) == {"src/pkg/low.py"}
    (toy / "new.md").write_text("")
    assert changed_files(toy) == {"new.md"}


def test_without_git_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(pytest.UsageError, match="--affected asks git what changed, and git merge-base failed: fatal: not a git repo"):
        changed_files(tmp_path)


# What is run


def run(folder: Path, *words: str) -> tuple[int, str, list[str]]:
    """Exit status, last line, and all lines."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), f"{folder}/src"])}
    command = [sys.executable, "-m", "pytest", "-p", "helpers.affected", "--affected", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, [line for line in lines if line][-1], lines


def passed_in(lines: list[str]) -> list[str]:
    return [line.split("::")[1].split()[0] for line in lines if "::" in line and "PASSED" in line]


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_only_what_reaches_the_change_is_run(toy: Path, workers: tuple[str, ...]) -> None:
    (toy / "src/pkg/low.py").write_text("x = 1  # as before\n")
    code, last, lines = run(toy, "-q", *workers)
    assert (code, last) == (0, "5 tests that the change can break passed")
    assert any(line.startswith("5 passed in ") for line in lines)


def test_a_nearer_file_is_done_before_a_farther_one_whatever_fixtures_they_share(toy: Path) -> None:
    (toy / "tests/conftest.py").write_text(
        "import pytest\n@pytest.fixture(scope='session', params=[1, 2])\ndef kind(request):\n    return request.param\n"
    )
    (toy / "tests/test_top.py").write_text("from pkg.top import f\ndef test_top(kind): pass\n")
    (toy / "tests/test_middle.py").write_text("import pkg.middle\ndef test_middle(kind): pass\n")
    git(toy, "checkout", "main")
    commit(toy)
    (toy / "src/pkg/middle.py").write_text("from .low import x  # as before\n")
    code, _, lines = run(toy, "-v")
    assert code == 0
    assert passed_in(lines) == ["test_floors", "test_middle[1]", "test_middle[2]", "test_top[1]", "test_top[2]", "test_shared"]


def test_after_the_time_is_up_the_nearest_file_alone_is_finished(toy: Path) -> None:
    (toy / "tests/test_low.py").write_text("import time\ndef test_first(): time.sleep(1.1)\ndef test_second(): pass\n")
    (toy / "tests/shared/made.py").write_text("from pkg import middle  # as before\n")
    code, last, lines = run(toy, "-v", "--seconds", "1")
    assert passed_in(lines) == ["test_first", "test_second"]
    assert (code, last) == (0, "2 tests that the change can break passed; not run in 1 s: 2 tests farther from it (make test runs all)")
    assert not any("skipped" in line.lower() for line in lines)


def test_workers_stop_as_well_and_each_test_counts_once(toy: Path) -> None:
    (toy / "tests/test_middle.py").write_text(
        "import pkg.middle, pytest\n@pytest.mark.parametrize('i', range(1200))\ndef test_middle(i): pass\n"
    )
    git(toy, "checkout", "main")
    commit(toy)
    (toy / "src/pkg/low.py").write_text("x = 1  # as before\n")
    code, last, _ = run(toy, "-q", "-n", "2", "--seconds", "0")
    assert (code, last) == (0, "1 test that the change can break passed; not run in 0 s: 1,203 tests farther from it (make test runs all)")


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_a_failure_fails(toy: Path, workers: tuple[str, ...]) -> None:
    (toy / "src/pkg/low.py").write_text("x = 2\n")
    code, last, _ = run(toy, "-q", *workers)
    assert (code, last) == (1, "2 of 5 tests that the change can break failed")


def test_a_file_that_cannot_be_read_fails(toy: Path) -> None:
    (toy / "tests/test_low.py").write_text("def test_low(:\n")
    code, last, _ = run(toy, "-q")
    assert (code, last) == (2, "1 of 1 test that the change can break failed")


def test_nothing_changed_is_said(toy: Path) -> None:
    code, last, lines = run(toy, "-v")
    assert (code, last) == (0, "nothing differs from main: test_floors.py alone was run")
    assert passed_in(lines) == ["test_floors"]


def test_no_files_are_named_beside_it(toy: Path) -> None:
    code, last, _ = run(toy, "tests/test_low.py")
    assert (code, last) == (4, "ERROR: --affected finds the files itself: name none beside it")
