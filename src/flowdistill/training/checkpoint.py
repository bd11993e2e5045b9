"""A cohort between two epochs on disk: all its students in one file, from which training goes on bit for bit.

Tensors are named ``KEY/net.fc.weight``, ``KEY/optimizer.exp_avg.3`` and so on, KEY being the student's; counters stand in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import pass_on_shortage
from ..ranks import Ranks
from .cohort import Cohort
from .student import Student
from .weight_files import read_safetensors
from .weights import hash_weights, is_whole, save_weights

FILE, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back.

    Attributes:
        done: epochs that the cohort had trained.
        tensors: student's key -> name -> tensor.
        counters: student's key -> name -> number.
        about: what the caller of ``save`` added.
        damage: why this is not the newest one, or empty.
    """

    done: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    counters: Mapping[str, Mapping[str, int]]
    about: Mapping[str, Any]
    damage: str = ""


def save(folder: Path, cohort: Cohort, keys: Mapping[Student, str], about: Mapping[str, Any]) -> None:
    """Write the cohort's state. The checkpoint before it is kept beside it until the next is whole.

    Raises:
        OSError: it could not be written; the checkpoint before it stays.
    """
    tensors: dict[str, Tensor] = {}
    counters = {}
    for student in (*cohort.students, *cohort.stopped):
        state, counters[keys[student]] = student.state()
        tensors |= {f"{keys[student]}/{name}": value for name, value in state.items()}
    metadata = {"done": cohort.done, "counters": counters, "about": about}
    save_weights(folder / FILE, tensors, metadata, keep=folder / PREVIOUS, make_folder=False)


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there is no checkpoint. If all are damaged, an empty one that says so."""
    damage = ""
    for path in (folder / FILE, folder / PREVIOUS):
        try:
            return _read(path, damage)
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file raises anything
            pass_on_shortage(error)
            damage = f"{path} is damaged ({error})"
    return Checkpoint(0, {}, {}, {}, damage) if damage else None


def _read(path: Path, damage: str) -> Checkpoint:
    tensors, metadata = read_safetensors(path)
    known = json.loads(metadata["flowdistill"])
    if not is_whole(tensors, metadata) or known.get("hash", hash_weights(tensors)) != hash_weights(tensors):  # the hash: of version 0.1.0
        raise ValueError("its content is not what was written")
    by_key: dict[str, dict[str, Tensor]] = {key: {} for key in known["counters"]}
    for name, value in tensors.items():
        key, _, inner = name.partition("/")
        by_key[key][inner] = value
    return Checkpoint(known["done"], by_key, known["counters"], known["about"], damage)


def restore(cohort: Cohort, keys: Mapping[Student, str], checkpoint: Checkpoint) -> None:
    """Put the cohort into the checkpoint's state. Each of the cohort's students must be in it."""
    cohort.done = checkpoint.done
    phase, epoch = cohort.position
    for student in cohort.students:
        key = keys[student]
        student.load(checkpoint.tensors[key], checkpoint.counters[key], phase=phase if epoch else None)


def share(cohort: Cohort, ranks: Ranks) -> None:
    """Give the cohort of every rank the state of rank 0's."""
    keys = {student: str(number) for number, student in enumerate(cohort.students)}
    states = {}
    if ranks.leads:
        for student in cohort.students:
            if cohort.done == 0:
                student.begin_phase(0)
            states[keys[student]] = student.state()
    named = [(key, name, value) for key, (values, _) in states.items() for name, value in values.items()]
    counters = {key: of_student for key, (_, of_student) in states.items()}
    told: dict[str, Any] = ranks.told({"done": cohort.done, "counters": counters, "names": [[key, name] for key, name, _ in named]})
    sent = ranks.tensors_from(0, [value for _, _, value in named])
    if not ranks.leads:
        tensors: dict[str, dict[str, Tensor]] = {key: {} for key in told["counters"]}
        for (key, name), value in zip(told["names"], sent, strict=True):
            tensors[key][name] = value
        restore(cohort, keys, Checkpoint(told["done"], tensors, told["counters"], {}))


def clear(folder: Path) -> None:
    """Remove the checkpoints, and unfinished ones that a killed process left."""
    for path in [*folder.glob("checkpoint*.safetensors"), *folder.glob(".checkpoint*")]:
        path.unlink(missing_ok=True)
