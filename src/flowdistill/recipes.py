"""Recipes by name: what the field trains with, and where that is written. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .checks import UserError, did_you_mean


@dataclass(frozen=True)
class Recipe:
    """Values of a RunConfig that belong together. What the user sets takes precedence.

    Attributes:
        source: who trains so.
        values: keys of RunConfig.
        of_student: the start of a student's name -> values for such students. They take precedence over ``values``.
        of_method: method, alone or part of a composition -> its options and weights.
        of_pair: (method in full, teacher, student) -> what the method's authors set for this pair.
        made_for: the students that the recipe was made for. Empty: any.
    """

    source: str
    values: Mapping[str, Mapping[str, Any]]
    of_student: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    of_pair: Mapping[tuple[str, str, str], Mapping[str, Any]] = field(default_factory=dict)
    made_for: tuple[str, ...] = ()

    def of(self, student: str) -> dict[str, dict[str, Any]]:
        """The values for a student.

        Raises:
            UserError: the recipe was not made for this student.
        """
        if self.made_for and student.partition("@")[0] not in self.made_for:
            name, names = next(name for name, recipe in RECIPES.items() if recipe is self), ", ".join(self.made_for)
            raise UserError(f"--recipe {name}: student {student!r} is none of those that it was made for: {names}; choose another recipe")
        overrides = next((values for start, values in self.of_student.items() if student.startswith(start)), {})
        return {key: {**self.values.get(key, {}), **overrides.get(key, {})} for key in {**self.values, **overrides}}

    def of_run(self, method: str, teacher: str, student: str) -> list[Mapping[str, Any]]:
        """What the recipe sets for a method on a pair, then for each part of the method. The first takes precedence over the others."""
        return [self.of_pair.get((method, teacher, student), {}), *(self.of_method.get(part.strip(), {}) for part in method.split("+"))]


def over(below: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` and ``values`` merged key by key. ``values`` take precedence."""
    tables = {key for key in below if isinstance(below[key], dict) and isinstance(values.get(key), dict)}
    return {**below, **values, **{key: over(below[key], values[key]) for key in tables}}


CRD = {"epochs": 240, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "milestones": (0.625, 0.75, 0.875)}  # epochs 150, 180, 210
DKD_BETA = {  # Zhao et al. 2022, the authors' code; 8 for all others
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2"): 6.0,
    ("wrn-40-2", "wrn-16-2"): 6.0,
    ("wrn-40-2", "wrn-40-1"): 6.0,
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
}
REVIEWKD_WEIGHT = {  # Chen et al. 2021, the authors' code
    ("wrn-40-2", "wrn-16-2"): 5.0,
    ("wrn-40-2", "wrn-40-1"): 5.0,
    ("wrn-40-2", "shufflenetv1"): 5.0,
    ("resnet32x4", "resnet8x4"): 5.0,
    ("resnet32x4", "shufflenetv1"): 5.0,
    ("resnet32x4", "shufflenetv2"): 8.0,
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
}
CAT_KD = {  # Guo et al. 2023, the authors' code: weight, options
    ("resnet32x4", "resnet8x4"): (15.0, {"normalise": False}),
    ("resnet56", "resnet20"): (0.7, {"normalise": False}),
    ("resnet110", "resnet32"): (1.8, {"normalise": False}),
    ("vgg13", "vgg8"): (4.5, {"normalise": False}),
    ("resnet32x4", "shufflenetv1"): (600.0, {"r": 4}),
    ("resnet32x4", "shufflenetv2"): (600.0, {"r": 4}),
    ("wrn-40-2", "shufflenetv1"): (80.0, {"r": 4}),
    ("resnet50", "mobilenetv2"): (40.0, {}),
    ("vgg13", "mobilenetv2"): (15.0, {}),
}
KD_ND_WEIGHTS = {  # Wang et al. 2023, the authors' code for kd++
    ("resnet56", "resnet20"): (1.0, 2.0),
    ("resnet32x4", "resnet8x4"): (3.5, 2.0),
    ("wrn-40-2", "wrn-40-1"): (1.0, 1.5),
    ("resnet50", "mobilenetv2"): (3.0, 0.5),
    ("resnet32x4", "shufflenetv1"): (2.5, 1.5),
    ("resnet32x4", "shufflenetv2"): (4.0, 0.5),
}
OF_PAIR: dict[tuple[str, str, str], Mapping[str, Any]] = {
    **{("dkd", *pair): {"options": {"dkd": {"beta": beta}}} for pair, beta in DKD_BETA.items()},
    **{("reviewkd", *pair): {"weights": {"reviewkd": weight}} for pair, weight in REVIEWKD_WEIGHT.items()},
    **{("cat_kd", *pair): {"weights": {"cat_kd": weight}, "options": {"cat_kd": chosen}} for pair, (weight, chosen) in CAT_KD.items()},
    **{("kd+nd", *pair): {"weights": {"kd": kd, "nd": nd}} for pair, (kd, nd) in KD_ND_WEIGHTS.items()},
    **{("nd", *pair): {"weights": {"nd": nd}} for pair, (_, nd) in KD_ND_WEIGHTS.items()},
}
LIGHT = {"train": {"lr": 0.01}}
FSP_LOG = {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "milestones": (0.5, 0.75)}
SHORT = {"epochs": 48, "batch_size": 64, "lr": 0.1, "weight_decay": 5e-4, "nesterov": True, "schedule": "one-cycle"}
CIFAR_RESNETS = tuple(f"resnet{depth}" for depth in (8, 14, 20, 26, 32, 44, 56, 110))
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "decay_norm_and_bias": False}
REGULARISED = {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25}
DEIT = {**ADAMW, "epochs": 300, "batch_size": 1024, "schedule": "cosine", "warmup_epochs": 5, **REGULARISED}
FINETUNE = {"epochs": 100, "batch_size": 512, "lr": 0.01, "weight_decay": 0.0, "schedule": "cosine", "clip": 1.0}
PATIENT = {"epochs": 1000, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "schedule": "cosine", "mixup": True}

RECIPES: dict[str, Recipe] = {
    "fsp-log": Recipe("the reference log: He et al. 2016 as the field uses it; the defaults", {"train": FSP_LOG}),
    "kd-zoo": Recipe("KD-Zoo: fsp-log with Nesterov's momentum", {"train": {**FSP_LOG, "nesterov": True}}),
    "crd": Recipe(
        "Tian et al. 2020 (CRD), CIFAR-100, and the benchmarks after it; lr 0.01 for MobileNet and ShuffleNet students; for dkd, "
        "reviewkd, cat_kd, nd and kd+nd what their authors set for a pair",
        {"train": CRD},
        {"mobilenet": LIGHT, "shufflenet": LIGHT},
        of_pair=OF_PAIR,
    ),
    "r110-warm": Recipe(
        "He et al. 2016, section 4.2: ResNet-110 with a first epoch at lr 0.01", {"train": {**FSP_LOG, "warmup_epochs": 1}}
    ),
    "function-matching": Recipe(
        "Beyer et al. 2022 (a good teacher is patient and consistent), the authors' code: teacher and student see one view, an Inception "
        "crop, mixed by a share uniform in 0 to 1; no labels; cosine. 1,000 epochs and T=10 for kd: their middle length for Food101 and "
        "Sun397, which are of CIFAR's size (ImageNet: 1,200 and T=1). Ours: SGD and batch 128 as in fsp-log, for Adam with warm-up and "
        "clipping and batch 512",
        {"train": PATIENT, "data": {"crop": "resized"}, "weights": {"task": 0.0}},
        of_method={"kd": {"options": {"kd": {"T": 10.0}}}},
    ),
    "deit": Recipe(
        "Touvron et al. 2021 (DeiT), table 9: AdamW, lr 5e-4 x batch / 512 and batch 1024, decay 0.05 without normalisations and biases, "
        "cosine, Inception crop, RandAugment 9, smoothing 0.1, mixup 0.8 or CutMix 1.0 by halves, random erasing 0.25; give --lr with "
        "another --batch-size. Left out: drop path 0.1, repeated augmentation. Ours: erased with the mean colour, for noise; a warm-up of "
        "five epochs at a tenth, for a line (train.warmup_steps is a line)",
        {"train": DEIT, "data": {"crop": "resized", "randaugment": 9}},
    ),
    "finetune": Recipe(
        "Dosovitskiy et al. 2021 (ViT), appendix B.1.1: SGD, momentum 0.9, batch 512, cosine, no decay, gradients clipped at norm 1. lr "
        "0.01 of their 0.001 to 0.03, and 100 epochs of CIFAR for their 10,000 steps. For students that begin from weights (--init-from)",
        {"train": FINETUNE},
    ),
    "short": Recipe(
        "ours: the ResNets of CIFAR in about an hour of two CPU cores; chosen among four by ResNet-20 on held-out images of CIFAR-10 "
        "(docs/LOG.md, 2026-11-29)",
        {"train": SHORT},
        made_for=CIFAR_RESNETS,
    ),
    "smoke": Recipe(
        "one epoch on 2,000 images, to see that everything runs; its figures mean nothing",
        {"train": {"epochs": 1}, "data": {"limit_train": 2000}},
    ),
}


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: {did_you_mean(name, RECIPES)}")
    return RECIPES[name]
