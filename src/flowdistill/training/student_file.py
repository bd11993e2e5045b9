"""A student's file: the one schema of what it says of the network whose weights it holds.

A run writes ``StudentMetadata``; ``evaluate`` and ``export`` need it whole. A weights file that is named as a student or a teacher may
come from elsewhere and say less: ``Statement`` is what of it can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..checks import UserError
from ..config import DataConfig
from ..models.input_adapter import InputSpec
from ..types import DataSpec

Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


class InputImages(BaseModel):
    """Images that a network takes: channels, height and width, the mean and standard deviation of each channel in 0..1, and how others are
    resized to these, if not bilinearly.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    input: tuple[Count, Count, Count]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    interpolation: Literal["bilinear", "bicubic"] | None = Field(None, exclude_if=lambda interpolation: interpolation is None)

    @model_validator(mode="after")
    def _a_value_a_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.input[0]:
            raise ValueError(f"mean and std must have {self.input[0]} values, one a channel")
        return self

    @property
    def input_spec(self) -> InputSpec:
        """The same as a network sees them."""
        return InputSpec(*self.input, self.mean, self.std, self.interpolation)


class TrainedNetwork(BaseModel):
    """A network as it was when its file was written.

    Attributes:
        code: SHA-256 of each file of a user's own code.
        answers: to a fixed batch, as ``models.probe`` gives them.
        versions: of the packages that these came of.
    """

    model_config = ConfigDict(frozen=True)

    code: dict[str, str]
    answers: dict[str, Annotated[list[float], Field(min_length=1)]]
    versions: dict[str, str]


class StudentMetadata(InputImages):
    """What a student's file says: enough to build it, feed it and measure it again. ``input``, ``mean`` and ``std`` are the data's.

    Attributes:
        model: the network's name, and ``classes`` the number of its logits; 0 if it is a backbone, which has no classifier.
        labels: the classes' names in the order of the logits; data without names has none.
        data, data_hash, split: what it was trained on.
        precision, correct, images: its accuracy on test, and the arithmetic of that measurement. A backbone has no accuracy: None of 0.
        init_hash, fingerprint, seed: of its run.
        front: the images that the network itself takes, if they are not the data's.
        network: a ``TrainedNetwork``. Version 0.1.0 wrote none, nor the two that follow.
        device, processor: that it was measured on.
    """

    model: str
    classes: CountOrNone
    labels: tuple[str, ...] = ()
    data: DataConfig
    data_hash: str
    split: str = ""
    precision: Literal["bf16", "fp32"]
    correct: Annotated[int, Field(ge=0, strict=True)] | None
    images: CountOrNone
    init_hash: str = ""
    fingerprint: str = ""
    seed: int = 0
    front: InputImages | None = None
    network: Any = None
    device: str = ""
    processor: str = ""

    @model_validator(mode="after")
    def _a_name_a_class(self) -> Self:
        if self.labels and len(self.labels) != self.classes:
            raise ValueError(f"labels must have {self.classes} names, one a class")
        return self

    @model_validator(mode="after")
    def _a_classifier_is_measured(self) -> Self:
        if self.classes and (self.correct is None or not self.images):
            raise ValueError("a network with classes says how many of how many images it gets right")
        return self

    @property
    def backbone(self) -> bool:
        """Whether it has no classifier."""
        return not self.classes

    @property
    def own_images(self) -> InputImages:
        """The images that the network itself takes."""
        return self.front or self

    @property
    def sizes(self) -> DataSpec:
        """The sizes of these, and the number of classes."""
        return DataSpec("", 0, self.classes, *self.own_images.input)

    @classmethod
    def required(cls) -> set[str]:
        """The keys without which a file can't be measured again."""
        return {name for name, field in cls.model_fields.items() if field.is_required()}

    @property
    def record(self) -> dict[str, Any]:
        """As the file holds it, in the order in which every file has it."""
        values = self.model_dump(mode="json", exclude={"front"} if self.front is None else None)
        return {name: values[name] for name in ("model", "classes", "labels")} | values


class TrainedOn(NamedTuple):
    """The images that a network was trained on: of which data set, under which split, and the hash of all."""

    dataset: str
    split: str
    data_hash: str


@dataclass(frozen=True)
class Statement:
    """What the metadata of a weights file say of its network, as far as they can be used. A file from elsewhere may say nothing.

    Attributes:
        metadata: all that it says.
        model: the network's name, or what stands there.
        backbone: whether it says that it has no classifier.
        labels: the names of its classes; empty if it has none.
        init_hash: of the weights it began with; empty if unknown.
        trained_on: None if unknown.
        input_spec: the images that it was made for; None if unknown.
    """

    metadata: Mapping[str, Any]

    @property
    def model(self) -> Any:  # noqa: D102
        return self.metadata.get("model")

    @property
    def backbone(self) -> bool:  # noqa: D102
        return self.metadata.get("classes") == 0

    @property
    def labels(self) -> tuple[str, ...]:  # noqa: D102
        labels = self.metadata.get("labels")
        return tuple(map(str, labels)) if isinstance(labels, list) else ()

    @property
    def init_hash(self) -> str:  # noqa: D102
        return str(self.metadata.get("init_hash", ""))

    @property
    def trained_on(self) -> TrainedOn | None:  # noqa: D102
        data = self.metadata.get("data")
        name = data.get("name") if isinstance(data, dict) else None
        if not name or "data_hash" not in self.metadata:
            return None
        return TrainedOn(str(name), str(self.metadata.get("split")), str(self.metadata["data_hash"]))

    @property
    def input_spec(self) -> InputSpec | None:  # noqa: D102
        images = self.metadata.get("front", self.metadata)
        try:
            channels, height, width = map(int, images["input"])
            resized = {"bicubic": "bicubic"}.get(images.get("interpolation"))
            return InputSpec(channels, height, width, tuple(map(float, images["mean"])), tuple(map(float, images["std"])), resized)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    @property
    def sizes(self) -> DataSpec | None:
        """The sizes of the images and the classes that the network itself takes; None if unknown."""
        spec, classes = self.input_spec, self.metadata.get("classes")
        if spec is None or not isinstance(classes, int):
            return None
        return DataSpec("", 0, classes, spec.channels or 0, spec.height or 0, spec.width or 0)


def trained_network(metadata: Mapping[str, Any], origin: str) -> TrainedNetwork | None:
    """What a file's metadata say of its network; None if they say nothing, as those of version 0.1.0 and of others.

    Raises:
        UserError: it is not what this package writes.
    """
    if "network" not in metadata:
        return None
    try:
        return TrainedNetwork.model_validate(metadata["network"])
    except ValidationError:
        raise UserError(f"{origin}: what its metadata say of its network is not as a run writes it; take the run's own file") from None
