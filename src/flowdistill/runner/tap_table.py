"""The taps of a network as a table that can be edited and given back (``--student-taps``, ``--teacher-taps``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import models
from ..ledger import Ledger
from ..models.input_adapter import InputSpec
from ..types import DataSpec
from .references import named, resolve, run_number

COLUMNS = ("name", "module", "channels", "size", "stride")
OWN = InputSpec(3, 32, 32)  # what the networks here are made for
OTHERS = InputSpec(3, 224, 224)


def rows(reference: str, runs: Path, *, size: int | None = None, channels: int | None = None, classes: int = 1000) -> list[dict[str, Any]]:
    """A row for every tap of a network, then for the embedding and the classifier, if it has one: module, channels, size and stride.

    Args:
        reference: a model's name, a run's number, a weights file or MODEL@FILE.
        runs: folder of the ledger that has the run.
        size, channels, classes: of the images. Default of size and channels: what a run, a file or a library declares, else 3x32x32 for
            the networks of this package and 3x224x224 for others.

    Raises:
        UserError: there is no such network, or it can't take such images.
    """
    network = named(reference) if run_number(reference) is None else resolve(reference, Ledger(runs))
    published = models.declared_input_spec(network.model)
    usual = OWN if network.model in models.MODELS else OTHERS
    input_spec = InputSpec(channels, size, size).over(network.input_spec).over(published).over(usual)
    sizes = DataSpec("", 0, classes, input_spec.channels or 0, input_spec.height or 0, input_spec.width or 0)
    data = network.fitted(sizes).seen(sizes)
    spec = models.spec(network.model, data)
    table: list[dict[str, Any]] = [
        {
            "name": tap.name,
            "module": tap.module,
            "channels": tap.channels,
            "size": f"{tap.height}x{tap.width}",
            "stride": round(data.height / tap.height),
        }
        for tap in spec.taps
    ]
    source = f"input of {spec.head}" if spec.head else "what it gives"
    ends = [("embedding", source, spec.embedding)] + [("classifier", spec.head, spec.classes)] * bool(spec.head)
    return table + [{"name": name, "module": module, "channels": width, "size": None, "stride": None} for name, module, width in ends]
