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
from .triton_tiles import code_values, load_codes, load_steps, slot_is_servable, slot_rows, words_per_row


@triton.jit
def _delta_sum(
    x,
    x_stride,
    token,
    token_mask,
    codes,
    steps,
    scale,
    rows,
    first,
    last,
    in_features,
    group_size,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_OUT, BLOCK_TOKENS] float32: the slot's delta times its tokens' x over channels first to last."""
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    x_sum = tl.zeros((BLOCK_TOKENS,), dtype=tl.float32)
    BFLOAT: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    for k_start in range(first, last, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = k < in_features
        given = tl.load(
            x + (token[:, None] * x_stride + k[None, :]),
            mask=token_mask[:, None] & inside[None, :],
            other=0.0,
        )
        factor = tl.load(scale + k, mask=inside, other=0.0).to(tl.float32)
        given = (given.to(tl.float32) * factor[None, :]).to(x.dtype.element_ty)
        packed = load_codes(codes, rows, k_start, in_features, BITS, BLOCK_K)
        if GROUPED:
            step = load_steps(steps, rows, k_start, group_size, in_features, BLOCK_K)
            scaled = (code_values(packed, BITS) * step).to(x.dtype.element_ty)
            acc = tl.dot(scaled, tl.trans(given), acc, input_precision="ieee")
        elif BFLOAT:
            # A code set into the mantissa of bfloat16's 128 is 128 + code, exactly, in one instruction; the
            # 128 and the middle of the code are taken off once per token, through the sum of x.
            shifted = (packed | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
            acc = tl.dot(shifted, tl.trans(given), acc)
            x_sum += tl.sum(given.to(tl.float32), 1)
        else:
            value = code_values(packed, BITS).to(x.dtype.element_ty)
            acc = tl.dot(value, tl.trans(given), acc, input_precision="ieee")
    if not GROUPED:
        if BFLOAT:
            acc -= (128.0 + ((1 << BITS) - 1) / 2) * x_sum[None, :]
        acc *= tl.load(steps + rows)[:, None]
    return acc


@triton.jit(do_not_specialize=["tokens", "base_tiles"])
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
    slots,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    codes_stride,
    steps_stride,
    channels_per_split,
    max_rank,
    WIDTHS: tl.constexpr,
    GROUPED: tl.constexpr,
    BASE_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DELTA_BLOCK_K: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Partial sums `[2 * splits, tokens, out]`: the base's in the first half, the deltas' in the second."""
    row = tl.program_id(0) * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_features - row
    rows = tl.minimum(rows, out_features - row - 1)
    split, splits, which = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    first = split * channels_per_split
    last = tl.minimum(first + channels_per_split, in_features)
    if which < base_tiles:
        token = which * BASE_TOKENS + tl.arange(0, BASE_TOKENS)
        token_mask = token < tokens
        acc = tl.zeros((BLOCK_OUT, BASE_TOKENS), dtype=tl.float32)
        weight += row.to(tl.int64) * weight_stride
        for k_start in range(first, last, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            inside = (k < in_features)[None, :]
            given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=token_mask[:, None] & inside, other=0.0)
            base = tl.load(weight + (rows[:, None] * weight_stride + k[None, :]), mask=inside, other=0.0)
            acc = tl.dot(base, tl.trans(given), acc, input_precision="ieee")
        partials += (split * tokens).to(tl.int64) * out_features + row
        place = partials + (token[:, None] * out_features + rows[None, :])
        tl.store(place, tl.trans(acc), mask=token_mask[:, None] & row_mask[None, :])
    else:
        tile = which - base_tiles
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
                    acc = _delta_sum(
                        x, x_stride, token, token_mask, slot_codes, slot_steps, scale, rows, first, last,
                        in_features, group_size, WIDTHS[i], GROUPED, BLOCK_OUT, TILE_TOKENS, DELTA_BLOCK_K,
                    )  # fmt: skip
            if Z_SPLITS > 0 and split == 0:
                acc = add_low_rank(
                    acc, z, left + slot_rows(slot, out_features * max_rank, row, max_rank), rows, token, token_mask,
                    tokens, tl.load(slot_rank + slot), max_rank, x.dtype.element_ty, Z_SPLITS, BLOCK_RANK,
                )  # fmt: skip
            partials += ((splits + split) * tokens).to(tl.int64) * out_features + row
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
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = the partial sums of each token, its salient channels and its biases."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out_features
    slot = tl.load(slot_of_token + token)
    servable = slot_is_servable(slot, slot_bits, slots)
    parts = tl.where(servable & (slot >= 0), 2 * splits, splits)
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
