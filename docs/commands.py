"""Write docs/COMMANDS.md from the command line's own parameters.

python docs/commands.py           # rewrite
"""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from flowdistill import cli

PAGE = Path(__file__).parent / "COMMANDS.md"
HEAD = """# All commands and options

This page is for whoever looks an option up. `flowdistill COMMAND --help` says the same, and the [README](../README.md) is the first tour.
It is written by `python docs/commands.py` from the command line itself, and a test fails when it is stale.

A command prints its data to stdout and talks on stderr. It ends with 0 if all went well, with 1 if a run failed or a check does not agree,
with 2 after a mistake in the command, and with 130 if it was interrupted.

If the default is `-`, the text says what happens when you leave the option out. A key of training then keeps what the recipe or the
config says. `--set` reaches the keys that have no option of their own; `--dry-run` prints all of them.
"""
KINDS: dict[Any, str] = {str: "text", int: "whole number", float: "number", Path: "path", bool: "flag"}


def page() -> str:
    """The whole page: a list of the commands, and a section for each."""
    commands = named(typer.main.get_command(cli.app), "flowdistill")
    contents = ["| command | what it does |", "|---|---|"]
    contents += [f"| [`{name}`](#{anchor(name)}) | {cell(command.help)} |" for name, command in commands]
    return "\n".join([HEAD, *contents, "", *(section(name, command) for name, command in commands)])


def named(command: Any, name: str) -> list[tuple[str, Any]]:
    """A command, or all that a group has, with their names in full and in the order of ``--help``."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(name, command)]
    shown = [(key, part) for key, part in inner.items() if not part.hidden]
    return [pair for key, part in shown for pair in named(part, f"{name} {key}")]


def section(name: str, command: Any) -> str:
    """One command: its usage, its summary, and a table of its arguments and options."""
    annotations = {key: parameter.annotation for key, parameter in inspect.signature(command.callback, eval_str=True).parameters.items()}
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [spelled(parameter) for parameter in shown if parameter.param_type_name == "argument"]
    usage = " ".join([name, *arguments, *["[OPTIONS]"] * (len(arguments) < len(shown))])
    lines = [f"## {name}", "", f"    {usage}", "", prose(command.help), ""]
    if shown:
        lines += ["| option | value | default | what it does |", "|---|---|---|---|"]
        lines += [row(parameter, annotations[parameter.name]) for parameter in shown]
        lines.append("")
    return "\n".join(lines)


def row(parameter: Any, annotation: Any) -> str:
    """One line of a command's table."""
    label = spelled(parameter) if parameter.param_type_name == "argument" else ", ".join([*parameter.opts, *parameter.secondary_opts])
    text, stated = divided(prose(getattr(parameter, "help", None)))
    return f"| `{escaped(label)}` | {value(annotation)} | {stated or default(parameter)} | {cell(text)} |"


def divided(text: str) -> tuple[str, str]:
    """A help text that ends with ``Default: X``: what stands before, and X for the column of defaults, which is empty if it does not."""
    stated = re.search(r"(?:^| )Default: ([^.]+(?:\.[^ .]+)*)\.?$", text)
    return (text[: stated.start()], cell(stated[1])) if stated else (text, "")


def spelled(argument: Any) -> str:
    """An argument as the usage line shows it: ``RUN`` is asked for, ``[RUN]`` may be left out, ``RUN...`` are several."""
    word = argument.metavar or argument.name.upper()
    word += "..." * (argument.nargs == -1 and not word.endswith("..."))
    return word if argument.required else f"[{word}]"


def value(annotation: Any) -> str:
    """The type of a value in words, or its choices.

    Raises:
        TypeError: a type that has no word here.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(value(part) for part in inner if part is not types.NoneType)
    if origin is list:
        return f"{value(inner[0])}, may be repeated"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if annotation not in KINDS:
        raise TypeError(f"docs/commands.py has no word for {annotation!r}; add it to KINDS")
    return KINDS[annotation]


def default(parameter: Any) -> str:
    """What an option is if it is left out."""
    if parameter.required:
        return "required"
    if parameter.default is None:
        return "-"
    if isinstance(parameter.default, bool):
        return "on" if parameter.default else "off"
    return f"`{escaped(str(parameter.default))}`"


def anchor(heading: str) -> str:
    """The fragment that a heading of these names gets."""
    return heading.replace(" ", "-")


def cell(text: str | None) -> str:
    """A help text in a cell of a table."""
    return escaped(prose(text)).replace("<", "&lt;")


def escaped(text: str) -> str:
    """Text in which no bar ends a cell."""
    return text.replace("|", "\\|")


def prose(text: str | None) -> str:
    """A help text as one paragraph."""
    return " ".join((text or "").split())


if __name__ == "__main__":
    PAGE.write_text(page())
