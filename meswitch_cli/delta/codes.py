"""The codes that a delta may be stored in, one entry a kind, and how a row of them lies in 32-bit words.

Codes are mid-rise uniform: code c stands for c - (2^bits - 1) / 2 times the step, for -1.5, -0.5, 0.5 or 1.5 at 2 bits.
Torch is imported where it is used: the command line offers these codes, and its help must not wait.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

WORD_BITS = 32


class Code(NamedTuple):
    """One kind of code.

    Attributes:
        bits: that a weight takes.
        gaussian_step: step of the best such quantiser of a unit Gaussian (Max 1960, table II): where fitting starts.
        version: of the artifact's format, the first whose readers know the code.
    """

    bits: int
    gaussian_step: float
    version: int = 1

    @property
    def group_multiple(self) -> int:
        """What the size of a group of channels is a multiple of: of 32, and of whole words."""
        return math.lcm(32, WORD_BITS // self.bits)

    @property
    def largest(self) -> float:
        """The largest multiple of the step."""
        return ((1 << self.bits) - 1) / 2


CODES = {code.bits: code for code in (Code(1, 1.5958), Code(2, 0.9957), Code(4, 0.3352))}
#: The widths as messages list them.
LISTED = " or ".join(", ".join(map(str, CODES)).rsplit(", ", 1))


def packed_width(in_features: int, bits: int) -> int:
    """Words that one row of codes takes."""
    return -(-in_features * bits // WORD_BITS)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes `[out, in]` uint8 into `[out, ceil(in * bits / 32)]` int32; padding bits are zero.

    Code i of a row lies at bits (i * bits) % 32 and up of word (i * bits) // 32.
    """
    import torch

    rows, columns = codes.shape
    width = packed_width(columns, bits)
    padding = width * WORD_BITS // bits - columns
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    bytes_together = {1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]  # the codes of a packed byte, a byte each
    lanes = codes.contiguous().flatten().view(bytes_together)  # flat: a single row may have any stride
    joined = 1  # codes that lie side by side, without a gap, at the bottom of each byte
    while joined < 8 // bits:
        lanes = lanes | lanes >> (joined * (8 - bits))
        joined *= 2
    return (lanes & 0xFF).to(torch.uint8).view(torch.int32).view(rows, width)


def unpack(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Invert `pack`: `[out, words]` int32 to codes `[out, in_features]` uint8."""
    import torch

    as_bytes = packed.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    lanes = [(as_bytes >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(lanes, dim=-1).reshape(packed.shape[0], -1)[:, :in_features]
