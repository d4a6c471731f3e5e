"""Waiting for what must come: an event, not a moment, decides; how long it takes is no test's business."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds, much longer than the busiest machine takes: a test that waits so long has failed.
PATIENCE = 300.0


def until(met: Callable[[], object], told: Callable[[], object] = lambda: "it never came") -> None:
    """Wait until something is so; what is `told` explains that it never was."""
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, told()
        time.sleep(0.005)
