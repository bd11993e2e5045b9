"""The document of the study log: all six pages of the reference beside ours, and which of their rows can be told apart."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import BASELINE
from ..ledger import Ledger, Run
from ..methods import get
from ..stats import CONFIDENCE, MIN_N, welch
from . import tables
from .reference import DEPARTURES, PAGES, SOURCE, Setting
from .study import NOTES, Finished, Study, accuracies, beside, logs, methods, of_method

ABOUT = f"""\
A [published log]({SOURCE}) of distillation, made again: students with a teacher of their own
architecture, ResNet-20 and ResNet-110 on CIFAR-10 and CIFAR-100, by each method that it reports. `{{again}}` trained what its ledger
did not have and wrote this page of all that the ledger has of these settings; every figure leads to a run's number in the tables below,
and a number to its config and curve (`{{one}}`)."""

LOSSES = {
    "base": "nothing",
    "logits": "mean over images and features of (e_s - e_t)^2, e the pooled features that feed the classifier: the reference's own variant",
    "kd": "soft targets: T^2 KL(p_t || p_s) of the class probabilities softened by T = 4",
    "at": "sum over the three stages of the mean squared difference of attention maps, each normalised to length 1",
    "at+kd": "the terms of at and of kd",
    "fsp": "mean over three pairs of stages, images and entries of (G_teacher - G_student)^2, G the FSP matrix, by average pooling",
}
OTHER = "not in the reference: the terms of its parts, as above where they are there"

COLUMNS = (
    *("pair", "dataset", "method", "reference, best (n)", "ours, best (n)", "ours, last (n)", f"{CONFIDENCE:.0%} interval"),
    *("seconds", "its teacher's", "nepoch"),
)
TIMES = (
    f"{CONFIDENCE:.0%} interval: Student's, of the mean of last. seconds: training and evaluation of one run, in a cohort its equal share; "
    "the mean of the row, without set-up. its teacher's: the same of the teacher, which was trained before. A time is right where the "
    "machine did nothing else."
)

BASELINES = "- Its baselines are means of 3 runs. Ours are the teachers themselves, 2 unless the tables say otherwise."

APART = f"""\
Each line compares two rows: the difference of their means in points, Welch's {CONFIDENCE:.0%} interval of it, and the verdict: whether
that tells them apart (above, below) or not. The reference by the best epoch of its own single runs, which are listed below; ours by the
last epoch. Under {MIN_N} runs a side there is no interval and no verdict. Each line stands for itself: of 15 differences that are none,
about one looks like one by chance."""

LINES = ("rows", "reference, best", "its interval", "its verdict", "ours, last", "our interval", "our verdict")


def sections(_: Path, finished: Finished, ledger: Ledger) -> Mapping[str, str]:
    """What follows the head."""
    if not finished:
        return {"The rows": "No run has finished."}
    rows = tables.render(beside(finished, PAGES, ledger), "md", COLUMNS)
    return {
        "The rows": f"A row is trained on the cross-entropy and on the terms below, by these weights.\n\n{_losses(finished)}",
        "The reference beside ours": f"{NOTES} {TIMES}\n\n{rows}",
        "Which rows can be told apart": "\n\n".join([APART, *(_apart(setting, runs) for setting, runs in finished.items())]),
        "The reference's single runs": _singles(finished),
        "The log": logs(finished, lambda runs: [run for method in methods(runs, PAGES) for run in of_method(runs, method)]),
        "Departures from the reference": f"{DEPARTURES}\n{BASELINES}",
        "Reference": _papers(),
    }


def _losses(finished: Finished) -> str:
    runs = [run for of_setting in finished.values() for run in of_setting]
    rows = []
    for method in methods(runs, PAGES):
        weights = of_method(runs, method)[0].config["weights"]
        shown = ", ".join(f"{term} {weight:.4g}" for term, weight in weights.items())
        rows.append({"row": method, "beside the cross-entropy": LOSSES.get(method, OTHER), "weights": shown})
    return tables.render(rows, "md", ("row", "beside the cross-entropy", "weights"))


def _apart(setting: Setting, runs: Sequence[Run]) -> str:
    """Every pair of rows of a setting, by the reference's runs and by ours."""
    measured = {method: accuracies(of_method(runs, method), "last") for method in methods(runs, PAGES)}
    rows = []
    for first, second in itertools.combinations(dict.fromkeys([*PAGES, *measured]), 2):
        row = {"rows": f"{second} less {first}"}
        for columns, values in ((LINES[1:4], setting.runs), (LINES[4:], measured)):
            row |= dict(zip(columns, compared(values.get(second, ()), values.get(first, ())), strict=True))
        rows.append(row)
    label = setting.name if runs[0].dataset == setting.data else f"{setting.name} (data: {tables.markdown(runs[0].dataset)})"
    return f"### {label}\n\n{_fsp(setting)}\n\n{tables.render(rows, 'md', LINES)}"


def compared(values: Sequence[float], others: Sequence[float]) -> tuple[str, str, str]:
    """The difference of two rows' means, its interval, and whether that tells them apart: ``above``, ``below``, ``not apart``."""
    if not values or not others:
        return "-", "-", "-"
    value = f"{statistics.fmean(values) - statistics.fmean(others):+.2f}"
    difference = welch(values, others)
    if difference is None:
        return value, "-", f"none (n = {len(values)} and {len(others)})"
    verdict = "above" if difference.low > 0 else "below" if difference.high < 0 else "not apart"
    return value, f"{difference.low:+.2f} to {difference.high:+.2f}", verdict


def _fsp(setting: Setting) -> str:
    """What the reference's own runs say of FSP, in a sentence."""
    verdicts = {method: compared(setting.runs["fsp"], setting.runs[method])[2] for method in PAGES if method != "fsp"}
    apart = [f"{verdict} {method}" for method, verdict in verdicts.items() if verdict in ("above", "below")]
    not_apart = [method for method, verdict in verdicts.items() if verdict == "not apart"]
    few = [method for method, verdict in verdicts.items() if verdict.startswith("none")]
    findings = [", ".join(apart) or "apart from nothing"]
    findings += [f"not told apart from {', '.join(not_apart)}"] if not_apart else []
    findings += [f"without a verdict beside {', '.join(few)} (2 runs)"] if few else []
    runs = setting.runs["fsp"]
    spread = f"Its three FSP runs lie {max(runs) - min(runs):.1f} points apart, and one took about {setting.minutes} minutes on its GPU."
    return f"By the reference's runs FSP is {'; '.join(findings)}. {spread}"


def _singles(finished: Finished) -> str:
    """The values that the verdicts on the reference are made of."""
    names = [setting.name for setting in finished]
    rows = [
        {"row": method} | {setting.name: " ".join(f"{value:.2f}" for value in setting.runs[method]) for setting in finished}
        for method in PAGES
    ]
    return f"Best epoch on test, percent of 9,984 images.\n\n{tables.render(rows, 'md', ('row', *names))}"


def _papers() -> str:
    papers = {method: get(method).paper for method in PAGES if method != BASELINE and "+" not in method}
    lines = [f"{name}: {p.authors}: *{p.title}*. {p.venue} {p.year}. {p.url}" for name, p in papers.items()]
    return "\n".join(f"- {line}" for line in [f"The log: {SOURCE}", *lines])


STUDY = Study("log", "The reference log, reproduced", ABOUT, tuple(page for page in PAGES if page != BASELINE), sections, free=True)
