# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Codes rearranged in planes in one launch, straight into a slot of a bank: `packing.to_planes` for a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_its_device
from .triton_tiles import PLANE_WORDS

_BLOCK_ROWS = 16


@triton.jit
def rearrange_codes(source, target, out_features, words, BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Words `[out, words]` of `target`: a program's rows of one block of `PLANE_WORDS` words."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = rows.to(tl.int64)[:, None] * words + tl.program_id(1) * PLANE_WORDS
    together = tl.minimum(words - tl.program_id(1) * PLANE_WORDS, PLANE_WORDS)
    word = tl.arange(0, PLANE_WORDS)
    inside = (rows < out_features)[:, None] & (word < together)[None, :]
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    result = tl.zeros((BLOCK_ROWS, PLANE_WORDS), dtype=tl.int32)
    for plane in tl.static_range(16 // BITS):
        channel = 2 * (plane * together + word)
        # Of the same words each time, which a cache holds.
        given = tl.load(source + (first + (channel // PER_WORD)[None, :]), mask=inside, other=0)
        pair = given >> (channel % PER_WORD * BITS)[None, :]
        result |= ((pair & MASK) | ((pair >> BITS & MASK) << 16)) << (plane * BITS)
    tl.store(target + (first + word[None, :]), result, mask=inside)


@on_its_device
def to_planes(words: Tensor, bits: int, out: Tensor) -> None:
    """`packing.to_planes` of `words` `[out, words]` int32 into `out`, other memory of the same shape."""
    out_features, count = words.shape
    grid = (triton.cdiv(out_features, _BLOCK_ROWS), triton.cdiv(count, PLANE_WORDS.value))
    rearrange_codes[grid](words.contiguous(), out, out_features, count, BITS=bits, BLOCK_ROWS=_BLOCK_ROWS, num_warps=4)
