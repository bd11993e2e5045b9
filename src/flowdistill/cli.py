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

from . import advice, config_keys, ranks, recipes, talk, trust
from .checks import INTERRUPTED, Changes, UserError, did_you_mean, is_there, joined, obstacle, parse_seeds, shortage, some
from .cli_errors import complain, failure, refuse_empty, usage
from .cli_options import (
    AcceptOption,
    AgainOption,
    BatchSizeOption,
    ConfigOption,
    DatasetOption,
    DeterministicOption,
    DeviceOption,
    DryRunOption,
    EngineOption,
    EpochsOption,
    FormatOption,
    FreezeOption,
    HoldoutOption,
    InitFromOption,
    LabelSmoothingOption,
    LimitTrainOption,
    LogOption,
    LrOption,
    MethodOption,
    MetricOption,
    PlotOption,
    PrecisionOption,
    ProbeOption,
    ProtocolOption,
    RatesOption,
    RayOption,
    RecipeOption,
    RunsOption,
    SeedsOption,
    SetOption,
    ShardOption,
    SourceOption,
    StorageOption,
    StudentOption,
    TeacherOption,
    TrustOption,
    UnlabelledOption,
    WorkersOption,
    command,
    epilog,
    of_key,
)
from .config import (
    BASELINE,
    DISTILLING,
    NETWORKS,
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
    epilog=epilog("demo", "train --model resnet20 --dataset cifar10", "distill --student resnet8 --teacher resnet20 --dataset cifar10"),
)


TRAINING = {"train", "distill", "resume"}  # the commands that several processes share, as torchrun starts them
LAST = 100  # runs that are listed unless more are asked for


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
    names = [name.strip() for name in (str(values.get("method", DISTILLING)) if methods is None else methods).split(",")]
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


def _with_options_of(*functions: Callable[..., Any], examples: tuple[str, ...]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A command with options of its own, and those of these functions, which it gets in a mapping."""

    def decorated(body: Callable[..., int]) -> Callable[..., int]:
        named = [p for p in inspect.signature(body, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for function in functions:
            named += [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in named]
        body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        body.__annotations__ = {p.name: p.annotation for p in parameters}
        return command(app, examples=examples)(body)

    return decorated


def _split(options: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Take a function's options out of these."""
    return {name: options.pop(name) for name in inspect.signature(function).parameters if name in options}


@_with_options_of(
    *(_described, _launch),
    examples=("train --model resnet20 --dataset cifar10 --seeds 0-2", "train --model resnet8 --dataset folder:birds --set data.size=64"),
)
def train(model: StudentOption = None, **options: Any) -> int:
    """Train networks on the labels alone.

    They are teachers and baselines. Each seed is one run.
    """
    launching = _split(options, _launch)
    return _launch(_described({"student": model, "method": BASELINE}, BASELINE, **options), **launching)


def _pair(
    *,
    method: MethodOption = None,
    student: StudentOption = None,
    teacher: TeacherOption = None,
    student_taps: Annotated[
        Path | None, typer.Option(help=f"The student's taps: a table of {advice.command('taps')}, edited. Default: where its stages end.")
    ] = None,
    teacher_taps: Annotated[
        Path | None, typer.Option(help="The teacher's taps: a table of the same kind. Default: where its stages end.")
    ] = None,
    probe: ProbeOption = False,
    unlabelled: UnlabelledOption = None,
    **options: Any,
) -> list[RunConfig]:
    """A student with a teacher, and what else the options describe."""
    tables = {"taps.student": student_taps, "taps.teacher": teacher_taps}
    taps = {key: read_taps(path) for key, path in tables.items() if path is not None}
    named = {"student": student, "teacher": teacher, "probe": probe or None, "data.unlabelled": unlabelled}
    return _described({**named, **taps}, method, **options)


@_with_options_of(
    *(_pair, _described, _launch),
    examples=(
        "distill --student resnet8 --teacher resnet20 --dataset cifar10",
        "distill --method base,fsp,at+kd --student resnet8 --teacher 1 --seeds 0-2",
    ),
)
def distill(**options: Any) -> int:
    """Train students with a teacher.

    Each method, teacher and seed is one run.
    """
    launching = _split(options, _launch)
    return _launch(_pair(**options), **launching)


@_with_options_of(_pair, _described, examples=("doctor --student resnet8 --teacher resnet20 --dataset cifar10",))
def doctor(
    find_rates: RatesOption = False,
    device: DeviceOption = "auto",
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
    **options: Any,
) -> int:
    """Say what looks wrong before hours of training.

    In seconds it looks at the teacher's answers, taps, gradients, time and memory. It takes the options of distill, and ends with 1 if
    something is wrong.
    """
    from .device import resolve_device
    from .report.progress import Bars
    from .runner.doctor import Finding, examine

    ledger = Ledger(runs, create=True, changes=Changes(accept_changes))
    with trust.code(trust_code):
        findings = examine(_pair(**options), ledger, resolve_device(device), Bars(), find_rates=find_rates)
    talk.answer(tables.render([finding._asdict() for finding in findings], format_, Finding._fields))
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0


@command(app, examples=("resume", "resume 12"))
def resume(
    run: Annotated[int | None, typer.Argument(help="A run's number; its whole cohort goes on. Default: all that was cut off.")] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    trust_code: TrustOption = False,
    ray: RayOption = None,
    storage: StorageOption = None,
    log: LogOption = None,
    runs: RunsOption = Path("runs"),
) -> int:
    """Go on with runs that were cut off.

    They were interrupted, or their process died. Each goes on from its last checkpoint.
    """
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


@command(app, examples=("demo", "demo --runs digits"))
def demo(
    runs: Annotated[Path | None, typer.Option("--runs", help="Folder that keeps the runs. Default: a fresh temporary one.")] = None,
    format_: FormatOption = "md",
) -> int:
    """Distil on real digits in about a minute.

    It trains a teacher, and students alone, with AT and with FSP. Then it prints the tables.
    """
    from .demo import demo as run_demo

    talk.answer(run_demo(runs, format_))
    return 0


@command(app, examples=("reproduce log --only resnet20-cifar10 --dry-run", "reproduce fsp-log"))
def reproduce(
    study: Annotated[
        str,
        typer.Argument(
            help="log: all six pages of the reference, ResNet-20 and ResNet-110 on CIFAR-10 and CIFAR-100. fsp-log: its FSP and AT alone."
        ),
    ],
    only: Annotated[
        str | None, typer.Option(help="Only these settings, such as resnet20-cifar10,resnet20-cifar100. Default: all of the study.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of log: only these rows, such as fsp,kd, or others than the reference's, such as fsp+kd. base always is one. "
            "Default: the reference's."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"Of log: a recipe by name; {advice.command('recipes')} lists them. Default: the reference's.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of log: seeds of the students. Default: 0-2.")] = None,
    baselines: Annotated[str | None, typer.Option(help="Of log: seeds of the baselines, which are the teachers. Default: 0,1.")] = None,
    cifar10: Annotated[str, typer.Option(help="Where CIFAR-10 comes from: cifar10 or npz:PATH.")] = "cifar10",
    cifar100: Annotated[str, typer.Option(help="Where CIFAR-100 comes from: cifar100 or npz:PATH.")] = "cifar100",
    epochs: Annotated[int | None, of_key("train.epochs", default="the recipe's")] = None,
    limit_train: LimitTrainOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and a time estimate; train nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the document. Default: log or fsp-log in the folder of the runs.")] = None,
    shard: ShardOption = None,
    ray: RayOption = None,
    storage: StorageOption = None,
    log: LogOption = None,
    runs: RunsOption = Path("runs"),
) -> int:
    """Train a published log again.

    It trains baselines and students, and writes one document beside the published figures. What is trained already is skipped.
    """
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
    method: Annotated[str | None, typer.Option(help="Only runs of this method. Default: all.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only runs on this data set. Default: all.")] = None,
    student: Annotated[str | None, typer.Option(help="Only runs of this student. Default: all.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Only runs with this teacher; - is none. Default: all.")] = None,
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


@_with_options_of(_filters, examples=("table", "table --summary --dataset cifar10"))
def table(
    summary: Annotated[bool, typer.Option("--summary", help="Print one row per method: mean, spread, difference to base.")] = False,
    protocol: ProtocolOption = "last",
    metric: MetricOption = "top1",
    format_: FormatOption = "md",
    plot: PlotOption = None,
    runs: SourceOption = Path("runs"),
    **options: Any,
) -> int:
    """Print the log of finished runs, or a summary."""
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


@_with_options_of(_filters, examples=("record --dataset cifar10", "record --to 92"))
def record(
    to: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Only what reaches this accuracy, in percent; the fastest comes first. Default: all."),
    ] = None,
    plain: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"What {advice.command('bench', '--json')} printed: adds what the loop of a user would take, by its pace there. "
            "May be given again."
        ),
    ] = None,
    check: Annotated[Path | None, typer.Option(help="Print nothing; refuse this file if it is not what would be printed.")] = None,
    protocol: ProtocolOption = "last",
    format_: FormatOption = "md",
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"Folder of runs, or a file of {advice.command('ledger', 'export')}; may be given again. Default: {advice.RUNS}."
        ),
    ] = None,
    **options: Any,
) -> int:
    """Print the time-to-accuracy board.

    It says which accuracy was reached by what, how long that took, on which hardware and by which command.
    """
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


@command(app, "runs", examples=("runs", "runs --last 10"))
def runs_(
    last: Annotated[int, typer.Option(min=1, help="How many of the newest runs are listed.")] = LAST,
    all_: Annotated[bool, typer.Option("--all", help="List all runs.")] = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """List the last runs, whatever became of them."""
    ledger = Ledger(runs)
    there, listed = ledger.count(), ledger.listing(None if all_ else last)
    talk.answer(pages.runs_list(listed, format_))
    if there > len(listed):
        talk.say(f"the last {len(listed):,} of {there:,} runs; --last N shows more, --all all")
    return 0


ledger_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Rebuild, merge or export a ledger (ledger.db).",
    epilog=epilog("ledger rebuild", "ledger export results.jsonl"),
)
app.add_typer(ledger_app, name="ledger")


@command(ledger_app, examples=("ledger rebuild",))
def rebuild(format_: FormatOption = "table", runs: RunsOption = Path("runs")) -> int:
    """Make a lost or damaged ledger again.

    It is made from the folders of its runs. The old file is kept beside it.
    """
    from .ledger.rebuild import Entered
    from .ledger.rebuild import rebuild as make_again

    entered, kept = make_again(runs)
    talk.answer(tables.render([entry._asdict() for entry in entered], format_, Entered._fields))
    if kept:
        talk.say(f"the old ledger is kept as {kept}")
    return 1 if any(entry.status == "left alone" for entry in entered) else 0


@command(ledger_app, "merge", examples=("ledger merge runs/shards/1-of-2 runs/shards/2-of-2 --into runs",))
def merge_ledgers(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, such as those of shards.")],
    into: Annotated[Path, typer.Option(help="Folder of runs that they are copied into; it is made if it is not there.")],
    format_: FormatOption = "table",
) -> int:
    """Copy the runs of several ledgers into one.

    Equal runs are copied once. A run whose number is taken gets a new one.
    """
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


@command(ledger_app, "export", examples=("ledger export results.jsonl", "ledger export results.jsonl --check"))
def export_ledger(
    file: Annotated[Path, typer.Argument(help="File to write, such as results.jsonl; one that is there is replaced.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing; refuse the file if it is not what the ledger has.")] = False,
    runs: RunsOption = Path("runs"),
) -> int:
    """Write the results of a ledger as one file.

    It has a line for each run with its curve, no weights, and is to be kept beside tables. table and record read it (--runs FILE).
    """
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


@command(app, examples=("show 12", "show 12 --format json"))
def show(
    run: Annotated[int, typer.Argument(help="A run's number.")],
    format_: FormatOption = "table",
    plot: PlotOption = None,
    runs: RunsOption = Path("runs"),
) -> int:
    """Show one run: its config, curve and figures.

    The figures are also listed by class, and what the run was made with.
    """
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


@command(app, examples=("evaluate 12", "evaluate 12 --probe knn --dataset cifar100"))
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|FILE", help="A run's number or a student's file.")],
    dataset: Annotated[str | None, typer.Option(help="Data set to measure it on. Default: the one that it was trained on.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="Arithmetic. Default: the one that it was trained in.")] = None,
    probe: Annotated[
        Literal["knn", "linear"] | None,
        typer.Option(
            help="Measure its features instead: by the nearest training images, or by logistic regression on these. "
            "Default: none, its own answers are measured."
        ),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Of --probe knn: number of neighbours. Default: 20.")] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Measure a student again, from its file alone.

    The verdict says whether that is what was recorded. With --probe its features are measured.
    """
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


@command(app, examples=("check", "check 12"))
def check(
    run: Annotated[int | None, typer.Argument(help="A run's number. Default: all runs that finished or were cut off.")] = None,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Check that the files of runs are as written.

    Size and SHA-256 are compared with the run's record, and the record with the ledger. It ends with 1 if something differs.
    """
    from .ledger import NAME
    from .runner.integrity import Finding, examine

    ledger = Ledger(runs)
    chosen = ledger.listing() if run is None else [ledger.run(run)]
    findings = [finding for run_ in chosen for finding in examine(run_, ledger)]
    if run is None:
        findings += [Finding(no, NAME, "gone", "a folder of a run, and no row") for no in ledger.strangers()]
    talk.answer(tables.render([finding._asdict() for finding in findings], format_, Finding._fields))
    return 0 if all(finding.sound for finding in findings) else 1


@command(app, examples=("card 12", "card 12 --format html --out card.html"))
def card(
    run: Annotated[int, typer.Argument(help="A run's number.")],
    format_: Annotated[Literal["md", "html"], typer.Option("--format", help="How to write it.")] = "md",
    out: Annotated[Path | None, typer.Option(help="File to write it to. Default: none, it is printed.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Number of images of the second latency; the first is of one image.")
    ] = 64,
    device: DeviceOption = "auto",
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    runs: RunsOption = Path("runs"),
) -> int:
    """Make the compression card of a finished run.

    It has cost, accuracy, agreement and calibration, beside those of its teacher and of a student alone.
    """
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


@command(app, "log", examples=("log 12 --to csv", "log 12 13 --to tensorboard,csv"))
def log_(
    numbers: Annotated[list[int], typer.Argument(metavar="RUN...", help="Numbers of runs.")],
    to: Annotated[str, typer.Option(help="Tracker: tensorboard, wandb or csv. Commas separate several.")],
    device: DeviceOption = "auto",
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    runs: RunsOption = Path("runs"),
) -> int:
    """Show recorded runs in a tracker.

    TensorBoard, Weights & Biases or a CSV file get config, curves, FSP matrices and card.
    """
    from .device import resolve_device
    from .trackers import Log, chosen, refuse_running

    trackers = chosen(to, "--to")
    ledger = Ledger(runs, changes=Changes(accept_changes))
    refuse_running(numbers, ledger)
    log = Log(trackers, ledger, resolve_device(device), talk.say)
    with trust.code(trust_code):
        log.ended(numbers)
    return 1 if log.failed else 0


@command(app, examples=("export 12 --to safetensors", "export 12 --to onnx --int8 --out student.onnx"))
def export(
    target: Annotated[str, typer.Argument(metavar="RUN|FILE", help="A run's number or a student's file.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="Format. safetensors: weights; torch-export, onnx: a program with the normalisation in it. Default: none, give one."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: one beside the student's file.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set on whose images it is compared. Default: the one that it was trained on.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise ONNX after training, calibrated on training images.")] = False,
    accept_changes: AcceptOption = False,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Write a student in a format for use elsewhere.

    The file is kept only if it answers test images as the network does.
    """
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


@command(app, examples=("bench", "bench --methods fsp,kd --precisions fp32 --steps 10"))
def bench(
    pairs: Annotated[str, typer.Option(help="STUDENT:TEACHER; commas separate pairs.")] = "resnet8:resnet20",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods; commas separate several, which are timed one by one and as one cohort. all: all there are, one by one."
        ),
    ] = DISTILLING,
    engines: Annotated[
        str | None, typer.Option(help="Engines, of eager, compiled, graph and graph+compiled. Default: all that work here.")
    ] = None,
    precisions: Annotated[str, typer.Option(help="Precisions, of fp32 and bf16.")] = "fp32,bf16",
    cohorts: Annotated[str | None, typer.Option(help="Numbers of seeds to train together, such as 3,8.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per training step.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps per turn.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each loop; the table has their median.")] = 5,
    workers: Annotated[int, typer.Option(min=0, help="Workers of the plain loop's DataLoader; 0 is timed as well.")] = 2,
    device: DeviceOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Time training on this machine.

    Every engine is timed beside the loop that a user would write.
    """
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


@command(app, examples=("methods", "methods fsp"))
def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, whose options, defaults and paper are shown. Default: a list of all methods.")
    ] = None,
    format_: FormatOption = "table",
) -> int:
    """List the distillation methods, or show one."""
    from .methods import METHODS, get
    from .methods.standardise import BY_AUTHORS, PREFIX

    if name is not None:
        talk.answer(pages.method_card(get(name), format_))
        return 0
    listed = [*METHODS, *(PREFIX + wrapped for wrapped in BY_AUTHORS)]
    _tell_failures(METHODS)
    talk.answer(pages.methods_list([get(key) for key in listed], format_))
    return 0


@command(app, examples=("models", "models 'resnet*'"))
def models(
    pattern: Annotated[str | None, typer.Argument(help="Names with * and ?, such as 'resnet*'. Default: all.")] = None,
    format_: FormatOption = "table",
) -> int:
    """List the networks."""
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


@command(app, examples=("taps resnet20", "taps timm:resnet18 --format csv"))
def taps(
    model: Annotated[str, typer.Argument(help="A model's name, timm:NAME, torchvision:NAME, FILE.py:FUNCTION, a run, or MODEL@FILE.")],
    size: Annotated[int | None, typer.Option(min=1, help="Pixels of a side of an image. Default: what the network declares.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of an image. Default: 3.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Classes of the classifier, if it is fresh.")] = 1000,
    trust_code: TrustOption = False,
    format_: FormatOption = "table",
    runs: RunsOption = Path("runs"),
) -> int:
    """Show where a network's stages end.

    A dry run finds them. --format csv prints a table to edit and to give back to distill (--student-taps, --teacher-taps).
    """
    from .runner.tap_table import COLUMNS, rows

    trust.name(model)
    with trust.code(trust_code):
        tap_rows = rows(model, runs, size=size, channels=channels, classes=classes)
    talk.answer(tables.render(tap_rows, format_, COLUMNS))
    return 0


@command(app, "recipes", examples=("recipes",))
def list_recipes(format_: FormatOption = "table") -> int:
    """List the recipes."""
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


@command(app, "config", examples=("config", "config train.lr", "config 'train.*'"))
def list_keys(
    pattern: Annotated[
        str | None, typer.Argument(help="A key, a table such as train, or names with * and ?, such as 'train.*'. Default: all keys.")
    ] = None,
    format_: FormatOption = "table",
) -> int:
    """List the keys of a config: --set, --config.

    Each has what is allowed, its default and what it means.
    """
    rows = [
        {"key": key.key, "allowed": key.allowed, "default": key.default, "about": key.description}
        if format_ == "json"
        else {"key": key.key, "allowed": key.allowed, "default": key.written_default or "-", "about": key.description}
        for key in config_keys.chosen(pattern)
    ]
    talk.answer(tables.render(rows, format_, ("key", "allowed", "default", "about")))
    return 0


@command(app, examples=("datasets",))
def datasets(format_: FormatOption = "table") -> int:
    """List the data sets."""
    from .config import written_schemes
    from .data.sources import SOURCES

    rows = [{"name": name, "about": SOURCES[name].about} for name in SOURCES]
    rows += [{"name": name, "about": about} for name, about in written_schemes().items()]
    _tell_failures(SOURCES)
    talk.answer(tables.render(rows, format_, ("name", "about")))
    return 0
