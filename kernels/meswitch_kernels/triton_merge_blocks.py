# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Pieces of merged weights W + Δ̂: of a block of words of some rows, and of one salient channel."""

from __future__ import annotations

import triton
import triton.language as tl

from .messages import FIRST_NUMBER as _FIRST_NUMBER
from .packing import PLANE_WORDS as _PLANE_WORDS
from .packing import WORD_BITS as _WORD_BITS
from .triton_messages import channels_a_bit, code_width, is_message, row_words, unit_codes, width_of
from .triton_tiles import PLANE_WORDS, codes_at


@triton.constexpr_function
def block_channels(number):
    """Channels of a row that a program merges: those of a block of planes, of messages as many as at 1 bit."""
    return _PLANE_WORDS * _WORD_BITS // (1 if number > _FIRST_NUMBER else number)


@triton.constexpr_function
def block_words(number):
    """Words of as many channels."""
    return _PLANE_WORDS if number < _FIRST_NUMBER else _PLANE_WORDS // (number - _FIRST_NUMBER)


@triton.jit
def _plane_codes(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """`[rows, 2n]` float32 of a plane of words `[rows, n]`: codes less their middle, and what to multiply them by.

    A code is set into the mantissa of 2^23 where it lies, and taken out again with its middle: exactly, since it does
    not lie in the last place.
    """
    UP: tl.constexpr = 1 if PLANE == 0 else 0
    PLACE: tl.constexpr = PLANE * BITS + UP
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    both = tl.reshape(tl.join(words << UP, (words >> 16) << UP), (words.shape[0], 2 * words.shape[1]))
    value = ((both & MASK) | 0x4B000000).to(tl.float32, bitcast=True)
    return value - (8388608.0 + ((1 << BITS) - 1) / 2 * (1 << PLACE)), 0.5**PLACE


@triton.jit
def _unit_pair(codes, first_unit, words_of_row, NUMBER: tl.constexpr, PART: tl.constexpr):
    """`[rows, 64]` float32 of two neighbouring units of messages: codes less their middle."""
    WIDTH: tl.constexpr = code_width(NUMBER)
    low, high = unit_codes(codes, first_unit, words_of_row, NUMBER, PART)
    next_low, next_high = unit_codes(codes, first_unit + 1, words_of_row, NUMBER, (PART + 1) % channels_a_bit(NUMBER))
    bit = tl.arange(0, 32)[None, None, :]
    value = ((tl.join(low, next_low)[:, :, None] >> bit) & 1).to(tl.float32)
    if WIDTH == 2:
        value += ((tl.join(high, next_high)[:, :, None] >> bit) & 1).to(tl.float32) * 2
    return tl.reshape(value, (low.shape[0], 64)) - ((1 << WIDTH) - 1) / 2


@triton.jit
def _low_rank_tile(
    left, right, rows, k, inside, rank, max_rank, in_features, DTYPE: tl.constexpr, BLOCK_RANK: tl.constexpr
):
    """`[rows, k]` of L·R."""
    value = tl.zeros((rows.shape[0], k.shape[0]), dtype=tl.float32)
    for start in tl.range(0, rank, BLOCK_RANK, num_stages=1):
        r = start + tl.arange(0, BLOCK_RANK)
        of_row = tl.load(left + (rows[:, None] * max_rank + r[None, :]), mask=(r < rank)[None, :], other=0.0)
        present = (r < rank)[:, None] & inside[None, :]
        of_channel = tl.load(right + (r[:, None] * in_features + k[None, :]), mask=present, other=0.0)
        value = tl.dot(of_row.to(DTYPE), of_channel.to(DTYPE), value, input_precision="ieee")
    return value


@triton.jit
def merge_block(
    weight,
    weight_stride,
    target,
    codes,
    steps,
    scale,
    left,
    right,
    rows,
    row_mask,
    block,
    words_of_row,
    in_features,
    group_size,
    groups,
    rank,
    max_rank,
    NUMBER: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W plus codes and L·R of the channels of one block of words; WHOLE where the row has all of its channels."""
    CHANNELS: tl.constexpr = block_channels(NUMBER)
    DTYPE: tl.constexpr = target.dtype.element_ty
    word, channel = tl.arange(0, PLANE_WORDS), tl.arange(0, 2 * PLANE_WORDS)
    pairs = PLANE_WORDS
    if not is_message(NUMBER):
        place = codes + (rows[:, None] * words_of_row + (block * PLANE_WORDS + word)[None, :])
        if WHOLE:
            words = tl.load(place)
        else:
            pairs = words_of_row - block * PLANE_WORDS
            words = tl.load(place, mask=(word < pairs)[None, :], other=0)
    if not GROUPED:
        row_step = tl.load(steps + rows)
    for plane in tl.static_range(CHANNELS // (2 * PLANE_WORDS)):
        k = block * CHANNELS + plane * 2 * pairs + channel
        given = row_mask[:, None]
        inside = channel < 2 * pairs
        if not WHOLE:
            inside = inside & (k < in_features)
            given = given & inside[None, :]
        if is_message(NUMBER):
            unit = block * (CHANNELS // 32) + 2 * plane
            value = _unit_pair(
                codes + rows * words_of_row, unit, words_of_row, NUMBER, 2 * plane % channels_a_bit(NUMBER)
            )
            place = 1.0
        else:
            value, place = _plane_codes(words, plane, NUMBER)
        if GROUPED:
            part = rows[:, None] * groups + (k // tl.where(group_size > 0, group_size, in_features))[None, :]
            value *= tl.load(steps + part, mask=given, other=0.0) * place
        else:
            value *= (row_step * place)[:, None]
        if SCALED:
            value *= tl.load(scale + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        if LOW_RANK:
            value += _low_rank_tile(left, right, rows, k, inside, rank, max_rank, in_features, DTYPE, BLOCK_RANK)
        base = tl.load(weight + (rows[:, None] * weight_stride + k[None, :]), mask=given, other=0.0)
        value += base.to(tl.float32)
        tl.store(target + (rows[:, None] * in_features + k[None, :]), value.to(DTYPE), mask=given)


@triton.jit
def merge_channel(
    weight,
    weight_stride,
    target,
    codes,
    steps,
    scale,
    left,
    right,
    residual,
    rows,
    row_mask,
    channel,
    in_features,
    group_size,
    groups,
    rank,
    max_rank,
    number,
    NUMBERS: tl.constexpr,
    SCALED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """As `merge_block`, of one salient channel alone, with its residual."""
    k = tl.zeros_like(rows) + channel
    packed = codes_at(codes + rows * row_words(in_features, number), k, row_mask, in_features, number, NUMBERS)
    value = packed.to(tl.float32) - ((1 << width_of(number, NUMBERS)) - 1).to(tl.float32) * 0.5
    value *= tl.load(steps + (rows * groups + channel // tl.where(group_size > 0, group_size, in_features)))
    if SCALED:
        value *= tl.load(scale + channel).to(tl.float32)
    value += residual
    if LOW_RANK:
        for start in tl.range(0, rank, BLOCK_RANK, num_stages=1):
            r = start + tl.arange(0, BLOCK_RANK)
            of_row = tl.load(left + (rows[:, None] * max_rank + r[None, :]), mask=(r < rank)[None, :], other=0.0)
            of_channel = tl.load(right + (r * in_features + channel), mask=r < rank, other=0.0)
            value += tl.sum(of_row.to(tl.float32) * of_channel.to(tl.float32)[None, :], 1)
    value += tl.load(weight + (rows * weight_stride + channel)).to(tl.float32)
    tl.store(target + (rows * in_features + channel), value.to(target.dtype.element_ty), mask=row_mask)
