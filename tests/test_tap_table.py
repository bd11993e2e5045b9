"""The table of taps: printed, edited, given back; and runs of networks that nobody prepared, through the commands."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from helpers.command import command
from helpers.networks import TWO_STAGE_NET
from helpers.small import config
from safetensors.torch import save_file

from flowdistill.checks import UserError
from flowdistill.config import read_taps, validate
from flowdistill.ledger import Ledger
from flowdistill.runner import Watcher, load_network, run
from flowdistill.runner.plan import plan
from flowdistill.training.weights import save_weights

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")


def printed(folder: Path, *words: str) -> list[dict[str, str]]:
    said = command(folder, "taps", *words, "--format", "csv")
    assert said.code == 0, said.err
    return list(csv.DictReader(io.StringIO(said.out)))


def test_the_table_of_a_network(tmp_path):
    rows = printed(tmp_path, "timm:resnet18")
    assert [tuple(row.values()) for row in rows] == [
        ("stem", "act1", "64", "112x112", "2"),
        ("stage1", "layer1", "64", "56x56", "4"),
        ("stage2", "layer2", "128", "28x28", "8"),
        ("stage3", "layer3", "256", "14x14", "16"),
        ("stage4", "layer4", "512", "7x7", "32"),
        ("embedding", "input of fc", "512", "", ""),
        ("classifier", "fc", "1000", "", ""),
    ]


def test_taps_takes_size_channels_and_classes(tmp_path):
    rows = printed(tmp_path, "resnet20", "--size", "16", "--channels", "1", "--classes", "7")
    found = {row["name"]: row for row in rows}
    assert found["stage3"]["size"] == "4x4"
    assert found["classifier"]["channels"] == "7"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("format_", ["csv", "json"])
def test_what_is_printed_is_read_back(tmp_path, format_):
    said = command(tmp_path, "taps", "resnet8", "--format", format_)
    table = tmp_path / f"table.{format_}"
    table.write_text(said.out)
    found = read_taps(table)
    assert found["stage2.first"] == "layer2.0.bn1"
    assert not found.keys() & {"embedding", "classifier"}


@pytest.mark.parametrize("content", ["", "name,path\nstage1,layer1\n", "[1, 2]", '[{"name": 1, "module": "a"}]', "\0\n\0"])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"no table with the columns name and module; write one with flowdistill taps MODEL --format csv"):
        read_taps(path)
    with pytest.raises(UserError, match="no such file"):
        read_taps(tmp_path / "other.csv")


@pytest.mark.parametrize(
    "content",
    [
        "name,module\nstage1,a\nstage2,b\n stage1,c\n",
        '[{"name": "stage1", "module": "a"}, {"name": "stage2", "module": "b"}, {"name": "stage1", "module": "c"}]',
    ],
)
def test_a_tap_that_is_named_twice_is_refused(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"t\.csv: tap stage1 is named twice, as a and as c; keep one of the rows$"):
        read_taps(path)


def with_a_teacher(ledger: Ledger, small_npz: Path) -> Ledger:
    """A finished ResNet-14 of this package, run 1."""
    run([config(small_npz, student="resnet14", method="base", seed=7)], ledger, CPU)
    return ledger


@pytest.fixture
def taught(tmp_path, small_npz):
    return with_a_teacher(Ledger(tmp_path / "runs", create=True), small_npz)


class Lines(Watcher):
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


def test_named_taps_are_the_ones_compared_and_part_of_the_fingerprint(taught, small_npz):
    keys = {"method": "at", "teacher": 1, "weights": {"at": 1.0}}
    named = {"taps": {"student": {"stage1": "stage2", "stage2": "stage3"}, "teacher": {"stage1": "layer2.1", "stage2": "stage3"}}}
    plain, other = plan([config(small_npz, **keys), config(small_npz, **keys, **named)], taught, CPU)
    assert plain.fingerprint != other.fingerprint
    assert plain.pairing.student.stages == ("stage1", "stage2", "stage3")
    assert [tap.own for tap in other.pairing.teacher.taps] == ["stage2", "stage3"]
    watcher = Lines()
    done = run([other.config], taught, CPU, watcher=watcher)[0]
    assert done.status == "finished"
    lines = [line for line in watcher.said if line.startswith(("taps", "  stage"))]
    assert lines[0] == "taps of resnet8 <- resnet14"
    assert lines[1].startswith("  stage1: layer2.0 32x")
    assert len(lines) == 3
    again = Lines()
    assert run([other.config], taught, CPU, watcher=again)[0].no == done.no


def test_what_a_teacher_sees_is_part_of_the_fingerprint(taught, small_npz, tmp_path):
    """Equal weights that expect other images give other numbers; of a teacher on the same images nothing is added."""
    net, _ = load_network(taught.run_folder(1) / "student.safetensors")
    found = {}
    for name, changes in {"same": {}, "other split": {"split": "holdout"}, "other mean": {"split": "holdout", "mean": [0.5]}}.items():
        save_weights(tmp_path / f"{name}.safetensors", net.state_dict(), {**net.about, **changes})
        (job,) = plan([config(small_npz, method="kd", teacher=f"{tmp_path}/{name}.safetensors")], taught, CPU)
        found[name] = job.fingerprint
    assert len(set(found.values())) == 3


def test_tables_say_which_images_and_taps_were_given(taught, small_npz):
    """Else a base run on other images would be the baseline of those without."""
    given = {"inputs": {"student": {"size": 12}}, "taps": {"teacher": {"stage1": "stage2"}, "student": {"stage1": "stage3"}}}
    plain, other = plan([config(small_npz, method="at", teacher=1), config(small_npz, method="at", teacher=1, **given)], taught, CPU)
    assert plain.variant == ""
    assert other.variant == "inputs.student.size=12, taps.teacher.stage1=stage2, taps.student.stage1=stage3"


@pytest.mark.parametrize("given", [{"inputs": {"student": {"size": 12}}}, {"taps": {"student": {"stage1": "stage1"}}}])
def test_simkd_refuses_taps_and_inputs_of_the_student(taught, small_npz, given):
    with pytest.raises(UserError, match="simkd trains another network than resnet8; leave taps and inputs of the student out"):
        plan([config(small_npz, method="simkd", teacher=1, **given)], taught, CPU)


def test_what_two_students_compare_is_told_of_each(taught, small_npz, tmp_path, monkeypatch):
    """Alike to the letter, but for the name."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.py", "two.py"):
        Path(name).write_text(TWO_STAGE_NET)
    watcher, keys = Lines(), {"method": "at", "teacher": 1, "weights": {"at": 0.01}, "train": {"epochs": 1}}
    run([config(small_npz, student=f"{name}.py:Tiny", **keys) for name in ("one", "two")], taught, CPU, watcher=watcher)
    lines = [line.split(":")[0].strip() for line in watcher.said if line.startswith(("taps", "  stage"))]
    assert lines == ["taps of one.py", "stage1", "taps of two.py", "stage1"]


def test_taps_that_do_not_go_together_are_refused(taught, small_npz):
    taps = {"student": {"stage1": "stage2"}, "teacher": {"stage1": "stage1", "stage2": "stage2"}}
    with pytest.raises(UserError, match="are not named alike"):
        plan([config(small_npz, method="at", teacher=1, taps=taps)], taught, CPU)
    with pytest.raises(UserError, match="resnet14 has no tap 'layer9'; it has: stem"):
        plan([config(small_npz, method="at", teacher=1, taps={"teacher": {"stage1": "layer9"}})], taught, CPU)


def test_networks_with_other_stages_are_paired(taught, small_npz):
    """ResNet-18 has four stages and ResNet-14 three: before, this was refused."""
    watcher = Lines()
    keys = {"student": "resnet18", "method": "at+kd", "teacher": 1, "weights": {"at": 0.01}, "train": {"epochs": 1}}
    (done,) = run([config(small_npz, **keys)], taught, CPU, watcher=watcher)
    assert done.status == "finished"
    assert "taps of resnet18 <- resnet14, stages paired by stride" in watcher.said


def test_a_file_of_ones_own_is_trained_resumed_taught_by_and_evaluated(taught, small_npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(TWO_STAGE_NET)
    (own,) = run([config(small_npz, student="nets.py:Tiny", method="fsp", teacher=1, options={"fsp": {"adapter": "conv1x1"}})], taught, CPU)
    assert (own.status, own.student) == ("finished", "nets.py:Tiny")
    net, about = load_network(taught.run_folder(own.no) / "student.safetensors")
    assert about.model == "nets.py:Tiny"
    assert set(net.state_dict()) == {"a.weight", "a.bias", "b.weight", "b.bias", "out.weight", "out.bias"}
    (pupil,) = run([config(small_npz, method="kd", teacher=own.no)], taught, CPU)
    assert pupil.teacher_accuracy == own.accuracy
    before = plan([config(small_npz, student="nets.py:Tiny", method="base")], taught, CPU)[0].fingerprint
    Path("nets.py").write_text(TWO_STAGE_NET + "# changed\n")
    assert plan([config(small_npz, student="nets.py:Tiny", method="base")], taught, CPU)[0].fingerprint != before


def test_a_teacher_sees_what_it_was_trained_on(ledger, small_npz, tmp_path):
    """The same weights, told to expect pixels from 0 to 1, answer the same only where that is undone."""
    with_a_teacher(ledger, small_npz)
    job = plan([config(small_npz, method="kd", teacher=1)], ledger, CPU)[0]
    about = load_network(ledger.run_folder(1) / "student.safetensors")[1]
    weights = dict(load_network(ledger.run_folder(1) / "student.safetensors")[0].state_dict())
    save_file(weights, tmp_path / "bare.safetensors")
    foreign = f"resnet14@{tmp_path}/bare.safetensors"
    inputs = {"teacher": {"mean": [0.0] * len(about.mean), "std": [1.0] * len(about.std)}}
    accuracies = [
        run([config(small_npz, method="kd", train={"epochs": 1}, **keys)], ledger, CPU)[0].teacher_accuracy
        for keys in ({"teacher": 1}, {"teacher": foreign}, {"teacher": foreign, "inputs": inputs})
    ]
    assert accuracies[0] == accuracies[1] != accuracies[2]
    assert job.teacher.input_spec.mean == about.mean


def test_a_student_of_another_size_ships_with_it(taught, small_npz):
    inputs = {"student": {"size": 12, "mean": [0.5], "std": [0.25]}}
    (done,) = run([config(small_npz, method="base", inputs=inputs)], taught, CPU)
    path = taught.run_folder(done.no) / "student.safetensors"
    net, about = load_network(path)
    assert about.front.input == (1, 12, 12)
    assert about.input != about.front.input
    assert net.input_adapter.size == (12, 12)
    said = command(taught.folder.parent, "evaluate", str(done.no), "--format", "json")
    assert json.loads(said.out)[0]["accuracy"] == done.accuracy
    (pupil,) = run([config(small_npz, method="kd", teacher=done.no, seed=3)], taught, CPU)
    assert pupil.teacher_accuracy == done.accuracy


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"pupil": {"size": 3}}, "inputs.pupil"),
        ({"student": {"std": [0.0]}}, "write numbers above 0"),
        ({"student": {"sise": 3}}, "did you mean 'size'?"),
    ],
)
def test_wrong_inputs_are_refused(inputs, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        validate({"inputs": inputs})
