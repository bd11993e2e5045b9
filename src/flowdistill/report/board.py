"""The time-to-accuracy board: which accuracy was reached, and what it cost, from ledgers and their exports."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import advice
from ..checks import UserError, regular_file
from ..config import BASELINE, RunConfig, scheme_of
from ..ledger import Run, flattened, newest
from ..ledger.exported import Export, Folder
from ..stats import CONFIDENCE, MIN_N, interval
from . import tables

COLUMNS = (
    *("dataset", "student", "method", "teacher", "epochs", "n", "accuracy", "95 % interval", "training s", "together", "set-up s"),
    *("teacher s", "in all s", "times", "hardware", "load", "commit", "command"),
)
TIMES = (
    "training s: seconds of training and evaluating one student, mean of the runs; of students that are trained together, in one process, "
    "each has an equal share, and together says how many there were. set-up s: from the command to the first step, of the whole process, "
    "and a student's share of compiling. teacher s: all that the teacher took, whole in every row though one teacher serves many students. "
    "in all s: the three together; - where a part is not on record. Times are the clock's. load: the most processes that wanted to compute "
    "in the minute before a run began, its own set-up among them; what came later is not recorded. estimated: the loop that a user would "
    "write, by the pace that bench measured of the method at its defaults. It was not trained: its accuracy is taken to be that of the "
    "same epochs here, and its evaluation is not counted."
)
BENCH_INPUT = [3, 32, 32]  # of the images that bench times


@dataclass(frozen=True)
class Entry:
    """A run with what a board shows of it.

    Attributes:
        teacher_seconds: what its teacher took, and that one's own teachers; None if no run says so.
        hardware: where its times were taken, and how it computed.
    """

    run: Run
    accuracy: float
    seconds: float
    setup: float
    teacher_seconds: float | None
    hardware: str
    processor: str
    input: Any


@dataclass(frozen=True)
class Pace:
    """A loop that ``bench`` timed.

    Attributes:
        pair: ``STUDENT <- TEACHER``; the teacher of a baseline is ``-``.
    """

    name: str
    method: str
    pair: str
    batch_size: int
    processor: str
    device: str
    images_per_second: float
    setup: float


def rows(
    sources: Iterable[Folder | Export], protocol: str, only: Mapping[str, str], paces: Sequence[Pace] = (), to: float | None = None
) -> list[dict[str, Any]]:
    """One row per group of finished runs that differ in their seed alone and were timed on one kind of hardware.

    In a data set the most accurate comes first.

    Args:
        only: column -> value that runs must have.
        paces: each adds an estimated row to every group with its pair, method, batch size, images and hardware.
        to: percent; only groups whose mean reaches it, and the fastest in all first. Default: all groups.
    """
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in _entries(sources, protocol):
        run = entry.run
        if all(getattr(run, column) == value for column, value in only.items()):
            key = (run.student, run.teacher, run.dataset, run.method, run.fingerprint, entry.hardware)
            groups.setdefault(key, []).append(entry)
    board = [row for group in groups.values() for row in (_row(group, protocol), *_estimated(group, protocol, paces))]
    if to is None:
        return sorted(board, key=lambda row: (row["dataset"], -row["mean"]))
    reached = [row for row in board if row["mean"] >= to]
    return sorted(reached, key=lambda row: (row["dataset"], row["all_seconds"] is None, row["all_seconds"], -row["mean"]))


def _entries(sources: Iterable[Folder | Export], protocol: str) -> list[Entry]:
    """The runs that a protocol covers. Of those that repeat one fingerprint and seed only the newest counts, whatever ledger it is in."""
    entries: dict[tuple[str, int], Entry] = {}
    for source in sources:
        listed = source.listing()
        by_number = {run.no: run for run in listed}
        for run in newest(run for run in listed if tables.read(run, protocol)):
            before = entries.get((run.fingerprint, run.seed))
            if before is None or before.run.started <= run.started:
                entries[run.fingerprint, run.seed] = _entry(run, protocol, by_number, source.about(run))
    return list(entries.values())


def _entry(run: Run, protocol: str, by_number: Mapping[int, Run], about: Mapping[str, Any]) -> Entry:
    reading = tables.read(run, protocol)
    assert reading is not None, "only such are asked for"
    processor = str(about.get("processor") or "processor not recorded")
    hardware = f"{processor}, {run.versions.get('cores', '?')} cores; {run.device}; {run.engine}, {run.precision}"
    times = _seconds(run), run.setup_seconds or 0.0, _teacher_seconds(run, by_number)
    return Entry(run, reading.accuracy, *times, hardware, processor, about.get("input"))


def _seconds(run: Run) -> float:
    return (run.train_seconds or 0.0) + (run.eval_seconds or 0.0)


def _teacher_seconds(run: Run, by_number: Mapping[int, Run]) -> float | None:
    """What a run's teacher took, with set-up and its own teacher; None if no finished run of the same ledger says so."""
    if run.teacher == "-":
        return 0.0
    teacher = by_number.get(run.teacher_run or 0)
    if teacher is None or teacher.no >= run.no or teacher.status != "finished":
        return None
    before = _teacher_seconds(teacher, by_number)
    return None if before is None or teacher.student_fingerprint else before + _seconds(teacher) + (teacher.setup_seconds or 0.0)


def _row(group: Sequence[Entry], protocol: str) -> dict[str, Any]:
    """The row of a group. Times are means over its runs."""
    first, accuracies = group[0].run, [entry.accuracy for entry in group]
    times = [entry.teacher_seconds for entry in group if entry.teacher_seconds is not None]
    teacher = statistics.fmean(times) if len(times) == len(group) else None
    measured = [entry.run.teacher_accuracy for entry in group if entry.run.teacher_accuracy is not None]
    row = {
        "dataset": first.dataset,
        "student": first.student,
        "method": first.method,
        "variant": first.variant,
        "teacher": first.teacher,
        "teacher_accuracy": statistics.fmean(measured) if measured else None,
        "epochs": first.nepoch,
        "n": len(group),
        "mean": statistics.fmean(accuracies),
        "interval": interval(accuracies),
        "values": accuracies,
        "protocol": protocol,
        "seconds": statistics.fmean(entry.seconds for entry in group),
        "together": sorted({entry.run.cohort_size for entry in group}),
        "setup_seconds": statistics.fmean(entry.setup for entry in group),
        "teacher_seconds": teacher,
        "times": "measured",
        "hardware": group[0].hardware,
        "load": max((float(load) for entry in group if (load := entry.run.versions.get("load"))), default=None),
        "commit": ", ".join(dict.fromkeys(_version(entry.run) for entry in group)),
        "command": _command([entry.run for entry in group]),
        "fingerprint": first.fingerprint,
    }
    return row | {"all_seconds": _in_all(row, began_elsewhere=bool(first.student_fingerprint))}


def _in_all(row: Mapping[str, Any], *, began_elsewhere: bool) -> float | None:
    """Seconds in all; None if a part is not known: what a teacher took, or what the weights that a student began from took."""
    parts = row["seconds"], row["setup_seconds"], row["teacher_seconds"]
    return None if began_elsewhere or None in parts else sum(parts)


def _version(run: Run) -> str:
    return f"{run.versions.get('flowdistill', '?')} {run.versions.get('commit', '')}".strip()


def _estimated(group: Sequence[Entry], protocol: str, paces: Sequence[Pace]) -> list[dict[str, Any]]:
    """Rows of timed loops, with the time that they would take for the epochs of this group. No run of theirs is known."""
    first, estimates = group[0].run, []
    images = statistics.fmean((entry.run.images_per_second or 0.0) * (entry.run.train_seconds or 0.0) for entry in group)
    for pace in paces:
        conditions = (pace.pair, pace.method, pace.batch_size, pace.processor, pace.device)
        if conditions != (f"{first.student} <- {first.teacher}", first.method, first.batch_size, group[0].processor, first.device):
            continue
        if group[0].input == BENCH_INPUT:
            row = _row(group, protocol) | {
                "n": 0,
                "interval": None,
                "values": [],
                "together": [1],
                "load": None,
                "commit": "",
                "command": "",
            }
            row |= {"method": pace.name, "variant": "", "seconds": images / pace.images_per_second, "setup_seconds": pace.setup}
            row |= {"times": "estimated from its measured pace", "hardware": f"{pace.processor}; {pace.device}"}
            estimates.append(row | {"all_seconds": _in_all(row, began_elsewhere=bool(first.student_fingerprint))})
    return estimates


def paces(path: Path) -> list[Pace]:
    """The plain loops that a file of ``bench --json`` timed: for each pair the fastest plain one and the fastest strong one.

    Raises:
        UserError: it is no such file.
    """
    label = f"--plain {path}"
    try:
        report = json.loads(regular_file(path, label).read_text(encoding="utf-8"))
        method, hardware = report["methods"][0], report["hardware"]
        timed = [
            Pace(
                str(row["loop"]),
                method,
                _worked_on(pair["pair"], method),
                report["batch_size"],
                hardware["cpu"],
                hardware["device"],
                *_times(row),
            )
            for pair in report["pairs"]
            for row in pair["rows"]
        ]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{label}: it is not what {advice.command('bench', '--json')} prints; give a file of that") from None
    best: dict[tuple[str, str], Pace] = {}
    for pace in timed:
        for kind in ("plain loop", "strong plain loop"):
            if pace.name.startswith(kind):
                best[pace.pair, kind] = max(best.get((pace.pair, kind), pace), pace, key=lambda loop: loop.images_per_second)
    return list(best.values())


def _worked_on(pair: str, method: str) -> str:
    """A pair as runs have it: a baseline has no teacher, whatever pair it was timed in."""
    return f"{pair.partition(' <- ')[0]} <- -" if method == BASELINE else pair


def _times(row: Mapping[str, Any]) -> tuple[float, float]:
    """A loop's pace and set-up.

    Raises:
        ValueError: they are no such numbers.
    """
    pace, setup = float(row["images/s"]), float(row["set-up s"])
    if not (pace > 0 and setup >= 0):
        raise ValueError(f"{pace} images/s")
    return pace, setup


def _command(runs: Sequence[Run]) -> str:
    """The command that trains these runs again, with every key that is not the default. Empty if the images came from Python."""
    first, config = runs[0], dict(runs[0].config)
    if config.get("side") == 2:  # the two are trained by one command, the first's
        config |= {"student": config["peer"], "peer": config["student"]}
    if (scheme := scheme_of(config["data"]["name"])) is not None and scheme.from_python:
        return ""
    config |= _beside_defaults(first)
    covered = {"student", "teacher", "method", "seed", "split", "side", "data.name"}
    defaults = flattened(RunConfig().model_dump(mode="json"))
    more = {key: value for key, value in sorted(flattened(config).items()) if key not in covered and value != defaults.get(key)}
    teacher = ["--teacher", config["teacher"]] if config.get("teacher") else []
    words = ["distill", "--method", first.method, "--student", config["student"], *teacher]
    if first.method == BASELINE:
        words = ["train", "--model", config["student"]]
    words += [
        "--dataset",
        config["data"]["name"],
        "--seeds",
        _ranges(sorted(run.seed for run in runs)),
        *["--holdout"] * (first.split == "holdout"),
    ]
    return advice.command(*words, *advice.sets(more), *["--deterministic"] * bool(first.deterministic))


def _beside_defaults(run: Run) -> dict[str, Any]:
    """The options and weights of a run that are not its method's defaults. Empty if the method is unknown here, so that all are given."""
    from ..methods import resolve

    options, weights = run.config.get("options", {}), run.config.get("weights", {})
    try:
        defaults = {name: values.model_dump(mode="json") for name, values in resolve(run.method, {}, {}).options.items()}
        default_weights = resolve(run.method, options, {}).weights
    except UserError:
        return {}
    changed = {name: {key: value for key, value in values.items() if value != defaults[name].get(key)} for name, values in options.items()}
    return {"options": changed, "weights": {term: value for term, value in weights.items() if value != default_weights.get(term)}}


def _ranges(numbers: Sequence[int]) -> str:
    """As ``--seeds`` reads them: 0-2,5."""
    parts = []
    for _, members in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        span = [number for _, number in members]
        parts.append(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]))
    return ",".join(parts)


def table(rows: Sequence[Mapping[str, Any]], protocol: str, format_: str, to: float | None = None) -> str:
    """The board; csv and json have every figure in full."""
    if format_ == "json":
        return tables.render(rows, "json", ())
    if format_ == "csv":
        flat = [
            {key: " ".join(map(str, value)) if isinstance(value, list | tuple) else value for key, value in row.items()} for row in rows
        ]
        return tables.render(flat, "csv", tuple(flat[0]) if flat else ())
    order = "the most accurate first" if to is None else f"those that reach {to:g} %, the fastest in all first"
    notes = (
        f"In each data set {order}. accuracy: {tables.PROTOCOLS[protocol]}; mean over n seeds, in percent, with Student's {CONFIDENCE:.0%} "
        f"interval; fewer than {MIN_N} runs: the mean alone. {TIMES}"
    )
    return f"{notes}\n\n{tables.render([_shown(row) for row in rows], format_, COLUMNS)}"


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    accuracy = f" ({row['teacher_accuracy']:.2f})" if row["teacher_accuracy"] is not None else ""
    estimated = row["times"] != "measured"
    return {
        "dataset": row["dataset"],
        "student": row["student"],
        "method": " ".join(filter(None, [row["method"], row["variant"]])),
        "teacher": f"{row['teacher']}{accuracy}",
        "epochs": row["epochs"],
        "n": row["n"] or "-",
        "accuracy": f"({row['mean']:.2f})" if estimated else f"{row['mean']:.2f}",
        "95 % interval": "{:.2f} to {:.2f}".format(*row["interval"]) if row["interval"] else "-",
        "training s": number(row["seconds"]),
        "together": ", ".join(map(str, row["together"])),
        "set-up s": number(row["setup_seconds"]),
        "teacher s": "-" if row["teacher"] == "-" else number(row["teacher_seconds"]),
        "in all s": number(row["all_seconds"]),
        "times": row["times"],
        "hardware": row["hardware"],
        "load": number(row["load"], 2),
        "commit": row["commit"] or "-",
        "command": row["command"] or "-",
    }


def refuse_other(path: Path, text: str) -> None:
    """Refuse a file that differs from what is printed now.

    Raises:
        UserError: it does; the message gives the first line that differs, and where.
    """
    lines = regular_file(path, f"--check {path}").read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, (written, printed) in enumerate(itertools.zip_longest(lines, text.split("\n"), fillvalue=""), 1):
        if written != printed:
            alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(written, printed, strict=False)))
            excerpts = [repr(line[max(0, alike - 20) : alike + 30]) for line in (written, printed)]
            raise UserError(
                f"{path} does not fit its ledger: line {number} has {excerpts[0]}, the ledger gives {excerpts[1]}; write it again"
            )
