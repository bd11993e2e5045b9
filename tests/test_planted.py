"""The suite itself is tested: every bug of ``planted`` must be caught by the check that it names.

A check counts only where it passes without the bug, and catches only by an assertion, by the absence of an expected error, or in
the words of the package's own guard: a crash of the planted code is no catch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_device
import test_graph
import test_identity
import test_integrity
import test_patience
import test_plan
import test_ranks
import test_resume
from planted import BUGS, Bug

from flowdistill.ledger import Ledger

pytestmark = pytest.mark.usefixtures("own_code")

made, work, nets = test_integrity.made, test_integrity.work, test_identity.nets  # fixtures of the checks
digits, teachers, planned, planned_by = test_plan.digits, test_plan.teachers, test_plan.planned, test_ranks.planned_by
scripted = test_patience.scripted
replaying, current = test_graph.replaying, test_device.current
_a_checkpoint_every_epoch, learned = test_resume._a_checkpoint_every_epoch, test_resume.learned
passed: set[str] = set()


def run(bug: Bug, request: pytest.FixtureRequest) -> None:
    """The check, with the parameters of its case and fixtures for the rest; those that a check changes are fresh each time."""
    folder = request.getfixturevalue("tmp_path_factory").mktemp("check")
    with contextlib.ExitStack() as stack:
        fresh: dict[str, Callable[[], Any]] = {
            "monkeypatch": lambda: stack.enter_context(pytest.MonkeyPatch.context()),
            "tmp_path": lambda: folder,
            "ledger": lambda: stack.enter_context(contextlib.closing(Ledger(folder / "runs", create=True))),
            "taught": lambda: test_resume.with_teacher(fresh["ledger"](), request.getfixturevalue("small_npz")),
        }
        names = inspect.signature(bug.check).parameters.keys() - bug.case.keys()
        bug.check(**bug.case, **{name: fresh[name]() if name in fresh else request.getfixturevalue(name) for name in names})


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_planted_bug_is_caught(bug: Bug, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    told = [bug.name, bug.check_name, "not caught"]
    record_property("planted bugs", told)  # conftest.py prints them
    if f"{bug.check_name} {bug.case}" not in passed:
        run(bug, request)
        passed.add(f"{bug.check_name} {bug.case}")
    errors = (RuntimeError,) if bug.refusal else (AssertionError, pytest.fail.Exception)
    with pytest.MonkeyPatch.context() as patch:
        bug.plant(patch)
        with pytest.raises(errors, match=bug.refusal or None) as caught:
            run(bug, request)
    told[2] = caught.type.__name__


def test_there_are_many_bugs_each_with_a_name_and_a_reason_of_its_own() -> None:
    assert len(BUGS) >= 40
    for told in ([bug.name for bug in BUGS], [bug.why for bug in BUGS]):
        assert all(told)
        assert len(set(told)) == len(told)


def cases(check: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The parameters that pytest itself gives to a check, one decorator at a time."""
    for mark in [mark for mark in getattr(check, "pytestmark", []) if mark.name == "parametrize"]:
        names = [mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0]
        for value in mark.args[1]:
            values = value.values if isinstance(value, type(pytest.param())) else value if len(names) > 1 else (value,)
            yield dict(zip(names, values, strict=True))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_the_named_check_is_one_that_the_suite_runs(bug: Bug, request: pytest.FixtureRequest) -> None:
    module, name = bug.check_name.split(".py::")
    assert (request.path.parent / f"{module}.py").is_file()
    assert name.startswith("test_")
    offered = list(cases(bug.check))
    for given in {tuple(case) for case in offered}:
        assert {name: bug.case.get(name) for name in given} in offered
    assert set(bug.case) == {name for case in offered for name in case}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_the_mistake_takes_the_place_of_something_and_what_that_takes(bug: Bug) -> None:
    """A name that moved, or an argument more, is noticed here, without a training."""
    if isinstance(bug.where, dict):  # a mistake may be an entry more
        return
    original = inspect.signature(getattr(bug.where, bug.attribute)).parameters.values()
    takes = inspect.signature(bug.mistake)
    named = [one for one in original if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    given = [one for one in named if one.default is one.empty or one.name in takes.parameters]
    by_place = [one.name for one in given if one.kind is not one.KEYWORD_ONLY]
    takes.bind(*by_place, **{one.name: one.name for one in given if one.kind is one.KEYWORD_ONLY})
