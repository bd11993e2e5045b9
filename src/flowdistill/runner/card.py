"""What a finished run's student costs and answers, measured beside its teacher and a student that was trained alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..advice import train as train_command
from ..checks import UserError
from ..config import BASELINE, RunConfig, validate
from ..data.dataset import ImageData
from ..data.sources import load
from ..device import computing, describe, resolve_precision, synchronize
from ..env import processor
from ..ledger import PROBE_FILE, STUDENT_FILE, Ledger, Run, baseline_key, flattened, is_baseline, kept_answers
from ..metrics import Answers, Figures, Kept
from ..models import Network
from ..stats import Agreement, agreement, calibration_error, negative_log_likelihood
from ..training.evaluate import among_top, predict
from ..training.linear_probe import put_back
from ..training.weight_files import located
from ..training.weights import load_weights
from .measured_on import measured_on
from .references import NetworkRef, resolve
from .several import teacher_of_run

TEACHER, STUDENT, ALONE = "teacher", "student", "student alone"
WARM_UP = 10  # forward passes that are not timed
PASSES, MIN_PASSES = 100, 10  # forward passes that are timed, at most and at least
SECONDS = 20.0  # after which no more are timed, for one batch size and all networks


class Latency(NamedTuple):
    """Milliseconds of a forward pass on a batch of ``batch_size`` images, over ``passes`` timed passes."""

    batch_size: int
    median: float
    p90: float
    passes: int


class Score(NamedTuple):
    """What a network's answers to the test images are worth.

    Attributes:
        figures: over all images.
        class_correct: for each class the number of its images that it gets right.
        calibration_error: a share from 0 to 1.
        negative_log_likelihood: in nats.
        agreement: with the teacher. None for the teacher itself, and if there is no teacher or it knows other classes.
    """

    figures: Figures
    class_correct: tuple[int, ...]
    calibration_error: float
    negative_log_likelihood: float
    agreement: Agreement | None

    @property
    def correct(self) -> int:
        """Number of images it gets right."""
        return self.figures.correct


@dataclass(frozen=True)
class Column:
    """One network on the card.

    Attributes:
        role: teacher, student or student alone.
        model: its registered name.
        origin: the run that it came from, with its seed, or its file.
        parameters: number of all parameters, trained or frozen.
        macs: multiply-accumulates per image.
        file_bytes: size of its weights file.
        latencies: one for each batch size.
        score: what its answers are worth; None for a teacher of other classes than the data's.
        other_classes: how its classes differ from the data's; empty if they do not.
    """

    role: str
    model: str
    origin: str
    parameters: int
    macs: int
    file_bytes: int
    latencies: tuple[Latency, ...]
    score: Score | None
    other_classes: str = ""


@dataclass(frozen=True)
class Card:
    """The compression card of a run.

    Attributes:
        run: whose student it is about.
        columns: teacher, student and student alone, if they exist.
        class_images: number of test images of each class.
        class_names: names of the classes; numbers if the data have none.
        device, processor, torch: where the latencies were measured.
        advice: how to get the column that is missing; empty if none is.
        runs: the folder of the ledger.
        answers: the student's to the test images.
        kept: its answers as the run kept them; None if they can't be read.
        unread: why they can't be read; empty if they can.
    """

    run: Run
    columns: tuple[Column, ...]
    class_images: tuple[int, ...]
    class_names: tuple[str, ...]
    device: str
    processor: str
    torch: str
    advice: str
    runs: Path
    answers: Answers
    kept: Kept | None
    unread: str

    @property
    def images(self) -> int:
        """Number of test images."""
        return sum(self.class_images)

    @property
    def student(self) -> Column:
        """The run's student."""
        return next(column for column in self.columns if column.role == STUDENT)

    @property
    def score(self) -> Score:
        """What the student's answers are worth."""
        assert self.student.score is not None, "a student has the classes of its data"
        return self.student.score

    def column(self, role: str) -> Column | None:
        """The network of that role, if it is on the card."""
        return next((column for column in self.columns if column.role == role), None)


class _Answered(NamedTuple):
    """A network's answers to the test images, and their log-probabilities [N, K]."""

    answers: Answers
    log_probabilities: np.ndarray


def measure(no: int, ledger: Ledger, device: torch.device, *, batch_size: int = 64) -> Card:
    """Measure a run's student, its teacher and the newest ``base`` run of the same student, data, split and recipe.

    All answer the same test images, normalised as in the run, in the run's precision. Latency is measured in eager float32 at batch sizes
    1 and ``batch_size``. The networks take turns.

    Raises:
        UserError: there is no such run, it is unfinished, or its student, data or teacher is gone or changed.
    """
    run = ledger.run(no)
    if run.backbone:
        kept_answers(run, ledger)  # refuses it
    config = validate(run.config)
    alone = baseline(run, ledger)
    student, data = resolve(str(no), ledger), _data(run, config, ledger)
    by_role = {TEACHER: _teacher(run, ledger, data), STUDENT: student, ALONE: resolve(str(alone.no), ledger) if alone else None}
    networks = {role: network for role, network in by_role.items() if network}
    shown = measured_on(data, run.split, device)
    nets: dict[str, Network] = {}
    for role, network in networks.items():
        nets[role] = network.build(data.spec, given=shown.normalisation).on(device).eval()
        if any(one.probed for one in network.each):
            put_back(nets[role], load_weights(ledger.run_folder(no) / PROBE_FILE, ledger.changes)[0])
    images = shown.some(batch_size)
    precision = resolve_precision(run.precision, device)
    other_classes = {role: network.other_classes(data) for role, network in networks.items()}
    with computing(device):
        judged = {role: net for role, net in nets.items() if not other_classes[role]}
        logits, by_batch = zip(*predict(list(judged.values()), shown.test, precision), strict=True)
        labels = torch.cat(by_batch).cpu().numpy()
        answered = {role: _answered(torch.cat(batches), labels) for role, batches in zip(judged, zip(*logits, strict=True), strict=True)}
        latencies: dict[str, list[Latency]] = {role: [] for role in nets}
        for size in dict.fromkeys((1, batch_size)):
            for role, latency in time_in_turns(nets, images[:size]).items():
                latencies[role].append(latency)
        device_name = describe(device)
    columns = []
    for role, network in networks.items():
        columns.append(
            Column(
                role=role,
                model=network.model,
                origin=f"run {network.run}, seed {ledger.run(network.run).seed}" if network.run else network.described,
                parameters=sum(parameter.numel() for parameter in nets[role].parameters()),
                macs=count_macs(nets[role], images[:1]),
                file_bytes=sum(_file(one, ledger).stat().st_size for one in network.each),
                latencies=tuple(latencies[role]),
                score=_score(answered[role], answered.get(TEACHER) if role != TEACHER else None) if role in answered else None,
                other_classes=other_classes[role],
            )
        )
    advice = "" if alone or run.method == BASELINE else _advice(config, ledger)
    class_images = tuple(np.bincount(labels, minlength=data.classes).tolist())
    class_names = data.class_names or tuple(map(str, range(data.classes)))
    kept, unread = None, ""
    try:
        kept = kept_answers(run, ledger)
    except UserError as error:
        unread = str(error)
    return Card(
        run,
        tuple(columns),
        class_images,
        class_names,
        device_name,
        processor(),
        torch.__version__,
        advice,
        ledger.folder,
        answered[STUDENT].answers,
        kept,
        unread,
    )


def baseline(run: Run, ledger: Ledger) -> Run | None:
    """The newest finished ``base`` run of the same student, data, split and recipe whose file is there; None for a ``base`` run itself."""
    if run.method == BASELINE:
        return None
    baselines = [
        other
        for other in ledger.runs(status="finished", method=BASELINE)
        if is_baseline(other) and baseline_key(other) == baseline_key(run)
    ]
    return next((other for other in reversed(baselines) if (ledger.run_folder(other.no) / STUDENT_FILE).is_file()), None)


def count_macs(net: Network, image: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products for images [N, C, H, W]: half of what torch.utils.flop_counter counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image)
    return int(counter.get_total_flops()) // 2


@torch.inference_mode()
def time_in_turns(nets: Mapping[str, Network], images: Tensor) -> dict[str, Latency]:
    """Latency of networks on images [N, C, H, W]. They take turns, so that what else the machine does slows all alike."""
    times: dict[str, list[float]] = {role: [] for role in nets}
    for turn in range(WARM_UP + PASSES):
        if turn == WARM_UP:
            begun = time.perf_counter()
        for role, net in nets.items():
            started = time.perf_counter()
            net(images)
            synchronize(images.device)
            if turn >= WARM_UP:
                times[role].append(1000 * (time.perf_counter() - started))
        if turn >= WARM_UP + MIN_PASSES - 1 and time.perf_counter() - begun > SECONDS:
            break
    return {role: Latency(len(images), float(np.median(ms)), float(np.quantile(ms, 0.9)), len(ms)) for role, ms in times.items()}


def _answered(logits: Tensor, labels: np.ndarray) -> _Answered:
    top, true = logits.softmax(1).max(1), torch.from_numpy(labels).to(logits.device)
    tensors = (top.indices, top.values.double(), among_top(logits, true) | (top.indices == true), logits.double().log_softmax(1))
    classes, confidences, in_top5, log_probabilities = (tensor.cpu().numpy() for tensor in tensors)
    return _Answered(Answers(labels, classes, confidences, in_top5, logits.shape[1]), log_probabilities)


def _score(answered: _Answered, teacher: _Answered | None) -> Score:
    answers = answered.answers
    return Score(
        figures=answers.figures,
        class_correct=tuple(answers.by_class.right.tolist()),
        calibration_error=calibration_error(answers.probabilities, answers.classes == answers.labels),
        negative_log_likelihood=negative_log_likelihood(answered.log_probabilities, answers.labels),
        agreement=agreement(answers.classes, teacher.answers.classes, answers.labels) if teacher else None,
    )


def _data(run: Run, config: RunConfig, ledger: Ledger) -> ImageData:
    data = load(config.data, ledger.changes)
    if (data_hash := data.hash) != run.data_hash:
        raise UserError(
            f"run {run.no}: {config.data.name} is not the data that it was trained on (hash {data_hash[:8]}, was {run.data_hash[:8]}); "
            f"put the old data back"
        )
    return data


def _teacher(run: Run, ledger: Ledger, data: ImageData) -> NetworkRef | None:
    teacher = teacher_of_run(run, ledger, data.spec)
    if teacher and teacher.fingerprint != run.teacher_fingerprint:
        ledger.changes.meet(f"run {run.no}: its teacher {run.config['teacher']} is not the one that it learned from")
    return teacher


def _file(network: NetworkRef, ledger: Ledger) -> Path:
    if network.published:
        return network.published.file
    return ledger.run_folder(network.run) / STUDENT_FILE if network.run else located(Path(network.origin))[0].expanduser()


def _advice(config: RunConfig, ledger: Ledger) -> str:
    """How the student is trained alone by the recipe of a run."""
    if config.train.mixup is True:
        return "No student alone: train.mixup=true leaves no labels to train it on."
    if config.data.user_loaders:
        return "The student was not trained alone by this recipe yet: in Python, flowdistill.train with the same loaders does it."
    images = {"name": config.data.name} | config.data.without_unlabelled.model_dump(mode="json", exclude_defaults=True)
    more = {"train": config.train.model_dump(mode="json", exclude={"freeze"}, exclude_defaults=True)}
    if "student" in config.inputs:
        more["inputs"] = {"student": config.inputs["student"].model_dump(mode="json", exclude_none=True)}
    alone = train_command(config.student, config.seed, images, flattened(more), holdout=config.split == "holdout", runs=ledger.folder)
    return f"The student was not trained alone by this recipe yet: {alone}"
