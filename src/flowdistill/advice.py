"""The commands that messages advise: quoted, and complete, so that each can be pasted into a shell."""

from __future__ import annotations

import json
import os
import shlex
import tomllib
from collections.abc import Mapping
from typing import Any

from .talk import printable

RUNS = "runs"  # the default folder of runs

Folder = str | os.PathLike[str]


def command(*words: object, runs: Folder = RUNS) -> str:
    """``flowdistill WORD ...``, with ``--runs`` if that is not the default folder."""
    option = [] if os.fspath(runs) == RUNS else ["--runs", os.fspath(runs)]
    return options("flowdistill", *words, *option)


def options(*words: object) -> str:
    """Options that belong to the command which was given."""
    return " ".join(map(_quoted, map(str, words)))


def usage() -> str:
    """Lists all commands."""
    return command("--help")


def list_runs(runs: Folder) -> str:
    """Prints every run of a folder."""
    return command("runs", runs=runs)


def summary(runs: Folder, *, holdout: bool) -> str:
    """Prints the methods of a folder's runs side by side."""
    return command("table", "--summary", *["--protocol", "holdout"] * holdout, runs=runs)


def probe(no: int, runs: Folder) -> str:
    """Measures the features of a run's student on labelled images."""
    return command("evaluate", no, "--probe", "knn", "--dataset", "NAME", runs=runs)


def resume(no: int, runs: Folder) -> str:
    """Goes on with a run that was cut off."""
    return command("resume", no, runs=runs)


def resume_all(runs: Folder) -> str:
    """Goes on with every run of a folder that was cut off."""
    return command("resume", runs=runs)


def rebuild(runs: Folder) -> str:
    """Makes a folder's ledger again from the folders of its runs."""
    return command("ledger", "rebuild", runs=runs)


def merge(folder: Folder, into: Folder) -> str:
    """Copies the runs of all ledgers below a folder into one."""
    return f"{options('flowdistill', 'ledger', 'merge', os.fspath(folder))}/* {options('--into', os.fspath(into))}"


def from_python() -> str:
    """What to do where a network or a loader was an object of another process."""
    return "give it from Python again: the call that trained it goes on with the run, or gives its Result, which has card() and export()"


def demo(runs: Folder) -> str:
    """Trains the demo's runs into a folder. Default of the command: a temporary one."""
    return command("demo", "--runs", os.fspath(runs))


def train(model: str, seed: int, data: Mapping[str, Any], more: Mapping[str, Any], *, holdout: bool, runs: Folder) -> str:
    """Trains a network on the labels alone.

    Args:
        data: keys of ``data``; ``name`` is among them.
        more: further dotted keys of the config.
    """
    keys = {f"data.{key}": value for key, value in data.items() if key != "name"} | dict(more)
    words: list[object] = ["train", "--model", model, "--dataset", data["name"], "--seeds", seed, *["--holdout"] * holdout]
    return command(*words, *sets(keys), runs=runs)


def sets(values: Mapping[str, Any]) -> list[str]:
    """The ``--set`` options that give dotted keys these values."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={_value(value)}")]


def propose_weights() -> str:
    """Says by which weight each term's gradient would equal the task's."""
    return f"{command('doctor')}, with the same options, proposes a weight"


def weight(term: str, value: float) -> str:
    """The option that gives a loss term a weight, to three digits."""
    return options(*sets({f"weights.{term}": _rounded(value, 3)}))


def rate(value: float) -> str:
    """The option that gives a learning rate, to two digits."""
    return options("--lr", _rounded(value, 2))


def _rounded(value: float, digits: int) -> float | int:
    """A number to so many digits, a whole one without a point."""
    number = float(f"{value:.{digits}g}")
    return int(number) if number.is_integer() else number


def _value(value: Any) -> str:
    """A value as ``--set`` reads it: TOML, with a string unquoted if it would not be read as something else."""
    if isinstance(value, str):
        try:
            tomllib.loads(f"value = {value}")
        except ValueError:
            if value == value.strip():
                return value
    return json.dumps(value, ensure_ascii=False)


def _quoted(word: str) -> str:
    """A word quoted for a shell. Bytes that no terminal shows become escapes, which shells read back."""
    if word == printable(word):
        return shlex.quote(word)
    shown = {char: "".join(f"\\{byte:03o}" for byte in os.fsencode(char)) for char in word if char in "'\\" or char != printable(char)}
    return f"$'{''.join(shown.get(char, char) for char in word)}'"
