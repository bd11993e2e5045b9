"""What a teacher says of some images, and what would explain that it is wrong: their normalisation or size, or the order of its classes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import advice
from ..checks import FAILURES
from ..data.batches import DeviceData, eval_set
from ..data.dataset import part
from ..data.interfaces import EvalSet
from ..data.normalisation import Normalisation
from ..data.splits import holdout_positions, stratified
from ..device import Precision
from ..models import Network
from ..models.input_adapter import InputSpec, input_adapter
from ..training.evaluate import predict
from .job import Job
from .references import NetworkRef

SAMPLE = 512  # images that a teacher is measured on, the same share of each class
ERRORS = 3  # standard errors that tell an accuracy from chance
GAIN = 0.1  # of accuracy that another normalisation, size or order of classes must bring, to be what is wrong
LEFT = 0.5  # share of a teacher's errors that may stay after renaming, if the order of its classes is all that is wrong
KNOWN = 5  # times chance, or halfway from chance to all, that renaming must reach: it flatters even answers that know nothing
SHOWN = 3  # of many classes, so many are named

SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 288)  # sides of images that teachers are usually trained on
FEW = {64: 128, 96: 64}  # side -> so many images tell whether a size up to it is worth a look at all
MIN_IMAGES = 32  # that tell it of larger sizes
LOOKED_AT = 2  # sizes, the best by few images, that are tried on all
PIECE = 64  # images of a pass at another size: larger ones must not take more memory than training will
ENLARGED = 8  # times the data's own side: nobody enlarges images more
SECONDS = 5.0  # after which no further size is tried

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
        """The highest accuracy that chance explains."""
        return min(self.chance + ERRORS * math.sqrt(self.chance * (1 - self.chance) / len(self.labels)), self.halfway)

    @property
    def halfway(self) -> float:
        """Halfway from chance to all right. No more is asked of a teacher, however common the commonest class is."""
        return (1 + self.chance) / 2


def input_spec_of(data: DeviceData) -> InputSpec:
    """Size, channels and normalisation of the data's images."""
    spec, normalisation = data.spec, data.normalisation
    return InputSpec(spec.channels, spec.height, spec.width, normalisation.mean, normalisation.std)


def sample(job: Job, data: DeviceData) -> EvalSet:
    """Some of the images that every epoch is measured on."""
    images, labels = job.data.x_test, job.data.y_test
    if job.config.split == "holdout":
        held_out = holdout_positions(job.data.y_train)
        images, labels = part(job.data.x_train, held_out), job.data.y_train[held_out]
    positions = stratified(labels, min(SAMPLE, len(labels)), len(labels), least=1)
    return eval_set(part(images, positions), labels[positions], data.normalise, data.device)


def ask(net: Network, images: EvalSet, precision: Precision) -> Answers:
    """A network's answers to these images."""
    batches = [(logits.cpu(), labels.cpu()) for (logits,), labels in predict([net], images, precision)]
    return Answers(*(torch.cat(parts).numpy() for parts in zip(*batches, strict=True)))


class Explained(NamedTuple):
    """The teacher's accuracy on images of another normalisation or size, and the words that name it."""

    accuracy: float
    explanation: str


class Part:
    """Some of the images of ``whole``, a few in each batch. ``positions`` says which. Default: all."""

    def __init__(self, whole: EvalSet, positions: npt.NDArray[np.int64] | None = None) -> None:
        self.whole, self.positions = whole, np.arange(len(whole)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``EvalSet`` says."""
        return itertools.islice(self._all(), first, None, every)

    def _all(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin = 0
        for images, labels in self.whole.batches():
            inside = self.positions[(self.positions >= begin) & (self.positions < begin + len(labels))] - begin
            chosen = torch.from_numpy(inside).to(labels.device)
            yield from zip(torch.split(images[chosen], PIECE), torch.split(labels[chosen], PIECE), strict=True)
            begin += len(labels)


def other_images(
    net: Network, teacher: NetworkRef, data: DeviceData, images: EvalSet, precision: Precision, answers: Answers, *, sizes: bool
) -> str:
    """What is wrong with the images, if the teacher is much better with another of the usual normalisations; else empty.

    With ``sizes`` other sizes are tried too.
    """
    least, adapter = max(answers.accuracy + GAIN, answers.guessed), net.input_adapter
    if least > 1:
        return ""
    try:
        explained = list(_other_normalisations(net, teacher, data, images, precision))
        if sizes and max(explained).accuracy + GAIN <= 1:
            explained += _other_sizes(net, teacher, data, images, precision, answers, least)
    finally:
        net.input_adapter = adapter
    best = max(explained)
    return best.explanation if best.accuracy > least else ""


def _other_normalisations(
    net: Network, teacher: NetworkRef, data: DeviceData, images: EvalSet, precision: Precision
) -> Iterator[Explained]:
    seen = input_spec_of(data)
    channels = teacher.input_spec.over(seen).channels
    for name, other in {"the data's": data.normalisation, **NORMALISATIONS}.items():
        if len(other.mean) in (1, channels):
            net.input_adapter = input_adapter(seen, replace(teacher.input_spec, mean=other.mean, std=other.std))
            accuracy = ask(net, images, precision).accuracy
            keys = {"mean": listed(other.mean), "std": listed(other.std)}
            cure = advice.options(*(word for key, value in keys.items() for word in ("--set", f"inputs.teacher.{key}={value}")))
            yield Explained(accuracy, f"wrong normalisation: {accuracy:.1%} with {name} ({cure})")


def _other_sizes(
    net: Network, teacher: NetworkRef, data: DeviceData, images: EvalSet, precision: Precision, answers: Answers, least: float
) -> Iterator[Explained]:
    """Try each size on a few images, for some seconds, and the best sizes on all. Sizes that the network can't take are passed over."""
    seen, until = input_spec_of(data), time.perf_counter() + SECONDS
    now, tried = teacher.input_spec.over(seen), list[tuple[float, int]]()
    largest = ENLARGED * max(seen.height or 0, seen.width or 0)
    for size in sorted({*(size for size in SIZES if size <= largest), *_side(seen)} - _side(now)):
        few = next((count for side, count in FEW.items() if size <= side), MIN_IMAGES)
        positions = stratified(answers.labels, min(few, len(answers.labels)), len(answers.labels), least=1)
        if (accuracy := _at(size, net, teacher, seen, Part(images, positions), precision)) is not None:
            tried.append((accuracy, size))
        if time.perf_counter() > until:
            break
    for by_few, size in sorted(tried, reverse=True)[:LOOKED_AT]:
        if by_few > least - GAIN / 2 and (accuracy := _at(size, net, teacher, seen, Part(images), precision)) is not None:
            cure = advice.options("--set", f"inputs.teacher.size={size}")
            yield Explained(accuracy, f"wrong size: {accuracy:.1%} at {size}x{size} ({cure})")


def _side(input_spec: InputSpec) -> set[int]:
    """The side of square images; empty for others, which no option can name."""
    return {input_spec.height} if input_spec.height is not None and input_spec.height == input_spec.width else set()


def _at(size: int, net: Network, teacher: NetworkRef, seen: InputSpec, images: EvalSet, precision: Precision) -> float | None:
    """The accuracy on images of that size; None if the network can't take them."""
    net.input_adapter = input_adapter(seen, replace(teacher.input_spec, height=size, width=size))
    try:
        return ask(net, images, precision).accuracy
    except FAILURES:  # of the network's own code: too small for its pooling, or another number than its classifier takes
        return None


def listed(values: Sequence[float] | None) -> str:
    """Numbers as a config writes them."""
    return "[" + ",".join(f"{value:.4g}" for value in values or ()) + "]"


def another_order(answers: Answers, names: Sequence[str]) -> str:
    """Which classes the teacher takes for which, if that explains its answers much better; else empty.

    The order is found on every other image of each class and measured on the rest, since some order always fits if a class has few images.
    Images of another size or order of channels also shift answers from class to class. If most errors stay, these may be the reason.
    """
    from scipy.optimize import linear_sum_assignment

    count = answers.logits.shape[1]
    order = np.argsort(answers.labels, kind="stable")
    classes, labels = answers.classes[order], answers.labels[order]
    confusion = np.zeros((count, count))
    np.add.at(confusion, (classes[::2], labels[::2]), 1)
    _, meant = linear_sum_assignment(confusion + np.eye(count) / 2, maximize=True)  # a tie keeps the class
    accuracy = float((meant[classes[1::2]] == labels[1::2]).mean())
    if accuracy < max(answers.accuracy + GAIN, answers.guessed, min(KNOWN * answers.chance, answers.halfway)):
        return ""
    changed = [(answer, label) for answer, label in enumerate(meant.tolist()) if answer != label and confusion[answer].any()]
    named = [f"what the data calls {_name(names, label)} it calls {_name(names, answer)}" for answer, label in changed]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    fault, cure = "wrong class order", "number the classes"
    if 1 - accuracy > LEFT * (1 - answers.accuracy):
        fault, cure = f"{fault}, or other images than it was trained on (size, channel order)", f"{cure} and make the images"
    return f"{fault}: {accuracy:.1%} with its classes renamed: {', '.join(named[:SHOWN])}{more}; {cure} as its training did"


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if names else str(number)
