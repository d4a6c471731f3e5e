"""One sign bit and a scale per row or column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from meswitch_cli.evaluation.baselines.bitdelta import signs
from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, packed_bytes


@dataclass(frozen=True, kw_only=True)
class PerAxis(Method):
    """`per-axis`: a 16-bit scale per output row or input column, its mean magnitude (arXiv 2512.19720, section 3).

    `best` takes the axis with the smaller squared error of the weights; the authors choose it, and learn the scales, on
    calibration data.
    """

    axis: Literal["row", "column", "best"] = "best"

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        rows, columns = (delta.abs().mean(dim, keepdim=True).half().float() for dim in (1, 0))
        by_row, by_column = signs(delta) * rows, signs(delta) * columns
        axis = self.axis
        if axis == "best":
            axis = "row" if _squared(delta - by_row) <= _squared(delta - by_column) else "column"
        out, width = delta.shape
        scales = out if axis == "row" else width
        return Approximation(by_row if axis == "row" else by_column, packed_bytes(delta.shape, 1) + 2 * scales)


def _squared(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
