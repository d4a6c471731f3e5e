"""The delta's leading singular directions alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, half


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(Method):
    """`low-rank`: the best approximation of a rank (Eckart and Young), its two factors in 16 bit.

    `rank` 0: as many directions as fit into `bits` bits a weight.
    """

    bits: float = 1.0
    rank: int = 0

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        return truncated(delta, self.rank or rank_at(delta.shape, self.bits))


def truncated(delta: torch.Tensor, rank: int) -> Approximation:
    """The best approximation of a rank, its singular values split evenly between two factors in 16 bit."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[:rank].sqrt()
    factors = half(left[:, :rank] * root), half(root[:, None] * right[:rank])
    return Approximation(factors[0] @ factors[1], 2 * rank * sum(delta.shape))


def rank_at(shape: torch.Size, bits: float) -> int:
    """Rank whose two 16-bit factors take at most `bits` bits a weight, at least 1."""
    out, width = shape
    return max(1, int(bits * out * width / (16 * (out + width))))
