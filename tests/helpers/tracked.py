"""What trackers wrote, read back from their files."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes of a block of LevelDB's log format, in which W&B keeps a run
HEADER = 7  # bytes before the file's first record, and before every piece of one


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def events(folder: Path) -> Any:
    """What TensorBoard reads of a run, which has one event file; every point of a curve, also those of one step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file), purge_orphaned_data=False)
    return found.Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """A curve in TensorBoard: (step, value)."""
    return [(point.step, point.value) for point in events(folder).Scalars(name)]


def records(folder: Path) -> list[Any]:
    """The records of a run's one offline W&B file."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("run-*.wandb")
    content, place, found, pieces = file.read_bytes(), HEADER, [], b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # the end of a block holds nothing
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        pieces += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # a whole record, or its last piece
            found.append(Record.FromString(pieces))
            pieces = b""
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run in W&B."""
    steps = [record.history for record in records(folder) if record.HasField("history")]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in step.item} for step in steps]
