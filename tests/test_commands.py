"""``redif distill | import | eval`` as a user meets them: one clear line and exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from redif_sdk.cli.main import main

SMALL = ["--updates", "2", "--pool-size", "16", "--batch-size", "8", "--quiet"]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of ``redif arguments``, in this process."""
    monkeypatch.setattr(sys, "argv", ["redif", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "{empty}", "-o", "{out}"], "is no teacher: unet/config.json is missing"),
        (["distill", "{nowhere}", "-o", "{out}"], "no folder and no shipped teacher"),
        (
            ["distill", "{teacher}", "-o", "{out}", "--method", "magic"],
            "unknown method 'magic'; known: cdm, consistency, dmd, dmd2, draft, grpo, progressive, redif",
        ),
        (["distill", "{teacher}", "-o", "{out}", "--reward", "beauty"], "unknown reward 'beauty'"),
        (["distill", "{teacher}", "-o", "{out}", "--steps", "0"], "num_inference_steps"),
        (["distill", "{teacher}", "-o", "{out}", "--updates", "0"], "updates"),
        (["distill", "{teacher}", "-o", "{out}", "--group-size", "3"], "must be even"),
        (["distill", "{teacher}", "-o", "{out}", "--step-delta", "0"], "step_delta"),
        (["distill", "{teacher}", "-o", "{out}", "--guidance-scale", "-1"], "guidance_scale"),
        (["import", "{teacher}", "-o", "{out}", "--steps", "2", "--guidance-scale", "-1"], "guidance_scale"),
        (["distill", "{teacher}", "-o", "{out}", "--teacher-calls", "3"], "fewer than one batch"),
        (["distill", "{teacher}", "-o", "{empty}"], "exists already"),
        (["distill", "{broken}", "-o", "{out}"], "cannot be loaded"),
        (["import", "{teacher}", "-o", "{out}", "--steps", "0"], "steps must be at least 1"),
        (["import", "{empty}", "-o", "{out}", "--steps", "2"], "is no teacher"),
        (["eval", "{empty}"], "redif.json"),
        (["quickstart", "-o", "{out}", "--steps", "0"], "steps must be whole numbers"),
        (["quickstart", "-o", "{out}", "--minutes", "0"], "minutes"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty, broken, out = tmp_path / "empty", tmp_path / "broken", tmp_path / "out"
    empty.mkdir()
    shutil.copytree(teacher_folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    places = {"empty": empty, "broken": broken, "out": out, "teacher": teacher_folder, "nowhere": tmp_path / "nowhere"}
    filled = [argument.format(**places) for argument in arguments]
    code, errors = run([*filled, "--quiet"], monkeypatch, capsys)
    assert code == 2
    assert words in errors
    assert errors.count("\n") == 1
    assert errors.startswith("redif: ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))]


def test_a_full_disk_leaves_nothing_half_written(teacher_folder: Path, tmp_path: Path) -> None:
    """A real limit of the operating system on what a file may hold, below the size of the weights."""
    environment = {**os.environ, "REDIF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = ["import", str(teacher_folder), "-o", str(tmp_path / "out"), "--steps", "2", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", "from redif_sdk.cli.main import main; main()", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("redif: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_distil_import_and_resume_from_the_command_line(
    teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, result = tmp_path / "student", tmp_path / "result.json"
    base = [
        "distill",
        str(teacher_folder),
        "-o",
        str(out),
        "--steps",
        "2",
        *SMALL,
        "--reward",
        "pixel",
        "--learning-rate",
        "1e-6",
        "--schedule-updates",
        "0",
    ]
    code, errors = run([*base, "--json", str(result)], monkeypatch, capsys)
    assert (code, errors) == (0, "")
    row = json.loads(result.read_text())["rows"][0]
    assert row["budget"]["updates"] == 2
    assert row["budget"]["teacher_calls"] == 16 * 6
    assert len(row["timesteps"]) == 2
    names = ["config.yaml", "images", "log.jsonl", "report.html", "run.json", "run.lock"]
    assert sorted(p.name for p in (tmp_path / "student.training").iterdir()) == names
    code, errors = run(
        ["import", str(teacher_folder), "-o", str(tmp_path / "plain"), "--steps", "3"], monkeypatch, capsys
    )
    assert (code, errors) == (0, f"importing {teacher_folder}\n")
    assert json.loads((tmp_path / "plain" / "redif.json").read_text())["distillation"] is None
    shutil.rmtree(out)
    (tmp_path / "student.training" / "checkpoint.pt").write_bytes(b"left by a kill")
    code, errors = run(base, monkeypatch, capsys)
    assert code == 2
    assert "--resume" in errors


def test_a_guided_teacher_from_the_command_line(
    teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The student makes one call a step; an import keeps both, and its manifest says so."""
    guided = ["--guidance-scale", "2"]
    distilled, imported = tmp_path / "student", tmp_path / "imported"
    arguments = ["distill", str(teacher_folder), "-o", str(distilled), "--steps", "1", *SMALL, *guided]
    assert run([*arguments, "--reward", "texture", "--estimator", "pathwise"], monkeypatch, capsys) == (0, "")
    manifest = json.loads((distilled / "redif.json").read_text())
    assert manifest["distillation"]["budget"]["teacher_calls"] == 16 * 6 * 2
    assert manifest["teacher"]["guidance_scale"] == 2
    assert manifest["network"]["guidance"] is None
    assert (
        run(["import", str(teacher_folder), "-o", str(imported), "--steps", "2", *guided], monkeypatch, capsys)[0] == 0
    )
    guidance = json.loads((imported / "redif.json").read_text())["network"]["guidance"]
    assert (guidance["scale"], guidance["null_class"], guidance["null_prompt"]) == (2.0, 3, None)


def test_an_interrupted_run_says_so_in_one_line_and_can_be_continued(teacher_folder: Path, tmp_path: Path) -> None:
    """SIGINT, as a terminal sends it, to a real process; without a terminal each stage that began is one line."""
    environment = {**os.environ, "REDIF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "student"
    arguments = ["distill", str(teacher_folder), "-o", str(out), "--steps", "1", "--reward", "pixel"]
    arguments += ["--updates", "100000", "--pool-size", "16", "--batch-size", "8", "--checkpoint-seconds", "0"]
    # a shell without job control starts its background jobs with SIGINT ignored, which children inherit
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{listening}\nfrom redif_sdk.cli.main import main; main()", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.strip())
        if line.startswith("redif, 1 step(s)"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read().splitlines()
    process.stderr.close()
    assert process.wait(120) == 130
    assert "16 pairs (96 teacher calls), then at most 100000 updates of redif" in lines[0]
    assert lines[1:] == ["teacher's outputs", "redif, 1 step(s)"]
    assert rest == ["redif: interrupted"]
    assert not out.exists()
