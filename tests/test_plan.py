"""Plans on the digits: what a fingerprint covers, who trains together, and what is refused before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.keys import CHANGED, every_key, put
from PIL import Image

from flowdistill import methods, models
from flowdistill.checks import UserError
from flowdistill.config import DataConfig, validate
from flowdistill.data.dataset import ImageData
from flowdistill.data.sources import load
from flowdistill.ledger import Ledger
from flowdistill.methods import Needs, Phase
from flowdistill.models.wide_resnet import WideResNet
from flowdistill.runner.fingerprint import fingerprint as fingerprinted
from flowdistill.runner.identity import Identities
from flowdistill.runner.job import Job
from flowdistill.runner.plan import cohorts, plan
from flowdistill.runner.references import NetworkRef
from flowdistill.training.weights import save_weights
from flowdistill.types import DataSpec, NetSpec

CPU = torch.device("cpu")
Planner = Callable[..., Job]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> dict[str, str]:
    """Weights files of teachers that nobody trained, as a config names them."""
    folder = tmp_path_factory.mktemp("teachers")
    named = {"one": ("resnet8", 7), "other": ("resnet8", 8), "deep": ("resnet14", 7)}
    for name, (model, seed) in named.items():
        net = models.build(model, digits.spec, seed=seed)
        save_weights(folder / f"{name}.safetensors", net.state_dict(), {"model": model})
    return {name: str(folder / f"{name}.safetensors") for name in named}


@pytest.fixture
def planned(ledger: Ledger, teachers: dict[str, str]) -> Planner:
    """A job of fsp on the digits, resnet8 by resnet8, with keys such as ``**{"train.lr": 0.05}`` changed."""

    def make(**changes: Any) -> Job:
        values: dict[str, Any] = {"student": "resnet8", "teacher": teachers["one"], "method": "fsp", "data": {"name": "digits"}}
        for key, value in changes.items():
            *path, last = key.split(".")
            inner = values
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = value
        return plan([validate(values)], ledger, CPU)[0]

    return make


def complaint(planned: Planner, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        planned(**changes)
    line = str(error.value)
    assert "\n" not in line
    return line


# The fingerprint


@pytest.mark.parametrize("method", ["base", "fsp"])
def test_seed_does_not_change_the_fingerprint(planned: Planner, method: str) -> None:
    jobs = [planned(method=method, seed=seed) for seed in (0, 1, 12)]
    assert len({job.fingerprint for job in jobs}) == 1
    assert len({job.init_hash for job in jobs}) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.lr", 0.05),
        ("train.epochs", 7),
        ("train.batch_size", 64),
        ("train.momentum", 0.8),
        ("train.weight_decay", 0.0),
        ("train.nesterov", True),
        ("train.schedule", "cosine"),
        ("train.label_smoothing", 0.1),
        ("data.crop", "resized"),
        ("train.precision", "bf16"),
        ("train.freeze", ["conv1"]),
        ("weights.fsp", 10.0),
        ("weights.task", 0.5),
        ("options.fsp.pool", "avg"),
        ("options.fsp.schedule", "two-stage"),
        ("data.pad", 1),
        ("data.flip", True),
        ("data.limit_train", 500),
        ("split", "holdout"),
        ("student", "resnet14"),
        ("method", "at"),
        ("method", "fsp+kd"),
    ],
)
def test_what_changes_the_numbers_changes_the_fingerprint(planned: Planner, key: str, value: Any) -> None:
    assert planned(**{key: value}).fingerprint != planned().fingerprint


@pytest.mark.parametrize("other", ["other", "deep"])
def test_another_teacher_changes_the_fingerprint(planned: Planner, teachers: dict[str, str], other: str) -> None:
    assert planned(teacher=teachers[other]).fingerprint != planned().fingerprint


def test_a_student_with_weights_of_its_own_changes_the_fingerprint(planned: Planner, teachers: dict[str, str]) -> None:
    fresh, started = planned(), planned(student=teachers["other"])
    assert started.fingerprint != fresh.fingerprint
    assert (started.student.model, started.init_hash) == ("resnet8", planned(student=teachers["other"], seed=5).init_hash)


NOT_COVERED = {
    "seed": "it is beside the fingerprint: runs of one are a group",
    "data.name": "the hash of the data says what they are, wherever they lie",
    "data.root": "likewise",
    "data.skip_broken": "the hash of the data says which files were read",
    "train.batch_norm": "one process has the whole batch; of several the number is covered, where each normalises by itself",
}
"""Key of a RunConfig that no fingerprint has -> why."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Image files of 12x12, grey, in two classes."""
    folder, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(numbers.integers(0, 256, (12, 12), dtype=np.uint8)).save(folder / split / name / f"{number}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face data set with two columns of classes."""
    datasets = pytest.importorskip("datasets")
    folder, numbers = tmp_path_factory.mktemp("hub"), np.random.default_rng(0)
    images = [Image.fromarray(numbers.integers(0, 256, (12, 12), dtype=np.uint8)) for _ in range(8)]
    classes = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": classes, "other": classes})
    rows = {"image": images, "label": [0, 1] * 4, "other": [0, 0, 1, 1] * 2}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


def test_every_key_of_a_config_is_known_here() -> None:
    assert set(CHANGED) == every_key()
    assert set(NOT_COVERED) <= every_key()


@pytest.mark.parametrize("key", sorted(CHANGED))
def test_every_key_changes_the_fingerprint_or_says_why_not(
    key: str, teachers: dict[str, str], digits: ImageData, ledger: Ledger, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain: dict[str, Any] = {"student": "resnet8", "teacher": teachers["one"], "method": "fsp", "data": {"name": "digits"}}
    values = {"OTHER": teachers["other"], "NPZ": f"npz:{tmp_path}/same.npz", "UNLABELLED": f"npz:{tmp_path}/more.npz"}
    if key == "data.name":
        save_npz(tmp_path / "same.npz", digits)
        plain["data"] |= {"pad": digits.pad, "flip": digits.flip}
    elif key == "probe":
        plain["method"] = "kd"  # fsp asks for no logits
    elif key == "teacher_shares":
        plain |= {"method": "kd", "teacher": f"{teachers['one']}+{teachers['other']}", "split": "holdout"}
    elif key == "data.unlabelled":
        np.savez(tmp_path / "more.npz", x=digits.x_test[:50])
    elif key in ("peer", "side"):
        plain = {"student": "resnet8", "method": "dml", "data": {"name": "digits"}, "peer": "resnet8"}
    elif key in ("data.size", "data.channels", "data.skip_broken", "data.stream"):
        plain = {"student": "resnet8", "method": "base", "data": {"name": request.getfixturevalue("pictures"), "size": 12}}
    elif key == "data.label":
        plain = {"student": "resnet8", "method": "base", "data": {"name": request.getfixturevalue("hub"), "label": "label"}}
    elif key == "train.patience":
        plain = {"student": "resnet8", "method": "base", "split": "holdout", "data": {"name": "digits"}}
    elif key in ("train.optimizer", "train.optimizer_options"):  # one of the two needs a rate of its own, the other an optimiser
        plain["train"] = {"lr": 0.05} | ({"optimizer": "adamw"} if key == "train.optimizer_options" else {})
    value = CHANGED[key]
    changed = put(plain, key, values.get(value, value) if isinstance(value, str) else value)
    one, other = (plan([validate(given)], ledger, CPU)[0] for given in (plain, changed))
    assert one.config != other.config, "the value is another"
    assert (one.fingerprint == other.fingerprint) == (key in NOT_COVERED)


def test_mixing_changes_the_fingerprint(planned: Planner) -> None:
    jobs = [planned(method="kd", **{"weights.task": 0, "train.mixup": mixup}) for mixup in (False, True, 1.0, 0.2)]
    assert len({job.fingerprint for job in jobs}) == len(together(*jobs)) == 4


def test_a_crop_without_a_border_is_not_the_resized_one(planned: Planner) -> None:
    still, resized = planned(**{"data.pad": 0}), planned(**{"data.crop": "resized"})
    assert (still.config.data.pad, resized.config.data.pad) == (0, 0)
    assert still.fingerprint != resized.fingerprint
    assert len(together(still, resized)) == 2


@pytest.mark.parametrize(
    ("values", "fingerprint"),
    [
        ({"student": "resnet20"}, "86d16f8abe5270336c796ec9a411bbfaf71dcfae2cd925a745713dc884a5ed5f"),
        (
            {
                "student": "resnet8",
                "teacher": "3",
                "method": "at+kd",
                "weights": {"task": 0.5},
                "split": "holdout",
                "train": {"epochs": 3, "schedule": "cosine"},
                "data": {"pad": 2, "flip": False},
            },
            "58ee301d21cf0a027b5b59342bb24f85e06c2b80c65b2a75b671158de9586b5a",
        ),
    ],
)
def test_recorded_runs_keep_their_fingerprint(values: dict[str, Any], fingerprint: str, digits: ImageData, ledger: Ledger) -> None:
    """As they were before data.crop and train.mixup: what a ledger has is neither trained again nor refused."""
    config = validate(values)
    resolved = methods.resolve(config.method, config.options, config.weights)
    options = {name: option.model_dump() for name, option in resolved.options.items()}
    full_config = config.model_copy(update={"options": options, "weights": resolved.weights})
    teacher = NetworkRef("resnet20", fingerprint="of the teacher") if config.teacher else None
    data = replace(digits)
    job = Job(full_config, data, resolved, NetworkRef(config.student), teacher, "", Identities(ledger))
    vars(data)["hash"] = "of the data"
    vars(job)["needs_and_versions"] = Needs(), dict.fromkeys(resolved.options, 1)
    assert fingerprinted(job, {"student": [], "teacher": []}) == fingerprint


@pytest.mark.parametrize(("method", "changes"), [("at", True), ("fsp", True), ("kd", False), ("base", False)])
def test_a_new_version_of_a_networks_taps_changes_the_fingerprint_where_they_are_compared(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, method: str, changes: bool
) -> None:
    def fingerprint() -> str:
        models.factory("wrn-16-1")._specs.clear()  # type: ignore[attr-defined]
        values = {"student": "wrn-16-1", "teacher": "wrn-16-1", "method": method, "data": {"name": "digits"}}
        return plan([validate(values)], ledger, CPU, stand_in=True)[0].fingerprint

    before = fingerprint()
    monkeypatch.setattr(WideResNet, "taps_version", 3)
    assert (fingerprint() != before) == changes
    models.factory("wrn-16-1")._specs.clear()  # type: ignore[attr-defined]


def test_fitnets_keeps_its_fingerprint_where_its_hint_is_what_it_was(planned: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three stages the second was and is the middle one; of four it was the third."""
    three = planned(method="fitnets").fingerprint
    monkeypatch.setattr(methods.get("fitnets"), "version", 1)
    assert planned(method="fitnets").fingerprint == three


def test_a_new_version_of_the_method_changes_the_fingerprint(planned: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {method: planned(method=method).fingerprint for method in ("fsp", "fsp+kd", "kd", "base")}
    monkeypatch.setattr(methods.get("fsp"), "version", methods.get("fsp").version + 1)
    after = {method: planned(method=method).fingerprint for method in before}
    assert {method for method in before if before[method] != after[method]} == {"fsp", "fsp+kd"}


def save_npz(path: Path, data: ImageData) -> str:
    np.savez(path, x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)
    return f"npz:{path}"


def test_the_images_are_covered_and_where_they_lie_is_not(planned: Planner, digits: ImageData, tmp_path: Path) -> None:
    habits = {"data.pad": digits.pad, "data.flip": digits.flip}
    same = save_npz(tmp_path / "same.npz", digits)
    digits_changed = ImageData("d", digits.x_train.copy(), digits.y_train, digits.x_test, digits.y_test, 10)
    digits_changed.x_train[0, 0, 0] ^= 1
    changed = save_npz(tmp_path / "changed.npz", digits_changed)
    assert planned(**{"data.name": same} | habits).fingerprint == planned().fingerprint
    assert planned(**{"data.name": changed} | habits).fingerprint != planned().fingerprint


def test_names_of_classes_are_covered_and_their_numbers_are_not(
    planned: Planner, digits: ImageData, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's file says them. Data without names, or with none but the numbers, keep the fingerprint that they had."""

    def named(*names: str) -> str:
        monkeypatch.setattr("flowdistill.runner.plan.load", lambda config, remarks: replace(digits, class_names=names))
        return planned().fingerprint

    plain = planned().fingerprint
    numbers = [str(number) for number in range(10)]
    assert named(*numbers) == plain
    assert len({plain, named(*numbers[1:], "0"), named(*"abcdefghij"), named(*"abcdefghji")}) == 4


def test_a_wrapped_method_is_planned_and_recorded_under_its_name(planned: Planner) -> None:
    job = planned(method="ls:kd+at", **{"options.ls:kd.T": 3, "weights.ls:kd": 4})
    assert job.config.method == "at+ls:kd"
    assert job.config.options == {"at": {"mode": "code"}, "ls:kd": {"T": 3.0}}
    assert job.config.weights == {"task": 1.0, "at": 1000.0, "ls:kd": 4.0}
    assert planned(method="ls:kd", **{"options.ls:kd.T": 3}).fingerprint != planned(method="ls:kd").fingerprint


def test_no_two_of_these_share_a_fingerprint(planned: Planner) -> None:
    jobs = [planned(method=method) for method in ("base", "fsp", "at", "kd", "logits", "at+kd", "tf_kd", "ls:kd", "at+ls:kd")]
    assert len({job.fingerprint for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    "said",
    [
        {"train.lr": 0.1, "train.epochs": 200},
        {"train.precision": "fp32"},
        {"train.mixup": False, "train.label_smoothing": 0.0, "data.crop": "shift"},
        {"init_from": None, "train.freeze": []},
        {"data.pad": 2, "data.flip": False},
        {"data.root": "elsewhere"},
        {"weights.fsp": 1.0},
        {"options.fsp.pool": "max", "options.fsp.preset": "ours"},
        {"student": "resnet_32_8"},
        {"method": " fsp "},
    ],
    ids=lambda changes: str(changes).replace(" ", "") if isinstance(changes, dict) else "",
)
def test_a_default_that_is_given_keeps_the_fingerprint(planned: Planner, said: dict[str, Any]) -> None:
    assert planned(**said).fingerprint == planned().fingerprint


@pytest.mark.parametrize("key", ["teacher", "inputs.teacher.size", "inputs.teacher.mean", "taps.teacher", "taps.student"])
def test_what_a_base_run_does_not_use_is_dropped(planned: Planner, teachers: dict[str, str], ledger: Ledger, key: str) -> None:
    """Else it would be a variant, and nobody's base: ``--method base,kd --set inputs.teacher.size=8`` is one command."""
    plain = {"student": "resnet8", "method": "base", "data": {"name": "digits"}}
    given = put(plain, key, teachers["other"] if key == "teacher" else CHANGED[key])
    one, other = (plan([validate(values)], ledger, CPU)[0] for values in (plain, given))
    assert (one.config, one.variant, one.fingerprint) == (other.config, other.variant, other.fingerprint)


def test_taps_that_no_method_looks_at_are_dropped(planned: Planner) -> None:
    assert planned(method="kd", **{"taps.student": CHANGED["taps.student"]}).variant == planned(method="kd").variant == ""


def test_a_base_run_does_not_look_at_the_teacher(planned: Planner, teachers: dict[str, str]) -> None:
    with_teacher, without = planned(method="base"), planned(method="base", teacher=None)
    assert with_teacher.fingerprint == without.fingerprint
    assert with_teacher.teacher is None
    assert with_teacher.config.teacher is None


def test_the_resolved_config_holds_every_default(planned: Planner) -> None:
    config = planned().config
    assert (config.data.pad, config.data.flip, config.train.precision) == (2, False, "fp32")
    assert config.weights == {"task": 1.0, "fsp": 1.0}
    assert config.options["fsp"]["pool"] == "max"


def test_the_resolved_config_plans_to_itself(planned: Planner, ledger: Ledger) -> None:
    job = planned(**{"options.fsp.preset": "kd-zoo", "weights.fsp": 3})
    [again] = plan([validate(job.config.model_dump(mode="json"))], ledger, CPU)
    assert (again.fingerprint, again.config) == (job.fingerprint, job.config)


def test_planning_writes_nothing(planned: Planner, ledger: Ledger) -> None:
    planned()
    assert ledger.runs() == []
    assert not ledger.folder.exists()


# Cohorts


def together(*jobs: Job) -> list[list[str]]:
    return [[f"{job.resolved.name} {job.config.seed}" for job in group] for group in cohorts(jobs)]


@pytest.mark.parametrize("order", [("base", "fsp"), ("fsp", "base")])
def test_base_and_fsp_of_one_recipe_train_together(planned: Planner, order: tuple[str, str]) -> None:
    assert together(*(planned(method=method) for method in order)) == [[f"{method} 0" for method in order]]


def test_methods_and_seeds_train_together(planned: Planner) -> None:
    jobs = [planned(method=method, seed=seed) for method in ("base", "at", "fsp") for seed in (0, 1)]
    assert together(*jobs) == [["base 0", "base 1", "at 0", "at 1", "fsp 0", "fsp 1"]]


def test_two_stage_fsp_trains_apart(planned: Planner) -> None:
    jobs = [planned(method="base"), planned(**{"options.fsp.schedule": "two-stage"}), planned()]
    assert together(*jobs) == [["base 0", "fsp 0"], ["fsp 0"]]
    assert cohorts(jobs)[1] == [jobs[1]]
    assert [job.phase_epochs for job in jobs] == [(200,), (54, 200), (200,)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.lr", 0.05),
        ("train.epochs", 7),
        ("train.batch_size", 64),
        ("train.precision", "bf16"),
        ("train.freeze", ["conv1"]),
        ("data.pad", 1),
        ("split", "holdout"),
    ],
)
def test_another_recipe_trains_apart(planned: Planner, key: str, value: Any) -> None:
    jobs = [planned(), planned(**{key: value}), planned(seed=1)]
    assert [[jobs.index(job) for job in group] for group in cohorts(jobs)] == [[0, 2], [1]]


def test_another_teacher_model_trains_apart(planned: Planner, teachers: dict[str, str]) -> None:
    jobs = [planned(), planned(teacher=teachers["deep"]), planned(teacher=teachers["other"], seed=1)]
    assert [[jobs.index(job) for job in group] for group in cohorts(jobs)] == [[0, 2], [1]]


def test_every_job_is_in_one_cohort(planned: Planner, teachers: dict[str, str]) -> None:
    jobs = [
        planned(method=method, teacher=teachers[teacher], **{"train.lr": lr})
        for method in ("base", "fsp")
        for teacher in ("one", "deep")
        for lr in (0.1, 0.05)
    ]
    found = [id(job) for group in cohorts(jobs) for job in group]
    assert sorted(found) == sorted(id(job) for job in jobs)
    assert cohorts([]) == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"method": "base+fsp"}, "method 'base+fsp': 'base' is training on labels alone, which every method includes; leave it out"),
        ({"method": "fsp+base"}, "method 'fsp+base': 'base' is training on labels alone, which every method includes; leave it out"),
        ({"method": "kd+kd"}, "method 'kd+kd' names a part twice; give each once"),
        ({"method": "fsp + at+ fsp"}, "method 'fsp + at+ fsp' names a part twice; give each once"),
        ({"method": "fps"}, "unknown method 'fps': did you mean 'fsp'?"),
        ({"method": "fsp+att"}, "unknown method 'att': did you mean 'at'?"),
        ({"weights.at": 1.0}, "weights.at: method 'fsp' has no such term; choose from: task, fsp"),
        ({"weights.tsk": 1.0}, "weights.tsk: method 'fsp' has no such term; did you mean 'task'?"),
        ({"weights.fsp": -1.0}, "weights.fsp=-1.0: a weight is 0 or more"),
        ({"options.kd.T": 2.0}, "options.kd: method 'fsp' has no such part; choose from: fsp"),
        ({"options.fsp.pol": "avg"}, "unknown key 'options.fsp.pol': did you mean 'pool'?"),
        ({"options.fsp.pool": "median"}, "options.fsp.pool='median': input should be 'max' or 'avg'"),
        ({"options.fsp.preset": "their"}, "options.fsp.preset='their': input should be 'ours', 'log', 'kd-zoo' or 'paper'"),
        ({"teacher": None}, "method 'fsp' needs a teacher: --teacher MODEL, RUN or FILE"),
        ({"student": "resnet9"}, "unknown model 'resnet9': did you mean 'resnet8'?"),
        ({"data.name": "digit"}, "unknown data set 'digit': did you mean 'digits'?"),
        ({"data.pad": 16}, "data.pad=16: reflection needs less than the image's 16 pixels; set data.pad lower"),
    ],
    ids=lambda changes: str(changes).replace(" ", "") if isinstance(changes, dict) else "",
)
def test_a_wrong_plan_is_refused(planned: Planner, changes: dict[str, Any], answer: str) -> None:
    assert complaint(planned, **changes) == answer


def test_no_bf16_on_a_cpu_where_a_stride_is_larger_than_its_map(planned: Planner, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16x16 the last stage of timm's network is given maps of one position."""
    monkeypatch.setattr("flowdistill.device._cpu_computes_bf16", lambda: True)
    alone: dict[str, Any] = {"method": "base", "teacher": None, "student": "timm:resnet10t"}
    assert planned(**alone).precision == "fp32"
    assert planned(**alone, **{"inputs.student.size": 32}).precision == planned().precision == "bf16"
    both = validate({"method": "dml", "student": "resnet8", "peer": "timm:resnet10t", "data": {"name": "digits"}})
    assert [job.precision for job in plan([both], ledger, CPU)] == ["fp32", "fp32"]
    wanted = {**alone, "train.precision": "bf16"}
    assert complaint(planned, **wanted) == (
        "train.precision=bf16: the stride of timm:resnet10t's layer4.0.conv1 is larger than the map that it is given, where a CPU's bf16 "
        "gradients are not sound; use fp32, or larger images"
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    (elsewhere,) = plan([validate({**alone, "data": {"name": "digits"}, "train": {"precision": "bf16"}})], ledger, torch.device("cuda"))
    assert elsewhere.precision == "bf16"


def test_two_staged_parts_are_refused_and_one_is_not(planned: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = {"method": "fsp+kd", "options.fsp.schedule": "two-stage", "options.fsp.stage_epochs": 2, "train.epochs": 5}
    assert planned(**staged).phase_epochs == (2, 5)
    two = (Phase("first", epochs=3, only=frozenset({"kd"})), Phase("second"))
    monkeypatch.setattr(methods.get("kd"), "phases", classmethod(lambda cls, options: two))
    assert planned(method="fsp+kd", **{"train.epochs": 5}).phase_epochs == (3, 5)
    assert complaint(planned, **staged) == "method 'fsp+kd': fsp and kd both train in stages; only one part may"


def test_a_pair_that_can_not_work_is_refused_in_planning(planned: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.spec

    def narrow(name: str, data: DataSpec, table: object = None) -> NetSpec:
        spec = real(name, data)
        taps = tuple(replace(tap, channels=tap.channels // 2) for tap in spec.taps)
        return replace(spec, taps=taps) if name == "resnet14" else spec

    monkeypatch.setattr(models, "spec", narrow)
    assert planned().student.model == "resnet8"
    assert complaint(planned, student="resnet14") == (
        "fsp: tap 'stage1' is 8x16x16 in resnet14 and 16x16x16 in resnet8, and the matrices need equal channels; set "
        "options.fsp.adapter=conv1x1 or choose networks of equal width"
    )


def test_one_bad_config_stops_the_whole_plan(ledger: Ledger) -> None:
    good = validate({"student": "resnet8", "data": {"name": "digits"}})
    with pytest.raises(UserError, match="unknown method"):
        plan([good, good.model_copy(update={"method": "nothing"})], ledger, CPU)
    assert ledger.runs() == []


def test_a_student_that_goes_on_with_its_classifier_has_the_names_of_the_data(digits: ImageData) -> None:
    """Else class 0 of what it learned would be another class 0 of what it learns on."""
    names = tuple("abcdefghij")
    weights = models.build("resnet8", digits.spec, seed=3).state_dict()
    student = NetworkRef("resnet8", weights, 12, labels=names, origin="run 12")
    assert student.on(replace(digits, class_names=names)) == student
    assert student.on(digits) == student, "data without names"
    with pytest.raises(
        UserError, match=r"^student resnet8 \(run 12\): class 'a' where the data has 'b'; begin from its weights with a fresh"
    ):
        student.on(replace(digits, class_names=("b", "a", *names[2:])))
