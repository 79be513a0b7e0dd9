"""The command line, from typer: every command with its arguments and options."""

from __future__ import annotations

from typing import Any

import typer

from docs.generators.text import code, markdown, table
from redif_sdk.cli.main import COMMANDS, app

__all__ = ["commands", "page"]


def commands() -> dict[str, Any]:
    """The commands as typer has them, by name."""
    root: Any = typer.main.get_command(app)
    return {name: root.commands[name] for name in COMMANDS}


def _parameters(command: Any) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, help) of the arguments and of the options."""
    context = command.make_context(command.name, ["--help"], resilient_parsing=True)
    arguments: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None:
            continue
        kind = arguments if parameter.param_type_name == "argument" else options
        kind.append((code(record[0]), record[1]))
    return arguments, options


def _section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    arguments, options = _parameters(command)
    parts = [f"## {name}\n\n```text\nredif {name} {usage}\n```\n\n{markdown(command.help)}\n\n"]
    if arguments:
        parts.append(table(("argument", "meaning"), arguments))
    parts.append(table(("option", "meaning"), options))
    if name == "distill":
        parts.append("All settings of `--set`, `--config` and `--NAME VALUE`: [Settings](settings.md).\n\n")
    return "".join(parts)


def page() -> str:
    """The page of the command line."""
    found = commands()
    listed = table(
        ("command", "what it does"),
        ((f"[`redif {name}`](#{name})", markdown(command.help).split("\n\n")[0]) for name, command in found.items()),
    )
    return (
        "# Command line\n\n"
        "Every command ends with exit code 0 (done), 1 (a gate failed: parity, hashes, divergence in training), 2 (bad "
        "usage or input) or 130 (interrupted). An expected failure is one line on standard error. "
        "`--json FILE` writes [machine-readable results](../design.md#7-machine-readable-results).\n\n"
        + listed
        + "".join(_section(name, command) for name, command in found.items())
    )
