"""What the documents of all studies of the reference log have in common: head, figures side by side, the log of every run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from .. import advice
from ..config import TrainConfig
from ..env import version
from ..ledger import Ledger, Run
from ..stats import CONFIDENCE, MIN_N, interval, sample_std
from ..training.weights import write_whole
from . import tables
from .reference import SETTINGS, Setting

Finished = Mapping[Setting, Sequence[Run]]
"""The finished runs of every setting that has any."""

TOLD = ("epochs", "lr", "batch_size", "precision")  # keys of ``train`` that the head says by themselves


@dataclass(frozen=True)
class Study:
    """A part of the reference log that can be trained again, and its document.

    Attributes:
        name: of the study, and of the document's file.
        title, about: how the document begins; ``{again}`` and ``{one}`` are the commands that made it and that show a run.
        rows: the methods that are trained, the baselines ``base`` not among them.
        sections: (folder of the document, finished runs, ledger) -> heading and text of what follows the head.
        free: whether other rows may be trained than ``rows``, by another recipe and other seeds.
    """

    name: str
    title: str
    about: str
    rows: tuple[str, ...]
    sections: Callable[[Path, Finished, Ledger], Mapping[str, str]]
    free: bool

    def document(self, folder: Path) -> Path:
        """Where it is written."""
        return folder / f"{self.name}.md"

    def write(self, folder: Path, all_runs: Mapping[Setting, Sequence[Run]], ledger: Ledger, command: str) -> None:
        """Write the document of the runs found so far; ``command`` is what asked for it."""
        finished = {setting: [run for run in runs if run.status == "finished"] for setting, runs in all_runs.items()}
        finished = {setting: runs for setting, runs in finished.items() if runs}
        failed = [run for runs in all_runs.values() for run in runs if run.status != "finished"]
        about = self.about.format(again=command, one=advice.command("show", "NUMBER", runs=ledger.folder))
        parts = [f"# {self.title}\n\n{about}\n\n{head(finished, failed)}"]
        parts += [f"## {heading}\n\n{text}" for heading, text in self.sections(folder, finished, ledger).items()]
        write_whole(self.document(folder), ("\n\n".join(parts) + "\n").encode())


def head(finished: Finished, failed: Sequence[Run]) -> str:
    """The head of a document: when and with what the runs were made, and what is short, missing or failed."""
    runs = [run for of_setting in finished.values() for run in of_setting]
    lines = [f"Written {date.today().isoformat()} by flowdistill {version()}.", *(_made(runs) if runs else [])]
    lines += [
        f"In place of {setting.data}: {tables.markdown(of_setting[0].dataset)}."
        for setting, of_setting in finished.items()
        if of_setting[0].dataset != setting.data
    ]
    lines += shortened(runs)
    others = {run.teacher_run for run in runs if run.teacher_run} - {run.no for run in runs}
    lines += [f"Teachers other than the baselines here: run {', '.join(map(str, sorted(others)))}."] if others else []
    missing = [setting.name for setting in SETTINGS if setting not in finished]
    lines += [f"Not here yet: {', '.join(missing)}."] if missing else []
    lines += [f"Failed: run {run.no} ({run.method} {run.student} seed {run.seed}): {tables.markdown(run.error)}." for run in failed]
    return "\n".join(f"- {line}" for line in lines)


def _made(runs: Sequence[Run]) -> list[str]:
    spent = timedelta(seconds=round(sum(map(seconds, runs))))
    days = " to ".join(dict.fromkeys((min(run.started for run in runs)[:10], max(run.finished or run.started for run in runs)[:10])))
    made_by = ", ".join(f"{package} {_all(run.versions[package] for run in runs)}" for package in ("flowdistill", "torch"))
    recipe = _recipe(runs)
    return [
        f"{len(runs)} runs, {days}, on {_all(run.device for run in runs)}: {spent} (h:mm:ss) of training and evaluation; {made_by}.",
        f"Epochs {_all(run.nepoch for run in runs)}, SGD {_all(run.lr for run in runs)}, batch {_all(run.batch_size for run in runs)}, "
        f"{_all(run.precision for run in runs)}, engine {_all(run.engine for run in runs)}.",
        *([f"Not by the reference's recipe: {recipe}."] if recipe else []),
    ]


def _recipe(runs: Sequence[Run]) -> str:
    """The keys of ``train`` that differ from the reference's, without those that the head gives by themselves."""
    usual = TrainConfig().model_dump(mode="json")
    other = (f"{k}={v}" for run in runs for k, v in run.config["train"].items() if k not in TOLD and v != usual.get(k))
    return ", ".join(dict.fromkeys(other))


def _all(values: Iterable[object]) -> str:
    """The distinct values, in order."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def shortened(runs: Sequence[Run]) -> list[str]:
    """One line that says what is missing of the reference's training; none if nothing is."""
    whole = TrainConfig().epochs
    short = [f"{run.nepoch} of {whole} epochs" for run in runs if run.nepoch != whole]
    limits = [run.config["data"].get("limit_train") for run in runs]
    short += [f"about {limit:,} training images" for limit in limits if limit]
    budget = _recipe(runs) and not any(limits)
    end = "the reference's figures are a goal here, not what the same training should give" if budget else "not comparable to the reference"
    return [f"**A short run ({_all(short)}): {end}.**"] if short else []


def seconds(run: Run) -> float:
    """Training and evaluation of a run; in a cohort its equal share of them."""
    return (run.train_seconds or 0) + (run.eval_seconds or 0)


def of_method(runs: Sequence[Run], method: str) -> list[Run]:
    """The runs of a method, by seed."""
    return sorted((run for run in runs if run.method == method), key=lambda run: run.seed)


def accuracies(runs: Sequence[Run], protocol: str) -> list[float]:
    """Percent, one per run that the protocol covers."""
    return [reading.accuracy for run in runs if (reading := tables.read(run, protocol))]


def methods(runs: Sequence[Run], first: Sequence[str]) -> list[str]:
    """The methods of the runs: those of ``first`` in its order, then the others as they were trained."""
    names = list(dict.fromkeys(run.method for run in sorted(runs, key=lambda run: run.no)))
    return [*(method for method in first if method in names), *(method for method in names if method not in first)]


NOTES = (
    "Percent of the test images. best: the mean of every run's best epoch on test, as the reference read it (9,984 of 10,000 "
    f"images). last: the last epoch, mean +- sample standard deviation; of fewer than {MIN_N} runs the values alone."
)


def beside(finished: Finished, first: Sequence[str], ledger: Ledger) -> list[dict[str, object]]:
    """One row per setting and method, with the reference's figure. With fewer than three runs ``last`` shows the values alone."""
    rows: list[dict[str, object]] = []
    for setting, runs in finished.items():
        for method in methods(runs, first):
            method_runs = of_method(runs, method)
            best, last = (accuracies(method_runs, protocol) for protocol in ("best", "last"))
            published, bounds = setting.runs.get(method), interval(last)
            few = len(method_runs) < MIN_N
            spread = " ".join(f"{value:.2f}" for value in last) if few else f"{statistics.fmean(last):.2f} +- {sample_std(last):.2f}"
            teachers = [ledger.run(no) for no in dict.fromkeys(run.teacher_run for run in method_runs) if no]
            rows.append(
                {
                    "pair": tables.pair(method_runs[0]),
                    "dataset": method_runs[0].dataset,
                    "method": method,
                    "reference, best (3)": f"{setting.figure(method):.1f}" if published else "-",
                    "reference, best (n)": f"{setting.figure(method):.1f} ({len(published)})" if published else "-",
                    "ours, best (n)": f"{statistics.fmean(best):.2f} ({len(method_runs)})",
                    "ours, last (n)": f"{spread} ({len(method_runs)})",
                    f"{CONFIDENCE:.0%} interval": f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else "-",
                    "seconds": f"{statistics.fmean(map(seconds, method_runs)):,.0f}",
                    "its teacher's": f"{statistics.fmean(map(seconds, teachers)):,.0f}" if teachers else "-",
                    "nepoch": method_runs[0].nepoch,
                }
            )
    return rows


def logs(finished: Finished, wanted: Callable[[Sequence[Run]], Sequence[Run]]) -> str:
    """For each setting the reference log's tables of its wanted runs, by ``best`` and then by ``last``."""
    parts = []
    for runs in finished.values():
        if chosen := wanted(runs):
            parts += [tables.log_table(chosen, protocol, "md") for protocol in ("best", "last")]
            parts += _teachers_of([run for run in chosen if run.teacher_run])
    return "\n\n".join(parts) or "No run has finished."


def _teachers_of(students: Sequence[Run]) -> list[str]:
    pairs = [f"{run.no} by {run.teacher_run} ({run.teacher_accuracy:.2f} %)" for run in students]
    return [f"Taught: run {', '.join(pairs)}."] if pairs else []
