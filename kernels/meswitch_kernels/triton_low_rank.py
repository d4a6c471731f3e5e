# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""What comes before a delta product: z = x·Rᵀ of the low-rank part, x times channel scales; and L·z, which is added."""

from __future__ import annotations

import triton
import triton.language as tl


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
    channels_per_split,
    SCALED: tl.constexpr,
    RANKED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`prepare` of one tile, for BLOCK_RANK rows of R from `first_row` and one share of the channels."""
    count, slot = tl.load(tile_count + tile), tl.load(tile_slot + tile)
    if (count > 0) & (slot >= 0) & (slot < slots):
        rank = 0
        if RANKED:
            rank = tl.load(slot_rank + slot)
        if (first_row < rank) | (SCALED & (first_row == 0)):
            within = tl.arange(0, TILE_TOKENS)
            token_mask = within < count
            token = tl.load(order + tl.load(tile_start + tile) + within, mask=token_mask, other=0)
            rows = first_row + tl.arange(0, BLOCK_RANK)
            row_mask = rows < rank
            right += slot.to(tl.int64) * max_rank * in_features
            first = split * channels_per_split
            acc = tl.zeros((BLOCK_RANK, TILE_TOKENS), dtype=tl.float32)
            for k_start in range(first, tl.minimum(first + channels_per_split, in_features), BLOCK_K):
                k = k_start + tl.arange(0, BLOCK_K)
                inside = (k < in_features)[None, :]
                present = token_mask[:, None] & inside
                given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=present, other=0.0)
                if RANKED:
                    of_rank = right + (rows[:, None] * in_features + k[None, :])
                    own = tl.load(of_rank, mask=row_mask[:, None] & inside, other=0.0).to(x.dtype.element_ty)
                    acc = tl.dot(own, tl.trans(given), acc, input_precision="ieee")
                if SCALED and first_row == 0:
                    factor = tl.load(channel_scale + slot * in_features + k, mask=k < in_features, other=0.0)
                    product = given.to(tl.float32) * factor.to(tl.float32)[None, :]
                    target = scaled + (token[:, None] * in_features + k[None, :])
                    tl.store(target, product.to(x.dtype.element_ty), mask=present)
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
    channels_per_split,
    SCALED: tl.constexpr,
    RANKED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What decode needs of x, tile by tile of tokens that share a slot.

    RANKED: partial sums z `[splits, tokens, max_rank]` of x·Rᵀ. SCALED: `scaled` `[tokens, in]`, x times its slot's
    channel scales. What lies past a slot's own rank, and the tokens of the base, are not written; nobody reads them.
    """
    prepare_tile(
        tl.program_id(0), tl.program_id(1) * BLOCK_RANK, tl.program_id(2), x, channel_scale, right, scaled, z,
        slot_rank, order, tile_slot, tile_start, tile_count, tokens, slots, in_features, max_rank, x_stride,
        channels_per_split, SCALED, RANKED, TILE_TOKENS, BLOCK_RANK, BLOCK_K,
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
