"""The document of the reference log: its figures beside ours, the tables of every run, the method and its matrices."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from .. import advice
from ..config import TrainConfig
from ..env import version
from ..ledger import Ledger, Run
from ..methods.fsp import fsp_matrix
from ..stats import CONFIDENCE, LEAST_N, sample_std, welch
from ..training.weights import write_whole
from . import tables
from .matrices import draw

DOCUMENT, PICTURE = "fsp-log.md", "matrices.png"
METHODS = ("base", "at", "fsp")


@dataclass(frozen=True)
class Setting:
    """A network on a data set of the reference log, with the log's figures: mean of 3, best epoch on 9,984 test images, percent."""

    model: str
    data: str
    base: float
    at: float
    fsp: float

    @property
    def name(self) -> str:
        """``resnet20-cifar10``."""
        return f"{self.model}-{self.data}"


SETTINGS = (
    Setting("resnet20", "cifar10", base=92.0, at=91.9, fsp=92.0),
    Setting("resnet20", "cifar100", base=67.6, at=68.4, fsp=68.0),
    Setting("resnet110", "cifar10", base=92.5, at=93.3, fsp=92.7),
    Setting("resnet110", "cifar100", base=71.6, at=72.6, fsp=72.8),
)

ABOUT = """\
A published log of FSP distillation, with attention transfer (AT) beside it, made again: teacher and student of one architecture, ResNet-20
and ResNet-110 on CIFAR-10 and CIFAR-100. `{again}` trained the runs that its ledger did not have and wrote this page;
every figure leads to a run's number in the tables below, and a number to its config and curve (`{one}`)."""

METHOD = """\
For two feature maps of one network, F1 with C channels and F2 with D, at the same height and width, the FSP matrix (flow of solution
procedure) holds the inner product of every channel of the first with every channel of the second. The student's matrices are pulled to the
teacher's while it learns the labels:

```
G[i, j] = 1/(H W) sum_{y,x} F1[i, y, x] F2[j, y, x]                     C x D, for each image
L_fsp   = 1/9 sum over three pairs of mean over images, i, j of (G_teacher - G_student)^2
loss    = cross-entropy + L_fsp
```

The pairs are stem-stage1, stage1-stage2 and stage2-stage3; the larger map of a pair is average-pooled to the smaller. What is matched is
how two layers go together. Attention transfer resembles it, but compares one map of the teacher with one of the student, by the mean of
the squared activations over the channels: where a layer is active, not how layers are related."""

DEPARTURES = """\
- Its teacher was never put in eval mode, so that its batch statistics drifted while it taught. Ours is in eval mode and frozen.
- Its stem was a 7x7 convolution with padding 1 (maps of 28, 14 and 7 pixels). Ours is the 3x3 of He et al. 2016 (32, 16 and 8).
- It dropped the last partial test batch and counted 9,984 of 10,000 images. We count every image.
- It picked the best epoch by looking at test. Here that is labelled `best`; `last` selects nothing.
- Its baselines are means of 3 runs. Ours are 2, the teachers themselves."""

REFERENCE = """\
J. Yim, D. Joo, J. Bae, J. Kim: *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning*. IEEE
Conference on Computer Vision and Pattern Recognition (CVPR), 2017.
https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

```bibtex
@inproceedings{yim2017gift,
  author    = {Yim, Junho and Joo, Donggyu and Bae, Jihoon and Kim, Junmo},
  title     = {A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2017}
}
```

Attention transfer: S. Zagoruyko, N. Komodakis: *Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer*. International Conference on Learning Representations (ICLR), 2017, arXiv:1612.03928."""

COLUMNS = ("pair", "dataset", "method", "reference, best (3)", "ours, best (n)", "ours, last (n)", "nepoch")


def write(folder: Path, found: Mapping[Setting, Sequence[Run]], ledger: Ledger) -> None:
    """Write the document and its picture of the runs found so far."""
    finished = {setting: [run for run in runs if run.status == "finished"] for setting, runs in found.items()}
    finished = {setting: runs for setting, runs in finished.items() if runs}
    failed = [run for runs in found.values() for run in runs if run.status != "finished"]
    commands = {"again": advice.command("reproduce", "fsp-log"), "one": advice.command("show", "NUMBER", runs=ledger.folder)}
    parts = [
        f"# The FSP reference log, reproduced\n\n{ABOUT.format(**commands)}\n\n{_head(finished, failed)}",
        f"## The method\n\n{METHOD}",
        f"## The reference beside ours\n\n{_beside(finished)}",
        f"## FSP against AT\n\n{_against(finished)}",
        f"## The log: FSP students\n\n{_log(finished, ('fsp',))}",
        f"## The log: AT students and baselines\n\n{_log(finished, ('at', 'base'))}",
        f"## The matrix\n\n```python\n{inspect.getsource(fsp_matrix).strip()}\n```\n\n{_picture(folder, finished, ledger)}",
        f"## Departures from the reference\n\n{DEPARTURES}",
        f"## Reference\n\n{REFERENCE}",
    ]
    write_whole(folder / DOCUMENT, ("\n\n".join(parts) + "\n").encode())


def _head(finished: Mapping[Setting, Sequence[Run]], failed: Sequence[Run]) -> str:
    """When, on what, with what; what is short, missing or failed."""
    runs = [run for of_setting in finished.values() for run in of_setting]
    lines = [f"Written {date.today().isoformat()} by flowdistill {version()}.", *(_made(runs) if runs else [])]
    lines += [
        f"In place of {setting.data}: {tables.markdown(own[0].dataset)}."
        for setting, own in finished.items()
        if own[0].dataset != setting.data
    ]
    lines += _shortened(runs)
    others = {run.teacher_run for run in runs if run.teacher_run} - {run.no for run in runs}
    lines += [f"Teachers other than the baselines here: run {', '.join(map(str, sorted(others)))}."] if others else []
    missing = [setting.name for setting in SETTINGS if setting not in finished]
    lines += [f"Not here yet: {', '.join(missing)}."] if missing else []
    lines += [f"Failed: run {run.no} ({run.method} {run.student} seed {run.seed}): {tables.markdown(run.error)}." for run in failed]
    return "\n".join(f"- {line}" for line in lines)


def _made(runs: Sequence[Run]) -> list[str]:
    spent = timedelta(seconds=round(sum((run.train_seconds or 0) + (run.eval_seconds or 0) for run in runs)))
    days = " to ".join(dict.fromkeys((min(run.started for run in runs)[:10], max(run.finished or run.started for run in runs)[:10])))
    made_by = ", ".join(f"{package} {_all(run.versions[package] for run in runs)}" for package in ("flowdistill", "torch"))
    return [
        f"{len(runs)} runs, {days}, on {_all(run.device for run in runs)}: {spent} (h:mm:ss) of training and evaluation; {made_by}.",
        f"Epochs {_all(run.nepoch for run in runs)}, SGD {_all(run.lr for run in runs)}, batch {_all(run.batch_size for run in runs)}, "
        f"{_all(run.precision for run in runs)}.",
    ]


def _all(values: Iterable[object]) -> str:
    """The different ones among them."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _shortened(runs: Sequence[Run]) -> list[str]:
    whole = TrainConfig().epochs
    short = [f"{run.nepoch} of {whole} epochs" for run in runs if run.nepoch != whole]
    limits = [run.config["data"].get("limit_train") for run in runs]
    short += [f"about {limit:,} training images" for limit in limits if limit]
    return [f"**A short run ({_all(short)}): not comparable to the reference.**"] if short else []


def _beside(finished: Mapping[Setting, Sequence[Run]]) -> str:
    """Every setting and method with the reference's figure; under three runs the values of ``last`` stand there alone."""
    rows = []
    for setting, runs in finished.items():
        for method in METHODS:
            if own := [run for run in runs if run.method == method]:
                best, last = (_accuracies(own, protocol) for protocol in ("best", "last"))
                few = len(own) < LEAST_N
                row = {"pair": tables.pair(own[0]), "dataset": own[0].dataset, "method": method, "nepoch": own[0].nepoch}
                row["reference, best (3)"] = f"{getattr(setting, method):.1f}"
                row["ours, best (n)"] = f"{statistics.fmean(best):.2f} ({len(own)})"
                spread = " ".join(f"{value:.2f}" for value in last) if few else f"{statistics.fmean(last):.2f} +- {sample_std(last):.2f}"
                row["ours, last (n)"] = f"{spread} ({len(own)})"
                rows.append(row)
    notes = (
        "Percent of the test images. best: the mean of every run's best epoch on test, as the reference read it (3 runs, 9,984 of "
        f"10,000 images). last: the last epoch, mean +- sample standard deviation; of fewer than {LEAST_N} runs the values alone."
    )
    return f"{notes}\n\n{tables.render(rows, 'md', COLUMNS)}" if rows else "No run has finished."


def _accuracies(runs: Sequence[Run], protocol: str) -> list[float]:
    return [reading.accuracy for run in runs if (reading := tables.read(run, protocol))]


def _against(finished: Mapping[Setting, Sequence[Run]]) -> str:
    lines = [_verdict(setting, runs) for setting, runs in finished.items()]
    return f"By the last epoch; the interval is Welch's {CONFIDENCE:.0%}.\n\n" + "\n".join(f"- {line}" for line in lines)


def _verdict(setting: Setting, runs: Sequence[Run]) -> str:
    """FSP less AT in a sentence, with a verdict where there are runs enough, and the reference's own difference."""
    fsp, at = (_accuracies([run for run in runs if run.method == method], "last") for method in ("fsp", "at"))
    theirs = f"The reference: {setting.fsp - setting.at:+.1f} ({setting.fsp:.1f} and {setting.at:.1f}, best epoch)."
    where = f"{setting.name}:" if runs[0].dataset == setting.data else f"{setting.name} (data: {tables.markdown(runs[0].dataset)}):"
    difference = welch(fsp, at)
    if difference is None:
        listed = [" ".join(f"{value:.2f}" for value in values) or "none" for values in (fsp, at)]
        return f"{where} FSP {listed[0]}, AT {listed[1]}: fewer than {LEAST_N} runs a side, so no verdict. {theirs}"
    verdict = "above AT" if difference.low > 0 else "below AT" if difference.high < 0 else "not distinguishable from AT"
    interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
    return f"{where} FSP less AT is {difference.value:+.2f} points ({interval}, n = {len(fsp)} and {len(at)}): {verdict}. {theirs}"


def _log(finished: Mapping[Setting, Sequence[Run]], methods: Sequence[str]) -> str:
    """For each setting the reference log's table, by ``best``, and under it the same runs by ``last``."""
    parts = []
    for runs in finished.values():
        for method in methods:
            own = [run for run in runs if run.method == method]
            parts += [tables.log_table(own, protocol, "md") for protocol in ("best", "last") if own]
            parts += [_taught(own)] if own and method != "base" else []
    return "\n\n".join(parts) or "No run has finished."


def _taught(students: Sequence[Run]) -> str:
    pairs = [f"{run.no} by {run.teacher_run} ({run.teacher_accuracy:.2f} %)" for run in students]
    return f"Taught: run {', '.join(pairs)}."


def _picture(folder: Path, finished: Mapping[Setting, Sequence[Run]], ledger: Ledger) -> str:
    """The matrices of the first setting that has an FSP student and a baseline of one seed."""
    for runs in finished.values():
        for student in runs:
            alone = [run for run in runs if (run.method, run.seed) == ("base", student.seed)]
            if student.method == "fsp" and alone:
                shown = draw(folder / PICTURE, student, alone[0], ledger)
                return f"![FSP matrices of a teacher, its student and a network trained alone]({PICTURE})\n\n{shown}"
    return "No picture: no FSP student has finished."
