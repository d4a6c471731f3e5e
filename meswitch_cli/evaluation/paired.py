"""Two models on the same documents: is one worse, is there no difference that matters, or are there too few?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from meswitch_cli.estimates import Z_95
from meswitch_cli.evaluation.statistics import RESAMPLES, Array, Estimate, resampled_ratios

Verdict = Literal["worse", "better", "no difference beyond the margin", "n too small"]

#: Quantile of the standard normal distribution for 80 % power.
Z_POWER = 0.8416212335729143


@dataclass(frozen=True)
class PairedComparison:
    """A model against another on the same documents.

    Attributes:
        documents: pairs.
        difference: mean score of the model less the other's, with its 95 % interval.
        lost, gained: documents where the model scores lower, higher.
        p: two-sided, by the exact McNemar test where scores are 0 or 1, else by `paired_bootstrap`.
        test: which of the two.
        bootstrap: percentile interval of the difference by resampling documents.
        minimum_detectable_effect: the smallest true difference that this many documents find with 80 % power at 5 %.
        p_holm: p after Holm's correction over all comparisons of a report.
        margin: the difference that is agreed to be small.
        verdict: from interval, corrected p and margin; see `verdict_of`.
    """

    documents: int
    difference: Estimate
    lost: int
    gained: int
    p: float
    test: Literal["mcnemar", "bootstrap"]
    bootstrap: Estimate
    minimum_detectable_effect: float
    margin: float
    p_holm: float
    verdict: Verdict

    def to_row(self) -> dict[str, Any]:
        """Flat, for `report.json`."""
        row = asdict(self)
        for name in ("difference", "bootstrap"):
            estimate = row.pop(name)
            row |= {name: estimate["value"], f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}
        return row


def compare_paired(
    scores: Sequence[float], others: Sequence[float], *, margin: float = 0.02, seed: int = 0
) -> PairedComparison:
    """Compare document scores of a model with another's; `margin` is the difference agreed to be small.

    Raises:
        ValueError: the two differ in length, are empty, or hold a value that is not finite.
    """
    ours, theirs = np.asarray(scores, dtype=float), np.asarray(others, dtype=float)
    if ours.shape != theirs.shape or ours.ndim != 1 or ours.size == 0:
        raise ValueError(f"{ours.size} scores against {theirs.size}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("a score is not finite")
    change = ours - theirs
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    binary = bool(np.isin(ours, (0.0, 1.0)).all() and np.isin(theirs, (0.0, 1.0)).all())
    interval = binary_interval(lost, gained, change.size) if binary else mean_interval(change)
    bootstrap, bootstrap_p = paired_bootstrap(change, seed=seed)
    p = mcnemar_exact(lost, gained) if binary else bootstrap_p
    found = PairedComparison(
        documents=int(change.size),
        difference=interval,
        lost=lost,
        gained=gained,
        p=p,
        test="mcnemar" if binary else "bootstrap",
        bootstrap=bootstrap,
        minimum_detectable_effect=minimum_detectable_effect(change, binary=binary),
        margin=margin,
        p_holm=p,
        verdict="n too small",
    )
    return replace(found, verdict=verdict_of(found))


def verdict_of(found: PairedComparison, level: float = 0.05) -> Verdict:
    """`worse` or `better` where the corrected test says so; no difference where the whole 95 % interval lies within the
    margin; else there are too few documents to tell."""
    if found.p_holm < level:
        return "worse" if found.difference.value < 0 else "better"
    if found.difference.low > -found.margin and found.difference.high < found.margin:
        return "no difference beyond the margin"
    return "n too small"


def with_holm(found: Sequence[PairedComparison]) -> list[PairedComparison]:
    """The same comparisons with p-values corrected for their number, and the verdicts that follow."""
    corrected = holm([item.p for item in found])
    changed = [replace(item, p_holm=p) for item, p in zip(found, corrected, strict=True)]
    return [replace(item, verdict=verdict_of(item)) for item in changed]


def binary_interval(lost: int, gained: int, documents: int) -> Estimate:
    """95 % interval of a difference of paired proportions: Wald's with two pseudo-pairs, one of each discordant kind.

    Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data", J. Educ. Behav. Stat. 37: p12 = (b + 1) / (n + 2), p21 = (c + 1) / (n + 2).
    """
    more, less = (gained + 1) / (documents + 2), (lost + 1) / (documents + 2)
    centre = more - less
    half = Z_95 * math.sqrt((more + less - centre**2) / (documents + 2))
    return Estimate((gained - lost) / documents, max(-1.0, centre - half), min(1.0, centre + half))


def mean_interval(change: Array) -> Estimate:
    """95 % interval of a mean by Student's t; the whole line for a single document."""
    mean = float(change.mean())
    if change.size < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = student_95(change.size - 1) * float(change.std(ddof=1)) / math.sqrt(change.size)
    return Estimate(mean, mean - half, mean + half)


def student_95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by Abramowitz and Stegun 26.7.5; from tables for 1 and 2."""
    if degrees <= 2:
        return (12.706204736, 4.30265273)[degrees - 1]
    z, n = Z_95, float(degrees)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test (1947): are losses and gains equally likely? Binomial on the discordant pairs."""
    total = lost + gained
    if total == 0:
        return 1.0
    tail: int = sum(math.comb(total, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / float(2**total))


def paired_bootstrap(change: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[Estimate, float]:
    """Percentile interval of the mean change, and a two-sided p for a mean of zero, by resampling documents.

    p counts resamples of the centred changes that are at least as far from zero (Efron and Tibshirani 1993, chapter
    16), with one added to both counts so that it is never 0.
    """
    found = resampled_ratios(change, np.ones_like(change), seed=seed, resamples=resamples)
    observed = float(change.mean())
    low, high = np.quantile(found, [0.025, 0.975])
    extreme = int((np.abs(found - observed) >= abs(observed) - 1e-12).sum())
    return Estimate(observed, float(low), float(high)), (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the whole family's error stays below the level used."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def minimum_detectable_effect(change: Array, *, binary: bool) -> float:
    """The true difference that this many documents find with 80 % power at 5 %, two-sided.

    (z_0.975 + z_0.8) · sd / sqrt(n), sd of the changes; of 0 or 1 scores with the two pseudo-pairs of
    `binary_interval`, so that it is not 0 where no document changed.
    """
    count = change.size
    if binary:
        more, less = ((part + 1) / (count + 2) for part in ((change > 0).sum(), (change < 0).sum()))
        deviation = math.sqrt(more + less - (more - less) ** 2)
        return min(1.0, (Z_95 + Z_POWER) * deviation / math.sqrt(count + 2))
    if count < 2:
        return math.inf
    return (Z_95 + Z_POWER) * float(change.std(ddof=1)) / math.sqrt(count)
