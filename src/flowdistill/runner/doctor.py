"""What looks wrong with a training that is planned: found in seconds, before hours of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .. import advice, models
from ..checks import UserError
from ..config import BASELINE, RunConfig
from ..data.batches import DeviceData, to_device
from ..data.dataset import ImageData
from ..device import computing, describe, peak_memory
from ..ledger import Ledger
from ..models import Network
from ..models.joined import Joined
from ..models.probed import Probed
from ..training import linear_probe, rates
from ..training.cohort import Cohort
from ..training.engine_choice import choose
from ..training.gradients import Pull, first_gradients, pulls
from ..training.joining import agreement
from ..training.task import TASK
from ..training.timing import seconds_per_epoch
from .cohorts import FAINT, GRADIENT_LIMIT, LOUD, NO_TASK
from .estimate import unmeasured
from .job import Job
from .pairing import compared
from .plan import checked, drafts
from .references import NetworkRef
from .several import Several
from .teacher_diagnosis import another_order, ask, input_spec_of, listed, other_images, sample
from .watcher import Watcher

BATCHES = 8  # that tell how large a term's gradient is
SHOWN = 11  # points of a curve of losses
GROWS = 2  # times as strong in the last epoch as in the first: a term whose strength follows the epochs
UNEVEN = 10  # times as many images of one class as of another

Verdict = Literal["ok", "look", "wrong"]


class Finding(NamedTuple):
    """One thing that was looked at, and what was found."""

    check: str
    verdict: Verdict
    found: str


def examine(
    configs: Sequence[RunConfig], ledger: Ledger, device: torch.device, watcher: Watcher | None = None, *, find_rates: bool = False
) -> list[Finding]:
    """Look at the data, the networks, each teacher's answers, the taps, each term's first gradients, time and memory.

    Nothing that it trains is kept, and it writes nothing. ``configs`` share data and student. The teachers of all seeds are looked at, each
    method with one seed.

    Args:
        find_rates: look for a learning rate for each method too, by a range test. Default: False.

    Raises:
        UserError: the data or the student can't be had, so there is nothing to look at.
    """
    with computing(device):
        return [*_findings(configs, ledger, device, watcher or Watcher(), find_rates)]


def _findings(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device, watcher: Watcher, find_rates: bool) -> Iterator[Finding]:
    jobs, refused = _drafted(configs, ledger, device)
    if not jobs and configs[0].data.no_labels:  # no baseline either
        yield from refused
        return
    first = jobs[0] if jobs else drafts([_alone(configs[0])], ledger, device)[0]
    yield _of_data(first.data)
    yield from refused
    try:
        data = to_device(first.data, first.config.split, device)
    except UserError as error:
        yield Finding("data", "wrong", str(error))
        return
    assert isinstance(data, DeviceData), "no command knows the loaders of another process"
    yield from _noted("student", _of_student(first, data))
    for teacher in {one.origin: one for job in jobs if job.teacher for one in job.teacher.each}.values():
        watcher.say(f"teacher {teacher.model} ({teacher.origin}): its answers")
        yield from _noted("teacher", _of_teacher(first, teacher, data))
    for together in {job.teacher.origin: job.teacher for job in jobs if isinstance(job.teacher, Several)}.values():
        yield from _noted("teachers together", _of_several(first, together, data))
    for name, group in _by_method(jobs).items():
        watcher.say(f"{name}: taps, gradients, {'rate, ' * find_rates}cost")
        yield from _noted(f"{name}: start", _of_method(group, data, find_rates))


def _noted(check: str, looking: Iterable[Finding]) -> Iterator[Finding]:
    """The findings, and after them the mistake that ended the looking, if there is one."""
    try:
        yield from looking
    except UserError as error:
        yield Finding(check, "wrong", str(error))


def _drafted(configs: Sequence[RunConfig], ledger: Ledger, device: torch.device) -> tuple[list[Job], list[Finding]]:
    """The jobs that can be had, and why the rest can't. Untrained teachers stand in for those that are still to be trained."""
    try:
        return drafts(configs, ledger, device), []
    except UserError:
        jobs: list[Job] = []
    refused: dict[str, list[str]] = {}
    for config in configs:
        for stand_in in (False, True):
            try:
                jobs += drafts([config], ledger, device, stand_in=stand_in)
                break
            except UserError as error:
                if config.method not in (methods := refused.setdefault(str(error), [])):
                    methods.append(config.method)
    return jobs, [Finding(f"{', '.join(methods)}: set-up", "wrong", why) for why, methods in refused.items()]


def _alone(config: RunConfig) -> RunConfig:
    """The config that trains the student on the labels alone."""
    plain: dict[str, Any] = {"method": BASELINE, "teacher": None, "options": {}, "weights": {}, "peer": None, "side": 1}
    train = config.train.model_copy(update={"mixup": False})
    return config.model_copy(update={**plain, "data": config.data.without_unlabelled, "train": train})


def _by_method(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """The jobs of each method's first seed: one, or the two sides of a pair."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        group = groups.setdefault(job.resolved.name, [])
        if all(job.config.seed == other.config.seed for other in group):
            group.append(job)
    return groups


def _of_data(data: ImageData) -> Finding:
    spec = data.spec
    size = f"{spec.channels}x{spec.height}x{spec.width}"
    if not data.classes:
        return Finding("data", "ok", f"{data.name}: {len(data.y_train):,} training images {size} without labels; {NO_TASK}")
    counts = np.bincount(data.y_train, minlength=data.classes)
    summary = f"{data.name}: {len(data.y_train):,} training and {len(data.y_test):,} test images {size}, {data.classes} classes"
    if counts.max() <= UNEVEN * counts.min():
        return Finding("data", "ok", summary)
    fewest, most = (f" ({data.class_names[label]})" if data.class_names else "" for label in (counts.argmin(), counts.argmax()))
    return Finding("data", "look", f"{summary}; uneven: {counts.min():,}{fewest} to {counts.max():,}{most} training images a class")


def _of_student(job: Job, data: DeviceData) -> Iterator[Finding]:
    yield Finding("student", "ok", f"{job.student.model}: {_parameters(job.student, job):,} parameters; {_seen(job.student, data)}")
    if altered := _altered(job.student, job):
        yield Finding("student", "wrong", f"{job.student.model}: {altered}")


def _altered(network: NetworkRef, job: Job) -> str:
    """Why the network's answers are no logits; empty if they are."""
    return models.spec(network.model, network.seen(job.data.spec)).altered


def _parameters(network: NetworkRef, job: Job) -> int:
    return sum(parameter.numel() for parameter in network.build(job.data.spec).parameters())


def _seen(network: NetworkRef, data: DeviceData) -> str:
    """The images that a network sees."""
    original = input_spec_of(data)
    seen = network.input_spec.over(original)
    size, before = (f"{input_spec.channels}x{input_spec.height}x{input_spec.width}" for input_spec in (seen, original))
    made = f" made of {before}" if size != before else ""
    whose = "the data's" if (seen.mean, seen.std) == (original.mean, original.std) else "its own"
    return f"sees {size}{made}, {whose} mean {listed(seen.mean)} and std {listed(seen.std)}"


def _of_teacher(job: Job, teacher: NetworkRef, data: DeviceData) -> Iterator[Finding]:
    """Its size, and whether it knows these images: a wrong normalisation, another order of classes and no training all look like chance."""
    student_size, teacher_size, name = _parameters(job.student, job), _parameters(teacher, job), f"{teacher.model} ({teacher.origin})"
    share = f"the student has {student_size / teacher_size:.2f} of them" if student_size < teacher_size else "the student has no fewer"
    verdict: Verdict = "ok" if student_size < teacher_size else "look"
    yield Finding("teacher", verdict, f"{name}: {teacher_size:,} parameters, {share}; {_seen(teacher, data)}")
    if altered := _altered(teacher, job):
        yield Finding("teacher", "look", f"{teacher.model}: {altered}; methods on logits refuse it")
    if teacher.weights is None:
        return
    if other := teacher.other_classes(job.data):
        same = bool(teacher.labels) and sorted(teacher.labels) == sorted(job.data.class_names)
        why = "wrong class order: number the classes as its training did" if same else "other classes; its accuracy can't be measured here"
        yield Finding("answers", "wrong" if same else "look", f"{teacher.model}: {other}; {why}")
        return
    net = teacher.build(data.spec, given=data.normalisation).on(data.device).eval()
    if isinstance(net, Probed):
        linear_probe.fit(net, data, job.precision)
    yield _of_answers(net, teacher, job, data)


def _of_several(job: Job, teachers: Several, data: DeviceData) -> Iterator[Finding]:
    """How good the mean of their logits is, and how far they agree; where shares are to be chosen, of all alike."""
    if teachers.other_classes(job.data):
        return
    net = teachers.build(data.spec, given=data.normalisation).on(data.device).eval()
    assert isinstance(net, Joined)
    linear_probe.fit_all(net, data, job.precision)
    images, which = sample(job, data), "held-out" if job.config.split == "holdout" else "test"
    mean, agreed = ask(net, images, job.precision), agreement(net, images, job.precision)
    verdict: Verdict = "ok" if 100 * mean.accuracy >= max(agreed.accuracies) else "look"
    line = f"{teachers.model}: {100 * mean.accuracy:.2f} % of {len(images)} {which} images {agreed.beside(net.shares.tolist())}"
    yield Finding("teachers together", verdict, line)


def _of_answers(net: Network, teacher: NetworkRef, job: Job, data: DeviceData) -> Finding:
    images, which = sample(job, data), "held-out" if job.config.split == "holdout" else "test"
    answers = ask(net, images, job.precision)
    summary = f"{teacher.model}: {answers.accuracy:.1%} of {len(answers.labels)} {which} images (chance {answers.chance:.1%})"
    if not np.isfinite(answers.logits).all():
        return Finding("answers", "wrong", f"{teacher.model}: its logits are not finite; is its file whole?")
    recorded = teacher.trained_on is not None and "teacher" not in job.config.inputs  # then its image size is that of its training
    if not teacher.probed and (better := other_images(net, teacher, data, images, job.precision, answers, sizes=not recorded)):
        return Finding("answers", "wrong", f"{summary}; {better}")
    if order := another_order(answers, job.data.class_names):
        return Finding("answers", "wrong", f"{summary}; {order}")
    if answers.accuracy < answers.guessed:
        often = np.bincount(answers.classes).max() / len(answers.labels)
        why = f"chance level: not trained, or not on such images; {often:.0%} of its answers are one class"
        return Finding("answers", "wrong", f"{summary}; {why}")
    return Finding("answers", "look" if answers.accuracy < min(2 * answers.chance, answers.halfway) else "ok", summary)


def _of_method(group: Sequence[Job], data: DeviceData, find_rates: bool) -> Iterator[Finding]:
    """A method's taps, the first gradients of its terms, a rate if that is wanted, and what training would take."""
    job, name = group[0], group[0].resolved.name
    try:
        needs, pairing = job.method().needs, job.pairing
        if pairing and needs.student:
            yield Finding(f"{name}: taps", "ok", "; ".join(line.strip() for line in compared(pairing, needs.student, needs.teacher)))
        ready = [checked(draft) for draft in group]
    except UserError as error:
        yield Finding(f"{name}: taps", "wrong", str(error))
        return
    cohort, members = unmeasured(ready, data, data.device)
    try:
        ratios = first_gradients(cohort)
        if not (job.teacher and job.teacher.weights is None):
            late, early = pulls(cohort, BATCHES, cohort.epochs - 1), pulls(cohort, 1)
            for student in (member.student for member in members):
                for term, ratio in ratios[student].items():
                    on_all = ratio if student.has_classifier else min(ratio, 1.0)  # without a task it is the norm
                    yield Finding(f"{name}: {term}", *_of_gradient(job, term, on_all, late[student][term], early[student][term][0]))
            if find_rates:
                yield Finding(f"{name}: rate", *_of_rate(job, cohort))
        pixels = 0  # compiling takes too long here
        optimizer = job.config.train.optimizer
        cohort.engine = choose("auto", data.device, cohort.precision, pixels=pixels, resident=data.resident, optimizer=optimizer)
        seconds = round(seconds_per_epoch(cohort) * cohort.epochs)
    finally:
        for seed_group in cohort.seed_groups:
            seed_group.batches.close()
    memory = f"{peak_memory(data.device) / 2**20:,.0f} MiB at most so far"
    duration = f"{cohort.epochs} epochs: about {timedelta(seconds=seconds)} (h:mm:ss) on {describe(data.device)}, not compiled"
    yield Finding(f"{name}: cost", "ok", f"{duration}; {memory}")


def _of_gradient(job: Job, term: str, on_all: float, late: Sequence[Pull], early: Pull) -> tuple[Verdict, str]:
    """How large a term's gradient is beside the task's, and the weight by which it would equal it.

    Args:
        on_all: the ratio on the first batch on the whole network, by which training refuses a term.
        late: the term on several batches, in the last epoch's strength.
        early: on the first of them, in the first epoch's.
    """
    weight, of_task = job.resolved.weights[term], _weight_of_task(job, term)
    broken = sum(not (math.isfinite(pull.norm) and math.isfinite(pull.of_task)) for pull in late)
    if broken or not math.isfinite(on_all):
        return "wrong", f"its gradient is not finite on {max(broken, 1)} of the first {len(late)} batches (weight {weight:g})"
    pulling = [pull for pull in late if pull.norm > 0 and pull.of_task > 0]
    if not late[0].reaches:
        return "look", f"it reaches no weight of the student that the task trains (weight {weight:g}); there is nothing to compare"
    if not any(pull.norm for pull in late):
        what = "its gradient is 0" if any(pull.value for pull in late) else "it is 0"
        return "look", f"{what} on the first {len(late)} batches: it does nothing at first, whatever its weight ({weight:g})"
    if not of_task or not pulling:
        norm = weight * statistics.median(pull.norm for pull in late)
        why = "the task's is 0" if of_task else "the task is not trained beside it"
        verdict, refused = _judged(1, on_all)
        cure = f"; {advice.weight(term, weight / on_all)} would not" if refused else ""
        return verdict, f"its gradient has the norm {norm:.3g} (weight {weight:g}){refused}{cure}; {why}, so there is nothing to compare"
    ratio = statistics.median(pull.norm / (of_task * pull.of_task) for pull in pulling)
    equal = "" if f"{weight * ratio:.2g}" == "1" else f"; {advice.weight(term, 1 / ratio)} would equal it"
    rest = f"; it is 0 on {len(late) - len(pulling)} of the first {len(late)} batches" if len(pulling) < len(late) else ""
    if late[0].norm and not 1 / GROWS < (share := early.norm / late[0].norm) < GROWS:
        rest += f"; this is in the last epoch, and {share:.2g} times as much in the first"
    verdict, why = _judged(weight * ratio, on_all)
    beside = "" if of_task == 1 else f", the task's {of_task:g}"
    return verdict, f"its gradient is {weight * ratio:.3g} x the task's (weight {weight:g}{beside}){why}{equal}{rest}"


def _judged(ratio: float, on_all: float) -> tuple[Verdict, str]:
    """The verdict on a ratio, and why, as it stands after it."""
    if on_all > GRADIENT_LIMIT:
        return "wrong", f", {on_all:.3g} x the task's at weight 1 on the whole network: over {GRADIENT_LIMIT:g} x training diverges"
    if ratio > LOUD:
        return "look", f", over {LOUD:g} x: the task is hardly heard"
    if 0 < ratio < FAINT:
        return "look", f", under {FAINT:g} x: it does next to nothing"
    return "ok", "" if ratio else ": it does not count"


def _weight_of_task(job: Job, term: str) -> float:
    """The task's weight in the phases in which a term counts; 0 if the task is not trained there."""
    beside = any(phase.counts(term) and phase.counts(TASK) for phase in job.resolved.phases)
    return job.resolved.weights[TASK] if beside and job.config.train.mixup is not True else 0.0


def _of_rate(job: Job, cohort: Cohort) -> tuple[Verdict, str]:
    """What a range test finds, and the rate to train by."""
    numbers = [number for number, phase in enumerate(job.resolved.phases) if phase.lr is None]
    if not numbers:
        return "ok", "each of its phases has a rate of its own"
    started = time.perf_counter()
    curve = rates.range_test(cohort, numbers[0])
    seconds, means = time.perf_counter() - started, rates.smoothed(curve.losses)
    steps, train = cohort.seed_groups[0].batches.steps, job.config.train
    phase = f" of phase {job.resolved.phases[numbers[0]].name!r}" if len(job.resolved.phases) > 1 else ""
    round_again = f", the {steps:,} of an epoch again and again" if steps < len(means) else ""
    shown = range(0, len(means), rates.STEPS // SHOWN)
    points = ", ".join(f"{means[step]:.3g} at {curve.rates[step]:.1e}" for step in shown)
    test = f"range test of {train.optimizer}, {len(means)} batches{phase}{round_again}, no schedule, {seconds:.1f} s"
    line = f"{test}; smoothed loss by rate: {points}"
    if (least := rates.least(curve)) is None:
        end = "before training diverged at the rate" if rates.diverged(curve.losses) else "up to"
        return "look", f"the loss fell at no rate {end} {curve.rates[-1]:.2g}, so none can be proposed; {line}"
    rate = least / rates.BELOW
    return "ok", f"{advice.rate(rate)}, a tenth of the rate of the least loss, {least:.2g}; {line}"
