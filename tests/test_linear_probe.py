"""A linear probe of a teacher's features: it is the regression that it says, it teaches, it is on record; unfitted it gives no number."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.interruptions import cut_off
from helpers.small import config
from sklearn.linear_model import LogisticRegression

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.ledger import Ledger
from flowdistill.models.probed import Probed
from flowdistill.runner import card, resume, run
from flowdistill.runner.plan import plan
from flowdistill.training.linear_probe import DECAY, logistic_regression
from flowdistill.training.weights import load_weights
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
DATA = DataSpec("some", 100, 10, 1, 8, 8)
BACKBONE = """
from torch import nn

def backbone(in_chans):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 48, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
"""


def test_it_is_the_regression_that_it_says() -> None:
    """scikit-learn's, on features of very different scales, one of which is constant."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    features = torch.randn(200, 5, generator=generator, dtype=torch.float64) + torch.eye(5, dtype=torch.float64)[labels]
    features *= torch.tensor([1.0, 100.0, 1e-3, 5.0, 1.0])
    features[:, 4] = 7.0
    weight, bias = logistic_regression(features, labels, 3)
    found = (features @ weight.T + bias).softmax(1)
    scaled = ((features - features.mean(0)) / features.std(0, unbiased=False).clamp(min=1e-8)).numpy()
    theirs = LogisticRegression(C=1 / (DECAY * len(labels)), tol=1e-8, max_iter=1000).fit(scaled, labels.numpy())
    np.testing.assert_allclose(found.numpy(), theirs.predict_proba(scaled), atol=1e-4)


def test_a_class_without_images_is_never_the_answer() -> None:
    features, labels = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 2
    weight, bias = logistic_regression(features, labels, 3)
    answers = features @ weight.T + bias
    assert answers.isfinite().all()
    assert not (answers.argmax(1) == 2).any()


def test_unfitted_it_gives_no_number() -> None:
    net = Probed(models.build("resnet8", DATA, seed=0), 10).eval()
    assert net(torch.rand(2, 1, 8, 8)).logits.isnan().all()


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A backbone with random weights, in a file."""
    file = tmp_path / "nets.py"
    file.write_text(BACKBONE)
    name = f"{file}:backbone"
    torch.save(models.build(name, DATA, seed=5).state_dict(), tmp_path / "backbone.pt")
    return f"{name}@{tmp_path / 'backbone.pt'}"


def test_a_backbone_teaches_by_logits(teacher: str, small_npz: Path, tmp_path: Path) -> None:
    """From the command line: kd is refused without a probe, and with one it trains; the card knows the probe again."""
    words = ("distill", "--method", "base,kd", "--student", "resnet8", "--teacher", teacher, "--dataset", f"npz:{small_npz}")
    words = (*words, "--epochs", "2", "--set", "train.precision=fp32")
    assert "gives features and has no classifier, and kd uses its logits" in command(tmp_path, *words).err
    said = command(tmp_path, *words, "--probe")
    assert said.code == 0, said.err
    with closing(Ledger(tmp_path / "runs")) as ledger:
        base, kd = ledger.runs()
        assert (base.variant, kd.variant) == ("", "probe")
        assert "probe" not in base.config, "base has no teacher, and its row is that of a base without the option"
        assert kd.teacher_accuracy is not None
        assert kd.teacher_accuracy > 30, "random features of digits are not chance"
        line = f"with a linear probe of its features): {kd.teacher_accuracy:.2f} % of the test images"
        assert line in said.err
        weights, about = load_weights(ledger.run_folder(kd.no) / "probe.safetensors")
        assert (about["accuracy"], weights["weight"].shape) == (kd.teacher_accuracy, (10, 48))
        measured = card.measure(kd.no, ledger, CPU)
        score = measured.columns[0].score
        assert score is not None
        assert 100 * score.correct / sum(measured.class_images) == pytest.approx(kd.teacher_accuracy)
    assert command(tmp_path, "check").code == 0
    again = command(tmp_path, *words, "--probe")
    assert "run 2 has it already, skipped" in again.err


def test_it_is_another_run_than_without(small_npz: Path, tmp_path: Path) -> None:
    """A teacher that has a classifier may get a probe, too."""
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger:
        run([config(small_npz, seed=9)], ledger, CPU)
        plain, probed = plan([config(small_npz, method="kd", teacher="1", probe=probe) for probe in (False, True)], ledger, CPU)
        assert plain.fingerprint != probed.fingerprint
        run([config(small_npz, method="kd+at", teacher="1", probe=True)], ledger, CPU)
        assert (ledger.run(2).status, ledger.run(2).variant) == ("finished", "probe")


def test_where_nothing_asks_it_it_is_left_out(teacher: str, small_npz: Path, tmp_path: Path) -> None:
    """rkd looks at no logits: the run is the one without a probe."""
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger:
        plain, probed = plan([config(small_npz, method="rkd", teacher=teacher, probe=probe) for probe in (False, True)], ledger, CPU)
    assert plain.fingerprint == probed.fingerprint
    assert probed.variant == ""


def test_a_student_that_ships_its_teacher_s_classifier(small_npz: Path, tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger:
        run([config(small_npz, seed=9)], ledger, CPU)
        with pytest.raises(UserError) as error:
            plan([config(small_npz, method="simkd", teacher="1", probe=True)], ledger, CPU)
    assert str(error.value) == "simkd ships its teacher's own classifier, not that of a probe; leave --probe out"


def test_cut_off_and_resumed_it_is_the_same(teacher: str, small_npz: Path, tmp_path: Path) -> None:
    wanted = config(small_npz, method="kd", teacher=teacher, probe=True, train={"epochs": 3})
    with closing(Ledger(tmp_path / "whole", create=True)) as ledger:
        run([wanted], ledger, CPU)
        whole = ledger.run(1).weights_hash
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger:
        cut_off([wanted], ledger, steps=9)
        resume(ledger, CPU)
        assert ledger.run(1).weights_hash == whole
    shutil.rmtree(tmp_path / "whole")


def test_with_other_classes_it_gives_the_data_s(small_npz: Path, tmp_path: Path) -> None:
    """A teacher of four classes teaches ten by a probe."""
    with np.load(small_npz) as whole:
        parts = {f"{axis}_{part}": whole[f"{axis}_{part}"][whole[f"y_{part}"] < 4] for axis in "xy" for part in ("train", "test")}
    np.savez(tmp_path / "few.npz", **parts)
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger:
        run([config(tmp_path / "few.npz", seed=9)], ledger, CPU)
        with pytest.raises(UserError, match="has 10 classes, resnet8 4"):
            plan([config(small_npz, method="kd", teacher="1")], ledger, CPU)
        run([config(small_npz, method="kd", teacher="1", probe=True)], ledger, CPU)
        assert ledger.run(2).status == "finished"


def test_features_that_are_not_finite(tmp_path: Path, small_npz: Path) -> None:
    (tmp_path / "nets.py").write_text(BACKBONE)
    name = f"{tmp_path / 'nets.py'}:backbone"
    weights = models.build(name, DATA, seed=5).state_dict()
    weights["0.bias"][0] = torch.inf
    torch.save(weights, tmp_path / "broken.pt")
    wanted = config(small_npz, method="kd", teacher=f"{name}@{tmp_path / 'broken.pt'}", probe=True)
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger, pytest.raises(UserError) as error:
        run([wanted], ledger, CPU)
    assert str(error.value) == f"teacher {name}: its features of the training images are not finite; mend it, or choose another"
