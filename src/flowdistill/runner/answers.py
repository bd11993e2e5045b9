"""What a teacher says of some images, and what would explain that it is wrong: its normalisation, or the order of its classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .. import advice
from ..data.images import part
from ..data.loader import DeviceData, holdout_positions, labelled
from ..data.normalisation import Normalisation
from ..data.sources import stratified
from ..data.supply import Labelled
from ..device import Precision
from ..models import Network
from ..models.front import View, front
from ..training.evaluate import predict
from .networks import NetworkRef
from .plan import Job

SAMPLE = 512  # images that a teacher is measured on, the same share of each class
ERRORS = 3  # standard errors that tell an accuracy from chance
GAIN = 0.1  # of accuracy that another normalisation or order of classes must bring, to be what is wrong
LEFT = 0.5  # of a teacher's errors that renaming may leave, if the order of its classes is to be all that is wrong
KNOWN = 5  # times chance, or halfway from chance to all, that renaming must reach: it flatters even answers that know nothing
SHOWN = 3  # of many classes, so many are named

NORMALISATIONS = {
    "ImageNet's": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "pixels from 0 to 1": Normalisation((0.0,), (1.0,)),
    "pixels from -1 to 1": Normalisation((0.5,), (0.5,)),
    "pixels from 0 to 255": Normalisation((0.0,), (1 / 255,)),
}


class Answers(NamedTuple):
    """What a network says of some images: logits [N, K] and labels [N]."""

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """[N] the most probable class."""
        classes: npt.NDArray[np.int64] = self.logits.argmax(1)
        return classes

    @property
    def accuracy(self) -> float:
        """The share that it gets right."""
        return float((self.classes == self.labels).mean())

    @property
    def chance(self) -> float:
        """The share of the commonest class."""
        return float(np.bincount(self.labels).max() / len(self.labels))

    @property
    def guessed(self) -> float:
        """The most that chance explains."""
        return min(self.chance + ERRORS * math.sqrt(self.chance * (1 - self.chance) / len(self.labels)), self.halfway)

    @property
    def halfway(self) -> float:
        """From chance to all right: no more is asked of a teacher, however common its commonest class."""
        return (1 + self.chance) / 2


def given(data: DeviceData) -> View:
    """The images as they come."""
    spec, own = data.spec, data.normalisation
    return View(spec.channels, spec.height, spec.width, own.mean, own.std)


def sample(job: Job, data: DeviceData) -> Labelled:
    """Some of the images that every epoch is measured on."""
    images, labels = job.data.x_test, job.data.y_test
    if job.config.split == "holdout":
        held_out = holdout_positions(job.data.y_train)
        images, labels = part(job.data.x_train, held_out), job.data.y_train[held_out]
    places = stratified(labels, min(SAMPLE, len(labels)), len(labels), least=1)
    return labelled(part(images, places), labels[places], data.normalise, data.device)


def ask(net: Network, images: Labelled, precision: Precision) -> Answers:
    """What a network says of them."""
    found = [(logits.cpu(), labels.cpu()) for (logits,), labels in predict([net], images, precision)]
    return Answers(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))


def another_normalisation(
    net: Network, teacher: NetworkRef, data: DeviceData, images: Labelled, precision: Precision, answers: Answers
) -> str:
    """How much better the teacher is under the best of the usual normalisations, where that is much; else empty."""
    least = max(answers.accuracy + GAIN, answers.guessed)
    if least > 1:
        return ""
    seen, own, best = given(data), net.front, (least, "")
    channels = teacher.view.over(seen).channels
    for name, other in {"the data's": data.normalisation, **NORMALISATIONS}.items():
        if len(other.mean) not in (1, channels):
            continue
        net.front = front(seen, replace(teacher.view, mean=other.mean, std=other.std))
        found = ask(net, images, precision).accuracy
        if found > best[0]:
            keys = {"mean": listed(other.mean), "std": listed(other.std)}
            cure = advice.options(*(word for key, value in keys.items() for word in ("--set", f"inputs.teacher.{key}={value}")))
            best = found, f"{found:.1%} with {name} ({cure})"
    net.front = own
    return best[1]


def listed(values: Sequence[float] | None) -> str:
    """A config's way to write them."""
    return "[" + ",".join(f"{value:.4g}" for value in values or ()) + "]"


def another_order(answers: Answers, names: Sequence[str]) -> str:
    """Which classes the teacher takes for which, where that explains its answers much better; else empty.

    The order is found on every other image of each class and measured on the rest: of few images a class an order always fits. Images
    of another size or order of channels shift answers from class to class too: where most errors stay, it may be these.
    """
    from scipy.optimize import linear_sum_assignment

    count = answers.logits.shape[1]
    order = np.argsort(answers.labels, kind="stable")
    classes, labels = answers.classes[order], answers.labels[order]
    confusion = np.zeros((count, count))
    np.add.at(confusion, (classes[::2], labels[::2]), 1)
    _, meant = linear_sum_assignment(confusion + np.eye(count) / 2, maximize=True)  # where nothing speaks for another order, as it is
    accuracy = float((meant[classes[1::2]] == labels[1::2]).mean())
    if accuracy < max(answers.accuracy + GAIN, answers.guessed, min(KNOWN * answers.chance, answers.halfway)):
        return ""
    changed = [(theirs, ours) for theirs, ours in enumerate(meant.tolist()) if theirs != ours and confusion[theirs].any()]
    named = [f"what the data calls {_name(names, ours)} it calls {_name(names, theirs)}" for theirs, ours in changed]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    what, cure = "wrong class order", "number the classes"
    if 1 - accuracy > LEFT * (1 - answers.accuracy):
        what, cure = f"{what}, or other images than it was trained on (size, channel order)", f"{cure} and make the images"
    return f"{what}: {accuracy:.1%} with its classes renamed: {', '.join(named[:SHOWN])}{more}; {cure} as its training did"


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if names else str(number)
