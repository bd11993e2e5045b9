"""Every key of a RunConfig, and another value for each."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from flowdistill.config import InputConfig, RunConfig

ROLES = ("student", "teacher")

CHANGED: dict[str, Any] = {
    "student": "resnet14",
    "teacher": "OTHER",
    "init_from": "OTHER",
    "peer": "resnet14",
    "probe": True,
    "teacher_shares": "holdout",
    "side": 2,
    "seed": 3,
    "split": "holdout",
    "data.name": "NPZ",
    "data.root": "elsewhere",
    "data.crop": "resized",
    "data.pad": 1,
    "data.flip": True,
    "data.randaugment": 9,
    "data.limit_train": 500,
    "data.size": 9,
    "data.channels": 3,
    "data.skip_broken": True,
    "data.unlabelled": "UNLABELLED",
    "data.stream": True,
    "data.label": "other",
    "train.epochs": 7,
    "train.batch_size": 64,
    "train.lr": 0.05,
    "train.momentum": 0.8,
    "train.weight_decay": 0.0,
    "train.nesterov": True,
    "train.schedule": "cosine",
    "train.milestones": [0.4, 0.8],
    "train.warmup_epochs": 1,
    "train.precision": "bf16",
    "train.mixup": 0.2,
    "train.freeze": ["bn1"],
    "train.label_smoothing": 0.1,
    "train.batch_norm": "synchronised",
    "train.optimizer": "adamw",
    "train.optimizer_options": {"eps": 1e-6},  # of adamw
    "train.decay_norm_and_bias": False,
    "train.warmup_steps": 5,
    "train.layer_decay": 0.75,
    "train.clip": 1.0,
    "train.accumulate": 2,
    "train.ema": 0.9,
    "train.cutmix": 1.0,
    "train.random_erasing": 0.25,
    "train.class_weights": "balanced",
    "train.sampling": "balanced",
    "train.patience": 2,
    "method": "at",
    "options": {"fsp": {"pool": "avg"}},
    "weights": {"fsp": 10.0},
    "taps.student": {"stem": "stem", "stage1": "stage1.first", "stage2": "stage2", "stage3": "stage3"},
    "taps.teacher": {"stem": "stem", "stage1": "stage1.first", "stage2": "stage2", "stage3": "stage3"},
    "inputs.teacher.channels": 1,  # as its file has them
    "inputs.student.channels": 3,
    **{f"inputs.{role}.{key}": value for role in ROLES for key, value in {"size": 8, "mean": [0.2], "std": [0.3]}.items()},
}


def every_key(model: type[BaseModel] = RunConfig, prefix: str = "") -> set[str]:
    """The dotted keys of all single values; of tables by role one for each role."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        inner = next(
            (arg for arg in (field.annotation, *get_args(field.annotation)) if isinstance(arg, type) and issubclass(arg, BaseModel)), None
        )
        if name in ("taps", "inputs"):
            below = [every_key(InputConfig, f"{name}.{role}.") if name == "inputs" else {f"{name}.{role}"} for role in ROLES]
            found |= set().union(*below)
        elif inner is not None:
            found |= every_key(inner, f"{prefix}{name}.")
        else:
            found.add(f"{prefix}{name}")
    return found


def put(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The values with a dotted key set."""
    first, _, rest = key.partition(".")
    return {**values, first: put(values.get(first, {}), rest, value) if rest else value}
