"""Which network is meant: a model name, a run's number, a weights file, or MODEL@FILE; and which teacher a student gets."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import advice, models, trust
from ..checks import Changes, UserError, is_there
from ..config import BASELINE, DataConfig, InputConfig, Role, RunConfig, model_name, validate
from ..data.dataset import ImageData
from ..data.normalisation import Normalisation
from ..ledger import STUDENT_FILE, Ledger, Run, newest, ranks_apart
from ..models import Network
from ..models.code import digest
from ..models.foreign import FOREIGN_NAMES, is_foreign, without_options
from ..models.input_adapter import InputSpec, input_adapter
from ..models.probed import Probed, with_probe, without_probe
from ..models.published import Published, are_synsets, is_published, published
from ..training.fitting import named_as_in, registered
from ..training.student_file import Statement, TrainedOn
from ..training.weight_files import located
from ..training.weights import fill, hash_weights, load_weights
from ..types import DataSpec, NetSpec
from .integrity import meet_changes, meet_damage

NO_CLASSIFIER = "no classifier"
AS_MADE = "with the weights that its code makes, random ones if it makes none"


@dataclass(frozen=True)
class NetworkRef:
    """A network that was named.

    Attributes:
        model: its registered name.
        weights: None for fresh ones.
        run: the run it came from, if any.
        fingerprint: what its numbers depend on. Of a file the hash of its weights; of a run that was named that run's, with its seed; of
            a teacher that was chosen by model name that of all it was chosen from; empty for fresh weights.
        init_hash: of the weights it began with, where known.
        trained_on: what it was trained on, where known.
        labels: the names of its classes, where known.
        origin: as messages name it.
        init: of a student that begins from the weights of another network, that network's fingerprint.
        head: whether the weights of its classifier are taken, or fresh ones stand.
        input_spec: the images that it was made for, as far as they are not the data's.
        taps: a table of taps that the user gave, name -> where it is found.
        published: where its weights are published ones, all that is known of these.
        probed: whether a linear probe of its embedding gives its logits, instead of its own classifier.
        backbone: whether its weights are those of a network without a classifier, as its file says.
    """

    model: str
    weights: dict[str, Tensor] | None = None
    run: int | None = None
    fingerprint: str = ""
    init_hash: str = ""
    trained_on: TrainedOn | None = None
    labels: tuple[str, ...] = ()
    origin: str = ""
    init: str = ""
    head: bool = True
    input_spec: InputSpec = InputSpec()  # noqa: RUF009 (frozen)
    taps: Mapping[str, str] = field(default_factory=dict)
    published: Published | None = None
    probed: bool = False
    backbone: bool = False

    @property
    def each(self) -> tuple[NetworkRef, ...]:
        """The networks of which it is made: itself, or of several teachers these."""
        return (self,)

    @property
    def described(self) -> str:
        """Where it comes from, as messages say it."""
        source = f"{self.origin}: {self.published.about}" if self.published else self.origin
        return f"{source}, with a linear probe of its features" if self.probed else source

    def seen(self, data: DataSpec) -> DataSpec:
        """The data as the network was made for: in its size, and with as many classes as its classifier has rows, 0 if it has none."""
        data = self._sized(data)
        if self.head and (self.backbone or (self.published and not self.published.classes)):
            return replace(data, classes=0)
        spec = models.spec(self.model, replace(data, classes=data.classes or 2))  # where its classifier is, if it has one
        head = [value for name, value in (self.weights or {}).items() if name.startswith(f"{spec.head}.")]
        matrices = [value for value in head if value.dim() > 1 and value.numel() == len(value) * spec.embedding]  # whatever their names
        rows = next((len(value) for value in matrices), 0)
        return replace(data, classes=rows) if self.head and rows else data

    def fitted(self, data: DataSpec) -> NetworkRef:
        """With the weights of a file by the names that the network gives them on such data, which its fingerprint is made of then."""
        if self.weights is None or self.run is not None:
            return self
        with torch.device("meta"):
            weights = named_as_in(models.build(self.model, self._sized(data)), self.weights)
        if weights is self.weights:
            return self
        renamed, made_of = replace(self, weights=dict(weights)), f"file:{hash_weights(weights)}"
        return replace(renamed, init=made_of) if self.init else replace(renamed, fingerprint=made_of)

    def as_made(self, data: DataSpec) -> NetworkRef:
        """With the weights that its own code gives it, which its fingerprint is made of then: the code may read them from anywhere."""
        weights = self.build(data).state_dict()
        return replace(self, weights=weights, fingerprint=f"file:{hash_weights(weights)}")

    def _sized(self, data: DataSpec) -> DataSpec:
        """The data in the sizes that the network was made for."""
        made_for = self.input_spec
        return replace(
            data, channels=made_for.channels or data.channels, height=made_for.height or data.height, width=made_for.width or data.width
        )

    def spec(self, data: DataSpec) -> NetSpec:
        """What the network offers for such data."""
        spec = models.spec(self.model, self.seen(data), self.taps)
        return with_probe(spec, data.classes) if self.probed else spec

    def other_classes(self, data: ImageData) -> str:
        """How its classes differ from those of the data, by number or by name; empty where they do not, or nobody knows."""
        if self.probed:
            return ""
        classes = replace(self, head=True).seen(data.spec).classes
        if not classes or (not self.init and not models.spec(self.model, self.seen(data.spec)).classes):
            return NO_CLASSIFIER
        if not data.classes:
            return "the images have no labels"
        if classes != data.classes:
            return f"{classes} classes, the data has {data.classes}"
        ours = self.labels
        if are_synsets(data.class_names):  # as folders of ImageNet are named; the same ids in another order show, too
            ours = self.published.synsets if self.published else ours
        both = zip(ours, data.class_names, strict=False)
        return next((f"class {ours!r} where the data has {theirs!r}" for ours, theirs in both if ours != theirs), "")

    def on(self, data: ImageData) -> NetworkRef:
        """The student of a run on these data: one that begins from another network gets a fresh classifier where the classes differ.

        Raises:
            UserError: a student that is to go on with its own classifier has another number of classes, or other names for them.
        """
        if not data.classes:
            if self.seen(data.spec).classes:
                raise UserError(
                    f"{'init_from' if self.init else 'student'} {self.origin}: it has a classifier, which no image here has a label for; "
                    f"name a run that was trained without labels, or begin from fresh weights"
                )
            return self
        if self.init:
            return replace(self, head=not self.other_classes(data))
        if (other := self.other_classes(data)) == NO_CLASSIFIER:
            raise UserError(f"student {self.model}: it gives features and has no classifier; give one that gives {data.classes} logits")
        if other:
            again = ("--student", self.model, "--init-from", self.run or self.origin)
            cure = f"begin from its weights with a fresh classifier: {advice.options(*again)}"
            if models.from_python(self.model):
                cure = "give a module with a classifier of the data's"
            raise UserError(f"student {self.model} ({self.origin}): {other}; {cure}")
        return self

    def build(
        self, data: DataSpec, *, taps: tuple[str, ...] = (), seed: int = 0, spec: NetSpec | None = None, given: Normalisation | None = None
    ) -> Network:
        """The network with its weights, or with fresh ones from the seed.

        Args:
            taps: of the ``spec``, which pairing may have given other names; left out, its own.
            given: how the images are normalised that it will see; needed where it sees any.

        Raises:
            UserError: the weights do not fit the model on this data.
        """
        if self.probed and spec is not None:
            spec = without_probe(spec, models.spec(self.model, self.seen(data), self.taps))
        net = models.build(self.model, self.seen(data), taps=taps, seed=seed, spec=spec)
        if given is not None:
            net.input_adapter = input_adapter(InputSpec(data.channels, data.height, data.width, given.mean, given.std), self.input_spec)
        if self.weights is not None:
            fresh = {} if self.head else {name: value for name, value in net.state_dict().items() if name.startswith(f"{net.spec.head}.")}
            fill(net, {**self.weights, **fresh}, self.origin)
        return Probed(net, data.classes) if self.probed else net


def run_number(reference: str) -> int | None:
    """A run's number, if that is what a reference is."""
    return int(reference) if re.fullmatch(r"\d{1,30}", reference, re.ASCII) else None


def resolve(reference: str, ledger: Ledger, model: str | None = None) -> NetworkRef:
    """What a reference means; a weights file that does not say its model is of ``model``.

    Raises:
        UserError: no such model, run or file, an unfinished run, or a file that does not say its model.
    """
    if (number := run_number(reference)) is not None:
        run = ledger.run(number)
        return _of_run(run, ledger, f"{run.fingerprint}/{run.seed}")
    return named(reference, ledger.changes, model)


def named(reference: str, changes: Changes | None = None, model: str | None = None) -> NetworkRef:
    """What a reference means that is no run's number; a weights file that does not say its model is of ``model``.

    Raises:
        UserError: no such model, file or published weights, a file that does not say its model, or one that is not what was written, or
            whose network is another now.
    """
    if is_published(reference):
        return _of_library(reference)
    of, path = _of_weights(reference)
    if path is None:
        return NetworkRef(models.canonical(reference))
    return _from_file(path, of and models.canonical(of), changes or Changes(), model)


@functools.lru_cache(maxsize=8)
def _hash_of(weights: Published) -> str:
    """As every config of a plan asks for it."""
    return hash_weights(weights.weights)


def _of_library(reference: str) -> NetworkRef:
    weights = published(reference)
    return NetworkRef(
        model=weights.model,
        weights=dict(weights.weights),
        fingerprint=f"file:{_hash_of(weights)}",
        labels=weights.labels,
        origin=reference,
        input_spec=weights.input_spec,
        published=weights,
    )


def _of_weights(reference: str) -> tuple[str | None, Path | None]:
    """The model, if one is named, and the file of a reference to weights; no file where it is a model's name.

    A file that exists is that file, whatever its name (it may be written with ``#KEY``). The name of a network of this package is that
    network all the same.
    """
    if model_name(reference) in models.MODELS:
        return None, None
    path = Path(reference)
    if is_there(located(path)[0]):
        return None, path
    model, at, file = reference.partition("@")
    if at and (model in models.MODELS or is_foreign(model) or "/" not in model):
        return model, Path(file)
    return None, path if at or (not is_foreign(reference) and ("/" in reference or "." in reference)) else None


def _from_file(path: Path, model: str | None, changes: Changes, otherwise: str | None = None) -> NetworkRef:
    weights, metadata = load_weights(path, changes)
    stated = Statement(metadata)
    named = model or stated.model or otherwise
    if not model:
        trust.came_from(stated.model, f"weights file {path}")
    if not isinstance(named, str) or not named:
        cure = f"write MODEL@{path} with one of: {', '.join((*models.MODELS, *FOREIGN_NAMES))}"
        if alike := registered(weights):
            cure = f"its weights are those of a {alike}: write {shlex.quote(f'{alike}@{path}')}"
        raise UserError(f"weights file {path} does not say its model; {cure}")
    if stated.model == named and (sizes := stated.sizes) is not None:
        meet_changes(str(path), named, sizes, weights, metadata, changes)
    return NetworkRef(
        model=models.canonical(named),
        weights=weights,
        fingerprint=f"file:{hash_weights(weights)}",
        init_hash=stated.init_hash,
        trained_on=stated.trained_on,
        labels=stated.labels,
        backbone=stated.backbone,
        origin=str(path),
        input_spec=stated.input_spec or models.declared_input_spec(models.canonical(named)),
    )


def _of_run(run: Run, ledger: Ledger, fingerprint: str) -> NetworkRef:
    if run.status != "finished":
        raise UserError(f"run {run.no} is {run.status}, not finished; choose a finished one ({advice.list_runs(ledger.folder)})")
    damage = meet_damage(run, ledger)
    weights, metadata = load_weights(ledger.run_folder(run.no) / STUDENT_FILE, ledger.changes)
    stated = Statement(metadata)
    model, sizes = stated.model, stated.sizes
    if not isinstance(model, str):
        raise UserError(f"run {run.no}: its {STUDENT_FILE} does not say its model; put the file there that the run wrote")
    trust.came_from(model, f"run {run.no} of {ledger.path}")
    other = meet_changes(f"run {run.no}", models.canonical(model), sizes, weights, metadata, ledger.changes) if sizes is not None else ""
    if damage or other:  # it was accepted, and is not the network whose fingerprint that is
        fingerprint = f"file:{hash_weights(weights)}/{other}"
    trained_on = TrainedOn(run.config["data"]["name"], run.split, run.data_hash)
    return NetworkRef(
        model=model,
        weights=weights,
        run=run.no,
        fingerprint=fingerprint,
        init_hash=run.init_hash,
        trained_on=trained_on,
        labels=stated.labels,
        origin=f"run {run.no}",
        input_spec=stated.input_spec or InputSpec(),
        backbone=stated.backbone,
    )


def first_weights(config: RunConfig, ledger: Ledger) -> NetworkRef:
    """The student as its run begins: what ``student`` names, with ``init_from`` by the weights of another network of that model.

    Raises:
        UserError: as ``resolve``; ``init_from`` has no weights or another model, or the student has weights of its own.
    """
    student = replace(resolve(config.student, ledger), input_spec=InputSpec())
    if config.init_from is None:
        return _beginning(NetworkRef(student.model), student) if student.published else student
    source, setting = resolve(config.init_from, ledger, student.model), f"init_from={config.init_from}"
    if source.weights is None:
        raise UserError(f"{setting}: a model's name has no weights; name a run or a weights file")
    if student.weights is not None:
        alone = advice.options("--student", student.model)
        raise UserError(f"{setting}: student={config.student} has weights of its own; name its model alone: {alone}")
    if without_options(source.model) != without_options(student.model):
        raise UserError(
            f"{setting} is a {source.model}, the student a {student.model}; begin from a {student.model}, or train a {source.model}"
        )
    return _beginning(student, source)


def _beginning(student: NetworkRef, source: NetworkRef) -> NetworkRef:
    """A student that begins from the weights of another network. If these were published, it sees images as they know them."""
    sees = source.published.student_input_spec if source.published else InputSpec()
    return replace(
        student,
        weights=source.weights,
        trained_on=source.trained_on,
        labels=source.labels,
        origin=source.origin,
        init=source.fingerprint if sees == InputSpec() else f"{source.fingerprint}/{digest(list(astuple(sees)))}",
        init_hash="",
        input_spec=sees,
        published=source.published,
        backbone=source.backbone,
    )


def as_configured(network: NetworkRef, config: RunConfig, role: Role, data: DataSpec) -> NetworkRef:
    """The network with the taps and the images that a config gives it in this role, its weights by the names that it has on these data."""
    input_config = config.inputs.get(role, InputConfig())
    declared = InputSpec() if config.data.user_loaders else network.input_spec  # a loader's images are taken as they come
    input_spec = InputSpec(input_config.channels, input_config.size, input_config.size, input_config.mean, input_config.std).over(declared)
    probed = config.probe and role == "teacher"
    configured = replace(network, taps=config.taps.get(role, {}), input_spec=input_spec, probed=probed)
    return configured.as_made(data) if network.origin == AS_MADE else configured.fitted(data)


@dataclass(frozen=True)
class TeacherQuery:
    """What the choice of a teacher looks at; test accuracy is not among it."""

    data: DataConfig
    data_hash: str
    split: str
    seed: int
    student_init: str
    recipe: Mapping[str, Any]
    runs: str


def refuse_contaminated(network: NetworkRef, query: TeacherQuery) -> None:
    """A holdout run must not know the held-out images through its teacher or its first weights.

    Raises:
        UserError: the network was trained on all of train, or on another choice of the same data set's images.
    """
    if query.split != "holdout" or network.trained_on is None:
        return
    same = network.trained_on.data_hash == query.data_hash
    if same and network.trained_on.split == "full":
        cause = "all of train, the held-out images among them"
    elif not same and network.trained_on.dataset == query.data.name:
        cause = f"other images of {query.data.name}, the held-out ones may be among them"
    else:
        return
    raise UserError(f"{network.origin} was trained on {cause}; a holdout run takes networks of holdout runs (train one with --holdout)")


def choose_teacher(reference: str, query: TeacherQuery, ledger: Ledger, *, stand_in: bool = False) -> NetworkRef:
    """The teacher of one student.

    A model name means the finished ``base`` runs of that model, data and split with the most epochs, trained from fresh weights (by
    the student's own recipe where there are such), in order of seed: m of them. The student of seed k takes number (k+1) mod m, or
    the next that did not begin from the student's own initial weights. Anything else names the teacher itself. With ``stand_in`` fresh
    weights stand in for one that is still to be trained.

    Raises:
        UserError: none was trained, several recipes are in question, every one began where the student begins, or a network that saw
            the held-out images is to teach a holdout run.
    """
    if not by_name(reference):
        return _named_teacher(reference, query, ledger)
    model = models.canonical(reference)
    if query.data.no_labels:
        return _as_made(model)
    runs = _trained(model, query, ledger)
    for offset in range(len(runs)):
        run = runs[(query.seed + 1 + offset) % len(runs)]
        if run.init_hash != query.student_init:
            return _of_run(run, ledger, run.fingerprint)
    if stand_in:
        return NetworkRef(model, fingerprint="untrained", origin=f"an untrained {model}")
    if not runs:
        cure = _train_command(model, query)
        raise UserError(f"no {model} was trained on {query.data.name} ({query.split} split) yet; train one: {cure}")
    raise UserError(
        f"the only {model} to choose (run {runs[0].no}) began from the initial weights of the student of seed {query.seed}, which "
        f"may flatter it; train another teacher: {_train_command(model, query)}"
    )


def recorded_teacher(reference: str, run: Run, ledger: Ledger) -> NetworkRef:
    """The teacher that a run began with; where one was chosen by name, that one, whatever was trained since."""
    if by_name(reference) and validate(run.config).data.no_labels:
        return _as_made(models.canonical(reference))
    if run.teacher_run is None or not by_name(reference):
        return resolve(reference, ledger)
    return _of_run(ledger.run(run.teacher_run), ledger, run.teacher_fingerprint)


def by_name(reference: str) -> bool:
    """Whether a reference is the name of a model alone."""
    return run_number(reference) is None and not is_published(reference) and _of_weights(reference)[1] is None


def _as_made(model: str) -> NetworkRef:
    """A teacher by its name alone where nothing could be trained on labels: own code makes it, and may have weights for it.

    Raises:
        UserError: its maker gives fresh weights.
    """
    if not models.own_code(model):
        raise UserError(
            f"teacher={model}: no image has a label, so none was trained on these images; name a run, a weights file ({model}@FILE) or "
            f"published weights, such as timm:NAME@pretrained"
        )
    return NetworkRef(model, origin=AS_MADE)


def _named_teacher(reference: str, query: TeacherQuery, ledger: Ledger) -> NetworkRef:
    teacher = resolve(reference, ledger)
    if teacher.init_hash and teacher.init_hash == query.student_init:
        raise UserError(
            f"teacher {reference} began from the initial weights of the student of seed {query.seed}, which may flatter it; use another "
            f"--seeds or another teacher"
        )
    refuse_contaminated(teacher, query)
    return teacher


def _trained(model: str, query: TeacherQuery, ledger: Ledger) -> list[Run]:
    same = {"data_hash": query.data_hash, "split": query.split, "student_fingerprint": ""}
    runs = newest(run for run in ledger.runs(status="finished", method=BASELINE, student=model, **same) if _plain(run))
    if not runs:
        return []
    most = max(run.nepoch for run in runs)
    longest = [run for run in runs if run.nepoch == most]
    by_own_recipe = [run for run in longest if _recipe(run.config["train"]) == _recipe(query.recipe)]
    chosen = by_own_recipe or longest
    if len({run.fingerprint for run in chosen}) > 1:
        numbers = ", ".join(str(run.no) for run in chosen)
        raise UserError(f"{model} was trained by several recipes for {most} epochs (runs {numbers}); name one: --teacher {chosen[0].no}")
    return sorted(chosen, key=lambda run: run.seed)


def _plain(run: Run) -> bool:
    """Whether nothing of its method differs from the defaults, however many processes trained it, stopped early or not."""
    beside = {"", f"patience={run.config['train'].get('patience')}", f"ranks={ranks_apart(run)}"}
    return {*run.variant.split(", ")} <= beside


def _recipe(train: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in train.items() if key not in ("epochs", "freeze", "batch_norm")}


def _train_command(model: str, query: TeacherQuery) -> str:
    seed = 100 if query.seed != 100 else 101  # any that no student has
    if query.data.user_loaders:
        return f"flowdistill.train({model!r}, train_loader, val_loader, seed={seed})"
    kept = {"name", "root", "limit_train", "size", "channels", "skip_broken", "stream", "label"}
    images = {"name": query.data.name} | query.data.model_dump(mode="json", include=kept, exclude_defaults=True)
    return advice.train(model, seed, images, {}, holdout=query.split == "holdout", runs=query.runs)
