"""Help: every option says its default, every key what it means, every command has a short summary and examples that parse."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.command import command
from helpers.keys import every_key

from flowdistill import cli_options, config_keys
from flowdistill.checks import parse_seeds
from flowdistill.cli import app
from flowdistill.config import BASELINE, DISTILLING, RunConfig, assign, validate
from flowdistill.config_keys import KEYS
from flowdistill.reproduce import BASELINE_SEEDS, STUDENT_SEEDS
from flowdistill.training.nearest import NEIGHBOURS

GROUP: Any = typer.main.get_command(app)


def commands(group: Any = GROUP, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that trains, lists or writes, by its words."""
    for word, found in group.commands.items():
        words = f"{name} {word}".strip()
        yield from commands(found, words) if hasattr(found, "commands") else [(words, found)]


COMMANDS = dict(commands())


def the_help(name: str) -> str:
    said = command(Path.cwd(), *name.split(), "--help")
    assert said.code == 0
    return " ".join(said.out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_when_left_out(name: str) -> None:
    shown = the_help(name)
    for parameter in COMMANDS[name].params:
        if parameter.name == "help":
            continue
        text = " ".join(str(parameter.help).split())
        assert text.replace(" ", "") in shown.replace(" ", ""), "help is not cut; a line may end at a hyphen"
        assert parameter.required or cli_options.DEFAULT in text, parameter.name
        assert text.count(cli_options.DEFAULT) <= 1, "a default is said once"
        if isinstance(parameter.default, bool):
            assert text.endswith(f"Default: {'on' if parameter.default else 'off'}."), "a switch"


def test_the_defaults_are_those_of_a_config() -> None:
    """An option that sets a key says the default of RunConfig, and its description."""
    default, shown = RunConfig(), the_help("distill")
    for option, key, value in (
        ("--lr", "train.lr", default.train.lr),
        ("--batch-size", "train.batch_size", default.train.batch_size),
        ("--epochs", "train.epochs", default.train.epochs),
        ("--dataset", "data.name", default.data.name),
    ):
        found = next(parameter for parameter in COMMANDS["distill"].params if parameter.opts == [option])
        assert found.help.startswith(KEYS[key].description.split(" Default: ")[0])
        assert found.help.endswith(f"Default: {value}.")
    assert f"Default: {DISTILLING}." in shown
    assert default.method == BASELINE != DISTILLING


@pytest.mark.parametrize("name", [*COMMANDS, "ledger"])
def test_a_summary_is_short_and_not_cut(name: str) -> None:
    *group, word = name.split()
    parent: Any = GROUP.commands[group[0]] if group else GROUP
    summary = parent.commands[word].help.split("\n\n")[0]
    assert len(summary) < 50
    assert summary.endswith(".")
    listed = command(Path.cwd(), *group, "--help").out
    assert f"{word} {summary}" in " ".join(listed.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_examples_that_parse(name: str) -> None:
    out = command(Path.cwd(), *name.split(), "--help").out
    examples = [line.strip() for line in out[out.index("Examples:") :].splitlines()[1:] if line.strip()]
    assert examples
    for example in examples:
        program, *words = shlex.split(example)
        assert program == "flowdistill"
        assert words[: len(name.split())] == name.split(), "an example of this very command"
        found = COMMANDS[name]
        found.make_context(name, words[len(name.split()) :], resilient_parsing=False).close()


def test_every_key_is_described() -> None:
    assert KEYS.keys() == every_key()
    for key in KEYS.values():
        assert key.description.endswith("."), key.key
        assert len(key.description) > 20
        assert key.allowed


def test_config_lists_keys_by_name_pattern_or_table() -> None:
    def listed(*words: str) -> list[str]:
        said = command(Path.cwd(), "config", *words, "--format", "json")
        assert said.code == 0, said.err
        return [row["key"] for row in json.loads(said.out)]

    assert listed() == [*KEYS]
    assert listed("train.lr") == ["train.lr"]
    assert listed("train.*") == listed("train") == [key for key in KEYS if key.startswith("train.")]
    assert listed("*.size") == ["data.size", "inputs.student.size", "inputs.teacher.size"]


def test_a_listed_default_given_to_set_changes_nothing() -> None:
    """Each by itself, as ``--set KEY=DEFAULT``."""
    written = {key.key: key.written_default for key in KEYS.values() if key.written_default is not None}
    assert len(written) > 30
    for key, default in written.items():
        values: dict[str, Any] = {}
        assign(values, f"{key}={default}")
        assert validate(values) == RunConfig(), key


def test_the_seeds_that_help_names_are_those_of_the_study() -> None:
    for option, seeds in (("--seeds", STUDENT_SEEDS), ("--baselines", BASELINE_SEEDS)):
        found = next(parameter for parameter in COMMANDS["reproduce"].params if parameter.opts == [option])
        assert parse_seeds(found.help.partition(cli_options.DEFAULT)[2].rstrip(".")) == list(seeds)
    assert next(parameter for parameter in COMMANDS["evaluate"].params if parameter.opts == ["--k"]).help.endswith(
        f"Default: {NEIGHBOURS}."
    )


def test_a_key_within_another_table_is_found_by_its_last_name() -> None:
    with pytest.raises(config_keys.UserError, match=r"^config 'lr': no key has such a name; choose from: train\.lr$"):
        config_keys.chosen("lr")
