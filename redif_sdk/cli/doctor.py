"""The command ``redif doctor``: what is installed, what shadows what, and what each engine can do on this machine.

Engines are asked to run a graph of one node; nothing is changed.
"""

from __future__ import annotations

import platform
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from typing import Annotated, Any

import typer

from redif_sdk.cli.terminal import (
    GATE_FAILED,
    Json,
    PromptFile,
    Quiet,
    TrainingDevice,
    ValueRange,
    Variant,
    console_for,
    fail,
    print_rows,
    teacher_options,
    write_rows,
)
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.progress import Progress
from redif_sdk.runtimes import RUNTIMES, installed
from redif_sdk.runtimes.protocol import cores, nvidia_driver

__all__ = ["doctor_command", "examine"]

EXTRAS = ("cpu", "gpu", "openvino", "tensorrt-rtx", "export", "distill", "demo", "serve", "ray")

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*(?:;.*extra\s*==\s*['\"]([^'\"]+)['\"])?")


FINDINGS = {"subject": "subject", "status": "status", "detail": "detail"}


def doctor_command(
    distill: Annotated[
        str | None,
        typer.Option(metavar="TEACHER", help="Check this teacher instead of the machine; nothing is trained."),
    ] = None,
    steps: Annotated[int, typer.Option(help="With --distill: num_inference_steps of the planned student.")] = 4,
    reward: Annotated[str, typer.Option(help="With --distill: reward of the planned run.")] = "feature",
    device: TrainingDevice = "auto",
    prompts: PromptFile = None,
    value_range: ValueRange = None,
    variant: Variant = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Check the installation, or a teacher (--distill).

    Says what is installed, what shadows what, and what each engine can do here. Exits with 1 if something is broken.

    With --distill: is the teacher's prediction type right, is it deterministic, do its samples belong to their noise,
    does the reward tell actions apart, and how long would a run take?
    """
    if distill is None:
        rows = examine()
    else:
        options = teacher_options(prompts, value_range=value_range, variant=variant)
        rows = _examine_teacher(distill, steps, reward, device, options, quiet)
    write_rows(json, "doctor", rows)
    print_rows(console_for(json, quiet), FINDINGS, rows)
    if broken := [row["subject"] for row in rows if row["status"] == "problem"]:
        fail(f"there are problems with {', '.join(broken)}", GATE_FAILED)


def _examine_teacher(
    source: str, steps: int, reward: str, device: str, options: dict[str, Any], quiet: bool
) -> list[dict[str, Any]]:
    from redif_sdk.distill.evaluation.examine import examine_teacher
    from redif_sdk.distill.teachers.base import Teacher

    with Progress(quiet).stage(f"examine {source}"):
        teacher = Teacher.load(source, **options)
        return examine_teacher(teacher, num_inference_steps=steps, reward=reward, device=device)


def examine() -> list[dict[str, Any]]:
    """One row a finding: subject, status ("ok", "missing": not there, "problem": there, but will fail), detail."""
    return [
        _row("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _row("processor", "ok", f"{cores()} cores to use"),
        _row("redif-sdk", "ok", version("redif-sdk")),
        *_engines(),
        _shadowing(),
        _driver(),
        *_extras(),
    ]


def _row(subject: str, status: str, detail: str) -> dict[str, Any]:
    return {"subject": subject, "status": status, "detail": detail}


def _engines() -> list[dict[str, Any]]:
    """Each engine on each device: does it run a graph?"""
    there = installed()
    rows = []
    for name, engine in RUNTIMES.items():
        if engine.module is None:
            continue
        if name not in there:
            rows.append(_row(name, "missing", f'pip install "redif-sdk[{engine.extra}]"'))
            continue
        try:
            rows += {"onnxruntime": _onnxruntime, "openvino": _openvino}.get(name, _tensorrt)(name)
        except RuntimeUnavailable as error:
            rows.append(_row(name, "problem", str(error)))
    return rows


def _onnxruntime(name: str) -> list[dict[str, Any]]:
    from redif_sdk.runtimes import onnxruntime as ort

    rows = []
    for provider, (device, _) in ort.PROVIDERS.items():
        if device in ("dml", "coreml") and provider not in ort.available():
            continue  # of another operating system
        reason = ort.usable(provider)
        broken = "problem" if device == "cpu" else "missing"
        label = f"{name} on {device}" + (" by TensorRT" if provider == ort.TENSORRT else "")
        rows.append(_row(label, "ok" if reason is None else broken, reason or f"{ort.VERSION}, {provider}"))
    return rows


def _openvino(name: str) -> list[dict[str, Any]]:
    from redif_sdk.runtimes import openvino as ov

    return [
        _row(f"{name} on {device.lower()}", "ok", f"{ov.VERSION}, computes in {', '.join(ov.capabilities(device))}")
        for device in ov.devices()
    ]


def _tensorrt(name: str) -> list[dict[str, Any]]:
    module = import_module(RUNTIMES[name].module or name)
    if nvidia_driver() is None:
        return [_row(name, "missing", f"{module.__version__} builds engines for named targets; runs none: no GPU")]
    return [_row(name, "ok", f"{module.__version__}")]


def _shadowing() -> dict[str, Any]:
    """The packages called onnxruntime-* all install the module onnxruntime, over one another."""
    found = sorted(
        f"{name} {distribution.version}"
        for distribution in distributions()
        if (name := _normal(distribution.metadata["Name"] or "")) == "onnxruntime"
        or (name.startswith("onnxruntime-") and "extensions" not in name and not name.startswith("onnxruntime-ep"))
    )
    if len(found) > 1:
        detail = f"{', '.join(found)} overwrite each other's files; pip uninstall all of them, then install one"
        return _row("shadowed packages", "problem", detail)
    return _row("shadowed packages", "ok", "none")


def _driver() -> dict[str, Any]:
    library = nvidia_driver()
    return _row("NVIDIA driver", "missing" if library is None else "ok", library or "no GPU can be used")


def _extras() -> list[dict[str, Any]]:
    """Which of the project's extras are complete."""
    needs: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for requirement in requires("redif-sdk") or []:
        match = _REQUIREMENT.match(requirement)
        if match and match[2] in needs:
            needs[match[2]].append(_normal(match[1]))
    rows = []
    for extra, names in needs.items():
        absent = [name for name in names if not _present(name)]
        detail = f'pip install "redif-sdk[{extra}]" for {", ".join(absent)}' if absent else ", ".join(names)
        rows.append(_row(f"extra [{extra}]", "missing" if absent else "ok", detail))
    return rows


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _present(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
