"""Storing a product of two given factors, as an adapter's is: a low-rank part that stands alone.

At 16 bits the factors themselves are stored, each vector times a power of two that fills fp16's range, so that factors
in bf16 or fp16 lose nothing. Coded factors are the product's singular vectors: each has a step of its own, so the large
directions do not coarsen the small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from meswitch_cli.delta.low_rank import FACTOR_WIDTHS, HALF_BITS, rounded
from meswitch_cli.delta.quantize import DeltaError
from meswitch_cli.delta.stored import StoredDelta


@dataclass(frozen=True)
class Factors:
    """A delta as a product `scale * left.T @ right`: left `[rank, out]`, right `[rank, in]`, of any floating dtype."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float = 1.0

    def product(self) -> torch.Tensor:
        """The delta, fp32 `[out, in]`."""
        return (self.scale * self.left.float()).T @ self.right.float()


def store_factors(factors: Factors, bits: int) -> tuple[StoredDelta, DeltaError] | None:
    """Store a product; None where it is zero.

    Raises:
        ValueError: factors cannot have so many bits.
        FloatingPointError: a number is NaN or infinite.
    """
    if bits not in FACTOR_WIDTHS:
        raise ValueError(f"factor bits must be one of {', '.join(map(str, FACTOR_WIDTHS))}, not {bits}")
    left, right, scale = factors.left.float(), factors.right.float(), factors.scale
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise FloatingPointError("NaN or infinity")
    used = (left != 0).any(1) & (right != 0).any(1)
    left, right = left[used], right[used]
    if not len(left) or not scale:
        return None
    if bits != HALF_BITS or len(left) > min(left.shape[1], right.shape[1]):
        left, right, scale = *_singular(left, right, scale), 1.0
    parts: dict[str, Any] = {}
    for side, vectors, times in (("left", left, scale), ("right", right, 1.0)):
        stored, steps, _ = rounded(vectors, bits)
        parts[f"{side}_{'values' if bits == HALF_BITS else 'codes'}"] = stored
        parts[f"{side}_steps"] = steps * times
    delta = StoredDelta(in_features=right.shape[1], out_features=left.shape[1], factor_bits=bits, **parts)
    return delta, _error(factors, delta)


def _singular(left: torch.Tensor, right: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product, times the scale, of its singular vectors, each times the root of its value: `[rank, out]`,
    `[rank, in]`."""
    left_basis, left_rest = torch.linalg.qr(left.double().T)
    right_basis, right_rest = torch.linalg.qr(right.double().T)
    turned, values, back = torch.linalg.svd(scale * left_rest @ right_rest.T)
    values = values[: min(len(values), left.shape[1], right.shape[1])]
    kept = values > values[0] * torch.finfo(torch.float32).eps
    roots = values[kept].sqrt()
    own = (left_basis @ turned[:, : len(values)][:, kept]) * roots
    other = (right_basis @ back.T[:, : len(values)][:, kept]) * roots
    return own.T.float().contiguous(), other.T.float().contiguous()


def _error(factors: Factors, delta: StoredDelta) -> DeltaError:
    """How far what is stored is from the product, without building either: by the factors' own products."""
    decoded = delta.factors()
    assert decoded is not None
    left = torch.cat([factors.scale * factors.left.double(), -decoded[0].T.double()])
    right = torch.cat([factors.right.double(), decoded[1].double()])
    rank = len(factors.left)
    both = (left @ left.T) * (right @ right.T)
    energy = float(both[:rank, :rank].sum())
    return DeltaError(energy, max(0.0, float(both.sum())) / energy if energy > 0 else 0.0, None)
