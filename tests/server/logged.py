"""What a server logged of its requests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

import pytest

from meswitch_cli.server.logs import JsonFormatter


def lines(caplog: pytest.LogCaptureFixture, request_ids: Iterable[str]) -> list[dict[str, object]]:
    """All that was logged, once each of the requests has its line: it comes just after the answer, in a thread."""
    awaited, deadline = set(request_ids), time.monotonic() + 60
    while True:
        logged = [json.loads(JsonFormatter().format(record)) for record in tuple(caplog.records)]
        if awaited <= {line.get("request_id") for line in logged}:
            return logged
        assert time.monotonic() < deadline, (awaited, logged)
        time.sleep(0.01)
