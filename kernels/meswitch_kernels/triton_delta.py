# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Products of few tokens with one slot's delta: codes in planes, messages of trellis codes, salient channels."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_messages import (
    channels_a_bit,
    code_width,
    is_message,
    load_message,
    message_channels,
    message_codes,
    message_words,
    next_plane,
)
from .triton_tiles import PLANE_WORDS, code_values, load_codes, load_steps, plane_values, words_per_row


@triton.jit
def _less_added(acc, offsets, token, token_mask, tokens, split, SPLITS: tl.constexpr):
    """A split's sums less, in the first, what mantissas add to codes: `offsets` `[SPLITS, tokens]`, to be summed."""
    if split == 0:
        total = tl.zeros(token.shape, dtype=tl.float32)
        for part in tl.static_range(SPLITS):
            total += tl.load(offsets + part * tokens + token, mask=token_mask, other=0.0)
        acc -= total[None, :]
    return acc


@triton.jit
def _plane_block(
    acc,
    x,  # pointers to the block's first channels [BLOCK_TOKENS, 2 * PLANE_WORDS]
    token_mask,
    codes,
    rows,
    block,
    words_of_row,
    in_features,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """`acc` plus the products of one block of words; WHOLE where the row has all of its channels."""
    TOGETHER: tl.constexpr = PLANE_WORDS
    pairs, within = TOGETHER, tl.arange(0, TOGETHER)
    place = codes + (rows[:, None] * words_of_row + block * TOGETHER + within[None, :])
    if WHOLE:
        words = tl.load(place)
    else:
        pairs = words_of_row - block * TOGETHER
        words = tl.load(place, mask=(within < pairs)[None, :], other=0)
    channel = tl.arange(0, 2 * TOGETHER)
    for plane in tl.static_range(16 // BITS):
        inside = token_mask[:, None]
        if not WHOLE:
            k = block * (TOGETHER * 32 // BITS) + plane * 2 * pairs + channel
            inside = inside & (channel < 2 * pairs)[None, :] & (k < in_features)[None, :]
        given = tl.load(x + plane * 2 * pairs, mask=inside, other=0.0)
        value = plane_values(words, plane * BITS, BITS, given.dtype, ASM)
        acc = tl.dot(value, tl.trans(given), acc)
    return acc


@triton.jit
def delta_planes(
    x,
    x_stride,
    offsets,
    token,
    token_mask,
    tokens,
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
    OFFSET_SPLITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """`[BLOCK_OUT, BLOCK_TOKENS]` float32: one split's share of the slot's delta times x, with one step a row.

    x and `offsets` are as `triton_low_rank.prepare` makes them.
    """
    CHANNELS: tl.constexpr = PLANE_WORDS * 32 // BITS
    blocks = tl.cdiv(in_features, CHANNELS)
    per_split = tl.cdiv(blocks, splits)
    begin = split * per_split
    end = tl.minimum(begin + per_split, blocks)
    whole = in_features // CHANNELS
    # Told to be a multiple of a block's words, so that these are read in wide loads.
    words_of_row = whole * PLANE_WORDS if EVEN else words_per_row(in_features, BITS)
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    first = x + (token[:, None] * x_stride + tl.arange(0, 2 * PLANE_WORDS)[None, :])
    # More tokens of more channels at once would leave room for two programs of a processor alone.
    STAGES: tl.constexpr = 2 if BLOCK_TOKENS * CHANNELS > 8192 else None
    for block in tl.range(begin, tl.minimum(end, whole), num_stages=STAGES):
        acc = _plane_block(
            acc, first + block * CHANNELS, token_mask, codes, rows, block, words_of_row, in_features, BITS, True, ASM
        )
    if not EVEN and (begin < end) & (end > whole):
        acc = _plane_block(
            acc, first + whole * CHANNELS, token_mask, codes, rows, whole, words_of_row, in_features, BITS, False, ASM
        )
    return _less_added(acc, offsets, token, token_mask, tokens, split, OFFSET_SPLITS) * tl.load(steps + rows)[:, None]


@triton.jit
def delta_messages(
    x,
    x_stride,
    offsets,
    token,
    token_mask,
    tokens,
    codes,
    steps,
    rows,
    split,
    splits,
    in_features,
    NUMBER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    OFFSET_SPLITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """As `delta_planes`, for messages, whose words are decoded in registers; x has its channels by `message_place`.

    x is zero in the channels past the last that the last words have.
    """
    WORDS: tl.constexpr = message_words(NUMBER, BLOCK_TOKENS)
    TOGETHER: tl.constexpr = message_channels(NUMBER, BLOCK_TOKENS)
    CHANNELS: tl.constexpr = channels_a_bit(NUMBER)
    WIDTH: tl.constexpr = code_width(NUMBER)
    words_of_row = in_features // TOGETHER * WORDS if EVEN else tl.cdiv(in_features, 32 * CHANNELS)
    blocks = tl.cdiv(words_of_row, WORDS)
    per_split = tl.cdiv(blocks, splits)
    begin = split * per_split
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    within = tl.arange(0, WORDS)
    own = codes + rows[:, None] * words_of_row
    first = x + (token[:, None] * x_stride + tl.arange(0, 2 * WORDS)[None, :])
    STAGES: tl.constexpr = 2 if BLOCK_TOKENS * TOGETHER > 8192 else None
    for block in tl.range(begin, tl.minimum(begin + per_split, blocks), num_stages=STAGES):
        place = (within + block * WORDS)[None, :]
        word, before = load_message(own, place, words_of_row, place < words_of_row, not EVEN)
        here = first + block * TOGETHER  # what is added to it below is known to the compiler, and costs nothing
        high = word
        for part in tl.static_range(CHANNELS):
            low = next_plane(high, word, before, NUMBER, part * WIDTH)
            high = low
            if WIDTH == 2:
                high = next_plane(low, word, before, NUMBER, part * WIDTH + 1)
            for odd in tl.static_range(WIDTH):
                bits = low
                if WIDTH == 2:
                    bits = ((low >> odd) & 0x55555555) | (((high >> odd) & 0x55555555) << 1)
                bits = bits.to(tl.int32, bitcast=True)
                for plane in tl.static_range(16 // WIDTH):
                    row = part * 16 + plane * WIDTH + odd
                    given = tl.load(here + row * 2 * WORDS, mask=token_mask[:, None], other=0.0)
                    value = plane_values(bits, plane * WIDTH, WIDTH, given.dtype, ASM)
                    acc = tl.dot(value, tl.trans(given), acc)
    return _less_added(acc, offsets, token, token_mask, tokens, split, OFFSET_SPLITS) * tl.load(steps + rows)[:, None]


@triton.jit
def delta_values(
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
    NUMBER: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `delta_planes`, for float32 and for groups of steps: each code is made a value of its own first.

    Messages are read here where they lie beside groups, or x is float32, whose channels have their own order.
    """
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    per_split = tl.cdiv(tl.cdiv(in_features, BLOCK_K), splits) * BLOCK_K
    first = split * per_split
    for k_start in range(first, tl.minimum(first + per_split, in_features), BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = token_mask[:, None] & (k < in_features)[None, :]
        given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=inside, other=0.0)
        if is_message(NUMBER):
            own = codes + rows[:, None] * tl.cdiv(in_features, 32 * channels_a_bit(NUMBER))
            packed = message_codes(own, k[None, :], (k < in_features)[None, :], in_features, NUMBER)
        else:
            packed = load_codes(codes, rows, k_start, in_features, NUMBER, BLOCK_K, EVEN)
        value = code_values(packed, code_width(NUMBER))
        if GROUPED:
            value *= load_steps(steps, rows, k_start, group_size, in_features, BLOCK_K)
        acc = tl.dot(value.to(x.dtype.element_ty), tl.trans(given), acc, input_precision="ieee")
    if not GROUPED:
        acc *= tl.load(steps + rows)[:, None]
    return acc


@triton.jit
def add_salient(
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
