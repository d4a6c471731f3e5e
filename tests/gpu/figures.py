"""A figure is one line of JSON on a part's standard output, so that a part that is stopped has told what it knew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

_MARK = '{"figure": '


def say(figure: str, **values: object) -> None:
    """Print one row of the table named `figure`."""
    print(json.dumps({"figure": figure, **values}) + "\n", end="", flush=True)  # one write, whoever else writes


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The figures of a log, and the counts of a pytest run where the log is one."""
    lines = list(lines)
    found = []
    for line in lines:
        if line.startswith(_MARK):
            try:
                found.append(json.loads(line))
            except ValueError:  # the process was killed in the middle of it
                continue
    return found + _tests(lines)


def _tests(lines: list[str]) -> list[dict[str, Any]]:
    closing = next(
        (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error).* in [\d.]+s", line)), None
    )
    if closing is None:
        return []
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", closing)}
    late = next((int(line.split()[0]) for line in lines if line.endswith(" not begun for want of time")), 0)
    if late:
        counts["skipped"] = counts.get("skipped", 0) - late
        counts["not begun"] = late
    failures = [line.split(" ", 1)[1] for line in lines if re.match(r"(FAILED|ERROR) tests/", line)]
    return [{"figure": "tests", **counts, "failures": failures}]
