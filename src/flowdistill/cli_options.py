"""Options that several commands have, and what help says of every option: its default, and examples of each command. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import advice
from .checks import MAX_WORKERS
from .config import DISTILLING, EngineName, PrecisionName
from .config_keys import KEYS
from .report import tables

DEFAULT = "Default: "


class Command(TyperCommand):
    """A command whose help says of each option and argument its default, in the parser's own words if nobody said it otherwise."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        for parameter in self.params:
            known: Any = parameter
            known.show_default = False  # the parser's way to say it
            if not known.required and not known.is_eager and DEFAULT not in (known.help or ""):
                known.help = f"{known.help} {DEFAULT}{_written(known.default)}."


def _written(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default) if isinstance(default, str | int | float | Path) else "none"


def command(
    group: typer.Typer, name: str | None = None, *, examples: tuple[str, ...]
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: file a function as a command of ``group``, with examples below its help.

    Args:
        name: of the command. Default: the function's.
        examples: what stands after ``flowdistill``, as one writes it into a shell.
    """
    return group.command(name, cls=Command, epilog=epilog(*examples))


def epilog(*examples: str) -> str:
    """What ends a help: commands, each on a line of its own."""
    return "\n".join(
        ["\b", "Examples:", *(f"  {advice.command(*shlex.split(example))}" for example in examples)]
    )  # \b: the parser keeps the lines


def of_key(key: str, *names: str, lead: str = "", more: str = "", default: str | None = None) -> Any:
    """An option that sets a key of the config: help is the key's description and its default.

    Args:
        names: of the option. Default: the parameter's, as a command has it.
        lead: a sentence before the description.
        more: a sentence after it.
        default: what holds if the option is left out. Default: the config's default, which the description says if it is no value.
    """
    described, _, own = KEYS[key].description.partition(DEFAULT)
    shown = default or own.rstrip(".") or KEYS[key].written_default
    sentences = (lead, described.strip(), more, f"{DEFAULT}{shown}.")
    return typer.Option(*names, help=" ".join(filter(None, sentences)))


def _picture(path: Path | None) -> Path | None:
    """Refuse a file that no picture can be written to, before anything is read."""
    if path is not None:
        from .report import plots

        plots.format_of(path)
    return path


RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the ledger and of every run's files.")]
SourceOption = Annotated[Path, typer.Option("--runs", help=f"Folder of runs, or a file of {advice.command('ledger', 'export')}.")]
ProtocolOption = Annotated[
    tables.Protocol, typer.Option(help="Which accuracy: of the last epoch, of the best on test, or of the epoch that the holdout chose.")
]
MetricOption = Annotated[tables.MetricName, typer.Option(help="Which figure; top1 is the accuracy.")]
FormatOption = Annotated[tables.Format, typer.Option("--format", help="How to print.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", callback=_picture, help="Also draw curves, or the summary, to this file, .svg or .png.")
]
DatasetOption = Annotated[str | None, of_key("data.name")]
LimitTrainOption = Annotated[int | None, of_key("data.limit_train")]
UnlabelledOption = Annotated[str | None, of_key("data.unlabelled")]
StudentOption = Annotated[str | None, of_key("student")]
TeacherOption = Annotated[str | None, of_key("teacher", more="A comma separates teachers, each of which has runs of its own.")]
MethodOption = Annotated[
    str | None, of_key("method", more="A comma separates methods, each of which has runs of its own.", default=DISTILLING)
]
ProbeOption = Annotated[bool, of_key("probe", "--probe", default="off")]
SeedsOption = Annotated[
    str | None, of_key("seed", more="Numbers and ranges such as 0-2,5, both ends included; each seed has a run of its own.")
]
EpochsOption = Annotated[int | None, of_key("train.epochs")]
LrOption = Annotated[float | None, of_key("train.lr")]
BatchSizeOption = Annotated[int | None, of_key("train.batch_size")]
LabelSmoothingOption = Annotated[float | None, of_key("train.label_smoothing")]
PrecisionOption = Annotated[PrecisionName | None, of_key("train.precision")]
InitFromOption = Annotated[str | None, of_key("init_from")]
FreezeOption = Annotated[str | None, of_key("train.freeze", default="none")]
HoldoutOption = Annotated[bool, of_key("split", "--holdout", lead="Set split=holdout.", default="off")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or mps. auto is cuda, else mps, else cpu.")]
EngineOption = Annotated[EngineName, typer.Option(help="How steps are computed. auto is the best for this device and length of run.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=MAX_WORKERS, help="Number of processes per seed that decode streamed images. Default: one per core, at most 8."
    ),
]
DeterministicOption = Annotated[bool, typer.Option("--deterministic", help="Use only operations that repeat bit for bit.")]
AcceptOption = Annotated[
    bool, typer.Option("--accept-changes", help="Take files, code and libraries as they are, even if they are not what was recorded.")
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-code", help="Run code that a file names as its network, even if neither this command nor your trainings did."),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        help="Train only part i of n of the plan, such as 2/5, into RUNS/shards/2-of-5. slurm takes the part of this array task. "
        "Default: the whole plan."
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", help="Train by the workers of a Ray cluster: local, auto or HOST:PORT. Default: none, this process trains."),
]
StorageOption = Annotated[
    Path | None,
    typer.Option(help="With --ray: folder that all workers see, for what another worker goes on with. Default: RUNS/storage."),
]
LogOption = Annotated[
    str | None,
    typer.Option("--log", help="Show each run in tensorboard, wandb or csv too, while it is trained. Commas separate several."),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Train even what the ledger has already.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config, the taps and a time estimate; train nothing.")]
RatesOption = Annotated[bool, typer.Option("--rates", help="Try a hundred learning rates on a copy of each student, and propose one.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Config to start from: a TOML file, or a run's run.json. Options win over it.")
]
RecipeOption = Annotated[
    str | None, typer.Option(help=f"Recipe by name; {advice.command('recipes')} lists them. What is given beside it wins.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help=f"Set any key, such as train.clip=1 or options.fsp.pool=avg; may be given again. {advice.command('config')} lists the keys.",
    ),
]
