"""RunConfig: defaults, mistakes said in one line, files, and assignments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flowdistill.checks import UserError, did_you_mean, parse_seeds
from flowdistill.config import DataConfig, RunConfig, TrainConfig, assign, read_file, validate


def complaint(call: Callable[..., Any], *arguments: Any) -> str:
    """The line of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    line = str(error.value)
    assert "\n" not in line
    assert line == line.strip() != ""
    return line


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# Defaults


def test_an_empty_config_has_the_defaults() -> None:
    config = validate({})
    assert config.model_dump() == {
        "student": "resnet20",
        "teacher": None,
        "seed": 0,
        "split": "full",
        "data": {"name": "cifar10", "root": Path("data"), "pad": None, "flip": None, "limit_train": None},
        "train": {
            "epochs": 200,
            "batch_size": 128,
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "nesterov": False,
            "schedule": "step",
            "milestones": (0.5, 0.75),
            "warmup_epochs": 0,
            "precision": "auto",
        },
        "method": "base",
        "options": {},
        "weights": {},
    }


def test_part_of_a_table_keeps_the_other_defaults() -> None:
    assert validate({"train": {"epochs": 3}}).train == TrainConfig(epochs=3)
    assert validate({"data": {"name": "digits"}}).data == DataConfig(name="digits")


# Mistakes


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("studnet", "unknown key 'studnet': did you mean 'student'?"),
        ("train.epoch", "unknown key 'train.epoch': did you mean 'epochs'?"),
        ("train.learning", "unknown key 'train.learning': choose from: epochs, batch_size, lr, momentum, weight_decay, "
         "nesterov, schedule, milestones, warmup_epochs, precision, mixup, freeze, label_smoothing, batch_norm, "
         "optimizer, optimizer_options, decay_norm_and_bias, warmup_steps, layer_decay, clip, accumulate, ema, "
         "cutmix, random_erasing, class_weights, sampling, patience"),
        ("data.nam", "unknown key 'data.nam': did you mean 'name'?"),
        ("zzzz", "unknown key 'zzzz': choose from: student, teacher, init_from, peer, side, seed, split, data, train, method, "
         "options, weights, probe, teacher_shares, taps, inputs"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_told_with_what_is_allowed(key: str, answer: str) -> None:
    assert complaint(validate, nested(key, 1)) == answer


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", 0),
        ("train.epochs", 2.5),
        ("train.epochs", "many"),
        ("train.epochs", None),
        ("train.batch_size", 0),
        ("train.batch_size", -128),
        ("train.lr", 0),
        ("train.lr", -1),
        ("train.lr", float("nan")),
        ("train.lr", float("inf")),
        ("train.lr", [0.1]),
        ("train.momentum", 1.0),
        ("train.momentum", -0.1),
        ("train.weight_decay", -1e-4),
        ("train.nesterov", "perhaps"),
        ("train.schedule", "linear"),
        ("train.precision", "fp16"),
        ("train.mixup", "perhaps"),
        ("train.freeze", 1),
        ("train.mixup", -0.5),
        ("train.mixup", 0),
        ("train.mixup", float("inf")),
        ("train.mixup", [0.2]),
        ("train.label_smoothing", 1.0),
        ("train.label_smoothing", True),
        ("train.optimizer", 1),
        ("train.decay_norm_and_bias", "perhaps"),
        ("train.warmup_steps", 2.5),
        ("train.layer_decay", 0),
        ("train.layer_decay", 1.1),
        ("train.layer_decay", True),
        ("train.clip", -1.0),
        ("train.accumulate", 0),
        ("train.ema", 0),
        ("train.ema", 1.0),
        ("train.cutmix", -1.0),
        ("train.cutmix", True),
        ("train.random_erasing", 1.5),
        ("train.class_weights", "even"),
        ("train.class_weights", [1.0, 0.0]),
        ("train.class_weights", [True, True]),
        ("train.class_weights", 2.0),
        ("train.sampling", "random"),
        ("train.patience", 0),
        ("train.patience", 2.5),
        ("train.patience", True),
        ("train.optimizer_options", "betas"),
        ("train.optimizer_options", ["betas"]),
        ("data.unlabelled", "digits"),
        ("data.unlabelled", "csv:a.csv"),
        ("data.crop", "centre"),
        ("data.crop", True),
        ("data.randaugment", 31),
        ("data.randaugment", 4.5),
        ("data.stream", "perhaps"),
        ("train", 5),
        ("data.pad", -1),
        ("data.limit_train", 0),
        ("data.limit_train", 150.0),
        ("data.limit_train", True),
        ("data.size", 0),
        ("data.size", 64.0),
        ("data.channels", 2),
        ("data.skip_broken", "perhaps"),
        ("data.name", 3),
        ("seed", -1),
        ("seed", "first"),
        ("split", "x"),
        ("student", None),
        ("options", []),
        ("options.fsp", "avg"),
        ("weights.fsp", "much"),
        ("weights.fsp", float("nan")),
        ("weights.fsp", float("-inf")),
    ],
)
def test_wrong_value_names_key_and_value(key: str, value: Any) -> None:
    assert complaint(validate, nested(key, value)).startswith(f"{key}={value!r}: ")


@pytest.mark.parametrize("value", [float("inf"), None, {"a": 1}, [0.9, "b"], [float("nan")]])
def test_options_of_an_optimizer_are_plain_values(value: Any) -> None:
    answer = "an option is a finite number, a list of these, true, false or a word, such as {betas = [0.9, 0.98]}"
    assert complaint(validate, nested("train.optimizer_options", {"eps": value})) == f"train.optimizer_options: {answer}"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("train.epochs", 0, "greater than or equal to 1"),
        ("train.lr", -1, "greater than 0"),
        ("train.lr", float("nan"), "finite"),
        ("split", "x", "'full' or 'holdout'"),
        ("train.precision", "fp16", "'auto', 'bf16' or 'fp32'"),
    ],
)
def test_wrong_value_says_what_is_allowed(key: str, value: Any, reason: str) -> None:
    assert reason in complaint(validate, nested(key, value))


def test_a_value_of_many_lines_gives_one_line() -> None:
    complaint(validate, {"split": "a\nb"})


@pytest.mark.parametrize(("table", "key"), [(None, "seed"), ("train", "lr"), ("data", "name")])
def test_a_config_is_frozen(table: str | None, key: str) -> None:
    config = validate({})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(config, table) if table else config, key, 1)
    assert config == validate({})


def test_validating_does_not_share_or_change_the_given_values() -> None:
    values = {"weights": {"fsp": 1.0}, "options": {"fsp": {"pool": "avg"}}}
    config = validate(values)
    values["weights"]["fsp"] = 2.0
    values["options"]["fsp"]["pool"] = "max"
    assert config.weights == {"fsp": 1.0}
    assert config.options == {"fsp": {"pool": "avg"}}


def test_did_you_mean_lists_all_names_if_none_is_close() -> None:
    assert did_you_mean("q", ["left", "right"]) == "choose from: left, right"


# Round trip


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "student": "resnet8",
            "teacher": "12",
            "seed": 7,
            "split": "holdout",
            "data": {"name": "npz:/a/b.npz", "root": "/data", "pad": 0, "flip": False},
            "train": {"epochs": 3, "lr": 0.05, "weight_decay": 0, "nesterov": True, "schedule": "one-cycle", "precision": "bf16"},
            "method": "at+fsp",
            "options": {"fsp": {"pool": "avg", "stage_epochs": 2}},
            "weights": {"fsp": 10, "task": 0.5},
        },
    ],
)
def test_round_trip_through_json(values: dict[str, Any]) -> None:
    config = validate(values)
    assert validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


# --set


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("train.lr=0.05", {"train": {"lr": 0.05}}),
        ("train.weight_decay=1e-4", {"train": {"weight_decay": 1e-4}}),
        ("train.nesterov=true", {"train": {"nesterov": True}}),
        ("data.flip=false", {"data": {"flip": False}}),
        ("student=resnet8", {"student": "resnet8"}),
        ("method=at+kd", {"method": "at+kd"}),
        ("data.name=npz:/some dir/x.npz", {"data": {"name": "npz:/some dir/x.npz"}}),
        ("data.name=npz:a=b.npz", {"data": {"name": "npz:a=b.npz"}}),
        ('student="12"', {"student": "12"}),
        ("options.fsp.pool=avg", {"options": {"fsp": {"pool": "avg"}}}),
        ("options.x.list=[1, 2]", {"options": {"x": {"list": [1, 2]}}}),
        (" train.lr = 0.05 ", {"train": {"lr": 0.05}}),
        ("student=", {"student": ""}),
    ],
)
def test_assign_sets_a_key_to_a_typed_value(assignment: str, expected: dict[str, Any]) -> None:
    values: dict[str, Any] = {}
    assign(values, assignment)
    assert values == expected
    assert repr(values) == repr(expected)  # True is not 1


def test_assign_overrides_and_keeps_the_rest() -> None:
    values: dict[str, Any] = {"train": {"lr": 0.1, "epochs": 5}, "seed": 1}
    assign(values, "train.lr=0.2")
    assign(values, "weights.fsp=10")
    assert values == {"train": {"lr": 0.2, "epochs": 5}, "seed": 1, "weights": {"fsp": 10}}


@pytest.mark.parametrize("assignment", ["train.lr", "=1", ".lr=1", "train.=1", "train..lr=1", "", "="])
def test_an_assignment_without_key_or_value_is_told(assignment: str) -> None:
    values: dict[str, Any] = {"seed": 1}
    assert complaint(assign, values, assignment) == (
        f"--set {assignment!r}: write key=value, such as train.lr=0.05 or options.fsp.pool=avg"
    )
    assert values == {"seed": 1}


def test_assign_refuses_a_key_below_a_single_value() -> None:
    line = complaint(assign, {"seed": 1}, "seed.x.y=2")
    assert line == "seed.x.y=2: 'seed' is a single value here and has no keys below it; write a table of keys"


# --config


def test_a_toml_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('student = "resnet8"\n[train]\nlr = 0.05\n[options.fsp]\npool = "avg"\n', encoding="utf-8")
    assert read_file(file) == {"student": "resnet8", "train": {"lr": 0.05}, "options": {"fsp": {"pool": "avg"}}}


@pytest.mark.parametrize(
    "content",
    ['{"seed": 4, "train": {"lr": 0.05}}', '\n  {"no": 3, "accuracy": 91.5, "config": {"seed": 4, "train": {"lr": 0.05}}}'],
    ids=["config alone", "run.json"],
)
def test_a_json_file_is_read(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(content, encoding="utf-8")
    assert read_file(file) == {"seed": 4, "train": {"lr": 0.05}}


def test_what_a_run_saved_reads_back_equal(tmp_path: Path) -> None:
    config = RunConfig(student="resnet8", teacher="3", method="fsp", weights={"fsp": 10.0})
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"no": 1, "config": config.model_dump(mode="json")}), encoding="utf-8")
    assert validate(read_file(file)) == config


def test_keys_that_came_later_are_dumped_where_they_are_not_the_default() -> None:
    plain, mixed = validate({}), validate({"data": {"crop": "resized"}, "train": {"mixup": True, "label_smoothing": 0.1}})
    assert ("crop" in plain.model_dump()["data"], {"mixup", "label_smoothing"} & set(plain.model_dump()["train"])) == (False, set())
    assert (mixed.model_dump()["data"]["crop"], mixed.model_dump()["train"]["mixup"]) == ("resized", True)
    assert mixed.model_dump()["train"]["label_smoothing"] == 0.1
    assert [validate(config.model_dump(mode="json")) for config in (plain, mixed)] == [plain, mixed]


def test_init_from_and_freeze_are_dumped_where_they_are_not_the_default() -> None:
    plain, begun = validate({}), validate({"init_from": 3, "train": {"freeze": "layer1, conv1,conv1"}})
    assert ("init_from" in plain.model_dump(), "freeze" in plain.model_dump()["train"]) == (False, False)
    assert (begun.model_dump()["init_from"], begun.model_dump(mode="json")["train"]["freeze"]) == ("3", ["conv1", "layer1"])
    assert [validate(config.model_dump(mode="json")) for config in (plain, begun)] == [plain, begun]


def test_mixup_true_is_not_mixup_1() -> None:
    alone, labelled, same = (validate({"train": {"mixup": mixup}}) for mixup in (True, 1, 1.0))
    assert (alone.train.mixup, labelled.train.mixup) == (True, 1.0)
    assert [type(run.train.mixup) for run in (alone, labelled)] == [bool, float]
    assert alone != labelled == same
    assert len({run.train for run in (alone, labelled, same)}) == 2
    assert [validate(run.model_dump(mode="json")) for run in (alone, labelled)] == [alone, labelled]


def test_keys_of_image_files_are_dumped_where_they_are_not_the_default() -> None:
    plain = validate({"data": {"name": "folder:a"}})
    read = validate({"data": {"name": "csv:a.csv", "size": 64, "channels": 1, "skip_broken": True}})
    assert plain.data.model_dump() == validate({}).data.model_dump() | {"name": "folder:a"}
    assert {key: read.model_dump()["data"][key] for key in ("size", "channels", "skip_broken")} == {
        "size": 64,
        "channels": 1,
        "skip_broken": True,
    }
    assert validate(read.model_dump(mode="json")) == read


def test_unlabelled_files_may_be_skipped_whatever_the_data_set_is() -> None:
    read = validate({"data": {"name": "digits", "unlabelled": "folder:more", "skip_broken": True}}).data
    assert validate({"data": read.model_dump(mode="json")}).data == read
    assert read.without_unlabelled == DataConfig(name="digits")
    files = read.model_copy(update={"name": "folder:a", "size": 64})
    assert files.without_unlabelled.model_dump(exclude_defaults=True) == {"name": "folder:a", "size": 64, "skip_broken": True}
    line = "data: size=64 belongs to folder:PATH, csv:FILE and hf:NAME, not to digits; leave it out"
    assert complaint(validate, {"data": {"name": "digits", "unlabelled": "folder:more", "size": 64}}) == line
    line = "data: skip_broken=True belongs to folder:PATH, csv:FILE and hf:NAME, not to digits; leave it out"
    assert complaint(validate, {"data": {"name": "digits", "unlabelled": "npz:more.npz", "skip_broken": True}}) == line


@pytest.mark.parametrize(("key", "value"), [("size", 64), ("channels", 3), ("skip_broken", True)])
def test_keys_of_image_files_belong_to_these(key: str, value: Any) -> None:
    line = f"data: {key}={value} belongs to folder:PATH, csv:FILE and hf:NAME, not to digits; leave it out"
    assert complaint(validate, {"data": {"name": "digits", key: value}}) == line


def test_a_resized_crop_has_no_border() -> None:
    assert validate({"data": {"crop": "resized", "pad": 0}}).data.pad == 0
    assert complaint(validate, {"data": {"crop": "resized", "pad": 4}}) == "data: pad=4 belongs to crop=shift; leave one of them out"


def test_a_missing_config_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "none.toml"
    assert complaint(read_file, file) == f"--config {file}: no such file"


def test_a_folder_is_refused_as_a_config_file(tmp_path: Path) -> None:
    assert complaint(read_file, tmp_path) == f"--config {tmp_path}: a folder, not a file; name a regular file"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x81\xff\x00PK", "not UTF-8 text; write TOML, or name a run.json"),
        (b"\x00\x01\x02", "neither TOML nor a JSON object ("),
        (b"[train\nlr = 1", "neither TOML nor a JSON object ("),
        (b"seed = 1\nseed = 2", "neither TOML nor a JSON object ("),
        (b'{"seed": 1', "neither TOML nor a JSON object ("),
        (b"[1, 2, 3]", "neither TOML nor a JSON object ("),
        (b"config = 3", "'config' is 3; write a table of keys, such as student, data, train"),
        (b'{"config": [1, 2]}', "'config' is [1, 2]; write a table of keys, such as student, data, train"),
    ],
    ids=["binary", "zeros", "broken TOML", "key twice", "broken JSON", "a list", "config a number", "config a list"],
)
def test_a_broken_config_file_is_told(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    assert complaint(read_file, file).startswith(f"--config {file}: {reason}")


# --seeds


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("0-2,5", [0, 1, 2, 5]), ("3-3", [3]), (" 1 , 4-5 ", [1, 4, 5]), ("7,2", [7, 2]), ("100-102", [100, 101, 102])],
)
def test_seeds_are_read_from_numbers_and_ranges(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is no seed"),
        ("a", "'a' is no seed"),
        ("1.5", "'1.5' is no seed"),
        ("-1", "'-1' is no seed"),
        ("1-", "'1-' is no seed"),
        ("1,,2", "'' is no seed"),
        ("0-x", "'0-x' is no seed"),
        ("2-0", "the range 2-0 runs backwards; write 0-2"),
        ("1,1", "names a seed twice"),
        ("0-3,2", "names a seed twice"),
    ],
)
def test_wrong_seeds_are_told(text: str, reason: str) -> None:
    line = complaint(parse_seeds, text)
    assert line.startswith(f"--seeds {text!r}")
    assert reason in line
