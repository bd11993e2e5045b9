"""Ledgers that are joined: equal runs once, new numbers everywhere, and a contradiction refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import command
from helpers.interruptions import cut_off, outcome
from helpers.rows import row
from helpers.small import config

from flowdistill import UserError
from flowdistill.ledger import RECORD, Epoch, Ledger, merge, sealed
from flowdistill.ledger.rebuild import rebuild
from flowdistill.runner import resume, run
from flowdistill.runner.integrity import examine

CPU = torch.device("cpu")


def rows_of(folder: Path, *rows: dict[str, Any], epochs: int = 2) -> Path:
    """A ledger of made-up finished runs with short curves, without files."""
    ledger = Ledger(folder, create=True)
    for values in rows:
        (no,) = ledger.register([values])
        for epoch in range(1, epochs + 1):
            ledger.add_epochs({no: Epoch(epoch, "task", 0.1, {"task": 1 / epoch}, 9000 + epoch, 10_000, 3.0)})
        ledger.update(no, status=values["status"])
    ledger.close()
    return folder


def folders_say_what_the_ledger_says(folder: Path) -> bool:
    """Whether a ledger made again from the folders alone has the same rows and curves."""

    def contents() -> list[Any]:
        ledger = Ledger(folder)
        found = [(run_, ledger.epochs(run_.no)) for run_ in ledger.runs()]
        ledger.close()
        return found

    before = contents()
    (folder / "ledger.db").rename(folder / "ledger.db.away")
    rebuild(folder)
    return contents() == before


@pytest.fixture(scope="module")
def trained(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of two teachers and two students, of which the second is taught by run 1, named by its number."""
    folder = tmp_path_factory.mktemp("trained") / "runs"
    ledger = Ledger(folder, create=True)
    run([config(small_npz, method="base", seed=seed) for seed in (0, 1)], ledger, CPU)
    run([config(small_npz, method="kd", teacher="resnet8", seed=0)], ledger, CPU)
    run([config(small_npz, method="kd", teacher="1", seed=2, init_from="2")], ledger, CPU)
    ledger.close()
    return folder


def test_runs_get_new_numbers_wherever_a_number_stands(trained: Path, tmp_path: Path) -> None:
    into = rows_of(tmp_path / "into", row(seed=50), row(seed=51), row(seed=52))
    merged = merge.merge([trained], into)
    assert [(entry.run, entry.into, entry.remark) for entry in merged] == [(no, no + 3, "") for no in (1, 2, 3, 4)]
    ledger, source = Ledger(into), Ledger(trained)
    moved = ledger.run(7)
    assert (moved.teacher_run, moved.config["teacher"], moved.config["init_from"], moved.variant) == (4, "4", "5", "init=run 5")
    assert moved.versions["origin"] == f"run 4 of {trained}"
    assert [finding for no in range(4, 8) for finding in examine(ledger.run(no), ledger) if not finding.sound] == []
    assert sealed(into / "7" / RECORD)["no"] == 7  # type: ignore[index]
    for no in (1, 2, 3, 4):
        assert outcome(ledger.run(no + 3), ledger) == outcome(source.run(no), source)
    ledger.close()
    assert folders_say_what_the_ledger_says(into)


def test_a_merged_teacher_teaches_and_its_merged_students_are_not_trained_again(trained: Path, small_npz: Path, tmp_path: Path) -> None:
    into = rows_of(tmp_path / "into", row(seed=50))
    merge.merge([trained], into)
    ledger = Ledger(into)
    (known,) = run([config(small_npz, method="kd", teacher="2", seed=2, init_from="3")], ledger, CPU)
    assert known.no == 5
    (fresh,) = run([config(small_npz, method="at", teacher="resnet8", seed=0)], ledger, CPU)
    assert fresh.teacher_run == 3  # base seed 1, which is run 2 where it was trained


def test_equal_runs_are_taken_once_and_a_second_merge_changes_nothing(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    into = tmp_path / "into"
    merged = merge.merge([trained, copy], into)
    assert [entry.into for entry in merged] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert {entry.remark for entry in merged[4:]} == {"is here already"}
    before = {path: path.read_bytes() for path in into.rglob("*") if path.is_file() and "ledger.db" not in path.name}
    assert all(entry.remark == "is here already" for entry in merge.merge([copy], into))
    assert {path: path.read_bytes() for path in into.rglob("*") if path.is_file() and "ledger.db" not in path.name} == before
    assert not [path.name for path in into.iterdir() if path.name.startswith(".merge")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"correct": 9199}, "correct 9199 and 9200"), ({"weights_hash": "f" * 64}, r"weights ffffffff and \w{8}"), ({}, "their curves")],
    ids=["accuracy", "weights", "curve"],
)
@pytest.mark.parametrize("started", ["2021-09-01T08:10:43", "2022-01-01T00:00:00"], ids=["one run", "trained twice"])
def test_a_run_with_two_results_is_refused_and_nothing_is_copied(tmp_path: Path, changes: dict[str, Any], told: str, started: str) -> None:
    into = rows_of(tmp_path / "into", row(seed=1))
    other = rows_of(tmp_path / "other", row(seed=7), row(seed=1, started=started, **changes), epochs=2 if changes else 3)
    with pytest.raises(UserError, match=rf"run 2 in .*other and run 1 in .*into are the same run with different results \({told}\); leave"):
        merge.merge([other], into)
    assert [run_.seed for run_ in Ledger(into).runs()] == [1]
    assert sorted(path.name for path in into.iterdir() if path.is_dir()) == ["1"]


def test_a_teacher_that_is_not_copied_is_named_by_its_file_and_never_by_a_number_of_another_run(tmp_path: Path) -> None:
    into = rows_of(tmp_path / "into", row(seed=50))
    other = rows_of(tmp_path / "other", row(seed=1, teacher_run=1, config={"teacher": "1"}))
    ledger = Ledger(other)
    ledger._db.execute('UPDATE runs SET teacher_run = 9, config = replace(config, \'"teacher": "1"\', \'"teacher": "9"\')')
    ledger.close()
    merge.merge([other], into)
    moved = Ledger(into).run(2)
    assert (moved.teacher_run, moved.config["teacher"]) == (None, str(other / "9" / "student.safetensors"))


def test_a_ledger_that_repeats_a_run_beside_the_known_result_adds_the_repetition(tmp_path: Path) -> None:
    into = rows_of(tmp_path / "into", row(seed=1))
    other = rows_of(tmp_path / "other", row(seed=1), row(seed=1, correct=9100, started="2022-01-01T00:00:00"))
    assert [(entry.into, entry.remark) for entry in merge.merge([other], into)] == [(1, "is here already"), (2, "")]


def test_what_was_cut_off_goes_on_after_the_merge_bit_for_bit(small_npz: Path, tmp_path: Path) -> None:
    configs = [config(small_npz, method="base", seed=seed, train={"epochs": 3}) for seed in (0, 1)]
    straight = Ledger(tmp_path / "straight", create=True)
    wanted = [outcome(run_, straight) for run_ in run(configs, straight, CPU)]
    part = Ledger(tmp_path / "part", create=True)
    cut_off(configs, part, 6)
    part.close()
    into = rows_of(tmp_path / "into", row(seed=50))
    merge.merge([tmp_path / "part"], into)
    ledger = Ledger(into)
    assert [(run_.no, run_.status, run_.cohort) for run_ in ledger.runs()][1:] == [(2, "interrupted", 2), (3, "interrupted", 2)]
    assert [outcome(run_, ledger) for run_ in resume(ledger, CPU)] == wanted


def test_a_run_that_went_on_elsewhere_takes_the_place_of_what_was_merged_before(small_npz: Path, tmp_path: Path) -> None:
    configs = [config(small_npz, method="base", train={"epochs": 3})]
    part, into = Ledger(tmp_path / "part", create=True), tmp_path / "into"
    cut_off(configs, part, 6)
    merge.merge([tmp_path / "part"], into)
    resume(part, CPU)
    (entry,) = merge.merge([tmp_path / "part"], into)
    assert (entry.into, entry.remark) == (1, "takes the place of what was here, at epoch 1")
    ledger = Ledger(into)
    assert outcome(ledger.run(1), ledger) == outcome(part.run(1), part)
    assert not list((into / "1").glob("checkpoint*"))
    ledger.close()
    assert folders_say_what_the_ledger_says(into)


def test_what_another_run_finished_is_left_out_in_either_order(small_npz: Path, tmp_path: Path) -> None:
    configs = [config(small_npz, method="base", train={"epochs": 3})]
    cut, whole = Ledger(tmp_path / "cut", create=True), Ledger(tmp_path / "whole", create=True)
    cut_off(configs, cut, 6)
    run(configs, whole, CPU)
    for number, order in enumerate((("cut", "whole"), ("whole", "cut"))):
        merged = merge.merge([tmp_path / name for name in order], tmp_path / f"into{number}")
        assert {(Path(entry.source).name, entry.into, entry.remark) for entry in merged} == {
            ("cut", None, "was cut off, and another run finished it"),
            ("whole", 1, ""),
        }


def broken_record(folder: Path) -> str:
    record = folder / "1" / RECORD
    record.write_text(record.read_text().replace('"seed": 0', '"seed": 9'))
    return f"{record} is not what run 1 in {folder} wrote; leave one"


def damaged_row(folder: Path) -> str:
    ledger = Ledger(folder)
    ledger._db.execute("UPDATE runs SET config = 'no' WHERE no = 2")
    ledger.close()
    return f"run 2 in {folder} is damaged (config: 'no' is not a JSON object); mend it first: flowdistill ledger rebuild --runs {folder}"


def lost_row(folder: Path) -> str:
    ledger = Ledger(folder)
    ledger._db.execute("DELETE FROM epochs WHERE run = 4")
    ledger._db.execute("DELETE FROM runs WHERE no = 4")
    ledger.close()
    return f"{folder / '4'} is the folder of a run that its ledger lacks; enter it first: flowdistill ledger rebuild --runs {folder}"


@pytest.mark.parametrize("spoil", [broken_record, damaged_row, lost_row], ids=lambda spoil: spoil.__name__)
def test_a_source_that_is_not_whole_is_refused_and_nothing_is_entered(trained: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    shutil.copytree(trained, source)
    why = spoil(source)
    said = command(tmp_path, "ledger", "merge", str(source), "--into", str(into))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"flowdistill: {why}")
    assert not list(into.glob("*/*"))


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_merge_that_is_killed_leaves_nothing_that_the_next_does_not_mend(trained: Path, tmp_path: Path, moment: int) -> None:
    """Killed as the last folder is prepared, and before each of the four folders is put in its place."""
    into = rows_of(tmp_path / "into", row(seed=50))
    child = os.fork()
    if not child:
        left, rename = [moment], Path.rename

        def killed(self: Path, target: Path) -> Path:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            if moment == 5:
                patch.setattr(merge, "_carry_checkpoint", lambda entry, *_: entry.run.no == 4 and os.kill(os.getpid(), signal.SIGKILL))
            merge.merge([trained], into)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in into.iterdir() if path.name.startswith(".merge-")], "it was killed before it could tidy up"
    said = command(tmp_path, "ledger", "merge", str(trained), "--into", str(into))
    if 2 <= moment <= 4:  # a folder is in its place, and its row is not: nothing is lost, and one line says what to do
        cure = f"enter it first: flowdistill ledger rebuild --runs {into}"
        assert said.err == f"flowdistill: {into / '2'} is the folder of a run that its ledger lacks; {cure}\n"
        assert command(tmp_path, "ledger", "rebuild", "--runs", str(into)).code == 0
        said = command(tmp_path, "ledger", "merge", str(trained), "--into", str(into))
    assert said.code == 0
    ledger = Ledger(into)
    assert sorted((run_.method, run_.seed) for run_ in ledger.runs()) == [("base", 0), ("base", 1), ("fsp", 50), ("kd", 0), ("kd", 2)]
    assert [finding for run_ in ledger.runs() if run_.seed != 50 for finding in examine(run_, ledger) if not finding.sound] == []
    assert not [path.name for path in into.iterdir() if path.name.startswith(".merge-")]


def test_a_run_in_training_is_waited_for(trained: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "busy", create=True)
    with (
        ledger.lock(ledger.register([row(status="running", finished=None)])[0]),
        pytest.raises(UserError, match=r"run 1 in .*busy is being trained by another process"),
    ):
        merge.merge([tmp_path / "busy"], tmp_path / "into")


def test_a_change_of_a_merged_file_is_found_as_before(trained: Path, tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    shutil.copytree(trained, source)
    student = source / "3" / "student.safetensors"
    content = bytearray(student.read_bytes())
    content[-1] ^= 1
    student.write_bytes(content)
    merge.merge([source], into)
    ledger = Ledger(into)
    assert [(finding.file, finding.verdict) for finding in examine(ledger.run(3), ledger) if not finding.sound] == [
        ("student.safetensors", "changed")
    ]


def test_the_command_prints_what_became_of_each_run(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "a")
    said = command(tmp_path, "ledger", "merge", "a", "--into", "b", "--format", "json")
    assert json.loads(said.out)[0] == {"source": "a", "run": 1, "into": 1, "copied": True, "remark": ""}
    assert (said.code, said.err) == (0, "4 of 4 runs were copied into b\n")
