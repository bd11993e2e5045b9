"""Every command that a message advises is taken out of it, read by a shell, and works; no other module writes one."""

from __future__ import annotations

import ast
import importlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Said, as_shell_reads, command

import flowdistill
from flowdistill import advice, demo
from flowdistill.config import assign
from flowdistill.device import resolve_device
from flowdistill.interrupt import stop
from flowdistill.ledger import Ledger
from flowdistill.lock import Lock
from flowdistill.report import fsp_log, log
from flowdistill.report.card import page
from flowdistill.report.study import Study
from flowdistill.runner.card import measure

SOURCE = Path(__file__).parents[1] / "src" / "flowdistill"
RUNS = "my runs #1@x 'y' \\z"
DATA = "npz:my data@ #1.npz"
SHORT = ("--epochs", "1", "--batch-size", "64", "--set", "data.pad=1", "--precision", "fp32")


def follow(folder: Path, said: str, pattern: str, *more: str) -> Said:
    """What the command does that a message advises; ``pattern`` finds it there."""
    found = re.search(pattern, said)
    assert found, said
    return command(folder, *as_shell_reads(found[1]), *more)


@pytest.fixture(scope="module")
def folder(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space, in it data with odd names, and a cut-off run beside a finished one."""
    folder = tmp_path_factory.mktemp("odd") / "a folder"
    folder.mkdir()
    (folder / DATA.removeprefix("npz:")).write_bytes(small_npz.read_bytes())
    taught = command(folder, "train", "--model", "resnet8", "--seeds", "100", "--dataset", DATA, *SHORT, "--runs", RUNS)
    assert taught.code == 0, taught.err
    return folder


# The words


@pytest.mark.parametrize(
    "word",
    [
        "plain",
        "a b",
        "#x",
        "a@b",
        "it's",
        '"',
        "$HOME",
        "`x`",
        "\\n",
        "a\nb",
        "\x1b[31m",
        "\udcff\x81",
        "'\udcff\\",
        "~x",
        "*",
        "é猫",
        "",
        "a\u202eb",
    ],
)
def test_a_shell_reads_back_every_word(word: str) -> None:
    line = advice.command("show", 1, word, runs=f"r {word}")
    assert line.isprintable(), "a message shows it as it is"
    assert as_shell_reads(line) == ["show", "1", word, "--runs", f"r {word}"]


def test_commands_leave_out_the_default_folder_of_runs() -> None:
    assert advice.resume(3, Path("runs")) == "flowdistill resume 3"
    assert advice.list_runs("x/runs") == "flowdistill runs --runs x/runs"


@pytest.mark.parametrize(
    "value", [True, 8, 0.5, [0.5, 0.75], "plain", "my data/#1", "true", "1e5", '"x"', " x ", "[1", "é\x1b", "a\udcff", "x\ny=1"]
)
def test_set_reads_back_every_value(value: Any) -> None:
    words = as_shell_reads(advice.train("resnet8", 1, {"name": "d e"}, {"a.b": value}, holdout=True, runs="runs"))
    assert words[:-1] == ["train", "--model", "resnet8", "--dataset", "d e", "--seeds", "1", "--holdout", "--set"]
    values: dict[str, Any] = {}
    assign(values, words[-1])
    assert values == {"a": {"b": value}}


# The messages


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (("show", "7", "--runs", RUNS), r"the last is \d+; (flowdistill .*) lists them"),
        (("resume", "--runs", RUNS), r"nothing was cut off; (flowdistill .*) lists all"),
        (("table", "--protocol", "holdout", "--runs", RUNS), r"these filters; (flowdistill .*) lists all"),
    ],
)
def test_runs_are_listed(folder: Path, words: tuple[str, ...], pattern: str) -> None:
    listed = follow(folder, command(folder, *words).err, pattern)
    assert listed.code == 0
    assert "resnet8" in listed.out


def test_an_unfinished_run_leads_to_the_list(folder: Path) -> None:
    diverged = ("--model", "resnet8", "--dataset", DATA, *SHORT, "--lr", "1e30", "--runs", "wild runs")
    assert command(folder, "train", *diverged).code == 1
    said = command(folder, "distill", "--teacher", "1", "--dataset", DATA, "--runs", "wild runs")
    assert "diverged" in follow(folder, said.err, r"choose a finished one \((flowdistill .*)\)").out


def test_a_stopped_run_is_resumed_by_the_advised_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    train = {"epochs": 2, "batch_size": 64, "precision": "fp32"}
    with pytest.raises(KeyboardInterrupt):
        flowdistill.train("resnet8", {"name": DATA, "pad": 1}, train=train, runs="cut off", on_epoch=stop)
    said = capsys.readouterr().err
    resumed = follow(folder, said, r"go on with: (flowdistill .*)\n")
    assert resumed.code == 0, resumed.err
    assert Ledger(Path("cut off")).run(1).status == "finished"


def test_the_demo_that_is_advised_without_a_ledger_makes_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEACHER", "STUDENT"):
        values = getattr(demo, name)
        monkeypatch.setattr(demo, name, values | {"student": "resnet8", "train": values["train"] | {"epochs": 1}})
    monkeypatch.setattr(demo, "STUDENT", demo.STUDENT | {"teacher": "resnet8"})
    monkeypatch.setattr(demo, "SEEDS", range(1))
    given = ("runs", "--runs", "new runs")
    said = command(folder, *given)
    assert said.code == 2
    made = follow(folder, said.err, r"train something first \((flowdistill .*)\), or")
    assert made.code == 0, made.err
    assert command(folder, *given).code == 0


@pytest.mark.parametrize("options", [(), ("--holdout", "--set", "data.limit_train=200", "--set", "data.root=my root/#1")])
def test_a_missing_teacher_is_trained(folder: Path, options: tuple[str, ...]) -> None:
    given = (
        "distill",
        "--method",
        "kd",
        "--student",
        "resnet8",
        "--teacher",
        "resnet14",
        "--dataset",
        DATA,
        *SHORT,
        *options,
        "--runs",
        RUNS,
    )
    said = command(folder, *given, "--dry-run")
    assert said.code == 2
    taught = follow(folder, said.err, r"yet; train one: (flowdistill .*)\n", *SHORT)
    assert taught.code == 0, taught.err
    assert command(folder, *given, "--dry-run").code == 0


def test_a_missing_teacher_of_image_files_is_trained(folder: Path) -> None:
    from PIL import Image

    chance = np.random.default_rng(0)
    for place in (f"{split}/{label}" for split in ("train", "test") for label in ("a cat", "#dog")):
        (folder / "my birds" / place).mkdir(parents=True)
        for number in range(8):
            pixels = chance.integers(0, 256, (12 + number, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "my birds" / place / f"{number}.png")
    (folder / "my birds" / "train" / "a cat" / "broken.png").write_text("no image")
    keys = ("data.size=8", "data.skip_broken=true", "data.channels=1", "data.stream=true", "data.crop=resized")
    options = [word for key in keys for word in ("--set", key)]
    short = ("--epochs", "1", "--batch-size", "8", "--precision", "fp32", "--workers", "0")
    given = ("distill", "--method", "kd", "--teacher", "resnet8", "--student", "resnet8", "--dataset", "folder:my birds", *options, *short)
    said = command(folder, *given, "--runs", RUNS, "--dry-run")
    assert follow(folder, said.err, r"yet; train one: (flowdistill .*)\n", *short).code == 0
    assert command(folder, *given, "--runs", RUNS, "--dry-run").code == 0


def test_a_student_alone_is_trained_for_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ("--holdout", "--set", "train.milestones=[0.25, 0.5]", "--set", "train.nesterov=true", "--set", "data.root=a root")
    words = ("--method", "kd", "--student", "resnet8", "--teacher", "1", "--dataset", DATA, *SHORT, *recipe, "--label-smoothing", "0.1")
    made = command(folder, "train", "--model", "resnet8", "--dataset", DATA, "--seeds", "9", *SHORT, *recipe, "--runs", "card runs")
    assert made.code == 0, made.err
    assert command(folder, "distill", *words, "--runs", "card runs").code == 0
    monkeypatch.chdir(folder)

    def card() -> Any:
        return measure(2, Ledger(Path("card runs")), resolve_device("cpu"), batch_size=2)

    text = page(card(), "md")
    done = follow(folder, text, r"recipe yet: `(flowdistill .*)`")
    assert done.code == 0, done.err
    assert [column.role for column in card().columns] == ["teacher", "student", "student alone"]
    compared = follow(folder, page(card(), "html").replace("&#x27;", "'"), r"compares methods: (flowdistill .*)</li>")
    assert "Mean +- sample std" in compared.out


def test_a_table_of_taps_is_written(folder: Path) -> None:
    (folder / "bad taps.csv").write_text("nothing")
    words = ("distill", "--student", "resnet8", "--teacher", "1", "--dataset", DATA, "--student-taps", "bad taps.csv", "--runs", RUNS)
    cure = re.search(r"write one with (flowdistill .*)\n", command(folder, *words).err)
    assert cure
    written = command(folder, *as_shell_reads(cure[1].replace("MODEL", "resnet8")))
    (folder / "bad taps.csv").write_text(written.out)
    assert command(folder, *words, "--dry-run", *SHORT).code == 0


@pytest.mark.parametrize("study", [log.STUDY, fsp_log.STUDY], ids=lambda study: study.name)
def test_the_reproduced_log_shows_its_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    monkeypatch.chdir(folder)
    ledger = Ledger(Path(RUNS))
    study.write(folder / "page", {}, ledger, advice.command("reproduce", study.name, "--epochs", 3, runs=ledger.folder))
    text = study.document(folder / "page").read_text()
    assert follow(folder, text.replace("NUMBER", "1"), r"config and curve\s+\(`(flowdistill .*)`\)").code == 0
    assert follow(folder, text, r"`(flowdistill reproduce .*?)` trained", "--help").code == 0


def test_other_advised_commands_exist(folder: Path) -> None:
    assert follow(folder, command(folder, "trian").err, r"\((flowdistill .*)\)").code == 0
    said = command(folder, "train", "--set", "teacher=1").err
    assert follow(folder, said, r"use (flowdistill .*), or", "--help").code == 0
    for name in ("models", "recipes", "taps"):
        more = ("--help",) if name == "taps" else ()
        helped = re.sub(r"\s+", " ", command(folder, "distill", "--help").out + command(folder, "train", "--help").out)
        assert follow(folder, helped, rf"(flowdistill {name})\b", *more).code == 0


def test_options_that_are_advised_are_quoted(folder: Path) -> None:
    weights = folder / "my weights #1.safetensors"
    weights.write_bytes((folder / RUNS / "1" / "student.safetensors").read_bytes())
    (folder / "three.npz").write_bytes((folder / DATA.removeprefix("npz:")).read_bytes())
    arrays = dict(np.load(folder / "three.npz"))
    np.savez(folder / "three.npz", **{key: value % 3 if key.startswith("y") else value for key, value in arrays.items()})
    given = ("--method", "kd", "--teacher", "resnet8", "--dataset", "npz:three.npz", *SHORT)
    said = command(folder, "distill", "--student", weights.name, *given, "--runs", RUNS)
    options = re.search(r"fresh classifier: (.*)\n", said.err)
    assert options, said.err
    shown = as_shell_reads(f"flowdistill {options[1]}")
    assert shown == ["--student", "resnet8", "--init-from", weights.name]
    assert command(folder, "train", *SHORT, "--dataset", "npz:three.npz", "--model", *shown[1:], "--runs", "three").code == 0


# One place


def advised(text: str) -> list[str]:
    """The strings of a module, less docstrings, that name a command."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node) is not None}  # type: ignore[attr-defined]
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if re.search(r"\bflowdistill [a-z-]", node.value)
    ]
    for joined in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
        for before, after in zip(joined.values, joined.values[1:], strict=False):
            if isinstance(before, ast.Constant) and before.value.endswith("flowdistill ") and ast.unparse(after.value) != "version()":  # type: ignore[attr-defined]
                found.append(ast.unparse(joined))
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_module_writes_a_command(path: Path) -> None:
    assert advised(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "raise UserError('no ledger; flowdistill demo makes one')",
        "say(f'go on with: flowdistill resume {no}')",
        "say(f'go on with: flowdistill {word}')",
        "say('see (flowdistill --help)')",
    ],
)
def test_a_command_in_a_message_is_seen(text: str) -> None:
    assert advised(text)


def test_docstrings_of_commands_name_no_command() -> None:
    """Their docstrings are printed."""
    assert not re.search(r"flowdistill [a-z-]", "\n".join(re.findall(r'"""(.*?)"""', (SOURCE / "cli.py").read_text(), re.DOTALL)))


# Ctrl-C


@pytest.mark.parametrize(
    "words", [("doctor", "--teacher", "1"), ("evaluate", "1"), ("card", "1"), ("export", "1", "--to", "safetensors"), ("table",)]
)
def test_ctrl_c_speaks_of_resume_only_where_a_run_was_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "run", stop)
    monkeypatch.setattr(Ledger, "runs", stop)
    monkeypatch.setattr(Ledger, "listing", stop)
    monkeypatch.setattr("os._exit", sys.exit)
    assert command(folder, *words, *(("--dataset", DATA) if words[0] == "doctor" else ()), "--runs", RUNS) == Said(130, "", "interrupted\n")


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path, seconds: float) -> None:
    words = [sys.executable, "-m", "flowdistill", "train", "--model", "resnet8", "--dataset", "digits"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted\n" or (tmp_path / "runs" / "ledger.db").is_file()
    assert "Traceback" not in err


def test_ctrl_c_in_an_import_ends_at_once_unless_a_run_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own code aborts the process where an exception comes while it begins."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    (tmp_path / "slow_library.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("flowdistill.interrupt.os._exit", leave)
    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(SystemExit, match="130"):
            importlib.import_module("slow_library")
        with Lock(tmp_path / ".lock"), pytest.raises(KeyboardInterrupt):
            importlib.import_module("slow_library")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_before_the_imports_the_handler_is_there(name: str) -> None:
    code = "import os, signal, sys; from flowdistill import __main__; sys.modules['flowdistill.cli'] = None\n"
    code += f"try: __main__.main()\nexcept ImportError: os.kill(os.getpid(), signal.{name})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_command_changes_nothing(name: str) -> None:
    code = "import atexit, os, signal, sys; from flowdistill import __main__; sys.argv = ['flowdistill', '--version']\n"
    code += f"atexit.register(lambda: os.kill(os.getpid(), signal.{name})); __main__.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_signal_while_a_mistake_is_told_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("flowdistill.cli.complain", interrupted)
    monkeypatch.setattr("os._exit", sys.exit)
    assert command(tmp_path, "show", "1") == Said(130, "", "")
