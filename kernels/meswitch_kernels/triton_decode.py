# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Decode: few tokens a slot, bound by the bytes of weights and codes.

One launch holds programs for the base product of all tokens and programs for the delta product of each tile
of tokens that share a slot, so every weight and every code is read from device memory once however the
tokens mix. Programs also split the input channels, since few tokens leave the chip idle otherwise. Each
writes its partial sums to a place of its own and takes a ticket of its block of rows; the one with the last
ticket adds them all, in a fixed order, so that two runs give the same bytes. The programs of a slot's first
channels add what is not read from codes: salient channels, biases, the low-rank part.
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
    rows,
    block,
    words_of_row,
    in_features,
    BITS: tl.constexpr,
    PLACES: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """`sums` and `x_sums` plus the products of one block of words; WHOLE where the row has all of its channels."""
    TOGETHER: tl.constexpr = PLANE_WORDS
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
        given = tl.trans(given)
        value = plane_values(words, plane * BITS, BITS, PLACES, DTYPE, ASM)
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
    rows,
    split,
    splits,
    in_features,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ASM: tl.constexpr,
):
    """`[BLOCK_OUT, BLOCK_TOKENS]` float32: one split's share of the slot's delta times x, with one step a row.

    A code is in the mantissa of 128 and in one of a few places there. So each place has sums of its own, and the
    factors, the 128 and the middle of a code come off once at the end, through sums of x that the same
    instructions make.
    """
    CHANNELS: tl.constexpr = PLANE_WORDS * 32 // BITS
    PLACES: tl.constexpr = places_for(BITS, BLOCK_TOKENS)
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
    # More tokens of more channels at once would leave room for two programs of a processor alone.
    STAGES: tl.constexpr = 2 if BLOCK_TOKENS * CHANNELS > 8192 else None
    for block in tl.range(begin, tl.minimum(end, whole), num_stages=STAGES):
        sums, x_sums = _plane_block(
            sums, x_sums, x, x_stride, token, token_mask, codes, rows, block, words_of_row,
            in_features, BITS, PLACES, True, ASM,
        )  # fmt: skip
    if not EVEN and (begin < end) & (end > whole):
        sums, x_sums = _plane_block(
            sums, x_sums, x, x_stride, token, token_mask, codes, rows, whole, words_of_row,
            in_features, BITS, PLACES, False, ASM,
        )  # fmt: skip
    total = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    for place in tl.static_range(PLACES):
        unit = 0.5 ** (place * BITS)
        offset = ((1 << BITS) - 1) / 2 + (128.0 * unit if tl.bfloat16 == x.dtype.element_ty else 0.0)
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
    rows,
    split,
    splits,
    in_features,
    group_size,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
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
        value = code_values(load_codes(codes, rows, k_start, in_features, BITS, BLOCK_K, EVEN), BITS)
        if GROUPED:
            value *= load_steps(steps, rows, k_start, group_size, in_features, BLOCK_K)
        acc = tl.dot(value.to(x.dtype.element_ty), tl.trans(given), acc, input_precision="ieee")
    if not GROUPED:
        acc *= tl.load(steps + rows)[:, None]
    return acc


@triton.jit
def _add_salient(
    acc,
    x,
    x_stride,
    token,
    token_mask,
    index,  # pointer to the slot's first salient channel
    value,  # pointer to the first row's first residual
    rows,
    max_salient,
):
    """`acc` plus the slot's salient residuals times x, exactly as wide as the wider of the two."""
    BLOCK: tl.constexpr = 16
    ALIKE: tl.constexpr = value.dtype.element_ty == x.dtype.element_ty
    DTYPE: tl.constexpr = x.dtype.element_ty if ALIKE else tl.float32
    for start in tl.range(0, max_salient, BLOCK, num_stages=1):
        j = start + tl.arange(0, BLOCK)
        inside = j < max_salient
        channel = tl.load(index + j, mask=inside, other=0)
        given = tl.load(
            x + (token[:, None] * x_stride + channel[None, :]), mask=token_mask[:, None] & inside[None, :], other=0.0
        )
        residual = tl.load(value + (rows[:, None] * max_salient + j[None, :]), mask=inside[None, :], other=0.0)
        acc = tl.dot(residual.to(DTYPE), tl.trans(given.to(DTYPE)), acc, input_precision="ieee")
    return acc


@triton.jit
def _base_partial(
    x,
    x_stride,
    weight,
    weight_stride,
    bias,
    rows,
    token,
    token_mask,
    split,
    splits,
    in_features,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[BLOCK_OUT, BLOCK_TOKENS]` float32: one split's share of the base product, the first with the bias."""
    per_split = tl.cdiv(tl.cdiv(in_features, BLOCK_K), splits) * BLOCK_K
    first = split * per_split
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    for k_start in range(first, tl.minimum(first + per_split, in_features), BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = (k < in_features)[None, :]
        given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=token_mask[:, None] & inside, other=0.0)
        base = tl.load(weight + (rows[:, None] * weight_stride + k[None, :]), mask=inside, other=0.0)
        acc = tl.dot(base, tl.trans(given), acc, input_precision="ieee")
    if HAS_BIAS and split == 0:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    return acc


@triton.jit
def _sum_partials(
    partials,  # pointer to the first row's first partial sum
    y,  # pointer to the first row of the first token
    slot_of_token,
    slot_bits,
    tokens,
    slots,
    base_splits,
    delta_splits,
    out_features,
    row_mask,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """y of a block of rows and all tokens. Tokens whose slot cannot be served come out as NaN."""
    rows = tl.arange(0, BLOCK_OUT)
    for start in tl.range(0, tokens, BLOCK_TOKENS, num_stages=1):
        token = start + tl.arange(0, BLOCK_TOKENS)
        token_mask = token < tokens
        slot = tl.load(slot_of_token + token, mask=token_mask, other=-1)
        known = (slot >= 0) & (slot < slots)
        loaded = tl.load(slot_bits + slot, mask=known, other=0) > 0
        parts = base_splits + tl.where(loaded, delta_splits, 0)
        inside = token_mask[:, None] & row_mask[None, :]
        total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
        for part in tl.static_range(MOST_SPLITS):
            place = partials + ((part * tokens + token[:, None]) * out_features + rows[None, :])
            total += tl.load(place, mask=inside & (part < parts)[:, None], other=0.0, cache_modifier=".cg")
        total = tl.where((loaded | (slot == -1))[:, None], total, float("nan"))
        tl.store(y + (token[:, None] * out_features + rows[None, :]), total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def decode_rows(
    row_block,
    program,
    x,
    scaled,
    weight,
    bias,
    y,
    partials,
    tickets,
    codes,
    steps,
    bias_delta,
    salient_index,
    salient_value,
    z,
    left,
    slot_bits,
    slot_group,
    slot_rank,
    slot_of_token,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    tiles,
    base_tiles,
    base_splits,
    delta_splits,
    delta_programs,
    slots,
    in_features,
    out_features,
    x_stride,
    scaled_stride,
    weight_stride,
    codes_stride,
    steps_stride,
    max_salient,
    max_rank,
    WIDTHS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    MOST_TILES: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program of `decode`, for a linear whose tensors and widths are given."""
    row = row_block * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_features - row
    rows = tl.minimum(rows, out_features - row - 1)
    partials += row
    base_programs = base_tiles * base_splits
    is_base = program < base_programs
    tile = tl.where(is_base, 0, program - base_programs) // delta_splits
    if is_base or tl.load(tile_count + tile) > 0:
        if is_base:
            split = program % base_splits
            token = program // base_splits * BASE_TOKENS + tl.arange(0, BASE_TOKENS)
            token_mask = token < tokens
            acc = _base_partial(
                x, x_stride, weight + row.to(tl.int64) * weight_stride, weight_stride, bias + row, rows, token,
                token_mask, split, base_splits, in_features, HAS_BIAS, BLOCK_OUT, BASE_TOKENS, BLOCK_K,
            )  # fmt: skip
            place = partials + ((split * tokens + token[:, None]) * out_features + rows[None, :])
            tl.store(place, tl.trans(acc), mask=token_mask[:, None] & row_mask[None, :])
        else:
            split = (program - base_programs) % delta_splits
            for own in range(tile, tiles, delta_programs):
                count, slot = tl.load(tile_count + own), tl.load(tile_slot + own)
                if (count > 0) & (slot >= 0) & (slot < slots):
                    within = tl.arange(0, TILE_TOKENS)
                    token_mask = within < count
                    token = tl.load(order + tl.load(tile_start + own) + within, mask=token_mask, other=0)
                    bits, group_size = tl.load(slot_bits + slot), tl.load(slot_group + slot)
                    slot_codes = codes + slot_rows(slot, codes_stride, row, words_per_row(in_features, bits))
                    groups = tl.where(group_size > 0, tl.cdiv(in_features, tl.maximum(group_size, 1)), 1)
                    slot_steps = steps + slot_rows(slot, steps_stride, row, groups)
                    # Each width a slot may have is compiled with its own shifts; a bank knows which.
                    acc = tl.zeros((BLOCK_OUT, TILE_TOKENS), dtype=tl.float32)
                    for i in tl.static_range(len(WIDTHS)):
                        if bits == WIDTHS[i]:
                            if GROUPED or x.dtype.element_ty == tl.float32:
                                acc = _delta_values(
                                    scaled, scaled_stride, token, token_mask, slot_codes, slot_steps, rows, split,
                                    delta_splits, in_features, group_size, WIDTHS[i], GROUPED, EVEN, BLOCK_OUT,
                                    TILE_TOKENS, BLOCK_K,
                                )  # fmt: skip
                            else:
                                acc = _delta_planes(
                                    scaled, scaled_stride, token, token_mask, slot_codes, slot_steps, rows, split,
                                    delta_splits, in_features, WIDTHS[i], EVEN, BLOCK_OUT, TILE_TOKENS, ASM,
                                )  # fmt: skip
                    if split == 0:
                        acc = _add_salient(
                            acc, x, x_stride, token, token_mask, salient_index + slot * max_salient,
                            salient_value + slot_rows(slot, out_features * max_salient, row, max_salient), rows,
                            max_salient,
                        )  # fmt: skip
                        acc += tl.load(bias_delta + slot_rows(slot, out_features, row, 1) + rows)[:, None]
                        if Z_SPLITS > 0:
                            acc = add_low_rank(
                                acc, z, left + slot_rows(slot, out_features * max_rank, row, max_rank), rows, token,
                                token_mask, tokens, tl.load(slot_rank + slot), max_rank, x.dtype.element_ty, Z_SPLITS,
                                BLOCK_RANK,
                            )  # fmt: skip
                    place = partials + (
                        ((base_splits + split) * tokens + token[:, None]) * out_features + rows[None, :]
                    )
                    tl.store(place, tl.trans(acc), mask=token_mask[:, None] & row_mask[None, :])
        every = tl.arange(0, MOST_TILES)
        used = tl.sum((tl.load(tile_count + every, mask=every < tiles, other=0) > 0).to(tl.int32), 0)
        expected = base_programs + tl.minimum(used, delta_programs) * delta_splits
        # What all threads have written must lie in memory before one of them takes the ticket.
        tl.debug_barrier()
        if tl.atomic_add(tickets + row_block, 1, sem="acq_rel") == expected - 1:
            _sum_partials(
                partials, y + row, slot_of_token, slot_bits, tokens, slots, base_splits, delta_splits, out_features,
                row_mask, BLOCK_OUT, 8, MOST_SPLITS,
            )  # fmt: skip
            # Zero again for the next launch, also where this one is replayed from a graph.
            tl.atomic_xchg(tickets + row_block, 0)


UNSPECIALIZED = ["tokens", "tiles", "base_tiles", "base_splits", "delta_splits", "delta_programs"]
"""Numbers by which no launch is compiled again."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode(
    x,
    scaled,
    weight,
    bias,
    y,
    partials,
    tickets,
    codes,
    steps,
    bias_delta,
    salient_index,
    salient_value,
    z,
    left,
    slot_bits,
    slot_group,
    slot_rank,
    slot_of_token,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    tiles,
    base_tiles,
    base_splits,
    delta_splits,
    delta_programs,
    slots,
    in_features,
    out_features,
    x_stride,
    scaled_stride,
    weight_stride,
    codes_stride,
    steps_stride,
    max_salient,
    max_rank,
    WIDTHS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    MOST_TILES: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ASM: tl.constexpr,
):
    """y `[tokens, out]`, through partial sums `[base_splits + delta_splits, tokens, out]`, the base's first.

    The first axis of the grid is the block of rows; the second holds the base's tiles and splits, then
    `delta_programs` times `delta_splits` programs, which share the tiles that are in use. `scaled` is x times its
    slot's channel scales, or x itself. `tickets`, one for each block of rows, are zero before and after.
    """
    decode_rows(
        tl.program_id(0), tl.program_id(1), x, scaled, weight, bias, y, partials, tickets, codes, steps, bias_delta,
        salient_index, salient_value, z, left, slot_bits, slot_group, slot_rank, slot_of_token, order, tile_slot,
        tile_start, tile_count, tokens, tiles, base_tiles, base_splits, delta_splits, delta_programs, slots,
        in_features, out_features, x_stride, scaled_stride, weight_stride, codes_stride, steps_stride, max_salient,
        max_rank, WIDTHS, GROUPED, EVEN, HAS_BIAS, BASE_TOKENS, TILE_TOKENS, MOST_TILES, MOST_SPLITS, BLOCK_OUT,
        BLOCK_K, Z_SPLITS, BLOCK_RANK, ASM,
    )  # fmt: skip
