"""Pictures of runs: their curves, and a summary as dots with intervals. They are transparent, so that they suit light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import UserError, joined, obstacle
from ..ledger import Epoch, Run
from ..stats import CONFIDENCE, Difference
from ..training.task import TASK
from ..training.weights import write_whole
from .tables import METRICS, PROTOCOLS, Row

if TYPE_CHECKING:
    import altair

FORMATS = ("svg", "png")
MOST_CURVES = 20  # a colour for each
WIDTH, HEIGHT, ROW = 480, 220, 34  # pixels of a panel, and of a row of the summary
GREY, BLUE = "#808080", "#4c8bc0"  # text and axes, and marks: legible on white and on black


def format_of(path: Path) -> str:
    """The format that a file's name asks for.

    Raises:
        UserError: it is neither svg nor png, or nothing can be written there.
    """
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise UserError(f"--plot {path}: the name must end in {joined([f'.{name}' for name in FORMATS], 'or')}")
    if hindrance := obstacle(path):
        raise UserError(f"--plot {path}: it cannot be written there ({hindrance}); name another file")
    return suffix


def draw_curves(path: Path, curves: Sequence[tuple[Run, Sequence[Epoch]]]) -> None:
    """Draw accuracy and each term of the loss after each epoch, a line for each run.

    Args:
        path: of the file, .svg or .png.
        curves: runs, each with its epochs. Those without an epoch are left out. Terms are means over an epoch's steps, unweighted.

    Raises:
        UserError: as ``format_of``; no run has an epoch; or there are more runs than can be told apart.
    """
    import altair

    suffix = format_of(path)
    shown = [(run, epochs) for run, epochs in curves if epochs]
    if not shown:
        raise UserError(f"--plot {path}: no run here has an epoch to draw; leave it out, or choose other runs")
    if len(shown) > MOST_CURVES:
        raise UserError(f"--plot {path}: {len(shown):,} curves; at most {MOST_CURVES} can be told apart; choose by --method, --student")
    names = [_name(run) for run, _ in shown]
    panels = []
    accuracies = [
        _point(run, epoch, 100 * epoch.correct / epoch.images) for run, epochs in shown for epoch in epochs if epoch.correct is not None
    ]
    if accuracies:
        measured_on = sorted({_images(run) for run, epochs in shown if any(epoch.correct is not None for epoch in epochs)})
        panels.append(_lines(accuracies, f"accuracy, % of the {joined(measured_on, 'or')} images", names))
    for term in sorted({term for _, epochs in shown for epoch in epochs for term in epoch.terms}, key=lambda term: (term != TASK, term)):
        points = [_point(run, epoch, epoch.terms[term]) for run, epochs in shown for epoch in epochs if term in epoch.terms]
        panels.append(_lines(points, f"{term}, mean over the epoch", names))
    _write(path, suffix, altair.vconcat(*panels, spacing=24))


def draw_summary(path: Path, rows: Sequence[Row]) -> None:
    """Draw a summary: a dot for each run, a bar at the mean, and beside it the difference to ``base`` with its Welch interval.

    Args:
        path: of the file, .svg or .png.
        rows: as ``tables.summary_rows`` gives them.

    Raises:
        UserError: as ``format_of``, or no row has a figure.
    """
    import altair

    suffix = format_of(path)
    shown = [row for row in rows if row["values"]]
    if not shown:
        raise UserError(f"--plot {path}: no run here has this figure; leave it out, or choose other runs")
    names = _row_names(shown)
    rank = altair.Y("row:N", sort=names, title=None, axis=altair.Axis(labelLimit=400))
    metric, protocol = METRICS[shown[0]["metric"]], shown[0]["protocol"]
    dots = [{"row": name, "value": value} for name, row in zip(names, shown, strict=True) for value in row["values"]]
    means = [{"row": name, "value": row["mean"]} for name, row in zip(names, shown, strict=True)]
    across = altair.X("value:Q", title=f"{metric.column}, %", scale=altair.Scale(zero=False, padding=12))
    left = altair.layer(
        altair.Chart(altair.InlineData(values=means), width=WIDTH, height=ROW * len(shown))
        .mark_tick(thickness=3, size=20, color=GREY)
        .encode(x=across, y=rank),
        altair.Chart(altair.InlineData(values=dots)).mark_circle(size=60, opacity=0.8, color=BLUE).encode(x=across, y=rank),
    ).properties(title=altair.TitleParams("each run, and the mean", subtitle=PROTOCOLS[protocol], anchor="start"))
    differences: list[tuple[str, Difference]] = [
        (name, row["difference"]) for name, row in zip(names, shown, strict=True) if row["difference"]
    ]
    _write(path, suffix, altair.hconcat(left, _intervals(differences, names), spacing=30) if differences else left)


def _intervals(differences: Sequence[tuple[str, Difference]], names: Sequence[str]) -> altair.LayerChart | altair.FacetChart:
    """The differences to ``base``, each with its interval, and a line at none."""
    import altair

    values = [{"row": name, "value": each.value, "low": each.low, "high": each.high} for name, each in differences]
    rank = altair.Y("row:N", sort=list(names), title=None, axis=None, scale=altair.Scale(domain=list(names)))
    data = altair.Chart(altair.InlineData(values=values), width=WIDTH // 2, height=ROW * len(names))
    title = "difference to base, points"
    zero = altair.Chart(altair.InlineData(values=[{"zero": 0}])).mark_rule(color=GREY, strokeDash=[4, 4]).encode(x="zero:Q")
    bars = data.mark_rule(strokeWidth=2, color=BLUE).encode(x=altair.X("low:Q", title=title), x2="high:Q", y=rank)
    dots = data.mark_circle(size=60, opacity=1, color=BLUE).encode(x=altair.X("value:Q", title=title), y=rank)
    return altair.layer(zero, bars, dots).properties(title=altair.TitleParams(f"Welch {CONFIDENCE:.0%} interval", anchor="start"))


def _row_names(rows: Sequence[Row]) -> list[str]:
    """A name for each row that no other has: method, variant and pair, and what else it takes."""
    parts = ("method", "variant", "pair", "dataset", "nepoch", "differs", "fingerprint")
    for count in range(3, len(parts) + 1):
        names = [" ".join(str(row[part]) for part in parts[:count] if row[part] not in ("", None)) for row in rows]
        if len(set(names)) == len(names):
            break
    return names


def _name(run: Run) -> str:
    return f"run {run.no}: {run.method} {run.student}, seed {run.seed}"


def _images(run: Run) -> str:
    return "held-out" if run.split == "holdout" else "test"


def _point(run: Run, epoch: Epoch, value: float) -> dict[str, Any]:
    return {"run": _name(run), "epoch": epoch.epoch, "value": value}


def _lines(points: Iterable[dict[str, Any]], title: str, names: Sequence[str]) -> altair.Chart:
    """A panel: one line for each run, in the colour that it has in every panel."""
    import altair

    colour = altair.Color(
        "run:N",
        title=None,
        sort=list(names),
        scale=altair.Scale(domain=list(names), scheme="tableau10" if len(names) <= 10 else "tableau20"),
    )
    chart: altair.Chart = (
        altair.Chart(altair.InlineData(values=list(points)), width=WIDTH, height=HEIGHT, title=altair.TitleParams(title, anchor="start"))
        .mark_line(point=altair.OverlayMarkDef(size=16), strokeWidth=1.5)
        .encode(
            x=altair.X("epoch:Q", title="epoch", axis=altair.Axis(tickMinStep=1, format="d")),
            y=altair.Y("value:Q", title=None, scale=altair.Scale(zero=False)),
            color=colour,
        )
    )
    return chart


def _write(path: Path, suffix: str, chart: Any) -> None:
    """Write the picture whole, without a background, with text that a light and a dark page show."""
    styled = (
        chart.configure(background="transparent")
        .configure_view(stroke=None)
        .configure_axis(labelColor=GREY, titleColor=GREY, tickColor=GREY, domainColor=GREY, gridColor=GREY, gridOpacity=0.25)
        .configure_legend(labelColor=GREY, labelLimit=400, symbolLimit=MOST_CURVES)
        .configure_title(color=GREY, subtitleColor=GREY)
    )
    if suffix == "svg":
        text = io.StringIO()
        styled.save(text, format="svg")
        write_whole(path, text.getvalue().encode())
    else:
        content = io.BytesIO()
        styled.save(content, format="png", scale_factor=2)
        write_whole(path, content.getvalue())
