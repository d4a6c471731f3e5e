"""A proportion's interval and percentiles: what reports of every part give."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: 97.5 % quantile of the standard normal distribution: a two-sided 95 % interval.
Z_95 = 1.959963984540054


def wilson_interval(successes: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): honest near 0 and 1, where the normal one is not; `z` 1.96 is 95 %."""
    if count == 0:
        return 0.0, 1.0
    share, square = successes / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest of at least one value."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def percentiles(values: Sequence[float], percents: Sequence[int]) -> dict[str, float]:
    """Several of them, as p50, p95 and so on."""
    return {f"p{percent}": percentile(values, percent) for percent in percents}
