"""Options of a network behind its name: dropout and stochastic depth draw by the seed, in train mode alone, and wrong ones are one line."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interruptions import STEPS, cut_off
from helpers.small import config

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.ledger import STUDENT_FILE, Ledger
from flowdistill.models.foreign import without_options
from flowdistill.runner import evaluate, resume, run
from flowdistill.runner.plan import plan
from flowdistill.types import DataSpec

pytestmark = pytest.mark.usefixtures("own_code")

CPU = torch.device("cpu")
DATA = DataSpec("some", 100, 10, 1, 8, 8)
PLAIN = "timm:test_resnet"
DROPPED = f"{PLAIN}:drop_path_rate=0.5:drop_rate=0.1"
NETS = """
from torch import nn

def small(classes, channels, width=4, drop=0.0, act="relu"):
    acts = {"relu": nn.ReLU, "gelu": nn.GELU}
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), acts[act](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop),
        nn.Linear(width, classes)
    )
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    file = tmp_path / "nets.py"
    file.write_text(NETS)
    return file


def test_a_library_is_given_them() -> None:
    """timm's own layers have the rates, which rise over the blocks as timm has it; torchvision's classifier has its own."""
    net: Any = models.build(DROPPED, DATA, seed=0).body
    blocks = [block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]
    rates_of_blocks = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates_of_blocks == pytest.approx([0.5 * number / (len(blocks) - 1) for number in range(len(blocks))], abs=1e-6)
    assert net.drop_rate == 0.1
    rates = {module.p for module in models.build("torchvision:mobilenet_v3_small:dropout=0.7", RGB).modules() if hasattr(module, "p")}
    assert rates == {0.7}


RGB = DataSpec("some", 100, 10, 3, 32, 32)


def test_they_change_no_weight_and_no_answer() -> None:
    """A network begins from the weights that it has without, and in eval mode it answers alike: as a teacher, and as what ships."""
    plain, dropped = (models.build(name, DATA, seed=3).eval() for name in (PLAIN, DROPPED))
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(plain(images).logits, dropped(images).logits)
        assert not torch.equal(plain.train()(images).logits, dropped.train()(images).logits)


def test_a_file_is_given_them(nets: Path) -> None:
    net = models.build(f"{nets}:small:width=6:drop=0.25:act=gelu", DATA)
    body: Any = net.body
    assert (body[0].out_channels, type(body[1]).__name__, body[4].p) == (6, "GELU", 0.25)
    assert net.spec.embedding == 6


def test_what_they_draw_is_of_the_seed(small_npz: Path, ledger: Ledger) -> None:
    """Resumed is straight, bit for bit; another rate is another run; the file is measured again as it was recorded."""
    configs = [config(small_npz, student=name, train={"epochs": 4, "lr": 0.01}) for name in (DROPPED, PLAIN)]
    dropped, plain = plan(configs, ledger, CPU)
    assert dropped.fingerprint != plain.fingerprint
    (cut,) = cut_off(configs[:1], ledger, 2 * STEPS)
    (resumed,) = run(configs[:1], ledger, CPU)
    assert (resumed.no, resumed.resumed) == (cut.no, 1)
    (straight,) = run(configs[:1], ledger, CPU, again=True)
    (without,) = run(configs[1:], ledger, CPU)
    assert resumed.weights_hash == straight.weights_hash != without.weights_hash
    assert resumed.init_hash == without.init_hash
    assert evaluate(ledger.run_folder(resumed.no) / STUDENT_FILE, CPU).correct == resumed.correct
    assert resume(ledger, CPU) == []


def test_first_weights_are_those_without(small_npz: Path, ledger: Ledger) -> None:
    """Published weights, or those of a run, begin a network with stochastic depth."""
    run([config(small_npz, student=PLAIN, train={"epochs": 1, "lr": 0.01})], ledger, CPU)
    (began,) = run([config(small_npz, student=DROPPED, init_from="1", train={"epochs": 1, "lr": 0.01})], ledger, CPU)
    assert began.variant == "init=run 1"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("timm:test_vit:drop_path=0.1", "timm:test_vit:drop_path=0.1: unknown option 'drop_path'; did you mean 'drop_path_rate'?"),
        ("timm:test_vit:img_size=8", "timm:test_vit:img_size=8: unknown option 'img_size'; choose from: "),
        ("timm:test_vit:drop_rate=1", "timm:test_vit:drop_rate=1: drop_rate=1: a rate is a number of at least 0 and below 1"),
        ("timm:test_vit:drop_rate=nan", "timm:test_vit:drop_rate=nan: drop_rate=nan: a rate is a number of at least 0 and below 1"),
        ("timm:test_vit:drop_rate=-0.1", "timm:test_vit:drop_rate=-0.1: drop_rate=-0.1: a rate is a number of at least 0 and below 1"),
        ("timm:test_vit:drop_rate=true", "timm:test_vit:drop_rate=true: drop_rate=True: a rate is a number of at least 0 and below 1"),
        ("timm:test_vit:drop_rate=0.1:drop_rate=0.2", "timm:test_vit:drop_rate=0.1:drop_rate=0.2: drop_rate is given twice; give it once"),
        (
            "timm:vgg11:drop_path_rate=0.1",
            "timm:vgg11:drop_path_rate=0.1: can't be made for images of 1x32x32 and 10 classes: TypeError: VGG.__init__() got",
        ),
        ("FILE:small:depth=3", "FILE:small: unknown option 'depth'; did you mean 'width'?"),
        ("FILE:small:classes=3", "FILE:small: classes is told by the data; leave classes=3 out"),
    ],
)
def test_wrong_ones_are_one_line(name: str, line: str, nets: Path) -> None:
    with pytest.raises(UserError) as error:
        models.spec(name.replace("FILE", str(nets)), DataSpec("some", 100, 10, 1, 32, 32))
    assert str(error.value).startswith(line.replace("FILE", str(nets)))
    assert "\n" not in str(error.value)


def test_a_rate_that_changes_nothing_is_refused() -> None:
    """No block of this network has the shortcut that stochastic depth needs."""
    with pytest.raises(UserError, match=r"drop_path_rate=0\.2 changes nothing, the network draws no random numbers; leave it out"):
        models.spec("timm:test_efficientnet:drop_path_rate=0.2", RGB)


def test_a_name_without_options_is_as_it_was() -> None:
    assert without_options(DROPPED) == PLAIN
    for name in ("resnet20", "timm:resnet18", "nets.py:small", "12", "reused(resnet8,resnet20,2)"):
        assert without_options(name) == name


def test_own_networks_have_none(small_npz: Path, tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "runs", create=True)) as ledger, pytest.raises(UserError, match=r"resnet8:drop_rate=0\.1"):
        plan([config(small_npz, student="resnet8:drop_rate=0.1")], ledger, CPU)
