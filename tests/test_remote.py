"""Cohorts that workers train: the driver's ledger is that of one process, whatever dies, comes late, or is not what it must be."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.crew import LocalCrew, at_epoch, ledger_of_a_teacher
from helpers.image_files import digits, on, write
from helpers.interruptions import STEPS, Scissors, cut_off, outcome
from helpers.small import config

from flowdistill import UserError, trust
from flowdistill.config import RunConfig, validate
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import RECORD, STUDENT_FILE, Ledger, Run, sealed
from flowdistill.ledger.rebuild import rebuild
from flowdistill.runner import execute, run
from flowdistill.runner.integrity import examine
from flowdistill.runner.record import told
from flowdistill.runner.remote import driver
from flowdistill.runner.remote.driver import How, Lost
from flowdistill.runner.remote.kit import Began, Kit, Result, Word, packed, unpack
from flowdistill.runner.remote.storage import FOLDER as STORAGE
from flowdistill.runner.remote.storage import States
from flowdistill.training import engine
from flowdistill.training.weights import load_weights

CPU = torch.device("cpu")
OF_THE_WAY = {"no", "cohort", "cohort_size", "record_hash", "started", "finished", "setup_seconds", "train_seconds", "eval_seconds"}
OF_THE_WAY |= {"images_per_second", "peak_memory", "versions"}
"""Columns of a run that may depend on how and when it was trained."""


@pytest.fixture(autouse=True)
def _a_state_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def taught(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger_of_a_teacher(small_npz, tmp_path_factory.mktemp("taught") / "runs")


@pytest.fixture
def ledger(taught: Path, tmp_path: Path) -> Iterator[Ledger]:
    """That ledger, for one test."""
    shutil.copytree(taught, tmp_path / "runs")
    ledger = Ledger(tmp_path / "runs")
    yield ledger
    ledger.close()


def by(crew: LocalCrew, configs: Sequence[RunConfig], ledger: Ledger, heard: Scissors | None = None, **how: Any) -> list[Run]:
    """What ``--ray`` does with another crew."""
    return driver.run(configs, ledger, CPU, crew.gathered(ledger.folder / STORAGE), How("eager", **how), heard or Scissors())


def resumed_by(crew: LocalCrew, ledger: Ledger, heard: Scissors | None = None) -> list[Run]:
    return driver.resume(ledger, CPU, crew.gathered(ledger.folder / STORAGE), How("eager"), heard or Scissors())


def students(small_npz: Path, methods: Sequence[str] = ("base", "kd", "at"), seeds: Sequence[int] = (0, 1), **keys: Any) -> list[RunConfig]:
    teacher = {method: {} if method in ("base", "dml") else {"teacher": "1"} for method in methods}
    return [config(small_npz, method=method, seed=seed, **teacher[method], **keys) for method in methods for seed in seeds]


def undisturbed(configs: Sequence[RunConfig], taught: Path, folder: Path) -> dict[tuple[str, int], Any]:
    """What one process makes of these, by key."""
    shutil.copytree(taught, folder)
    alone = Ledger(folder)
    found = {(run_.fingerprint, run_.seed): outcome(run_, alone) for run_ in run(configs, alone, CPU, engine="eager")}
    alone.close()
    return found


def outcomes(runs: Sequence[Run], ledger: Ledger) -> dict[tuple[str, int], Any]:
    return {(run_.fingerprint, run_.seed): outcome(run_, ledger) for run_ in runs}


def assert_nothing_left(ledger: Ledger) -> None:
    """Neither states nor checkpoints; and every file is what its run wrote."""
    assert [path for path in (ledger.folder / STORAGE).rglob("*") if path.is_file()] == []
    assert [*ledger.folder.glob("*/*checkpoint*")] == []
    for run_ in ledger.runs():
        assert [finding for finding in examine(run_, ledger) if not finding.sound] == []


def rows_of(folder: Path) -> list[Any]:
    ledger = Ledger(folder)
    found = [(run_, ledger.epochs(run_.no)) for run_ in ledger.runs()]
    ledger.close()
    return found


# The ledger is that of one process


@pytest.fixture(scope="module")
def both(small_npz: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """The folders of one process and of a driver, and what the driver said."""
    place, heard = tmp_path_factory.mktemp("both"), Scissors()
    for name in ("one", "crew"):
        shutil.copytree(taught, place / name)
    one, crewed = Ledger(place / "one"), Ledger(place / "crew")
    configs = students(small_npz)
    run(configs, one, CPU, engine="eager")
    done = by(LocalCrew(), configs, crewed, heard)
    assert [(run_.method, run_.seed) for run_ in done] == [(made.method, made.seed) for made in configs], "in the order of the plan"
    one.close()
    crewed.close()
    return place / "one", place / "crew", heard.lines


def test_every_row_and_curve_is_that_of_one_process(both: tuple[Path, Path, list[str]]) -> None:
    found: list[dict[tuple[str, int], Any]] = []
    for folder in both[:2]:
        rows = rows_of(folder)
        assert len(rows) == 7
        columns = {
            (row.fingerprint, row.seed): {name: value for name, value in vars(row).items() if name not in OF_THE_WAY} for row, _ in rows
        }
        curves = {(row.fingerprint, row.seed): [vars(epoch) | {"seconds": 0} for epoch in curve] for row, curve in rows}
        for key, values in columns.items():
            values["curve"] = curves[key]
        found.append(columns)
    assert found[0] == found[1]
    one, crewed = (Ledger(folder) for folder in both[:2])
    for run_ in crewed.runs()[1:]:
        (other,) = one.runs(fingerprint=run_.fingerprint, seed=run_.seed)
        assert run_.versions | {"load": ""} == other.versions | {"load": "", "node": "node 1"}
        assert (run_.cohort_size, other.cohort_size) == (3, 6), "a seed is a cohort"
        assert run_.threads == 1
        assert None not in (run_.train_seconds, run_.eval_seconds, run_.peak_memory, run_.images_per_second, run_.record_hash)
    one.close()
    crewed.close()


def test_its_files_are_whole_and_its_record_is_right(both: tuple[Path, Path, list[str]]) -> None:
    ledger, one = Ledger(both[1]), Ledger(both[0])
    assert_nothing_left(ledger)
    for run_ in ledger.runs()[1:]:
        record = sealed(ledger.run_folder(run_.no) / RECORD)
        assert record is not None, "its seal holds"
        values = vars(run_)
        assert {name: record[name] for name in values if name != "record_hash"} == json.loads(
            json.dumps({name: value for name, value in values.items() if name != "record_hash"})
        )
        (other,) = one.runs(fingerprint=run_.fingerprint, seed=run_.seed)
        theirs = sealed(one.run_folder(other.no) / RECORD)
        assert theirs is not None
        assert record.keys() == theirs.keys()
        assert record["about"] == theirs["about"]
        ours, their = (folder.run_folder(no) for folder, no in ((ledger, run_.no), (one, other.no)))
        assert (ours / "predictions.npz").read_bytes() == (their / "predictions.npz").read_bytes()
        weights = [load_weights(folder / STUDENT_FILE)[0] for folder in (ours, their)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {path.name for path in ledger.run_folder(2).iterdir()} == {path.name for path in one.run_folder(2).iterdir()}
    ledger.close()
    one.close()


def test_its_tables_are_equal(both: tuple[Path, Path, list[str]]) -> None:
    one, crewed = both[:2]
    for words in (("--summary",), ("--summary", "--protocol", "best"), ("--summary", "--format", "json")):
        tables = [command(one.parent, "table", *words, "--runs", folder.name).out for folder in (one, crewed)]
        assert tables[0].count("kd") >= 1
        assert tables[0] == tables[1]
    logs = [json.loads(command(one.parent, "table", "--format", "json", "--runs", folder.name).out) for folder in (one, crewed)]
    apart = {"id", "no", "start_time"}
    plain = [sorted(json.dumps({k: v for k, v in row.items() if k not in apart}, sort_keys=True) for row in log) for log in logs]
    assert len(plain[0]) == 7
    assert plain[0] == plain[1]


def test_a_ledger_made_from_its_folders_is_the_same(both: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    shutil.copytree(both[1], tmp_path / "runs")
    before = rows_of(tmp_path / "runs")
    (tmp_path / "runs" / "ledger.db").unlink()
    rebuild(tmp_path / "runs")
    assert rows_of(tmp_path / "runs") == before


def test_what_is_said_is_said_once_with_the_drivers_numbers(both: tuple[Path, Path, list[str]]) -> None:
    lines = both[2]
    assert lines[:2] == [
        "it was measured",
        f"6 runs in 2 cohorts, 1 at a time on cpu, each by 1 thread; their states are kept in {both[1] / STORAGE}",
    ]
    assert len(lines) == len(set(lines))
    assert lines.count("taps of resnet8 <- resnet14") == 1
    assert [line for line in lines if "seed 1" in line and not line.startswith("run ")] == lines[-1:], "early lines of a kind come once"
    ledger = Ledger(both[1])
    assert [line for line in lines if line.startswith("run ")] == [told(run_) for run_ in ledger.runs()[1:]]
    ledger.close()
    (line,) = [line for line in lines if line.startswith("1 of 2 cohorts done, 0 in training, about 0:")]
    assert line.endswith(" (h:mm:ss) left: base,kd,at resnet8 small seed 0 on node 1")
    assert lines[-1] == "2 of 2 cohorts done, 0 in training: base,kd,at resnet8 small seed 1 on node 1"


# Workers die


def test_what_a_dead_worker_trained_is_gone_on_with(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger) -> None:
    """It dies as it tells of epoch 2, whose state it has not kept; the driver knows that epoch, and forgets it."""
    configs, heard = students(small_npz, ("base", "kd"), (0,), train={"epochs": 3}), Scissors()
    wanted = undisturbed(configs, taught, tmp_path / "one")
    crew = LocalCrew(at_epoch(2, "after"))
    found = by(crew, configs, ledger, heard)
    assert crew.attempts == {1: 2}
    assert outcomes(found, ledger) == wanted
    assert [run_.resumed for run_ in found] == [1, 1]
    assert {run_.versions["node"] for run_ in found} == {"node 2"}, "where it ended"
    assert "base,kd resnet8 small seed 0: goes on on node 2 after epoch 1 of 3" in heard.lines
    assert heard.lines[-1] == "1 of 1 cohorts done, 0 in training: base,kd resnet8 small seed 0 on node 2"
    assert_nothing_left(ledger)


def test_it_dies_three_times_and_once_before_anything_was_kept(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger) -> None:
    configs, heard = students(small_npz, ("kd",), (0,), train={"epochs": 3}), Scissors()
    wanted = undisturbed(configs, taught, tmp_path / "one")

    def dies(kit: Kit, attempt: int, told: Any) -> str:
        return at_epoch(max(1, attempt - 1), "before" if attempt % 2 else "after", attempts=3)(kit, attempt, told)

    crew = LocalCrew(dies)
    found = by(crew, configs, ledger, heard)
    assert crew.attempts == {1: 4}
    assert outcomes(found, ledger) == wanted
    title = "kd resnet8 small seed 0"
    lines = [line for line in heard.lines if line.startswith(title)]
    where = (ledger.folder / STORAGE).absolute()
    assert lines == [
        f"{title}: starts again on node 2, since {where} has no state of it",
        f"{title}: starts again on node 3, since {where} has no state of it",
        f"{title}: goes on on node 4 after epoch 1 of 3",
    ]
    assert found[0].resumed == 3


def states_of(ledger: Ledger) -> list[Path]:
    return sorted((ledger.folder / STORAGE).glob("*/*.zip"))


class Meddling(LocalCrew):
    """Does something before an attempt."""

    def __init__(self, meddle: Any, *given: Any) -> None:
        super().__init__(*given)
        self.meddle = meddle

    def attempt(self, kit: Kit, data: ImageData | None, given: bytes) -> Result | Lost:
        self.meddle(kit, self.attempts.get(kit.number, 0) + 1)
        return super().attempt(kit, data, given)


@pytest.mark.parametrize("kind", ["newest", "all", "gone", "not a state"])
def test_a_damaged_state_is_said_and_the_one_before_it_counts(
    small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger, kind: str
) -> None:
    configs, heard = students(small_npz, ("base",), (0,), train={"epochs": 4}), Scissors()
    wanted = undisturbed(configs, taught, tmp_path / "one")
    damaged: list[Path] = []

    def meddle(kit: Kit, attempt: int) -> None:
        if attempt == 2:
            kept = states_of(ledger)
            assert [path.name[:6] for path in kept] == ["000001", "000002"], "two states of an attempt at most"
            for path in kept if kind == "all" else kept[-1:]:
                whole = path.read_bytes()
                half = len(whole) // 2
                path.write_bytes(b"junk" if kind == "not a state" else whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
                damaged.append(path)
            if kind == "gone":
                shutil.rmtree(ledger.folder / STORAGE)

    found = by(Meddling(meddle, at_epoch(3)), configs, ledger, heard)
    assert outcomes(found, ledger) == wanted
    lines = [line for line in heard.lines if line.startswith("base resnet8 small seed 0: ")]
    if kind in ("newest", "not a state"):
        assert lines[-1] == "base resnet8 small seed 0: goes on on node 2 after epoch 1 of 4"
    else:
        assert lines[-1].startswith("base resnet8 small seed 0: starts again on node 2, since ")
    for path in damaged if kind != "gone" else []:
        assert f"{path.absolute()} can't be read (" in "\n".join(lines[:-1])
    assert_nothing_left(ledger)


def test_a_storage_that_takes_nothing_is_said_once_and_training_goes_on(small_npz: Path, ledger: Ledger) -> None:
    heard = Scissors()
    (ledger.folder / STORAGE).write_text("a file")
    (found,) = by(LocalCrew(), students(small_npz, ("kd",), (0,), train={"epochs": 3}), ledger, heard)
    assert found.status == "finished"
    (line,) = [line for line in heard.lines if "no state is kept" in line]
    assert line.endswith("; training goes on, but another worker could not")


@pytest.fixture
def kd_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first epoch."""
    original = engine.train_step

    def harmed(group: tuple[engine.Student, ...], *args: Any, **keys: Any) -> None:
        original(group, *args, **keys)
        for student in group:
            if "kd" in student.sums:
                student.sums["kd"].mul_(float("nan"))

    monkeypatch.setattr(engine, "train_step", harmed)


def test_a_student_that_diverged_stays_failed_when_its_worker_dies(small_npz: Path, ledger: Ledger, kd_diverges: None) -> None:
    """The worker dies in epoch 3: only base goes on, and nothing is trained anew."""
    configs = students(small_npz, ("base", "kd"), (0,), train={"epochs": 3})
    heard = Scissors()
    base, kd = by(LocalCrew(at_epoch(3)), configs, ledger, heard)
    assert (base.status, base.resumed, len(ledger.epochs(base.no))) == ("finished", 1, 3)
    assert (kd.status, kd.resumed, len(ledger.epochs(kd.no))) == ("failed", 0, 1)
    assert kd.error.startswith("diverged in epoch 1: ")
    assert ledger.count() == 3
    assert len([line for line in heard.lines if "diverged" in line]) >= 1
    assert_nothing_left(ledger)


def test_a_cohort_that_was_stopped_after_one_diverged_goes_on_from_its_state(small_npz: Path, ledger: Ledger, kd_diverges: None) -> None:
    configs = students(small_npz, ("base", "kd"), (0,), train={"epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        by(Stopping(at_epoch(3)), configs, ledger)
    heard = Scissors()
    (base,) = resumed_by(LocalCrew(), ledger, heard)
    assert (base.method, base.status, base.resumed) == ("base", "finished", 1)
    assert any("goes on on node 1 after epoch 2 of 3" in line for line in heard.lines)
    assert [run_.status for run_ in ledger.runs()] == ["finished", "finished", "failed"]
    assert_nothing_left(ledger)


# Words come late, or not at all


class Posting(LocalCrew):
    """Its mail is changed on the way."""

    def __init__(self, change: Any, *given: Any) -> None:
        super().__init__(*given)
        self.change, self.kept = change, list[Word]()

    def words(self) -> Sequence[Word]:
        words = list(super().words())
        self.kept += words
        return self.change(self, words)  # type: ignore[no-any-return]


def test_words_of_an_earlier_attempt_that_come_late_change_nothing(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger) -> None:
    """All that attempt 1 said comes again after what attempt 2 said, its beginning included."""
    configs, heard = students(small_npz, ("kd",), (0,), train={"epochs": 3}), Scissors()
    wanted = undisturbed(configs, taught, tmp_path / "one")

    def late(crew: Posting, words: list[Word]) -> list[Word]:
        old, came = [word for word in crew.kept if word.node == "node 1"], list[Word]()
        for word in words:
            came.append(word)
            if any(before.node == "node 2" and isinstance(before.told, Began) for before in came):
                came += old
        return came

    found = by(Posting(late, at_epoch(2)), configs, ledger, heard)
    assert outcomes(found, ledger) == wanted
    assert found[0].resumed == 1
    assert found[0].versions["node"] == "node 2"
    assert len([line for line in heard.lines if "starts again" in line or "goes on on" in line]) == 1


def test_words_about_a_cohort_that_ended_change_nothing(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger) -> None:
    configs = students(small_npz, ("kd",), (0, 1))
    wanted = undisturbed(configs, taught, tmp_path / "one")

    def again(crew: Posting, words: list[Word]) -> list[Word]:
        return [*words, *(word for word in crew.kept if word.cohort == 1 and words and words[0].cohort == 2)]

    crew = Posting(again)
    assert outcomes(by(crew, configs, ledger), ledger) == wanted
    assert {word.cohort for word in crew.kept} == {1, 2}
    assert_nothing_left(ledger)


@pytest.mark.parametrize("lost", ["all", "all but the beginning", "every second", "the second attempt's"])
def test_what_words_did_not_tell_the_result_does(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger, lost: str) -> None:
    configs = students(small_npz, ("base", "kd"), (0,), train={"epochs": 3})
    wanted = undisturbed(configs, taught, tmp_path / "one")

    def some(crew: Posting, words: list[Word]) -> list[Word]:
        match lost:
            case "all":
                return []
            case "all but the beginning":
                return [word for word in words if isinstance(word.told, Began)]
            case "every second":
                return [word for number, word in enumerate(words) if isinstance(word.told, Began) or number % 2]
            case _:
                return [word for word in words if word.node == "node 1"]

    found = by(Posting(some, at_epoch(3 if "second attempt" in lost else 9)), configs, ledger)
    assert outcomes(found, ledger) == wanted
    assert_nothing_left(ledger)


# The driver is stopped, or dies


class Stopping(LocalCrew):
    """Ctrl-C once a worker is gone: by then the driver has heard what that said."""

    error: BaseException = KeyboardInterrupt()

    def results(self, seconds: float) -> Mapping[int, Result | Lost]:
        if self.attempts:
            if self._words:
                return {}
            raise self.error
        return super().results(seconds)


def test_a_driver_that_is_stopped_says_so_and_another_goes_on(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger) -> None:
    configs, heard = students(small_npz, ("base", "kd"), (0, 1), train={"epochs": 3}), Scissors()
    wanted = undisturbed(configs, taught, tmp_path / "one")
    crew = Stopping(at_epoch(2, cohort=1))
    with pytest.raises(KeyboardInterrupt):
        by(crew, configs, ledger, heard)
    assert crew.stopped
    stopped = ledger.runs()[1:]
    assert [(run_.status, run_.error, run_.seed, len(ledger.epochs(run_.no))) for run_ in stopped] == [
        ("interrupted", "KeyboardInterrupt", 0, 2),
        ("interrupted", "KeyboardInterrupt", 0, 2),
    ]
    assert heard.lines[-1] == f"stopped 2 runs; go on with: flowdistill resume --ray local --runs {ledger.folder}"
    again = Scissors()
    done = resumed_by(LocalCrew(), ledger, again)
    assert {key: wanted[key] for key in outcomes(done, ledger)} == outcomes(done, ledger)
    assert [(run_.no, run_.resumed) for run_ in done] == [(2, 1), (3, 1)]
    assert "base,kd resnet8 small seed 0: goes on on node 1 after epoch 1 of 3" in again.lines
    assert outcomes(by(LocalCrew(), configs, ledger), ledger) == wanted
    assert ledger.count() == 5
    assert_nothing_left(ledger)


def test_a_driver_that_is_killed_leaves_runs_that_are_dead_and_the_same_command_goes_on(
    small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = students(small_npz, ("base", "kd"), (0,), train={"epochs": 3})
    wanted = undisturbed(configs, taught, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(driver.Mirror, "stop", lambda *_: [])
        with pytest.raises(KeyboardInterrupt):
            by(Stopping(at_epoch(2)), configs, ledger)
    assert [run_.status for run_ in ledger.runs()[1:]] == ["dead", "dead"]
    heard = Scissors()
    done = by(LocalCrew(), configs, ledger, heard)
    assert outcomes(done, ledger) == wanted
    assert [run_.no for run_ in done] == [2, 3]
    assert "base,kd resnet8 small seed 0: goes on on node 1 after epoch 1 of 3" in heard.lines
    assert_nothing_left(ledger)


def test_what_was_cut_off_on_this_machine_goes_on_by_a_crew(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger) -> None:
    """Of a cohort of two seeds, in which the first run is not the first any more."""
    configs = students(small_npz, ("base", "kd"), (0, 1), train={"epochs": 3})
    wanted = undisturbed(configs, taught, tmp_path / "one")
    stopped = cut_off(configs, ledger, 2 * STEPS + 2)
    assert len(stopped) == 4
    heard = Scissors()
    done = resumed_by(LocalCrew(at_epoch(3)), ledger, heard)
    assert outcomes(done, ledger) == wanted
    assert [run_.no for run_ in done] == [run_.no for run_ in stopped]
    assert [line for line in heard.lines if "goes on on" in line] == [
        "base,kd resnet8 small seed 0,1: goes on on node 1 after epoch 2 of 3",
        "base,kd resnet8 small seed 0,1: goes on on node 2 after epoch 2 of 3",
    ]
    assert_nothing_left(ledger)


def test_what_a_crew_left_goes_on_on_this_machine_from_the_start(small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger) -> None:
    configs = students(small_npz, ("base", "kd"), (0,), train={"epochs": 3})
    wanted = undisturbed(configs, taught, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        by(Stopping(at_epoch(2)), configs, ledger)
    assert outcomes(run(configs, ledger, CPU, engine="eager"), ledger) == wanted


def test_what_another_process_went_on_with_meanwhile_is_left_to_it(small_npz: Path, ledger: Ledger) -> None:
    """Two cohorts were cut off; while the first is trained, somebody else finishes the second."""
    for seed in (0, 1):
        cut_off(students(small_npz, ("kd",), (seed,)), ledger, STEPS + 1)

    def meddle(kit: Kit, attempt: int) -> None:
        if kit.number == 1:
            other = Ledger(ledger.folder)
            execute.resume(other, CPU, no=3)
            other.close()

    heard = Scissors()
    patched = pytest.MonkeyPatch()
    patched.setattr(driver, "AHEAD", 1)
    try:
        with pytest.raises(UserError, match="1 of 2 cohorts were not trained: kd resnet8 small seed 1: another process went on with it"):
            resumed_by(Meddling(meddle), ledger, heard)
    finally:
        patched.undo()
    assert [(run_.status, run_.resumed) for run_ in ledger.runs()[1:]] == [("finished", 1), ("finished", 1)]
    assert ledger.run(3).versions.get("node") is None
    assert_nothing_left(ledger)


# What can't be trained is said, and the others are trained


class Failing(LocalCrew):
    """One cohort is lost, and another is refused."""

    def attempt(self, kit: Kit, data: ImageData | None, given: bytes) -> Result | Lost:
        if kit.number == 1:
            return Lost("its worker died 4 times, the last time: killed")
        if kit.number == 2:
            return Result("x", "node 7", refused="not enough memory; set a smaller --batch-size")
        return super().attempt(kit, data, given)


def test_what_is_not_trained_is_said_and_counted_and_the_others_are(small_npz: Path, ledger: Ledger) -> None:
    heard = Scissors()
    with pytest.raises(UserError) as refused:
        by(Failing(), students(small_npz, ("kd",), (0, 1, 2)), ledger, heard)
    assert str(refused.value) == (
        "2 of 3 cohorts were not trained: kd resnet8 small seed 0: its worker died 4 times, the last time: killed"
    )
    assert "not trained: kd resnet8 small seed 1: not enough memory; set a smaller --batch-size" in heard.lines
    assert [(run_.seed, run_.status) for run_ in ledger.runs()[1:]] == [(2, "finished")], "nothing is entered of what never began"
    assert heard.lines[-1] == "3 of 3 cohorts done, 0 in training: kd resnet8 small seed 2 on node 1"


def test_a_cohort_that_began_and_is_lost_is_recorded_as_interrupted(small_npz: Path, ledger: Ledger) -> None:
    class Losing(LocalCrew):
        def results(self, seconds: float) -> Mapping[int, Result | Lost]:
            return {1: Lost("its worker died")} if self.attempts.get(1) else super().results(seconds)

    with pytest.raises(UserError, match="1 of 1 cohorts were not trained"):
        by(Losing(at_epoch(2)), students(small_npz, ("kd",), (0,), train={"epochs": 3}), ledger)
    run_ = ledger.run(2)
    assert (run_.status, run_.error, len(ledger.epochs(2))) == ("interrupted", "its worker died", 2)
    (done,) = resumed_by(LocalCrew(), ledger)
    assert (done.status, done.resumed) == ("finished", 1)


def test_a_worker_whose_code_or_data_differ_refuses_in_one_line(small_npz: Path, ledger: Ledger) -> None:
    class Elsewhere(LocalCrew):
        def attempt(self, kit: Kit, data: ImageData | None, given: bytes) -> Result | Lost:
            assert data is not None
            assert isinstance(data.x_train, np.ndarray)
            return super().attempt(kit, replace(data, x_train=data.x_train ^ 1), given)

    heard = Scissors()
    with pytest.raises(UserError) as refused:
        by(Elsewhere(), students(small_npz, ("base",), (0,)), ledger, heard)
    assert str(refused.value) == (
        "1 of 1 cohorts were not trained: base resnet8 small seed 0: node 1 would not train what was planned: the data, the code of a "
        "network or a weights file is another there; make these files equal on all machines"
    )
    assert ledger.count() == 1
    assert [path.name for path in ledger.folder.iterdir() if path.name.isdigit()] == ["1"]


def test_a_cohort_that_another_process_begins_meanwhile_is_not_entered_twice(small_npz: Path, ledger: Ledger) -> None:
    configs = students(small_npz, ("kd",), (0, 1))

    def meddle(kit: Kit, attempt: int) -> None:
        if kit.number == 1:
            other = Ledger(ledger.folder)
            run(configs[:1], other, CPU)
            other.close()

    heard, crew = Scissors(), Meddling(meddle)
    with pytest.raises(UserError) as refused:
        by(crew, configs, ledger, heard)
    assert str(refused.value) == (
        "1 of 2 cohorts were not trained: kd resnet8 small seed 0: another process began it meanwhile, as run 2; wait for that"
    )
    assert [(run_.seed, run_.status) for run_ in ledger.runs()[1:]] == [(0, "finished"), (1, "finished")]
    assert crew.cancelled == [1]


def test_a_file_that_is_not_what_its_worker_wrote_is_refused(small_npz: Path, ledger: Ledger) -> None:
    class Garbling(LocalCrew):
        def attempt(self, kit: Kit, data: ImageData | None, given: bytes) -> Result | Lost:
            result = super().attempt(kit, data, given)
            assert isinstance(result, Result)
            for finished in result.runs.values():
                assert isinstance(finished.files, dict)
                *most, last = finished.files[STUDENT_FILE]
                finished.files[STUDENT_FILE] = bytes([*most, last ^ 1])
            return result

    with pytest.raises(UserError, match=rf"run 2: {STUDENT_FILE} is not what its worker wrote; train it again"):
        by(Garbling(), students(small_npz, ("kd",), (0,)), ledger)
    assert ledger.run(2).status == "interrupted"
    assert not (ledger.run_folder(2) / STUDENT_FILE).exists()
    assert not (ledger.run_folder(2) / RECORD).exists()


# What travels


def test_held_images_travel_and_are_not_read_again(small_npz: Path, tmp_path: Path) -> None:
    ledger, path = Ledger(tmp_path / "runs", create=True), tmp_path / "away.npz"
    shutil.copy(small_npz, path)
    crew = Meddling(lambda *_: path.unlink(missing_ok=True))
    done = by(crew, [config(path, method="base", seed=seed) for seed in (0, 1)], ledger)
    assert [run_.status for run_ in done] == ["finished", "finished"]
    assert not path.exists()
    hashes = {None if data is None else data.hash for _, data, _ in crew.begun}
    assert hashes == {done[0].data_hash}
    ledger.close()


def test_streamed_images_are_not_sent(tmp_path: Path) -> None:
    images, labels = digits(90)
    write(tmp_path / "images", images, labels)
    ledger, crew = Ledger(tmp_path / "runs", create=True), LocalCrew()
    trust.name("resnet8")
    made = [on(f"folder:{tmp_path / 'images'}", method="base", data={"stream": True})]
    (done,) = driver.run(made, ledger, CPU, crew.gathered(tmp_path / "storage"), How("eager", workers=0), Scissors())
    assert done.status == "finished"
    assert [data for _, data, _ in crew.begun] == [None]
    ledger.close()


def test_the_runs_that_a_cohort_learns_from_travel_alone(small_npz: Path, ledger: Ledger) -> None:
    """Of three runs the teacher, under its number; a run that nobody learns from stays here."""
    run([config(small_npz, method="base", seed=3)], ledger, CPU)
    crew = LocalCrew()
    by(crew, students(small_npz, ("kd",), (0,)), ledger)
    ((_, _, given),) = crew.begun
    with zipfile.ZipFile(io.BytesIO(given)) as archive:
        assert {Path(name).parts[0] for name in archive.namelist() if "/" in name} == {"1"}


# Kinds of runs


def test_a_run_that_diverges_is_failed_and_the_others_finish(small_npz: Path, ledger: Ledger, kd_diverges: None) -> None:
    heard = Scissors()
    done = by(LocalCrew(), students(small_npz, ("kd", "base", "at"), (0,)), ledger, heard)
    assert [run_.status for run_ in done] == ["failed", "finished", "finished"]
    assert done[0].error.startswith("diverged in epoch 1: ")
    assert done[0].finished
    assert any(line.startswith(f"run {done[0].no}: ") and "diverged" in line for line in heard.lines)
    assert_nothing_left(ledger)


KINDS: dict[str, dict[str, Any]] = {
    "two students that teach each other": {"method": "dml"},
    "two stages": {"method": "fsp", "teacher": "1", "options": {"fsp": {"schedule": "two-stage", "stage_epochs": 1}}},
    "holdout": {"method": "base", "split": "holdout", "train": {"epochs": 3}},
    "unlabelled": {"method": "kd", "teacher": "1"},
    "no label at all": {"method": "sp", "teacher": "1"},
    "rates that fall by the layer": {"method": "kd", "teacher": "1", "train": {"optimizer": "adamw", "lr": 1e-3, "layer_decay": 0.5}},
    "stopped early": {"method": "base", "split": "holdout", "limit_train": 128, "train": {"epochs": 5, "lr": 1e-9, "patience": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_that_of_one_process_though_its_worker_dies(
    small_npz: Path, taught: Path, tmp_path: Path, ledger: Ledger, kind: str
) -> None:
    made = config(small_npz, **KINDS[kind])
    if kind in ("unlabelled", "no label at all"):
        np.savez(tmp_path / "more.npz", x=np.load(small_npz)["x_test"][:80])
        images = {"unlabelled": f"npz:{tmp_path / 'more.npz'}"} | ({"name": "none"} if kind == "no label at all" else {})
        made = validate(made.model_dump() | {"data": made.data.model_dump() | images})
    wanted = undisturbed([made], taught, tmp_path / "one")
    crew = LocalCrew(at_epoch(2))
    found = by(crew, [made], ledger)
    assert crew.attempts == {1: 2}
    assert outcomes(found, ledger) == wanted
    assert found[0].error == ("stopped early at epoch 3 of 5 (patience 2)" if kind == "stopped early" else "")
    assert_nothing_left(ledger)


def test_again_repeats_and_what_is_there_is_skipped(small_npz: Path, ledger: Ledger) -> None:
    configs, heard = students(small_npz, ("kd",), (0,)), Scissors()
    (first,) = by(LocalCrew(), configs, ledger)
    crew = LocalCrew()
    (known,) = by(crew, configs, ledger, heard)
    assert known.no == first.no
    assert crew.begun == []
    assert not crew.left, "no crew is gathered where there is nothing to do"
    (again,) = by(LocalCrew(), configs, ledger, again=True)
    assert (again.no, again.weights_hash) == (first.no + 1, first.weights_hash)


# What is told


def test_a_silent_worker_is_told_once_and_again_when_it_is_heard(small_npz: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SILENCE", 0.05)

    class Slow(LocalCrew):
        turns = 0

        def results(self, seconds: float) -> Mapping[int, Result | Lost]:
            if self.attempts and self.turns < 4 and not self._words:
                self.turns += 1
                time.sleep(0.06)
                return {}
            return super().results(seconds)

    heard = Scissors()
    by(Slow(at_epoch(2)), students(small_npz, ("kd",), (0,)), ledger, heard)
    lines = [line for line in heard.lines if "no sign of life" in line or "heard again" in line]
    assert lines == [
        "kd resnet8 small seed 0: no sign of life from node 1 for 0 s; it is waited for",
        "kd resnet8 small seed 0: node 1 is heard again",
    ]


def test_now_and_then_it_is_told_how_far_all_is(small_npz: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "REPORT", 0.0)
    heard = Scissors()
    by(LocalCrew(), students(small_npz, ("kd",), (0, 1)), ledger, heard)
    assert any(line.startswith("1 of 2 cohorts done, 0 in training, about ") and line.endswith(" left") for line in heard.lines)


# Archives and states


def archive_of(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["..__x", "1__..__..__x", "__x", "__tmp__x", "a__b__c", ".."])
def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="a file in it is named"):
        unpack(archive_of(**{name: "evil"}), tmp_path / "in")
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


@pytest.mark.parametrize("damage", ["cut", "a byte", "junk", "empty"])
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: str) -> None:
    whole = archive_of(a="x" * 1000)
    broken = {"cut": whole[:-30], "a byte": whole[:500] + b"y" + whole[501:], "junk": b"junk", "empty": b""}[damage]
    with pytest.raises(ValueError, match=r"."):
        unpack(broken, tmp_path)
    assert not (tmp_path / "a").exists()


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    for name in ("ledger.db", "1/a", "1/b", "22/c"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    files = [path for path in (tmp_path / "in").rglob("*") if path.is_file()]
    unpack(packed(tmp_path / "in", files), tmp_path / "out")
    assert {str(path.relative_to(tmp_path / "in")): path.read_bytes() for path in files} == {
        str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


def test_an_attempt_keeps_two_states_and_leaves_those_of_others(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    state = tmp_path / "1" / "state"
    first, second = (States(tmp_path / "storage", "cohort", name) for name in ("aaa", "bbb"))
    other = States(tmp_path / "storage", "another", "aaa")
    other.save(9, tmp_path, [tmp_path / "1"])

    def save(states: States, done: int) -> None:
        state.write_text(f"{done}")
        states.save(done, tmp_path, [state])

    for done in (1, 2, 3):
        save(first, done)
    for done in (2, 3, 4, 5):
        save(second, done)
    assert sorted(path.name for path in first.folder.iterdir()) == ["000002-aaa.zip", "000003-aaa.zip", "000004-bbb.zip", "000005-bbb.zip"]
    out = tmp_path / "out"
    assert first.bring(out) == (5, "")
    assert (out / "1" / "state").read_text() == "5"
    (first.folder / "000005-bbb.zip").write_bytes(b"")
    (first.folder / "000009-ccc.zip.tmp").write_bytes(b"not a state")
    done, remark = first.bring(out)
    assert (done, (out / "1" / "state").read_text()) == (4, "4")
    assert remark.startswith(f"{first.folder / '000005-bbb.zip'} can't be read (")
    first.clear()
    assert [path.name for path in (tmp_path / "storage").iterdir()] == ["another"]
    assert first.bring(out) == (0, "")
