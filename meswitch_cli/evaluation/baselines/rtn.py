"""Asymmetric rounding to the nearest level: where GPTQ and AWQ start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from meswitch_cli.evaluation.baselines.calibrated import Grid
from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, half, packed_bytes


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(Method):
    """`rtn`: `group` input channels share a scale, 0: a row does."""

    bits: int = 2
    group: int = 0

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        return round_to_nearest(delta, self.bits, self.group)


def round_to_nearest(delta: torch.Tensor, bits: int, group: int = 0) -> Approximation:
    """Round `[out, in]` to the nearest levels of `asymmetric_grid`."""
    return Approximation(asymmetric_grid(delta, bits, group).nearest(delta), grid_bytes(delta.shape, bits, group))


def asymmetric_grid(delta: torch.Tensor, bits: int, group: int = 0) -> Grid:
    """Levels between a group's least and greatest value, zero included.

    scale = (max − min) / (2^bits − 1), zero = round(−min / scale); `group` input channels share a 16-bit scale and a
    zero point of `bits` bits, 0: a whole row does.
    """
    out, width = delta.shape
    size = group or width
    padded = torch.nn.functional.pad(delta, (0, -width % size)).view(out, -1, size)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=1e-12)
    zero = (-low / scale).round()

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(size, 1)[:, :width]

    return Grid(spread(scale), spread(half(scale)), spread(zero), top)


def grid_bytes(shape: torch.Size, bits: int, group: int = 0) -> int:
    """Bytes of codes `[out, in]` and of their scales and zero points."""
    groups = shape[0] * math.ceil(shape[1] / (group or shape[1]))
    return packed_bytes(shape, bits) + 2 * groups + math.ceil(groups * bits / 8)
