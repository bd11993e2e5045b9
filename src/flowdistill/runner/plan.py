"""From configs to jobs: everything resolved, checked and fingerprinted before any training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import methods, models, trust
from ..checks import UserError, joined
from ..config import DataConfig, Role, RunConfig, validate
from ..data.balance import refuse_empty
from ..data.dataset import ImageData
from ..data.sources import load, load_unlabelled
from ..data.splits import trained_positions
from ..device import Precision, resolve_precision
from ..ledger import Ledger, Run
from ..methods import Method, ResolvedMethod
from ..ranks import launched, refuse_uneven
from ..talk import Remarks
from ..training.optim import refuse_optimizer
from ..training.weights import hash_weights
from .fingerprint import fingerprint
from .identity import Identities
from .integrity import changed_files
from .job import Job, other_side, weights_seed
from .references import NetworkRef, TeacherQuery, as_configured, first_weights, refuse_contaminated
from .several import MEAN, teacher_of, teacher_of_run, unasked


def plan(configs: Iterable[RunConfig], ledger: Ledger, device: torch.device, *, stand_in: bool = False) -> list[Job]:
    """Resolve every config; nothing is trained or written. With ``stand_in`` a teacher that is named by model need not be trained yet.

    Raises:
        UserError: the first config that can't be run.
    """
    return [checked(job) for job in drafts(configs, ledger, device, stand_in=stand_in)]


def drafts(configs: Iterable[RunConfig], ledger: Ledger, device: torch.device, *, stand_in: bool = False) -> list[Job]:
    """The jobs, before it was checked that student and teacher go together.

    Raises:
        UserError: a network or the data can't be had.
    """
    # What costs least is checked first, and for all configs: a wrong option is refused before a weights file is read, and a missing file
    # before data are downloaded.
    resolved_configs = _with_peers([(config, _resolve_method(config)) for config in configs])
    students: dict[object, NetworkRef] = {}
    for config, resolved in resolved_configs:
        if (config.student, config.init_from) not in students:
            students[config.student, config.init_from] = first = first_weights(config, ledger)
            if resolved.mutual and first.weights is not None:
                raise UserError(f"student={config.student}: the students of {resolved.name!r} begin from fresh weights; name a model")
    load_once, identities = _Loader(ledger.changes), Identities(ledger)
    return [
        _planned(config, resolved, students[config.student, config.init_from], load_once(config.data), ledger, identities, device, stand_in)
        for config, resolved in resolved_configs
    ]


def _with_peers(resolved_configs: Sequence[tuple[RunConfig, ResolvedMethod]]) -> list[tuple[RunConfig, ResolvedMethod]]:
    """The configs, each of a mutual method followed by that of the other student, unless that is there too.

    Raises:
        UserError: a peer for a method that has none, or two students that would begin alike.
    """
    pairs: dict[str, tuple[RunConfig, ResolvedMethod]] = {}  # by the config's text: thousands are looked up
    for config, resolved in resolved_configs:
        if not resolved.mutual and (config.peer is not None or config.side != 1):
            cure = f"use {joined(methods.mutual_names(), 'or')}"
            raise UserError(f"peer={config.peer}: the students of {resolved.name!r} do not teach each other; {cure}, or leave peer out")
        sides = [config]
        if resolved.mutual and config.init_from is not None:
            raise UserError(
                f"init_from={config.init_from}: the students of {resolved.name!r} would both begin from it, alike; leave it out"
            )
        if resolved.mutual:
            first_side = config.model_copy(update={"peer": config.peer or config.student})
            sides = [first_side, other_side(first_side)]
        for side in sides:
            pairs.setdefault(json.dumps(side.model_dump(mode="json")), (side, resolved))
    return list(pairs.values())


def recorded(runs: Iterable[Run], ledger: Ledger, device: torch.device) -> list[Job]:
    """The jobs of these runs, to go on with: with the data, the teacher and the first weights that they began with.

    Raises:
        UserError: something that the numbers depend on has changed since.
    """
    load_once, identities = _Loader(ledger.changes), Identities(ledger)
    jobs = []
    for run in runs:
        config = validate(run.config)
        for reference in config.networks:
            trust.came_from(reference, f"run {run.no} of {ledger.path}")
        try:
            data = load_once(config.data)
        except UserError as error:
            if config.data.user_loaders:
                raise
            raise UserError(
                f"run {run.no} can't be resumed: {error}; data that were moved must be put back, and a relative path is seen from the "
                f"folder in which the run began"
            ) from None
        if data.hash != run.data_hash:
            raise UserError(
                f"run {run.no} can't be resumed: {config.data.name} is not the data that it began with (hash {data.hash[:8]}, was "
                f"{run.data_hash[:8]}); put the old data back, or train anew"
            )
        student = as_configured(first_weights(config, ledger), config, "student", data.spec).on(data)
        teacher = teacher_of_run(run, ledger, data.spec)
        init_hash = _initial(student, data, config)
        job = checked(_job(config, _resolve_method(config), student, teacher, data, init_hash, identities, device))
        if run.fingerprint != job.fingerprint:
            job = next((began for began in _as_it_may_have_begun(job, run) if began.fingerprint == run.fingerprint), job)
        if job.fingerprint != run.fingerprint:
            raise UserError(
                f"run {run.no} can't be resumed: {_what_changed(job, run)}; train it anew with the command that began it and --again"
            )
        jobs.append(job)
    return jobs


class _Loader:
    """Each data set is read once, and so hashed once."""

    def __init__(self, remarks: Remarks) -> None:
        self._remarks = remarks
        self._loaded: dict[DataConfig, ImageData] = {}

    def __call__(self, config: DataConfig) -> ImageData:
        if config not in self._loaded:
            data = load(config, self._remarks)
            if config.unlabelled is not None and data.unlabelled is None and not config.no_labels:
                data = replace(data, unlabelled=load_unlabelled(config, data, self._remarks))
            self._loaded[config] = data
        return self._loaded[config]


def _initial(student: NetworkRef, data: ImageData, config: RunConfig) -> str:
    return hash_weights(student.build(data.spec, seed=weights_seed(config)).state_dict())


def _resolve_method(config: RunConfig) -> ResolvedMethod:
    """The method with every default filled in.

    Raises:
        UserError: no such method, option or weight, a teacher is needed and none named, labels are and the images are mixed, or a task
            that has no weight is to be smoothed or weighed by class; or the ranks can't share the batch out; or there is no such optimizer.
    """
    refuse_uneven(config.train.batch_size, config.train.accumulate)
    refuse_optimizer(config.train)
    if config.data.no_labels:
        resolved = _resolve_without_labels(config)
    else:
        _refuse_labels(config)
        resolved = _filled(config, config.weights)
    if resolved.uses_teacher and config.teacher is None:
        raise UserError(f"method {resolved.name!r} needs a teacher: --teacher MODEL, RUN or FILE")
    if (smoothing := config.train.label_smoothing) and not resolved.weights["task"]:
        raise UserError(f"train.label_smoothing={smoothing:g} smooths the task, but weights.task=0; raise that, or leave smoothing out")
    if config.train.class_weights != "none" and not resolved.weights["task"]:
        raise UserError("train.class_weights weighs the classes in the task, but weights.task=0; raise that, or leave class_weights out")
    return resolved


def _resolve_without_labels(config: RunConfig) -> ResolvedMethod:
    """The method where no image has a label: with the weight 0 for the task, which needs them.

    Raises:
        UserError: a part of it needs labels or another classifier, it has a phase for the task alone, or the task is given a weight.
    """
    images = f"data.unlabelled={config.data.unlabelled} without a data set: no image has a label"
    cure = f"use methods on a teacher's features, such as {methods.OF_FEATURES}, or name a labelled data set (--dataset)"
    resolved = _filled(config, config.weights)
    if reason := methods.lacking_labels(resolved):
        raise UserError(f"{images}, but {reason}; {cure}")
    if task := config.weights.get("task"):
        raise UserError(f"{images}, but weights.task={task:g}; leave that out, or name a labelled data set (--dataset)")
    return _filled(config, {**config.weights, "task": 0.0})


def _filled(config: RunConfig, weights: Mapping[str, float]) -> ResolvedMethod:
    """The method with these weights and all defaults, for as many teachers as are named."""
    return methods.resolve(config.method, config.options, weights, max(1, len(config.teachers)))


def _refuse_labels(config: RunConfig) -> None:
    """Refuse a method that looks up labels where images have none (mixed without labels, unlabelled) or two (mixed with them)."""
    train, users = config.train, [cls for cls in methods.parts(config.method) if cls.uses_labels]
    if config.data.unlabelled is not None:
        refuse_users(users, f"data.unlabelled={config.data.unlabelled}: these images have no labels", "leave unlabelled out")
    if train.mixup is True:
        images, cure = "train.mixup=true: mixed images have no labels", "set train.mixup=false"
        refuse_users(users, images, cure)
        if task := _filled(config, config.weights).weights["task"]:
            raise UserError(f"{images}, but weights.task={task:g}; set weights.task=0, or {cure}")
        return
    for key, alpha, off in (("mixup", train.mixup, "false"), ("cutmix", train.cutmix, "0")):
        if alpha:
            images = f"train.{key}={alpha:g}: mixed images have two labels each"
            refuse_users([cls for cls in users if cls.terms], images, f"set train.{key}={off}")


def refuse_users(users: Sequence[type[Method]], images: str, cure: str) -> None:
    """Refuse the methods that look at labels, where there are none to look at.

    Raises:
        UserError: there is such a method; the first of them.
    """
    if users:
        other = f"choose one that does not, such as {methods.WITHOUT_LABELS}"
        raise UserError(f"{images}, but method {users[0].name!r} learns from labels; {other}, or {cure}")


def refuse_classes(config: RunConfig, data: ImageData) -> None:
    """Refuse weights and draws that the classes of the data can't have.

    Raises:
        UserError: not one weight for each class, or a class without an image where its size is to be made up for.
    """
    weights = config.train.class_weights
    if isinstance(weights, tuple) and len(weights) != data.classes:
        raise UserError(f"train.class_weights: {len(weights)} numbers for the {data.classes} classes of {data.name}; give one for each")
    for key in ("class_weights", "sampling"):
        if getattr(config.train, key) == "balanced":
            labels = data.y_train[trained_positions(data.y_train, config.split)]
            refuse_empty(f"train.{key}=balanced", labels, data.class_names, data.classes)


def _planned(
    config: RunConfig,
    resolved: ResolvedMethod,
    student: NetworkRef,
    data: ImageData,
    ledger: Ledger,
    identities: Identities,
    device: torch.device,
    stand_in: bool,
) -> Job:
    student = as_configured(student, config, "student", data.spec).on(data)
    init_hash = _initial(student, data, config)
    recipe = config.train.model_dump(mode="json") | {"precision": _precision(config, student, data, device)}
    query = TeacherQuery(config.data.without_unlabelled, data.hash, config.split, config.seed, init_hash, recipe, str(ledger.folder))
    refuse_contaminated(student, query)
    if not data.classes and not student.spec(data.spec).embedding:
        raise UserError(
            f"student {student.model}: no image has a label, and asked for 0 classes it gives nothing; let it give features then, as the "
            f"networks of timm and of this package do"
        )
    teacher = None
    if resolved.uses_teacher and config.teacher is not None:
        teacher = teacher_of(config, query, ledger, data.spec, stand_in=stand_in)
    return _job(config, resolved, student, teacher, data, init_hash, identities, device)


def _precision(config: RunConfig, student: NetworkRef, data: ImageData, device: torch.device) -> Precision:
    """The precision that is asked for, but fp32 on a CPU if a stride is larger than its map: in bf16 the gradient of some weights would be
    memory that nobody wrote.

    Raises:
        UserError: bf16 is asked for all the same.
    """
    asked = config.train.precision
    precision = resolve_precision(asked, device)
    if device.type != "cpu" or precision == "fp32":
        return precision
    peers = [models.spec(config.peer, student.seen(data.spec))] if config.peer else []
    over = next((f"{net.name}'s {net.overstepped}" for net in (student.spec(data.spec), *peers) if net.overstepped), "")
    if over and asked == "bf16":
        raise UserError(
            f"train.precision=bf16: the stride of {over} is larger than the map that it is given, where a CPU's bf16 gradients are not "
            f"sound; use fp32, or larger images"
        )
    return "fp32" if over else precision


def _job(
    config: RunConfig,
    resolved: ResolvedMethod,
    student: NetworkRef,
    teacher: NetworkRef | None,
    data: ImageData,
    init_hash: str,
    identities: Identities,
    device: torch.device,
) -> Job:
    refuse_classes(config, data)
    full_config = config.model_copy(
        update={
            "method": resolved.name,
            "teacher": config.teacher if teacher else None,
            "probe": config.probe and teacher is not None,
            "teacher_shares": config.teacher_shares if teacher is not None else MEAN,
            **({} if teacher else {key: _of_student(getattr(config, key)) for key in ("taps", "inputs")}),
            "data": config.data.model_copy(update=_decided_by(data)),
            "train": config.train.model_copy(update={"precision": _precision(config, student, data, device)}),
            "options": {name: options.model_dump() for name, options in resolved.options.items()},
            "weights": resolved.weights,
        }
    )
    return Job(full_config, data, resolved, student, teacher, init_hash, identities)


def checked(job: Job) -> Job:
    """The job once its networks were looked at, without the taps and the probe that nothing looks at.

    Raises:
        UserError: its method can't work with this pair.
    """
    needs, _ = job.needs_and_versions
    if (parts := job.config.train.accumulate) > 1 and (whole := _of_whole_batches(job)):
        raise UserError(f"train.accumulate={parts}: method {whole!r} compares the images of a batch with each other; leave one of them out")
    if job.config.train.sampling == "balanced" and "labels" in needs.context:
        why = f"method {job.resolved.name!r} remembers each image by itself, and a batch may have one twice"
        raise UserError(f"train.sampling=balanced: {why}; leave one of them out")
    if job.config.taps and not (needs.student or needs.teacher):
        job = replace(job, config=job.config.model_copy(update={"taps": {}}))
    asked = job.config.probe or job.config.teacher_shares != MEAN
    if job.teacher and asked and not needs.logits and "head" not in needs.context:
        job = replace(job, config=job.config.model_copy(update={"probe": False, "teacher_shares": MEAN}), teacher=unasked(job.teacher))
    if (world := launched().world) > 1 and job.normalises_apart:
        job = replace(job, ranks=world)
    _ = job.fingerprint  # computed here, so that what can't be fingerprinted is refused before anything is trained
    return job


def _of_whole_batches(job: Job) -> str:
    """The part of its method that needs all images of a batch at once; empty if there is none."""
    method = job.method()
    found = (part for part in method.modules() if isinstance(part, Method) and part.whole_batch and part.name in job.resolved.options)
    return next((part.name for part in found), job.resolved.name if method.whole_batch else "")


def _as_it_may_have_begun(job: Job, run: Run) -> Iterator[Job]:
    """The job of another number of processes, if it depends on that, and as version 0.1.0 called it."""
    size = job.config.train.batch_size
    for ranks in [number for number in range(1, size + 1) if size % number == 0] if job.normalises_apart else [job.ranks]:
        began = replace(job, ranks=ranks)
        yield began
        # A run without a record of its networks is of version 0.1.0, whose fingerprints covered less of a network's code.
        if run.networks is None and run.fingerprint == _as_recorded(began):
            yield replace(began, former_fingerprint=run.fingerprint)


def _as_recorded(job: Job) -> str:
    """The fingerprint that version 0.1.0 gave this job: of code it knew the file that was named alone."""
    named = {"student": job.student.model, "teacher": job.teacher and job.teacher.model, "peer": job.config.peer}
    files = {role: models.factory(model).file_code for role, model in named.items() if model}
    return fingerprint(job, {role: [code] if code else [] for role, code in files.items()})


def _what_changed(job: Job, run: Run) -> str:
    """Why a run can't go on as it began."""
    for role, then in (run.networks or {}).items():
        if role in job.networks and (changed := ", ".join(changed_files(then["code"], job.networks[role].code))):
            return f"{changed} since it began"
        if role in job.networks and job.networks[role].remark:
            return job.networks[role].remark
    those = "its teacher, its first weights, its unlabelled images, the names of its classes"
    return f"{those}, or the version of its method or of its networks' taps is not what it began with"


def _of_student(table: Mapping[Role, Any]) -> dict[Role, Any]:
    """What a run without a teacher uses of a table by role."""
    return {role: value for role, value in table.items() if role == "student"}


def _decided_by(data: ImageData) -> dict[str, Any]:
    """The keys of a config that the data decide. What is streamed now is streamed when it is resumed, even if memory could hold it then."""
    crop = data.crop if data.streamed or data.crop != "shift" else None
    return {"pad": data.pad, "flip": data.flip, "crop": crop} | ({"stream": True} if data.streamed else {})


def cohorts(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can be trained together: equal data, split, recipe, precision, phase boundaries, and teacher model and taps or none.

    A job without a teacher joins the first cohort that it fits, so that baselines share the batches of the students beside them.
    """
    shared = [(job.data_hash, job.config.data, job.config.split, job.config.train, job.phase_epochs) for job in jobs]
    teacher_of = {key: job.pairing.teacher for key, job in zip(shared, jobs, strict=True) if job.pairing}
    groups: dict[object, list[Job]] = {}
    for key, job in zip(shared, jobs, strict=True):
        groups.setdefault((key, job.pairing.teacher if job.pairing else teacher_of.get(key)), []).append(job)
    return list(groups.values())
