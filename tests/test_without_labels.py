"""Images without labels alone train a backbone: no task, no accuracy, no classifier; and its features are measured by probes."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.interruptions import cut_off
from helpers.small import config
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from flowdistill import Result, methods, models, ranks, trust
from flowdistill.checks import UserError
from flowdistill.config import DataConfig, RunConfig, validate
from flowdistill.data.batches import SeedBatches, eval_set, to_device
from flowdistill.data.dataset import ImageData
from flowdistill.data.normalisation import Normalisation
from flowdistill.data.sources import load
from flowdistill.ledger import Ledger, Run, exported
from flowdistill.ledger.rebuild import rebuild
from flowdistill.report import tables
from flowdistill.runner import card, integrity, resume, run
from flowdistill.runner.doctor import examine
from flowdistill.runner.evaluate import load_network, probe
from flowdistill.runner.plan import plan
from flowdistill.runner.preview import dry_run
from flowdistill.training.linear_probe import DECAY, logistic_regression
from flowdistill.training.nearest import nearest_classes
from flowdistill.training.weights import load_weights
from flowdistill.types import Batch, DataSpec, MethodContext, Outputs

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
BACKBONE = """
from torch import nn

def backbone(in_chans):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 48, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )

def classifier(in_chans, num_classes):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    return nets_in(tmp_path)


@pytest.fixture
def images(tmp_path: Path, small_npz: Path) -> Path:
    return images_in(tmp_path, small_npz)


def nets_in(folder: Path) -> Path:
    """A file with networks."""
    (folder / "nets.py").write_text(BACKBONE)
    return folder / "nets.py"


def images_in(folder: Path, small_npz: Path) -> Path:
    """The training images without their labels."""
    np.savez(folder / "images.npz", x=np.load(small_npz)["x_train"])
    return folder / "images.npz"


def unlabelled(images: Path, teacher: object, **keys: Any) -> RunConfig:
    train = {"epochs": 2, "batch_size": 64, "lr": 0.05, "precision": "fp32", **keys.pop("train", {})}
    data = {"unlabelled": f"npz:{images}", "pad": 1, "flip": False}
    made = validate({"student": "resnet8", "method": "radio", "teacher": str(teacher), "data": data, "train": train, **keys})
    trust.name(*made.networks)
    return made


@pytest.fixture
def backbone(tmp_path: Path, small_npz: Path, ledger: Ledger) -> Run:
    return trained(tmp_path, small_npz, ledger)


def trained(folder: Path, small_npz: Path, ledger: Ledger) -> Run:
    """A run without labels."""
    (made,) = run([unlabelled(images_in(folder, small_npz), f"{nets_in(folder)}:backbone")], ledger, CPU)
    return made


def file_of(made: Run, ledger: Ledger) -> Path:
    return ledger.run_folder(made.no) / "student.safetensors"


def test_it_leaves_a_backbone_and_no_figure(small_npz: Path, tmp_path: Path, ledger: Ledger) -> None:
    backbone = trained(tmp_path, small_npz, ledger)
    assert backbone.status == "finished"
    assert backbone.backbone
    assert (backbone.accuracy, backbone.correct, backbone.images, backbone.best_correct, backbone.teacher_accuracy) == (None,) * 5
    assert (backbone.top5, backbone.macro_f1, backbone.balanced_accuracy) == (None,) * 3
    assert (backbone.epoch, backbone.best_epoch) == (2, 2)
    curve = ledger.epochs(backbone.no)
    assert [(epoch.correct, epoch.images, [*epoch.terms]) for epoch in curve] == [(None, 0, ["radio"])] * 2
    assert curve[1].terms["radio"] < curve[0].terms["radio"]
    assert (backbone.config["data"]["name"], backbone.config["weights"]["task"], backbone.dataset) == ("none", 0.0, "images")
    weights, about = load_weights(file_of(backbone, ledger))
    assert not [name for name in weights if name.startswith("fc.")]
    assert (about["classes"], about["correct"], about["images"]) == (0, None, 0)
    assert not (ledger.run_folder(backbone.no) / "predictions.npz").exists()
    net, _ = load_network(file_of(backbone, ledger))
    assert net(torch.rand(3, 1, 8, 8)).logits.shape == (3, 0)
    for protocol in tables.PROTOCOLS:
        assert tables.read(backbone, protocol) is None
    refused = rf"run {backbone.no} left a backbone: no classifier, and so no answers and no accuracy; its features are measured by "
    with pytest.raises(UserError, match=refused):
        card.measure(backbone.no, ledger, CPU)
    with pytest.raises(UserError, match=refused):
        _ = Result(backbone, ledger.run_folder(backbone.no)).accuracy


def test_labels_would_change_nothing_but_the_classifier(backbone: Run, images: Path, nets: Path, ledger: Ledger, small_npz: Path) -> None:
    """The same images, order, crops and adapters beside a task of weight 0: the same weights, bit for bit."""
    (alone,) = run([unlabelled(images, f"{nets}:backbone", init_from=str(backbone.no))], ledger, CPU)
    torch.save(models.build(f"{nets}:backbone", DataSpec("", 0, 0, 1, 8, 8)).state_dict(), nets.parent / "backbone.pt")
    weighted = {"method": "radio", "teacher": f"{nets}:backbone@{nets.parent / 'backbone.pt'}", "init_from": str(backbone.no)}
    (beside,) = run([config(small_npz, weights={"task": 0.0}, **weighted)], ledger, CPU)
    ours, theirs = (load_weights(file_of(made, ledger))[0] for made in (alone, beside))
    assert beside.accuracy is not None  # a fresh classifier
    assert {*theirs} - {*ours} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    begun = load_weights(file_of(backbone, ledger))[0]
    assert not all(torch.equal(value, begun[name]) for name, value in ours.items())


def test_it_goes_on_bit_for_bit(images: Path, nets: Path, ledger: Ledger) -> None:
    """Two methods and two seeds in one cohort, with a queue and adapters."""
    steps = 300 // 64
    named = [{"method": "radio", "seed": 0}, {"method": "seed_kd+rkd", "seed": 1}]
    configs = [unlabelled(images, f"{nets}:backbone", train={"epochs": 3, "ema": 0.9}, **keys) for keys in named]
    cut_off(configs, ledger, steps + 2)
    resumed = resume(ledger, CPU)
    straight = run(configs, ledger, CPU, again=True)
    assert [one.resumed for one in resumed] == [1, 1]
    assert [one.weights_hash for one in resumed] == [one.weights_hash for one in straight]
    assert len({one.weights_hash for one in straight}) == 2
    assert run(configs, ledger, CPU)[0].no == straight[0].no  # it is known, and not trained again


def test_a_trained_run_teaches_by_its_features(images: Path, small_npz: Path, ledger: Ledger) -> None:
    """A teacher with a classifier teaches by its features; its logits are of no use to a student without."""
    run([config(small_npz, student="resnet14", seed=9, train={"epochs": 1})], ledger, CPU)
    (made,) = run([unlabelled(images, 1, method="at+radio")], ledger, CPU)
    assert (made.status, made.teacher_accuracy) == ("finished", None)
    with pytest.raises(UserError) as refused:
        run([unlabelled(images, 1, method="kd")], ledger, CPU)
    told = str(refused.value)
    assert told.startswith("kd: student resnet8 gives features and has no classifier, and kd uses its logits; use at, cc, cwd, ")
    assert not {"kd", "ab", "crd", "nd", "dml", "simkd", "base", "tf_kd"} & set(re.split(", | or ", told.partition("; use ")[2]))


def test_it_teaches_and_is_begun_from(backbone: Run, images: Path, small_npz: Path, ledger: Ledger) -> None:
    """A later teacher, with and without labels; the first weights of a student with a classifier, which is fresh; and of one without."""
    no = str(backbone.no)
    taught, classified, again = run(
        [
            config(small_npz, method="radio", teacher=no, student="resnet14"),
            config(small_npz, init_from=no),
            unlabelled(images, no, student="resnet14", method="rkd"),
        ],
        ledger,
        CPU,
    )
    assert [one.status for one in (taught, classified, again)] == ["finished"] * 3
    assert taught.teacher_accuracy is None
    assert (taught.accuracy or 0) > 0
    assert classified.accuracy is not None
    assert "fc.weight" in load_weights(file_of(classified, ledger))[0]
    with pytest.raises(UserError, match=r"kd: teacher resnet8 gives features and has no classifier, and kd uses its logits; use "):
        run([config(small_npz, method="kd", teacher=no)], ledger, CPU)
    with pytest.raises(UserError, match=r"student resnet8: it gives features and has no classifier; give one that gives 10 logits"):
        run([config(small_npz, student=no)], ledger, CPU)
    with pytest.raises(UserError, match=rf"init_from run {classified.no}: it has a classifier, which no image here has a label for; "):
        run([unlabelled(images, no, init_from=str(classified.no))], ledger, CPU)


def test_weights_that_its_code_reads_are_covered(images: Path, nets: Path, ledger: Ledger) -> None:
    """Own code that loads a file: with another file it is another teacher."""
    file = nets.parent / "loading.py"
    file.write_text(
        BACKBONE + f"\nimport torch\ndef loaded(in_chans):\n    net = backbone(in_chans)\n"
        f"    net.load_state_dict(torch.load({str(nets.parent / 'weights.pt')!r}))\n    return net\n"
    )
    fingerprints = []
    for seed in (1, 2):
        weights = models.build(f"{nets}:backbone", DataSpec("", 0, 0, 1, 8, 8), seed=seed).state_dict()
        torch.save(weights, nets.parent / "weights.pt")
        (job,) = plan([unlabelled(images, f"{file}:loaded")], ledger, CPU)
        fingerprints.append(job.fingerprint)
        assert job.teacher is not None
        assert all(torch.equal(value, weights[name]) for name, value in (job.teacher.weights or {}).items())
    assert fingerprints[0] != fingerprints[1]


def test_its_record_is_whole(backbone: Run, ledger: Ledger) -> None:
    """Every file is as written; the ledger is made again from the folder; its export holds the run."""
    assert all(finding.sound for finding in integrity.examine(backbone, ledger))
    exported.exported(ledger)
    ledger.close()
    (ledger.folder / "ledger.db").unlink()
    rebuild(ledger.folder)
    with closing(Ledger(ledger.folder)) as again:
        assert dataclasses.replace(again.run(backbone.no), cohort=backbone.cohort) == backbone


def test_two_ranks_are_shown_the_images_of_one(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes its own part: no label is to be counted in the other's."""
    data = load(unlabelled(images, "-").data)
    on_device = to_device(data, "full", CPU)
    assert (on_device.num_labelled, len(on_device.epoch_images)) == (0, 0)
    assert on_device.normalisation == Normalisation.measured(data.x_train, data.y_train)
    whole = list(SeedBatches(on_device, 0, 64).epoch(1))
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "_current", ranks.Ranks(rank, 2))
        parts.append(list(SeedBatches(on_device, 0, 64).epoch(1)))
    for (expected, batch), (first, one), (second, other) in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([first, second]), expected)
        assert (batch.labels, batch.targets, one.labels, one.targets, other.targets) == (None,) * 5


@pytest.mark.parametrize("keys", [{"randaugment": 9}, {"limit_train": 120}, {"crop": "resized", "pad": 0}])
def test_every_way_to_a_batch(keys: dict[str, Any], images: Path) -> None:
    """Decoded by processes, chosen, and resized: no batch knows a label, and no set has images to measure on."""
    made = unlabelled(images, "-").data
    data = load(validate({"data": made.model_dump() | keys}).data)
    assert len(data.x_train) == keys.get("limit_train", 300)
    on_device = to_device(data, "full", CPU, 0)
    assert (len(on_device.train_eval), len(on_device.test)) == (0, 0)
    for mixup in (False, True):
        drawn = [(len(shown), batch.labels, batch.targets) for shown, batch in SeedBatches(on_device, 0, 60, mixup=mixup).epoch(0)]
        assert drawn == [(60, None, None)] * (len(data.x_train) // 60)


REFUSED = {
    "base": (
        {"method": "base"},
        r"but method 'base' learns from labels or from a student's own logits; use methods on a teacher's features",
    ),
    "crd": ({"method": "crd"}, "but method 'crd' learns from labels"),
    "part": ({"method": "radio+nd"}, "but method 'nd' learns from labels"),
    "dml": ({"method": "dml"}, "but method 'dml' learns from labels or from a student's own logits"),
    "simkd": ({"method": "simkd"}, "but method 'simkd' ships its teacher's classifier"),
    "staged": ({"method": "ab"}, "but method 'ab' has the phase 'task' for the task alone"),
    "task": ({"weights": {"task": 0.5}}, "but weights.task=0.5; leave that out"),
    "smoothing": ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing=0.1 smooths the task, but weights.task=0"),
    "holdout": ({"split": "holdout"}, "split=holdout: the held-out images choose the epoch by their labels, and there are none"),
    "probe": ({"probe": True}, "probe=true: a classifier is fitted to labels, and there are none"),
    "mixup": ({"train": {"mixup": 0.2}}, "train.mixup=0.2 mixes labels too, and there are none; set train.mixup=true"),
    "library": (
        {"teacher": "timm:resnet10t"},
        "teacher=timm:resnet10t: no image has a label, so none was trained on these images; name a ",
    ),
    "few": ({"train": {"batch_size": 512}}, "train.batch_size=512 is more than the 300 training images"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_labels_is_refused(kind: str, images: Path, nets: Path, ledger: Ledger) -> None:
    keys, told = REFUSED[kind]
    with pytest.raises(UserError, match=re.escape(told)) as refused:
        run([unlabelled(images, **{"teacher": f"{nets}:backbone", **keys})], ledger, CPU)
    assert "\n" not in str(refused.value)
    assert ledger.runs() == []


def test_a_student_that_gives_nothing_without_classes(images: Path, nets: Path, ledger: Ledger) -> None:
    with pytest.raises(UserError, match=r"nets.py:classifier: .*0 classes"):
        run([unlabelled(images, f"{nets}:backbone", student=f"{nets}:classifier")], ledger, CPU)


def test_a_network_of_a_library_is_a_backbone_by_itself(images: Path, nets: Path, ledger: Ledger) -> None:
    (made,) = run([unlabelled(images, f"{nets}:backbone", student="timm:test_resnet", train={"epochs": 1})], ledger, CPU)
    weights, about = load_weights(file_of(made, ledger))
    assert (about["classes"], [name for name in weights if name.startswith("fc.")]) == (0, [])


@pytest.mark.parametrize("name", ["data", "unlabelled", "stream"])
def test_keys_of_the_data(name: str) -> None:
    assert DataConfig.model_validate({"unlabelled": "folder:images"}).no_labels
    assert not DataConfig.model_validate({"unlabelled": "folder:images", "name": "digits"}).no_labels
    wrong = {
        "data": ({"name": "none"}, "name=none stands for unlabelled images alone; give these as unlabelled, or name a data set"),
        "unlabelled": ({"unlabelled": "npz:x.npz", "size": 8}, "size=8 belongs to "),
        "stream": ({"unlabelled": "folder:x", "stream": True}, "stream=true: unlabelled images are held in memory; leave it out"),
    }[name]
    with pytest.raises(UserError, match=re.escape(wrong[1])):
        validate({"data": wrong[0]})
    assert validate({"data": {"unlabelled": "folder:x", "size": 8}}).data.size == 8


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_every_method_learns_without_labels_or_says_why_not(method: str) -> None:
    """What is not refused needs no logits of the student: it gives finite terms, and gradients, where there are none."""
    resolved = methods.resolve(method, {}, {})
    if methods.lacking_labels(resolved):
        return
    data = DataSpec("d", 100, 0, 1, 16, 16)
    student, teacher = models.spec("resnet8", data), models.spec("resnet14", DataSpec("d", 100, 7, 1, 16, 16))
    why, built = "", None
    try:
        built = methods.build(resolved, student=student, teacher=teacher, data=data)
    except ValueError as error:
        why = str(error)
    if built is None:
        assert "logits" in why or "no tap" in why  # cat_kd looks at class activation maps
        return
    assert not built.needs.logits
    nets = [
        models.build("resnet8", data, taps=tuple(sorted(built.needs.student))),
        models.build("resnet14", DataSpec("d", 100, 7, 1, 16, 16), taps=tuple(sorted(built.needs.teacher)), seed=1).eval(),
    ]
    if built.needs.context == {"norms"}:
        built.setup(MethodContext(norms={tap: (torch.ones(c), torch.zeros(c)) for tap, c in channels(nets[1]).items()}))
    outputs = [net(torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(2))) for net in nets]
    logits, embedding = (part.detach() for part in outputs[1][:2])
    theirs = Outputs(logits, embedding, {name: value.detach() for name, value in outputs[1].maps.items()})
    terms = built(outputs[0], theirs, Batch(None, torch.arange(8), torch.tensor(0)))
    assert terms
    assert all(value.isfinite() and value.requires_grad for value in terms.values())


def channels(net: models.Network) -> dict[str, int]:
    return {name: net.spec.tap(name).channels for name in net.taps}


def test_before_training(images: Path, nets: Path, ledger: Ledger) -> None:
    """The doctor and the dry run say that there is no task, and compare no gradient with it."""
    planned = unlabelled(images, f"{nets}:backbone")
    findings = {finding.check: finding for finding in examine([planned], ledger, CPU)}
    assert "300 training images 1x8x8 without labels; no image has a label: there is no task" in findings["data"].found
    assert findings["radio: radio"].verdict == "ok"
    assert "the task is not trained beside it, so there is nothing to compare" in findings["radio: radio"].found
    (refused,) = examine([unlabelled(images, f"{nets}:backbone", method="base")], ledger, CPU)
    assert refused.verdict == "wrong"
    (preview,) = dry_run([planned], ledger, CPU)
    assert "gradient_relative_to_task" not in preview
    assert preview["gradient"]["radio"] > 0


def sklearn_knn(train: np.ndarray, labels: np.ndarray, asked: np.ndarray, k: int) -> np.ndarray:
    near = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine", algorithm="brute")
    return near.fit(train, labels).predict(asked)


@pytest.mark.parametrize("k", [1, 7, 20])
def test_neighbours_as_scikit_learn_finds_them(k: int) -> None:
    chance = np.random.default_rng(k)
    labels = chance.integers(0, 5, 90)
    train, asked = chance.normal(size=(90, 6)) + np.eye(6)[labels] * [3, 1, 0.3, 2, 1, 1], chance.normal(size=(1203, 6))
    train *= chance.uniform(0.1, 50, (90, 1))  # norms mean nothing
    found = nearest_classes(torch.from_numpy(asked), torch.from_numpy(train), torch.from_numpy(labels), 5, k)
    np.testing.assert_array_equal(found.numpy(), sklearn_knn(train, labels, asked, k))


def test_equal_votes_go_to_the_lowest_class() -> None:
    train = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert nearest_classes(torch.ones(1, 2, dtype=torch.float64), train, torch.tensor([2, 1]), 4, 2).tolist() == [1]


@pytest.mark.parametrize("how", ["knn", "linear"])
def test_a_probe_of_a_run(how: Any, small_npz: Path, tmp_path: Path, ledger: Ledger, data: ImageData) -> None:
    """By scikit-learn on the features of all images, normalised as in training, neither cropped nor mirrored."""
    backbone = trained(tmp_path, small_npz, ledger)
    found = probe(file_of(backbone, ledger), CPU, how, dataset=f"npz:{small_npz}", k=9 if how == "knn" else None)
    net, about = load_network(file_of(backbone, ledger))
    normalise = Normalisation(about.mean, about.std).on(CPU)
    with torch.no_grad():
        train, asked = (
            torch.cat([net(images).embedding for images, _ in eval_set(x, y, normalise, CPU).batches()]).double().numpy()
            for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
        )
    if how == "knn":
        expected = sklearn_knn(train, data.y_train, asked, 9)
    else:
        mean, std = train.mean(0), train.std(0).clip(1e-8)
        regression = LogisticRegression(C=1 / (DECAY * len(train)), tol=1e-10, max_iter=5000)
        expected = regression.fit((train - mean) / std, data.y_train).predict((asked - mean) / std)
        weight, bias = logistic_regression(torch.from_numpy(train), torch.from_numpy(data.y_train), 10)
        assert abs(int(((torch.from_numpy(asked) @ weight.T + bias).argmax(1).numpy() == data.y_test).sum()) - found.correct) <= 1
    assert abs(int((expected == data.y_test).sum()) - found.correct) <= (how == "linear")
    assert (found.n_train, found.n_test, found.k, found.dataset) == (300, 150, 9 if how == "knn" else None, "small")
    assert found.accuracy == 100 * found.correct / 150


def test_probes_by_command(images: Path, nets: Path, small_npz: Path, tmp_path: Path) -> None:
    """From images to figures in three commands; a student with a classifier is probed on its own data."""
    words = ("--teacher", f"{nets}:backbone", "--student", "resnet8", "--unlabelled", f"npz:{images}", "--epochs", "1")
    said = command(tmp_path, "distill", "--method", "radio", *words, "--set", "train.precision=fp32")
    assert said.code == 0, said.err
    assert "no image has a label: there is no task and no accuracy, and what is trained is a backbone without a classifier" in said.err
    assert "run 1: radio resnet8 seed 0: a backbone without a classifier in fp32" in said.err
    measured = command(tmp_path, "evaluate", "1", "--probe", "knn", "--dataset", f"npz:{small_npz}", "--format", "json")
    assert measured.code == 0, measured.err
    (row,) = json.loads(measured.out)
    assert (row["n_train"], row["n_test"], row["k"]) == (300, 150, 20)
    assert row["probe"] == "weighted k nearest neighbours, cosine, temperature 0.07 (Wu et al. 2018)"
    plain = command(tmp_path, "evaluate", "1")
    assert (plain.code, len(plain.err.splitlines())) == (2, 1)
    assert "is a backbone without a classifier, so without accuracy; measure its features: --probe knn --dataset NAME" in plain.err
    for wrong, told in {
        ("--probe", "knn"): "was trained on images that have no labels here; name a labelled data set with --dataset",
        ("--probe", "knn", "--k", "301", "--dataset", f"npz:{small_npz}"): "k=301 neighbours of 300 training images; set --k lower",
        ("--probe", "linear", "--dataset", "digits"): "was trained on 1x8x8 images; digits has 1x16x16; choose a data set of that shape",
        ("--probe", "linear", "--dataset", "none"): "--dataset none: it has no labels to measure anything by; name a labelled data set",
    }.items():
        refused = command(tmp_path, "evaluate", "1", *wrong)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert told in refused.err
    shown = command(tmp_path, "show", "1")
    assert "run 1 left a backbone" in shown.err
    table = command(tmp_path, "table")
    assert "not in the table, for they left backbones, which have no accuracy: runs 1; flowdistill evaluate 1 --probe knn" in table.err


def test_it_is_exported_as_features(backbone: Run, ledger: Ledger, data: ImageData, tmp_path: Path) -> None:
    result = Result(backbone, ledger.run_folder(backbone.no))
    program = torch.export.load(result.export("torch-export", out=tmp_path / "backbone.pt2")).module()
    net, about = load_network(file_of(backbone, ledger))
    images = torch.from_numpy(data.x_test[:5])
    with torch.no_grad():
        expected = net(Normalisation(about.mean, about.std).on(CPU)(images)).embedding
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
