"""Two students that teach each other: from one forward pass, each its own run, together or not at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cohorts import Taped
from helpers.interruptions import STEPS, cut_off, outcome
from helpers.small import config

from flowdistill.checks import UserError
from flowdistill.config import RunConfig
from flowdistill.ledger import Ledger
from flowdistill.runner import execute, resume, run
from flowdistill.runner.cohorts import prepare
from flowdistill.runner.plan import plan
from flowdistill.training import cohort as engine
from flowdistill.training.cohort import train
from flowdistill.training.engine import CompiledEngine, EagerEngine, Engine

CPU = torch.device("cpu")


def pair(data: Path, **keys: Any) -> RunConfig:
    return config(data, method="dml", **keys)


def prepared(ledger: Ledger, data: Path, **keys: Any) -> tuple:
    ((cohort, members),) = prepare(plan([pair(data, **keys)], ledger, CPU), CPU)
    return cohort, [member.student for member in members]


def test_each_is_a_run_of_its_own_and_says_which_it_is(ledger: Ledger, small_npz: Path) -> None:
    first, second = run([pair(small_npz, peer="resnet14")], ledger, CPU)
    assert (first.status, second.status) == ("finished", "finished")
    assert (first.student, first.variant) == ("resnet8", "peer=resnet14")
    assert (second.student, second.variant) == ("resnet14", "second, peer=resnet8")
    assert first.fingerprint != second.fingerprint
    assert all((ledger.run_folder(one.no) / "student.safetensors").is_file() for one in (first, second))
    assert set(ledger.epochs(first.no)[0].terms) == {"task", "dml"}


def test_two_of_one_model_begin_from_different_weights_and_the_first_where_a_plain_run_does(ledger: Ledger, small_npz: Path) -> None:
    first, second, plain = run([pair(small_npz, seed=3), config(small_npz, seed=3)], ledger, CPU)
    assert (first.variant, second.variant) == ("peer=resnet8", "second, peer=resnet8")
    assert first.init_hash == plain.init_hash != second.init_hash


def test_a_step_is_that_of_the_paper(ledger: Ledger, small_npz: Path) -> None:
    """Both losses from the same forward pass, each network by its own optimiser, the other's prediction without a gradient."""
    cohort, students = prepared(ledger, small_npz)
    nets = [copy.deepcopy(student.net).train() for student in students]
    optimisers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4) for net in nets]
    images, batch = next(cohort.seed_groups[0].batches.epoch(0))
    logits = [net(images).logits for net in nets]
    for own, other, optimiser in zip(logits, reversed(logits), optimisers, strict=True):
        divergence = F.kl_div(own.log_softmax(1), other.detach().softmax(1), reduction="batchmean")
        (F.cross_entropy(own, batch.labels) + divergence).backward()
        optimiser.step()
    for student in students:
        student.begin_phase(0)
        student.begin_epoch()
    next(cohort.engine.epoch(cohort.seed_groups, 0, {student: torch.full((STEPS,), 0.05) for student in students}))
    for student, net in zip(students, nets, strict=True):
        for (name, found), expected in zip(student.net.state_dict().items(), net.state_dict().values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("other", [Taped("fp32", ""), CompiledEngine("fp32", "")], ids=["tape", "compiled"])
def test_every_engine_moves_both_alike(ledger: Ledger, small_npz: Path, other: Engine) -> None:
    found = []
    for one in (EagerEngine("fp32", ""), other):
        cohort, students = prepared(ledger, small_npz, train={"epochs": 1})
        cohort.engine = one
        terms = [list(report.progress[student].terms.values()) for report in train(cohort) for student in students]
        assert cohort.engine is one, cohort.engine.why
        found.append(terms)
    assert found[1] == [pytest.approx(row, rel=1e-3) for row in found[0]]


def test_the_other_students_of_a_cohort_do_not_matter(ledger: Ledger, small_npz: Path) -> None:
    alone = run([pair(small_npz)], ledger, CPU)
    beside = run([config(small_npz), pair(small_npz), pair(small_npz, peer="resnet14")], ledger, CPU, again=True)
    assert [one.weights_hash for one in alone] == [one.weights_hash for one in beside[1:3]]
    assert beside[3].weights_hash != alone[0].weights_hash


def test_a_pair_is_skipped_only_if_both_are_finished(ledger: Ledger, small_npz: Path) -> None:
    trained = run([pair(small_npz)], ledger, CPU)
    assert [one.no for one in run([pair(small_npz)], ledger, CPU)] == [one.no for one in trained]
    ledger.update(trained[1].no, status="failed", error="lost")
    assert [one.no for one in run([pair(small_npz)], ledger, CPU)] == [3, 4]


def test_resumed_is_straight_bit_for_bit(ledger: Ledger, small_npz: Path) -> None:
    configs = [pair(small_npz, peer="resnet14", train={"epochs": 4}), config(small_npz, train={"epochs": 4})]
    interrupted = cut_off(configs, ledger, 2 * STEPS + 2)
    assert len(interrupted) == 3
    resumed = resume(ledger, CPU)
    straight = run(configs, ledger, CPU, again=True)
    assert [outcome(one, ledger) for one in resumed] == [outcome(one, ledger) for one in straight]


def test_where_one_diverges_both_are_failed_and_others_go_on(ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine._dismiss_diverged

    def harmed(cohort: engine.Cohort, report: engine.EpochReport) -> None:
        for student, progress in report.progress.items():
            if student.peers and student is cohort.seed_groups[0].students[0]:
                progress.error = "diverged in epoch 1: dml is not finite"
        original(cohort, report)

    monkeypatch.setattr(engine, "_dismiss_diverged", harmed)
    first, second, plain = run([pair(small_npz), config(small_npz)], ledger, CPU)
    assert (first.status, second.status, plain.status) == ("failed", "failed", "finished")
    assert first.error.startswith("diverged in epoch 1: dml is not finite")
    assert second.error == "its peer diverged in epoch 1"


def test_a_kill_between_the_ends_of_the_two_loses_nothing(ledger: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, done = execute.finish, []

    def cut(*args: object) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(finish(*args))

    monkeypatch.setattr(execute, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(execute, "finish", cut)
    with pytest.raises(KeyboardInterrupt):
        run([pair(small_npz)], ledger, CPU)
    assert [one.status for one in ledger.runs()] == ["finished", "interrupted"]
    monkeypatch.setattr(execute, "finish", finish)
    found = run([pair(small_npz)], ledger, CPU)
    assert [one.no for one in found] == [1, 2]
    straight = run([pair(small_npz)], ledger, CPU, again=True)
    assert [one.weights_hash for one in found] == [one.weights_hash for one in straight]


def test_a_peer_is_refused_where_there_is_none(ledger: Ledger, small_npz: Path) -> None:
    with pytest.raises(UserError, match=r"^peer=resnet14: the students of 'base' do not teach each other; use dml, or leave peer out$"):
        run([config(small_npz, peer="resnet14")], ledger, CPU)
    with pytest.raises(UserError, match=r"^unknown model 'resnet9'"):
        run([pair(small_npz, peer="resnet9")], ledger, CPU)
