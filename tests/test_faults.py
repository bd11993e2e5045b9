"""The faults that ``make torture`` lets befall a hundred trainings: six of them here, and what tells a loss tells it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torture
from helpers.faults import FAULTS, Fault, Scene, Session, TooLateError, strike, trained_again
from helpers.rows import row

from flowdistill.ledger import Epoch, Ledger

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "torture.json"


@pytest.mark.long
def test_six_faults_lose_nothing(tmp_path: Path) -> None:
    """Six kinds at seeded moments; processes of their own, for those that fork may not have computed anything."""
    out = tmp_path / "torture.json"
    command = [sys.executable, ROOT / "tests" / "torture.py", "--count", "6", "--at-once", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    strikes = json.loads(out.read_text())["strikes"]
    assert len({found["fault"] for found in strikes}) == 6
    assert [found["differs"] for found in strikes] == [[]] * 6


def test_the_matrix_is_what_the_strikes_were() -> None:
    told = json.loads(RESULTS.read_text())
    assert torture.page(RESULTS).read_text() == torture.matrix(told), "python tests/torture.py --page results/torture.json"
    assert {found["fault"] for found in told["strikes"]} == {fault.name for fault in FAULTS}, "make torture"


# What tells a loss, tested


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A ledger with a run of a plan that is to have two."""
    ledger = Ledger(tmp_path / "teacher" / "runs", create=True)
    ledger.register([row(method="kd", seed=0, status="interrupted")])
    ledger.close()
    return Session(tmp_path, (), {1: {"kd seed 0": "interrupted", "kd seed 1": "a hash"}})


def note(scene: Scene, epoch: int, seconds: float) -> None:
    ledger = Ledger(scene.folder / "runs")
    ledger.reopen([1], epoch - 1)
    ledger.add_epochs({1: Epoch(epoch, "task", 0.1, {}, 1, 2, seconds)})
    ledger.close()


def test_a_run_that_is_not_as_undisturbed_is_named(session: Session) -> None:
    done = strike(Fault("none", "nothing", lambda scene: None), 0, session)
    assert (done.sound, done.differs, done.problem, done.again) == (False, ["kd seed 1"], "", 0)


def test_what_was_trained_twice_is_counted(session: Session, tmp_path: Path) -> None:
    def twice(scene: Scene) -> None:
        for epoch, seconds in ((1, 1.0), (2, 1.0), (3, 1.0), (2, 2.0), (3, 2.0), (4, 1.0)):
            note(scene, epoch, seconds)

    done = strike(Fault("twice", "nothing", twice), 0, session)
    assert done.problem == "2 epochs on record were trained again, where 1 may be"
    assert not done.sound
    assert trained_again(tmp_path / "twice.0.0") == 2, "what is wrong stays to be looked at"


def test_a_strike_that_comes_too_late_is_made_again_at_another_moment(session: Session) -> None:
    moments = []

    def late(scene: Scene) -> None:
        moments.append(scene.chance.random())
        if len(moments) < 3:
            raise TooLateError

    session.undisturbed[1].pop("kd seed 1")
    assert strike(Fault("late", "nothing", late), 0, session).sound
    assert len(set(moments)) == 3


def test_a_traceback_is_a_problem(session: Session) -> None:
    def said(scene: Scene) -> None:
        work = scene.program("sh", "-c", "echo 'Traceback (most recent call last):' >&2")
        work.wait()
        work.lines()

    assert strike(Fault("said", "nothing", said), 0, session).problem.startswith("AssertionError: Traceback (most recent call last):")
