# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Prefill: many tokens of a slot, bound by arithmetic: W + Δ̂ is built in registers and multiplied once."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_low_rank import add_low_rank
from .triton_tiles import code_values, load_codes, load_steps, slot_rows, words_per_row


@triton.jit
def _merged_product(
    acc,
    x,
    x_stride,
    token,
    token_mask,
    weight,
    weight_stride,
    codes,
    steps,
    scale,
    rows,
    in_features,
    group_size,
    MERGE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc` [BLOCK_OUT, BLOCK_TOKENS] plus (W + Δ̂) times the tokens' x, or W alone where not MERGE."""
    row_step = tl.zeros((rows.shape[0],), dtype=tl.float32)
    if MERGE and not GROUPED:
        row_step = tl.load(steps + rows)
    for k_start in range(0, in_features, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = k < in_features
        given = tl.load(
            x + (token[:, None] * x_stride + k[None, :]),
            mask=token_mask[:, None] & inside[None, :],
            other=0.0,
        )
        merged = tl.load(weight + (rows[:, None] * weight_stride + k[None, :]), mask=inside[None, :], other=0.0)
        if MERGE:
            value = code_values(load_codes(codes, rows, k_start, in_features, BITS, BLOCK_K, EVEN), BITS)
            if GROUPED:
                value *= load_steps(steps, rows, k_start, group_size, in_features, BLOCK_K)
            else:
                value *= row_step[:, None]
            factor = tl.load(scale + k, mask=inside, other=0.0).to(tl.float32)
            merged = (merged.to(tl.float32) + value * factor[None, :]).to(x.dtype.element_ty)
        acc = tl.dot(merged, tl.trans(given), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens", "tiles"])
def prefill(
    x,
    weight,
    bias,
    y,
    codes,
    steps,
    channel_scale,
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
    slots,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    codes_stride,
    steps_stride,
    max_salient,
    max_rank,
    WIDTHS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """y `[tokens, out]` of one tile of tokens that share a slot and one block of output rows."""
    # Neighbouring programs take a few token tiles of the same weight rows, so that these come from L2.
    blocks = tl.cdiv(out_features, BLOCK_OUT)
    program = tl.program_id(0)
    per_band = TILES_TOGETHER * blocks
    band_start = program // per_band * TILES_TOGETHER
    band = tl.minimum(tiles - band_start, TILES_TOGETHER)
    tile = band_start + program % per_band % band
    count = tl.load(tile_count + tile)
    if count == 0:
        return
    slot = tl.load(tile_slot + tile)
    row = program % per_band // band * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_features - row
    rows = tl.minimum(rows, out_features - row - 1)
    weight += row.to(tl.int64) * weight_stride
    within = tl.arange(0, TILE_TOKENS)
    token_mask = within < count
    token = tl.load(order + tl.load(tile_start + tile) + within, mask=token_mask, other=0)
    is_expert = (slot >= 0) & (slot < slots)
    slot = tl.where(is_expert, slot, 0)
    bits, group_size = tl.load(slot_bits + slot), tl.load(slot_group + slot)
    slot_codes = codes + slot_rows(slot, codes_stride, row, words_per_row(in_features, bits))
    groups = tl.where(group_size > 0, tl.cdiv(in_features, tl.maximum(group_size, 1)), 1)
    slot_steps = steps + slot_rows(slot, steps_stride, row, groups)
    scale = channel_scale + slot * in_features
    acc = tl.zeros((BLOCK_OUT, TILE_TOKENS), dtype=tl.float32)
    if is_expert:
        if Z_SPLITS > 0:
            acc = add_low_rank(
                acc, z, left + slot_rows(slot, out_features * max_rank, row, max_rank), rows, token, token_mask,
                tokens, tl.load(slot_rank + slot), max_rank, x.dtype.element_ty, Z_SPLITS, BLOCK_RANK,
            )  # fmt: skip
        for i in tl.static_range(len(WIDTHS)):
            if bits == WIDTHS[i]:
                acc = _merged_product(
                    acc, x, x_stride, token, token_mask, weight, weight_stride, slot_codes, slot_steps, scale, rows,
                    in_features, group_size, True, WIDTHS[i], GROUPED, EVEN, BLOCK_K,
                )  # fmt: skip
        acc += tl.load(bias_delta + slot_rows(slot, out_features, row, 1) + rows)[:, None]
        for j in range(0, max_salient):
            channel = tl.load(salient_index + slot * max_salient + j)
            given = tl.load(x + token * x_stride + channel, mask=token_mask, other=0.0).to(tl.float32)
            place = salient_value + slot_rows(slot, out_features * max_salient, row, max_salient) + j
            acc += tl.load(place + rows * max_salient).to(tl.float32)[:, None] * given[None, :]
    else:
        acc = _merged_product(
            acc, x, x_stride, token, token_mask, weight, weight_stride, slot_codes, slot_steps, scale, rows,
            in_features, group_size, False, WIDTHS[0], GROUPED, EVEN, BLOCK_K,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + row + rows).to(tl.float32)[:, None]
    asked = tl.load(slot_of_token + token, mask=token_mask, other=-1)
    served = asked == tl.load(tile_slot + tile)
    servable = served & ((asked == -1) | (is_expert & (bits > 0)))
    result = tl.where(servable[:, None], tl.trans(acc), float("nan"))
    place = y + row + (token.to(tl.int64)[:, None] * out_features + rows[None, :])
    tl.store(place, result.to(y.dtype.element_ty), mask=token_mask[:, None] & row_mask[None, :])
