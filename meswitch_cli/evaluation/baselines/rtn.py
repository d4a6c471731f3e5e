"""Asymmetric rounding to the nearest level: where GPTQ and AWQ start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, half, packed_bytes


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(Method):
    """`rtn`: `group` input channels share a scale, 0: a row does."""

    bits: int = 2
    group: int = 0

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        return round_to_nearest(delta, self.bits, self.group)


def round_to_nearest(delta: torch.Tensor, bits: int, group: int = 0) -> Approximation:
    """Asymmetric round to nearest between a group's least and greatest value, zero included: where GPTQ and AWQ start.

    scale = (max − min) / (2^bits − 1), zero = round(−min / scale); `group` input channels share a 16-bit scale and a
    zero point of `bits` bits, 0: a whole row does.
    """
    out, width = delta.shape
    size = group or width
    padded = torch.nn.functional.pad(delta, (0, -width % size)).view(out, -1, size)
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=1e-12)
    zero = (-low / scale).round()
    codes = ((padded / scale).round() + zero).clamp(0, top)
    value = ((codes - zero) * half(scale)).view(out, -1)[:, :width]
    groups = out * padded.shape[1]
    return Approximation(
        value.contiguous(), packed_bytes(delta.shape, bits) + 2 * groups + math.ceil(groups * bits / 8)
    )
