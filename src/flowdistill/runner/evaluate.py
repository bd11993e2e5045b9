"""Measure a finished run or a weights file again, from the files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .. import models, trust
from ..checks import Changes, UserError
from ..config import DataConfig, parse_as
from ..data.batches import eval_set
from ..data.dataset import ImageData
from ..data.normalisation import Normalisation
from ..data.sources import load
from ..data.user_loaders import UserLoaderData
from ..device import Precision, computing, describe, resolve_precision
from ..env import processor
from ..ledger import STUDENT_FILE, Ledger
from ..models import Network
from ..models.input_adapter import InputSpec, input_adapter
from ..talk import Remarks
from ..training.evaluate import evaluate as measure
from ..training.weights import fill, load_weights, refuse_misfit
from ..types import DataSpec
from .integrity import made, meet_changes, meet_damage, newer
from .references import run_number

Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]


class Taken(BaseModel):
    """Images that are taken: channels, height and width, and the mean and standard deviation of each channel in 0..1."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    input: tuple[Count, Count, Count]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _a_value_a_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.input[0]:
            raise ValueError(f"mean and std must have {self.input[0]} values, one a channel")
        return self

    @property
    def input_spec(self) -> InputSpec:
        """The same as a network sees them."""
        return InputSpec(*self.input, self.mean, self.std)


class About(Taken):
    """What a student's file must say of it to be measured again; ``record._about`` writes it, with more.

    ``input_adapter`` are the images that the network itself takes, where they are not the data's.
    """

    model: str
    classes: Count
    labels: tuple[str, ...] = ()  # the classes' names in the order of the logits; data without names has none
    front: Taken | None = None
    data: DataConfig
    data_hash: str
    precision: Literal["bf16", "fp32"]
    correct: int = Field(ge=0, strict=True)
    images: Count

    @model_validator(mode="after")
    def _a_name_a_class(self) -> Self:
        if self.labels and len(self.labels) != self.classes:
            raise ValueError(f"labels must have {self.classes} names, one a class")
        return self


class Measured(NamedTuple):
    """A network's accuracy on a test set.

    Attributes:
        precision: the arithmetic that it was measured in.
        recorded: percent, as the run measured it; None on other data.
        data: whether it is that of the run.
        verdict: ``as recorded``, or by how many points it differs and what is another than it was.
    """

    model: str
    dataset: str
    images: int
    correct: int
    accuracy: float
    precision: str
    recorded: float | None
    data: str
    verdict: str


class Named(NamedTuple):
    """A student's file that was named, and what of it was accepted though it is not what was recorded."""

    path: Path
    changed: str = ""


def weights_path(target: str, runs: Path, changes: Changes | None = None) -> Named:
    """The weights file of a run's number, below the ledger's folder, or the file itself.

    Raises:
        UserError: no such run, or its file is not what it wrote and that is not accepted.
    """
    number = run_number(target)
    if number is None:
        return Named(Path(target))
    ledger = Ledger(runs, changes=changes)
    run = ledger.run(number)
    changed = meet_damage(run, ledger) if run.status == "finished" else ""
    return Named(ledger.run_folder(run.no) / STUDENT_FILE, changed)


def load_network(path: Path, changes: Changes | None = None) -> tuple[Network, About]:
    """A student from its file alone, in eval mode, with what the file says of it.

    Raises:
        UserError: not a file that this package wrote, or damaged; or its network answers otherwise than when it was trained, and that
            is not accepted.
    """
    changes = changes or Changes()
    weights, told = load_weights(path, changes)
    if not {name for name, field in About.model_fields.items() if field.is_required()} <= told.keys():
        raise UserError(f"weights file {path} does not say its model and data; evaluate a run's student.safetensors or a run's number")
    try:
        about = parse_as(About, told)
        trust.came_from(about.model, "it")
        models.canonical(about.model)
    except UserError as error:
        raise UserError(f"weights file {path}: {error}") from None
    own = about.front or about
    spec = DataSpec("", 0, about.classes, *own.input)
    with torch.device("meta"):  # a file that claims a trillion classes is refused before they have a place in memory
        refuse_misfit(models.build(about.model, spec), weights, str(path))
    net = models.build(about.model, spec)
    fill(net, weights, str(path))
    net.input_adapter = input_adapter(about.input_spec, own.input_spec)
    net.about = told
    net.changed = meet_changes(str(path), about.model, spec, weights, told, changes)
    return net.eval(), about


def load_fitting(path: Path, about: About, dataset: str | None, remarks: Remarks) -> ImageData:
    """The data that a student was trained on, or others of that shape.

    Raises:
        UserError: the data can't be read, or have other sizes, classes or names of classes.
    """
    data = load(about.data.model_copy(update={"name": dataset or about.data.name}), remarks)
    if isinstance(data, UserLoaderData):
        raise UserError(f"{path} was trained on a loader's images, which only training reads; Result.module() gives its network to Python")
    shape = (data.spec.channels, data.spec.height, data.spec.width)
    if (*shape, data.classes) != (*about.input, about.classes):
        raise UserError(
            f"{path} was trained on {'x'.join(map(str, about.input))} images of {about.classes} classes; {data.name} has "
            f"{'x'.join(map(str, shape))} of {data.classes}; choose a data set of that shape"
        )
    if about.labels and data.class_names and about.labels != data.class_names:
        trained, other = next((own, theirs) for own, theirs in zip(about.labels, data.class_names, strict=True) if own != theirs)
        raise UserError(f"{path} was trained on other classes than {data.name} has ({trained!r} where that has {other!r}); name them alike")
    return data


def evaluate(
    path: Path,
    device: torch.device,
    *,
    dataset: str | None = None,
    precision: str | None = None,
    workers: int | None = None,
    changed: str = "",
    changes: Changes | None = None,
) -> Measured:
    """Accuracy on all test images, with the normalisation and, unless told otherwise, the data and precision of training.

    Args:
        changed: what of the file is known to be another than was recorded.

    Raises:
        UserError: the file or the data can't be read, the data has other sizes, classes or names of classes, or the network's logits
            are not finite.
    """
    changes = changes or Changes()
    net, about = load_network(path, changes)
    data = load_fitting(path, about, dataset, changes)
    net = net.on(device)
    test = eval_set(data.x_test, data.y_test, Normalisation(about.mean, about.std).on(device), device, workers)
    arithmetic, images = resolve_precision(precision or about.precision, device), len(test)
    with computing(device):
        found = measure(net, test, arithmetic)
    if broken := int(found.unanswered):
        raise UserError(f"{path}: its logits are not finite for {broken:,} of {images:,} test images; is the file whole?")
    correct = int(found.correct)
    same = data.hash == about.data_hash
    accuracy, recorded = 100 * correct / images, 100 * about.correct / about.images
    why = ", ".join(_others(about, net.about, device, arithmetic, changed or net.changed))
    return Measured(
        model=about.model,
        dataset=data.name,
        images=images,
        correct=correct,
        accuracy=accuracy,
        precision=arithmetic,
        recorded=recorded if same else None,
        data="as trained" if same else "other than trained on",
        verdict=_verdict(accuracy - recorded, why, verified="network" in net.about) if same else "not comparable: other data",
    )


def _verdict(points: float, why: str, *, verified: bool) -> str:
    if points:
        return f"differs by {points:+.2f} points ({why or 'for no reason that is on record'})"
    return "as recorded" if verified else "as recorded (its code and answers are not verified: no record of them)"


def _others(about: About, told: Mapping[str, Any], device: torch.device, precision: Precision, changed: str) -> Iterator[str]:
    """What may be why a student is measured otherwise than it was."""
    if changed:
        yield changed
    if precision != about.precision:
        yield f"{precision}, was {about.precision}"
    if told.get("device", describe(device)) != describe(device):
        yield f"another device: {describe(device)}, was {told['device']}"
    if told.get("processor", processor()) != processor():
        yield f"another processor: {processor()}, was {told['processor']}"
    if (network := made(told, "the file")) and (other := newer(network.versions)):
        yield other.removeprefix("; ")
