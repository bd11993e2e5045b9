"""Measure a finished run or a weights file again, from the files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from .. import models, trust
from ..checks import Changes, UserError
from ..config import NO_LABELS, DataConfig, parse_as, scheme_of
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
from ..training import linear_probe
from ..training.evaluate import evaluate as measure
from ..training.nearest import NEIGHBOURS, TEMPERATURE, nearest_classes
from ..training.student_file import StudentMetadata, trained_network
from ..training.weights import fill, load_weights, refuse_misfit
from .integrity import meet_changes, meet_damage, newer
from .references import run_number
from .so_far import student_so_far

ProbeName = Literal["knn", "linear"]
PROBES: Mapping[ProbeName, str] = {
    "knn": f"weighted k nearest neighbours, cosine, temperature {TEMPERATURE:g} (Wu et al. 2018)",
    "linear": f"logistic regression, decay {linear_probe.DECAY:g} on standardised features",
}


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


class ProbedFigures(NamedTuple):
    """What the features of a network are worth on a labelled data set, as a probe tells it.

    Attributes:
        probe: how the classes are found from the features.
        n_train, n_test: number of images that the probe learnt from, and that it was measured on.
        k: number of neighbours; None of a linear probe.
        accuracy: percent of the test images.
        precision: the arithmetic of the network.
    """

    model: str
    dataset: str
    probe: str
    n_train: int
    n_test: int
    k: int | None
    correct: int
    accuracy: float
    precision: str


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
    data = load(_named_data(about, dataset), remarks)
    shape = (data.spec.channels, data.spec.height, data.spec.width)
    if about.backbone and shape == about.input:
        return data
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


def _named_data(about: StudentMetadata, dataset: str | None) -> DataConfig:
    """The data of a student's training, or others of its images' size. Files are read as those were, those of a backbone resized to it.

    Raises:
        UserError: the others have no labels.
    """
    if dataset is None:
        return about.data
    if dataset == NO_LABELS:
        raise UserError(f"--dataset {dataset}: it has no labels to measure anything by; name a labelled data set")
    config = about.data.model_copy(update={"name": dataset, "limit_train": None})
    if not about.backbone or (scheme := scheme_of(dataset)) is None or not scheme.files:
        return config.without_unlabelled
    channels, height, width = about.input
    return config.without_unlabelled.model_copy(update={"size": height if height == width else None, "channels": channels})


def probe(
    path: Path,
    device: torch.device,
    how: ProbeName,
    *,
    dataset: str | None = None,
    k: int | None = None,
    precision: str | None = None,
    workers: int | None = None,
    changes: Changes | None = None,
) -> ProbedFigures:
    """The accuracy on all test images of a probe of the network's pooled features, which learns from the training images.

    All images are normalised as in the network's training, and neither cropped nor mirrored. Of more than 50,000 training images every
    second, third, ... is taken.

    Args:
        how: ``knn``, weighted k nearest neighbours by cosine similarity; ``linear``, logistic regression.
        dataset: labelled images. Default: those that the student was trained on.
        k: number of neighbours. Default: 20.

    Raises:
        UserError: the file or the data can't be read, the data have no labels or other sizes, a feature is not finite, or there are fewer
            training images than k.
    """
    changes = changes or Changes()
    if how == "linear" and k is not None:
        raise UserError(f"--k {k} belongs to --probe knn; leave it out")
    net, about = load_network(path, changes)
    if dataset is None and (about.backbone or about.data.user_loaders):
        raise UserError(f"--probe {how}: {path} was trained on images that have no labels here; name a labelled data set with --dataset")
    data = load(_named_data(about, dataset), changes)
    shapes = [(data.spec.channels, data.spec.height, data.spec.width), about.input]
    if shapes[0] != shapes[1]:
        theirs, ours = ("x".join(map(str, shape)) for shape in shapes)
        raise UserError(f"{path} was trained on {ours} images; {data.name} has {theirs}; choose a data set of that shape")
    n_train = -(-len(data.x_train) // -(-len(data.x_train) // linear_probe.IMAGES))
    if how == "knn" and (k or NEIGHBOURS) > n_train:
        raise UserError(f"--probe knn: k={k or NEIGHBOURS} neighbours of {n_train:,} training images; set --k lower")
    arithmetic = resolve_precision(precision or about.precision, device)
    net, normalise = net.on(device), Normalisation(about.mean, about.std).on(device)
    parts = ((data.x_train, data.y_train, linear_probe.IMAGES), (data.x_test, data.y_test, len(data.x_test)))
    with computing(device):
        (features, labels), (asked, true) = (
            linear_probe.features_of(net, eval_set(images, numbers, normalise, device, workers), device, arithmetic, at_most)
            for images, numbers, at_most in parts
        )
        if not (features.isfinite().all() and asked.isfinite().all()):
            raise UserError(f"{path}: its features of these images are not finite; is the file whole?")
        if how == "knn":
            classes = nearest_classes(asked, features, labels, data.classes, k or NEIGHBOURS)
        else:
            weight, bias = linear_probe.logistic_regression(features, labels, data.classes)
            classes = (asked @ weight.T + bias).argmax(1)
    correct = int((classes == true).sum())
    return ProbedFigures(
        model=about.model,
        dataset=data.name,
        probe=PROBES[how],
        n_train=len(labels),
        n_test=len(true),
        k=(k or NEIGHBOURS) if how == "knn" else None,
        correct=correct,
        accuracy=100 * correct / len(true),
        precision=arithmetic,
    )


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
    if about.backbone:
        raise UserError(f"{path} is a backbone without a classifier, so without accuracy; measure its features: --probe knn --dataset NAME")
    assert about.correct is not None
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
