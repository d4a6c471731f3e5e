"""The fidelity figures of one model on one set, each with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meswitch_cli.evaluation.fidelity import TokenFidelity
from meswitch_cli.evaluation.statistics import (
    Array,
    Estimate,
    quantile_by_document,
    ratio_of_sums,
    ratio_standard_error,
)

#: A gap between base and expert smaller than this many standard errors is none: a share of it would be noise.
GAP_STANDARD_ERRORS = 2.0


def model_row(figures: Sequence[TokenFidelity], *, seed: int = 0) -> dict[str, Any]:
    """Figures of a model against the full expert; `_se` is a standard error over documents, `_low` and `_high` a
    95 % interval, None where a set has one document only.

    KL in nats a token; `ln_ppl_ratio` is ln(perplexity / the expert's perplexity); `rms_delta_p` the root mean square
    change of the probability of the token that follows.
    """
    counts = np.array([len(item.kl) for item in figures], dtype=float)
    kl_tokens, documents = _tokens(figures, "kl")
    kl, loss, reference = (_sums(figures, name) for name in ("kl", "loss", "reference_loss"))
    squares = np.array([float(item.probability_change.square().sum()) for item in figures])
    rms = float(np.sqrt(squares.sum() / counts.sum()))
    squares_se = ratio_standard_error(squares, counts)
    row: dict[str, Any] = {"items": len(figures), "tokens": int(counts.sum())}
    row |= _with_error("kl_mean", kl, counts)
    row |= _with_interval("kl_mean", _several(figures, ratio_of_sums(kl, counts, seed=seed)))
    for name, quantile in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p99", 0.99), ("kl_p999", 0.999)):
        estimate = quantile_by_document(kl_tokens, documents, quantile, seed=seed)
        row |= {name: estimate.value} | _with_interval(name, _several(figures, estimate))
    row["kl_max"] = float(kl_tokens.max())
    row |= _with_error("ln_ppl", loss, counts)
    row |= _with_error("expert_ln_ppl", reference, counts)
    row |= _with_error("ln_ppl_ratio", loss - reference, counts)
    row |= _with_error("top1_agreement", _sums(figures, "agreed"), counts)
    row["rms_delta_p"] = rms
    row["rms_delta_p_se"] = None if squares_se is None else squares_se / (2 * rms) if rms else 0.0
    return row


def base_row(base: Sequence[TokenFidelity], *, seed: int = 0) -> dict[str, Any]:
    """The base's own figures against the full expert, as of `model_row`, under names that begin with `base_`."""
    row = model_row(base, seed=seed)
    return {f"base_{name}": row[name] for name in row if name.startswith(("kl_", "ln_ppl", "top1_", "rms_"))}


def against_base(
    figures: Sequence[TokenFidelity], base: Sequence[TokenFidelity], *, seed: int = 0
) -> dict[str, float | None]:
    """What part of the way from base to expert a model has gone.

    `gap_recovered` is (base's loss − the model's) / (base's loss − the expert's), None where that gap is not clear of
    zero; above 1 the model fits these answers better than the expert, which is distance too. `kl_share` is the
    model's KL to the expert over the base's.
    """
    counts = np.array([len(item.kl) for item in figures], dtype=float)
    kl, base_kl = _sums(figures, "kl"), _sums(base, "kl")
    base_loss = _sums(base, "loss")
    gained, possible = base_loss - _sums(figures, "loss"), base_loss - _sums(base, "reference_loss")
    share = ratio_of_sums(kl, base_kl, seed=seed) if base_kl.sum() > 0 else None
    row: dict[str, float | None] = {"kl_share": share.value if share else None}
    row |= _with_interval("kl_share", _several(figures, share))
    gap, gap_error = possible.sum() / counts.sum(), ratio_standard_error(possible, counts)
    clear = gap > 0 if gap_error is None else gap > GAP_STANDARD_ERRORS * gap_error
    recovered = ratio_of_sums(gained, possible, seed=seed) if clear else None
    row["gap_recovered"] = recovered.value if recovered else None
    row["gap_recovered_se"] = ratio_standard_error(gained, possible) if clear else None
    return row | _with_interval("gap_recovered", _several(figures, recovered))


def _sums(figures: Sequence[TokenFidelity], name: str) -> Array:
    return np.array([float(getattr(item, name).sum()) for item in figures])


def _tokens(figures: Sequence[TokenFidelity], name: str) -> tuple[Array, Any]:
    values = [getattr(item, name).numpy() for item in figures]
    return np.concatenate(values), np.repeat(np.arange(len(values)), [len(value) for value in values])


def _with_error(name: str, sums: Array, counts: Array) -> dict[str, float | None]:
    return {name: float(sums.sum() / counts.sum()), f"{name}_se": ratio_standard_error(sums, counts)}


def _several(figures: Sequence[TokenFidelity], estimate: Estimate | None) -> Estimate | None:
    """An interval over documents needs more than one."""
    return estimate if len(figures) > 1 else None


def _with_interval(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    low, high = (estimate.low, estimate.high) if estimate else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
