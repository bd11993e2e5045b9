"""Listings and the page of one run or one method."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..ledger import Epoch, Run
from .tables import Row, render

if TYPE_CHECKING:
    from ..methods import Method

LISTED = ("no", "status", "method", "student", "teacher", "dataset", "split", "seed", "acc", "nepoch", "started", "error")
"""``error`` comes last: it is empty for most."""


def runs_list(runs: Sequence[Run], format_: str) -> str:
    """One row per run; ``acc`` is that of the shipped weights on test, in percent."""
    rows = []
    for run in runs:
        row = {name: getattr(run, name) for name in LISTED if name != "acc"}
        rows.append(row | {"acc": None if run.accuracy is None else round(run.accuracy, 2)})
    return render(rows, format_, LISTED)


MOST_CLASSES = 20  # as many are listed at most; json has all


def run_page(run: Run, curve: Sequence[Epoch], format_: str, classes: Sequence[Row] = ()) -> str:
    """Config, environment and curve of a run, and its figures by class; json is an array of one object with all of them, csv the curve
    alone.

    Args:
        classes: as ``class_rows`` gives them. Of many those with the fewest right are listed.
    """
    facts = dataclasses.asdict(run)
    networks = {role: {key: value for key, value in network.items() if key != "answers"} for role, network in (run.networks or {}).items()}
    if format_ == "json":
        return render([facts | {"curve": [dataclasses.asdict(epoch) for epoch in curve], "classes": list(classes)}], "json", ())
    terms = list(dict.fromkeys(term for epoch in curve for term in epoch.terms))
    points = [_point(epoch, terms) for epoch in curve]
    table = render(points, format_, ("epoch", "phase", "lr", "acc", *terms, "seconds"))
    if format_ == "csv":
        return table
    short = facts | {"networks": networks or None}  # the answers are many numbers
    rows = [{"fact": name, "value": json.dumps(value) if isinstance(value, dict) else value} for name, value in short.items()]
    parts = [render(rows, format_, ("fact", "value")), table]
    if classes:
        shown = sorted(classes, key=lambda row: row["test right %"] or 0.0)[:MOST_CLASSES] if len(classes) > MOST_CLASSES else classes
        if len(shown) < len(classes):
            parts.append(f"By class, the {len(shown)} of {len(classes):,} with the fewest right; --format json has all.")
        parts.append(render(shown, format_, tuple(classes[0])))
    return "\n\n".join(parts)


def _point(epoch: Epoch, terms: Sequence[str]) -> dict[str, Any]:
    return {
        "epoch": epoch.epoch,
        "phase": epoch.phase,
        "lr": f"{epoch.lr:.3g}",
        "acc": None if epoch.correct is None else f"{100 * epoch.correct / epoch.images:.2f}",
        **{term: f"{epoch.terms[term]:.4g}" if term in epoch.terms else None for term in terms},
        "seconds": f"{epoch.seconds:.2f}",
    }


def methods_list(methods: Sequence[type[Method]], format_: str) -> str:
    """One row per method."""
    rows = [{"name": cls.name, "terms": ",".join(cls.terms) or "-", "paper": _cite(cls)} for cls in methods]
    return render(rows, format_, ("name", "terms", "paper"))


def method_card(cls: type[Method], format_: str) -> str:
    """One method: paper, then every option and weight with its default."""
    options = cls.Options()
    rows: list[dict[str, Any]] = [{"key": f"options.{cls.name}.{key}", "default": value} for key, value in options]
    rows += [{"key": f"weights.{term}", "default": weight} for term, weight in {"task": 1.0, **cls.default_weights(options)}.items()]
    table = render(rows, format_, ("key", "default"))
    if format_ in ("csv", "json"):
        return table
    return f"{cls.name}: {(cls.__doc__ or '').strip()}\n{_cite(cls)}\n{cls.paper.url}\n\n{table}"


def _cite(cls: type[Method]) -> str:
    return f"{cls.paper.authors}: {cls.paper.title}, {cls.paper.venue} {cls.paper.year}"
