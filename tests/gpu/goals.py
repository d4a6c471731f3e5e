"""The goals on Mistral-7B's shapes, beside what a run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A bound, and where the run says how far it is.

    Attributes:
        most: whether `bound` is the most that may be, else the least.
        measure: the value in the figures of a run; it raises LookupError where they have none.
    """

    what: str
    bound: float
    most: bool
    measure: Callable[[Sequence[Row]], float]

    def row(self, figures: Sequence[Row]) -> tuple[str, str, str, str]:
        """What, bound, measured, met."""
        bound = f"{'at most' if self.most else 'at least'} {self.bound:g}"
        try:
            found = self.measure(figures)
        except LookupError:
            return self.what, bound, "not measured", ""
        met = found <= self.bound if self.most else found >= self.bound
        return self.what, bound, f"{found:.3g}", "yes" if met else "**no**"


def rows_of(figures: Sequence[Row], figure: str, **wanted: object) -> Iterator[Row]:
    """Rows of a table with these values."""
    for row in figures:
        if row["figure"] == figure and all(row.get(name) == value for name, value in wanted.items()):
            yield row


def first(rows: Iterator[Row]) -> Row:
    """Raises LookupError where there is none."""
    for row in rows:
        return row
    raise LookupError("no such figure")


def decoder_ratio(bits: float, experts: int, tokens: int) -> Callable[[Sequence[Row]], float]:
    def measure(figures: Sequence[Row]) -> float:
        row = first(rows_of(figures, "decoder", bits=bits, experts=experts, tokens=tokens))
        return float(row["times_base"])

    return measure


def engine_ratio(bits: str, experts: int, requests: int) -> Callable[[Sequence[Row]], float]:
    """Steps of a mixed batch over those of as many requests on an engine without experts."""

    def measure(figures: Sequence[Row]) -> float:
        own = first(rows_of(figures, "decode", bits=bits, experts=experts, requests=requests))
        base = first(rows_of(figures, "decode", what="the base alone", requests=requests))
        return float(own["step_ms_p50"] / base["step_ms_p50"])

    return measure


def prefill_share(figures: Sequence[Row]) -> float:
    """Of the layer that comes off worst."""
    rows = list(rows_of(figures, "linear_prefill", tokens=2048, which="as the engine plans"))
    if not rows:
        raise LookupError("no prefill")
    return float(min(row["of_cublas_on_merged"] for row in rows))


def launches(figures: Sequence[Row]) -> float:
    row = first(rows_of(figures, "profile", experts=16))
    return float(row["kernels_of_32_layers"])


def loading_gap(figures: Sequence[Row]) -> float:
    """The 99th percentile of gaps between tokens beside loads, over that without."""
    rows = list(rows_of(figures, "switch"))
    if not rows:
        raise LookupError("no switch")
    return float(max(row["gap_ms_p99_loading"] / row["gap_ms_p99_quiet"] for row in rows))


GOALS = (
    Goal("decoder: 16 experts of 2 bits, times the base's step", 3.5, True, decoder_ratio(2, 16, 16)),
    Goal("decoder: 16 experts of 1 bit and rank 16, times the base's step", 2.5, True, decoder_ratio(1, 16, 16)),
    Goal("decoder: 16 experts of 1/4 bit and rank 16, times the base's step", 1.5, True, decoder_ratio(0.25, 16, 16)),
    Goal("decoder: one expert of 2 bits, times the base's step", 1.2, True, decoder_ratio(2, 1, 1)),
    Goal("decoder: one expert of 1 bit and rank 16, times the base's step", 1.2, True, decoder_ratio(1, 1, 1)),
    Goal("engine: 16 experts of 2 bits, times the base alone", 3.5, True, engine_ratio("2", 16, 16)),
    Goal("engine: 16 experts of 1 bit, times the base alone", 2.5, True, engine_ratio("1", 16, 16)),
    Goal("engine: 16 experts of 1/4 bit, times the base alone", 1.5, True, engine_ratio("0.25", 16, 16)),
    Goal("engine: one expert of 2 bits, times the base alone", 1.2, True, engine_ratio("2", 1, 1)),
    Goal("prefill of 2,048 tokens, of cuBLAS on merged weights", 0.85, False, prefill_share),
    Goal("kernels of a decode step, of 32 layers", 450, True, launches),
    Goal("gap p99 of running requests while experts load, times without", 2.0, True, loading_gap),
)


def goals(figures: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """A row of each goal, where a run on a card measured any."""
    found = [goal.row(figures) for goal in GOALS]
    return found if any(row[3] for row in found) else []
