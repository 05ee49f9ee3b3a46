"""A plugin of pytest that says what fails at once: a run that is stopped has no summary."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.nodeid}:\n{report.longreprtext[-4000:]}", flush=True)
