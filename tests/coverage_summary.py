"""After a run with ``--cov``: the branch coverage of all that is installed, and the files below ``LOW`` percent."""

from __future__ import annotations

import json

import pytest
from coverage import Coverage
from coverage.exceptions import NoDataError

LOW = 85.0


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--cov", default=None):
        return
    measured = Coverage(data_file=str(config.rootpath / "build" / "coverage"))
    measured.load()
    report = config.rootpath / "build" / "coverage.json"
    try:
        whole = measured.json_report(outfile=str(report))
    except NoDataError:
        return
    terminalreporter.section(f"branch coverage: {whole:.1f} %; the files below {LOW:.0f} %, and build/coverage.json")
    files = json.loads(report.read_text())["files"]
    shares = {name: file["summary"]["percent_covered"] for name, file in files.items()}
    for name, share in sorted(shares.items(), key=lambda item: item[1]):
        if share < LOW:
            terminalreporter.write_line(f"{share:6.1f} %  {name}")
