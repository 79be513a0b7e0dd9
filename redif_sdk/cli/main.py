"""The command ``redif``. Each command reads its options, calls one function of the package, and prints what it returns.

To add a command: its file in this folder, and its line in ``COMMANDS``.

Exit codes: 0 done; 1 the work failed a gate (parity, hashes in ``verify``, divergence in training); 2 bad usage or
input; 130 interrupted. Every expected failure is one line on standard error, "redif: ...". Commands import what they
need when they run, so that ``redif generate`` and ``redif --help`` never import torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from redif_sdk.cli.bench import bench_command
from redif_sdk.cli.card import card_command
from redif_sdk.cli.demo import demo_command
from redif_sdk.cli.distill import distill_command
from redif_sdk.cli.doctor import doctor_command
from redif_sdk.cli.eval import eval_command
from redif_sdk.cli.export import export_command
from redif_sdk.cli.generate import generate_command
from redif_sdk.cli.import_ import import_command
from redif_sdk.cli.missing import explain_missing
from redif_sdk.cli.pull import pull_command
from redif_sdk.cli.push import push_command
from redif_sdk.cli.quickstart import quickstart_command
from redif_sdk.cli.report import report_command
from redif_sdk.cli.serve import serve_command
from redif_sdk.cli.serve_reward import serve_reward_command
from redif_sdk.cli.settings import CommandWithSettings
from redif_sdk.cli.terminal import BAD_INPUT, GATE_FAILED, INTERRUPTED, fail
from redif_sdk.cli.verify import verify_command
from redif_sdk.cli.whence import whence_command
from redif_sdk.errors import ParityError, RedifError, TrainingDiverged

__all__ = ["COMMANDS", "app", "main"]

#: Every command, in the order of the help.
COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate_command,
    "quickstart": quickstart_command,
    "distill": distill_command,
    "report": report_command,
    "import": import_command,
    "export": export_command,
    "verify": verify_command,
    "eval": eval_command,
    "bench": bench_command,
    "serve": serve_command,
    "serve-reward": serve_reward_command,
    "demo": demo_command,
    "push": push_command,
    "pull": pull_command,
    "whence": whence_command,
    "card": card_command,
    "doctor": doctor_command,
}

# What typer raises for bad usage: click's class in older releases, its own copy in newer ones.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"redif {version('redif-sdk')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Few-step diffusion students: distil them by reinforcement, export them to ONNX, run them without torch."""


def _app() -> typer.Typer:
    made = typer.Typer(name="redif", pretty_exceptions_enable=False, rich_markup_mode=None)
    made.callback()(_root)
    for name, command in COMMANDS.items():
        made.command(name, cls=CommandWithSettings if command is distill_command else TyperCommand)(command)
    return made


app = _app()


def main() -> None:
    """The entry point: run the command, and turn what it raises into one line and an exit code."""
    arguments = sys.argv[1:] or ["--help"]
    warnings.filterwarnings("always", r".* is now ", DeprecationWarning, r"redif_sdk\.")
    try:
        code = app(arguments, prog_name="redif", standalone_mode=False)
    except _UsageError as error:
        usage: Any = error
        fail(f"{usage.format_message()} (redif --help says more)", BAD_INPUT)
    except (ParityError, TrainingDiverged) as error:
        fail(str(error), GATE_FAILED)
    except (RedifError, OSError) as error:
        fail(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        fail(explain_missing(error), BAD_INPUT)
    except MemoryError as error:
        fail(f"there is not enough memory: {error}", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED)
    if code == INTERRUPTED:  # newer releases of typer turn KeyboardInterrupt into this code, without a word
        fail("interrupted", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
