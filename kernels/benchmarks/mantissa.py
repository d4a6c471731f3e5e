"""What codes in bfloat16's mantissas lose in a tensor core that cuts sums off, simulated. Needs no GPU.

    python kernels/benchmarks/mantissa.py

A tensor core is taken to align the products of a step of 16 channels, and the sum so far, to the largest of them, and
to cut off what lies below float32's last bit, or two bits further down. Prints ‖y − truth‖ / ‖truth‖ of the delta's
product alone, for x of several means.
"""

from __future__ import annotations

import sys

import numpy as np
from common import table
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROWS, CHANNELS, STEP, PLANES = 24, 4096, 16, 16
MEANS = (0.0, 0.5, 3.0)
TINY = 1e-30


def cut(values: Array, unit: Array | float) -> Array:
    """Values without what lies below `unit`."""
    return np.asarray(np.trunc(values / unit) * unit, dtype=np.float64)


def unit_of(largest: Array, more_bits: int) -> Array:
    """The last bit of float32 at this size, or one some bits further down."""
    return np.asarray(2.0 ** (np.floor(np.log2(np.maximum(largest, TINY))) - 23 - more_bits))


def dot(values: Array, x: Array, more_bits: int) -> Array:
    """`values` `[rows, channels]` times x, as such a tensor core adds."""
    total = np.zeros(len(values))
    for first in range(0, len(x), STEP):
        products = values[:, first : first + STEP] * x[first : first + STEP]
        unit = unit_of(np.maximum(np.abs(total), np.abs(products).max(1)), more_bits)
        total = cut(total, unit) + cut(products, unit[:, None]).sum(1)
        total = cut(total, unit_of(np.abs(total), 0))
    return total


def bfloat16(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.asarray(rounded.astype(np.uint32).view(np.float32), dtype=np.float64)


def errors(mean: float, more_bits: int, seed: int) -> dict[str, float]:
    """The relative error of each way, for random signs and x of a mean."""
    rng = np.random.default_rng(seed)
    x = bfloat16(rng.normal(size=CHANNELS) + mean)
    codes = rng.integers(0, 2, size=(ROWS, CHANNELS)).astype(np.float64)
    channel = np.arange(CHANNELS)
    plane = channel // (2 * PLANES) % PLANES
    truth = ((codes - 0.5) * x).sum(1)
    found = {}

    total = np.zeros(ROWS)
    for turn in range(3):
        own = plane % 3 == turn
        product = dot(128 + codes[:, own] * 2.0**turn, x[own], more_bits)
        of_x = dot(np.ones((1, int(own.sum()))), x[own], more_bits)
        total += product * 0.5**turn - of_x * (128 * 0.5**turn + 0.5)
    found["three places, each with sums of x by the tensor core"] = total

    place = plane % 8
    scaled = x * 0.5**place
    product = dot(128 + codes * 2.0**place, scaled, more_bits)
    of_x = 128 * dot(np.ones((1, CHANNELS)), scaled, more_bits)
    found["eight places in x, sums by the tensor core"] = product - of_x - 0.5 * x.sum()
    found["eight places in x, sums apart"] = product - 128 * scaled.sum() - 0.5 * x.sum()

    added = np.where(channel % 2 == 0, 128.0, -128.0 - 2.0**place)
    product = dot(added + codes * 2.0**place, scaled, more_bits)
    found["eight places in x, 128 and -128 by turns, sums apart"] = product - (added * scaled).sum() - 0.5 * x.sum()
    return {way: float(np.linalg.norm(y - truth) / np.linalg.norm(truth)) for way, y in found.items()}


def main() -> int:
    columns = [(mean, more_bits) for more_bits in (0, 2) for mean in MEANS]
    by_column = [[errors(mean, more_bits, seed) for seed in range(2)] for mean, more_bits in columns]
    header = [f"mean {mean:g}, {23 + more_bits} bits" for mean, more_bits in columns]
    rows = [[way, *(f"{np.mean([run[way] for run in runs]):.1e}" for runs in by_column)] for way in by_column[0][0]]
    print(table(["way", *header], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
