"""What doctor says of a term's gradient beside the task's: held to plain autograd, and its weight to what doctor says of that."""

from __future__ import annotations

import itertools
import re
import shlex
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cohorts import CPU, a_cohort
from helpers.small import a_teacher_in, config
from torch import Tensor, nn

from flowdistill.config import RunConfig, assign
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.methods import METHODS
from flowdistill.randomness import states
from flowdistill.runner import doctor, run
from flowdistill.runner.doctor import Finding, examine
from flowdistill.runner.watcher import Watcher
from flowdistill.training.gradients import pulls

pytestmark = pytest.mark.usefixtures("own_code")

LINE = re.compile(r"its gradient is ([\d.e+-]+) x the task's \(weight ([\d.e+-]+)\)")


def by_autograd(net: nn.Module, task: Tensor, term: Tensor) -> tuple[float, float]:
    """Norms of both gradients, as flat vectors, on the parameters that both reach."""
    vectors: list[list[Tensor]] = [[], []]
    for parameter in net.parameters():
        found = [torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)[0] for loss in (term, task)]
        if all(gradient is not None for gradient in found):
            for vector, gradient in zip(vectors, found, strict=True):
                vector.append(gradient.double().flatten())
    return tuple(float(torch.cat(vector).square().sum().sqrt()) for vector in vectors)  # type: ignore[return-value]


def plain_at(student: Tensor, teacher: Tensor) -> Tensor:
    """Zagoruyko & Komodakis 2017 on one pair of maps [N, C, H, W]."""
    first, second = (F.normalize(maps.square().mean(1).flatten(1)) for maps in (student, teacher))
    return (first - second).square().mean()


def test_norms_are_those_of_plain_autograd_on_what_both_reach(data: ImageData, small_npz: Path) -> None:
    """``at`` does not reach the classifier, which therefore does not count for the task either."""
    cohort, (student,) = a_cohort(data, [config(small_npz, method="at", teacher="-", train={"batch_size": 64})])
    seed_group, (found,) = cohort.seed_groups[0], pulls(cohort, 4).values()
    assert seed_group.teacher is not None
    net = student.net.train()
    for pull, (images, batch) in zip(found["at"], seed_group.batches.epoch(0), strict=True):
        given, taught = net(images), seed_group.teacher.teach(images)
        term = sum(plain_at(given.maps[name], taught.maps[name]) for name in ("stage1", "stage2", "stage3"))
        task = F.cross_entropy(given.logits, batch.labels)
        norm, of_task = by_autograd(net, task, term)
        whole = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(task, list(net.parameters()))]).norm()
        assert pull.of_task == pytest.approx(of_task, rel=1e-4)
        assert float(whole) > 1.01 * of_task, "the classifier's own gradient counts for nothing"
        assert pull.norm == pytest.approx(norm, rel=1e-4)
        assert pull.value == pytest.approx(float(term.detach()), rel=1e-4)


def test_what_a_method_trains_beside_the_student_does_not_count(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="vid", teacher="-")])
    (pull,) = pulls(cohort, 1)[student]["vid"]
    images, batch = next(cohort.seed_groups[0].batches.epoch(0))
    given, taught = student.net.train()(images), cohort.seed_groups[0].teacher.teach(images)  # type: ignore[union-attr]
    term = student.method(given, taught, batch)["vid"]
    assert all(gradient is not None for gradient in torch.autograd.grad(term, [*student.method.parameters()], retain_graph=True))
    norm, of_task = by_autograd(student.net, F.cross_entropy(given.logits, batch.labels), term)
    assert (pull.norm, pull.of_task) == pytest.approx((norm, of_task), rel=1e-4)


@pytest.mark.parametrize("method", ["at", "crd", "seed_kd"])
def test_looking_changes_nothing_and_draws_nothing(method: str, data: ImageData, small_npz: Path) -> None:
    options = {"crd": {"crd": {"negatives": 50, "dim": 8}}}.get(method, {})
    cohort, (student,) = a_cohort(data, [config(small_npz, method=method, teacher="-", options=options)])
    before = {name: value.clone() for module in (student.net, student.method) for name, value in module.state_dict().items()}
    drawn = states()
    pulls(cohort, 2)
    assert states() == drawn
    for module in (student.net, student.method):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# What the doctor says

Look = Callable[..., list[Finding]]


@pytest.fixture(scope="module")
def trained(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    with a_teacher_in(tmp_path_factory.mktemp("gradients") / "runs", small_npz) as ledger:
        yield ledger


@pytest.fixture
def look(small_npz: Path, trained: Ledger, monkeypatch: pytest.MonkeyPatch) -> Look:
    """What is found of one method, its time not measured."""
    monkeypatch.setattr(doctor, "seconds_per_epoch", lambda _: 1.0)

    def found(**keys: Any) -> list[Finding]:
        return examine([config(small_npz, **{"teacher": "1", **keys})], trained, CPU)

    return found


def told(found: list[Finding], check: str) -> tuple[str, str]:
    (one,) = (finding for finding in found if finding.check == check)
    return one.verdict, one.found


def cured(words: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for assignment in re.findall(r"--set (\S+)", words):
        assign(values, *shlex.split(assignment))
    return values


@pytest.mark.parametrize("train", [{}, {"accumulate": 2}, {"precision": "bf16"}, {"label_smoothing": 0.1}], ids=str)
def test_the_proposed_weight_equals_the_task(train: dict[str, Any], look: Look) -> None:
    verdict, said = told(look(method="at", train=train), "at: at")
    found = LINE.match(said)
    assert found
    assert found[2] == "1000"
    assert (verdict == "look") == (float(found[1]) > 10) == ("over 10 x: the task is hardly heard" in said)
    after = told(look(method="at", train=train, **cured(said)), "at: at")
    assert after[0] == "ok"
    assert float(LINE.match(after[1])[1]) == pytest.approx(1, abs=0.006)  # type: ignore[index]
    assert "--set" not in after[1]


def test_every_term_of_a_composition_has_its_own_weight_beside_the_tasks(look: Look) -> None:
    weights = {"at": 50.0, "kd": 2.0, "task": 0.5}
    found = look(method="at+kd", weights=weights)
    cure: dict[str, Any] = {}
    for term in ("at", "kd"):
        said = told(found, f"at+kd: {term}")[1]
        assert f"(weight {weights[term]:g}, the task's 0.5)" in said
        cure |= cured(said)["weights"]
    found = look(method="at+kd", weights={"task": 0.5, **cure})
    for term in ("at", "kd"):
        ratio = re.match(r"its gradient is ([\d.]+) x", told(found, f"at+kd: {term}")[1])
        assert ratio
        assert float(ratio[1]) == pytest.approx(1, abs=0.006)


def test_the_median_of_eight_batches_counts(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []

    def watched(cohort: Any, count: int, epoch: int | None = None) -> Any:
        asked.append((count, epoch))
        found = pulls(cohort, count, epoch)
        if count == 8:
            (each,) = (pull for of_student in found.values() for pull in of_student.values())
            ratios = [pull.norm / pull.of_task for pull in each]
            assert len(ratios) == 8
            assert max(ratios) > 1.02 * min(ratios)
            asked.append((0, round(1e6 * statistics.median(ratios))))
        return found

    monkeypatch.setattr(doctor, "pulls", watched)
    said = told(look(method="kd", weights={"kd": 1.0}), "kd: kd")[1]
    assert asked[0] == (8, 1)
    assert float(LINE.match(said)[1]) == pytest.approx(asked[1][1] / 1e6, rel=5e-3)  # type: ignore[index,operator]


@pytest.mark.parametrize(
    ("factor", "verdict", "words"),
    [(11, "look", "over 10 x"), (9, "ok", ""), (0.011, "ok", ""), (0.009, "look", "under 0.01 x: it does next to nothing")],
)
def test_thresholds(factor: float, verdict: str, words: str, look: Look) -> None:
    equal = cured(told(look(method="at"), "at: at")[1])["weights"]["at"]
    found = told(look(method="at", weights={"at": equal * factor}), "at: at")
    assert found[0] == verdict
    assert words in found[1]
    assert f"--set weights.at={equal:g} would equal it" in found[1]


def test_a_term_without_weight_does_not_count_and_still_has_a_weight_that_would_do(look: Look) -> None:
    verdict, said = told(look(method="at", weights={"at": 0.0}), "at: at")
    assert verdict == "ok"
    assert re.fullmatch(r"its gradient is 0 x the task's \(weight 0\): it does not count; --set weights.at=[\d.]+ would equal it", said)


def test_no_task_beside_it(look: Look) -> None:
    end = r"its gradient has the norm [\d.]+ \(weight \d+\); the task is not trained beside it, so there is nothing to compare"
    for found in (
        told(look(method="kd", weights={"task": 0.0}), "kd: kd"),
        told(look(method="kd", train={"mixup": True}, weights={"task": 0.0}), "kd: kd"),
        told(look(method="fsp", options={"fsp": {"schedule": "two-stage", "stage_epochs": 1}}), "fsp: fsp"),
    ):
        assert found[0] == "ok"
        assert re.fullmatch(end, found[1]), found


def test_a_strength_that_grows_with_the_epochs_is_told(look: Look) -> None:
    """dkd begins at 1/20 in the first of twenty epochs, and its weight is judged by the last."""
    given = {"method": "dkd", "train": {"epochs": 20}}
    said = told(look(**given), "dkd: dkd")[1]
    assert said.endswith("; this is in the last epoch, and 0.05 times as much in the first")
    full = told(look(method="dkd", options={"dkd": {"warmup": 1}}), "dkd: dkd")[1]
    assert LINE.match(said)[1] == LINE.match(full)[1]  # type: ignore[index]
    assert "last epoch" not in full


class Broken(torch.autograd.Function):
    """A sum whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full((64, 10), torch.nan)


def broken(logits: Tensor, now: bool) -> Tensor:
    """A term whose gradient is NaN by now."""
    return Broken.apply(logits) if now else logits.square().mean()


SILENT = "on the first 8 batches: it does nothing at first, whatever its weight (1)"
UNREACHED = "it reaches no weight of the student that the task trains (weight 1); there is nothing to compare"


@pytest.mark.parametrize(
    ("term", "verdict", "words"),
    [
        (lambda logits, _: 0 * logits.sum(), "look", f"it is 0 {SILENT}"),
        (lambda logits, _: 0 * logits.sum() + 2, "look", f"its gradient is 0 {SILENT}"),
        (lambda logits, step: logits.square().mean() * (step % 2), "ok", "; it is 0 on 4 of the first 8 batches"),
        (lambda logits, _: logits.detach().sum(), "look", UNREACHED),
        (lambda logits, step: broken(logits, step > 1), "wrong", "its gradient is not finite on 8 of the first 8 batches (weight 1)"),
        (lambda logits, step: broken(logits, step == 4), "wrong", "its gradient is not finite on 1 of the first 8 batches (weight 1)"),
    ],
    ids=["zero", "constant", "zero at times", "detached", "broken", "broken once"],
)
def test_terms_that_can_not_be_compared(
    term: Callable[[Tensor, int], Tensor], verdict: str, words: str, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)
    monkeypatch.setattr(METHODS["kd"], "forward", lambda _method, student, *_: {"kd": term(student.logits, next(calls))})
    found = told(look(method="kd", weights={"kd": 1.0}), "kd: kd")
    assert found[0] == verdict
    assert found[1].endswith(words)


def test_what_training_refuses_is_wrong(look: Look) -> None:
    verdict, said = told(look(method="at", weights={"at": 1e9}), "at: at")
    assert verdict == "wrong"
    assert re.search(
        r", [\d.e+]+ x the task's at weight 1 on the whole network: over 1000 x training diverges; --set weights.at=[\d.]+ would equal it$",
        said,
    )


def test_what_training_refuses_is_wrong_without_a_task_too(look: Look) -> None:
    verdict, said = told(look(method="at", weights={"at": 1e9, "task": 0.0}), "at: at")
    assert verdict == "wrong"
    assert "over 1000 x training diverges; --set weights.at=" in said
    assert told(look(method="at", weights={"task": 0.0, **cured(said)["weights"]}), "at: at")[0] == "ok"


def test_peers_have_a_line_each(look: Look) -> None:
    found = [finding for finding in look(method="dml", teacher=None) if finding.check == "dml: dml"]
    assert len(found) == 2
    assert all(LINE.match(finding.found) for finding in found)


def test_distill_says_where_a_weight_is_proposed(small_npz: Path, trained: Ledger) -> None:
    lines: list[str] = []
    watcher = Watcher()
    watcher.say = lines.append  # type: ignore[method-assign,assignment]

    def weighted(weight: float) -> RunConfig:
        return config(small_npz, method="at", teacher="1", weights={"at": weight}, train={"epochs": 1})

    run([weighted(1.0), weighted(2000.0)], trained, CPU, watcher=watcher)
    quiet, loud = (line for line in lines if "gradient of at" in line)
    assert quiet.endswith("x the task's (weight 1)")
    assert loud.endswith("x the task's (weight 2000); over 10 x: flowdistill doctor, with the same options, proposes a weight")
