"""Codes of 1, 2 or 4 bits in 32-bit words, little-endian along the input dimension."""

from __future__ import annotations

import torch

WORD_BITS = 32

#: By bits: the integer that holds the codes of one packed byte, a byte each.
_SPREAD = {1: torch.int64, 2: torch.int32, 4: torch.int16}


def packed_width(in_features: int, bits: int) -> int:
    """Words that one row of codes takes."""
    return -(-in_features * bits // WORD_BITS)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes `[out, in]` uint8 into `[out, ceil(in * bits / 32)]` int32; padding bits are zero.

    Code i of a row lies at bits (i * bits) % 32 and up of word (i * bits) // 32.
    """
    rows, columns = codes.shape
    width = packed_width(columns, bits)
    padding = width * WORD_BITS // bits - columns
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    lanes = codes.contiguous().flatten().view(_SPREAD[bits])  # flat: a single row may have any stride
    joined = 1  # codes that lie side by side, without a gap, at the bottom of each byte
    while joined < 8 // bits:
        lanes = lanes | lanes >> (joined * (8 - bits))
        joined *= 2
    return (lanes & 0xFF).to(torch.uint8).view(torch.int32).view(rows, width)


def unpack(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Invert `pack`: `[out, words]` int32 to codes `[out, in_features]` uint8."""
    as_bytes = packed.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    lanes = [(as_bytes >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(lanes, dim=-1).reshape(packed.shape[0], -1)[:, :in_features]
