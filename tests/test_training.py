"""The engine: it computes what the plain loop computes, a cohort changes nothing, and the guards hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.cohorts import a_cohort, a_student, a_teacher, weights_of
from helpers.command import command
from helpers.small import config
from torch import Tensor

from flowdistill import methods, models
from flowdistill.checks import UserError
from flowdistill.config import TrainConfig
from flowdistill.data.batches import DeviceData, SeedBatches
from flowdistill.data.dataset import ImageData
from flowdistill.ledger import Ledger
from flowdistill.models import Network
from flowdistill.training import cohort as engine
from flowdistill.training import teacher as teaching
from flowdistill.training.cohort import train
from flowdistill.training.gradients import first_gradients, gradient_ratios
from flowdistill.training.student import Student
from flowdistill.training.teacher import teach
from flowdistill.training.weights import hash_weights

CPU = torch.device("cpu")


def sgd(parameters: Iterable[Tensor], train: TrainConfig) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


def plain_loop(
    net: Network,
    teacher: Network,
    stream: SeedBatches,
    rates: dict[int, float],
    optimizer: torch.optim.SGD,
    task: float = 1,
    fsp: float = 1,
) -> None:
    """FSP + CE as a user would write it from the paper: no engine, no schedule object, einsum for the matrices; epoch -> its rate."""
    for epoch, rate in rates.items():
        for group in optimizer.param_groups:
            group["lr"] = rate
        net.train()
        for images, batch in stream.epoch(epoch):
            given = net(images)
            with torch.no_grad():
                teacher_outputs = teacher(images)
            flow = []
            for first, second in (("stem", "stage1"), ("stage1", "stage2"), ("stage2", "stage3")):
                matrices = []
                for maps in (given.maps, teacher_outputs.maps):
                    a, b = maps[first], maps[second]
                    a = a if a.shape == b.shape or first == "stem" else F.max_pool2d(a, 2)
                    matrices.append(torch.einsum("nchw,ndhw->ncd", a, b) / (b.shape[2] * b.shape[3]))
                flow.append((matrices[0] - matrices[1]).square().mean())
            loss = task * F.cross_entropy(given.logits, batch.labels) + fsp * sum(flow) / 3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def same_weights(ours: Network, theirs: Network) -> None:
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-5), name


RECIPE = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.02}  # not the defaults, and a decay that shows after a few steps


def test_the_engine_is_the_plain_loop(data: ImageData, small_npz: Path) -> None:
    run = config(small_npz, method="fsp", teacher="-", weights={"task": 0.5, "fsp": 3.0}, train={"epochs": 4, **RECIPE})
    cohort, (student,) = a_cohort(data, [run])
    plain = models.build("resnet8", cohort.data.spec, taps=("stem", "stage1", "stage2", "stage3"), seed=run.seed)
    stream, teacher = SeedBatches(cohort.data, run.seed, run.train.batch_size), a_teacher(cohort.data).net
    plain_loop(plain, teacher, stream, {0: 0.05, 1: 0.05, 2: 0.005, 3: 0.0005}, sgd(plain.parameters(), run.train), task=0.5, fsp=3)
    for _ in train(cohort):
        pass
    same_weights(student.net, plain)


def test_two_stages_are_two_plain_loops_each_with_an_optimiser_of_its_own(data: ImageData, small_npz: Path) -> None:
    options = {"fsp": {"schedule": "two-stage", "stage_epochs": 2, "stage_lr": 0.03}}
    run = config(small_npz, method="fsp", teacher="-", options=options, train={"epochs": 2, **RECIPE})
    cohort, (student,) = a_cohort(data, [run])
    plain = models.build("resnet8", cohort.data.spec, taps=("stem", "stage1", "stage2", "stage3"), seed=run.seed)
    stream, teacher = SeedBatches(cohort.data, run.seed, run.train.batch_size), a_teacher(cohort.data).net
    body = [value for name, value in plain.named_parameters() if not name.startswith("fc.")]
    plain_loop(plain, teacher, stream, {0: 0.03, 1: 0.03}, sgd(body, run.train), task=0)
    plain_loop(plain, teacher, stream, {2: 0.05, 3: 0.005}, sgd(plain.parameters(), run.train), fsp=0)
    for _ in train(cohort):
        pass
    same_weights(student.net, plain)


def test_a_cohort_of_k_is_k_separate_runs_bit_for_bit(data: ImageData, small_npz: Path) -> None:
    runs = [config(small_npz, method=method, teacher="-", seed=seed) for seed in (0, 1) for method in ("base", "fsp", "at+kd")]
    together, students = a_cohort(data, runs)
    for _ in train(together):
        pass
    for run, student in zip(runs, students, strict=True):
        alone, (single,) = a_cohort(data, [run])
        for _ in train(alone):
            pass
        assert weights_of(single) == weights_of(student), run.method


def test_an_adapter_leaves_the_initial_weights_and_batches_alone(data: ImageData, small_npz: Path) -> None:
    run, on_device = config(small_npz, method="fsp", teacher="-", options={"fsp": {"adapter": "conv1x1"}}), DeviceData(data, "full", CPU)
    adapters, weights, batches = [], [], []
    for wider in (0, 8):
        torch.manual_seed(0)  # an adapter moves the global generator here
        student = a_student(run, on_device, wider)
        adapters.append(len(list(student.method.parameters())))
        weights.append(weights_of(student))
        batches.append(next(SeedBatches(on_device, run.seed, 64).epoch(0))[0])
    assert adapters == [0, 4]
    assert weights[0] == weights[1]
    assert torch.equal(*batches)


def test_different_seeds_differ_and_seed_zero_is_a_seed(data: ImageData, small_npz: Path) -> None:
    cohort, students = a_cohort(data, [config(small_npz, seed=seed) for seed in (0, 1)])
    repeat, again = a_cohort(data, [config(small_npz, seed=0)])
    for part in (cohort, repeat):
        for _ in train(part):
            pass
    assert weights_of(students[0]) == weights_of(again[0]) != weights_of(students[1])


def test_bf16_stays_close_to_fp32_on_the_first_epoch(data: ImageData, small_npz: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        cohort, (student,) = a_cohort(data, [config(small_npz, method="fsp", teacher="-")], precision)
        losses[precision] = next(train(cohort)).progress[student].terms
    for term, value in losses["fp32"].items():
        assert losses["bf16"][term] == pytest.approx(value, rel=0.1), term  # 8 bits of mantissa over 4 steps


def test_each_epoch_reports_every_term_and_counts_every_image(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="at+kd", teacher="-")])
    steps = []
    reports = list(train(cohort, lambda: steps.append(1)))
    assert [report.epoch for report in reports] == [1, 2]
    assert len(steps) == 2 * (300 // 64)
    assert set(reports[0].progress[student].terms) == {"task", "at", "kd"}
    evaluation = reports[-1].progress[student].evaluation
    assert evaluation is not None
    assert len(evaluation.classes) == 150
    assert reports[-1].progress[student].correct == int((evaluation.classes == cohort.data.test.labels).sum())


def test_reported_terms_are_unweighted_means_over_the_steps_of_their_epoch(data: ImageData, small_npz: Path) -> None:
    run = config(small_npz, method="logits", teacher="-", weights={"task": 0.5, "logits": 3.0}, train={"lr": 1e-12})  # stands still
    cohort, (student,) = a_cohort(data, [run])
    net, teacher = models.build("resnet8", cohort.data.spec, seed=run.seed), a_teacher(cohort.data).net
    for epoch, report in enumerate(train(cohort)):
        task, logits = [], []
        for images, batch in SeedBatches(cohort.data, run.seed, run.train.batch_size).epoch(epoch):
            given, teacher_outputs = net(images).logits, teacher(images).logits
            task.append(F.cross_entropy(given, batch.labels).item())
            logits.append((given - teacher_outputs).square().mean().item())
        expected = {"task": sum(task) / len(task), "logits": sum(logits) / len(logits)}
        assert report.progress[student].terms == pytest.approx(expected, rel=1e-5)


def test_teacher_and_student_match_on_one_and_the_same_mixed_view(data: ImageData, small_npz: Path) -> None:
    """Function matching: both see the identical tensor, another one each step; kd on it is all that counts, and no task is recorded."""
    weights = {"task": 0.0, "kd": 2.0}
    run = config(small_npz, method="kd", teacher="-", crop="resized", weights=weights, options={"kd": {"T": 10.0}}, train={"mixup": True})
    cohort, (student,) = a_cohort(replace(data, crop="resized", pad=0), [run])
    teacher = cohort.seed_groups[0].teacher
    assert teacher is not None
    plain, seen = models.build("resnet8", cohort.data.spec, seed=run.seed), {student.net: [], teacher.net: []}
    optimizer, stream = sgd(plain.parameters(), run.train), SeedBatches(cohort.data, run.seed, run.train.batch_size, mixup=True)
    hooks = [net.register_forward_pre_hook(lambda net, given: seen[net].append(given[0])) for net in seen]
    reports = []
    for report in train(cohort):
        shown = list(seen[teacher.net])
        assert all(ours is theirs for ours, theirs in zip(seen[student.net], shown, strict=False))
        assert len({float(images.sum()) for images in shown}) == len(shown) == 300 // 64
        reports.append(report)
        for inputs in seen.values():
            inputs.clear()
    for hook in hooks:
        hook.remove()
    for epoch, (rate, report) in enumerate(zip((0.05, 0.005), reports, strict=True)):
        optimizer.param_groups[0]["lr"], losses = rate, []
        plain.train()
        for images, batch in stream.epoch(epoch):
            assert batch.labels is None
            ours, theirs = plain(images).logits / 10, teacher.teach(images).logits / 10
            loss = 100 * (theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1).mean()
            optimizer.zero_grad()
            (2 * loss).backward()
            optimizer.step()
            losses.append(loss.item())
        assert report.progress[student].terms == {"kd": pytest.approx(sum(losses) / len(losses), rel=1e-3)}
    same_weights(student.net, plain)


def test_the_first_gradients_of_a_mixed_run_are_those_of_plain_images(data: ImageData, small_npz: Path) -> None:
    ratios = []
    for mixup in (False, True):
        run = config(small_npz, method="kd", teacher="-", weights={"task": 0.0}, train={"mixup": mixup})
        cohort, (student,) = a_cohort(data, [run])
        student.begin_phase(0)
        ratios.append(first_gradients(cohort)[student])
    assert ratios[0] == ratios[1]
    assert ratios[0].keys() == {"kd"}


def test_two_stages_train_fsp_alone_without_the_head_then_the_task_alone(data: ImageData, small_npz: Path) -> None:
    options = {"fsp": {"schedule": "two-stage", "stage_epochs": 2, "stage_lr": 0.03}}
    cohort, (student,) = a_cohort(data, [config(small_npz, method="fsp", teacher="-", options=options, train={"epochs": 2})])
    head = {name: value.clone() for name, value in student.net.fc.named_parameters()}
    seen = []
    for report in train(cohort):
        progress = report.progress[student]
        seen.append((report.epoch, report.phase, round(progress.lr, 6), set(progress.terms)))
        untouched = all(torch.equal(value, head[name]) for name, value in student.net.fc.named_parameters())
        assert untouched == (report.phase == 0), "the head moves in stage two, and neither step nor decay touches it in stage one"
    assert seen[0] == (1, 0, 0.03, {"task", "fsp"})
    assert [(phase, terms) for _, phase, _, terms in seen[2:]] == [(1, {"task"}), (1, {"task"})]
    assert seen[2][2] == 0.05


def test_a_method_without_a_teacher_is_trained_and_reported(data: ImageData, small_npz: Path) -> None:
    run = config(small_npz, method="tf_kd", weights={"task": 0.5, "tf_kd": 3.0}, train={"epochs": 4, **RECIPE})
    cohort, (student,) = a_cohort(data, [run])
    cohort.seed_groups[0].teacher = None
    plain = models.build("resnet8", cohort.data.spec, seed=run.seed)
    optimizer, stream = sgd(plain.parameters(), run.train), SeedBatches(cohort.data, run.seed, run.train.batch_size)
    assert first_gradients(cohort)[student].keys() == {"tf_kd"}
    for (epoch, rate), report in zip({0: 0.05, 1: 0.05, 2: 0.005, 3: 0.0005}.items(), train(cohort), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        sums = torch.zeros(2)
        plain.train()
        for images, batch in stream.epoch(epoch):
            logits = plain(images).logits
            virtual = torch.full_like(logits, 0.01 / (logits.shape[1] - 1)).scatter(1, batch.labels[:, None], 0.99)
            terms = torch.stack(
                [F.cross_entropy(logits, batch.labels), F.kl_div(logits.log_softmax(1), (virtual / 20).softmax(1), reduction="none").mean()]
            )
            optimizer.zero_grad()
            (0.5 * terms[0] + 3 * terms[1]).backward()
            optimizer.step()
            sums += terms.detach() / stream.steps
        found = report.progress[student].terms
        assert [found["task"], found["tf_kd"]] == pytest.approx(sums.tolist(), rel=1e-3)
    same_weights(student.net, plain)


def test_a_teacher_in_the_lane_changes_nothing_for_a_method_without_one(data: ImageData, small_npz: Path) -> None:
    runs = [config(small_npz, method=method, teacher="-") for method in ("tf_kd", "kd")]
    together, students = a_cohort(data, runs)
    alone, (student,) = a_cohort(data, runs[:1])
    alone.seed_groups[0].teacher = None
    for cohort in (together, alone):
        for _ in train(cohort):
            pass
    assert together.seed_groups[0].needs_teacher
    assert not alone.seed_groups[0].needs_teacher
    assert weights_of(students[0]) == weights_of(student)


def test_a_method_without_a_teacher_trains_by_the_command_line_and_in_a_composition(small_npz: Path, tmp_path: Path) -> None:
    words = ("--student", "resnet8", "--dataset", f"npz:{small_npz}", "--epochs", "1", "--batch-size", "64", "--set", "data.pad=1")
    said = command(tmp_path, "distill", "--method", "tf_kd", *words)
    assert said.code == 0, said.err
    assert "gradient of tf_kd on the first batch" in said.err
    (run,) = Ledger(tmp_path / "runs").runs()
    assert (run.status, run.method, run.teacher, run.config["weights"]) == ("finished", "tf_kd", "-", {"task": 1.0, "tf_kd": 10.0})
    assert methods.resolve("kd+tf_kd", {}, {}).uses_teacher
    with pytest.raises(UserError, match=r"'tf_kd\+base': 'base' is training on labels alone"):
        methods.resolve("tf_kd+base", {}, {})


def test_stage_two_runs_no_teacher(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(teaching, "teach", lambda *args: calls.append(1) or teach(*args))
    options = {"fsp": {"schedule": "two-stage", "stage_epochs": 1}}
    cohort, _ = a_cohort(data, [config(small_npz, method="fsp", teacher="-", options=options, train={"epochs": 3})])
    for _ in train(cohort):
        pass
    assert len(calls) == 300 // 64


def test_the_teacher_runs_once_a_batch_for_all_students_of_a_seed(
    data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(teaching, "teach", lambda *args: calls.append(1) or teach(*args))
    cohort, _ = a_cohort(data, [config(small_npz, method=method, teacher="-", train={"epochs": 1}) for method in ("at", "fsp", "kd")])
    for _ in train(cohort):
        pass
    assert len(calls) == 300 // 64


def test_one_student_diverges_and_the_others_go_on(data: ImageData, small_npz: Path) -> None:
    runs = [config(small_npz, method=method, teacher="-", weights=weights) for method, weights in (("base", {}), ("fsp", {"fsp": 1e30}))]
    cohort, (calm, wild) = a_cohort(data, runs)
    reports = list(train(cohort))
    assert "diverged in epoch 1" in reports[0].progress[wild].error
    assert "not finite" in reports[0].progress[wild].error
    assert wild not in reports[1].progress
    assert reports[1].progress[calm].error == ""
    alone, (single,) = a_cohort(data, runs[:1])
    for _ in train(alone):
        pass
    assert weights_of(single) == weights_of(calm)


def test_a_broken_weight_that_no_logit_shows_ends_a_run(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="base", teacher="-")])
    student.net.unused = torch.nn.Parameter(torch.tensor(float("nan")))
    (report,) = train(cohort)
    assert "diverged in epoch 1: its weight unused is not finite" in report.progress[student].error


def test_a_cohort_whose_students_all_diverged_stops(data: ImageData, small_npz: Path) -> None:
    cohort, _ = a_cohort(data, [config(small_npz, method="fsp", teacher="-", weights={"fsp": 1e30}, train={"epochs": 5})])
    assert len(list(train(cohort))) == 1


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("train mode", "the teacher left eval mode"),
        ("gradient", "the teacher is no longer frozen"),
        ("buffer", "a weight or a buffer of the teacher changed"),
        ("weight", "a weight or a buffer of the teacher changed"),
    ],
)
def test_a_teacher_that_changes_is_noticed(
    data: ImageData, small_npz: Path, harm: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "fold", lambda net: net)
    cohort, _ = a_cohort(data, [config(small_npz, method="fsp", teacher="-")])
    teacher = cohort.seed_groups[0].teacher
    assert teacher is not None
    if harm == "train mode":
        teacher.net.layer1.train()
    elif harm == "gradient":
        teacher.net.fc.requires_grad_(True)
    else:
        (teacher.net.bn1.running_mean if harm == "buffer" else teacher.net.fc.weight).add_(1e-6)
    with pytest.raises(RuntimeError, match=words):
        next(train(cohort))


def test_the_teacher_stays_as_it_was_and_students_train_in_train_mode(
    data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "fold", lambda net: net)  # one with statistics that could move
    cohort, (student,) = a_cohort(data, [config(small_npz, method="fsp", teacher="-")])
    teacher = cohort.seed_groups[0].teacher
    assert teacher is not None
    before = hash_weights(teacher.net.state_dict())
    statistics = student.net.bn1.running_mean.clone()
    modes = []
    for _ in train(cohort, lambda: modes.append(student.net.training)):
        pass
    assert hash_weights(teacher.net.state_dict()) == before
    assert not torch.equal(student.net.bn1.running_mean, statistics)
    assert all(modes)


def test_adapters_are_trained(data: ImageData, small_npz: Path) -> None:
    student = a_student(config(small_npz, method="fsp", teacher="-"), DeviceData(data, "full", CPU))
    student.method.add_module("adapter", torch.nn.Conv2d(1, 1, 1))
    student.begin_phase(0)
    optimised = {id(p) for group in student.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in (*student.net.parameters(), *student.method.parameters())}


def test_gradient_ratios_are_those_of_autograd_and_change_nothing(data: ImageData, small_npz: Path) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, method="logits", teacher="-", weights={"logits": 3.0})])
    seed_group = cohort.seed_groups[0]
    assert seed_group.teacher is not None
    images, batch = next(seed_group.batches.epoch(0))
    teacher_outputs = seed_group.teacher.teach(images)
    before = weights_of(student)
    found = gradient_ratios((student,), images, teacher_outputs, batch, "fp32")[student]
    assert weights_of(student) == before
    assert all(p.grad is None for p in student.net.parameters())
    norms = []
    for of in (lambda logits: F.cross_entropy(logits, batch.labels), lambda logits: 3 * (logits - teacher_outputs.logits).square().mean()):
        student.net.zero_grad()
        of(student.net(images).logits).backward()
        norms.append(torch.cat([p.grad.flatten() for p in student.net.parameters()]).norm())
    assert found["logits"] == pytest.approx(float(norms[1] / norms[0]), rel=1e-4)


def test_a_mistake_in_a_method_is_not_put_down_to_the_student(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object) -> None:
        raise TypeError("of the method")

    cohort, (student,) = a_cohort(data, [config(small_npz, method="logits", teacher="-")])
    monkeypatch.setattr(student.method, "forward", mistaken)
    with pytest.raises(TypeError, match=r"^of the method$"):
        first_gradients(cohort)


def answers(monkeypatch: pytest.MonkeyPatch, correct: list[int]) -> None:
    """Have the epochs' measurements count so many right answers."""
    measured, script = engine._measure, iter(correct)

    def scripted(*args: object) -> dict[Student, engine.Progress]:
        progress = measured(*args)  # type: ignore[arg-type]
        for one in progress.values():
            one.correct = next(script)
        return progress

    monkeypatch.setattr(engine, "_measure", scripted)


def test_holdout_ships_the_best_epoch_on_held_out_images_the_earliest_on_ties(
    data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz, train={"epochs": 4})], split="holdout")
    answers(monkeypatch, [5, 9, 9, 2])
    hashes = [weights_of(student) for _ in train(cohort)]
    student.restore_chosen()
    assert student.chosen_epoch == 2
    assert weights_of(student) == hashes[1] != hashes[3]


def test_full_runs_ship_the_last_epoch(data: ImageData, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort, (student,) = a_cohort(data, [config(small_npz)])
    answers(monkeypatch, [9, 5])
    hashes = [weights_of(student) for _ in train(cohort)]
    student.restore_chosen()
    assert (student.chosen_epoch, weights_of(student)) == (2, hashes[-1])


def test_training_leaves_the_global_generator_alone(data: ImageData, small_npz: Path) -> None:
    before = torch.get_rng_state()
    cohort, _ = a_cohort(data, [config(small_npz, method="fsp", teacher="-")])
    for _ in train(cohort):
        pass
    assert torch.equal(torch.get_rng_state(), before)
