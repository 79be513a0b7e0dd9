"""What long commands say while they work: lines without a terminal, bars on one, nothing where they shall be quiet."""

from __future__ import annotations

import io
import time

import pytest

from redif_sdk.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_stage_is_one_line_and_one_more_every_so_often() -> None:
    file = io.StringIO()
    progress = Progress(file=file, every=0.2)
    progress.say("about a minute of work")
    with progress.stage("short"):
        pass
    with progress.stage("long") as show:
        show(0.25, {"mse": 0.5, "loss": 1.0})
        time.sleep(0.3)
        show(None, "nearly")
        time.sleep(0.2)
    lines = file.getvalue().splitlines()
    assert lines[:3] == ["about a minute of work", "short", "long"]
    assert lines[3:] == ["long: 25 %, mse 0.5000, 0 s", "long: nearly, 0 s"]
    assert list(progress.seconds) == ["short", "long"]
    assert progress.seconds["long"] == pytest.approx(0.5, abs=0.2)


def test_a_stage_that_fails_says_no_more() -> None:
    file = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Progress(file=file, every=0.05).stage("work"):
        raise ValueError("broken")
    time.sleep(0.15)
    assert file.getvalue() == "work\n"


def test_on_a_terminal_there_are_bars() -> None:
    file = Terminal()
    progress = Progress(file=file)
    with progress.stage("training") as show:
        show(0.5, {"mse": 0.25})
    assert "training" in file.getvalue()
    assert "mse 0.2500" in file.getvalue()
    assert "\x1b[" in file.getvalue()


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_quiet_says_nothing_and_still_counts_seconds(file: io.StringIO) -> None:
    progress = Progress(quiet=True, file=file, every=0.01)
    progress.say("work")
    with progress.stage("a") as show:
        show(0.5, "note")
        time.sleep(0.05)
    assert file.getvalue() == ""
    assert "a" in progress.seconds


@pytest.mark.filterwarnings("ignore::redif_sdk.errors.WorseThanStart")
def test_distil_shows_the_commands_display_unless_it_is_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    from blackbox import CONFIG, black_box

    from redif_sdk.distill import distill

    distill(black_box(), CONFIG)
    shown = capsys.readouterr().err
    assert "callable: 16 pairs (64 teacher calls), then at most 1 updates of regression on cpu" in shown
    assert shown.index("teacher's outputs") < shown.index("regression, 1 step(s)")
    figures: list[float] = []
    distill(black_box(), CONFIG, on_progress=lambda done, _: figures.append(done))
    distill(black_box(), CONFIG, progress=False)
    assert (capsys.readouterr().err, figures) == ("", [1.0])
