"""Wrong commands: one line that says what was given, what is allowed and what to do; exit 2; nothing recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command import command

DIGITS = ("--dataset", "digits")
WRONG = [
    (("train", "--model", "resnt20", *DIGITS), "unknown model 'resnt20': did you mean 'resnet20'?"),
    (("train", "--model", "alexnet", *DIGITS), "unknown model 'alexnet': choose from: resnet8, resnet14, resnet20"),
    (("train", "--dataset", "digts"), "unknown data set 'digts': did you mean 'digits'?"),
    (("train", *DIGITS, "--seeds", "2-0"), "--seeds '2-0': the range 2-0 runs backwards; write 0-2"),
    (("train", *DIGITS, "--seeds", "a"), "--seeds 'a': 'a' is no seed; write numbers and ranges such as 0-2,5"),
    (
        ("train", *DIGITS, "--seeds", "1,0-2"),
        "--seeds '1,0-2' names a seed twice; a seed is trained once (use --again to repeat a finished run)",
    ),
    (("train", *DIGITS, "--epochs", "0"), "train.epochs=0: input should be greater than or equal to 1"),
    (("train", *DIGITS, "--lr", "nan"), "train.lr=nan: input should be a finite number"),
    (("train", *DIGITS, "--batch-size", "4096"), "train.batch_size=4096 is more than the 898 training images; set --batch-size lower"),
    (("train", *DIGITS, "--set", "train.momentun=0.9"), "unknown key 'train.momentun': did you mean 'momentum'?"),
    (("train", *DIGITS, "--set", "train.momentum"), "--set 'train.momentum': write key=value, such as train.lr=0.05"),
    (("train", *DIGITS, "--set", "data.pad=16"), "data.pad=16: reflection needs less than the image's 16 pixels; set data.pad lower"),
    (("train", *DIGITS, "--seeds", "0-99999999999"), "--seeds '0-99999999999': 100,000,000,000 seeds in one range; at most 10,000"),
    (("train", *DIGITS, "--seeds", "99999999999999999999"), "seed=99999999999999999999: input should be less than 9223372036854775808"),
    (("train", *DIGITS, "--set", "train.nesterov=true", "--set", "train.momentum=0"), "train: nesterov=true needs a momentum above 0"),
    (("train", *DIGITS, "--set", "train.lr=true"), "train.lr=True: input should be a valid number"),
    (("train", *DIGITS, "--set", "teacher=4"), "teacher=4: training on the labels alone has none"),
    (("distill", "--method", "base,fsp", *DIGITS, "--set", "options=3"), "options=3: input should be a valid dictionary"),
    (("distill", "--method", "", "--teacher", "resnet20", *DIGITS), "unknown method ''"),
    (("distill", "--method", "fsp,fsp", "--teacher", "resnet20", *DIGITS), "--method fsp,fsp names a method twice"),
    (("distill", "--method", "fsp", "--teacher", "9" * 30, *DIGITS), f"no run {'9' * 30} in runs/ledger.db: it has no runs yet"),
    (("train", *DIGITS, "--device", "gpu"), "--device 'gpu' is not available here; use auto, cpu, cuda or mps"),
    (("train", *DIGITS, "--config", "none.toml"), "--config none.toml: cannot be read as text (No such file or directory)"),
    (("train", "--config", "flat.toml", *DIGITS), "data.name='digits': 'data' is a single value here and has no keys below it"),
    (("train", "--dataset", "npz:none.npz"), "npz:none.npz: no such file"),
    (("train", "--dataset", "npz:junk.npz"), "npz:junk.npz: not a readable npz file"),
    (("train", "--dataset", "npz:labels.npz"), "npz:labels.npz: key 'y_test' is missing"),
    (("distill", "--method", "fps", *DIGITS), "unknown method 'fps': did you mean 'fsp'?"),
    (("distill", "--method", "fsp", *DIGITS), "method 'fsp' needs a teacher: --teacher MODEL, RUN or FILE"),
    (
        ("distill", "--method", "fsp", "--student", "resnet8", "--teacher", "resnet20", *DIGITS),
        "no resnet20 was trained on digits (full split) yet; train one: flowdistill train --model resnet20 --dataset digits --seeds 100",
    ),
    (
        ("distill", "--method", "fsp", "--teacher", "7", *DIGITS),
        "no run 7 in runs/ledger.db: it has no runs yet; flowdistill runs lists them",
    ),
    (("distill", "--method", "fsp", "--teacher", "none.safetensors", *DIGITS), "weights file none.safetensors: no such file"),
    (
        ("distill", "--method", "fsp", "--teacher", "resnet20@evil.pt", *DIGITS),
        "weights file evil.pt: cannot be read as a dictionary of named tensors",
    ),
    (
        ("distill", "--method", "kd", "--teacher", "resnet20@wrong.pt", *DIGITS),
        "wrong.pt does not fit resnet20: it lacks 'bn1.bias'; name the model as MODEL@FILE",
    ),
    (("distill", "--method", "kd+kd", "--teacher", "resnet20", *DIGITS), "method 'kd+kd' names a part twice; give each once"),
    (("distill", "--method", "base+kd", "--teacher", "resnet20", *DIGITS), "method 'base+kd': 'base' is training on labels alone"),
    (
        ("distill", "--method", "fsp", "--teacher", "resnet20", *DIGITS, "--set", "options.fsp.pool=min"),
        "options.fsp.pool='min': input should be 'max' or 'avg'",
    ),
    (
        ("distill", "--method", "base,fsp", "--teacher", "resnet20", *DIGITS, "--set", "options.fps.pool=avg"),
        "options.fps: none of base, fsp has it; did you mean 'fsp'?",
    ),
    (
        ("distill", "--method", "fsp", "--teacher", "resnet20", *DIGITS, "--set", "weights.at=1"),
        "weights.at: method 'fsp' has no such term; choose from: task, fsp",
    ),
    (("table",), "no ledger in runs: train something first (flowdistill demo), or name its folder with --runs"),
    (("table", "--protocol", "median"), "Invalid value for '--protocol': Value error, 'median' is not one of 'last', 'best', 'holdout'"),
    (("show", "one"), "Invalid value for 'run': Input should be a valid integer"),
    (("evaluate", "runs/1/student.safetensors"), "weights file runs/1/student.safetensors: no such file"),
    (("evaluate", "junk.safetensors"), "weights file junk.safetensors: not a valid safetensors file"),
    (("methods", "fspp"), "unknown method 'fspp': did you mean 'fsp'?"),
    (("trian",), "No such command 'trian'"),
    (("train", "--speed", "9"), "No such option: --speed"),
]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('executed', 'w').close()",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Junk and hostile files."""
    path = tmp_path_factory.mktemp("bad")
    (path / "junk.npz").write_bytes(b"junk")
    (path / "flat.toml").write_text('data = "digits"')
    (path / "junk.safetensors").write_bytes(b"junk" * 10)
    torch.save(Evil(), path / "evil.pt")
    torch.save({"conv1.weight": torch.zeros(1)}, path / "wrong.pt")
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    np.savez(path / "labels.npz", x_train=images, y_train=labels, x_test=images)
    return path


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_mistake_is_one_line(folder: Path, words: tuple[str, ...], line: str) -> None:
    said = command(folder, *words)
    assert said.code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith(f"flowdistill: {line}"), said.err
    assert not (folder / "runs").exists(), "a mistake records nothing"
    assert not (folder / "executed").exists(), "a foreign file is never executed"
