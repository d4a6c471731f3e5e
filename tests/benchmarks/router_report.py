"""docs/results/router.md from the figures of benchmarks.router."""

from typing import Any


def write_report(figures: dict[str, Any]) -> None:
    pass
