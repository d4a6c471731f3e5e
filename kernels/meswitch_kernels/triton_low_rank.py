# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""What comes before a delta product: z = x·Rᵀ, and x as a slot's codes want it; and L·z, which is added."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_messages import message_channels, message_place


@triton.jit
def prepare_tile(
    tile,
    first_row,
    split,
    x,
    channel_scale,
    right,
    scaled,
    z,
    slot_bits,
    slot_rank,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    slots,
    in_features,
    max_rank,
    x_stride,
    scaled_stride,
    channels_per_split,
    SCALED: tl.constexpr,
    MESSAGES: tl.constexpr,
    RANKED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`prepare` of one tile, for BLOCK_RANK rows of R from `first_row` and one share of the channels."""
    PERMUTED: tl.constexpr = len(MESSAGES) > 0
    count, slot = tl.load(tile_count + tile), tl.load(tile_slot + tile)
    if (count > 0) & (slot >= 0) & (slot < slots):
        rank = 0
        if RANKED:
            rank = tl.load(slot_rank + slot)
        if (first_row < rank) | ((SCALED or PERMUTED) & (first_row == 0)):
            within = tl.arange(0, TILE_TOKENS)
            token_mask = within < count
            token = tl.load(order + tl.load(tile_start + tile) + within, mask=token_mask, other=0)
            rows = first_row + tl.arange(0, BLOCK_RANK)
            row_mask = rows < rank
            right += slot.to(tl.int64) * max_rank * in_features
            first = split * channels_per_split
            number, end, copied = 0, in_features, in_features
            if PERMUTED:
                number, end = tl.load(slot_bits + slot), scaled_stride
            for i in tl.static_range(len(MESSAGES)):
                if number == MESSAGES[i]:
                    copied = tl.cdiv(in_features, message_channels(MESSAGES[i], TILE_TOKENS))
                    copied *= message_channels(MESSAGES[i], TILE_TOKENS)
            acc = tl.zeros((BLOCK_RANK, TILE_TOKENS), dtype=tl.float32)
            for k_start in range(first, tl.minimum(first + channels_per_split, end), BLOCK_K):
                k = k_start + tl.arange(0, BLOCK_K)
                inside = (k < in_features)[None, :]
                present = token_mask[:, None] & inside
                given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=present, other=0.0)
                if RANKED:
                    of_rank = right + (rows[:, None] * in_features + k[None, :])
                    own = tl.load(of_rank, mask=row_mask[:, None] & inside, other=0.0).to(x.dtype.element_ty)
                    acc = tl.dot(own, tl.trans(given), acc, input_precision="ieee")
                if (SCALED or PERMUTED) and first_row == 0:
                    product = given
                    if SCALED:
                        factor = tl.load(channel_scale + slot * in_features + k, mask=k < in_features, other=0.0)
                        product = (given.to(tl.float32) * factor.to(tl.float32)[None, :]).to(x.dtype.element_ty)
                    place = k
                    for i in tl.static_range(len(MESSAGES)):
                        if number == MESSAGES[i]:
                            place = message_place(k, MESSAGES[i], TILE_TOKENS)
                    target = scaled + (token[:, None] * scaled_stride + place[None, :])
                    tl.store(target, product, mask=token_mask[:, None] & (k < copied)[None, :])
            if RANKED:
                sums = z + ((split * tokens + token[None, :]) * max_rank + rows[:, None])
                tl.store(sums, acc, mask=token_mask[None, :] & row_mask[:, None])


@triton.jit(do_not_specialize=["tokens"])
def prepare(
    x,
    channel_scale,
    right,
    scaled,
    z,
    slot_bits,
    slot_rank,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    slots,
    in_features,
    max_rank,
    x_stride,
    scaled_stride,
    channels_per_split,
    SCALED: tl.constexpr,
    MESSAGES: tl.constexpr,
    RANKED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What decode needs of x, tile by tile of tokens that share a slot.

    RANKED: partial sums z `[splits, tokens, max_rank]` of x·Rᵀ. SCALED: `scaled`, x times its slot's channel scales.
    MESSAGES: `scaled` in the order that a slot wants whose messages are among these (`message_place`), with zeros after
    the last. What lies past
    a slot's own rank, and the tokens of the base, are not written; nobody reads them.
    """
    prepare_tile(
        tl.program_id(0), tl.program_id(1) * BLOCK_RANK, tl.program_id(2), x, channel_scale, right, scaled, z,
        slot_bits, slot_rank, order, tile_slot, tile_start, tile_count, tokens, slots, in_features, max_rank, x_stride,
        scaled_stride, channels_per_split, SCALED, MESSAGES, RANKED, TILE_TOKENS, BLOCK_RANK, BLOCK_K,
    )  # fmt: skip


@triton.jit
def add_low_rank(
    acc,
    z,
    left,  # pointer to L's first row
    rows,  # rows counted from there, [BLOCK_OUT]
    token,
    token_mask,
    tokens,
    rank,
    max_rank,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """`acc` [BLOCK_OUT, BLOCK_TOKENS] plus L·zᵀ, z summed over its splits; both are multiplied as `DTYPE`."""
    for start in tl.range(0, rank, BLOCK_RANK, num_stages=1):
        r = start + tl.arange(0, BLOCK_RANK)
        inside = (r < rank)[None, :]
        total = tl.zeros((token.shape[0], BLOCK_RANK), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            place = z + ((split * tokens + token[:, None]) * max_rank + r[None, :])
            total += tl.load(place, mask=token_mask[:, None] & inside, other=0.0)
        own = tl.load(left + (rows[:, None] * max_rank + r[None, :]), mask=inside, other=0.0).to(DTYPE)
        acc = tl.dot(own, tl.trans(total.to(DTYPE)), acc, input_precision="ieee")
    return acc
