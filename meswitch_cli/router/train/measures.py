"""Figures of merit of routing, from probabilities, distances and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meswitch_cli.estimates import wilson_interval

Array = NDArray[np.float64]
#: Equal-width bins of the expected calibration error, as in Guo et al. (arXiv 1706.04599).
BINS = 15
#: Six decimals of `Z_95`, as every router.json has it: its figures are the same bytes for the same data.
_Z_95 = 1.959964


def calibration_error(probabilities: Array, truth: NDArray[np.int64]) -> float:
    """Expected calibration error: |accuracy - confidence| of each bin of confidence, weighted by its prompts."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [
        abs(correct[bins == index].mean() - confidence[bins == index].mean()) * (bins == index).mean()
        for index in range(BINS)
        if (bins == index).any()
    ]
    return float(sum(gaps))


def brier_score(probabilities: Array, truth: NDArray[np.int64]) -> float:
    """Mean over prompts of Σ (probability - 1{label is right})², 0 to 2."""
    return float(((probabilities - np.eye(probabilities.shape[1])[truth]) ** 2).sum(1).mean())


def negative_log_likelihood(probabilities: Array, truth: NDArray[np.int64]) -> float:
    """Mean over prompts of -log probability of the right label, nats."""
    right = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.maximum(right, 1e-12)).mean())


def auroc(held_in: Array, null: Array) -> float:
    """Probability that a null prompt's distance is above a held-in one's, ties half (Mann-Whitney)."""
    order = np.concatenate([held_in, null])
    _, inverse, counts = np.unique(order, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    statistic = ranks[len(held_in) :].sum() - len(null) * (len(null) + 1) / 2
    return float(statistic / (len(held_in) * len(null)))


def false_positive_rate(held_in: Array, null: Array, true_positive_rate: float = 0.95) -> float:
    """Share of null prompts let through by the threshold that lets this share of the held-in ones through."""
    return float((null <= np.quantile(held_in, true_positive_rate)).mean())


def per_label(predicted: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and prompts of each label; what was not routed there counts against recall."""
    result = {}
    for label in labels:
        right = sum(1 for mine, true in zip(predicted, truth, strict=True) if mine == true == label)
        chosen, present = sum(mine == label for mine in predicted), sum(true == label for true in truth)
        precision, recall = right / chosen if chosen else 0.0, right / present if present else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        result[label] = {"precision": precision, "recall": recall, "f1": f1, "prompts": float(present)}
    return result


def confusion(
    predicted: Sequence[str], truth: Sequence[str | None], labels: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Rows: the truth, "null" last; columns: where prompts went, "fallback" last."""
    columns = [*labels, "fallback"]
    rows: dict[str, dict[str, int]] = {label: dict.fromkeys(columns, 0) for label in labels}
    if None in truth:
        rows["null"] = dict.fromkeys(columns, 0)
    for mine, true in zip(predicted, truth, strict=True):
        rows["null" if true is None else true][mine] += 1
    return rows


def proportion(successes: int, count: int) -> dict[str, Any]:
    """A share with its interval, as reports give it."""
    low, high = wilson_interval(successes, count, _Z_95)
    return {"value": successes / count if count else 0.0, "low": low, "high": high, "prompts": count}
