"""Measure a finished run or a weights file again, from the files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import models, trust
from ..checks import Changes, UserError
from ..config import parse_as
from ..data.batches import eval_set
from ..data.dataset import ImageData
from ..data.normalisation import Normalisation
from ..data.sources import load
from ..device import Precision, computing, describe, resolve_precision
from ..env import processor
from ..ledger import STUDENT_FILE, Ledger
from ..models import Network
from ..models.input_adapter import input_adapter
from ..talk import Remarks
from ..training.evaluate import evaluate as measure
from ..training.student_file import StudentMetadata, trained_network
from ..training.weights import fill, load_weights, refuse_misfit
from .integrity import meet_changes, meet_damage, newer
from .references import run_number
from .so_far import student_so_far


class Measured(NamedTuple):
    """A network's figures on a test set.

    Attributes:
        accuracy, top5, macro_f1, balanced_accuracy: percent; top5 is None if there are no more than five classes.
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
    top5: float | None
    macro_f1: float
    balanced_accuracy: float
    precision: str
    recorded: float | None
    data: str
    verdict: str


class Named(NamedTuple):
    """A student's file that was named, and what of it was accepted though it is not what was recorded."""

    path: Path
    changed: str = ""


def weights_path(target: str, runs: Path, changes: Changes | None = None) -> Named:
    """The weights file of a run's number, below the ledger's folder, or the file itself. Of a run that was cut off it is written first, and
    said so.

    Raises:
        UserError: no such run, or its file is not what it wrote and that is not accepted.
    """
    number = run_number(target)
    if number is None:
        return Named(Path(target))
    changes = changes or Changes()
    ledger = Ledger(runs, changes=changes)
    run = ledger.run(number)
    if run.cut_off:
        return Named(student_so_far(run, ledger, changes))
    changed = meet_damage(run, ledger) if run.status == "finished" else ""
    return Named(ledger.run_folder(run.no) / STUDENT_FILE, changed)


def load_network(path: Path, changes: Changes | None = None) -> tuple[Network, StudentMetadata]:
    """A student from its file alone, in eval mode, with what the file says of it.

    Raises:
        UserError: not a file that this package wrote, or damaged; or its network answers otherwise than when it was trained, and that
            is not accepted.
    """
    changes = changes or Changes()
    weights, metadata = load_weights(path, changes)
    if not StudentMetadata.required() <= metadata.keys():
        raise UserError(f"weights file {path} does not say its model and data; evaluate a run's student.safetensors or a run's number")
    try:
        student = parse_as(StudentMetadata, metadata)
        trust.came_from(student.model, "it")
        models.canonical(student.model)
    except UserError as error:
        raise UserError(f"weights file {path}: {error}") from None
    spec = student.sizes
    with torch.device("meta"):  # a file that claims a trillion classes is refused before they have a place in memory
        refuse_misfit(models.build(student.model, spec), weights, str(path))
    net = models.build(student.model, spec)
    fill(net, weights, str(path))
    net.input_adapter = input_adapter(student.input_spec, student.own_images.input_spec)
    net.about = metadata
    net.changed = meet_changes(str(path), student.model, spec, weights, metadata, changes)
    return net.eval(), student


def load_fitting(path: Path, about: StudentMetadata, dataset: str | None, remarks: Remarks) -> ImageData:
    """The data that a student was trained on, or others of that shape.

    Raises:
        UserError: the data can't be read, or have other sizes, classes or names of classes.
    """
    config = about.data.model_copy(update={"name": dataset or about.data.name})
    data = load(config, remarks)
    shape = (data.spec.channels, data.spec.height, data.spec.width)
    if (*shape, data.classes) != (*about.input, about.classes):
        raise UserError(
            f"{path} was trained on {'x'.join(map(str, about.input))} images of {about.classes} classes; {data.name} has "
            f"{'x'.join(map(str, shape))} of {data.classes}; choose a data set of that shape"
        )
    if about.labels and data.class_names and about.labels != data.class_names:
        trained_label, other_label = next(
            (recorded, theirs) for recorded, theirs in zip(about.labels, data.class_names, strict=True) if recorded != theirs
        )
        raise UserError(
            f"{path} was trained on other classes than {data.name} has ({trained_label!r} where that has {other_label!r}); name them alike"
        )
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
    if about.data.user_loaders and dataset is None:
        raise UserError(f"{path} was trained on a loader's images, which only Python has; Result.card() measures it on them")
    net = net.on(device)
    test = eval_set(data.x_test, data.y_test, Normalisation(about.mean, about.std).on(device), device, workers)
    arithmetic, images = resolve_precision(precision or about.precision, device), len(test)
    with computing(device):
        evaluation = measure(net, test, arithmetic)
    if broken := int(evaluation.unanswered):
        raise UserError(f"{path}: its logits are not finite for {broken:,} of {images:,} test images; is the file whole?")
    figures = evaluation.answers(data.classes).figures
    same = data.hash == about.data_hash
    accuracy, recorded = figures.accuracy, 100 * about.correct / about.images
    why = ", ".join(_others(about, net.about, device, arithmetic, changed or net.changed))
    return Measured(
        model=about.model,
        dataset=data.name,
        images=images,
        correct=figures.correct,
        accuracy=accuracy,
        top5=figures.top5_accuracy,
        macro_f1=figures.macro_f1,
        balanced_accuracy=figures.balanced_accuracy,
        precision=arithmetic,
        recorded=recorded if same else None,
        data="as trained" if same else "other than trained on",
        verdict=_verdict(accuracy - recorded, why, verified="network" in net.about) if same else "not comparable: other data",
    )


def _verdict(points: float, why: str, *, verified: bool) -> str:
    if points:
        return f"differs by {points:+.2f} points ({why or 'for no reason that is on record'})"
    return "as recorded" if verified else "as recorded (its code and answers are not verified: no record of them)"


def _others(about: StudentMetadata, metadata: Mapping[str, Any], device: torch.device, precision: Precision, changed: str) -> Iterator[str]:
    """What may be why a student is measured otherwise than it was."""
    if changed:
        yield changed
    if precision != about.precision:
        yield f"{precision}, was {about.precision}"
    if metadata.get("device", describe(device)) != describe(device):
        yield f"another device: {describe(device)}, was {metadata['device']}"
    if metadata.get("processor", processor()) != processor():
        yield f"another processor: {processor()}, was {metadata['processor']}"
    if (network := trained_network(metadata, "the file")) and (other := newer(network.versions)):
        yield other.removeprefix("; ")
