"""Settings on the command line of ``redif distill``: ``--set NAME=VALUE``, and every setting as an option of its own.

``--exploration-rank 40`` is the same as ``--set exploration_rank=40``, without a parameter of the command for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from redif_sdk.errors import InvalidRequest

__all__ = ["CommandWithSettings", "parse_settings", "print_settings"]


class CommandWithSettings(TyperCommand):
    """A command that takes ``--exploration-rank 40`` for ``--set exploration_rank=40``, for every setting."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Click's hook before the arguments are parsed."""
        declared = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        return super().parse_args(ctx, _as_set_options(args, declared))


def _as_set_options(arguments: Sequence[str], declared: set[str]) -> list[str]:
    """The arguments with every option that is a setting and not ``declared`` as a ``--set NAME=VALUE``."""
    from redif_sdk.distill.config import RENAMED, DistillConfig, setting_names

    known = {*setting_names(), *RENAMED}
    flags = {name for name, field in DistillConfig.model_fields.items() if field.annotation is bool}
    found: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if argument == "--":
            return [*found, argument, *rest]
        if not option.startswith("--") or option in declared or name not in known:
            found.append(argument)
            continue
        if not equals:
            value = "true" if name in flags else next(rest, "")
            if not value:
                raise InvalidRequest(f"{option} needs a value")
        found += ["--set", f"{name}={value}"]
    return found


def parse_settings(assignments: Sequence[str] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given by hand: the ``options`` that are not None, and ``--set NAME=VALUE`` with YAML values.

    Raises:
        InvalidRequest: an assignment is malformed, unknown, or repeats an option.
    """
    import yaml

    from redif_sdk.distill.config import RENAMED, setting_names, unknown_setting

    given = {name: value for name, value in options.items() if value is not None}
    known = setting_names()
    for assignment in assignments or ():
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise InvalidRequest(f"--set is {assignment!r}; give NAME=VALUE, as in --set exploration_rank=40")
        if name not in known and name not in RENAMED:
            raise InvalidRequest(f"--set: {unknown_setting(name, known)}")
        if name in given:
            raise InvalidRequest(f"{name} is given twice; give it once")
        try:
            given[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"--set {name}: {text!r} is not a YAML value") from error
    return given


def print_settings(value: bool) -> None:
    """Print every setting with its meaning, its default, and the methods that read it; then end the command."""
    if not value:
        return
    from redif_sdk.distill.config import COMMON, DistillConfig
    from redif_sdk.distill.options import ESTIMATORS, MODELS, MethodOptions

    typer.echo("Settings of redif distill: --set NAME=VALUE, --NAME VALUE, or a line 'NAME: VALUE' of --config FILE.")
    typer.echo("\nEvery method:")
    for name in COMMON:
        _print_setting(name, DistillConfig.model_fields[name])
    models: dict[str, type[MethodOptions]] = {f"redif, {name}": model for name, model in ESTIMATORS.items()}
    models |= {name: model for name, model in MODELS.items() if name != "redif"}
    readers: dict[str, list[str]] = {}
    for title, model in models.items():
        for name in model.model_fields:
            readers.setdefault(name, []).append(title)
    for titles in sorted({tuple(titles) for titles in readers.values()}, key=len, reverse=True):
        typer.echo(f"\n{'; '.join(titles)}:")
        for name in sorted(name for name, found in readers.items() if tuple(found) == titles):
            _print_setting(name, models[titles[0]].model_fields[name])
    raise typer.Exit


def _print_setting(name: str, field: Any) -> None:
    if field.description:
        typer.echo(f"  {name:<27} {field.description} [{field.default}]")
