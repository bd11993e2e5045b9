"""Files of runs: one flipped bit, a file that is gone, an export beside them, a ledger and files that version 0.1.0 wrote."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.command import command
from helpers.networks import NET
from helpers.small import Interrupt, config

from flowdistill.checks import Changes, UserError
from flowdistill.config import read_file, validate
from flowdistill.ledger import Ledger
from flowdistill.runner import resume, run
from flowdistill.runner.evaluate import evaluate
from flowdistill.runner.integrity import enlist, examine, meet_damage
from flowdistill.runner.watcher import Watcher
from flowdistill.training import checkpoint
from flowdistill.training.weights import load_weights, save_weights

CPU = torch.device("cpu")
FLIPS = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_npz: Path) -> Path:
    """Run 1 finished, run 2 was cut off after its first epoch."""
    work = tmp_path_factory.mktemp("made")
    (work / "nets.py").write_text(NET)
    ledger = Ledger(work / "runs", create=True)
    tiny = f"{work}/nets.py:Tiny"
    run([config(small_npz, student=tiny, method="base")], ledger, CPU)
    with pytest.raises(KeyboardInterrupt):
        run([config(small_npz, student=tiny, teacher="1", method="kd", seed=1)], ledger, CPU, watcher=Interrupt())
    ledger.close()
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    return tmp_path


def flips(path: Path) -> Iterator[int]:
    """The file with one bit flipped, 300 times at places that a generator chose; whole again after."""
    whole, chosen = path.read_bytes(), random.Random(path.name)
    for _ in range(FLIPS):
        place, bit = chosen.randrange(len(whole)), chosen.randrange(8)
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << bit
        path.write_bytes(spoilt)
        yield place
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["student.safetensors", "run.json", "predictions.npz"])
def test_no_flipped_bit_of_a_runs_file_is_silent(work: Path, name: str) -> None:
    ledger = Ledger(work / "runs")
    run_ = ledger.run(1)
    assert all(found.verdict == "as written" for found in examine(run_, ledger))
    for place in flips(work / "runs/1" / name):
        assert [found.file for found in examine(run_, ledger) if found.verdict == "changed"] == [name], f"byte {place}"
        if name != "predictions.npz":  # which nothing is made of
            with pytest.raises(
                UserError, match=rf"^run 1: {name} is not the file that it wrote \(.*; put a sound copy there, train it again"
            ):
                meet_damage(run_, ledger)
    ledger.close()


def test_no_flipped_bit_of_a_record_is_taken_for_a_config(work: Path) -> None:
    """Of a record that says the same, as where a flip falls into a blank, nothing is lost."""
    path = work / "runs/1/run.json"
    whole, refused = read_file(path), 0
    for place in flips(path):
        try:
            assert read_file(path) == whole, f"byte {place}"
        except UserError:
            refused += 1
    assert refused > FLIPS / 2


def test_no_flipped_bit_of_a_file_alone_is_silent(work: Path) -> None:
    """Moved out of its ledger, it is held against itself."""
    path = work / "runs/1/student.safetensors"
    load_weights(path)
    for place in flips(path):
        with pytest.raises(UserError, match=r"not what was written into it|not a valid safetensors file|cannot be read"):
            load_weights(path)
        assert place >= 0


def test_no_flipped_bit_of_a_checkpoint_is_silent(work: Path) -> None:
    """Nor of its metadata, which say how many epochs are done."""
    folder = work / "runs/2"
    saved = checkpoint.load(folder)
    assert saved is not None
    assert (saved.damage, saved.done) == ("", 1)
    for place in flips(folder / checkpoint.FILE):
        spoilt = checkpoint.load(folder)
        assert spoilt is not None
        assert spoilt.damage, f"byte {place}"
        assert spoilt.done == 0


def test_a_seal_can_not_be_taken_away_by_one_change(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, {"w": torch.zeros(2)}, {"model": "resnet8"})
    whole = path.read_bytes()
    for key in (b'"sha256"', b'"sealed"'):
        path.write_bytes(whole.replace(key, key.swapcase()))
        with pytest.raises(UserError, match="not what was written into it"):
            load_weights(path)


@pytest.mark.parametrize(
    "words", [["evaluate", "1"], ["export", "1", "--to", "safetensors"], ["card", "1"], ["distill", "--method", "kd", "--teacher", "1"]]
)
def test_a_spoilt_student_is_used_by_nothing_unless_that_is_accepted(made: Path, work: Path, small_npz: Path, words: list[str]) -> None:
    shutil.copy(made / "nets.py", work)
    path = work / "runs/1/student.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-3] ^= 1 << 6  # of the last value
    path.write_bytes(spoilt)
    more = (
        ["--student", f"{made}/nets.py:Tiny", "--dataset", f"npz:{small_npz}", "--epochs", "1", "--seeds", "2"]
        if words[0] == "distill"
        else []
    )
    said = command(work, *words, *more)
    assert (said.code, said.out) == (2, "")
    assert "run 1: student.safetensors is not the file that it wrote (" in said.err
    assert "or take it as it is with --accept-changes" in said.err
    said = command(work, *words, *more, "--accept-changes")
    assert said.code == 0, said.err
    assert "taken as it is: run 1: student.safetensors is not the file that it wrote" in said.err


def test_a_teacher_that_was_accepted_is_another_one(made: Path, work: Path, small_npz: Path) -> None:
    wanted = [config(small_npz, student=f"{made}/nets.py:Tiny", teacher="1", method="kd", seed=2)]
    ledger = Ledger(work / "runs")
    sound = run(wanted, ledger, CPU)[0]
    path = work / "runs/1/student.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-3] ^= 1 << 6
    path.write_bytes(spoilt)
    accepting = Ledger(work / "runs", changes=Changes(True))
    taught = run(wanted, accepting, CPU)[0]
    assert taught.no != sound.no
    assert taught.fingerprint != sound.fingerprint
    assert taught.teacher_fingerprint != sound.teacher_fingerprint
    ledger.close()
    accepting.close()


@pytest.mark.parametrize("gone", ["student.safetensors", "run.json", "predictions.npz"])
def test_a_finished_run_whose_files_are_gone_is_trained_anew(made: Path, tmp_path: Path, small_npz: Path, gone: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(made / "runs", folder, dirs_exist_ok=True)
    (folder / "1" / gone).unlink()
    lines: list[str] = []

    class Listening(Watcher):
        def say(self, line: str) -> None:
            lines.append(line)

    ledger = Ledger(folder)
    found = run([config(small_npz, student=f"{made}/nets.py:Tiny", method="base")], ledger, CPU, watcher=Listening())[0]
    assert (found.no, found.weights_hash) == (3, ledger.run(1).weights_hash)
    assert f"run 1 finished, but its {gone} is gone: trained anew" in lines
    ledger.close()


def test_check_tells_of_every_file_and_ends_with_1_where_one_changed(work: Path) -> None:
    said = command(work, "check", "--format", "json")
    rows = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    assert [(row["run"], row["file"], row["verdict"]) for row in rows] == [
        (1, "run.json", "as written"),
        (1, "student.safetensors", "as written"),
        (1, "predictions.npz", "as written"),
        (1, "journal.jsonl", "as written"),
        (2, "checkpoint.safetensors", "as written"),
    ]
    (work / "runs/1/predictions.npz").write_bytes(b"")
    said = command(work, "check", "1", "--format", "json")
    assert said.code == 1
    assert [row["verdict"] for row in json.loads(said.out)] == ["as written", "as written", "changed", "as written"]
    assert command(work, "check", "2").code == 0


def test_an_export_is_entered_and_checked(made: Path, work: Path) -> None:
    shutil.copy(made / "nets.py", work)
    assert command(work, "export", "1", "--to", "safetensors").code == 0
    ledger = Ledger(work / "runs")
    names = [found.file for found in examine(ledger.run(1), ledger)]
    own = ["student.safetensors", "predictions.npz", "journal.jsonl"]
    assert names == ["run.json", "exports.json", *own, "student.export.safetensors"]
    exported = work / "runs/1/student.export.safetensors"
    exported.write_bytes(exported.read_bytes()[:-1])
    assert command(work, "check", "1").code == 1
    exported.unlink()
    assert [found.verdict for found in examine(ledger.run(1), ledger)][-1] == "gone"
    assert command(work, "evaluate", "1").code == 0, "what was made of the student does not touch it"
    ledger.close()


def test_an_export_is_not_entered_into_a_list_that_changed(work: Path) -> None:
    ledger = Ledger(work / "runs")
    file, exports = work / "runs/1/a.onnx", work / "runs/1/exports.json"
    for content in (b"a", b"b"):
        file.write_bytes(content)
        enlist(1, ledger, file)
        assert [found.verdict for found in examine(ledger.run(1), ledger)][-1] == "as written"
    exports.write_text(exports.read_text().replace('"size": 1', '"size": 2'))
    assert ("exports.json", "changed") in {(found.file, found.verdict) for found in examine(ledger.run(1), ledger)}
    with pytest.raises(
        UserError, match=r"^run 1: exports.json is not the file that was written, so a.onnx was written and not entered there$"
    ):
        enlist(1, ledger, file)
    ledger.close()


def test_a_resumed_run_is_not_taught_by_a_spoilt_teacher(work: Path) -> None:
    path = work / "runs/1/student.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-3] ^= 1 << 6
    path.write_bytes(spoilt)
    said = command(work, "resume", "2")
    assert said.code == 2
    assert "run 1: student.safetensors is not the file that it wrote" in said.err
    assert "--accept-changes" not in said.err, "it would be another run under the old one's name"


def test_the_verdict_says_what_differs(made: Path, work: Path) -> None:
    path = work / "runs/1/student.safetensors"
    assert evaluate(path, CPU).verdict == "as recorded"
    weights, about = load_weights(path)
    other = work / "other.safetensors"
    save_weights(other, weights, {**about, "correct": about["correct"] + 3, "device": "cuda (a card)", "processor": "a chip"})
    found = evaluate(other, CPU)
    assert found.verdict.startswith(f"differs by {found.accuracy - found.recorded:+.2f} points (another device: cpu")
    assert "another processor: " in found.verdict
    save_weights(other, weights, {**about, "correct": about["correct"] + 3})
    assert evaluate(other, CPU).verdict.endswith("points (for no reason that is on record)")
    assert evaluate(other, CPU, precision="bf16").verdict.endswith("points (bf16, was fp32)")


# What version 0.1.0 wrote, at 6ed4590: make.py in the archive says how


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_code: None) -> Path:
    with tarfile.open(Path(__file__).parent / "ledgers/6ed4590.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_former_ledger_is_listed_tabulated_and_checked(former: Path) -> None:
    assert command(former, "runs").code == command(former, "show", "3").code == 0
    said = command(former, "table", "--summary", "--format", "csv")
    assert said.code == 0
    assert len(said.out.splitlines()) == 1 + 4  # a row a group
    said = command(former, "check", "--format", "json")
    assert said.code == 0
    verdicts = {(row["run"], row["file"]): row["verdict"] for row in json.loads(said.out)}
    assert verdicts[2, "student.safetensors"] == verdicts[2, "run.json"] == "not verified"
    assert verdicts[6, "checkpoint.safetensors"] == "as written", "its weights had a hash"


def test_a_former_run_is_found_measured_and_teaches(former: Path) -> None:
    ledger = Ledger(former / "runs")
    train = {"epochs": 2, "batch_size": 64, "precision": "fp32"}
    wanted = {"student": "resnet8", "teacher": "resnet8", "data": {"name": "digits"}, "train": train, "method": "kd"}
    assert run([validate(wanted)], ledger, CPU)[0].no == 3
    said = command(former, "evaluate", "3", "--format", "json")
    assert said.code == 0
    assert json.loads(said.out)[0]["verdict"].startswith(("as recorded (its code and answers are not verified", "differs by"))
    taught = run([validate(wanted | {"student": "nets.py:Tiny", "teacher": "2"})], ledger, CPU)[0]
    assert (taught.status, taught.teacher_run) == ("finished", 2)
    ledger.close()


def test_a_former_student_whose_weights_changed_is_refused(former: Path) -> None:
    """The ledger knows the hash of its weights."""
    path = former / "runs/2/student.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-2] ^= 1 << 3
    path.write_bytes(spoilt)
    said = command(former, "evaluate", "2")
    assert said.code == 2
    assert "run 2: student.safetensors is not the file that it wrote (weights " in said.err


@pytest.mark.parametrize("no", [5, 6])
def test_a_former_run_goes_on(former: Path, no: int) -> None:
    ledger = Ledger(former / "runs")
    found = resume(ledger, CPU, no=no)[0]
    assert (found.no, found.status, found.epoch, found.resumed) == (no, "finished", 2, 1)
    assert all(one.verdict == "as written" for one in examine(found, ledger))
    ledger.close()


def test_a_former_run_whose_file_changed_does_not_go_on(former: Path) -> None:
    (former / "nets.py").write_text((former / "nets.py").read_text().replace("torch.relu", "torch.tanh"))
    ledger = Ledger(former / "runs")
    with pytest.raises(UserError, match="run 5 can't be resumed"):
        resume(ledger, CPU, no=5)
    ledger.close()
