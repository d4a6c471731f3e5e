# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""What comes before a delta product: z = x·Rᵀ, and x as a slot's codes want it; and L·z, which is added."""

from __future__ import annotations

import triton
import triton.language as tl

from .packing import PLANE_WORDS as _PLANE_WORDS
from .triton_messages import FIRST_NUMBER, code_width, message_channels, message_place, message_row
from .triton_tiles import place_of, words_per_row

PLANE_WORDS = tl.constexpr(_PLANE_WORDS)


@triton.jit
def _scalar_plane(k, in_features, bits):
    """Which plane of its block of words channel k is in; `bits` need not be known to the compiler."""
    channels = PLANE_WORDS * 32 // bits
    block = k // channels
    pairs = tl.minimum(words_per_row(in_features, bits) - block * PLANE_WORDS, PLANE_WORDS)
    return (k - block * channels) // (2 * tl.maximum(pairs, 1))


@triton.jit
def _unit(place):
    """2^-place in float32."""
    return ((127 - place) << 23).to(tl.float32, bitcast=True)


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
    offsets,
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
    PLACED: tl.constexpr,
    MESSAGES: tl.constexpr,
    RANKED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`prepare` of one tile, for BLOCK_RANK rows of R from `first_row` and one share of the channels."""
    OFFSET: tl.constexpr = PLACED or len(MESSAGES) > 0
    BFLOAT: tl.constexpr = tl.bfloat16 == x.dtype.element_ty
    count, slot = tl.load(tile_count + tile), tl.load(tile_slot + tile)
    if (count > 0) & (slot >= 0) & (slot < slots):
        rank = 0
        if RANKED:
            rank = tl.load(slot_rank + slot)
        if (first_row < rank) | ((SCALED or OFFSET) & (first_row == 0)):
            within = tl.arange(0, TILE_TOKENS)
            token_mask = within < count
            token = tl.load(order + tl.load(tile_start + tile) + within, mask=token_mask, other=0)
            rows = first_row + tl.arange(0, BLOCK_RANK)
            row_mask = rows < rank
            right += slot.to(tl.int64) * max_rank * in_features
            first = split * channels_per_split
            number, end, copied = 0, in_features, in_features
            if OFFSET:
                number, end = tl.load(slot_bits + slot), scaled_stride
            width = number
            for i in tl.static_range(len(MESSAGES)):
                if number == MESSAGES[i]:
                    width = code_width(MESSAGES[i])
                    copied = tl.cdiv(in_features, message_channels(MESSAGES[i], TILE_TOKENS))
                    copied *= message_channels(MESSAGES[i], TILE_TOKENS)
            half = 0.5 * ((1 << width) - 1)
            acc = tl.zeros((BLOCK_RANK, TILE_TOKENS), dtype=tl.float32)
            offset = tl.zeros((TILE_TOKENS,), dtype=tl.float32)
            for k_start in range(first, tl.minimum(first + channels_per_split, end), BLOCK_K):
                k = k_start + tl.arange(0, BLOCK_K)
                inside = (k < in_features)[None, :]
                present = token_mask[:, None] & inside
                given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=present, other=0.0)
                if RANKED:
                    of_rank = right + (rows[:, None] * in_features + k[None, :])
                    own = tl.load(of_rank, mask=row_mask[:, None] & inside, other=0.0).to(x.dtype.element_ty)
                    acc = tl.dot(own, tl.trans(given), acc, input_precision="ieee")
                if (SCALED or OFFSET) and first_row == 0:
                    product = given
                    if SCALED:
                        factor = tl.load(channel_scale + slot * in_features + k, mask=k < in_features, other=0.0)
                        product = (given.to(tl.float32) * factor.to(tl.float32)[None, :]).to(x.dtype.element_ty)
                    target, plane = k, tl.zeros_like(k)
                    if PLACED and number < FIRST_NUMBER:
                        plane = _scalar_plane(k, in_features, tl.maximum(number, 1))
                    for i in tl.static_range(len(MESSAGES)):
                        if number == MESSAGES[i]:
                            target = message_place(k, MESSAGES[i], TILE_TOKENS)
                            plane = message_row(k) // code_width(MESSAGES[i])
                    if OFFSET and (PLACED or number > FIRST_NUMBER):
                        wide, common = product.to(tl.float32), tl.zeros_like(k).to(tl.float32) + half
                        if BFLOAT:
                            unit = _unit(place_of(plane, tl.maximum(width, 1)))
                            common = (128.0 * unit + half) * (1 - 2 * (target & 1)).to(tl.float32)
                            product = (wide * unit[None, :]).to(tl.bfloat16)
                        offset += tl.sum(wide * common[None, :], 1)
                    place = scaled + (token[:, None] * scaled_stride + target[None, :])
                    tl.store(place, product, mask=token_mask[:, None] & (k < copied)[None, :])
            if RANKED:
                sums = z + ((split * tokens + token[None, :]) * max_rank + rows[:, None])
                tl.store(sums, acc, mask=token_mask[None, :] & row_mask[:, None])
            if OFFSET and first_row == 0:
                tl.store(offsets + split * tokens + token, offset, mask=token_mask)


@triton.jit(do_not_specialize=["tokens"])
def prepare(
    x,
    channel_scale,
    right,
    scaled,
    z,
    offsets,
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
    PLACED: tl.constexpr,
    MESSAGES: tl.constexpr,
    RANKED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What decode needs of x, tile by tile of tokens that share a slot.

    RANKED: partial sums z `[splits, tokens, max_rank]` of x·Rᵀ. SCALED: `scaled`, x times its slot's channel scales.
    MESSAGES: `scaled` in the order that a slot wants whose messages are among these (`message_place`), with zeros after
    the last. PLACED: scalar codes are set into mantissas, too (`triton_tiles.plane_values`). Where codes are, `scaled`
    has each channel over what its code's place multiplies, in bfloat16, and `offsets` `[splits, tokens]` are partial
    sums of x times what `plane_values` are beside a code less its middle. What lies past a slot's own rank, and the
    tokens of the base, are not written; nobody reads them.
    """
    prepare_tile(
        tl.program_id(0), tl.program_id(1) * BLOCK_RANK, tl.program_id(2), x, channel_scale, right, scaled, z, offsets,
        slot_bits, slot_rank, order, tile_slot, tile_start, tile_count, tokens, slots, in_features, max_rank, x_stride,
        scaled_stride, channels_per_split, SCALED, PLACED, MESSAGES, RANKED, TILE_TOKENS, BLOCK_RANK, BLOCK_K,
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
