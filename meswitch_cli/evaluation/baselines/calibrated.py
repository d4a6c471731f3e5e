"""Calibrated rounding to a given grid: GPTQ, for methods whose authors round with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from meswitch_cli.delta.feedback import BLOCK, inverse_factor

#: `gptq` passes rounding errors on, over the calibration file's inputs.
CalibratedRounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Grid:
    """Levels (code − zero) · scale of codes 0 … top, of values `[rows, in]` element by element.

    Attributes:
        scale: that codes are chosen with.
        stored: the same as it is stored, which levels are made of.
        zero: 1/2 with a scale of 2a and a top of 1 gives the two levels ±a.
        top: the largest code.
    """

    scale: torch.Tensor
    stored: torch.Tensor
    zero: torch.Tensor
    top: int

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[rows, in]` as their nearest levels."""
        return ((values / self.scale + self.zero).round().clamp(0, self.top) - self.zero) * self.stored

    def part(self, columns: torch.Tensor | slice, shape: torch.Size) -> Grid:
        """The grid of some columns of values of this shape."""
        scale, stored, zero = (item.expand(shape)[:, columns] for item in (self.scale, self.stored, self.zero))
        return Grid(scale, stored, zero, self.top)

    def transposed(self) -> Grid:
        """The grid of the transposed values."""
        return Grid(self.scale.T, self.stored.T, self.zero.T, self.top)

    def with_feedback(self, values: torch.Tensor, feedback: Feedback) -> torch.Tensor:
        """Round `[rows, in]` column by column; the columns not yet rounded absorb each error (arXiv 2210.17323,
        section 3), those with the most energy first, each with the scale of its own place."""
        grid = self.part(feedback.order, values.shape)
        remaining = values[:, feedback.order]
        found, upper = torch.empty_like(remaining), feedback.upper
        for start in range(0, values.shape[1], BLOCK):
            stop = min(start + BLOCK, values.shape[1])
            errors = []
            for column in range(start, stop):
                at = slice(column, column + 1)
                found[:, at] = grid.part(at, values.shape).nearest(remaining[:, at])
                errors.append((remaining[:, at] - found[:, at]) / upper[column, column])
                remaining[:, column + 1 : stop] -= errors[-1] * upper[column, column + 1 : stop]
            remaining[:, stop:] -= torch.cat(errors, 1) @ upper[start:stop, stop:]
        return torch.empty_like(found).index_copy_(1, feedback.order, found)


@dataclass(frozen=True)
class Feedback:
    """What error feedback needs of the inputs: the order of the columns, `[in]`, and the damped inverse gram matrix's
    upper Cholesky factor in that order, `[in, in]`."""

    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor) -> Feedback:
        """From H = sum over tokens of x xᵀ, `[in, in]`."""
        order = gram.diagonal().argsort(descending=True)
        return cls(order, inverse_factor(gram[order][:, order]))


def rounded(values: torch.Tensor, grid: Grid, feedback: Feedback | None) -> torch.Tensor:
    """To the nearest level, or with error feedback where there is any."""
    return grid.nearest(values) if feedback is None else grid.with_feedback(values, feedback)
