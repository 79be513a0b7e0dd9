"""``--cpu-durations N``: the N tests, fixtures and files that took the most processor time, child processes included.

Processor seconds do not depend on what else the machine does, so two runs can be compared, and the sum over the cores
is what a run costs.
"""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest


def cpu_seconds() -> float:
    """Processor time, user and system, of this process and of the children that it waited for, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-durations",
        type=int,
        metavar="N",
        help="show the N tests, fixtures and files that took the most processor time",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cpu-durations"):
        config.pluginmanager.register(CpuTimes(), "cpu_times_recorder")


class CpuTimes:
    """Measures where the tests run (a worker of xdist, too) and adds up where the reports arrive."""

    def __init__(self) -> None:
        self.fixtures: dict[str, float] = {}  # of the phase that runs
        self.inside = 0.0  # of fixtures that the one being set up asked for
        self.total: dict[str, dict[str, float]] = {what: defaultdict(float) for what in ("tests", "fixtures", "files")}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        before, outer, self.inside = cpu_seconds(), self.inside, 0.0
        try:
            return (yield)
        finally:
            took = cpu_seconds() - before
            name = f"{fixturedef.baseid}::{fixturedef.argname}"
            self.fixtures[name] = self.fixtures.get(name, 0.0) + took - self.inside
            self.inside = outer + took

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        now = cpu_seconds()
        report.cpu_seconds = now - self.started
        report.cpu_fixtures, self.fixtures = self.fixtures, {}
        self.started = now
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.started = cpu_seconds()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        took: float | None = getattr(report, "cpu_seconds", None)
        if took is None:
            return
        fixtures: dict[str, float] = getattr(report, "cpu_fixtures", {})
        self.total["files"][report.nodeid.split("::")[0]] += took
        self.total["tests"][report.nodeid] += took - sum(fixtures.values())
        for name, seconds in fixtures.items():
            self.total["fixtures"][name] += seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        whole = sum(self.total["files"].values())
        terminalreporter.section(f"processor time: {whole:.1f} s in tests and fixtures")
        for what, times in self.total.items():
            terminalreporter.write_line(f"the most expensive {what}:")
            for name, seconds in sorted(times.items(), key=lambda item: -item[1])[
                : config.getoption("--cpu-durations")
            ]:
                terminalreporter.write_line(f"{seconds:9.2f} s  {name}")
