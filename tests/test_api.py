"""Python: names, runs, results and modules as networks; what a call returns and what it refuses."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import flowdistill
from flowdistill import models
from flowdistill.checks import did_you_mean
from flowdistill.data.sources import read_npz
from flowdistill.ledger import Ledger
from flowdistill.runner import evaluate
from flowdistill.runner.export import FORMATS
from flowdistill.training.weights import hash_weights


@pytest.fixture
def keys(small_npz: Path, tmp_path: Path) -> dict[str, Any]:
    train = {"epochs": 1, "batch_size": 64}
    return {"data": {"name": f"npz:{small_npz}", "pad": 1}, "runs": tmp_path / "runs", "train": train, "progress": False}


def test_train_then_distill_from_the_result_the_number_or_the_name(keys: dict[str, Any]) -> None:
    teacher = flowdistill.train("resnet14", seed=5, **keys)
    by_result = flowdistill.distill(teacher, "resnet8", method="kd", **keys)
    by_number = flowdistill.distill(teacher.run.no, "resnet8", method="kd", **keys)
    by_name = flowdistill.distill("resnet14", "resnet8", method="kd", **keys)
    assert by_result.run.teacher_run == teacher.run.no
    assert by_result.run.no == by_number.run.no, "one fingerprint: trained once"
    assert by_name.run.no != by_number.run.no, "whichever teacher the rule chooses is not this very one"
    assert by_name.run.weights_hash == by_number.run.weights_hash
    assert by_result.accuracy == pytest.approx(100 * by_result.run.correct / 150)


def test_train_shows_the_arguments_of_distill_and_decides_teacher_and_method(keys: dict[str, Any]) -> None:
    shown, whole = (dict(inspect.signature(function).parameters) for function in (flowdistill.train, flowdistill.distill))
    assert shown == {name: parameter for name, parameter in whole.items() if name not in ("teacher", "method")}
    assert inspect.signature(flowdistill.train).return_annotation == "Result"
    for name in ("teacher", "method"):
        with pytest.raises(TypeError, match=rf"multiple values for (keyword )?argument '{name}'"):
            flowdistill.train("resnet8", **keys, **{name: "kd"})
    with pytest.raises(TypeError, match=r"train\(\) missing 1 required positional argument: 'data'"):
        flowdistill.train("resnet8")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_accuracy_says_its_arithmetic(keys: dict[str, Any], precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = flowdistill.train("resnet8", **{**keys, "train": {**keys["train"], "precision": precision}, "progress": True})
    assert result.precision == precision
    assert f"{result.accuracy:.2f} % of 150 test images in {precision} (epoch 1 of 1" in capsys.readouterr().err
    measured = evaluate(result.folder / "student.safetensors", torch.device("cpu"))
    assert (measured.accuracy, measured.precision) == (result.accuracy, precision)
    other = evaluate(result.folder / "student.safetensors", torch.device("cpu"), precision="fp32")
    assert other.precision == "fp32"


def test_a_module_of_ours_teaches_and_a_module_is_where_a_student_starts(keys: dict[str, Any], small_npz: Path) -> None:
    spec = read_npz(small_npz).spec
    teacher, student = models.build("resnet14", spec, seed=3), models.build("resnet8", spec, seed=4)
    result = flowdistill.distill(teacher, student, method="kd", **keys)
    assert result.run.init_hash == hash_weights(student.state_dict())
    assert hash_weights(result.student().state_dict()) == result.run.weights_hash != result.run.init_hash
    assert Path(result.run.config["teacher"]).is_file()


def test_the_network_that_comes_back_gives_the_recorded_accuracy(keys: dict[str, Any], small_npz: Path) -> None:
    result = flowdistill.train("resnet8", **keys)
    data, net = read_npz(small_npz), result.student()
    images = torch.from_numpy(data.x_test).permute(0, 3, 1, 2).float() / 255
    trained = torch.from_numpy(data.x_train).float() / 255
    with torch.no_grad():
        outputs = net((images - trained.mean()) / trained.std(unbiased=False))
    assert int((outputs.logits.argmax(1) == torch.from_numpy(data.y_test)).sum()) == result.run.correct


def test_a_module_that_was_loaded_remembers_where_it_began(keys: dict[str, Any]) -> None:
    net = flowdistill.train("resnet8", **keys).student()
    with pytest.raises(flowdistill.UserError, match="initial weights"):
        flowdistill.distill(net, "resnet8", method="kd", **keys)


def test_a_path_is_a_weights_file(keys: dict[str, Any]) -> None:
    teacher = flowdistill.train("resnet14", seed=5, **keys)
    result = flowdistill.distill(teacher.folder / "student.safetensors", "resnet8", method="kd", **keys)
    assert result.run.teacher == "resnet14"


NO_NETWORK = "is no network; give a model's name, a run, a weights file or an nn.Module"
NO_DATA = "is no data; give a name such as digits or folder:PATH, a table of keys, or a loader"
MODELS = ", ".join(models.MODELS)
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"teacher": 3.5}, f"float {NO_NETWORK}"),
    ({"teacher": ["resnet20"]}, f"list {NO_NETWORK}"),
    ({"teacher": True}, f"unknown model 'True': choose from: {MODELS}"),
    ({"teacher": None}, "method 'fsp' needs a teacher: --teacher MODEL, RUN or FILE"),
    ({"teacher": -1}, f"unknown model '-1': choose from: {MODELS}"),
    ({"teacher": 7}, "no run 7 in runs/ledger.db: it has no runs yet; flowdistill runs lists them"),
    ({"student": None}, f"NoneType {NO_NETWORK}"),
    ({"student": Path("none.pt")}, "weights file none.pt: no such file"),
    ({"data": 5}, f"int {NO_DATA}"),
    ({"data": None}, f"NoneType {NO_DATA}"),
    ({"data": None, "val_loader": [1]}, f"NoneType {NO_DATA}"),
    ({"data": Path("digits")}, f"PosixPath {NO_DATA}"),
    ({"on_epoch": "x"}, "on_epoch='x': give a function that takes a Report, or leave it out"),
    ({"workers": -1}, "workers=-1: give an integer from 0 to 256, or leave it out"),
    ({"workers": 257}, "workers=257: give an integer from 0 to 256, or leave it out"),
    ({"workers": "2"}, "workers='2': give an integer from 0 to 256, or leave it out"),
    ({"data": {"nam": "digits"}}, "unknown key 'data.nam': did you mean 'name'?"),
    ({"method": 3}, "method=3: input should be a valid string"),
    ({"seed": 1.5}, "seed=1.5: input should be a valid integer"),
    ({"runs": __file__}, f"{__file__}/ledger.db cannot be used as a ledger ({__file__} is a file); name another folder with --runs"),
    ({"device": None}, "--device None is not available here; use auto, or what this machine has of cpu, cuda, mps"),
    (
        {"epoch": 3},
        "unknown key 'epoch': choose from: student, teacher, init_from, peer, side, seed, split, data, train, method, options, weights, "
        "probe, teacher_shares, taps, inputs",
    ),
    ({"train": {"epoch": 3}}, "unknown key 'train.epoch': did you mean 'epochs'?"),
    ({"train": {"epochs": "3"}}, "train.epochs='3': input should be a valid integer"),
    ({"train": [3]}, "train=[3]: must be a table of keys"),
    ({"options": {"fsp": 5}}, "options.fsp=5: must be a table of keys"),
    ({"weights": {"fsp": "much"}}, "weights.fsp='much': input should be a valid number, unable to parse string as a number"),
]


@pytest.mark.parametrize(("mistake", "line"), MISTAKES, ids=[str(mistake) for mistake, _ in MISTAKES])
def test_a_mistake_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: dict[str, Any], line: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flowdistill.UserError) as error:
        flowdistill.distill(**{"teacher": "resnet14", "student": "resnet8", "data": "digits", "progress": False, **mistake})
    assert str(error.value) == line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", [None, 3, ["onnx"]])
def test_an_unknown_export_format_is_refused(keys: dict[str, Any], to: Any) -> None:
    result = flowdistill.Result(run=None, folder=keys["runs"])  # type: ignore[arg-type]
    with pytest.raises(flowdistill.UserError) as error:
        result.export(to)
    assert str(error.value) == f"export to {to!r}: {did_you_mean(str(to), FORMATS)}"
    assert "onnx" in str(error.value)


def test_a_diverged_run_raises_and_is_on_record(keys: dict[str, Any]) -> None:
    wild = {**keys, "train": {**keys["train"], "lr": 1e30}}
    with pytest.raises(RuntimeError, match="run 1 failed: diverged"):
        flowdistill.train("resnet8", **wild)


def test_every_epoch_is_reported_as_it_is_recorded(keys: dict[str, Any]) -> None:
    reports: list[flowdistill.Report] = []
    teacher = flowdistill.train("resnet14", seed=5, **keys)
    result = flowdistill.distill(
        teacher, "resnet8", method="kd", **{**keys, "train": {"epochs": 3, "batch_size": 64}}, on_epoch=reports.append
    )
    curve = Ledger(keys["runs"]).epochs(result.run.no)
    assert [(one.run, one.epoch, one.epochs, one.phase) for one in reports] == [(2, epoch, 3, "joint") for epoch in (1, 2, 3)]
    assert [one.terms for one in reports] == [epoch.terms for epoch in curve]
    assert [one.accuracy for one in reports] == pytest.approx([100 * epoch.correct / 150 for epoch in curve])
    assert reports[-1].accuracy == pytest.approx(result.accuracy)
    assert [(one.lr, one.seconds) for one in reports] == [(epoch.lr, epoch.seconds) for epoch in curve]
    again = flowdistill.distill(
        teacher, "resnet8", method="kd", **{**keys, "train": {"epochs": 3, "batch_size": 64}}, on_epoch=reports.append
    )
    assert again.run.no == result.run.no
    assert len(reports) == 3, "nothing was trained"


def test_what_a_callback_raises_comes_out_whole_and_is_recorded_in_one_line(keys: dict[str, Any]) -> None:
    def full(report: flowdistill.Report) -> None:
        raise OSError(f"no space\nafter epoch {report.epoch}")

    with pytest.raises(OSError, match=r"^no space\nafter epoch 1$"):
        flowdistill.train("resnet8", **keys, on_epoch=full)
    assert Ledger(keys["runs"]).run(1).error == "no space"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopIteration, ZeroDivisionError])
@pytest.mark.parametrize("epoch", [2, 4])
def test_a_callback_stops_a_run_that_goes_on_from_there(keys: dict[str, Any], stop: type[BaseException], epoch: int) -> None:
    keys["train"] |= {"epochs": 4}

    def enough(report: flowdistill.Report) -> None:
        if report.epoch == epoch:
            raise stop

    with pytest.raises(stop):
        flowdistill.train("resnet8", **keys, on_epoch=enough)
    ledger = Ledger(keys["runs"])
    assert ledger.run(1).status == "interrupted"
    seen: list[int] = []
    result = flowdistill.train("resnet8", **keys, on_epoch=lambda report: seen.append(report.epoch))
    assert seen == list(range(epoch + 1, 5))
    assert (result.run.no, result.run.resumed) == (1, 1)
    assert result.run.weights_hash == flowdistill.train("resnet8", **{**keys, "runs": keys["runs"] / "straight"}).run.weights_hash
