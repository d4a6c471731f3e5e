"""The figures of a fidelity report: what is measured of a token, what a row says of it, and its column in the tables.

A new figure is an entry here, and a quantity where those there are do not give it; `report.json` and the tables follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from meswitch_cli.estimates import Z_95
from meswitch_cli.evaluation.statistics import (
    Array,
    Estimate,
    quantile_by_document,
    ratio_of_sums,
    ratio_standard_error,
)

#: A gap between base and expert smaller than this many standard errors is none: a share of it would be noise.
GAP_STANDARD_ERRORS = 2.0

#: The metric of answers to a text's prompts.
EXACT_MATCH = "exact_match"

Members = dict[str, float | None]
#: By quantity, each `[tokens]` float64 on the CPU: the answer tokens of one item.
TokenFigures = Mapping[str, torch.Tensor]


class LogProbabilities(NamedTuple):
    """Log-probabilities, fp32, at some answer tokens: the full expert's and the model's, of every token that could
    follow `[rows, vocabulary]` and of the one that does `[rows]`."""

    theirs: torch.Tensor
    ours: torch.Tensor
    their_answer: torch.Tensor
    our_answer: torch.Tensor


#: What is measured of an answer token. KL and losses are in nats, the first from the full expert's distribution.
QUANTITIES: Mapping[str, Callable[[LogProbabilities], torch.Tensor]] = {
    "kl": lambda rows: (rows.theirs.exp() * (rows.theirs - rows.ours)).sum(-1, dtype=torch.float64),
    "loss": lambda rows: -rows.our_answer,
    "reference_loss": lambda rows: -rows.their_answer,
    "agreed": lambda rows: rows.ours.argmax(-1) == rows.theirs.argmax(-1),
    "probability_change": lambda rows: rows.our_answer.double().exp() - rows.their_answer.double().exp(),
}


class Sample:
    """A model's figures of the items of a set.

    Items are the independent units, not tokens. A member `_se` is a standard error, `_low` and `_high` are a 95 %
    interval; they are None where a set has one item only.
    """

    def __init__(self, items: Sequence[TokenFigures], base: Sample | None = None, *, seed: int) -> None:
        self.items, self.base, self.seed = items, base, seed
        self.counts = np.array([len(item["kl"]) for item in items], dtype=float)

    def sums(self, quantity: str) -> Array:
        """A quantity's sum over each item."""
        return np.array([float(item[quantity].sum()) for item in self.items])

    def mean(self, name: str, quantity: str, less: str | None = None) -> Members:
        """A quantity's mean over tokens, or that of its difference to another one."""
        return self.mean_of(name, self.sums(quantity) - (self.sums(less) if less else 0.0))

    def mean_of(self, name: str, sums: Array) -> Members:
        """The mean over tokens of something with these sums over items."""
        return {name: float(sums.sum() / self.counts.sum()), f"{name}_se": ratio_standard_error(sums, self.counts)}

    def ratio(self, name: str, numerators: Array, denominators: Array) -> Members:
        """The ratio of two sums over items."""
        return self._interval(name, ratio_of_sums(numerators, denominators, seed=self.seed))

    def quantile(self, name: str, quantity: str, quantile: float) -> Members:
        """A quantile over tokens."""
        values = np.concatenate([item[quantity].numpy() for item in self.items])
        owners = np.repeat(np.arange(len(self.items)), self.counts.astype(int))
        return self._interval(name, quantile_by_document(values, owners, quantile, seed=self.seed))

    def _interval(self, name: str, found: Estimate) -> Members:
        low, high = (found.low, found.high) if len(self.items) > 1 else (None, None)
        return {name: found.value, f"{name}_low": low, f"{name}_high": high}


def plus_minus(row: Mapping[str, Any], name: str, factor: float = 1.0, digits: int = 5) -> str:
    """A figure and the half width of its 95 % interval."""
    value, error = row[name], row.get(f"{name}_se")
    digits = _decimals(factor * value, digits)
    text = f"{factor * value:.{digits}f}"
    return text if error is None else f"{text} ± {factor * Z_95 * error:.{digits}f}"


def _decimals(value: float, least: int) -> int:
    """Decimals that show two digits of a small figure: KLs of strong experts lie below a millionth."""
    return max(least, 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else least


def interval(row: Mapping[str, Any], name: str, factor: float = 1.0, digits: int = 5) -> str:
    """A figure and its 95 % interval."""
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if value is None:
        return ""
    digits = _decimals(factor * value, digits)
    text = f"{factor * value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"


@dataclass(frozen=True)
class Figure:
    """One figure of a model on a set.

    Attributes:
        name: its member in `report.json`; `base_` stands before it where it is the base's own.
        members: that member, and those of its uncertainty.
        title: of its column; a figure without one is in `report.json` alone.
        cell: the column's text, from a row and the member's name.
        full_expert: the column's text for the full expert.
        base: the column's text for the base; None: `cell` of the base's own figure.
        of_base: whether the base has the figure too.
    """

    name: str
    members: Callable[[Sample, str], Members]
    title: str = ""
    cell: Callable[[Mapping[str, Any], str], str] = plus_minus
    full_expert: str = "0"
    base: str | None = None
    of_base: bool = True


def _mean_kl(sample: Sample, name: str) -> Members:
    return sample.mean(name, "kl") | sample.ratio(name, sample.sums("kl"), sample.counts)


def _largest_kl(sample: Sample, name: str) -> Members:
    return {name: max(float(item["kl"].max()) for item in sample.items)}


def _root_mean_square(sample: Sample, name: str) -> Members:
    """Of the change of the probability of the token that follows."""
    squares = np.array([float(item["probability_change"].square().sum()) for item in sample.items])
    value, error = sample.mean_of(name, squares).values()
    assert value is not None
    root = float(np.sqrt(value))
    return {name: root, f"{name}_se": None if error is None else error / (2 * root) if root else 0.0}


def _kl_share(sample: Sample, name: str) -> Members:
    """The model's KL to the expert over the base's."""
    assert sample.base is not None
    of_base = sample.base.sums("kl")
    return sample.ratio(name, sample.sums("kl"), of_base) if of_base.sum() > 0 else _nothing(name)


def _gap_recovered(sample: Sample, name: str) -> Members:
    """(base's loss − the model's) / (base's loss − the expert's), None where that gap is not clear of zero.

    Above 1 the model fits these answers better than the expert, which is distance too.
    """
    assert sample.base is not None
    base_loss = sample.base.sums("loss")
    gained, possible = base_loss - sample.sums("loss"), base_loss - sample.base.sums("reference_loss")
    gap, error = sample.mean_of("gap", possible).values()
    if gap is None or gap <= GAP_STANDARD_ERRORS * (error or 0.0):
        return _nothing(name) | {f"{name}_se": None}
    return sample.ratio(name, gained, possible) | {f"{name}_se": ratio_standard_error(gained, possible)}


def _nothing(name: str) -> Members:
    return {name: None, f"{name}_low": None, f"{name}_high": None}


def _percent(digits: int) -> Callable[[Mapping[str, Any], str], str]:
    return partial(plus_minus, factor=100, digits=digits)


def _gap_cell(row: Mapping[str, Any], name: str) -> str:
    return "no clear gap" if row.get(name) is None else interval(row, name, 100, 2)


#: Of a model against the full expert; `ln_ppl_ratio` is ln(perplexity / the expert's perplexity).
FIGURES = (
    Figure("kl_mean", _mean_kl, "KL mean"),
    Figure("kl_median", partial(Sample.quantile, quantity="kl", quantile=0.5)),
    Figure("kl_p90", partial(Sample.quantile, quantity="kl", quantile=0.9)),
    Figure("kl_p99", partial(Sample.quantile, quantity="kl", quantile=0.99), "KL p99", interval),
    Figure("kl_p999", partial(Sample.quantile, quantity="kl", quantile=0.999), "KL p99.9", interval),
    Figure("kl_max", _largest_kl, "KL max", lambda row, name: f"{row[name]:.{_decimals(row[name], 4)}f}"),
    Figure("top1_agreement", partial(Sample.mean, quantity="agreed"), "same top token, %", _percent(2), "100"),
    Figure("ln_ppl", partial(Sample.mean, quantity="loss")),
    Figure("expert_ln_ppl", partial(Sample.mean, quantity="reference_loss"), of_base=False),
    Figure("ln_ppl_ratio", partial(Sample.mean, quantity="loss", less="reference_loss"), "ln(ppl / expert's)"),
    Figure("rms_delta_p", _root_mean_square, "RMS Δp, %", _percent(3)),
)
#: What part of the way from base to expert a model has gone.
AGAINST_BASE = (
    Figure("kl_share", _kl_share),
    Figure("gap_recovered", _gap_recovered, "gap recovered, %", _gap_cell, "100", base="0"),
)
COLUMNS = tuple(figure for figure in (*FIGURES, *AGAINST_BASE) if figure.title)


def item_sums(item: TokenFigures) -> dict[str, float]:
    """An item's sums over its answer tokens, and how many they are."""
    kl, loss, expert_loss, agreed = (float(item[name].sum()) for name in ("kl", "loss", "reference_loss", "agreed"))
    return {"tokens": len(item["kl"]), "kl": kl, "loss": loss, "expert_loss": expert_loss, "agreed": int(agreed)}


def model_row(figures: Sequence[TokenFigures], *, seed: int = 0) -> dict[str, Any]:
    """Figures of a model against the full expert, over all items."""
    sample = Sample(figures, seed=seed)
    return {"items": len(figures), "tokens": int(sample.counts.sum())} | _row(sample, FIGURES)


def base_row(base: Sequence[TokenFigures], *, seed: int = 0) -> Members:
    """The base's own figures against the full expert, under names that begin with `base_`."""
    return _row(Sample(base, seed=seed), [figure for figure in FIGURES if figure.of_base], "base_")


def against_base(figures: Sequence[TokenFigures], base: Sequence[TokenFigures], *, seed: int = 0) -> Members:
    """Figures of a model between base and full expert."""
    return _row(Sample(figures, Sample(base, seed=seed), seed=seed), AGAINST_BASE)


def _row(sample: Sample, figures: Sequence[Figure], prefix: str = "") -> Members:
    row = Members()
    for figure in figures:
        row |= figure.members(sample, prefix + figure.name)
    return row
