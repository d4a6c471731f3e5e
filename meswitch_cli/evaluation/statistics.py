"""Uncertainty of figures that are sums over documents: whole documents are the independent units, not tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_of_sums(
    numerators: Sequence[float] | Array,
    denominators: Sequence[float] | Array,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Sum of numerators over sum of denominators, with a percentile bootstrap over items (pairs stay together).

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    top, bottom = _paired(numerators, denominators)
    low, high = np.nanquantile(resampled_ratios(top, bottom, seed=seed, resamples=resamples), [0.025, 0.975])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high))


def resampled_ratios(top: Array, bottom: Array, *, seed: int, resamples: int) -> Array:
    """Sum of `top` over sum of `bottom` in each of `resamples` draws of as many items."""
    ratios = []
    # A few at a time: resamples x items indices of a large set would not fit in memory.
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, 1000):
        picks = generator.integers(0, top.size, size=(min(1000, resamples - start), top.size))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(top[picks].sum(1) / bottom[picks].sum(1))
    return np.concatenate(ratios)


def ratio_standard_error(numerators: Sequence[float] | Array, denominators: Sequence[float] | Array) -> float | None:
    """Standard error of a ratio of sums over documents; None for fewer than two documents.

    The linearised ratio estimator, sqrt(n/(n-1) Σ (y_i − R x_i)²) / Σ x (Cochran, Sampling Techniques, 3rd ed.,
    section 6.3, without a finite-population factor). With one token a document it is the usual error of a mean; for
    a difference of two losses it is the covariance formula, var(a) + var(b) − 2 cov(a, b).

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    top, bottom = _paired(numerators, denominators)
    count = top.size
    if count < 2 or bottom.sum() == 0:
        return None
    residual = top - top.sum() / bottom.sum() * bottom
    return float(np.sqrt(count / (count - 1) * np.square(residual).sum()) / abs(bottom.sum()))


def quantile_by_document(
    values: Array, documents: npt.NDArray[np.int64], quantile: float, *, seed: int = 0, resamples: int = 200
) -> Estimate:
    """A quantile of all tokens' values, with a percentile bootstrap that draws whole documents.

    `documents` gives each value's document. A tail quantile of few tokens is close to the maximum, and its interval
    then cannot reach above it: read the upper end as a lower bound.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    values, owners = np.asarray(values, dtype=float), np.asarray(documents)
    if values.shape != owners.shape or values.size == 0:
        raise ValueError(f"{values.size} values, {owners.size} documents")
    groups = [values[owners == owner] for owner in np.unique(owners)]
    generator = np.random.default_rng(seed)
    found = [
        np.quantile(np.concatenate([groups[pick] for pick in picks]), quantile)
        for picks in generator.integers(0, len(groups), size=(resamples, len(groups)))
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(np.quantile(values, quantile)), float(low), float(high))


def _paired(left: Sequence[float] | Array, right: Sequence[float] | Array) -> tuple[Array, Array]:
    top, bottom = np.asarray(left, dtype=float), np.asarray(right, dtype=float)
    if top.shape != bottom.shape or top.size == 0:
        raise ValueError(f"{top.size} numerators, {bottom.size} denominators")
    return top, bottom
