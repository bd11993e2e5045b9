"""RunConfig: everything that decides a run's numbers, validated, frozen, and free of torch."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from . import advice
from .checks import UserError, did_you_mean, is_there, joined, regular_file, undefused
from .registry import Registry

M = TypeVar("M", bound=BaseModel)

LARGEST_FILE = 1_000_000  # bytes of a config
MAX_EPOCHS = 1_000_000
LARGEST_IMAGE = 1 << 27  # pixels
LARGEST_SIDE = math.isqrt(LARGEST_IMAGE)
SEAL = "seal"  # key of a run.json
NETWORKS = ("student", "teacher", "init_from", "peer")  # keys that name one
NO_LABELS = "none"  # the data set of a run on unlabelled images alone
LOADER = "loader"  # scheme of loaders that were given from Python; the hash of both follows

BASELINE = "base"  # the method that learns from the labels alone, with which others are compared
DISTILLING = "fsp"  # the method that a student with a teacher learns by, if none is named

PrecisionName = Literal["auto", "bf16", "fp32"]
EngineName = Literal["auto", "eager", "compiled", "graph"]
Crop = Literal["shift", "resized"]
BatchNorm = Literal["local", "synchronised"]
Sampling = Literal["shuffled", "balanced"]
ClassWeights = Literal["none", "balanced"] | tuple[float, ...]
Role = Literal["student", "teacher"]

_AS_DECLARED = "Default: as the network's file or library declares it, or else as the data have it."  # ends descriptions

OF_SGD = ("momentum", "nesterov")  # keys of the recipe that no other optimizer has


class Frozen(BaseModel):
    """Base of every config: immutable, unknown keys refused, infinities refused.

    The description of a key stands beside it, and nowhere else: help and ``flowdistill config`` print it. It says the default itself
    ("Default: ...") if None stands for one. A key that came later is dumped only if it is not the default, so that runs which were
    recorded before stay comparable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Scheme:
    """A kind of data that ``SCHEME:WHERE`` names, in the place of a data set's name. ``data.sources`` has what reads it.

    Attributes:
        name: what stands before the colon.
        where: what stands after it, as help names it.
        about: one line for listings.
        files: whether it is made of image files: ``size``, ``channels``, ``skip_broken`` and ``stream`` say how these are read.
        columns: whether it is a table, of which ``label`` names the column with the classes.
        unlabelled: what it holds as ``data.unlabelled``; empty if it can't be that.
        from_python: whether only Python can give such data. They come as batches, and nothing is done to them.
    """

    name: str
    where: str
    about: str
    files: bool = False
    columns: bool = False
    unlabelled: str = ""
    from_python: bool = False

    @property
    def written(self) -> str:
        """As messages and help name it: ``folder:PATH``."""
        return f"{self.name}:{self.where}"


SCHEMES: Registry[Scheme] = Registry("data scheme", "flowdistill.data")
for _row in (
    Scheme(
        *("npz", "PATH", "your images: x_train, y_train, x_test, y_test; uint8 NHWC or NHW, labels from 0; with --unlabelled: x alone"),
        unlabelled="uint8 images under the key x",
    ),
    Scheme(
        *("folder", "PATH"),
        "your image files: train/CLASS/* and test/CLASS/* (or val), or CLASS/* alone, a fifth of which is test; "
        "classes numbered by sorted name, names kept in the student's file; with --unlabelled: files in any folders",
        files=True,
        unlabelled="image files, below it in any folders",
    ),
    Scheme(*("csv", "FILE", "your image files by a list: path,label[,split], paths relative to it; otherwise as folder:PATH"), files=True),
    Scheme(
        *("hf", "NAME"),
        "a Hugging Face data set, NAME or NAME:CONFIG, or a folder that save_to_disk wrote; needs the extra hf",
        files=True,
        columns=True,
    ),
    Scheme(LOADER, "HASH", "the loaders that were given to flowdistill.train or distill", from_python=True),
):
    SCHEMES.register(_row.name)(_row)


def scheme_of(name: str | None) -> Scheme | None:
    """The scheme of a data set's name, None for a plain name."""
    scheme, colon, _ = (name or "").partition(":")
    return SCHEMES[scheme] if colon and scheme in SCHEMES else None


def location(name: str) -> str:
    """What stands after a data set's scheme."""
    return name.partition(":")[2]


def written_schemes() -> dict[str, str]:
    """The schemes that a command can name, as ``folder:PATH``, with a line about each."""
    return {SCHEMES[name].written: SCHEMES[name].about for name in SCHEMES if not SCHEMES[name].from_python}


class DataConfig(Frozen):
    """Which images, and how they are augmented."""

    name: str = Field(
        "cifar10",
        description="Which images: digits, cifar10, cifar100, fashion_mnist, npz:PATH, folder:PATH, csv:FILE or hf:NAME. "
        f"none: data.unlabelled alone. {advice.command('datasets')} describes them.",
    )
    root: Path = Field(Path("data"), description="Folder where torchvision keeps the data sets that it downloads.")
    crop: Crop | None = Field(
        None,
        exclude_if=lambda crop: crop is None,
        description="How training images are cropped. shift moves an image in a reflected border; resized enlarges a random box of it "
        "(Inception crop). Default: resized if the images are streamed and data.pad is not given, else shift.",
    )
    pad: int | None = Field(
        None,
        ge=0,
        strict=True,
        description="Width in pixels of the reflected border that crop=shift moves an image in. Default: the data set's own.",
    )
    flip: bool | None = Field(
        None, description="Whether training images are mirrored left to right, half of them at random. Default: the data set's own."
    )
    randaugment: int | None = Field(
        None,
        ge=0,
        le=30,
        strict=True,
        exclude_if=lambda magnitude: magnitude is None,
        description="Magnitude of RandAugment, which does two random operations on each training image. Default: none is done.",
    )
    limit_train: int | None = Field(
        None, ge=1, strict=True, description="Train on a fixed stratified choice of about so many images. Default: all images."
    )
    size: int | None = Field(
        None,
        ge=1,
        le=LARGEST_SIDE,
        strict=True,
        exclude_if=lambda size: size is None,
        description="Pixels of the short side to which image files are scaled; the middle square of each is taken. "
        "Default: as the files are, which must then have one size.",
    )
    channels: Literal[1, 3] | None = Field(
        None,
        exclude_if=lambda channels: channels is None,
        description="Channels that image files are read with: 1 is grey, 3 is colour. Default: 1 if all files are grey, else 3.",
    )
    skip_broken: bool = Field(
        False,
        exclude_if=lambda skip: not skip,
        description="Leave out the image files that can't be read. If false, the first ends the run.",
    )
    unlabelled: str | None = Field(
        None,
        exclude_if=lambda unlabelled: unlabelled is None,
        description="Images without labels that are drawn into the batches; only the teacher teaches on them. folder:PATH reads files "
        "in any folders, npz:PATH the key x. Without a data set they are all there is, and train a backbone. Default: none.",
    )
    stream: bool = Field(
        False,
        exclude_if=lambda stream: not stream,
        description="Decode image files batch by batch, even if all would fit into memory.",
    )
    label: str | None = Field(
        None,
        exclude_if=lambda label: label is None,
        description="Column of a Hugging Face data set that has the classes. Default: the column of type ClassLabel, or else integers "
        "named label, labels or fine_label.",
    )

    @property
    def user_loaders(self) -> bool:
        """Whether they come from loaders that were given from Python."""
        return (scheme := scheme_of(self.name)) is not None and scheme.from_python

    @property
    def no_labels(self) -> bool:
        """Whether the unlabelled images are all there is."""
        return self.name == NO_LABELS

    @property
    def without_unlabelled(self) -> DataConfig:
        """The same without the unlabelled images and what is said of them alone, unless there are no others."""
        if self.no_labels:
            return self
        return self.model_copy(update={"unlabelled": None, "skip_broken": self.skip_broken and _has_files(self.name)})

    @model_validator(mode="before")
    @classmethod
    def _unlabelled_alone(cls, values: Any) -> Any:
        alone = isinstance(values, dict) and values.get("unlabelled") is not None and "name" not in values
        return {**values, "name": NO_LABELS} if alone else values

    @field_validator("unlabelled")
    @classmethod
    def _unlabelled_is_a_source(cls, unlabelled: str | None) -> str | None:
        if unlabelled is not None and ((scheme := scheme_of(unlabelled)) is None or not scheme.unlabelled):
            rows = [SCHEMES[name] for name in sorted(SCHEMES)]
            raise ValueError(f"write {joined([f'{row.written} ({row.unlabelled})' for row in rows if row.unlabelled], 'or')}")
        return unlabelled

    @model_validator(mode="after")
    def _pad_belongs_to_shift(self) -> DataConfig:
        if self.crop == "resized" and self.pad:
            raise ValueError(f"pad={self.pad} belongs to crop=shift; leave one of them out")
        return self

    @model_validator(mode="after")
    def _no_labels_need_images(self) -> DataConfig:
        if self.no_labels and self.unlabelled is None:
            raise ValueError(f"name={NO_LABELS} stands for unlabelled images alone; give these as unlabelled, or name a data set")
        if self.no_labels and self.stream:
            raise ValueError("stream=true: unlabelled images are held in memory; leave it out")
        return self

    @model_validator(mode="after")
    def _files_have_a_size(self) -> DataConfig:
        keys = {"size", "channels", "stream"} | ({"skip_broken"} if not _has_files(self.unlabelled) else set())
        about_files = self.model_dump(include=keys)
        if about_files and not _has_files(self.unlabelled if self.no_labels else self.name):
            key, value = next(iter(about_files.items()))
            of_files = [SCHEMES[name].written for name in SCHEMES if SCHEMES[name].files]
            given = self.unlabelled if self.no_labels else self.name
            raise ValueError(f"{key}={value} belongs to {joined(of_files, 'and')}, not to {given}; leave it out")
        if self.label is not None and ((scheme := scheme_of(self.name)) is None or not scheme.columns):
            tables = [SCHEMES[name].written for name in SCHEMES if SCHEMES[name].columns]
            raise ValueError(f"label={self.label} belongs to {joined(tables, 'and')}, not to {self.name}; leave it out")
        return self


def _has_files(name: str | None) -> bool:
    return (scheme := scheme_of(name)) is not None and scheme.files


class TrainConfig(Frozen):
    """The recipe. Defaults: the reference log's, which are He et al. 2016's up to weight decay on all parameters."""

    epochs: int = Field(  # reference log; He et al. 2016, section 4.2: about 164
        200, ge=1, le=MAX_EPOCHS, strict=True, description="Number of epochs; of the task phase, if a method trains in stages."
    )
    batch_size: int = Field(  # He et al. 2016, section 4.2
        128, ge=1, strict=True, description="Images per training step, of all processes together."
    )
    lr: float = Field(  # He et al. 2016, section 4.2
        0.1, gt=0, strict=True, description="Base learning rate, which the schedule multiplies. Another optimizer than sgd needs one."
    )
    momentum: float = Field(  # He et al. 2016, section 4.2
        0.9, ge=0, lt=1, strict=True, description="Momentum of sgd; other optimizers don't have this key."
    )
    weight_decay: float = Field(  # He et al. 2016, section 4.2
        1e-4, ge=0, strict=True, description="Weight decay of the optimizer; train.decay_norm_and_bias says of which parameters."
    )
    nesterov: bool = Field(  # reference log: off (KD-Zoo: on)
        False, description="Use Nesterov momentum in sgd; other optimizers don't have this key."
    )
    schedule: Literal["step", "cosine", "one-cycle"] = Field(
        "step",
        description="How the rate goes: step lowers it tenfold at each milestone, cosine lowers it to 0, one-cycle raises it over the "
        "first 30 % of the steps and then lowers it to almost 0.",
    )
    milestones: tuple[float, ...] = Field(  # reference log
        (0.5, 0.75), description="Shares of the run, rising between 0 and 1, after which schedule=step lowers the rate tenfold."
    )
    warmup_epochs: int = Field(  # He et al. 2016, section 4.2: ResNet-110 alone
        0, ge=0, strict=True, description="Number of first epochs that are trained at a tenth of the rate."
    )
    precision: PrecisionName = Field(
        "auto", description="Arithmetic of training. auto is bf16 if this GPU or CPU computes it, and else fp32."
    )
    mixup: bool | float = Field(
        False,
        exclude_if=lambda mixup: not mixup,
        description="Mix the images of a batch in pairs. true: by a uniform share and without labels (Beyer et al. 2022); a number alpha "
        "above 0: by a share from Beta(alpha, alpha), and the task likewise (Zhang et al. 2018).",
    )
    freeze: tuple[str, ...] = Field(
        (),
        exclude_if=lambda freeze: not freeze,
        description="Modules or parameters of the student that keep their first weights, such as conv1,bn1,layer1; * and ? are allowed.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        strict=True,
        exclude_if=lambda smoothing: smoothing == 0,
        description="Share of each label, 0 or more and below 1, that the task spreads over all classes.",
    )
    batch_norm: BatchNorm = Field(
        "local",
        exclude_if=lambda batch_norm: batch_norm == "local",
        description="By what several processes of one run normalise a batch: local by the images that each has, synchronised by all of it. "
        "One process has the whole batch in either case.",
    )
    optimizer: str = Field(  # the training room knows which there are
        "sgd",
        exclude_if=lambda optimizer: optimizer == "sgd",
        description="An optimizer of torch.optim in lower case: sgd, adamw, rmsprop or another. Another than sgd needs train.lr.",
    )
    optimizer_options: dict[str, Any] = Field(
        {},
        exclude_if=lambda options: not options,
        description="Options of another optimizer than sgd by torch's names, such as betas. Those left out take torch's default.",
    )
    decay_norm_and_bias: bool = Field(
        True,
        exclude_if=lambda decay: decay,
        description="Whether weight decay acts on all parameters. false: not on those of one dimension, which are biases and norms.",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        strict=True,
        exclude_if=lambda steps: steps == 0,
        description="Number of first steps over which the rate rises in a line to its full value. The schedule counts them.",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        strict=True,
        exclude_if=lambda decay: decay == 1,
        description="Factor, such as 0.75, by which each layer of the student has a lower rate than the next. The layer with the "
        "classifier, and adapters, have all of it (Bao et al. 2022, BEiT).",
    )
    clip: float | None = Field(
        None,
        gt=0,
        strict=True,
        exclude_if=lambda clip: clip is None,
        description="Largest global norm of a student's gradients, its adapters' included. Default: no limit.",
    )
    accumulate: int = Field(
        1,
        ge=1,
        strict=True,
        exclude_if=lambda parts: parts == 1,
        description="Number of equal parts in which a batch is computed in turn, to save memory. Each is normalised by itself.",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        strict=True,
        exclude_if=lambda ema: ema is None,
        description="Decay per step of an average of the weights, which is measured and shipped in their place. Default: no average.",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        strict=True,
        exclude_if=lambda cutmix: cutmix == 0,
        description="Alpha by which a box of its partner is put into each image, and the task mixed by the area of the box "
        "(Yun et al. 2019, with 1); 0 is off. With train.mixup, half of the batches are mixed by either.",
    )
    random_erasing: float = Field(
        0.0,
        ge=0,
        le=1,
        strict=True,
        exclude_if=lambda probability: probability == 0,
        description="Probability that a box of an image is filled with the mean colour of the training images, before images are mixed "
        "(Zhong et al. 2020).",
    )
    class_weights: ClassWeights = Field(
        "none",
        exclude_if=lambda weights: weights == "none",
        description="What each class weighs in the task: none, all alike; balanced, n / (classes x images of the class), of the images "
        "trained on; or a number above 0 for each class, such as 1,2.5.",
    )
    sampling: Sampling = Field(
        "shuffled",
        exclude_if=lambda sampling: sampling == "shuffled",
        description="How the images of an epoch are drawn: shuffled, each image once; balanced, as many of each class, some several times.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        strict=True,
        exclude_if=lambda patience: patience is None,
        description="Stop after so many epochs in a row of the last phase without a better accuracy on held-out images; the best epoch's "
        "weights ship. It needs split=holdout. Default: train all epochs.",
    )

    @field_validator("freeze", mode="before")
    @classmethod
    def _freeze_lists_names(cls, freeze: Any) -> Any:
        """Names with commas between them are a list; order and repetition mean nothing."""
        names = [name.strip() for name in freeze.split(",")] if isinstance(freeze, str) else freeze
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            if "" in names:
                raise ValueError("a name is empty; write names with commas between them, such as conv1,bn1,layer1")
            return tuple(sorted(set(names)))
        return names

    def __eq__(self, other: object) -> bool:
        """mixup=true is not mixup=1, which Python calls equal."""
        return isinstance(other, TrainConfig) and self.model_dump_json() == other.model_dump_json()

    def __hash__(self) -> int:
        """As ``__eq__``; its tables have no hash of their own."""
        return hash(self.model_dump_json())

    @field_validator("mixup", mode="before")
    @classmethod
    def _mixup_has_a_share(cls, mixup: object) -> object:
        number = isinstance(mixup, int | float) and math.isfinite(mixup) and mixup > 0
        if not (number or mixup is False):
            raise ValueError("true mixes without labels, a number above 0 with them: alpha of Beta(alpha, alpha), such as 0.2; or false")
        return mixup if isinstance(mixup, bool) else float(mixup)  # type: ignore[arg-type]

    @field_validator("class_weights", mode="before")
    @classmethod
    def _class_weights_are_above_0(cls, weights: object) -> object:
        """Numbers with commas between them are a list."""
        if isinstance(weights, str) and weights in ("none", "balanced"):
            return weights
        try:
            numbers = [float(number) for number in weights.split(",")] if isinstance(weights, str) else weights
        except ValueError:
            numbers = None
        listed = isinstance(numbers, list | tuple) and not any(isinstance(number, bool) for number in numbers)
        if not listed or not all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers):  # type: ignore[union-attr]
            raise ValueError("write none, balanced, or a number above 0 for each class, such as 1,2.5")
        return tuple(float(number) for number in numbers)  # type: ignore[union-attr]

    @model_validator(mode="after")
    def _mixed_by_labels(self) -> TrainConfig:
        if self.mixup is True and self.cutmix:
            raise ValueError(f"mixup=true leaves no labels, which cutmix={self.cutmix:g} mixes; set mixup to a number, or leave one out")
        if self.class_weights == self.sampling == "balanced":
            raise ValueError("class_weights=balanced and sampling=balanced each make up for uneven classes; leave one of them out")
        return self

    @model_validator(mode="after")
    def _milestones_rise(self) -> TrainConfig:
        if list(self.milestones) != sorted(set(self.milestones)) or not all(0 < share < 1 for share in self.milestones):
            raise ValueError("milestones are shares of the run between 0 and 1 that rise, such as [0.5, 0.75]")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}; set it lower")
        return self

    @model_validator(mode="after")
    def _one_warm_up(self) -> TrainConfig:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError(f"warmup_steps={self.warmup_steps} and warmup_epochs={self.warmup_epochs} are two warm-ups; leave one out")
        return self

    @model_validator(mode="after")
    def _parts_are_equal(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}; set one to fit the other")
        if self.accumulate > 1 and self.batch_norm == "synchronised":
            raise ValueError(f"accumulate={self.accumulate}: each part is normalised by itself, so batch_norm=synchronised can't be had")
        return self

    @field_validator("optimizer")
    @classmethod
    def _optimizer_in_lower_case(cls, optimizer: str) -> str:
        return optimizer.strip().lower()

    @field_validator("optimizer_options")
    @classmethod
    def _options_are_plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        for value in options.values():
            numbers = value if isinstance(value, list) else [value] if isinstance(value, float) else []
            plain = isinstance(value, bool | int | float | str | list) and all(isinstance(number, int | float) for number in numbers)
            if not plain or not all(map(math.isfinite, numbers)):
                raise ValueError("an option is a finite number, a list of these, true, false or a word, such as {betas = [0.9, 0.98]}")
        return options

    @model_validator(mode="after")
    def _optimizers_have_keys_of_their_own(self) -> TrainConfig:
        if self.optimizer == "sgd":
            if self.optimizer_options:
                raise ValueError(f"optimizer_options={self.optimizer_options} belongs to other optimizers; sgd has momentum and nesterov")
            return self
        for key in OF_SGD:
            if key in self.model_fields_set:
                raise ValueError(f"{key}={json.dumps(getattr(self, key))} belongs to optimizer=sgd, not to {self.optimizer}; leave it out")
        if "lr" not in self.model_fields_set:
            raise ValueError(f"optimizer={self.optimizer} needs a rate, for the default lr is one of sgd; give lr, such as lr=0.001")
        return self

    @model_serializer(mode="wrap")
    def _without_keys_of_sgd(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What another optimizer does not have is not on record, and what is on record is read back."""
        values: dict[str, Any] = dump(self)
        return values if self.optimizer == "sgd" else {key: value for key, value in values.items() if key not in OF_SGD}

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> TrainConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs a momentum above 0; set train.momentum or leave nesterov out")
        return self


class InputConfig(Frozen):
    """The images that a network was made for."""

    channels: Literal[1, 3] | None = Field(None, description=f"Channels of its images: 1 is grey, 3 is colour. {_AS_DECLARED}")
    size: int | None = Field(None, ge=1, strict=True, description=f"Pixels of a side of its square images. {_AS_DECLARED}")
    mean: tuple[float, ...] | None = Field(
        None, description=f"Mean of each channel, of pixels in 0 to 1, that is taken from its images. {_AS_DECLARED}"
    )
    std: tuple[float, ...] | None = Field(
        None, description=f"Standard deviation of each channel, of pixels in 0 to 1, by which its images are divided. {_AS_DECLARED}"
    )

    @field_validator("std")
    @classmethod
    def _std_divides(cls, std: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if std is not None and not all(value > 0 for value in std):
            raise ValueError("images are divided by it; write numbers above 0")
        return std


class RunConfig(Frozen):
    """One run: one student trained once. Where two students teach each other, each of the two is a run."""

    student: str = Field(
        "resnet20",
        coerce_numbers_to_str=True,
        description="The network that is trained: a model name (with fresh weights), or a run number, a weights file or MODEL@FILE "
        f"(with those weights). {advice.command('models')} lists the names.",
    )
    teacher: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="The network that teaches: a model name (a finished run is chosen from the ledger), a run number, a weights file, or "
        "MODEL@FILE. A plus joins several into one, such as 1+2. Default: none.",
    )
    init_from: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        exclude_if=lambda init_from: init_from is None,
        description="Run number or weights file that the student begins from; with other classes it gets a fresh classifier. "
        "Default: fresh weights.",
    )
    peer: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        exclude_if=lambda peer: peer is None,
        description="The other student, if two teach each other, named as the student is. Default: one of the student's kind.",
    )
    side: Literal[1, 2] = Field(
        1, exclude_if=lambda side: side == 1, description="Which of two students that teach each other this run is: 1 or 2."
    )
    seed: int = Field(0, ge=0, lt=2**63, strict=True, description="Decides first weights, the order of the images and their augmentation.")
    split: Literal["full", "holdout"] = Field(
        "full",
        description="holdout keeps a tenth of the training images out, by which the epoch that ships is chosen; test is read once. "
        "full trains on all of them, and ships the last epoch.",
    )
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: str = Field(
        BASELINE,
        description=f"How the student learns: a method, or several with a plus between them. {advice.command('methods')} lists them.",
    )
    options: dict[str, dict[str, Any]] = Field(
        {}, description=f"Options of each method, such as options.fsp.pool. {advice.command('methods', 'NAME')} lists those of a method."
    )
    weights: dict[str, float] = Field(
        {},
        description="Factor of each loss term, such as weights.at; task is that of the labels. Terms left out take the method's default. "
        "With several teachers a term on features is at@1, at@2 and so on.",
    )
    probe: bool = Field(
        False,
        exclude_if=lambda probe: not probe,
        description="Fit a linear classifier on the teacher's features of the training images, and let it give the logits. "
        "A teacher without a classifier, or with other classes, can then teach by them.",
    )
    teacher_shares: Literal["mean", "holdout"] = Field(
        "mean",
        exclude_if=lambda shares: shares == "mean",
        description="How the logits of several teachers are averaged: mean, all alike; holdout, by the shares with which the mean is best "
        "on held-out images.",
    )
    taps: dict[Role, dict[str, str]] = Field(
        {},
        exclude_if=lambda taps: not taps,
        description="The maps of this network that methods see: stage1, stage2, ... and the path of a module, or one with * and ? whose "
        f"matches are numbered. {advice.command('taps', 'MODEL')} prints a table to edit.",
    )
    inputs: dict[Role, InputConfig] = Field(
        {}, exclude_if=lambda inputs: not inputs, description="The images that the student and the teacher were made for."
    )

    @property
    def networks(self) -> list[str]:
        """The networks that it names."""
        return [one for key in NETWORKS if (named := getattr(self, key)) is not None for one in each_network(named)]

    @property
    def teachers(self) -> list[str]:
        """The references of its teachers: none, one or several."""
        return [] if self.teacher is None else each_network(self.teacher)

    @model_validator(mode="after")
    def _of_several_teachers(self) -> RunConfig:
        if len(self.teachers) < 2:
            if self.teacher_shares != "mean":
                cure = "join several by a plus (1+2), or leave it out"
                raise ValueError(f"teacher_shares={self.teacher_shares}: {self.teacher or 'no teacher'} is not several; {cure}")
            return self
        if twice := next((name for name in self.teachers if self.teachers.count(name) > 1), None):
            raise ValueError(f"teacher={self.teacher} names {twice} twice; name each once")
        if self.teacher_shares == "holdout" and self.split != "holdout":
            raise ValueError("teacher_shares=holdout: nothing is held out; add --holdout (split=holdout), or set teacher_shares=mean")
        for table, whose in (("taps", self.taps), ("inputs", self.inputs)):
            if "teacher" in whose:
                cure = "leave it out, or name one teacher"
                raise ValueError(f"{table}.teacher is of one network, and teacher={self.teacher} names {len(self.teachers)}; {cure}")
        return self

    @model_validator(mode="after")
    def _patience_needs_held_out_images(self) -> RunConfig:
        if self.train.patience is not None and self.split != "holdout":
            why = "a loader's images are not held out" if self.data.user_loaders else "split=full holds no images out"
            cure = "leave it out" if self.data.user_loaders else f"use split=holdout ({advice.options('--holdout')}), or leave it out"
            raise ValueError(f"train.patience={self.train.patience}: {why}, and test may not say when to stop; {cure}")
        return self

    @model_validator(mode="after")
    def _images_can_be_used_so(self) -> RunConfig:
        if self.data.user_loaders and self.split == "holdout":
            raise ValueError("split=holdout: a loader's images are not held out; give the held-out ones as val_loader, with split=full")
        if self.data.no_labels and self.split == "holdout":
            raise ValueError("split=holdout: the held-out images choose the epoch by their labels, and there are none; use split=full")
        if self.data.no_labels and self.probe:
            raise ValueError("probe=true: a classifier is fitted to labels, and there are none; leave it out, or name a labelled data set")
        if self.data.no_labels and self.train.mixup and self.train.mixup is not True:
            raise ValueError(f"train.mixup={self.train.mixup:g} mixes labels too, and there are none; set train.mixup=true")
        if self.data.no_labels and self.train.cutmix:
            raise ValueError(f"train.cutmix={self.train.cutmix:g} mixes labels too, and there are none; leave it out")
        if self.data.no_labels and self.train.class_weights != "none":
            raise ValueError("train.class_weights: no image has a class; leave it out, or name a labelled data set")
        if self.data.user_loaders and self.train.mixup:
            raise ValueError(f"train.mixup={str(self.train.mixup).lower()}: a loader's images are not mixed; mix them in the loader")
        if self.data.user_loaders and self.train.cutmix:
            raise ValueError(f"train.cutmix={self.train.cutmix:g}: a loader's images are not mixed; mix them in the loader")
        if self.data.user_loaders and self.train.random_erasing:
            raise ValueError(
                f"train.random_erasing={self.train.random_erasing:g}: a loader's images are taken as they come; erase in the loader"
            )
        if self.data.user_loaders and self.train.sampling == "balanced":
            raise ValueError("train.sampling=balanced: a loader decides what it draws; give it a sampler, such as WeightedRandomSampler")
        if self.data.user_loaders and self.train.class_weights == "balanced":
            raise ValueError("train.class_weights=balanced: a loader does not tell how many images a class has; give the weights")
        if self.data.user_loaders and self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate={self.train.accumulate}: a loader's batches may differ in size and are not cut; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _balanced_by_labels(self) -> RunConfig:
        if self.data.unlabelled is not None and self.train.sampling == "balanced":
            raise ValueError(f"train.sampling=balanced: images of data.unlabelled={self.data.unlabelled} have no class; leave one out")
        return self


def each_network(reference: str) -> list[str]:
    """``1+2+timm:NAME`` -> the references that a plus joins; one that names a single network alone. A file whose name has a plus is one."""
    names = reference.split("+")
    file = any("+" in part and is_there(Path(part)) for part in (reference, *re.split("[@#:]", reference)))
    return [reference] if file or not all(names) else names


def model_name(name: str) -> str:
    """A model's own name for the reference log's spelling: ``resnet_32_20`` is ``resnet20``; any other name is as it was."""
    return re.sub(r"^resnet_32_(?=\d+$)", "resnet", name)


def validate(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from plain values.

    Raises:
        UserError: an unknown key, or a value out of range; the first mistake, in one line.
    """
    return parse_as(RunConfig, values)


def parse_as(model: type[M], values: Mapping[str, Any], where: str = "") -> M:
    """Validate ``values`` as ``model``, and turn pydantic's report into one line. ``where`` is put before the key."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(one_line(error, model, where)) from None


def one_line(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """The first mistake of a pydantic report: key, what came, what is allowed."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = (where + ".".join(path)).rstrip(".")
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {did_you_mean(path[-1], _fields(model, path[:-1]))}"
    value = first["input"]
    message = str(first.get("ctx", {}).get("error") or first["msg"]).removeprefix(f"{value!r} is ").rstrip(".")
    if first["type"] in ("dict_type", "model_type"):
        message = "must be a table of keys"
    shown = f"{key}={value!r}: " if not isinstance(value, dict) and first["type"] != "missing" else f"{key}: " if key else ""
    return f"{shown}{message[0].lower()}{message[1:]}"


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part not in model.model_fields:  # a key of a table
            continue
        annotation = model.model_fields[part].annotation
        inner = next((arg for arg in (annotation, *get_args(annotation)) if isinstance(arg, type) and issubclass(arg, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def read_file(path: Path) -> dict[str, Any]:
    """The values of a TOML file, or of the JSON that a run saved (``run.json``, whose ``config`` is taken).

    Raises:
        UserError: the file is missing, too large, empty, or neither TOML nor JSON.
    """
    source = regular_file(path, f"--config {path}")
    size = source.stat().st_size
    if size > LARGEST_FILE:
        raise UserError(f"--config {path}: {size:,} bytes; a config has at most {LARGEST_FILE:,}")
    try:
        text = source.read_text(encoding="utf-8-sig")
        values = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except RecursionError:
        raise UserError(f"--config {path}: nested too deeply; a config has three levels") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not UTF-8 text; write TOML, or name a run.json") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: neither TOML nor a JSON object ({error})") from None
    except ValueError:
        raise UserError(f"--config {path}: a number in it has thousands of digits") from None
    if {SEAL, "files"} & values.keys() and values.get(SEAL) != record_seal(values):
        raise UserError(f"--config {path}: it is not what its run wrote; take the run's own run.json, or write a table of keys")
    config = values.get("config", values)
    if not isinstance(config, dict) or not config:
        kind = "has no keys" if config in ({}, None) else f"'config' is {config!r}"
        raise UserError(f"--config {path}: {kind}; write a table of keys, such as student, data, train")
    return config


def record_seal(record: Mapping[str, Any]) -> str:
    """SHA-256 over all that a ``run.json`` says but the seal itself; ``files``, which only a sealed one has, says that there is one."""
    sealed_values = {key: value for key, value in json.loads(json.dumps(record)).items() if key != SEAL}
    return hashlib.sha256(json.dumps(sealed_values, sort_keys=True).encode()).hexdigest()


def read_taps(path: Path) -> dict[str, str]:
    """A table of taps, name -> module, from the CSV or JSON that ``flowdistill taps`` prints.

    Raises:
        UserError: no such file, or no such table.
    """
    source = f"taps {path}"
    text = regular_file(path, source).read_text(encoding="utf-8-sig", errors="replace")
    try:
        if text.lstrip().startswith("["):
            pairs = [(row["name"].strip(), row["module"].strip()) for row in json.loads(text)]
        else:
            pairs = [(undefused(row["name"].strip()), undefused(row["module"].strip())) for row in csv.DictReader(text.splitlines())]
        if not pairs:
            raise ValueError("no row")
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
        cure = advice.command("taps", "MODEL", "--format", "csv")
        raise UserError(f"{source}: no table with the columns name and module; write one with {cure}") from None
    table: dict[str, str] = {}
    for name, module in pairs:
        if name in table:
            raise UserError(f"{source}: tap {name} is named twice, as {table[name]} and as {module}; keep one of the rows")
        table[name] = module
    return {name: module for name, module in table.items() if name not in ("embedding", "classifier")}


def assign(values: dict[str, Any], assignment: str) -> None:
    """Apply one ``a.b=c`` to nested ``values``. ``c`` is read as TOML (numbers, true, lists), else as a string.

    Raises:
        UserError: no ``=``, an empty key, a key below a single value, or a value nested too deeply.
    """
    key, equals, raw = assignment.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"--set {assignment!r}: write key=value, such as train.lr=0.05 or options.fsp.pool=avg")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except RecursionError:
        raise UserError(f"--set {key}: the value is nested too deeply; write a number, a word or a short list") from None
    except ValueError:
        value = raw.strip()
    put(values, key.strip(), value)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` of nested ``values``.

    Raises:
        UserError: a part of the key is a single value.
    """
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}={value!r}: {part!r} is a single value here and has no keys below it; write a table of keys")
    values[last] = value
