"""The log table, the summary table and listings, in table, md, csv or json."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rich.cells import cell_len, set_cell_size

from .. import advice
from ..checks import UserError, defused
from ..config import each_network
from ..ledger import Run, baseline_key, flattened, is_baseline, newest
from ..metrics import TOP
from ..stats import CONFIDENCE, MIN_N, Difference, sample_std, welch
from ..talk import printable

Row = Mapping[str, Any]

LOG_COLUMNS = ("no", "method", "dataset", "student", "teacher", "start_time", "acc", "epoch", "nepoch", "lr", "batch_size")
Protocol = Literal["last", "best", "holdout"]
MetricName = Literal["top1", "top5", "macro-f1", "balanced-accuracy"]
Format = Literal["table", "md", "csv", "json"]

PROTOCOLS: dict[str, str] = {
    "last": "last epoch of full runs on test; nothing is selected",
    "best": "best epoch of full runs on test, chosen by looking at test; only to compare with papers that did so",
    "holdout": "test read once for the epoch that the held-out tenth of train chose; holdout runs",
}


@dataclass(frozen=True)
class Reading:
    """A run's accuracy under a protocol."""

    accuracy: float
    epoch: int


def read(run: Run, protocol: str) -> Reading | None:
    """What a protocol reads of a run; None for a run that it does not cover."""
    covered = run.status == "finished" and (run.split == "holdout") == (protocol == "holdout")
    correct, epoch = (run.best_correct, run.best_epoch) if protocol == "best" else (run.correct, run.epoch)
    if not covered or correct is None or epoch is None or not run.images:
        return None
    return Reading(100 * correct / run.images, epoch)


@dataclass(frozen=True)
class Metric:
    """A figure that tables show.

    Attributes:
        column: heading of its column.
        meaning: what it is, as the words before the protocol.
        of: the figure of a run, in percent; None if it has none.
    """

    column: str
    meaning: str
    of: Callable[[Run, Reading], float | None]


TOP1 = "top1"
METRICS: dict[str, Metric] = {
    TOP1: Metric("acc", "", lambda _, reading: reading.accuracy),
    "top5": Metric("top5", "images whose class is among the five most probable, in percent; ", lambda run, _: run.top5_accuracy),
    "macro-f1": Metric("macro-f1", "mean of F1 over the classes, in percent; ", lambda run, _: run.macro_f1),
    "balanced-accuracy": Metric(
        "balanced-accuracy",
        "mean over the classes of the share of their images that is right, in percent; ",
        lambda run, _: run.balanced_accuracy,
    ),
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, with what the protocol reads of each, and a metric of it."""

    runs: tuple[Run, ...]
    readings: tuple[Reading, ...]
    metric: Metric = METRICS[TOP1]

    @cached_property
    def figures(self) -> list[float | None]:
        """The metric of each run in percent; None if it is not on record."""
        return [self.metric.of(run, reading) for run, reading in zip(self.runs, self.readings, strict=True)]

    @cached_property
    def values(self) -> list[float]:
        """The figures that are on record."""
        return [figure for figure in self.figures if figure is not None]

    @cached_property
    def mean(self) -> float | None:
        """Mean of the values; None if there is none."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def lacking(self) -> list[Run]:
        """The runs that an older version recorded without this figure."""
        return [run for run, figure in zip(self.runs, self.figures, strict=True) if figure is None and run.macro_f1 is None]

    @property
    def first(self) -> Run:
        """A run that stands for all: everything but seed, number and outcome is the same."""
        return self.runs[0]


def group(runs: Sequence[Run], protocol: str, metric: str = TOP1) -> list[Group]:
    """Finished runs, grouped by student, teacher, data, method and fingerprint, in order of first number. Of repeats the newest counts.

    Raises:
        UserError: the protocol reads another epoch than the metric is on record for.
    """
    if metric != TOP1 and protocol == "best":
        raise UserError(
            f"--metric {metric} --protocol best: that epoch is the best by top-1, and top-1 alone is on record of it; "
            f"choose --protocol last, or --metric {TOP1}"
        )
    covered = [(run, reading) for run in runs if (reading := read(run, protocol))]
    readings = {id(run): reading for run, reading in covered}  # numbers are of one ledger, and these may be of several
    groups: dict[object, list[Run]] = {}
    for run in newest(run for run, _ in covered):
        groups.setdefault((run.student, run.teacher, run.dataset, run.method, run.fingerprint), []).append(run)
    return [Group(tuple(members), tuple(readings[id(run)] for run in members), METRICS[metric]) for members in groups.values()]


def pair(run: Run) -> str:
    """``ResNet110>>20`` (teacher>>student), ``ResNet110>>VGG8`` across families, ``ResNet20+ResNet56>>20`` of two teachers together,
    ``ResNet20`` without a teacher. A library's or a file's network stands as it is named.
    """
    student = _display(run.student)
    if run.teacher == "-":
        return student
    teacher = "+".join(map(_display, each_network(run.teacher)))
    split = [re.fullmatch(r"([^\d:]+)(\d[^:]*)", name) for name in (teacher, student)]
    same_family = split[0] and split[1] and split[0][1] == split[1][1]
    return f"{teacher}>>{split[1][2] if same_family and split[1] else student}"


FAMILIES = {"resnet": "ResNet", "vgg": "VGG", "wrn": "WRN", "mobilenetv": "MobileNetV", "shufflenetv": "ShuffleNetV"}


def _display(model: str) -> str:
    if ":" in model:
        return model
    family = re.match(r"[a-z]*", model)[0]  # type: ignore[index]
    return FAMILIES.get(family, family.capitalize()) + model[len(family) :]


def headings(groups: Sequence[Group]) -> list[str]:
    """``ResNet20>>20/Cifar10 (92.0)``, with what differs added if two groups would read alike."""
    plain = [f"{pair(group.first)}/{group.first.dataset[:1].upper()}{group.first.dataset[1:]}" for group in groups]
    methods, variants = defaultdict[str, set[str]](set), defaultdict[tuple[str, str], set[str]](set)
    for group_, name in zip(groups, plain, strict=True):
        methods[name].add(group_.first.method)
        variants[name, group_.first.method].add(group_.first.variant)
    alike = [(name, g.first.method, g.first.variant) for g, name in zip(groups, plain, strict=True)]
    keys, names = _differing([g.first for g in groups], alike), []
    for group_, name, differs in zip(groups, plain, keys, strict=True):
        run = group_.first
        notes = [run.method] if len(methods[name]) > 1 else []
        notes += [run.variant or "defaults"] if len(variants[name, run.method]) > 1 else []
        names.append(" ".join([name, *([", ".join([*notes, *differs])] if notes or differs else [])]))
    times = Counter(names)
    names = [f"{name} fingerprint {g.first.fingerprint[:8]}" if times[name] > 1 else name for name, g in zip(names, groups, strict=True)]
    means = ["-" if group_.mean is None else f"{group_.mean:.1f}" for group_ in groups]
    return [f"{name} ({mean})" for name, mean in zip(names, means, strict=True)]


def _differing(runs: Sequence[Run], alike: Sequence[object]) -> list[list[str]]:
    """For each run the keys of its config, with their values, in which the runs that are ``alike`` differ from each other."""
    flat = [flattened(run.config) for run in runs]
    among = defaultdict[object, list[dict[str, Any]]](list)
    for values, kind in zip(flat, alike, strict=True):
        among[kind].append(values)
    keys = {kind: _several(members) for kind, members in among.items()}
    return [[f"{key}={values.get(key)}" for key in keys[kind]] for values, kind in zip(flat, alike, strict=True)]


def _several(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that have several values."""
    keys = {key for values in flat for key in values} - {"seed", "data.root"}
    return sorted(key for key in keys if len({repr(values.get(key)) for values in flat}) > 1)


def log_columns(metric: Metric) -> tuple[str, ...]:
    """The reference log's columns, with that of the metric where it has the accuracy."""
    return tuple(metric.column if column == METRICS[TOP1].column else column for column in LOG_COLUMNS)


def log_rows(group_: Group) -> list[Row]:
    """The reference log's columns for one group; the metric's is a number, None if it is not on record."""
    return [
        {
            "no": run.no,
            "method": run.method,
            "dataset": run.dataset,
            "student": run.student,
            "teacher": run.teacher,
            "start_time": run.started.replace("T", "/").replace(":", "-"),
            group_.metric.column: figure,
            "epoch": reading.epoch,
            "nepoch": run.nepoch,
            "lr": run.lr,
            "batch_size": run.batch_size,
        }
        for run, reading, figure in zip(group_.runs, group_.readings, group_.figures, strict=True)
    ]


def log_table(runs: Sequence[Run], protocol: str, format_: str, metric: str = TOP1) -> str:
    """A heading and a table for each group; csv and json are one flat list with the protocol and the metric in every row."""
    groups, column = group(runs, protocol, metric), METRICS[metric].column
    columns = log_columns(METRICS[metric])
    if format_ in ("csv", "json"):
        rows = [
            {**row, column: _rounded(row[column], format_), "group": title, **_stamp(group_, protocol, metric)}
            for group_, title in zip(groups, headings(groups), strict=True)
            for row in log_rows(group_)
        ]
        return render(rows, format_, (*columns, "group", *STAMP_COLUMNS))
    parts, prose = [], markdown if format_ == "md" else printable
    for group_, title in zip(groups, headings(groups), strict=True):
        stamp = f"{column}, epoch: {group_.metric.meaning}{PROTOCOLS[protocol]}; {_images(group_)}; {_teachers(group_)}"
        stamp += "".join(f"; {remark}" for remark in _unread([group_]))
        variant = f"; {group_.first.method} {group_.first.variant}" if group_.first.variant else ""
        head = f"### {prose(title)}\n\n{prose(f'{stamp}{variant}')}"
        rows = [{**row, column: _rounded(row[column], format_)} for row in log_rows(group_)]
        parts.append(f"{head}\n\n{render(rows, format_, columns)}")
    return "\n\n".join(parts)


def _rounded(figure: float | None, format_: str) -> Any:
    """A figure with the five digits of the reference log."""
    if figure is None:
        return "-" if format_ in ("table", "md") else None
    return round(figure, 5) if format_ == "json" else f"{figure:.5f}"


def _unread(groups: Sequence[Group]) -> list[str]:
    """Why figures of these groups are missing, as the parts of a phrase."""
    column = groups[0].metric.column if groups else ""
    lacking = [str(run.no) for group_ in groups for run in group_.lacking]
    remarks = []
    if lacking:
        named = ", ".join(lacking[:10]) + (f" and {len(lacking) - 10:,} more" if len(lacking) > 10 else "")
        how = advice.command("evaluate", "RUN")
        remarks.append(f"{column} -: an older version recorded run{'s' if len(lacking) > 1 else ''} {named} without it; {how} measures it")
    if any(figure is None and run.macro_f1 is not None for g in groups for run, figure in zip(g.runs, g.figures, strict=True)):
        remarks.append(f"{column} -: says nothing of {TOP} classes or fewer")
    return remarks


STAMP_COLUMNS = ("protocol", "metric", "variant", "images", "teachers")


def _stamp(group_: Group, protocol: str, metric: str) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "metric": metric,
        "variant": group_.first.variant,
        "images": group_.first.images,
        "teachers": _teachers(group_),
    }


def _images(group_: Group) -> str:
    return f"{group_.first.images:,} images"


def _teachers(group_: Group) -> str:
    if group_.first.teacher == "-":
        return "no teacher"
    if (together := sum(role.startswith("teacher") for role in group_.first.networks or {})) > 1:
        return f"{together} together"
    count = len({run.teacher_run for run in group_.runs})
    return "one teacher" if count == 1 else f"{count} teachers"


def summary_rows(runs: Sequence[Run], protocol: str, only: Mapping[str, str] | None = None, metric: str = TOP1) -> list[dict[str, Any]]:
    """One row per group: mean, sample standard deviation, n, and the difference to ``base`` with its Welch interval. Runs without the
    figure do not count.

    ``only`` (column -> value) chooses rows; the baselines they are compared with may be others.
    """
    groups = group(runs, protocol, metric)
    return _summaries(groups, _chosen(groups, only), protocol, metric)


def _chosen(groups: Sequence[Group], only: Mapping[str, str] | None) -> list[Group]:
    return [g for g in groups if all(getattr(g.first, column) == value for column, value in (only or {}).items())]


def _summaries(groups: Sequence[Group], shown: Sequence[Group], protocol: str, metric: str) -> list[dict[str, Any]]:
    bases = {baseline_key(g.first): g for g in reversed(groups) if is_baseline(g.first)}
    alike = [(g.first.method, g.first.variant, pair(g.first), g.first.dataset) for g in shown]
    rows = []
    for group_, differs in zip(shown, _differing([g.first for g in shown], alike), strict=True):
        base = None if is_baseline(group_.first) else bases.get(baseline_key(group_.first))
        reference = base.values if base else []
        rows.append(
            {
                "method": group_.first.method,
                "variant": group_.first.variant,
                "pair": pair(group_.first),
                "dataset": group_.first.dataset,
                "split": group_.first.split,
                "nepoch": group_.first.nepoch,
                "lr": group_.first.lr,
                "batch_size": group_.first.batch_size,
                "precision": group_.first.precision,
                "fingerprint": group_.first.fingerprint,
                "differs": ", ".join(differs),
                "mean": group_.mean,
                "std": sample_std(group_.values),
                "n": len(group_.values),
                "values": group_.values,
                "base": statistics.fmean(reference) if reference else None,
                "difference": welch(group_.values, reference) if reference else None,
                "teachers": _teachers(group_),
                "images": group_.first.images,
                "protocol": protocol,
                "metric": metric,
            }
        )
    return rows


def summary_table(runs: Sequence[Run], protocol: str, format_: str, only: Mapping[str, str] | None = None, metric: str = TOP1) -> str:
    """The summary. With fewer than three runs a side it shows the values alone, without interval or verdict."""
    groups, column = group(runs, protocol, metric), METRICS[metric].column
    shown = _chosen(groups, only)
    rows = _summaries(groups, shown, protocol, metric)
    if format_ == "json":
        return render([_plain(row) for row in rows], "json", ())
    if format_ == "csv":
        flat = [{k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in _plain(row).items()} for row in rows]
        return render(flat, "csv", tuple(flat[0]) if flat else ())
    notes = (
        f"{column}: {METRICS[metric].meaning}{PROTOCOLS[protocol]}. Mean +- sample std (n seeds), in percent; to base: difference of the "
        f"means in points, with Welch's {CONFIDENCE:.0%} interval; detectable: the smallest difference that this n and spread can show "
        f"(half the interval). Fewer than {MIN_N} runs a side: the values alone."
    )
    notes += "".join(f" {remark}." for remark in _unread(shown))
    columns = ("method", "variant", "pair", "dataset", "nepoch", f"{column} (n)", "to base", "95 % interval", "detectable", "teacher")
    return f"{notes}\n\n{render([_shown(row) for row in rows], format_, columns)}"


def _plain(row: Row) -> dict[str, Any]:
    difference: Difference | None = row["difference"]
    empty = dict.fromkeys(Difference._fields)
    return {k: v for k, v in row.items() if k != "difference"} | (difference._asdict() if difference else empty)


def _shown(row: Row) -> Row:
    difference: Difference | None = row["difference"]
    few = row["n"] < MIN_N
    return {
        "method": row["method"],
        "variant": "; ".join(note for note in (row["variant"], row["differs"]) if note) or "-",
        "pair": row["pair"],
        "dataset": row["dataset"],
        "nepoch": row["nepoch"],
        f"{METRICS[row['metric']].column} (n)": (" ".join(f"{v:.2f}" for v in row["values"]) or "-")
        if few
        else f"{row['mean']:.2f} +- {row['std']:.2f} ({row['n']})",
        "to base": f"{difference.value:+.2f}" if difference else "-",
        "95 % interval": f"{difference.low:+.2f} to {difference.high:+.2f}" if difference else "-",
        "detectable": f"{difference.detectable:.2f}" if difference else "-",
        "teacher": row["teachers"],
    }


def render(rows: Sequence[Row], format_: str, columns: Sequence[str]) -> str:
    """Rows as a terminal table, Markdown, CSV or a JSON array of objects."""
    if format_ not in FORMATS:
        raise UserError(f"--format {format_!r}: choose from {', '.join(FORMATS)}")
    return FORMATS[format_](rows, columns)


def _as_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A cell is never cut or folded: a terminal may wrap a line, a pipe gets it whole."""
    lines = [[printable(_shown_as(cell)) for cell in line] for line in (columns, *([row[column] for column in columns] for row in rows))]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(set_cell_size, line, widths)).rstrip() for line in lines)


def _as_markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(markdown(_shown_as(cell)) for cell in cells)} |"

    body = [line([row[column] for column in columns]) for row in rows]
    return "\n".join([line(columns), line(["-" * max(len(column), 2) for column in columns]), *body])


SIGNS = re.compile(r"[\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_])")
"""What means something in the middle of a line of Markdown; an underscore in the middle of a word does not."""


def markdown(text: str) -> str:
    """A text as one line of Markdown that shows as it stands: it can't make HTML, a link or the end of a cell."""
    return SIGNS.sub(r"\\\g<0>", printable(text)).replace("&", "&amp;").replace("<", "&lt;")


def code(text: str) -> str:
    """A text as code in the middle of a line of Markdown."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {printable(text)} {fence}" if len(fence) > 1 else f"`{printable(text)}`"


def _as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([defused(printable(_shown_as(row[column]))) for column in columns] for row in rows)
    return buffer.getvalue().rstrip("\n")


def _shown_as(cell: Any) -> str:
    return "" if cell is None else str(cell)


def as_json(value: Any) -> str:
    """JSON of ASCII alone, without controls: what is not finite is null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False).replace("\x7f", "\\u007f")


def _as_json(rows: Sequence[Row], _: Sequence[str]) -> str:
    return as_json([dict(row) for row in rows])


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FORMATS: dict[str, Callable[[Sequence[Row], Sequence[str]], str]] = {
    "table": _as_table,
    "md": _as_markdown,
    "csv": _as_csv,
    "json": _as_json,
}
