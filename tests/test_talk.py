"""One place prints: what reaches a terminal, a page, a CSV, and a stream that can take nothing."""

from __future__ import annotations

import ast
import csv
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import command
from PIL import Image

import flowdistill
from flowdistill import talk
from flowdistill.checks import Changes, UserError, defused, undefused
from flowdistill.config import read_taps
from flowdistill.ledger import Ledger
from flowdistill.recipes import RECIPES
from flowdistill.report import tables
from flowdistill.report.progress import Bars
from flowdistill.talk import Remarks, answer, printable, say

SOURCE = Path(__file__).parents[1] / "src" / "flowdistill"
EVIL = "c\udcff\x1b[31m<script>alert(1)</script>:cat:[bold]|`x`\n| 9 | [a](javascript:b) \u202eabc\u200b\u2028\x9b\x7f"
SHOWN = r"c\udcff\x1b[31m<script>alert(1)</script>:cat:[bold]|`x`\n| 9 | [a](javascript:b) \u202eabc\u200b\u2028\x9b\x7f"


# One place


def prints(text: str) -> list[str]:
    """What of a module's source writes to stdout or stderr by itself."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr", "__stdout__", "__stderr__", "echo", "secho"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "warnings.warn", "os.write", "Console", "rich.print"):
            found.append(ast.unparse(node.func))
        elif isinstance(node, ast.ImportFrom) and node.module in ("sys", "rich", "rich.console", "typer", "warnings"):
            found += [alias.name for alias in node.names if alias.name in ("stdout", "stderr", "Console", "print", "echo", "warn")]
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_one_module_prints(path: Path) -> None:
    assert bool(prints(path.read_text(encoding="utf-8"))) == (path.name == "talk.py")


@pytest.mark.parametrize(
    "text",
    [
        "print('x')",
        "import sys\nsys.stderr.write('x')",
        "import sys\nout = sys.__stdout__",
        "from sys import stderr",
        "from rich.console import Console",
        "from rich import print",
        "import typer\ntyper.echo('x')",
        "import warnings\nwarnings.warn('x')",
        "import os\nos.write(1, b'x')",
    ],
)
def test_what_prints_is_seen(text: str) -> None:
    assert prints(text)


# What is shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (EVIL, SHOWN),
        ("plain :cat: [bold] é 猫", "plain :cat: [bold] é 猫"),
        ("\x00\t\r\n\x1b\x7f\x85\x9b", r"\x00\t\r\n\x1b\x7f\x85\x9b"),
        ("\u202a\u202e\u2066\u2069\u200e\u061c", r"\u202a\u202e\u2066\u2069\u200e\u061c"),
        ("\u200b\u200d\u2060\ufeff\u00ad\u3164\u115f\ufe0f", r"\u200b\u200d\u2060\ufeff\xad\u3164\u115f\ufe0f"),
        ("\u2028\u2029\u00a0\u3000", r"\u2028\u2029\xa0\u3000"),
        ("\udcff\ud800\ue000\U000e0041", r"\udcff\ud800\ue000\U000e0041"),
    ],
)
def test_what_is_not_seen_becomes_visible(given: str, shown: str) -> None:
    assert printable(given) == shown


def test_a_line_of_talk_is_one_line_and_data_keep_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    say("run 1\nrun 2 finished\x1b]0;x\a")
    answer("a\n\x1b[2Jb")
    said = capsys.readouterr()
    assert (said.err, said.out) == ("run 1\\nrun 2 finished\\x1b]0;x\\x07\n", "a\n\\x1b[2Jb\n")


def test_a_remark_is_told_once_to_whoever_listens(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    changes = Changes(True, heard.append)
    for _ in range(2):
        changes.meet("run 1: it changed")
    assert heard == changes.lines == ["taken as it is: run 1: it changed"]
    unheard = talk.unheard()
    unheard.tell("x")
    assert unheard.lines == ["x"]
    assert capsys.readouterr().err == ""
    Remarks().tell("y\x1b")
    assert capsys.readouterr().err == "y\\x1b\n"


ROWS = [{"class": EVIL, "n": -1.5}, {"class": "=1+1", "n": 2}]


def test_a_table_shows_names_as_they_are() -> None:
    lines = tables.render(ROWS, "table", ("class", "n")).split("\n")
    assert [line.split("  ")[0] for line in lines] == ["class", SHOWN, "=1+1"]
    assert len({line.rindex(cell) for line, cell in zip(lines, ("n", "-1.5", "2"), strict=True)}) == 1, "columns stand below each other"


def test_wide_letters_keep_the_columns() -> None:
    first, second = tables.render([{"a": "猫猫", "b": 1}, {"a": "cats", "b": 2}], "table", ("a", "b")).split("\n")[1:]
    assert (first, second) == ("猫猫  1", "cats  2")


def test_markdown_has_no_html_no_link_and_no_other_row() -> None:
    lines = tables.render(ROWS, "md", ("class", "n")).split("\n")
    assert len(lines) == 4
    assert lines[2] == (
        r"| c\\udcff\\x1b\[31m&lt;script>alert(1)&lt;/script>:cat:\[bold\]\|\`x\`\\n\| 9 \| \[a\](javascript:b) "
        r"\\u202eabc\\u200b\\u2028\\x9b\\x7f | -1.5 |"
    )


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        (r"a\|b", r"a\\\|b"),
        ("data_x __init__ _a_", r"data_x \_\_init\_\_ \_a\_"),
        ("R&D &lt;", "R&amp;D &amp;lt;"),
        ("at+kd -1.5 ResNet20>>8", "at+kd -1.5 ResNet20>>8"),
    ],
)
def test_markdown_reads_as_it_stands(text: str, escaped: str) -> None:
    assert tables.markdown(text) == escaped


@pytest.mark.parametrize(("text", "span"), [("a 'b'", "`a 'b'`"), ("a `b`", "`` a `b` ``"), ("``", "``` `` ```")])
def test_code_of_markdown_holds_backticks(text: str, span: str) -> None:
    assert tables.code(text) == span


def test_json_is_ascii_and_exact() -> None:
    text = tables.render(ROWS, "json", ())
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert json.loads(text) == ROWS


@pytest.mark.parametrize("cell", ["=1+1", "+1+1", "-a", "@SUM(A1)", "'=1", "''=1", "\uff1d1", "--x"])
def test_a_formula_is_defused_and_comes_back(cell: str) -> None:
    assert defused(cell) == f"'{cell}"
    assert undefused(defused(cell)) == cell
    (row,) = csv.DictReader(io.StringIO(tables.render([{"a": cell}], "csv", ("a",))))
    assert row["a"] == f"'{cell}"


@pytest.mark.parametrize("cell", ["-1.5", "+2", "-1e-05", "-inf", "-", "a=b", "'", "it's", "'tis", "", "1"])
def test_numbers_and_words_stay(cell: str) -> None:
    assert defused(cell) == undefused(cell) == cell


def test_a_csv_has_a_line_a_row() -> None:
    lines = tables.render([*ROWS, {"class": "\t=1", "n": None}], "csv", ("class", "n")).split("\n")
    assert lines[0] == "class,n"
    assert list(csv.reader(lines[1:])) == [[SHOWN, "-1.5"], ["'=1+1", "2"], [r"\t=1", ""]]


def test_taps_with_names_like_formulas_come_back(tmp_path: Path) -> None:
    rows = [{"name": name, "module": module} for name, module in (("=a", "-b.0"), ("+c", "@d"), ("stem", "'=e"))]
    (tmp_path / "taps.csv").write_text(tables.render(rows, "csv", ("name", "module")))
    assert read_taps(tmp_path / "taps.csv") == {row["name"]: row["module"] for row in rows}


# Streams that can't take it


class Plain:
    """An object with ``write`` alone."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Refusing(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, _: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def walk() -> None:
    """All that prints, once."""
    say("said \u732b")
    answer("answered")
    bars = Bars()
    bars.say("said by the bars \x1b")
    bars.begin("title", 2)
    bars.step()
    bars.epoch("epoch 1/1")
    bars.end()


@pytest.mark.parametrize("stream", [None, closed(), Plain(), Refusing(errno.EPIPE)], ids=["none", "closed", "plain", "gone"])
def test_nothing_stumbles_over_a_stream(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    walk()
    if isinstance(stream, Plain):
        assert stream.text == "said \u732b\nanswered\nsaid by the bars \\x1b\ntitle: epoch 1/1\n"


def test_a_full_disk_is_told_of_data_and_not_of_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Refusing(errno.ENOSPC))
    walk()
    monkeypatch.setattr(sys, "stdout", Refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as error:
        answer("x")
    assert error.value.filename == "stdout"


@pytest.mark.parametrize(
    ("encoding", "cat"), [("ascii", rb"\u732b"), ("latin-1", rb"\u732b"), ("cp1252", rb"\u732b"), ("utf-8", "猫".encode())]
)
def test_an_encoding_that_lacks_a_letter_gets_its_escape(monkeypatch: pytest.MonkeyPatch, encoding: str, cat: bytes) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding=encoding))
    walk()
    bars = Bars()
    bars.say("\u732b")
    assert raw.getvalue().splitlines()[0] == b"said " + cat
    assert raw.getvalue().splitlines()[-1] == cat


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_on_a_terminal_of_20_columns_nothing_said_is_cut(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for name, value in {"TERM": term, "COLUMNS": "20", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    bars = Bars()
    bars.begin("kd :cat: [bold]resnet8[/bold] birds\x1b seed 0", 1)
    bars.step()
    bars.epoch("epoch 1/1, best 50.00 %")
    bars.say("run 1: kd :cat: [bold] seed 0: 50.00 % of 24 test images in fp32\x1b[2J")
    bars.end()
    assert "run 1: kd :cat: [bold] seed 0: 50.00 % of 24 test images in fp32\\x1b[2J" in screen.getvalue()
    if term == "dumb":
        assert screen.getvalue().splitlines()[0] == "kd :cat: [bold]resnet8[/bold] birds\\x1b seed 0: epoch 1/1, best 50.00 %"
        assert "\x1b" not in screen.getvalue()


def shell(folder: Path, line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of shell, in which $F is the command."""
    given = os.environ | {"F": f"{sys.executable} -m flowdistill", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(["bash", "-c", line], cwd=folder, env=given, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("line", "out", "err"),
    [
        ("$F recipes | head -1; exit ${PIPESTATUS[0]}", 1, b""),
        ("$F --help | true; test ${PIPESTATUS[0]} -lt 2", 0, b""),
        ("$F recipes >&-", 0, b""),
        ("$F recipes 2>&-", 1 + len(RECIPES), b""),
        ("$F recipes >&- 2>&- <&-", 0, b""),
        (
            "$F recipes >/dev/full; test $? = 1",
            0,
            b"flowdistill: stdout: No space left on device; make room there and give",
        ),
        ("$F runs --runs none 2>/dev/full; test $? = 2", 0, b""),
    ],
)
def test_the_streams_of_a_process(tmp_path: Path, line: str, out: int, err: bytes) -> None:
    done = shell(tmp_path, line)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == out
    assert done.stderr.startswith(err)
    assert len(done.stderr.splitlines()) == bool(err), done.stderr


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_help_and_complaints_in_ascii(tmp_path: Path, environment: dict[str, str]) -> None:
    done = shell(tmp_path, "$F train --help >/dev/null && $F show 1 --runs $'runs \\u732b\\xff\\e'", **environment)
    assert done.returncode == 2
    assert done.stderr.isascii()
    assert done.stderr.startswith(b"flowdistill: no ledger in runs \\u")


def test_a_file_opened_later_is_not_stdout(tmp_path: Path) -> None:
    code = "import os; from flowdistill import talk; talk.begin(); print(os.open('x', os.O_CREAT | os.O_WRONLY), file=open('number', 'w'))"
    subprocess.run(["bash", "-c", f'"$0" -c "{code}" >&- 2>&- <&-', sys.executable], cwd=tmp_path, check=True, timeout=60)
    assert int((tmp_path / "number").read_text()) > 2


# Odd names, trained on


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images below ``birds \\xfe#``, whose classes have every odd name."""
    folder, chance = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    classes = [b"c\xff<script>", b"\x1b[31m=:cat:[bold]|`", "a\u202eb\u2028c".encode(), b"=1+1\n| x |"]
    for number, label in enumerate(classes):
        for split, count in ((b"train", 8), (b"test", 4)):
            place = os.path.join(os.fsencode(folder), b"birds \xfe#", split, label)
            os.makedirs(place)
            for image in range(count):
                pixels = np.clip(chance.normal(60 * number + 20, 20, (8, 8)), 0, 255).astype(np.uint8)
                with open(os.path.join(place, b"%d\xfd.png" % image), "wb") as file:
                    Image.fromarray(pixels).save(file, "PNG")
    Path(folder, "birds \udcfe#", "left\x1b\udcff").write_text("no image")
    return folder


DATA = "folder:birds \udcfe#"
SHORT = ("--model", "resnet8", "--epochs", "2", "--batch-size", "16", "--set", "data.pad=1", "--precision", "fp32")
TOLD = r"folder:birds \udcfe#: left out, as no class's images: left\x1b\udcff"


def test_names_that_are_no_text_are_trained_on_and_come_back(birds: Path) -> None:
    runs = "runs \udcfb"
    trained = command(birds, "train", *SHORT, "--dataset", DATA, "--runs", runs)
    assert trained.code == 0, trained.err
    assert trained.err.splitlines()[0] == TOLD
    for words in ("runs", "show 1", "check", "table", "evaluate 1", "card 1 --device cpu", "runs --format json", "runs --format csv"):
        said = command(birds, *words.split(), "--runs", runs)
        assert said.code == 0, said.err
        (said.out + said.err).encode("utf-8")  # no lone surrogate
        assert not set("\x1b\u202e\u2028") & set(said.out + said.err)
        assert "Traceback" not in said.err
    assert "as recorded" in command(birds, "evaluate", "1", "--runs", runs).out
    assert r"birds \\udcfe#" in command(birds, "table", "--dataset", "birds \udcfe#", "--runs", runs).out
    out = "out \udcfc.safetensors"
    assert command(birds, "export", "1", "--to", "safetensors", "--out", out, "--runs", runs).code == 0
    assert (birds / out).is_file()
    file = str(Path(runs, "1", "student.safetensors"))
    assert "as recorded" in command(birds, "evaluate", file).out
    (birds / "conf\udcff.json").write_bytes((birds / runs / "1" / "run.json").read_bytes())
    again = command(birds, "train", "--config", "conf\udcff.json", "--runs", runs)
    assert "run 1 has it already" in again.err
    run = Ledger(birds / runs).run(1)
    assert (run.dataset, run.config["data"]["name"]) == (r"birds \udcfe#", DATA), "the config finds the files again"


def test_without_progress_nothing_is_said(birds: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(birds)
    train = {"epochs": 1, "batch_size": 16, "precision": "fp32"}
    data = {"name": DATA, "pad": 1}
    taught = flowdistill.train("resnet8", data, seed=100, train=train, progress=False, runs="quiet")
    result = flowdistill.distill(taught, "resnet8", data, method="kd", train=train, progress=False, runs="quiet")
    assert result.export("safetensors").is_file()
    result.student()
    with pytest.raises(UserError, match="no such folder"):
        flowdistill.train("resnet8", "folder:none", progress=False, runs="quiet")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert result.remarks == (TOLD,)
    heard = flowdistill.train("resnet8", data, seed=100, train=train, runs="quiet")
    said = capfd.readouterr()
    assert (said.out, said.err.splitlines()[0], heard.run.no) == ("", TOLD, taught.run.no)


def test_without_any_stream_a_run_is_trained(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(birds)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    train = {"epochs": 1, "batch_size": 16, "precision": "fp32"}
    result = flowdistill.train("resnet8", {"name": DATA, "pad": 1}, seed=3, train=train, runs="nowhere")
    assert result.run.status == "finished"
