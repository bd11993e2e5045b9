"""No code runs that a received file names alone: not in its metadata, not in a ledger, not in a config."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.small import config
from safetensors import safe_open
from safetensors.torch import save_file

import flowdistill
from flowdistill import UserError, trust
from flowdistill.config import record_seal
from flowdistill.ledger import Ledger
from flowdistill.models.code import place_of
from flowdistill.models.foreign import _factory
from flowdistill.runner import run
from flowdistill.runner.evaluate import load_network

NET = """
import pathlib

import torch
from torch import nn

pathlib.Path(__file__).with_name("ran").touch()


class Tiny(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))
"""
CPU = torch.device("cpu")
SHORT = {"epochs": 1}
HOW = "read that code, then let it run with --trust-code (in Python trust_code=True)"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, small_npz: Path) -> Path:
    """A folder of the user's: nets.py, of which run 1 is, and run 2, which run 1 teaches and which was cut off."""
    work = tmp_path_factory.mktemp("own")
    (work / "nets.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv(trust.STATE, str(work / "state"))
        ledger = Ledger(Path("runs"), create=True)
        run([config(small_npz, student="nets.py:Tiny", method="base", train=SHORT)], ledger, CPU)
        ledger.close()
    return work


@pytest.fixture
def work(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What somebody else was given: the folder alone. A copy, in which no code ran yet."""
    shutil.copytree(own, tmp_path / "got")
    shutil.rmtree(tmp_path / "got" / "state")
    (tmp_path / "got" / "ran").unlink()
    monkeypatch.setenv(trust.STATE, str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path / "got")
    _factory.cache_clear()
    return tmp_path / "got"


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory, small_npz: Path) -> Path:
    """A run of a network of this package."""
    work = tmp_path_factory.mktemp("one")
    ledger = Ledger(work / "runs", create=True)
    run([config(small_npz, train=SHORT)], ledger, CPU)
    ledger.close()
    return work


@pytest.fixture
def plain(one_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(one_run, tmp_path / "plain")
    return tmp_path / "plain"


def renamed(path: Path, model: str) -> None:
    """A student's file that says another model."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["flowdistill"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(weights, path, {"format": "pt", "flowdistill": json.dumps(about | {"model": model})})


STUDENT = "runs/1/student.safetensors"
OF_FILE = [
    f"evaluate {STUDENT}",
    f"export {STUDENT} --to safetensors --out x.safetensors",
    f"taps {STUDENT}",
    f"distill --method kd --student resnet8 --teacher {STUDENT} --dataset digits",
    f"distill --method kd --student resnet8 --teacher {STUDENT} --dataset digits --dry-run",
    f"doctor --method kd --student resnet8 --teacher {STUDENT} --dataset digits",
    f"distill --method kd --student {STUDENT} --teacher resnet8 --dataset digits",
    f"train --model {STUDENT} --dataset digits",
    f"train --model resnet8 --init-from {STUDENT} --dataset digits",
]
OF_RUN = [words.replace(STUDENT, "1") for words in OF_FILE] + ["card 1"]


@pytest.mark.parametrize("words", OF_FILE)
@pytest.mark.parametrize("model", ["nets.py:Tiny", "os:abort", "http.server:test"])
def test_a_weights_file_runs_no_code(work: Path, words: str, model: str) -> None:
    renamed(work / STUDENT, model)
    said = command(work, *words.split())
    would = f"names code: {model} would run {place_of(model.partition(':')[0])}."
    why = f"This command does not name it, and no training of yours recorded it; {HOW}"
    if words.startswith("doctor"):
        assert said.code == 1
        assert f"wrong    weights file {STUDENT} {would} {why}" in said.out
    else:
        origin = f"weights file {STUDENT}{': it' if words.startswith(('evaluate', 'export')) else ''}"
        assert said == (2, "", f"flowdistill: {origin} {would} {why}\n")
    assert not (work / "ran").exists()


@pytest.mark.parametrize("words", OF_RUN)
def test_a_ledger_runs_no_code(work: Path, words: str) -> None:
    said = command(work, *words.split())
    told = said.out if words.startswith("doctor") else said.err
    assert said.code == (1 if words.startswith("doctor") else 2)
    (line,) = [line for line in told.splitlines() if "names code: nets.py:Tiny would run" in line]
    assert STUDENT in line or "run 1 of runs/ledger.db" in line
    assert not (work / "ran").exists()


@pytest.mark.parametrize("key", ["student", "teacher", "init_from", "peer"])
@pytest.mark.parametrize("kind", ["toml", "run.json"])
def test_a_config_runs_no_code(work: Path, key: str, kind: str) -> None:
    values: dict[str, Any] = {"student": "resnet8", "data": {"name": "digits"}}
    values |= {"method": {"teacher": "kd", "peer": "dml"}.get(key, "base"), key: "nets.py:Tiny"}
    if kind == "toml":
        tables = "".join(f"\n[{name}]\nname = 'digits'" for name in ["data"])
        text = "\n".join(f"{name} = '{value}'" for name, value in values.items() if name != "data") + tables
    else:
        record = {"config": values, "files": {}}
        text = json.dumps(record | {"seal": record_seal(record)})
    (work / "c.txt").write_text(text)
    for further in ([], ["--dry-run"]):
        said = command(work, "distill", "--config", "c.txt", "--runs", "mine", *(["--method", values["method"]]), *further)
        assert said.code == 2
        assert said.err.startswith("flowdistill: --config c.txt names code: nets.py:Tiny would run "), said.err
    assert not (work / "ran").exists()


def test_a_config_with_several_teachers_runs_no_code(work: Path) -> None:
    (work / "c.toml").write_text(f'student = "resnet8"\nteacher = "nets.py:Tiny@{STUDENT}+resnet8@none.pt"\ndata.name = "digits"')
    said = command(work, "distill", "--config", "c.toml", "--runs", "mine", "--method", "kd")
    assert said.err.startswith("flowdistill: --config c.toml names code: nets.py:Tiny would run "), said.err
    assert not (work / "ran").exists()


def test_a_run_that_was_cut_off_runs_no_code_when_it_is_resumed(work: Path) -> None:
    with sqlite3.connect("runs/ledger.db") as db:
        db.execute("UPDATE runs SET status = 'interrupted'")
    for word in ("resume", "resume 1"):
        said = command(work, *word.split())
        assert said.code == 2
        assert said.err.startswith("flowdistill: run 1 of runs/ledger.db names code: nets.py:Tiny would run "), said.err
    assert not (work / "ran").exists()


def test_a_file_is_not_even_opened_where_no_training_recorded_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading could do harm: a file may take a parser hours."""
    monkeypatch.setattr("flowdistill.models.foreign.own_modules", lambda _: pytest.fail("it was read"))
    assert "names code" in command(work, "evaluate", STUDENT).err


@pytest.mark.parametrize("words", ["evaluate 1", f"evaluate {STUDENT}", "taps 1", "export 1 --to safetensors --out x.safetensors"])
def test_code_runs_where_the_user_says_so(work: Path, words: str) -> None:
    said = command(work, *words.split(), "--trust-code")
    assert said.code == 0, said.err
    assert (work / "ran").exists()
    assert not trust._everything, "that was for one command"


def test_code_runs_that_the_command_names(work: Path) -> None:
    given = ["distill", "--method", "kd", "--student", "nets.py:Tiny", "--teacher", "1", "--dry-run", "--epochs", "1", "--seeds", "3"]
    data = json.loads((work / "runs/1/run.json").read_bytes())["config"]["data"]["name"]
    said = command(work, *given, "--dataset", data)
    assert said.code == 0, said.err
    trust._named.clear()
    assert command(work, "taps", f"nets.py:Tiny@{STUDENT}").code == 0
    for named in (f"nets.py:Tiny@{STUDENT}+resnet8@none.pt", f"nets.py:Tiny@{STUDENT},resnet8@none.pt"):
        trust._named.clear()
        said = command(work, "distill", "--method", "kd", "--student", "resnet8", "--teacher", named, "--dataset", data)
        assert said.err == "flowdistill: weights file none.pt: no such file\n", "the code may run, and the next teacher is looked for"
    trust._named.clear()
    assert command(work, "evaluate", "1").code == 2, "that was for those commands"


def test_what_the_users_own_training_recorded_runs_until_it_changes(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(trust.STATE, str(own / "state"))
    (line,) = [json.loads(line) for line in (own / "state" / trust.FILE).read_text().splitlines()]
    assert (line["ledger"], line["model"], line["place"]) == (str(own / "runs"), "nets.py:Tiny", str(own / "nets.py"))
    assert line["code"].keys() == {"nets.py"}
    assert command(own, "evaluate", "1").code == 0
    shutil.copy(own / STUDENT, tmp_path / "elsewhere.safetensors")
    assert command(own, "evaluate", str(tmp_path / "elsewhere.safetensors")).code == 0, "equal code in that place"
    shutil.copy(own / "nets.py", tmp_path)
    said = command(tmp_path, "evaluate", "elsewhere.safetensors")
    assert "no training of yours recorded it" in said.err, "equal code in another place, which may read other files"
    shutil.copytree(own / "runs", tmp_path / "runs")
    (tmp_path / "nets.py").write_text(NET + "# changed\n")
    shutil.copytree(own / "state", tmp_path / "state")
    moved = (tmp_path / "state" / trust.FILE).read_text().replace(str(own), str(tmp_path))
    (tmp_path / "state" / trust.FILE).write_text(moved)
    monkeypatch.setenv(trust.STATE, str(tmp_path / "state"))
    said = command(tmp_path, "evaluate", "1")
    assert "This command does not name it, and it changed since a training of yours recorded it" in said.err
    assert command(tmp_path, "evaluate", "1", "--trust-code").code == 0, "it answers as it did"


def test_a_record_that_others_may_write_vouches_for_nothing(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(own / "state", tmp_path / "state")
    monkeypatch.setenv(trust.STATE, str(tmp_path / "state"))
    monkeypatch.chdir(own)
    record = tmp_path / "state" / trust.FILE
    assert record.stat().st_mode & 0o777 == 0o600
    record.write_text("\nnull\n[]\n{\n" + record.read_text() + '{"ledger": 1')
    load_network(Path(STUDENT))
    record.chmod(0o666)
    with pytest.raises(UserError, match="names code"):
        load_network(Path(STUDENT))
    record.chmod(0o600)
    if os.getuid() == 0:
        os.chown(record, 1, 1)
        with pytest.raises(UserError, match="names code"):
            load_network(Path(STUDENT))


def test_without_a_state_folder_training_goes_on_and_the_line_says_why(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trust.STATE)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    data = json.loads((work / "runs/1/run.json").read_bytes())["config"]["data"]["name"]
    said = command(work, "train", "--model", "nets.py:Tiny", "--dataset", data, "--epochs", "1", "--runs", "mine")
    assert said.code == 0, said.err
    trust._named.clear()
    said = command(work, "evaluate", "1", "--runs", "mine")
    assert "(there is no state folder for such records here; FLOWDISTILL_STATE names one); read that code" in said.err


def test_a_state_folder_that_cannot_be_written_is_told_and_ends_no_training(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "file").touch()
    monkeypatch.setenv(trust.STATE, str(work / "file" / "state"))
    data = json.loads((work / "runs/1/run.json").read_bytes())["config"]["data"]["name"]
    said = command(work, "train", "--model", "nets.py:Tiny", "--dataset", data, "--epochs", "1", "--runs", "mine")
    assert said.code == 0
    assert f"{work}/file/state: Not a directory; a later command that uses these runs needs --trust-code" in said.err


@pytest.mark.parametrize(
    ("given", "home", "folder"),
    [
        ({trust.STATE: "/a"}, "/h", "/a"),
        ({trust.STATE: "", "XDG_STATE_HOME": "/x"}, "/h", "/x/flowdistill"),
        ({"XDG_STATE_HOME": "relative"}, "/h", "/h/.local/state/flowdistill"),
        ({}, "/h", "/h/.local/state/flowdistill"),
    ],
)
def test_where_the_records_lie(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], home: str, folder: str) -> None:
    for name in (trust.STATE, "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, "HOME": home}.items():
        monkeypatch.setenv(name, value)
    assert trust.state_folder() == Path(folder)


def test_python_functions_refuse_untrusted_code_too(work: Path) -> None:
    data = json.loads((work / "runs/1/run.json").read_bytes())["config"]["data"]["name"]
    train: dict[str, Any] = {"epochs": 1, "batch_size": 64, "precision": "fp32"}
    with pytest.raises(UserError, match=r"names code: nets\.py:Tiny would run"):
        flowdistill.distill(STUDENT, "resnet8", data, method="kd", train=train, progress=False)
    assert not (work / "ran").exists()
    taught = flowdistill.distill(STUDENT, "resnet8", data, method="kd", train=train, progress=False, trust_code=True)
    assert taught.run.status == "finished"
    assert not trust._everything
    trust._named.clear()
    own_net = flowdistill.train("nets.py:Tiny", data, train=train, progress=False, seed=5)
    assert own_net.student().spec.name == "nets.py:Tiny", "this program named it"


METADATA: dict[str, Any] = {
    "nothing": None,
    "no model": {},
    "a list": {"model": ["resnet8"]},
    "a number": {"model": 7},
    "null": {"model": None},
    "no table of the network": {"network": "x"},
    "another table": {"network": {"code": 5, "answers": 7, "versions": [1]}},
    "an empty answer": {"network": {"code": {}, "answers": {"eval logits": []}, "versions": {}}},
}


@pytest.mark.parametrize("kind", METADATA)
def test_odd_metadata_are_one_line(plain: Path, kind: str) -> None:
    """A student's file in a ledger of anybody's, whose weights are those that the ledger knows."""
    with safe_open(plain / STUDENT, "pt") as file:
        about = json.loads(file.metadata()["flowdistill"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    given = METADATA[kind]
    told = {} if given is None else {"flowdistill": json.dumps(about | given if given else given)}
    save_file(weights, plain / STUDENT, {"format": "pt", **told})
    with sqlite3.connect(plain / "runs/ledger.db") as db:
        db.execute("UPDATE runs SET record_hash = NULL")
    for words in ("evaluate 1", "taps 1", "card 1", "distill --method kd --student resnet8 --teacher 1 --dataset digits --dry-run"):
        said = command(plain, *words.split())
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1), said


def test_networks_of_libraries_are_no_code(work: Path) -> None:
    """Which networks timm and torchvision have is theirs to say; nothing else of them can be named so."""
    for name in ("timm:resnet18", "torchvision:resnet18"):
        assert command(work, "taps", name, "--size", "32").code == 0
    renamed(work / STUDENT, "timm:os.abort")
    assert "unknown model 'timm:os.abort'" in command(work, "evaluate", STUDENT).err
