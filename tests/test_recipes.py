"""Recipes: what they set, who comes before them, and the rates that they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command import command

from flowdistill.checks import UserError
from flowdistill.config import validate
from flowdistill.methods import resolve
from flowdistill.models import canonical
from flowdistill.models.cifar_resnet import DEPTHS
from flowdistill.recipes import RECIPES, recipe
from flowdistill.training.schedule import lr_factor


def resolved(folder: Path, *words: str) -> dict[str, Any]:
    """What a dry run says of the config."""
    said = command(folder, "train", "--dataset", "digits", "--device", "cpu", "--dry-run", *words)
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)[0]["config"]
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_config_with_a_source(name: str) -> None:
    for student in recipe(name).made_for or ("resnet20", "mobilenetv2", "shufflenetv1"):
        validate({"student": student, **recipe(name).of(student)})
    assert len(RECIPES[name].source) > 20


def test_the_default_is_fsp_log() -> None:
    assert validate(recipe("fsp-log").of("resnet20")) == validate({})


def test_short_was_made_for_the_resnets_of_cifar_and_takes_no_other() -> None:
    assert recipe("short").made_for == tuple(f"resnet{depth}" for depth in DEPTHS)
    assert recipe("short").of("resnet20@weights.safetensors") == recipe("short").of("resnet20")
    train = validate({"student": "resnet20", **recipe("short").of("resnet20")}).train
    assert (train.epochs, train.batch_size, train.lr, train.weight_decay, train.schedule) == (48, 64, 0.1, 5e-4, "one-cycle")
    with pytest.raises(UserError, match=r"--recipe short: student 'resnet18' is none of those that it was made for: resnet8, resnet14, "):
        recipe("short").of("resnet18")


def test_deit_is_adamw_and_finetune_is_clipped_sgd() -> None:
    train = validate({"student": "vit.py:Small", **recipe("deit").of("vit.py:Small")}).train
    assert (train.optimizer, train.lr, train.weight_decay, train.decay_norm_and_bias) == (
        "adamw",
        5e-4 * train.batch_size / 512,
        0.05,
        False,
    )
    assert (train.label_smoothing, train.mixup, train.schedule, train.epochs) == (0.1, 0.8, "cosine", 300)
    assert (train.cutmix, train.random_erasing) == (1.0, 0.25)
    tuned = validate(recipe("finetune").of("resnet20")).train
    assert (tuned.optimizer, tuned.lr, tuned.weight_decay, tuned.clip, tuned.momentum) == ("sgd", 0.01, 0.0, 1.0, 0.9)


@pytest.mark.parametrize(("student", "lr"), [("resnet20", 0.05), ("vgg8", 0.05), ("mobilenetv2", 0.01), ("shufflenetv2", 0.01)])
def test_crd_falls_after_150_180_and_210_epochs_of_240(student: str, lr: float) -> None:
    train = validate({"student": student, **recipe("crd").of(student)}).train
    assert (train.epochs, train.batch_size, train.weight_decay, train.nesterov, train.momentum) == (240, 64, 5e-4, False, 0.9)
    rates = [lr * lr_factor("step", step=0, steps=1, epoch_share=e / 240, milestones=train.milestones) for e in range(240)]
    assert train.lr == lr
    assert [e for e in range(1, 240) if rates[e] < rates[e - 1]] == [150, 180, 210]


def test_what_is_given_beside_a_recipe_wins(tmp_path: Path) -> None:
    train = resolved(tmp_path, "--model", "resnet8", "--recipe", "crd", "--epochs", "7", "--set", "train.nesterov=true")["train"]
    assert (train["epochs"], train["lr"], train["nesterov"], train["milestones"]) == (7, 0.05, True, [0.625, 0.75, 0.875])


def test_a_recipe_lies_under_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[train]\nlr = 0.02\nepochs = 3\n")
    train = resolved(tmp_path, "--model", "resnet8", "--recipe", "r110-warm", "--config", "own.toml")["train"]
    assert (train["lr"], train["epochs"], train["warmup_epochs"]) == (0.02, 3, 1)


def test_smoke_is_one_epoch(tmp_path: Path) -> None:
    found = resolved(tmp_path, "--model", "resnet8", "--recipe", "smoke", "--batch-size", "32")
    assert (found["train"]["epochs"], found["data"]["limit_train"]) == (1, 2000)


def chosen(folder: Path, teacher: str, student: str, *words: str) -> dict[str, Any]:
    """What crd resolves to for this pair; a teacher is trained where the folder has none."""
    small = ("--dataset", "digits", "--set", "data.limit_train=40", "--batch-size", "8", "--device", "cpu")
    run = ("--epochs", "1", "--set", "train.milestones=[0.5]", *small)
    if not (folder / "runs").exists():
        assert command(folder, "train", "--model", teacher, "--seeds", "9", *run).code == 0
    said = command(folder, "distill", "--teacher", teacher, "--student", student, "--recipe", "crd", "--dry-run", *run, *words)
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)[0]["config"]
    return found


def test_crd_takes_what_a_methods_authors_set_for_a_pair(tmp_path: Path) -> None:
    pair = ("resnet56", "resnet20", "--method", "dkd")
    beta = [chosen(tmp_path, *pair, *own)["options"]["dkd"]["beta"] for own in ((), ("--set", "options.dkd.beta=3.0"))]
    assert beta == [2.0, 3.0]


def test_what_is_set_for_a_composition_comes_with_its_parts_in_any_order(tmp_path: Path) -> None:
    found = [chosen(tmp_path, "wrn-40-2", "wrn-40-1", "--method", method)["weights"] for method in ("kd+nd", "nd + kd", "nd")]
    assert found == [{"task": 1.0, "kd": 1.0, "nd": 1.5}, {"task": 1.0, "kd": 1.0, "nd": 1.5}, {"task": 1.0, "nd": 1.5}]


def test_function_matching_is_patient_mixed_and_without_labels(tmp_path: Path) -> None:
    run = ("--dataset", "digits", "--device", "cpu", "--batch-size", "32")
    assert command(tmp_path, "train", "--model", "resnet8", "--seeds", "9", "--epochs", "1", *run).code == 0
    pair = ("distill", "--teacher", "resnet8", "--student", "resnet8", "--recipe", "function-matching", "--dry-run", *run)
    own = ("--set", "options.kd.T=2.0", "--set", "weights.kd=3.0", "--epochs", "5")
    found = [command(tmp_path, *pair, "--method", method, *more).out for method, more in (("kd", ()), ("kd", own), ("at+kd,sp", ()))]
    (whole,), (changed,), several = ([one["config"] for one in json.loads(out)] for out in found)
    assert whole["train"] | {"mixup": True, "schedule": "cosine", "epochs": 1000} == whole["train"]
    assert whole["data"] | {"crop": "resized", "pad": 0} == whole["data"]
    assert (whole["options"], whole["weights"]) == ({"kd": {"T": 10.0}}, {"task": 0.0, "kd": 1.0})
    assert (changed["train"]["epochs"], changed["options"], changed["weights"]) == (5, {"kd": {"T": 2.0}}, {"task": 0.0, "kd": 3.0})
    assert [one["options"].get("kd") for one in several] == [{"T": 10.0}, None]
    assert [one["weights"]["task"] for one in several] == [0.0, 0.0]


@pytest.mark.parametrize(("method", "teacher", "student"), RECIPES["crd"].of_pair)
def test_what_is_set_for_a_pair_is_valid(method: str, teacher: str, student: str) -> None:
    values = RECIPES["crd"].of_pair[method, teacher, student]
    resolve(method, values.get("options", {}), values.get("weights", {}))
    assert {canonical(teacher), canonical(student)} == {teacher, student}


def test_the_command_lists_every_recipe(tmp_path: Path) -> None:
    rows = json.loads(command(tmp_path, "recipes", "--format", "json").out)
    assert [row["name"] for row in rows] == list(RECIPES)
    assert "lr=0.05" in next(row["values"] for row in rows if row["name"] == "crd")
