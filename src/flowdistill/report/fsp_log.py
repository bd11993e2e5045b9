"""The document of the study fsp-log: the reference's FSP, AT and baselines beside ours, FSP against AT, the method and its matrices."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..ledger import Ledger, Run
from ..methods.fsp import fsp_matrix
from ..stats import CONFIDENCE, MIN_N, welch
from . import tables
from .matrices import draw
from .reference import DEPARTURES, Setting
from .study import NOTES, Finished, Study, accuracies, beside, logs, of_method

PICTURE = "matrices.png"
METHODS = ("base", "at", "fsp")

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

BASELINES = "- Its baselines are means of 3 runs. Ours are 2, the teachers themselves."

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


def sections(folder: Path, finished: Finished, ledger: Ledger) -> Mapping[str, str]:
    """What follows the head; the picture is written into the folder."""
    return {
        "The method": METHOD,
        "The reference beside ours": _beside(finished, ledger),
        "FSP against AT": _against(finished),
        "The log: FSP students": logs(finished, lambda runs: of_method(runs, "fsp")),
        "The log: AT students and baselines": logs(finished, lambda runs: [*of_method(runs, "at"), *of_method(runs, "base")]),
        "The matrix": f"```python\n{inspect.getsource(fsp_matrix).strip()}\n```\n\n{_picture(folder, finished, ledger)}",
        "Departures from the reference": f"{DEPARTURES}\n{BASELINES}",
        "Reference": REFERENCE,
    }


def _beside(finished: Finished, ledger: Ledger) -> str:
    rows = beside(finished, METHODS, ledger)
    return f"{NOTES}\n\n{tables.render(rows, 'md', COLUMNS)}" if rows else "No run has finished."


def _against(finished: Finished) -> str:
    lines = [verdict(setting, runs) for setting, runs in finished.items()]
    return f"By the last epoch; the interval is Welch's {CONFIDENCE:.0%}.\n\n" + "\n".join(f"- {line}" for line in lines)


def verdict(setting: Setting, runs: Sequence[Run]) -> str:
    """FSP less AT in a sentence, with a verdict where there are runs enough, and the reference's own difference."""
    fsp, at = (accuracies(of_method(runs, method), "last") for method in ("fsp", "at"))
    figures = [setting.figure(method) for method in ("fsp", "at")]
    reference = f"The reference: {figures[0] - figures[1]:+.1f} ({figures[0]:.1f} and {figures[1]:.1f}, best epoch)."
    label = f"{setting.name}:" if runs[0].dataset == setting.data else f"{setting.name} (data: {tables.markdown(runs[0].dataset)}):"
    difference = welch(fsp, at)
    if difference is None:
        listed = [" ".join(f"{value:.2f}" for value in values) or "none" for values in (fsp, at)]
        return f"{label} FSP {listed[0]}, AT {listed[1]}: fewer than {MIN_N} runs a side, so no verdict. {reference}"
    verdict = "above AT" if difference.low > 0 else "below AT" if difference.high < 0 else "not distinguishable from AT"
    interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
    return f"{label} FSP less AT is {difference.value:+.2f} points ({interval}, n = {len(fsp)} and {len(at)}): {verdict}. {reference}"


def _picture(folder: Path, finished: Finished, ledger: Ledger) -> str:
    """The matrices of the first setting that has an FSP student and a baseline of one seed."""
    for runs in finished.values():
        for student in runs:
            alone = [run for run in runs if (run.method, run.seed) == ("base", student.seed)]
            if student.method == "fsp" and alone:
                shown = draw(folder / PICTURE, student, alone[0], ledger)
                return f"![FSP matrices of a teacher, its student and a network trained alone]({PICTURE})\n\n{shown}"
    return "No picture: no FSP student has finished."


STUDY = Study("fsp-log", "The FSP reference log, reproduced", ABOUT, ("fsp", "at"), sections, free=False)
