"""Figures as the text of a table's cell, each with its uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meswitch_cli.evaluation.statistics import Z_95


def plus_minus(row: Mapping[str, Any], name: str, factor: float = 1.0, digits: int = 5) -> str:
    """A figure and the half width of its 95 % interval."""
    value, error = row[name], row.get(f"{name}_se")
    text = f"{factor * value:.{digits}f}"
    return text if error is None else f"{text} ± {factor * Z_95 * error:.{digits}f}"


def interval(row: Mapping[str, Any], name: str, factor: float = 1.0, digits: int = 5) -> str:
    """A figure and its 95 % interval."""
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if value is None:
        return ""
    text = f"{factor * value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"
