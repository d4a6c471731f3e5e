# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Pieces of the Triton kernels: a tile of packed codes as values, and the salient channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_per_row(in_features, bits):
    """Words that an output row of codes takes."""
    return (in_features * bits + 31) // 32


@triton.jit
def codes_at(codes, k, inside, bits):
    """Codes int32 of the channels `k` of the row whose first word `codes` points to, whatever their width."""
    words = tl.load(codes + (k * bits >> 5), mask=inside, other=0)
    return (words >> (k * bits & 31)) & ((1 << bits) - 1)


@triton.jit
def load_codes(
    codes,  # pointer to the first word of the first row
    rows,  # rows counted from there, [BLOCK_OUT]
    k_start,
    in_features,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes `[BLOCK_OUT, BLOCK_K]` int32 of channels `k_start` and up; zeros past the last channel."""
    first = rows * words_per_row(in_features, BITS)
    PER_WORD: tl.constexpr = 32 // BITS
    word = k_start // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
    inside = (word * PER_WORD < in_features)[None, :]
    words = tl.load(codes + (first[:, None] + word[None, :]), mask=inside, other=0)
    shifts = tl.arange(0, PER_WORD) * BITS
    unpacked = (words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(unpacked, (rows.shape[0], BLOCK_K))


@triton.jit
def code_values(codes, BITS: tl.constexpr):
    """Codes as float32 values, (code - (2^bits - 1) / 2), exactly.

    Setting a code into the mantissa of 2^23 converts it at the rate of ordinary arithmetic; the conversion
    instruction runs at a fraction of that.
    """
    whole = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return whole - ((1 << BITS) - 1) / 2


@triton.jit
def load_steps(
    steps,  # pointer to the first step of the first row
    rows,  # rows counted from there, [BLOCK_OUT]
    k_start,
    group_size,
    in_features,
    BLOCK_K: tl.constexpr,
):
    """The step `[BLOCK_OUT, BLOCK_K]` of each channel, for groups of a multiple of 32 channels, or 0: one."""
    group_size = tl.where(group_size > 0, group_size, in_features + 31)
    groups = tl.cdiv(in_features, group_size)
    part = (k_start + 32 * tl.arange(0, BLOCK_K // 32)) // group_size
    step = tl.load(steps + (rows[:, None] * groups + part[None, :]), mask=(part < groups)[None, :], other=0.0)
    spread = tl.broadcast_to(step[:, :, None], (rows.shape[0], BLOCK_K // 32, 32))
    return tl.reshape(spread, (rows.shape[0], BLOCK_K))


@triton.jit
def slot_is_servable(slot, slot_bits, slots):
    """Whether `slot` is the base, or inside the bank and loaded."""
    inside = (slot >= 0) & (slot < slots)
    loaded = tl.load(slot_bits + tl.where(inside, slot, 0)) > 0
    return (slot == -1) | (inside & loaded)


@triton.jit
def slot_rows(slot, per_slot, row, per_row):
    """Offset of a slot's row in a stacked tensor, in 64 bits; what is added to it fits in 32."""
    return slot.to(tl.int64) * per_slot + row.to(tl.int64) * per_row
