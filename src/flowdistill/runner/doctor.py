"""What looks wrong with a training that is planned: found in seconds, before hours of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..checks import UserError
from ..config import RunConfig
from ..data.images import ImageData, part
from ..data.loader import place
from ..data.normalisation import Normalisation
from ..data.sources import stratified
from ..data.supply import Supply
from ..device import describe, peak_memory
from ..ledger import Ledger
from ..models import Network
from ..models.front import View, front
from ..training.cohort import first_gradients, seconds_per_epoch
from ..training.evaluate import predict
from .assemble import GRADIENT_LIMIT, assemble
from .networks import NetworkRef
from .pairing import told
from .plan import Job, checked, drafts

SAMPLE = 512  # test images that the teacher is measured on, the same share of each class
ERRORS = 3  # standard errors that tell an accuracy from chance
GAIN = 0.1  # of accuracy that another normalisation or order of classes must bring, to be what is wrong
FEEBLE = 1e-3  # a term whose gradient is smaller than this, relative to the task's, does next to nothing
SHOWN = 3  # of many classes, so many are named

NORMALISATIONS = {
    "ImageNet's": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "pixels from 0 to 1": Normalisation((0.0,), (1.0,)),
    "pixels from -1 to 1": Normalisation((0.5,), (0.5,)),
    "pixels from 0 to 255": Normalisation((0.0,), (1 / 255,)),
}

Verdict = Literal["ok", "look", "wrong"]


class Finding(NamedTuple):
    """One thing that was looked at, and what was found."""

    check: str
    verdict: Verdict
    found: str


class Answers(NamedTuple):
    """What a network says of the sample: logits [N, K] and labels [N]."""

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


def examine(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device) -> list[Finding]:
    """Look at the data, the networks, the teacher's answers, the taps, each term's first gradient, time and memory. Trains nothing.

    ``configs`` share data and networks: one for each method.
    """
    findings: list[Finding] = []
    try:
        first, *others = drafts(configs, ledger, device)
        findings += _of_data(first)
        data = place(_sampled(first.data), first.config.split, device)
        findings += _of_networks(first)
        if first.teacher is not None:
            findings += _of_teacher(first, first.teacher, data)
        for job in (first, *others):
            findings += _of_method(job, ledger, data)
    except UserError as error:
        findings.append(Finding("set-up", "wrong", str(error)))
    return findings


def _sampled(data: ImageData) -> ImageData:
    places = stratified(data.y_test, min(SAMPLE, len(data.y_test)), len(data.y_test), least=1)
    return replace(data, x_test=part(data.x_test, places), y_test=data.y_test[places])


def _of_data(job: Job) -> Iterator[Finding]:
    data, spec = job.data, job.data.spec
    counts = np.bincount(data.y_train, minlength=data.classes)
    size = f"{spec.channels}x{spec.height}x{spec.width}"
    told = f"{data.name}: {len(data.y_train):,} training and {len(data.y_test):,} test images {size}, {data.classes} classes"
    uneven = counts.max() > 10 * max(1, counts.min())
    yield Finding("data", "look" if uneven else "ok", told + f"; {counts.min():,} to {counts.max():,} images a class" * bool(uneven))
    if len(data.y_train) < job.config.train.batch_size:
        yield Finding("data", "wrong", f"a batch of {job.config.train.batch_size} is more than all images; set --batch-size lower")


def _of_networks(job: Job) -> Iterator[Finding]:
    ours = _parameters(job.student, job)
    if job.teacher is None:
        yield Finding("networks", "ok", f"student {job.student.model}: {ours:,} parameters")
        return
    theirs = _parameters(job.teacher, job)
    verdict: Verdict = "ok" if ours < theirs else "look"
    share = f"{ours / theirs:.2f} of the teacher's" if ours < theirs else "no fewer than the teacher has"
    yield Finding(
        "networks", verdict, f"student {job.student.model}: {ours:,} parameters, {share}; teacher {job.teacher.model}: {theirs:,}"
    )


def _parameters(network: NetworkRef, job: Job) -> int:
    return sum(parameter.numel() for parameter in network.build(job.data.spec).parameters())


def _of_teacher(job: Job, teacher: NetworkRef, data: Supply) -> Iterator[Finding]:
    """Whether it knows these images: a wrong normalisation, another order of classes and a lack of training all look like chance."""
    name = f"teacher {teacher.model} ({teacher.origin})"
    if other := teacher.other_classes(job.data):
        same = sorted(teacher.labels) == sorted(job.data.class_names) and teacher.labels
        what = "the same classes in another order" if same else "other classes"
        yield Finding("teacher", "wrong" if same else "look", f"{name} was trained on {what}: {other}")
        return
    net = teacher.build(data.spec, given=data.normalisation).to(device=data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    answers = _answers(net, data, job)
    images, chance = len(answers.labels), np.bincount(answers.labels).max() / len(answers.labels)
    told = f"{name}: {answers.accuracy:.1%} of {images} test images (chance {chance:.1%})"
    if not np.isfinite(answers.logits).all():
        yield Finding("teacher", "wrong", f"{name}: its logits are not finite")
    elif better := _another_normalisation(net, teacher, data, job, answers):
        yield Finding("teacher", "wrong", f"{told}; wrong normalisation: {better}")
    elif order := _another_order(answers, job.data.class_names):
        yield Finding("teacher", "wrong", f"{told}; wrong class order: {order}")
    elif answers.accuracy < chance + ERRORS * math.sqrt(chance * (1 - chance) / images):
        often = np.bincount(answers.classes).max() / images
        yield Finding("teacher", "wrong", f"{told}: chance level, not trained on such images; {often:.0%} of its answers are one class")
    else:
        yield Finding("teacher", "look" if answers.accuracy < 2 * chance else "ok", told)


def _answers(net: Network, data: Supply, job: Job) -> Answers:
    found = [(logits.cpu(), labels.cpu()) for (logits,), labels in predict([net], data.curve, job.precision)]
    return Answers(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))


def _another_normalisation(net: Network, teacher: NetworkRef, data: Supply, job: Job, answers: Answers) -> str:
    """How much better the teacher is under the best of the usual normalisations, where that is much; else empty."""
    spec, given = data.spec, data.normalisation
    seen = View(spec.channels, spec.height, spec.width, given.mean, given.std)
    own, best = net.front, ("", answers.accuracy, "")
    for name, other in {"the data's": given, **NORMALISATIONS}.items():
        channels = teacher.view.channels or spec.channels
        mean, std = (values * channels if len(values) == 1 else values for values in (other.mean, other.std))
        if len(mean) != channels:
            continue
        net.front = front(seen, replace(teacher.view, mean=mean, std=std))
        found = _answers(net, data, job).accuracy
        if found > best[1]:
            best = name, found, f"--set inputs.teacher.mean={_list(mean)} --set inputs.teacher.std={_list(std)}"
    net.front = own
    return f"{best[1]:.1%} with {best[0]} ({best[2]})" if best[1] > answers.accuracy + GAIN else ""


def _list(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"


def _another_order(answers: Answers, names: Sequence[str]) -> str:
    """Which classes the teacher takes for which, where that explains its answers much better; else empty.

    The order is found on every other image and measured on the rest: of few images a class an order always fits.
    """
    from scipy.optimize import linear_sum_assignment

    count = answers.logits.shape[1]
    confusion = np.zeros((count, count))
    np.add.at(confusion, (answers.classes[::2], answers.labels[::2]), 1)
    _, meant = linear_sum_assignment(confusion, maximize=True)
    accuracy = float((meant[answers.classes[1::2]] == answers.labels[1::2]).mean())
    if accuracy < answers.accuracy + GAIN or accuracy < 2 / count:
        return ""
    changed = [(theirs, ours) for theirs, ours in enumerate(meant.tolist()) if theirs != ours and confusion[theirs].any()]
    named = [
        f"what the data calls {names[ours] if names else ours} it calls {names[theirs] if names else theirs}" for theirs, ours in changed
    ]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return f"{accuracy:.1%} with its classes renamed: {', '.join(named[:SHOWN])}{more}; number the classes as the teacher's training did"


def _of_method(job: Job, ledger: Ledger, data: Supply) -> Iterator[Finding]:
    """Its taps, the first gradient of its terms, and what training would take."""
    name = job.settled.name
    try:
        needs = job.method().needs
        if job.pairing and needs.student:
            yield Finding(f"{name}: taps", "ok", "; ".join(line.strip() for line in told(job.pairing, needs.student, needs.teacher)))
        cohort, (member, *_) = assemble([checked(job, ledger)], data, data.device)
    except UserError as error:
        yield Finding(f"{name}: taps", "wrong", str(error))
        return
    for term, ratio in first_gradients(cohort)[member.student].items():
        yield _of_gradient(name, term, ratio, job.settled.weights[term])
    seconds = seconds_per_epoch(cohort) * sum(job.phase_epochs)
    memory = f"{peak_memory(data.device) / 2**20:,.0f} MiB at most so far"
    duration = timedelta(seconds=round(seconds))
    yield Finding(f"{name}: cost", "ok", f"{sum(job.phase_epochs)} epochs: about {duration} (h:mm:ss) on {describe(data.device)}; {memory}")


def _of_gradient(method: str, term: str, ratio: float, weight: float) -> Finding:
    told = f"weight {weight:g}: gradient {ratio:.3g} times the task's"
    check = f"{method}: {term}"
    if not math.isfinite(ratio):
        return Finding(check, "wrong", f"{told}: not finite")
    if ratio > GRADIENT_LIMIT:
        return Finding(check, "wrong", f"{told}; over {GRADIENT_LIMIT:g} training diverges: --set weights.{term}={weight / ratio * 10:.1g}")
    if ratio < FEEBLE:
        cure = f": --set weights.{term}={weight / ratio / 10:.1g}" if ratio else ""
        return Finding(check, "look", f"{told}; it does next to nothing{cure}")
    return Finding(check, "ok", told)
