"""2:4 sparsity with few bits for what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, half


@dataclass(frozen=True, kw_only=True)
class Sparse(Method):
    """`sparse`: 2:4 by magnitude, survivors in `bits` bits (DeltaZip's format, arXiv 2312.05215, section 4).

    Symmetric levels −2^(bits−1) … 2^(bits−1)−1 of a 16-bit scale that `group` input channels share, 0: a row does.
    DeltaZip chooses and corrects with SparseGPT on calibration data. A survivor takes its code and 2 bits for a place.
    """

    bits: int = 2
    group: int = 128

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        """As `Method.approximate`; ValueError where the input channels are not a multiple of 4."""
        out, width = delta.shape
        if width % 4:
            raise ValueError(f"2:4 sparsity needs a multiple of 4 input channels, not {width}")
        quads = delta.view(out, -1, 4)
        kept = torch.zeros_like(quads).scatter_(-1, quads.abs().topk(2, dim=-1).indices, 1.0)
        sparse = (quads * kept).view(out, width)
        size = self.group or width
        padded = torch.nn.functional.pad(sparse, (0, -width % size)).view(out, -1, size)
        least, greatest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        scale = padded.abs().amax(-1, keepdim=True) / -least
        codes = (padded / scale.clamp(min=1e-12)).round().clamp(least, greatest)
        value = (codes * half(scale)).view(out, -1)[:, :width] * kept.view(out, width)
        survivors = out * width // 2
        nbytes = math.ceil(survivors * self.bits / 8) + math.ceil(survivors * 2 / 8) + 2 * out * padded.shape[1]
        return Approximation(value, nbytes)
