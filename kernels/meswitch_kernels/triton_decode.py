# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Decode: few tokens a slot, bound by the bytes of weights and codes.

One launch holds programs for the base product of all tokens and programs for the delta product of each tile
of tokens that share a slot, so every weight and every code is read from device memory once however the
tokens mix. Programs also split the input channels, since few tokens leave the chip idle otherwise. Each
writes its partial sums to a place of its own; `reduce_partials` adds them in a fixed order, so that two runs
give the same bytes. The programs of a slot's first channels add its low-rank part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_low_rank import add_low_rank
from .triton_tiles import (
    PLANE_WORDS,
    code_values,
    load_codes,
    load_steps,
    places_for,
    plane_values,
    slot_is_servable,
    slot_rows,
    words_per_row,
)


@triton.jit
def _plane_block(
    sums,
    x_sums,
    x,
    x_stride,
    token,
    token_mask,
    codes,
    scale,
    rows,
    block,
    words_of_row,
    in_features,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """`sums` and `x_sums` plus the products of one block of words; WHOLE where the row has all of its channels."""
    TOGETHER: tl.constexpr = PLANE_WORDS
    PLACES: tl.constexpr = places_for(BITS)
    DTYPE: tl.constexpr = x.dtype.element_ty
    pairs, within = TOGETHER, tl.arange(0, TOGETHER)
    place = codes + (rows[:, None] * words_of_row + block * TOGETHER + within[None, :])
    if WHOLE:
        words = tl.load(place)
    else:
        pairs = words_of_row - block * TOGETHER
        words = tl.load(place, mask=(within < pairs)[None, :], other=0)
    ones = tl.full((32, 2 * TOGETHER), 1.0, tl.float32).to(DTYPE)
    channel = tl.arange(0, 2 * TOGETHER)
    for plane in tl.static_range(16 // BITS):
        k = block * (TOGETHER * 32 // BITS) + plane * 2 * pairs + channel
        inside = token_mask[:, None]
        if not WHOLE:
            inside = inside & (channel < 2 * pairs)[None, :] & (k < in_features)[None, :]
        given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=inside, other=0.0)
        if SCALED:
            if WHOLE:
                factor = tl.load(scale + k)
            else:
                factor = tl.load(scale + k, mask=k < in_features, other=0.0)
            given = (given.to(tl.float32) * factor.to(tl.float32)[None, :]).to(DTYPE)
        given = tl.trans(given)
        value = plane_values(words, plane * BITS, BITS, DTYPE, ASM)
        if plane % PLACES == 0:
            sums = tl.dot(value, given, sums[0]), sums[1], sums[2]
            x_sums = tl.dot(ones, given, x_sums[0]), x_sums[1], x_sums[2]
        elif plane % PLACES == 1:
            sums = sums[0], tl.dot(value, given, sums[1]), sums[2]
            x_sums = x_sums[0], tl.dot(ones, given, x_sums[1]), x_sums[2]
        else:
            sums = sums[0], sums[1], tl.dot(value, given, sums[2])
            x_sums = x_sums[0], x_sums[1], tl.dot(ones, given, x_sums[2])
    return sums, x_sums


@triton.jit
def _delta_planes(
    x,
    x_stride,
    token,
    token_mask,
    codes,
    steps,
    scale,
    rows,
    split,
    splits,
    in_features,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ASM: tl.constexpr,
):
    """`[BLOCK_OUT, BLOCK_TOKENS]` float32: one split's share of the slot's delta times x, with one step a row.

    A code is in the mantissa of 128 and in one of three places there. So each place has sums of its own, and the
    factors, the 128 and the middle of a code come off once at the end, through sums of x that the same
    instructions make.
    """
    CHANNELS: tl.constexpr = PLANE_WORDS * 32 // BITS
    LOWEST: tl.constexpr = 1.0 if tl.bfloat16 == x.dtype.element_ty else 0.125
    blocks = tl.cdiv(in_features, CHANNELS)
    per_split = tl.cdiv(blocks, splits)
    begin = split * per_split
    end = tl.minimum(begin + per_split, blocks)
    whole = in_features // CHANNELS
    # Told to be a multiple of a block's words, so that these are read in wide loads.
    words_of_row = whole * PLANE_WORDS if EVEN else words_per_row(in_features, BITS)
    zeros = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    sums = (zeros, zeros, zeros)
    zeros = tl.zeros((32, BLOCK_TOKENS), dtype=tl.float32)
    x_sums = (zeros, zeros, zeros)
    for block in range(begin, tl.minimum(end, whole)):
        sums, x_sums = _plane_block(
            sums, x_sums, x, x_stride, token, token_mask, codes, scale, rows, block, words_of_row,
            in_features, BITS, SCALED, True, ASM,
        )  # fmt: skip
    if not EVEN and (begin < end) & (end > whole):
        sums, x_sums = _plane_block(
            sums, x_sums, x, x_stride, token, token_mask, codes, scale, rows, whole, words_of_row,
            in_features, BITS, SCALED, False, ASM,
        )  # fmt: skip
    total = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    for place in tl.static_range(places_for(BITS)):
        unit = 0.5 ** (place * BITS)
        offset = 128.0 * unit + ((1 << BITS) - 1) / 2
        # The rows of `x_sums` are equal, so that their sum divided by their number is exact.
        total += sums[place] * (unit * LOWEST) - (tl.sum(x_sums[place], 0) * (offset / 32))[None, :]
    return total * tl.load(steps + rows)[:, None]


@triton.jit
def _delta_values(
    x,
    x_stride,
    token,
    token_mask,
    codes,
    steps,
    scale,
    rows,
    split,
    splits,
    in_features,
    group_size,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `_delta_planes`, for float32 and for groups of steps: each code is made a value of its own first."""
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    per_split = tl.cdiv(tl.cdiv(in_features, BLOCK_K), splits) * BLOCK_K
    first = split * per_split
    for k_start in range(first, tl.minimum(first + per_split, in_features), BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = token_mask[:, None] & (k < in_features)[None, :]
        given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=inside, other=0.0)
        if SCALED:
            factor = tl.load(scale + k, mask=k < in_features, other=0.0).to(tl.float32)
            given = (given.to(tl.float32) * factor[None, :]).to(x.dtype.element_ty)
        value = code_values(load_codes(codes, rows, k_start, in_features, BITS, BLOCK_K, EVEN), BITS)
        if GROUPED:
            value *= load_steps(steps, rows, k_start, group_size, in_features, BLOCK_K)
        acc = tl.dot(value.to(x.dtype.element_ty), tl.trans(given), acc, input_precision="ieee")
    if not GROUPED:
        acc *= tl.load(steps + rows)[:, None]
    return acc


@triton.jit(do_not_specialize=["tokens", "base_tiles", "base_splits", "delta_splits"])
def decode_partials(
    x,
    weight,
    partials,
    codes,
    steps,
    channel_scale,
    z,
    left,
    slot_bits,
    slot_group,
    slot_rank,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    base_tiles,
    base_splits,
    delta_splits,
    slots,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    codes_stride,
    steps_stride,
    max_rank,
    WIDTHS: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BASE_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ASM: tl.constexpr,
):
    """Partial sums `[base_splits + delta_splits, tokens, out]`, the base's first.

    The second axis of the grid holds the base's tiles and splits, then the deltas'.
    """
    row = tl.program_id(0) * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_features - row
    rows = tl.minimum(rows, out_features - row - 1)
    program = tl.program_id(1)
    if program < base_tiles * base_splits:
        token = program // base_splits * BASE_TOKENS + tl.arange(0, BASE_TOKENS)
        split = program % base_splits
        token_mask = token < tokens
        per_split = tl.cdiv(tl.cdiv(in_features, BLOCK_K), base_splits) * BLOCK_K
        first = split * per_split
        acc = tl.zeros((BLOCK_OUT, BASE_TOKENS), dtype=tl.float32)
        weight += row.to(tl.int64) * weight_stride
        for k_start in range(first, tl.minimum(first + per_split, in_features), BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            inside = (k < in_features)[None, :]
            given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=token_mask[:, None] & inside, other=0.0)
            base = tl.load(weight + (rows[:, None] * weight_stride + k[None, :]), mask=inside, other=0.0)
            acc = tl.dot(base, tl.trans(given), acc, input_precision="ieee")
        partials += (split * tokens).to(tl.int64) * out_features + row
        place = partials + (token[:, None] * out_features + rows[None, :])
        tl.store(place, tl.trans(acc), mask=token_mask[:, None] & row_mask[None, :])
    else:
        program -= base_tiles * base_splits
        tile, split = program // delta_splits, program % delta_splits
        count, slot = tl.load(tile_count + tile), tl.load(tile_slot + tile)
        if (count > 0) & (slot >= 0) & (slot < slots):
            within = tl.arange(0, TILE_TOKENS)
            token_mask = within < count
            token = tl.load(order + tl.load(tile_start + tile) + within, mask=token_mask, other=0)
            bits, group_size = tl.load(slot_bits + slot), tl.load(slot_group + slot)
            slot_codes = codes + slot_rows(slot, codes_stride, row, words_per_row(in_features, bits))
            groups = tl.where(group_size > 0, tl.cdiv(in_features, tl.maximum(group_size, 1)), 1)
            slot_steps = steps + slot_rows(slot, steps_stride, row, groups)
            scale = channel_scale + slot * in_features
            # Each width a slot may have is compiled with its own shifts; a bank knows which.
            acc = tl.zeros((BLOCK_OUT, TILE_TOKENS), dtype=tl.float32)
            for i in tl.static_range(len(WIDTHS)):
                if bits == WIDTHS[i]:
                    if GROUPED or x.dtype.element_ty == tl.float32:
                        acc = _delta_values(
                            x, x_stride, token, token_mask, slot_codes, slot_steps, scale, rows, split, delta_splits,
                            in_features, group_size, WIDTHS[i], GROUPED, SCALED, EVEN, BLOCK_OUT, TILE_TOKENS, BLOCK_K,
                        )  # fmt: skip
                    else:
                        acc = _delta_planes(
                            x, x_stride, token, token_mask, slot_codes, slot_steps, scale, rows, split, delta_splits,
                            in_features, WIDTHS[i], SCALED, EVEN, BLOCK_OUT, TILE_TOKENS, ASM,
                        )  # fmt: skip
            if Z_SPLITS > 0 and split == 0:
                acc = add_low_rank(
                    acc, z, left + slot_rows(slot, out_features * max_rank, row, max_rank), rows, token, token_mask,
                    tokens, tl.load(slot_rank + slot), max_rank, x.dtype.element_ty, Z_SPLITS, BLOCK_RANK,
                )  # fmt: skip
            partials += ((base_splits + split) * tokens).to(tl.int64) * out_features + row
            place = partials + (token[:, None] * out_features + rows[None, :])
            tl.store(place, tl.trans(acc), mask=token_mask[:, None] & row_mask[None, :])


@triton.jit(do_not_specialize=["tokens"])
def reduce_partials(
    partials,
    y,
    x,
    bias,
    bias_delta,
    salient_index,
    salient_value,
    slot_of_token,
    slot_bits,
    tokens,
    slots,
    in_features,
    out_features,
    x_stride,
    max_salient,
    base_splits,
    delta_splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = the partial sums of each token, its salient channels and its biases."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out_features
    slot = tl.load(slot_of_token + token)
    servable = slot_is_servable(slot, slot_bits, slots)
    parts = base_splits + tl.where(servable & (slot >= 0), delta_splits, 0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(0, parts):
        place = partials + (part * tokens + token).to(tl.int64) * out_features + columns
        total += tl.load(place, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if servable & (slot >= 0):
        total += tl.load(bias_delta + slot.to(tl.int64) * out_features + columns, mask=inside, other=0.0)
        for j in range(0, max_salient):
            channel = tl.load(salient_index + slot * max_salient + j)
            given = tl.load(x + token.to(tl.int64) * x_stride + channel).to(tl.float32)
            place = (slot.to(tl.int64) * out_features + columns) * max_salient + j
            total += given * tl.load(salient_value + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(servable, total, float("nan"))
    tl.store(y + token.to(tl.int64) * out_features + columns, total.to(y.dtype.element_ty), mask=inside)
