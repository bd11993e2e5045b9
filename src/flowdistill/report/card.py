"""The compression card as one page: Markdown, or HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .. import advice
from ..env import version
from ..metrics import TOP
from ..talk import printable
from .by_class import CLASS, MATRIX_CLASSES, TRUE, class_rows, confusion_rows
from .tables import Row, code, markdown, pair, render

if TYPE_CHECKING:
    from ..runner.card import Card, Latency, Score

MEASURE, IMAGES = "measure", "images"
TEACHER, ALONE = "to teacher", "to alone"
OTHERS = {TEACHER: "teacher", ALONE: "student alone"}
COMMAND = f": {advice.command()} "  # before the words of an advised command
UNSTEADY = 2  # times the median
STYLE = """\
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --gain: #1a7f37; --loss: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --gain: #57d37b; --loss: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.summary { padding: .75rem 1rem; background: var(--soft); border-left: 4px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.gain { color: var(--gain); } .loss { color: var(--loss); }
li { overflow-wrap: anywhere; }"""


def page(card: Card, format_: str) -> str:
    """The card as ``md`` or ``html``."""
    return _html(card) if format_ == "html" else _markdown(card)


def _markdown(card: Card) -> str:
    columns = (MEASURE, *(column.role for column in card.columns))
    classes = _class_rows(card)
    parts = [
        f"# {markdown(_title(card))}",
        markdown(_summary(card)),
        render(_rows(card), "md", columns),
        "\n".join(f"- {_note(note)}" for note in _notes(card)),
        f"## Accuracy by class\n\n{markdown(_about_classes(card))}",
        render(classes, "md", tuple(classes[0])),
    ]
    for heading, about, rows in _more(card):
        parts += [f"## {heading}\n\n{markdown(about)}", render(rows, "md", tuple(rows[0]))]
    return "\n\n".join(part for part in parts if part)


def _note(note: str) -> str:
    """A note; the command at its end stays as it is to be pasted."""
    text, advises, rest = note.partition(COMMAND)
    return f"{markdown(text)}: {code(advises.removeprefix(': ') + rest)}" if advises else markdown(note)


def _escape(text: str) -> str:
    return escape(printable(text))


def _html(card: Card) -> str:
    columns = (MEASURE, *(column.role for column in card.columns))
    classes = _class_rows(card)
    title = _escape(_title(card))
    summary = f'<p class="summary">{_escape(_summary(card))}</p>\n' if _summary(card) else ""
    notes = "\n".join(f"<li>{_escape(note)}</li>" for note in _notes(card))
    more = "".join(
        f"<h2>{heading}</h2>\n<p>{_escape(about)}</p>\n{_html_table(rows, tuple(rows[0]))}\n" for heading, about, rows in _more(card)
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>{title}</h1>
{summary}{_html_table(_rows(card), columns)}
<ul>
{notes}
</ul>
<h2>Accuracy by class</h2>
<p>{_escape(_about_classes(card))}</p>
{_html_table(classes, tuple(classes[0]))}
{more}</body>
</html>"""


def _html_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{_escape(column)}</th>' for column in columns)
    body = "\n".join(f"<tr>{''.join(_cell(column, str(row[column])) for column in columns)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _cell(column: str, text: str) -> str:
    """A cell. A difference above zero is shown as a gain, one below as a loss."""
    if column in (MEASURE, CLASS, TRUE):
        return f'<th scope="row">{_escape(text)}</th>'
    sign = {"+": "gain", "-": "loss"}.get(text[:1]) if column in (TEACHER, ALONE) and text.strip("+-.0") else None
    return f'<td class="{sign}">{_escape(text)}</td>' if sign else f"<td>{_escape(text)}</td>"


def _title(card: Card) -> str:
    run = card.run
    return f"Compression card: run {run.no}, {run.method} {pair(run)} on {run.dataset}"


def _summary(card: Card) -> str:
    """The student in shares of the teacher's cost, and what it gains and loses; empty if there is nothing to compare with."""
    student, teacher, alone = card.student, card.column("teacher"), card.column("student alone")
    parts = []
    if teacher:
        shares = [
            f"{_share(student.parameters, teacher.parameters)} of the parameters",
            f"{_share(student.macs, teacher.macs)} of the MACs",
            f"{_share(student.file_bytes, teacher.file_bytes)} of the file",
            *(
                f"{_share(of_student.median, of_teacher.median)} of the latency at batch {of_student.batch_size}"
                for of_student, of_teacher in zip(student.latencies, teacher.latencies, strict=True)
            ),
        ]
        parts.append(f"Of its teacher the student has {', '.join(shares)}.")
    scores = {column.role: column.score for column in (teacher, alone) if column and column.score}
    gains = [f"{100 * (card.score.correct - score.correct) / card.images:+.2f} points to the {role}" for role, score in scores.items()]
    return " ".join([*parts, *([f"Accuracy: {', '.join(gains)}."] if gains else [])])


def _share(value: float, reference: float) -> str:
    return f"{100 * value / reference:.1f} %"


def _rows(card: Card) -> list[Row]:
    """One row per measure, one column per network."""
    rows: dict[str, list[str]] = {
        "network": [column.model for column in card.columns],
        "from": [column.origin for column in card.columns],
        "parameters": [f"{column.parameters:,}" for column in card.columns],
        "MACs an image": [f"{column.macs:,}" for column in card.columns],
        "file, bytes": [f"{column.file_bytes:,}" for column in card.columns],
    }
    for index, first in enumerate(card.columns[0].latencies):
        rows[f"latency at batch {first.batch_size}, ms"] = [_latency(column.latencies[index]) for column in card.columns]
    scores = [column.score for column in card.columns]
    rows["accuracy"] = [_counted(score.correct, card.images) if score else "-" for score in scores]
    rows["top-5"] = ["-" if score is None or score.figures.top5 is None else _counted(score.figures.top5, card.images) for score in scores]
    rows["macro-F1"] = [f"{score.figures.macro_f1:.2f} %" if score else "-" for score in scores]
    rows["balanced accuracy"] = [f"{score.figures.balanced_accuracy:.2f} %" if score else "-" for score in scores]
    if card.score.agreement:
        rows["same answer as the teacher"] = [_agreement(score) for score in scores]
        rows["... where both are wrong"] = [_agreement(score, wrong=True) for score in scores]
    rows["ECE"] = [f"{100 * score.calibration_error:.2f} %" if score else "-" for score in scores]
    rows["NLL"] = [f"{score.negative_log_likelihood:.4f}" if score else "-" for score in scores]
    roles = [column.role for column in card.columns]
    return [{MEASURE: name, **dict(zip(roles, cells, strict=True))} for name, cells in rows.items()]


def _latency(latency: Latency) -> str:
    return f"{latency.median:.2f} ({latency.p90:.2f})"


def _counted(count: int, images: int) -> str:
    return f"{100 * count / images:.2f} % ({count:,} of {images:,})" if images else "none"


def _agreement(score: Score | None, *, wrong: bool = False) -> str:
    if score is None or score.agreement is None:
        return "-"
    agreement = score.agreement
    return _counted(agreement.equal_wrong, agreement.both_wrong) if wrong else _counted(agreement.equal, agreement.images)


def _notes(card: Card) -> list[str]:
    run = card.run
    passes = ", ".join(f"{latency.passes} at batch {latency.batch_size}" for latency in card.student.latencies)
    notes = [
        f"Accuracy, calibration: all {card.images:,} test images in {run.precision}, the run's precision, normalised as in the run "
        f"({run.split} split).",
        f"Latency: a forward pass, eager fp32, channels_last, median (90th percentile) of the passes after warm-up ({passes}), networks "
        f"taking turns; {card.processor}, {card.device}, torch {card.torch}.",
        "MACs: multiply-accumulates of convolutions and matrix products, half of what torch.utils.flop_counter counts.",
        f"Top-5: the class is among the {TOP} most probable; - for {TOP} classes or fewer. Macro-F1, balanced accuracy: "
        f"means over the classes of F1, and of the share of their images that is right.",
        "ECE: expected calibration error, 15 bins of equal width. NLL: mean of -log p(label), in nats.",
    ]
    if any(latency.p90 > UNSTEADY * latency.median for column in card.columns for latency in column.latencies):
        notes.append(
            f"Unsteady latency (a 90th percentile over {UNSTEADY} times its median): time it again on a quiet machine; on a shared one "
            f"OMP_NUM_THREADS=1 steadies it."
        )
    notes += [
        f"{column.role} {column.model}: {column.other_classes}; its cost alone is compared." for column in card.columns if not column.score
    ]
    if run.correct is not None and card.score.correct != run.correct:
        notes.append(f"The record of run {run.no} says {run.correct:,} right: on {run.device}, torch {run.versions.get('torch')}.")
    notes += [card.advice] if card.advice else []
    notes += [card.unread] if card.unread and run.split == "holdout" else []
    compared = advice.summary(card.runs, holdout=run.split == "holdout")
    return [*notes, f"Made by flowdistill {version()}. One run a column, no spread; what compares methods: {compared}"]


def _more(card: Card) -> list[tuple[str, str, list[Row]]]:
    """Sections after the classes, those with rows: heading, what the rows are, rows."""
    few = len(card.class_names) <= MATRIX_CLASSES
    about = (
        "How many of a class's test images the student takes for each class."
        if few
        else "The student's most frequent ones, of the class's test images."
    )
    sections = [("Confusions", about, list[Row](confusion_rows(card.answers, card.class_names)))]
    if card.kept and card.kept.holdout:
        held_out = (
            "Of the student, as it was measured after training: on the test images, and on those held out of train, which chose its epoch."
        )
        sections.append(("Test and holdout by class", held_out, list[Row](_filled(class_rows(card.kept, card.class_names)))))
    return [section for section in sections if section[2]]


def _filled(rows: Sequence[Row]) -> list[Row]:
    return [{column: "-" if value is None else value for column, value in row.items()} for row in rows]


def _about_classes(card: Card) -> str:
    compared = [f"{name}: student less {role}" for name, role in OTHERS.items() if (other := card.column(role)) and other.score]
    return "Percent of the class's test images" + (f"; {', '.join(compared)}, in points." if compared else ".")


def _class_rows(card: Card) -> list[Row]:
    """One row per class: every network's accuracy, then what the student gains and loses."""
    scores = {column.role: column.score.class_correct for column in card.columns if column.score}
    others = {name: scores[role] for name, role in OTHERS.items() if role in scores}
    rows: list[Row] = []
    for label, (name, images) in enumerate(zip(card.class_names, card.class_images, strict=True)):
        row: dict[str, object] = {CLASS: name, IMAGES: f"{images:,}"}
        row |= {role: f"{100 * correct[label] / images:.2f}" if images else "-" for role, correct in scores.items()}
        for column, other in others.items():
            gain = card.score.class_correct[label] - other[label]
            row[column] = f"{100 * gain / images:+.2f}" if images else "-"
        rows.append(row)
    return rows
