"""From config to record: teachers, skipping, failing, files, measuring again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small import config
from safetensors import safe_open

from flowdistill import UserError, models
from flowdistill.data.sources import read_npz
from flowdistill.ledger import Ledger, Run
from flowdistill.runner import Watcher, evaluate, load_network, run
from flowdistill.training import engine
from flowdistill.training.weights import hash_weights, load_weights, save_weights
from flowdistill.types import DataSpec

CPU = torch.device("cpu")
ONE = {"epochs": 1}


class Ear(Watcher):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def teachers(ledger: Ledger, data: Path, seeds: range, model: str = "resnet8", **keys: object) -> list[Run]:
    return run([config(data, student=model, seed=seed, train=ONE, **keys) for seed in seeds], ledger, CPU)


def test_a_run_leaves_its_row_its_curve_and_its_files(ledger: Ledger, small_npz: Path) -> None:
    (teacher,) = teachers(ledger, small_npz, range(7, 8), "resnet14")
    (done,) = run([config(small_npz, method="fsp", teacher="resnet14")], ledger, CPU)
    assert (done.status, done.teacher, done.teacher_run, done.dataset, done.seed) == ("finished", "resnet14", teacher.no, "small", 0)
    assert done.images == 150
    assert done.teacher_accuracy == teacher.accuracy
    assert done.config["options"]["fsp"]["pairing"] == "cross"
    assert done.config["weights"] == {"task": 1.0, "fsp": 1.0}
    curve = ledger.epochs(done.no)
    assert [epoch.epoch for epoch in curve] == [1, 2]
    assert (curve[-1].correct, curve[-1].images) == (done.correct, 150)
    assert done.best_correct == max(epoch.correct or 0 for epoch in curve)
    folder = ledger.run_folder(done.no)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "journal.jsonl",
        "predictions.npz",
        "run.json",
        "student.safetensors",
    ]
    assert json.loads((folder / "run.json").read_text())["correct"] == done.correct


def test_the_students_file_holds_the_student_only(ledger: Ledger, small_npz: Path) -> None:
    teachers(ledger, small_npz, range(7, 8), "resnet14")
    (done,) = run([config(small_npz, method="fsp", teacher="resnet14", options={"fsp": {"adapter": "conv1x1"}})], ledger, CPU)
    with safe_open(ledger.run_folder(done.no) / "student.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(models.build("resnet8", load_spec(small_npz)).state_dict())
    weights, about = load_weights(ledger.run_folder(done.no) / "student.safetensors")
    assert hash_weights(weights) == done.weights_hash
    assert about["model"] == "resnet8"


def load_spec(path: Path) -> DataSpec:
    return read_npz(path).spec


def test_predictions_are_those_that_were_counted(ledger: Ledger, small_npz: Path) -> None:
    (done,) = teachers(ledger, small_npz, range(1))
    with np.load(ledger.run_folder(done.no) / "predictions.npz") as predictions, np.load(small_npz) as data:
        assert int((predictions["classes"] == data["y_test"]).sum()) == done.correct
        assert predictions["probabilities"].shape == (150,)
        assert (predictions["probabilities"] >= 0.1 - 1e-6).all()


def test_evaluate_measures_the_file_as_it_was_measured(ledger: Ledger, small_npz: Path) -> None:
    (done,) = teachers(ledger, small_npz, range(1))
    measured = evaluate(ledger.run_folder(done.no) / "student.safetensors", CPU)
    assert (measured.correct, measured.images, measured.data) == (done.correct, 150, "as trained")


def test_a_finished_run_is_skipped_and_again_repeats_it(ledger: Ledger, small_npz: Path) -> None:
    (first,) = teachers(ledger, small_npz, range(1))
    ear = Ear()
    (second,) = run([config(small_npz, train=ONE)], ledger, CPU, watcher=ear)
    assert second.no == first.no
    assert "skipped" in ear.lines[0]
    (third,) = run([config(small_npz, train=ONE)], ledger, CPU, again=True)
    assert (third.no, third.weights_hash) == (2, first.weights_hash)


def test_runs_come_back_in_the_order_of_their_configs(ledger: Ledger, small_npz: Path) -> None:
    configs = [config(small_npz, seed=seed, train={**ONE, "lr": lr}) for seed, lr in ((3, 0.1), (1, 0.2), (2, 0.1), (0, 0.2))]
    assert [(r.seed, r.lr) for r in run(configs, ledger, CPU)] == [(3, 0.1), (1, 0.2), (2, 0.1), (0, 0.2)]


def test_student_k_takes_teacher_k_plus_one_mod_m(ledger: Ledger, small_npz: Path) -> None:
    trained = teachers(ledger, small_npz, range(3))
    students = run([config(small_npz, method="kd", teacher="resnet8", seed=seed, train=ONE) for seed in range(4)], ledger, CPU)
    assert [student.teacher_run for student in students] == [trained[(seed + 1) % 3].no for seed in range(4)]


def test_no_student_gets_a_teacher_that_began_where_it_begins(ledger: Ledger, small_npz: Path) -> None:
    trained = teachers(ledger, small_npz, range(1, 3))
    students = run([config(small_npz, method="kd", teacher="resnet8", seed=seed, train=ONE) for seed in (1, 2)], ledger, CPU)
    inits = {one.no: one.init_hash for one in trained}
    assert all(inits[student.teacher_run or 0] != student.init_hash for student in students)
    with pytest.raises(UserError, match="initial weights"):
        run([config(small_npz, method="kd", teacher=str(trained[0].no), seed=1, train=ONE)], ledger, CPU)


def test_the_only_teacher_began_where_the_student_begins(ledger: Ledger, small_npz: Path) -> None:
    teachers(ledger, small_npz, range(1))
    with pytest.raises(UserError, match=r"flowdistill train --model resnet8 --dataset npz:\S+ --seeds 100"):
        run([config(small_npz, method="kd", teacher="resnet8", train=ONE)], ledger, CPU)


def test_teachers_are_those_with_the_most_epochs_whatever_their_accuracy(ledger: Ledger, small_npz: Path) -> None:
    (short,) = teachers(ledger, small_npz, range(5, 6))
    (long,) = run([config(small_npz, seed=5, train={"epochs": 2})], ledger, CPU)
    ledger.update(short.no, correct=150)
    ledger.update(long.no, correct=1)
    (student,) = run([config(small_npz, method="kd", teacher="resnet8", train=ONE)], ledger, CPU)
    assert student.teacher_run == long.no


def test_teachers_of_the_students_own_recipe_come_first_and_several_others_are_refused(ledger: Ledger, small_npz: Path) -> None:
    by_rate = {lr: run([config(small_npz, seed=5, train={**ONE, "lr": lr})], ledger, CPU)[0].no for lr in (0.02, 0.05, 0.01)}
    (student,) = run([config(small_npz, method="kd", teacher="resnet8", train={**ONE, "lr": 0.02})], ledger, CPU)
    assert student.teacher_run == by_rate[0.02]
    with pytest.raises(UserError, match=r"several recipes for 1 epochs \(runs 1, 2, 3\); name one: --teacher 1"):
        run([config(small_npz, method="kd", teacher="resnet8", train={**ONE, "lr": 0.03})], ledger, CPU)


def test_a_tuned_run_is_no_teacher_by_name(ledger: Ledger, small_npz: Path) -> None:
    (fresh,) = teachers(ledger, small_npz, range(5, 6))
    run([config(small_npz, student=str(fresh.no), seed=6, train=ONE)], ledger, CPU)
    (student,) = run([config(small_npz, method="kd", teacher="resnet8", seed=9, train=ONE)], ledger, CPU)
    assert student.teacher_run == fresh.no


def test_no_teacher_trained_prints_the_command_that_trains_one(ledger: Ledger, small_npz: Path) -> None:
    with pytest.raises(UserError, match=r"flowdistill train --model resnet20 --dataset npz:\S+ --seeds 100 --holdout"):
        run([config(small_npz, method="kd", teacher="resnet20", split="holdout")], ledger, CPU)


def test_a_holdout_student_refuses_a_teacher_that_saw_the_held_out_images(ledger: Ledger, small_npz: Path) -> None:
    (full,) = teachers(ledger, small_npz, range(3, 4))
    with pytest.raises(UserError, match="held-out"):
        run([config(small_npz, method="kd", teacher=str(full.no), split="holdout", train=ONE)], ledger, CPU)
    (held,) = teachers(ledger, small_npz, range(3, 4), split="holdout")
    (student,) = run([config(small_npz, method="kd", teacher="resnet8", split="holdout", train=ONE)], ledger, CPU)
    assert student.teacher_run == held.no


def test_a_holdout_run_on_a_part_refuses_networks_of_another_part(ledger: Ledger, small_npz: Path) -> None:
    whole = [*teachers(ledger, small_npz, range(3, 4)), *teachers(ledger, small_npz, range(4, 5), split="holdout")]
    files = [str(ledger.run_folder(one.no) / "student.safetensors") for one in whole]
    for teacher in (*(str(one.no) for one in whole), *files):
        with pytest.raises(UserError, match=r"was trained on other images of npz:\S+, the held-out ones may be among them"):
            run([config(small_npz, method="kd", teacher=teacher, split="holdout", train=ONE, limit_train=200)], ledger, CPU)
    (held,) = run([config(small_npz, seed=5, split="holdout", train=ONE, limit_train=200)], ledger, CPU)
    (student,) = run([config(small_npz, method="kd", teacher=str(held.no), split="holdout", train=ONE, limit_train=200)], ledger, CPU)
    assert student.status == "finished"


def test_the_command_that_trains_a_teacher_names_the_part_of_the_data(ledger: Ledger, small_npz: Path) -> None:
    with pytest.raises(UserError, match=r"train one: flowdistill train .* --set data\.limit_train=200"):
        run([config(small_npz, method="kd", teacher="resnet8", train=ONE, limit_train=200)], ledger, CPU)


def test_a_holdout_run_refuses_first_weights_and_files_that_saw_the_held_out_images(ledger: Ledger, small_npz: Path) -> None:
    (full,) = teachers(ledger, small_npz, range(3, 4))
    file = str(ledger.run_folder(full.no) / "student.safetensors")
    for keys in ({"student": str(full.no)}, {"student": file}, {"method": "kd", "teacher": file}):
        with pytest.raises(UserError, match="held-out"):
            run([config(small_npz, split="holdout", train=ONE, **keys)], ledger, CPU)


def test_holdout_runs_read_test_once_and_keep_no_best_on_test(ledger: Ledger, small_npz: Path) -> None:
    (done,) = run([config(small_npz, split="holdout")], ledger, CPU)
    assert (done.images, done.best_correct, done.best_epoch) == (150, None, None)
    curve = ledger.epochs(done.no)
    assert {epoch.images for epoch in curve} == {30}
    best = max(epoch.correct or 0 for epoch in curve)
    assert done.epoch == next(epoch.epoch for epoch in curve if epoch.correct == best)
    assert evaluate(ledger.run_folder(done.no) / "student.safetensors", CPU).correct == done.correct


def test_a_weights_file_teaches_and_its_hash_is_in_the_fingerprint(ledger: Ledger, small_npz: Path, tmp_path: Path) -> None:
    spec = load_spec(small_npz)
    fingerprints = []
    for seed in (11, 12):
        path = tmp_path / f"{seed}.safetensors"
        save_weights(path, models.build("resnet14", spec, seed=seed).state_dict(), {})
        (done,) = run([config(small_npz, method="kd", teacher=f"resnet14@{path}", train=ONE)], ledger, CPU)
        fingerprints.append(done.fingerprint)
        assert (done.teacher, done.teacher_run) == ("resnet14", None)
    assert fingerprints[0] != fingerprints[1]
    with pytest.raises(UserError, match="does not say its model"):
        run([config(small_npz, method="kd", teacher=str(path), train=ONE)], ledger, CPU)


def test_a_student_can_start_from_a_runs_weights(ledger: Ledger, small_npz: Path) -> None:
    (first,) = teachers(ledger, small_npz, range(1))
    (second,) = run([config(small_npz, student=str(first.no), train=ONE)], ledger, CPU)
    assert second.init_hash == first.weights_hash
    assert second.fingerprint != first.fingerprint


def test_a_diverged_run_is_recorded_and_others_finish(ledger: Ledger, small_npz: Path) -> None:
    good, bad = (config(small_npz, seed=seed, train={"epochs": 2}) for seed in (0, 1))

    original = engine.train_step

    def harmed(group: tuple[engine.Student], *args: object, **keys: object) -> None:
        original(group, *args, **keys)  # type: ignore[arg-type]
        (student,) = group
        if hash_of_first[0] is None:
            hash_of_first[0] = student
        if student is not hash_of_first[0]:
            student.sums["task"].mul_(float("nan"))

    hash_of_first: list[engine.Student | None] = [None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_step", harmed)
        finished, failed = run([good, bad], ledger, CPU)
    assert (finished.status, failed.status) == ("finished", "failed")
    assert failed.error.startswith("diverged in epoch 1: task is not finite from batch ")
    assert ledger.epochs(failed.no)[0].correct is None
    assert not (ledger.run_folder(failed.no) / "student.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the device fell out")])
def test_what_stops_a_run_from_outside_is_recorded_as_an_interruption(ledger: Ledger, small_npz: Path, error: BaseException) -> None:
    class Stop(Watcher):
        def step(self) -> None:
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        run([config(small_npz)], ledger, CPU, watcher=Stop())
    (stopped,) = ledger.runs()
    assert stopped.status == "interrupted"
    assert stopped.error in ("KeyboardInterrupt", "the device fell out")


def test_a_gradient_a_thousand_times_the_tasks_is_refused_before_anything_is_recorded(ledger: Ledger, small_npz: Path) -> None:
    (teacher,) = teachers(ledger, small_npz, range(7, 8), "resnet14")
    with pytest.raises(UserError, match=r"gradient of fsp at weight 1e\+06 .* --set weights\.fsp="):
        run([config(small_npz, method="fsp", teacher="resnet14", weights={"fsp": 1e6})], ledger, CPU)
    assert [one.no for one in ledger.runs()] == [teacher.no]


def test_a_refusal_comes_before_any_cohort_is_trained(ledger: Ledger, small_npz: Path) -> None:
    (teacher,) = teachers(ledger, small_npz, range(7, 8), "resnet14")
    wild = config(small_npz, method="fsp", teacher="resnet14", weights={"fsp": 1e6}, train={"epochs": 1})
    with pytest.raises(UserError, match="gradient of fsp"):
        run([config(small_npz, train={"epochs": 2}), wild], ledger, CPU)
    assert [one.no for one in ledger.runs()] == [teacher.no]


def test_a_student_whose_last_step_broke_its_weights_is_failed(ledger: Ledger, small_npz: Path) -> None:
    (broken,) = run([config(small_npz, train={"epochs": 1, "batch_size": 300, "lr": 1e38})], ledger, CPU)
    assert broken.status == "failed"
    assert "its logits are not finite" in broken.error


def test_the_gradients_are_told_relative_to_the_task(ledger: Ledger, small_npz: Path) -> None:
    teachers(ledger, small_npz, range(7, 8), "resnet14")
    ear = Ear()
    run([config(small_npz, method="at+kd", teacher="resnet14", weights={"at": 2.0})], ledger, CPU, watcher=ear)
    told = [line for line in ear.lines if "gradient of" in line]
    assert [line.split("gradient of ")[1].split()[0] for line in told] == ["at", "kd"]
    assert all("x the task's (weight" in line for line in told)


def test_load_network_gives_the_trained_network(ledger: Ledger, small_npz: Path) -> None:
    (done,) = teachers(ledger, small_npz, range(1))
    net, about = load_network(ledger.run_folder(done.no) / "student.safetensors")
    assert not net.training
    assert hash_weights(net.state_dict()) == done.weights_hash
    assert about.input == (1, 8, 8)


def test_nothing_depends_on_who_else_is_trained(ledger: Ledger, small_npz: Path, tmp_path: Path) -> None:
    teachers(ledger, small_npz, range(7, 9), "resnet14")
    configs = [config(small_npz, method=method, teacher="resnet14", seed=seed) for method in ("base", "kd") for seed in (0, 1)]
    together = run(configs, ledger, CPU)
    alone = [run([one], ledger, CPU, again=True)[0] for one in configs]
    assert [one.weights_hash for one in together] == [one.weights_hash for one in alone]
    assert {one.cohort_size for one in together} == {4}


def test_students_of_one_seed_with_two_teachers_each_keep_their_own(ledger: Ledger, small_npz: Path) -> None:
    trained = teachers(ledger, small_npz, range(7, 9), "resnet14")
    configs = [config(small_npz, method="kd", teacher=str(one.no), train=ONE) for one in trained]
    together = run([config(small_npz, train=ONE), *configs], ledger, CPU, again=True)
    assert [one.teacher_run for one in together] == [None, *(one.no for one in trained)]
    assert [one.teacher_accuracy for one in together[1:]] == [one.accuracy for one in trained]
    alone = [run([one], ledger, CPU, again=True)[0] for one in configs]
    assert [one.weights_hash for one in together[1:]] == [one.weights_hash for one in alone]
