"""A pytest plugin: tests in a mixed order, and those that have not begun in time are skipped and counted.

Of kernels that compile for minutes a part may then show all that its limit allows, every kind among it, and say what is
left. The order is the same in every process and from run to run.
"""

from __future__ import annotations

import hashlib
import os
import time

import pytest

#: Seconds, set by the proof for each of its parts.
LIMIT = "MESWITCH_PROOF_LIMIT"
#: Seconds that a test which has begun may need, and the report.
MARGIN = 30
REASON = "no time left"
_BEGAN = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = float(os.environ.get(LIMIT, "inf"))
    if time.monotonic() - _BEGAN > max(limit - MARGIN, limit / 2):
        pytest.skip(REASON)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """That nothing was tested is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not reporter.stats.get("passed") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    late = sum(REASON in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"{late} not begun for want of time")
