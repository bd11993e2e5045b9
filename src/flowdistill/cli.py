"""The command line. Thin: it reads options, calls one function, prints. stdout is data, stderr is talk."""

from __future__ import annotations

import gc
import inspect
import os
import signal
import sqlite3
import sys
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from . import advice, ranks, recipes, talk, trust
from .checks import INTERRUPTED, MAX_WORKERS, Changes, UserError, did_you_mean, is_there, joined, obstacle, parse_seeds, shortage, some
from .cli_errors import complain, failure, refuse_empty, usage
from .config import (
    BASELINE,
    NETWORKS,
    EngineName,
    PrecisionName,
    RunConfig,
    assign,
    each_network,
    model_name,
    one_line,
    put,
    read_file,
    read_taps,
    validate,
)
from .env import version
from .interrupt import stop
from .ledger import Ledger, Run, class_names, exported, kept_answers, shard_plan, stored
from .registry import Registry
from .report import board, pages, tables
from .report.by_class import class_rows
from .types import unnumbered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from .report.progress import Bars
    from .runner.remote.driver import Gathered


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a small network from a large one, measure it, tabulate it.",
)


TRAINING = {"train", "distill", "resume"}  # the commands that several processes share, as torchrun starts them
LAST = 100  # runs that are listed unless more are asked for


def _picture(path: Path | None) -> Path | None:
    """Refuse a file that no picture can be written to, before anything is read."""
    if path is not None:
        from .report import plots

        plots.format_of(path)
    return path


RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the ledger and of every run's files.")]
SourceOption = Annotated[Path, typer.Option("--runs", help=f"A folder of runs, or a file of {advice.command('ledger', 'export')}.")]
ProtocolOption = Annotated[tables.Protocol, typer.Option(help="Which accuracy: last epoch, best on test, or the holdout's choice.")]
MetricOption = Annotated[tables.MetricName, typer.Option(help="Which figure: top1 is the accuracy.")]
FormatOption = Annotated[tables.Format, typer.Option("--format", help="How to print.")]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", callback=_picture, help="Also draw curves, or the summary, to this file, .svg or .png. Default: none."),
]
DatasetOption = Annotated[
    str | None, typer.Option(help="digits, cifar10, cifar100, fashion_mnist, npz:PATH, folder:PATH, csv:FILE or hf:NAME.")
]
SeedsOption = Annotated[str | None, typer.Option(help="Such as 0-2,5; both ends included.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
EpochsOption = Annotated[int | None, typer.Option(help="Epochs (of the task phase, where a method trains in stages).")]
LrOption = Annotated[float | None, typer.Option(help="Base learning rate.")]
BatchSizeOption = Annotated[int | None, typer.Option(help="Images a step.")]
LabelSmoothingOption = Annotated[
    float | None, typer.Option(help="Share of each label, 0 or more and below 1, that the task spreads over all classes.")
]
PrecisionOption = Annotated[PrecisionName | None, typer.Option(help="auto: bf16 where the GPU or CPU computes it, else fp32.")]
EngineOption = Annotated[EngineName, typer.Option(help="How steps are computed; auto: the best for this device and length of run.")]
InitFromOption = Annotated[str | None, typer.Option(help="Begin from the weights of a run or file; other classes get a fresh classifier.")]
FreezeOption = Annotated[str | None, typer.Option(help="Modules or parameters that stay as they began, such as conv1,bn1,layer1.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=0, max=MAX_WORKERS, help="Processes that decode streamed images, for each seed; left out, one a core, at most 8."),
]
HoldoutOption = Annotated[bool, typer.Option("--holdout", help="Keep a tenth of train out; it chooses the epoch, test is read once.")]
DeterministicOption = Annotated[bool, typer.Option("--deterministic", help="Only operations that repeat bit for bit.")]
AcceptOption = Annotated[
    bool, typer.Option("--accept-changes", help="Take files, code and libraries as they are, where they are not what was recorded.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-code", help="Run code that files name as a network, though this command and your trainings did not.")
]
ShardOption = Annotated[
    str | None,
    typer.Option(help="Train part i of n of the same plan, such as 2/5, into RUNS/shards/2-of-5; slurm: the part of this array task."),
]
RayOption = Annotated[str | None, typer.Option("--ray", help="Train by the workers of a Ray cluster: local, auto or HOST:PORT.")]
StorageOption = Annotated[
    Path | None, typer.Option(help="With --ray: where workers keep what another goes on with, seen by all; left out, RUNS/storage.")
]
LogOption = Annotated[
    str | None, typer.Option("--log", help="Show each run in tensorboard, wandb or csv too, while it is trained; several with commas.")
]
AgainOption = Annotated[bool, typer.Option("--again", help="Train even what the ledger has already.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config, the taps and a time estimate; train nothing.")]
RatesOption = Annotated[
    bool, typer.Option("--rates", help="Try a hundred learning rates on a copy of each student, and propose one. Default: off.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML, or the run.json of a run; options given here win.")]
RecipeOption = Annotated[
    str | None, typer.Option(help=f"A recipe's name; {advice.command('recipes')} lists them. What is given beside it wins.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any key, such as options.fsp.pool=avg or weights.at=20.")]


def main() -> None:
    """Run the command line: 0 done, 1 a run failed, 2 a user's mistake in one line, 130 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)  # a kill is recorded as Ctrl-C is
    talk.begin()
    try:
        code = _run()
    except KeyboardInterrupt:  # while it said what had ended it
        code = INTERRUPTED
    finally:
        talk.end()
    if code == INTERRUPTED:
        os._exit(INTERRUPTED)  # Python itself would end by the signal where it fell into code that was executed from a string
    sys.exit(code)


def _run() -> int:
    try:
        refuse_empty(sys.argv)
        _begin_ranks(sys.argv[1:])
        code = app(standalone_mode=False)
    except UserError as error:
        return _complain(str(error), 2)
    except ValidationError as error:
        return _complain(one_line(error, RunConfig), 2)
    except (OSError, sqlite3.Error) as error:
        return _complain(failure(error), 1)
    except Exception as error:
        if shortage(error):
            return _complain(failure(error), 1)
        if not hasattr(error, "format_message"):  # not a usage error of the parser: a bug, shown whole
            raise
        if len(sys.argv) == 1:
            for line in error.format_message().splitlines():  # the help
                talk.say(line)
            return 2
        return _complain(usage(error), 2)
    if code == INTERRUPTED and ranks.launched().leads:
        talk.say("interrupted")  # what was cut off, and how to go on with it, is said where it is known
    return code if isinstance(code, int) else 0


def _complain(line: str, code: int) -> int:
    """Complain, if no other rank of this run does."""
    return complain(line, code) if ranks.tells() else code


def _begin_ranks(words: Sequence[str]) -> None:
    """Before torch is imported: refuse torchrun for what one process does, and what torch remarks on ranks that end is not printed.

    Raises:
        UserError: several processes were started for another command than a training.
    """
    if ranks.launched().several and not {*words[:1]} & TRAINING:
        given = f" {words[0]}" if words else ""
        raise UserError(f"torchrun starts a training ({joined(sorted(TRAINING), 'or')}); give flowdistill{given} without it")
    if ranks.launched().several:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _version(wanted: bool) -> None:
    if wanted:
        talk.answer(version())
        raise typer.Exit


@app.callback()
def _root(
    version_: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def _described(
    chosen: dict[str, Any],
    methods: str | None,
    *,
    dataset: DatasetOption = None,
    seeds: SeedsOption = None,
    epochs: EpochsOption = None,
    lr: LrOption = None,
    batch_size: BatchSizeOption = None,
    init_from: InitFromOption = None,
    freeze: FreezeOption = None,
    label_smoothing: LabelSmoothingOption = None,
    precision: PrecisionOption = None,
    holdout: HoldoutOption = False,
    recipe: RecipeOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> list[RunConfig]:
    """What the options describe: a run for each method and seed."""
    chosen |= {"data.name": dataset, "train.epochs": epochs, "train.lr": lr, "train.batch_size": batch_size}
    chosen |= {"train.label_smoothing": label_smoothing, "train.precision": precision}
    chosen |= {"split": "holdout" if holdout else None, "init_from": init_from, "train.freeze": freeze}
    values = _values(config, set_, chosen)
    chosen_recipe = recipes.recipe(recipe) if recipe is not None else None
    student, teacher = (model_name(str(values.get(key) or "")) for key in ("student", "teacher"))
    if chosen_recipe:
        values = recipes.over(chosen_recipe.of(student or RunConfig().student), values)
    if methods == BASELINE and values.get("teacher"):
        cure = f"use {advice.command('distill')}, or leave it out"
        raise UserError(f"teacher={values['teacher']!r}: training on the labels alone has none; {cure}")
    names = [name.strip() for name in (str(values.get("method", "fsp")) if methods is None else methods).split(",")]
    validate(values | {"method": names[0]})
    shares = _for_methods(values, names)
    if chosen_recipe:
        for index, share in enumerate(shares):
            for below in chosen_recipe.of_run(_in_full(share["method"]), teacher, student):
                shares[index] = recipes.over(below, shares[index])
    return [parsed for share in shares for of_teacher in _for_teachers(share) for parsed in _seeded(of_teacher, seeds)]


def _launch(
    configs: list[RunConfig],
    *,
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    workers: WorkersOption = None,
    deterministic: DeterministicOption = False,
    again: AgainOption = False,
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    dry_run: DryRunOption = False,
    shard: ShardOption = None,
    ray: RayOption = None,
    storage: StorageOption = None,
    log: LogOption = None,
    runs: RunsOption = Path("runs"),
) -> int:
    """Train these runs."""
    from .device import describe, resolve_device
    from .runner import dry_run as preview
    from .runner import duration, leading, run, shards
    from .runner.remote import driver

    place = None if shard is None else shards.parse(shard)
    gather, trackers = _crew(ray, storage, device, runs, shard), _trackers(log)
    where, own = resolve_device(ranks.device_name(device)), runs if place is None else shards.folder(runs, *place)
    if not ranks.launched().leads:
        return 0 if dry_run else _follow(where, workers, own, accept_changes=accept_changes, trust_code=trust_code)
    changes = Changes(accept_changes)
    ledger = Ledger(runs, create=True, changes=changes)
    with trust.code(trust_code):
        part = None if place is None else shards.planned(configs, ledger, where, *place)
        if dry_run:
            previews = preview(configs, ledger, where, engine, workers, part)
            talk.answer(tables.render(previews, "json", ()))
            todo = [planned for planned in previews if again or not planned["finished_run"]]
            talk.say(f"{len(todo)} runs to do, about {duration(todo)} (h:mm:ss) on {describe(where)}")
            return 0
        if gather is not None:
            ways = driver.How(engine, deterministic, workers, again, trust_code)
            bars = _bars(trackers, ledger, where)
            return _print_done(driver.run(configs, ledger, where, gather, ways, bars), bars)
        if part is not None:
            ledger = shards.opened(configs, runs, where, part, changes)
        how: dict[str, Any] = {"deterministic": deterministic, "again": again, "engine": engine, "workers": workers, "shard": part}
        bars = _bars(trackers, ledger, where)
        with leading(where):
            done = run(configs, ledger, where, **how, watcher=bars)
    if part is not None:
        talk.say(f"{shards.told(part, done)}; put all shards together with: {advice.merge(runs / shard_plan.FOLDER, runs)}")
    return _print_done(done, bars)


def _trackers(log: str | None) -> Sequence[str]:
    """The trackers that --log names."""
    if log is None:
        return ()
    from .trackers import chosen

    return chosen(log, "--log")


def _bars(trackers: Sequence[str], ledger: Ledger, device: torch.device) -> Bars:
    """Progress on stderr, and in these trackers."""
    from .report.progress import Bars

    bars = Bars()
    if trackers:
        from .trackers import Log

        bars.log = Log(trackers, ledger, device, bars.say)
    return bars


def _crew(ray: str | None, storage: Path | None, device: str, runs: Path, shard: str | None = None) -> Gathered | None:
    """What gathers the workers of a Ray cluster; None without one.

    Raises:
        UserError: options that do not go together, or no address.
    """
    from .runner.remote import ray_cluster, ray_crew
    from .runner.remote import storage as storages

    if ray is None:
        if storage is not None:
            raise UserError(f"--storage {storage} belongs to --ray; give --ray local, auto or HOST:PORT, or leave it out")
        return None
    if shard is not None:
        raise UserError(f"--shard {shard} and --ray {ray} both divide the plan; give one of them")
    if ranks.launched().several:
        raise UserError(
            f"--ray {ray}: torchrun started several processes, and Ray starts workers itself; give the command without torchrun"
        )
    ray_cluster.parse(ray)
    words = ["--ray", ray, *([] if storage is None else ["--storage", os.fspath(storage)])]
    return lambda: ray_crew.connected(ray, device, storage or runs / storages.FOLDER, words)


def _follow(device: torch.device, workers: int | None, runs: Path, *, accept_changes: bool | None, trust_code: bool) -> int:
    """What every process but the first of a torchrun does."""
    from .runner import follow

    with trust.code(trust_code), ranks.joined(device):
        follow(lambda: Ledger(runs, changes=Changes(accept_changes, say=lambda _: None)), device, workers)
    return 0


def _with_options_of(*functions: Callable[..., Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A command with options of its own, and those of these functions, which it gets in a mapping."""

    def command(body: Callable[..., int]) -> Callable[..., int]:
        named = [p for p in inspect.signature(body, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for function in functions:
            named += [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in named]
        body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        body.__annotations__ = {p.name: p.annotation for p in parameters}
        return app.command()(body)

    return command


def _split(options: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Take a function's options out of these."""
    return {name: options.pop(name) for name in inspect.signature(function).parameters if name in options}


@_with_options_of(_described, _launch)
def train(
    model: Annotated[str | None, typer.Option(help=f"A model's name; {advice.command('models')} lists them.")] = None, **options: Any
) -> int:
    """Train networks on the labels alone: teachers and baselines."""
    launching = _split(options, _launch)
    return _launch(_described({"student": model, "method": BASELINE}, BASELINE, **options), **launching)


def _pair(
    *,
    method: Annotated[str | None, typer.Option(help="Methods, with + for a composition and commas between runs: base,fsp,at+kd.")] = None,
    student: Annotated[str | None, typer.Option(help="Model name, run number, weights file or MODEL@FILE.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Likewise; by name, a trained one is chosen from the ledger. A comma separates teachers, a plus joins several."),
    ] = None,
    student_taps: Annotated[Path | None, typer.Option(help=f"The student's taps: a table of {advice.command('taps')}, edited.")] = None,
    teacher_taps: Annotated[Path | None, typer.Option(help="Likewise the teacher's.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Fit a linear classifier on the teacher's features, and let it give the logits. Default: off.")
    ] = False,
    unlabelled: Annotated[
        str | None,
        typer.Option(
            help="Images without labels to learn from the teacher on: folder:PATH, files in any folders, or npz:PATH with key x. Without "
            "--dataset the only ones: they train a backbone."
        ),
    ] = None,
    **options: Any,
) -> list[RunConfig]:
    """A student with a teacher, and what else the options describe."""
    tables = {"taps.student": student_taps, "taps.teacher": teacher_taps}
    taps = {key: read_taps(path) for key, path in tables.items() if path is not None}
    named = {"student": student, "teacher": teacher, "probe": probe or None, "data.unlabelled": unlabelled}
    return _described({**named, **taps}, method, **options)


@_with_options_of(_pair, _described, _launch)
def distill(**options: Any) -> int:
    """Train students with a teacher: one run for each method and seed."""
    launching = _split(options, _launch)
    return _launch(_pair(**options), **launching)


@_with_options_of(_pair, _described)
def doctor(
    find_rates: RatesOption = False,
    device: DeviceOption = "auto",
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
    **options: Any,
) -> int:
    """Before hours of training, in seconds: the teacher's answers, taps, gradients, time and memory, and what looks wrong."""
    from .device import resolve_device
    from .report.progress import Bars
    from .runner.doctor import Finding, examine

    ledger = Ledger(runs, create=True, changes=Changes(accept_changes))
    with trust.code(trust_code):
        findings = examine(_pair(**options), ledger, resolve_device(device), Bars(), find_rates=find_rates)
    talk.answer(tables.render([finding._asdict() for finding in findings], format_, Finding._fields))
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0


@app.command()
def resume(
    run: Annotated[int | None, typer.Argument(help="A run's number; its whole cohort goes on. Left out: all that was cut off.")] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    trust_code: TrustOption = False,
    ray: RayOption = None,
    storage: StorageOption = None,
    log: LogOption = None,
    runs: RunsOption = Path("runs"),
) -> int:
    """Go on with runs that were cut off (interrupted or dead), from their last checkpoint."""
    from .device import resolve_device
    from .runner import leading
    from .runner import resume as go_on
    from .runner.remote import driver

    where = resolve_device(ranks.device_name(device))
    if not ranks.launched().leads:
        return _follow(where, workers, runs, accept_changes=None, trust_code=trust_code)
    trackers = _trackers(log)
    gather, ledger = _crew(ray, storage, device, runs), Ledger(runs, changes=Changes(None))
    bars = _bars(trackers, ledger, where)
    with trust.code(trust_code), leading(where):
        if gather is None:
            done = go_on(ledger, where, no=run, workers=workers, watcher=bars)
        else:
            ways = driver.How(workers=workers, trusts_all=trust_code)
            done = driver.resume(ledger, where, gather, ways, bars, no=run)
    if not done:
        talk.say(f"nothing was cut off; {advice.list_runs(runs)} lists all")
        return 0
    return _print_done(done, bars)


def _print_done(done: Sequence[Run], bars: Bars) -> int:
    bars.ended_before([run.no for run in done])
    talk.answer(pages.runs_list(done, "table"))
    return 1 if any(result.status != "finished" for result in done) else 0


def _values(config: Path | None, assignments: Sequence[str] | None, chosen: dict[str, Any]) -> dict[str, Any]:
    """A config file, overridden by --set, overridden by the options that were given."""
    values, command_line = read_file(config) if config else {}, dict[str, Any]()
    for key in NETWORKS:
        for reference in _each(values.get(key)):
            trust.came_from(reference, f"--config {config}")
    for table in (values, command_line):
        for assignment in assignments or ():
            assign(table, assignment)
        for key, value in chosen.items():
            if value is not None:
                put(table, key, value)
    trust.name(*(reference for key in NETWORKS for reference in _each(command_line.get(key))))
    return values


def _in_full(method: str) -> str:
    """A method's name as runs record it: its parts in order."""
    return "+".join(sorted(part.strip() for part in method.split("+")))


def _for_methods(values: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The values of each method's runs: of several methods trained by one command, each takes the options and weights it has.

    Raises:
        UserError: an option or weight that none of them has.
    """
    if len(names) == 1:
        return [values | {"method": names[0]}]
    if len(set(names)) < len(names):
        raise UserError(f"--method {','.join(names)} names a method twice; each is trained once a seed")
    from .methods import parts

    classes = [parts(name) for name in names]
    taken = {
        "options": [{cls.name for cls in group} for group in classes],
        "weights": [{"task", *(term for cls in group for term in cls.terms)} for group in classes],
    }
    shares = [values | {"method": name} for name in names]
    for key, allowed in taken.items():
        table = values.get(key, {})
        unknown = [name for name in table if not any(unnumbered(name) in accepted for accepted in allowed)]
        if unknown:
            raise UserError(
                f"{key}.{unknown[0]}: none of {', '.join(names)} has it; {did_you_mean(unknown[0], sorted(set().union(*allowed)))}"
            )
        for share, accepted in zip(shares, allowed, strict=True):
            share[key] = {name: value for name, value in table.items() if unnumbered(name) in accepted}
    return shares


def _for_teachers(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The values of each teacher's runs: a comma separates teachers, and a plus joins several into one.

    Raises:
        UserError: a teacher is named twice.
    """
    named = values.get("teacher")
    if not isinstance(named, str):
        return [values]
    teachers = _separated(named)
    if len(set(teachers)) < len(teachers):
        raise UserError(f"--teacher {named} names a teacher twice; each has its own runs")
    return [values | {"teacher": teacher} for teacher in teachers]


def _separated(named: str) -> list[str]:
    """The teachers between commas; a file whose name has one is a single teacher."""
    return [named] if is_there(Path(named)) else [teacher.strip() for teacher in named.split(",")]


def _each(named: object) -> list[str]:
    """The networks that a value names, those that a comma separates and a plus joins each by itself."""
    return [one for teacher in _separated(named) for one in each_network(teacher)] if isinstance(named, str) else []


def _seeded(values: dict[str, Any], seeds: str | None) -> list[RunConfig]:
    if seeds is None:
        return [validate(values)]
    return [validate(values | {"seed": seed}) for seed in parse_seeds(seeds)]


@app.command()
def demo(
    runs: Annotated[Path | None, typer.Option("--runs", help="Keep the runs in this folder; else a fresh temporary one.")] = None,
    format_: FormatOption = "md",
) -> int:
    """The main job on real digits in about a minute: a teacher, students alone, with AT and with FSP; then the tables."""
    from .demo import demo as run_demo

    talk.answer(run_demo(runs, format_))
    return 0


@app.command()
def reproduce(
    study: Annotated[
        str,
        typer.Argument(
            help="log: all six pages of the reference, ResNet-20 and ResNet-110 on CIFAR-10 and CIFAR-100; fsp-log: its FSP and AT alone."
        ),
    ],
    only: Annotated[str | None, typer.Option(help="Only these settings, such as resnet20-cifar10,resnet20-cifar100.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Of log: only these rows, such as fsp,kd, or others than the reference's, such as fsp+kd; base always is."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"Of log: a recipe's name; {advice.command('recipes')} lists them. Left out, the reference's.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of log: seeds of the students; left out, 0-2.")] = None,
    baselines: Annotated[str | None, typer.Option(help="Of log: seeds of the baselines, which are the teachers; left out, 0,1.")] = None,
    cifar10: Annotated[str, typer.Option(help="Where CIFAR-10 comes from: cifar10 or npz:PATH.")] = "cifar10",
    cifar100: Annotated[str, typer.Option(help="Likewise: cifar100 or npz:PATH.")] = "cifar100",
    epochs: EpochsOption = None,
    limit_train: Annotated[int | None, typer.Option(help="Train on a fixed stratified choice of about so many images.")] = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and a time estimate; train nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the document; else log or fsp-log in the folder of the runs.")] = None,
    shard: ShardOption = None,
    ray: RayOption = None,
    storage: StorageOption = None,
    log: LogOption = None,
    runs: RunsOption = Path("runs"),
) -> int:
    """A published log, trained again: baselines, students, and one document beside its figures. What is trained already is skipped."""
    from . import reproduce as again
    from .device import resolve_device
    from .runner.remote import driver

    chosen = again.choose(study)
    study_options = {"--methods": methods, "--recipe": recipe, "--seeds": seeds, "--baselines": baselines}
    if not chosen.free and (option := next((option for option, value in study_options.items() if value is not None), "")):
        raise UserError(f"{option} belongs to the study log, and {study} has rows, recipe and seeds of its own; leave it out")
    recipe_options = {"epochs": epochs, "precision": precision}
    settings = again.settings(chosen, only)
    order = again.Order(
        chosen,
        settings,
        again.rows(chosen, methods),
        {"cifar10": cifar10, "cifar100": cifar100},
        limit_train,
        {key: value for key, value in recipe_options.items() if value is not None},
        again.by_recipe(recipe, settings),
        again.STUDENT_SEEDS if seeds is None else parse_seeds(seeds),
        again.BASELINE_SEEDS if baselines is None else parse_seeds(baselines, "--baselines"),
    )
    again.refuse_own_teachers(order.seeds, order.baselines)
    if shard is not None:
        return _launch(again.in_shards(order), device=device, dry_run=dry_run, shard=shard, ray=ray, storage=storage, log=log, runs=runs)
    trackers = _trackers(log)
    where, ledger, folder = resolve_device(device), Ledger(runs, create=True), out or runs / study
    gather = _crew(ray, storage, device, runs)
    again.refuse_folder(folder, chosen)
    if gather is None or dry_run:
        again.tell_time(order, ledger, where)
    if dry_run:
        talk.answer(again.plan_table(order))
        return 0
    sources = {f"--{name}": source for name, source in order.sources.items() if source != name}
    command_options = {
        "--only": only,
        **study_options,
        **sources,
        "--epochs": epochs,
        "--limit-train": limit_train,
        "--precision": recipe_options["precision"],
    }
    words = [word for option, value in command_options.items() if value is not None for word in (option, value)]
    bars = _bars(trackers, ledger, where)
    if gather is not None:
        with gather() as crew:
            for configs in filter(None, again.stages(order)):
                driver.run(configs, ledger, where, lambda: nullcontext(crew), driver.How(), bars)
    document, sound = again.reproduce(order, ledger, where, folder, advice.command("reproduce", study, *words, runs=runs), bars)
    talk.answer(str(document))
    return 0 if sound else 1


def _filters(
    listed: list[Run],
    *,
    method: Annotated[str | None, typer.Option(help="Only this method.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only this data set.")] = None,
    student: Annotated[str | None, typer.Option(help="Only this student.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Only this teacher, - for none.")] = None,
) -> dict[str, str]:
    """The columns that runs are chosen by, with their values as a ledger has them.

    Raises:
        UserError: a value that no run here has, and that is the name of nothing.
    """
    wanted = {"method": method and _in_full(method), "dataset": dataset, "student": student, "teacher": teacher}
    only = {key: stored(model_name(value)) for key, value in wanted.items() if value is not None}
    for key, value in only.items():
        trust.name(value)
        _refuse_unknown(key, value, {getattr(run, key) for run in listed})
    return only


@_with_options_of(_filters)
def table(
    summary: Annotated[bool, typer.Option("--summary", help="One row a method: mean, spread, difference to base.")] = False,
    protocol: ProtocolOption = "last",
    metric: MetricOption = "top1",
    format_: FormatOption = "md",
    plot: PlotOption = None,
    runs: SourceOption = Path("runs"),
    **options: Any,
) -> int:
    """The log of finished runs, or their summary."""
    results = exported.opened(runs)
    listed = results.listing()
    gc.freeze()  # a hundred thousand rows are no garbage, and looking through them again and again takes as long as the rest
    only = _filters(listed, **options)
    filtered = [run for run in listed if all(getattr(run, key) == value for key, value in only.items())]
    if backbones := [run.no for run in filtered if run.backbone]:
        named = some(map(str, backbones))
        talk.say(f"not in the table, for they left backbones, which have no accuracy: runs {named}; {advice.probe(backbones[0], runs)}")
    if not any(tables.read(run, protocol) for run in filtered) and format_ in ("table", "md"):
        talk.say(f"no finished runs here for --protocol {protocol} and these filters; {advice.list_runs(runs)} lists all")
        return 0
    if plot is not None:
        from .report import plots

        if summary:
            plots.draw_summary(plot, tables.summary_rows(listed, protocol, only, metric))
        else:
            plots.draw_curves(plot, [(run, results.curve(run)) for run in filtered if tables.read(run, protocol)])
        talk.say(f"drawn: {plot}")
    if summary:
        talk.answer(tables.summary_table(listed, protocol, format_, only, metric))
    else:
        talk.answer(tables.log_table(filtered, protocol, format_, metric))
    return 0


def _refuse_unknown(key: str, value: str, here: set[str]) -> None:
    """A filter that no run here has must at least be the name of something, else it is a mistake.

    Raises:
        UserError: no such method, data set or model.
    """
    if value in here or (key, value) == ("teacher", "-"):
        return
    from .data.sources import SOURCES
    from .methods import parts
    from .models import canonical

    if key == "method":
        parts(value)
    elif key == "dataset" and value not in SOURCES:
        raise UserError(f"--dataset {value!r}: no run here has it; {did_you_mean(value, sorted({*here, *SOURCES}))}{SOURCES.causes}")
    elif key in ("student", "teacher"):
        canonical(value)


@_with_options_of(_filters)
def record(
    to: Annotated[
        float | None, typer.Option(min=0, max=100, help="Only what reaches this accuracy, in percent; the fastest first.")
    ] = None,
    plain: Annotated[
        list[Path] | None,
        typer.Option(help=f"What {advice.command('bench', '--json')} printed: adds what the loop of a user would take, by its pace there."),
    ] = None,
    check: Annotated[Path | None, typer.Option(help="Print nothing; refuse this file where it is not what would be printed.")] = None,
    protocol: ProtocolOption = "last",
    format_: FormatOption = "md",
    runs: Annotated[list[Path] | None, typer.Option(help="As of table; may be given several times. Left out, runs.")] = None,
    **options: Any,
) -> int:
    """The time-to-accuracy board: what accuracy was had by what, and how long it took, on which hardware, by which command."""
    sources = [exported.opened(source) for source in runs or [Path("runs")]]
    paces = [pace for path in plain or [] for pace in board.paces(path)]
    listed = [run for source in sources for run in source.listing()]
    only = _filters(listed, **options)
    rows = board.rows(sources, protocol, only, paces, to)
    if paces and not any(row["times"] != "measured" for row in rows):
        talk.say("--plain: no row here has its pair, method, batch size, images of 32x32 and hardware, so it gives no row")
    if not rows and format_ in ("table", "md") and check is None:
        talk.say(f"no finished runs here for --protocol {protocol} and these filters")
        return 0
    text = board.table(rows, protocol, format_, to)
    if check is not None:
        board.refuse_other(check, text)
        talk.say(f"{check} is what the ledger gives")
    else:
        talk.answer(text)
    return 0


@app.command("runs")
def runs_(
    last: Annotated[int, typer.Option(min=1, help="How many, the newest.")] = LAST,
    all_: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """The last runs of the ledger, whatever became of them."""
    ledger = Ledger(runs)
    there, listed = ledger.count(), ledger.listing(None if all_ else last)
    talk.answer(pages.runs_list(listed, format_))
    if there > len(listed):
        talk.say(f"the last {len(listed):,} of {there:,} runs; --last N shows more, --all all")
    return 0


ledger_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The ledger itself, the file ledger.db.")
app.add_typer(ledger_app, name="ledger")


@ledger_app.command()
def rebuild(format_: FormatOption = "table", runs: RunsOption = Path("runs")) -> int:
    """Make a ledger that is gone or damaged again, from the folders of its runs. The old file is kept beside it."""
    from .ledger.rebuild import Entered
    from .ledger.rebuild import rebuild as make_again

    entered, kept = make_again(runs)
    talk.answer(tables.render([entry._asdict() for entry in entered], format_, Entered._fields))
    if kept:
        talk.say(f"the old ledger is kept as {kept}")
    return 1 if any(entry.status == "left alone" for entry in entered) else 0


@ledger_app.command("merge")
def merge_ledgers(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, such as those of shards.")],
    into: Annotated[Path, typer.Option(help="The folder of runs that they are copied into; a new one is made.")],
    format_: FormatOption = "table",
) -> int:
    """Copy the runs of several ledgers into one. Equal runs are taken once; numbers that are taken are replaced by new ones."""
    from .ledger.merge import Merged, merge

    gc.disable()  # all that is read stays until the end, and looking through it again and again takes a part of the time
    try:
        merged = merge(folders, into)
    finally:
        gc.enable()
    talk.answer(tables.render([entry._asdict() for entry in merged], format_, Merged._fields))
    talk.say(f"{sum(entry.copied for entry in merged):,} of {len(merged):,} runs were copied into {into}")
    if missing := shard_plan.missing(folders):
        talk.say(missing)
    return 0


@ledger_app.command("export")
def export_ledger(
    file: Annotated[Path, typer.Argument(help="Such as results.jsonl; a file that is there is replaced.")],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; refuse the file where it does not hold what the ledger has.")
    ] = False,
    runs: RunsOption = Path("runs"),
) -> int:
    """The results of a ledger as one file of lines, to be kept beside tables: rows and curves, no weights. table and record read it."""
    ledger = Ledger(runs)
    if check:
        exported.refuse_other(file, ledger)
        talk.say(f"{file} is what {ledger.path} gives")
        return 0
    from .training.weights import write_whole

    if hindrance := obstacle(file):
        raise UserError(f"{file}: the export cannot be written there ({hindrance}); name another file")
    write_whole(file, exported.exported(ledger))
    return 0


@app.command()
def show(
    run: Annotated[int, typer.Argument(help="A run's number.")],
    format_: FormatOption = "table",
    plot: PlotOption = None,
    runs: RunsOption = Path("runs"),
) -> int:
    """One run: its config, its curve, its figures by class, what it was made with."""
    ledger = Ledger(runs)
    shown, classes = ledger.run(run), list[dict[str, Any]]()
    if plot is not None:
        from .report import plots

        plots.draw_curves(plot, [(shown, ledger.epochs(run))])
        talk.say(f"drawn: {plot}")
    try:
        kept = kept_answers(shown, ledger)
        classes = class_rows(kept, class_names(shown, ledger, kept.test.num_classes))
    except UserError as error:
        if shown.status == "finished":
            talk.say(str(error))
    talk.answer(pages.run_page(shown, ledger.epochs(run), format_, classes))
    return 0


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|FILE", help="A run's number or a student's file.")],
    dataset: Annotated[str | None, typer.Option(help="Other data than it was trained on.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="Other precision than it was trained in.")] = None,
    probe: Annotated[
        Literal["knn", "linear"] | None,
        typer.Option(help="Measure its features instead: by the nearest training images, or by logistic regression on these."),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Of --probe knn: number of neighbours; left out, 20.")] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Measure a student again, from its file alone; verdict: whether that is what was recorded. With --probe its features are measured."""
    from .device import resolve_device
    from .runner import evaluate as measure
    from .runner.evaluate import probe as measure_features
    from .runner.evaluate import weights_path

    if k is not None and probe is None:
        raise UserError(f"--k {k} belongs to --probe knn; give that too, or leave it out")
    changes = Changes(accept_changes)
    with trust.code(trust_code):
        path, changed = weights_path(target, runs, changes)
        if probe is not None:
            how: dict[str, Any] = {"dataset": dataset, "k": k, "precision": precision, "workers": workers, "changes": changes}
            figures = measure_features(path, resolve_device(device), probe, **how)
            talk.answer(tables.render([figures._asdict()], format_, figures._fields))
            return 0
        measured = measure(
            path, resolve_device(device), dataset=dataset, precision=precision, workers=workers, changed=changed, changes=changes
        )
    talk.answer(tables.render([measured._asdict()], format_, measured._fields))
    return 0


@app.command()
def check(
    run: Annotated[int | None, typer.Argument(help="A run's number; left out, all that finished or were cut off.")] = None,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Whether every file of the runs is the one that was written: size and SHA-256 against the record, and that against the ledger."""
    from .ledger import NAME
    from .runner.integrity import Finding, examine

    ledger = Ledger(runs)
    chosen = ledger.listing() if run is None else [ledger.run(run)]
    findings = [finding for run_ in chosen for finding in examine(run_, ledger)]
    if run is None:
        findings += [Finding(no, NAME, "gone", "a folder of a run, and no row") for no in ledger.strangers()]
    talk.answer(tables.render([finding._asdict() for finding in findings], format_, Finding._fields))
    return 0 if all(finding.sound for finding in findings) else 1


@app.command()
def card(
    run: Annotated[int, typer.Argument(help="A run's number.")],
    format_: Annotated[Literal["md", "html"], typer.Option("--format", help="How to write it.")] = "md",
    out: Annotated[Path | None, typer.Option(help="Write it to this file; else it is printed.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images of the second latency; the first is of one image.")] = 64,
    device: DeviceOption = "auto",
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    runs: RunsOption = Path("runs"),
) -> int:
    """The compression card of a finished run: cost, accuracy, agreement and calibration beside its teacher and a student alone."""
    from .device import resolve_device
    from .report.card import page
    from .runner.card import measure
    from .training.weights import write_whole

    if out and (hindrance := obstacle(out)):
        raise UserError(f"{out}: the card cannot be written there ({hindrance}); name another file with --out")
    ledger = Ledger(runs, changes=Changes(accept_changes))
    with trust.code(trust_code):
        text = page(measure(run, ledger, resolve_device(device), batch_size=batch_size), format_)
    if out:
        write_whole(out, f"{text}\n".encode())
    else:
        talk.answer(text)
    return 0


@app.command("log")
def log_(
    numbers: Annotated[list[int], typer.Argument(metavar="RUN...", help="Numbers of runs.")],
    to: Annotated[str, typer.Option(help="tensorboard, wandb or csv; several with commas.")],
    device: DeviceOption = "auto",
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    runs: RunsOption = Path("runs"),
) -> int:
    """Show what is on record of runs in TensorBoard, Weights & Biases or a CSV file: config, curves, FSP matrices, card."""
    from .device import resolve_device
    from .trackers import Log, chosen, refuse_running

    trackers = chosen(to, "--to")
    ledger = Ledger(runs, changes=Changes(accept_changes))
    refuse_running(numbers, ledger)
    log = Log(trackers, ledger, resolve_device(device), talk.say)
    with trust.code(trust_code):
        log.ended(numbers)
    return 1 if log.failed else 0


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="RUN|FILE", help="A run's number or a student's file.")],
    to: Annotated[
        str | None, typer.Option(help="safetensors: weights; torch-export, onnx: a program with the normalisation in it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; else beside the student's.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Images of other data than it was trained on, to compare it on.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise ONNX after training, calibrated on training images.")] = False,
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Write a student in a format for use elsewhere, once it answers test images as the network does."""
    from .runner import export as write
    from .runner.evaluate import weights_path
    from .runner.export import FORMATS, DeviationError
    from .runner.integrity import enlist
    from .runner.references import run_number

    if to is None:
        raise UserError(f"Missing option '--to'. Choose from: {', '.join(FORMATS)} ({advice.usage()})")
    changes = Changes(accept_changes)
    try:
        with trust.code(trust_code):
            written = write(weights_path(target, runs, changes).path, to, out=out, dataset=dataset, int8=int8, changes=changes)
    except DeviationError as error:
        return complain(str(error), 1)
    if (no := run_number(target)) is not None:
        enlist(no, Ledger(runs), Path(written.file))
    row = {key: value for key, value in written._asdict().items() if value is not None}
    talk.answer(tables.render([row], format_, tuple(row)))
    return 0


@app.command()
def bench(
    pairs: Annotated[str, typer.Option(help="STUDENT:TEACHER, with commas between pairs.")] = "resnet8:resnet20",
    methods: Annotated[
        str, typer.Option(help="With commas; several are timed one by one and as one cohort. all: all there are, one by one.")
    ] = "fsp",
    engines: Annotated[str | None, typer.Option(help="Of eager, compiled, graph, graph+compiled; left out, all that work here.")] = None,
    precisions: Annotated[str, typer.Option(help="Of fp32 and bf16.")] = "fp32,bf16",
    cohorts: Annotated[str | None, typer.Option(help="Numbers of seeds to train together, such as 3,8.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images a step.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each loop; the table has their median.")] = 5,
    workers: Annotated[int, typer.Option(min=0, help="Of the plain loop's DataLoader; 0 is timed as well.")] = 2,
    device: DeviceOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """How fast training is on this machine: every engine beside the loop that a user would write."""
    from .bench import bench as measure
    from .bench import report
    from .device import resolve_device
    from .methods import METHODS

    measured = measure(
        _listed("--pairs", pairs),
        [BASELINE, *(name for name in METHODS if name != BASELINE)] if methods == "all" else _listed("--methods", methods),
        resolve_device(device),
        engines=_listed("--engines", engines) if engines is not None else (),
        precisions=_listed("--precisions", precisions),  # type: ignore[arg-type]
        cohorts=[_number("--cohorts", count) for count in _listed("--cohorts", cohorts)] if cohorts is not None else (),
        batch_size=batch_size,
        steps=steps,
        rounds=rounds,
        workers=workers,
        together=methods != "all",
    )
    talk.answer(tables.as_json(measured) if json else report(measured, lambda rows, columns: tables.render(rows, "md", columns)))
    return 0


def _listed(option: str, text: str) -> list[str]:
    """Names with commas between them."""
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise UserError(f"{option} {text!r} names nothing between two commas; write a,b")
    return names


def _number(option: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{option} {text!r}: write numbers with commas, such as 3,8")
    return int(text)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its options, defaults and paper.")] = None,
    format_: FormatOption = "table",
) -> int:
    """The distillation methods there are."""
    from .methods import METHODS, get
    from .methods.standardise import BY_AUTHORS, PREFIX

    if name is not None:
        talk.answer(pages.method_card(get(name), format_))
        return 0
    listed = [*METHODS, *(PREFIX + wrapped for wrapped in BY_AUTHORS)]
    _tell_failures(METHODS)
    talk.answer(pages.methods_list([get(key) for key in listed], format_))
    return 0


@app.command()
def models(
    pattern: Annotated[str | None, typer.Argument(help="Names with * and ?, such as 'resnet*'; left out, all.")] = None,
    format_: FormatOption = "table",
) -> int:
    """The networks there are."""
    from .models import MODELS

    names = [name for name in MODELS if pattern is None or fnmatchcase(name, pattern)]
    if not names:
        raise UserError(f"models {pattern!r}: no network has such a name; {did_you_mean(pattern or '', MODELS)}{MODELS.causes}")
    _tell_failures(MODELS)
    talk.answer(tables.render([{"name": name, "about": MODELS[name].about} for name in names], format_, ("name", "about")))
    return 0


def _tell_failures(registry: Registry[Any]) -> None:
    """What could not be loaded of what other packages add."""
    for line in registry.failures:
        talk.say(line)


@app.command()
def taps(
    model: Annotated[str, typer.Argument(help="A model's name, timm:NAME, torchvision:NAME, FILE.py:FUNCTION, a run, or MODEL@FILE.")],
    size: Annotated[int | None, typer.Option(min=1, help="Pixels of a side; left out, what the network declares.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Of the images; left out, 3.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Of the classifier, where it is fresh.")] = 1000,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Where a network's stages end, found by a dry run: a table to edit (--format csv) and to give back to distill."""
    from .runner.tap_table import COLUMNS, rows

    trust.name(model)
    with trust.code(trust_code):
        tap_rows = rows(model, runs, size=size, channels=channels, classes=classes)
    talk.answer(tables.render(tap_rows, format_, COLUMNS))
    return 0


@app.command(name="recipes")
def list_recipes(format_: FormatOption = "table") -> int:
    """The recipes there are."""
    rows = [
        {
            "name": name,
            "values": ", ".join(f"{k}={v}" for table in listed.values.values() for k, v in table.items()),
            "source": listed.source,
        }
        for name, listed in recipes.RECIPES.items()
    ]
    talk.answer(tables.render(rows, format_, ("name", "values", "source")))
    return 0


@app.command()
def datasets(format_: FormatOption = "table") -> int:
    """The data sets there are."""
    from .config import written_schemes
    from .data.sources import SOURCES

    rows = [{"name": name, "about": SOURCES[name].about} for name in SOURCES]
    rows += [{"name": name, "about": about} for name, about in written_schemes().items()]
    _tell_failures(SOURCES)
    talk.answer(tables.render(rows, format_, ("name", "about")))
    return 0
