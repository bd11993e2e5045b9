"""Wrong ``--config`` files: refused in one line, whatever they are and whatever is in them."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from helpers.command import assert_refused

DEEP, LONG = 100_000, 500_000
KEYS = "student, teacher, init_from, peer, side, seed, split, data, train, method, options, weights, probe, teacher_shares, taps, inputs"
NO_KEYS = "--config it: has no keys; write a table of keys, such as student, data, train"
NO_UTF8 = "--config it: not UTF-8 text; write TOML, or name a run.json"
TOO_DEEP = "--config it: nested too deeply; a config has three levels"


def cut(start: str, filler: str, end: str) -> str:
    """A long line as it is shown: both ends."""
    return f"{start}{filler * (300 - len(start))} ... {filler * (300 - len(end))}{end}"


WRONG: list[tuple[str | bytes, str]] = [
    # no table of keys
    ("", NO_KEYS),
    ("# nothing yet\n", NO_KEYS),
    ("{}", NO_KEYS),
    ('{"config": {}}', NO_KEYS),
    ("config = 3", "--config it: 'config' is 3; write a table of keys, such as student, data, train"),
    ('{"config": [1, 2]}', "--config it: 'config' is [1, 2]; write a table of keys, such as student, data, train"),
    ("student = 'r\xe9sn\xe9t'".encode("latin-1"), NO_UTF8),
    ("seed = 1".encode("utf-16"), NO_UTF8),
    ("#" * 1_000_001, "--config it: 1,000,001 bytes; a config has at most 1,000,000"),
    ('{"train":' * DEEP, TOO_DEEP),
    ("seed = " + "[" * DEEP, TOO_DEEP),
    (f'{{"seed": {"9" * 5000}}}', "--config it: a number in it has thousands of digits"),
    # unknown keys at every level
    ("studnet = 1", "unknown key 'studnet': did you mean 'student'?"),
    ("wibble = 1", f"unknown key 'wibble': choose from: {KEYS}"),
    ("'train.epochs' = 3", f"unknown key 'train.epochs': choose from: {KEYS}"),
    ("[data]\nnam = 'digits'", "unknown key 'data.nam': did you mean 'name'?"),
    ("[train]\nepoch = 3", "unknown key 'train.epoch': did you mean 'epochs'?"),
    (
        "[train.fsp]\npool = 'avg'",
        "unknown key 'train.fsp': choose from: epochs, batch_size, lr, momentum, "
        "weight_decay, nesterov, schedule, milestones, warmup_epochs, precision, mixup, freeze, label_smoothing, batch_norm, "
        "optimizer, optimizer_options, decay_norm_and_bias, warmup_steps, layer_decay, clip, accumulate, ema, "
        "cutmix, random_erasing, class_weights, sampling, patience",
    ),
    ("[options.base]\npool = 'avg'", "unknown key 'options.base.pool': there is none to choose from"),
    ("[options.fsp]\npool = 'avg'", "options.fsp: method 'base' has no such part; choose from: base"),
    # of another type
    ("[train]\nlr = '0.1'", "train.lr='0.1': input should be a valid number"),
    ("[train]\nlr = true", "train.lr=True: input should be a valid number"),
    ('{"train": {"lr": null}}', "train.lr=None: input should be a valid number"),
    ("[train]\nepochs = 3.0", "train.epochs=3.0: input should be a valid integer"),
    ('{"seed": true}', "seed=True: input should be a valid integer"),
    ("seed = 2020-01-01", "seed=datetime.date(2020, 1, 1): input should be a valid integer"),
    ("[seed]\nx = 1", "seed: input should be a valid integer"),
    ("[data]\nname = 3", "data.name=3: input should be a valid string"),
    ("[data]\nflip = 'perhaps'", "data.flip='perhaps': input should be a valid boolean, unable to interpret input"),
    ("data = 'digits'", "data='digits': must be a table of keys"),
    ("train = [1, 2]", "train=[1, 2]: must be a table of keys"),
    ('{"train": null}', "train=None: must be a table of keys"),
    ("options = 'fsp'", "options='fsp': must be a table of keys"),
    ("[options]\npool = 'avg'", "options.pool='avg': must be a table of keys"),
    ("[weights]\ntask = 'one'", "weights.task='one': input should be a valid number, unable to parse string as a number"),
    # out of range
    ("[train]\nbatch_size = 0", "train.batch_size=0: input should be greater than or equal to 1"),
    ("[train]\nmomentum = 1.5", "train.momentum=1.5: input should be less than 1"),
    ("[train]\nlr = nan", "train.lr=nan: input should be a finite number"),
    ('{"train": {"weight_decay": NaN}}', "train.weight_decay=nan: input should be a finite number"),
    ('{"train": {"lr": 1e400}}', "train.lr=inf: input should be a finite number"),
    ("[weights]\ntask = inf", "weights.task=inf: input should be a finite number"),
    ("seed = 9223372036854775808", "seed=9223372036854775808: input should be less than 9223372036854775808"),
    ("split = 'test'", "split='test': input should be 'full' or 'holdout'"),
    (
        "[train]\nnesterov = true\nmomentum = 0.0",
        "train: nesterov=true needs a momentum above 0; set train.momentum or leave nesterov out",
    ),
    (
        "[train]\nmilestones = [0.75, 0.5]",
        "train: milestones are shares of the run between 0 and 1 that rise, such as [0.5, 0.75]",
    ),
    (
        "[train]\nmilestones = [100, 150]",
        "train: milestones are shares of the run between 0 and 1 that rise, such as [0.5, 0.75]",
    ),
    ("[data]\ncrop = 'centre'", "data.crop='centre': input should be 'shift' or 'resized'"),
    ("[data]\ncrop = 'resized'\npad = 4", "data: pad=4 belongs to crop=shift; leave one of them out"),
    (
        "[data]\nname = 'npz:none.npz'\n[train]\nmixup = true\n[weights]\ntask = 0",
        "train.mixup=true: mixed images have no labels, but method 'base' learns from labels; choose one that does not, such as kd, or set "
        "train.mixup=false",
    ),
    (
        "[train]\noptimizer = 'adamw'\nlr = 0.001\nmomentum = 0.9",
        "train: momentum=0.9 belongs to optimizer=sgd, not to adamw; leave it out",
    ),
    (
        "[train]\noptimizer = 'AdamW'\nlr = 0.001\nnesterov = true",
        "train: nesterov=true belongs to optimizer=sgd, not to adamw; leave it out",
    ),
    (
        "[train]\noptimizer = 'adamw'",
        "train: optimizer=adamw needs a rate, for the default lr is one of sgd; give lr, such as lr=0.001",
    ),
    (
        "[train.optimizer_options]\ndampening = 0.1",
        "train: optimizer_options={'dampening': 0.1} belongs to other optimizers; sgd has momentum and nesterov",
    ),
    ("[train]\noptimizer = 'adam-w'\nlr = 0.001", "train.optimizer=adam-w: did you mean 'adamw'?"),
    (
        "[train]\nwarmup_epochs = 2\nwarmup_steps = 10",
        "train: warmup_steps=10 and warmup_epochs=2 are two warm-ups; leave one out",
    ),
    ("[train]\npatience = 0", "train.patience=0: input should be greater than or equal to 1"),
    (
        "[train]\npatience = 5",
        "train.patience=5: split=full holds no images out, and test may not say when to stop; use split=holdout (--holdout), or leave it "
        "out",
    ),
    ("[train]\nema = 0.0", "train.ema=0.0: input should be greater than 0"),
    ("[train]\nema = 1", "train.ema=1: input should be less than 1"),
    ("[train]\naccumulate = 3", "train: accumulate=3 does not divide batch_size=128; set one to fit the other"),
    (
        "[train]\naccumulate = 4\nbatch_norm = 'synchronised'",
        "train: accumulate=4: each part is normalised by itself, so batch_norm=synchronised can't be had",
    ),
    (
        "[train]\nmixup = true\ncutmix = 1",
        "train: mixup=true leaves no labels, which cutmix=1 mixes; set mixup to a number, or leave one out",
    ),
    (
        "[train]\nclass_weights = 'balanced'\nsampling = 'balanced'",
        "train: class_weights=balanced and sampling=balanced each make up for uneven classes; leave one of them out",
    ),
    (
        "[data]\nunlabelled = 'folder:more'\n[train]\nsampling = 'balanced'",
        "train.sampling=balanced: images of data.unlabelled=folder:more have no class; leave one out",
    ),
    (
        "[train]\nclass_weights = [1, -2]",
        "train.class_weights=[1, -2]: write none, balanced, or a number above 0 for each class, such as 1,2.5",
    ),
    ("[train]\nrandom_erasing = 1.5", "train.random_erasing=1.5: input should be less than or equal to 1"),
    ("[train]\nsampling = 'even'", "train.sampling='even': input should be 'shuffled' or 'balanced'"),
    ("[train]\nlayer_decay = 0", "train.layer_decay=0: input should be greater than 0"),
    ("[train]\nlayer_decay = 1.5", "train.layer_decay=1.5: input should be less than or equal to 1"),
    ("[train]\nclip = 0", "train.clip=0: input should be greater than 0"),
    ("[train]\nwarmup_epochs = 200", "train: warmup_epochs=200 leaves nothing of epochs=200; set it lower"),
    ("teacher = 'resnet20'", "teacher='resnet20': training on the labels alone has none; use flowdistill distill, or leave it out"),
    # hostile: one line stays one line, without control characters, and short
    (r'"\u001b[2J\u0007" = 1', rf"unknown key '\x1b[2J\x07': choose from: {KEYS}"),
    (r'{"split": "a\nflowdistill: well\r\u001b[31m"}', r"split='a\nflowdistill: well\r\x1b[31m': input should be 'full' or 'holdout'"),
    (r'{"weights": {"a\nb": "c"}}', r"weights.a\nb='c': input should be a valid number, unable to parse string as a number"),
    (r'{"split": "\u202etset"}', r"split='\u202etset': input should be 'full' or 'holdout'"),
    (r'{"split": "\ud800"}', r"split='\ud800': input should be a valid string, unable to parse raw data as a unicode string"),
    (r'{"data": {"name": "npz:a\u0000b"}}', r"npz:a\x00b: no such file (embedded null byte)"),
    (f'{{"{"k" * LONG}": 1}}', cut("unknown key '", "k", f"': choose from: {KEYS}")),
    (f'{{"split": "{"v" * LONG}"}}', cut("split='", "v", "': input should be 'full' or 'holdout'")),
    (f'{{"data": {{"name": "npz:{"p" * 5000}"}}}}', cut("npz:", "p", ": no such file (File name too long)")),
]

MALFORMED = [
    "\0" * 1000,
    "[train\nlr = 1",
    "seed = 1\nseed = 2",
    '{"seed": 1',
    '{"seed": 1} {}',
    '[{"seed": 1}]',
]

PLACES = [
    ("none.toml", "--config none.toml: no such file"),
    ("folder", "--config folder: a folder, not a file; name a regular file"),
    ("/dev/zero", "--config /dev/zero: a device or pipe, not a file; name a regular file"),
    ("pipe", "--config pipe: a device or pipe, not a file; name a regular file"),
    ("loop", "--config loop: no such file (Too many levels of symbolic links)"),
    ("empty/below", "--config empty/below: no such file (Not a directory)"),
    ("~nobody-of-that-name/it", "--config ~nobody-of-that-name/it: no such file (Could not determine home directory.)"),
    ("x" * 300, f"--config {'x' * 300}: no such file (File name too long)"),
    ("huge", "--config huge: 1,099,511,627,776 bytes; a config has at most 1,000,000"),
]


@pytest.mark.parametrize(("content", "line"), WRONG, ids=[str(content)[:40] for content, _ in WRONG])
def test_a_wrong_config_is_told_in_one_line(tmp_path: Path, content: str | bytes, line: str) -> None:
    (tmp_path / "it").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(tmp_path, ["train", "--config", "it"], line)


@pytest.mark.parametrize("content", MALFORMED, ids=[repr(content)[:40] for content in MALFORMED])
def test_what_is_neither_toml_nor_json_is_told_with_its_place(tmp_path: Path, content: str) -> None:
    (tmp_path / "it").write_text(content)
    with pytest.raises(ValueError) as error:
        (json if content.startswith("{") else tomllib).loads(content)
    assert_refused(tmp_path, ["train", "--config", "it"], f"--config it: neither TOML nor a JSON object ({error.value})")


@pytest.mark.parametrize(("place", "line"), PLACES)
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, place: str, line: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # takes no room: a hole
    assert_refused(tmp_path, ["train", "--config", place], line)
