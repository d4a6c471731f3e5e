"""Other methods' deltas, for comparison: pure functions of a delta `[out, in]` fp32.

Each returns the delta that the method would serve and the bytes that it would store, counted exactly: packed codes by
rows, 16-bit scales. Where authors calibrate and this code does not, the docstring says so.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

Axis = Literal["row", "column", "best"]

#: Singular vectors that Delta-CoMe keeps at 8 and at 3 bits; the rest have 2 (its published run at 1/16 of the size).
COME_VECTORS = {8: 2, 3: 32}
COME_GROUP = 128


class Approximation(NamedTuple):
    """A delta `[out, in]` as a method gives it back, and the bytes that it takes on disk."""

    delta: torch.Tensor
    nbytes: int


def bitdelta_start(delta: torch.Tensor) -> torch.Tensor:
    """BitDelta before distillation: the sign of each entry times the matrix's mean magnitude (arXiv 2402.10193, eq. 3).

    `delta` is `[out, in]`; entries that are zero count as negative, as in its packed form.
    """
    return signs(delta) * delta.abs().mean()


def signs(delta: torch.Tensor) -> torch.Tensor:
    """1 where an entry is positive, else −1."""
    return torch.where(delta > 0, 1.0, -1.0)


def bitdelta(delta: torch.Tensor, masks: int = 1) -> Approximation:
    """BitDelta with one sign mask or several, each on what the ones before leave (its fair rival at 2 bits)."""
    total = torch.zeros_like(delta)
    for _ in range(masks):
        total += bitdelta_start(delta - total)
    return Approximation(total, masks * (packed_bytes(delta.shape, 1) + 2))


def per_axis(delta: torch.Tensor, axis: Axis = "best") -> Approximation:
    """One sign bit and a 16-bit scale per output row or input column: its mean magnitude (arXiv 2512.19720, section 3).

    `best` takes the axis with the smaller squared error of the weights; the authors choose it, and learn the scales, on
    calibration data.
    """
    rows, columns = (delta.abs().mean(dim, keepdim=True).half().float() for dim in (1, 0))
    by_row, by_column = signs(delta) * rows, signs(delta) * columns
    if axis == "best":
        axis = "row" if _squared(delta - by_row) <= _squared(delta - by_column) else "column"
    out, width = delta.shape
    scales = out if axis == "row" else width
    return Approximation(by_row if axis == "row" else by_column, packed_bytes(delta.shape, 1) + 2 * scales)


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
    value = ((codes - zero) * _half(scale)).view(out, -1)[:, :width]
    groups = out * padded.shape[1]
    return Approximation(
        value.contiguous(), packed_bytes(delta.shape, bits) + 2 * groups + math.ceil(groups * bits / 8)
    )


def low_rank(delta: torch.Tensor, rank: int) -> Approximation:
    """The best approximation of a rank (Eckart and Young), its two factors in 16 bit, singular values split evenly."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[:rank].sqrt()
    factors = _half(left[:, :rank] * root), _half(root[:, None] * right[:rank])
    return Approximation(factors[0] @ factors[1], 2 * rank * sum(delta.shape))


def rank_at(shape: torch.Size, bits: float) -> int:
    """Rank whose two 16-bit factors take at most `bits` bits a weight, at least 1."""
    out, width = shape
    return max(1, int(bits * out * width / (16 * (out + width))))


def delta_come(delta: torch.Tensor, bits: float = 1.0) -> Approximation:
    """Delta-CoMe: singular vectors at 8, 3 and 2 bits by their value (arXiv 2406.08903, section 3), to a budget.

    The two first at 8 bits, 32 at 3, as many as the budget allows at 2, in groups of 128 along a vector. Rounded to
    nearest; the authors round with GPTQ on calibration data. The budget counts codes alone, as theirs does; scales
    and zero points are in the bytes.
    """
    out, width = delta.shape
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    budget = bits * out * width / (out + width)
    ranks: list[tuple[int, int]] = []
    for precision, count in COME_VECTORS.items():
        taken = min(count, int(budget / precision))
        ranks.append((precision, taken))
        budget -= precision * taken
    ranks.append((2, int(budget / 2)))
    total, nbytes, start = torch.zeros_like(delta), 0, 0
    for precision, count in ranks:
        stop = min(start + count, len(values))
        if stop == start:
            continue
        root = values[start:stop].sqrt()
        columns = round_to_nearest((left[:, start:stop] * root).T.contiguous(), precision, COME_GROUP)
        rows = round_to_nearest(root[:, None] * right[start:stop], precision, COME_GROUP)
        total += columns.delta.T @ rows.delta
        nbytes += columns.nbytes + rows.nbytes
        start = stop
    return Approximation(total, nbytes)


def sparse_quantised(delta: torch.Tensor, bits: int = 2, group: int = 128) -> Approximation:
    """2:4 sparsity by magnitude, survivors at `bits` bits in groups (DeltaZip's format, arXiv 2312.05215, section 4).

    Symmetric levels −2^(bits−1) … 2^(bits−1)−1 of a 16-bit scale a group. DeltaZip chooses and corrects with SparseGPT
    on calibration data. A survivor takes its code and 2 bits for its place.

    Raises:
        ValueError: the input channels are not a multiple of 4.
    """
    out, width = delta.shape
    if width % 4:
        raise ValueError(f"2:4 sparsity needs a multiple of 4 input channels, not {width}")
    quads = delta.view(out, -1, 4)
    kept = torch.zeros_like(quads).scatter_(-1, quads.abs().topk(2, dim=-1).indices, 1.0)
    sparse = (quads * kept).view(out, width)
    padded = torch.nn.functional.pad(sparse, (0, -width % group)).view(out, -1, group)
    least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = padded.abs().amax(-1, keepdim=True) / -least
    codes = (padded / scale.clamp(min=1e-12)).round().clamp(least, greatest)
    value = (codes * _half(scale)).view(out, -1)[:, :width] * kept.view(out, width)
    survivors = out * width // 2
    nbytes = math.ceil(survivors * bits / 8) + math.ceil(survivors * 2 / 8) + 2 * out * padded.shape[1]
    return Approximation(value, nbytes)


def packed_bytes(shape: torch.Size, bits: int) -> int:
    """Bytes of `[out, in]` codes, each row packed by itself to whole bytes."""
    out, width = shape
    return out * math.ceil(width * bits / 8)


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def _squared(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
