"""Intervals for figures that are ratios of sums over items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_of_sums(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Sum of numerators over sum of denominators, with a percentile bootstrap over items (pairs stay together).

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if top.shape != bottom.shape or top.size == 0:
        raise ValueError(f"{top.size} numerators, {bottom.size} denominators")
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, top.size, size=(resamples, top.size))
    ratios = top[picks].sum(1) / bottom[picks].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))
