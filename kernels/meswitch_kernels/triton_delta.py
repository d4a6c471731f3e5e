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
    message_plane,
    message_words,
    tap,
)
from .triton_tiles import PLANE_WORDS, code_values, load_codes, load_steps, places_for, plane_values, words_per_row


@triton.jit
def _no_sums(BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Sums of products, and of x, for each place in the mantissa."""
    zeros = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    of_x = tl.zeros((32, BLOCK_TOKENS), dtype=tl.float32)
    return (zeros, zeros, zeros), (of_x, of_x, of_x)


@triton.jit
def _add_plane(
    sums, x_sums, words, given, SHIFT: tl.constexpr, BITS: tl.constexpr, PLACES: tl.constexpr, ASM: tl.constexpr
):
    """`sums` and `x_sums` plus products of x `given` `[channels, tokens]` with codes SHIFT bits up in half words."""
    DTYPE: tl.constexpr = given.dtype
    PLACE: tl.constexpr = SHIFT // BITS % PLACES
    ones = tl.full((32, given.shape[0]), 1.0, tl.float32).to(DTYPE)
    value = plane_values(words, SHIFT, BITS, PLACES, DTYPE, ASM)
    if PLACE == 0:
        sums = tl.dot(value, given, sums[0]), sums[1], sums[2]
        x_sums = tl.dot(ones, given, x_sums[0]), x_sums[1], x_sums[2]
    elif PLACE == 1:
        sums = sums[0], tl.dot(value, given, sums[1]), sums[2]
        x_sums = x_sums[0], tl.dot(ones, given, x_sums[1]), x_sums[2]
    else:
        sums = sums[0], sums[1], tl.dot(value, given, sums[2])
        x_sums = x_sums[0], x_sums[1], tl.dot(ones, given, x_sums[2])
    return sums, x_sums


@triton.jit
def _total(sums, x_sums, BITS: tl.constexpr, PLACES: tl.constexpr, BFLOAT: tl.constexpr):
    """Products of codes less their middle, of `sums` whose codes are set into a mantissa by turns in some places.

    A code is in the mantissa of 128. The factors of the places, the 128 and the middle of a code come off here, through
    sums of x that the same instructions made.
    """
    LOWEST: tl.constexpr = 1.0 if BFLOAT else 0.125
    total = tl.zeros_like(sums[0])
    for place in tl.static_range(PLACES):
        unit = 0.5 ** (place * BITS)
        offset = ((1 << BITS) - 1) / 2 + (128.0 * unit if BFLOAT else 0.0)
        # The rows of `x_sums` are equal, so that their sum divided by their number is exact.
        total += sums[place] * (unit * LOWEST) - (tl.sum(x_sums[place], 0) * (offset / 32))[None, :]
    return total


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
    pairs, within = TOGETHER, tl.arange(0, TOGETHER)
    place = codes + (rows[:, None] * words_of_row + block * TOGETHER + within[None, :])
    if WHOLE:
        words = tl.load(place)
    else:
        pairs = words_of_row - block * TOGETHER
        words = tl.load(place, mask=(within < pairs)[None, :], other=0)
    channel = tl.arange(0, 2 * TOGETHER)
    for plane in tl.static_range(16 // BITS):
        k = block * (TOGETHER * 32 // BITS) + plane * 2 * pairs + channel
        inside = token_mask[:, None]
        if not WHOLE:
            inside = inside & (channel < 2 * pairs)[None, :] & (k < in_features)[None, :]
        given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=inside, other=0.0)
        sums, x_sums = _add_plane(sums, x_sums, words, tl.trans(given), plane * BITS, BITS, PLACES, ASM)
    return sums, x_sums


@triton.jit
def delta_planes(
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
    """`[BLOCK_OUT, BLOCK_TOKENS]` float32: one split's share of the slot's delta times x, with one step a row."""
    CHANNELS: tl.constexpr = PLANE_WORDS * 32 // BITS
    PLACES: tl.constexpr = places_for(BITS, BLOCK_TOKENS)
    blocks = tl.cdiv(in_features, CHANNELS)
    per_split = tl.cdiv(blocks, splits)
    begin = split * per_split
    end = tl.minimum(begin + per_split, blocks)
    whole = in_features // CHANNELS
    # Told to be a multiple of a block's words, so that these are read in wide loads.
    words_of_row = whole * PLANE_WORDS if EVEN else words_per_row(in_features, BITS)
    sums, x_sums = _no_sums(BLOCK_OUT, BLOCK_TOKENS)
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
    total = _total(sums, x_sums, BITS, PLACES, tl.bfloat16 == x.dtype.element_ty)
    return total * tl.load(steps + rows)[:, None]


@triton.jit
def delta_messages(
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
    NUMBER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ASM: tl.constexpr,
):
    """As `delta_planes`, for messages, whose words are decoded in registers; x has its channels by `message_place`.

    x is zero in the channels past the last that the last words have.
    """
    WORDS: tl.constexpr = message_words(NUMBER, BLOCK_TOKENS)
    TOGETHER: tl.constexpr = message_channels(NUMBER, BLOCK_TOKENS)
    CHANNELS: tl.constexpr = channels_a_bit(NUMBER)
    WIDTH: tl.constexpr = code_width(NUMBER)
    PLACES: tl.constexpr = 2  # registers have no room for the sums of a third beside the messages
    words_of_row = in_features // TOGETHER * WORDS if EVEN else tl.cdiv(in_features, 32 * CHANNELS)
    blocks = tl.cdiv(words_of_row, WORDS)
    per_split = tl.cdiv(blocks, splits)
    begin = split * per_split
    sums, x_sums = _no_sums(BLOCK_OUT, BLOCK_TOKENS)
    within, channel = tl.arange(0, WORDS), tl.arange(0, 2 * WORDS)
    own = codes + rows[:, None] * words_of_row
    STAGES: tl.constexpr = 2 if BLOCK_TOKENS * TOGETHER > 8192 else None
    for block in tl.range(begin, tl.minimum(begin + per_split, blocks), num_stages=STAGES):
        place = (within + block * WORDS)[None, :]
        word, before = load_message(own, place, words_of_row, place < words_of_row, not EVEN)
        for part in tl.static_range(CHANNELS):
            low = message_plane(word, before, tap(NUMBER, part * WIDTH))
            for odd in tl.static_range(WIDTH):
                bits = low
                if WIDTH == 2:
                    high = message_plane(word, before, tap(NUMBER, part * WIDTH + 1))
                    bits = ((low >> odd) & 0x55555555) | (((high >> odd) & 0x55555555) << 1)
                bits = bits.to(tl.int32, bitcast=True)
                for plane in tl.static_range(16 // WIDTH):
                    k = channel + (block * TOGETHER + (part * 16 + plane * WIDTH + odd) * 2 * WORDS)
                    given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=token_mask[:, None], other=0.0)
                    sums, x_sums = _add_plane(
                        sums, x_sums, bits, tl.trans(given), plane * WIDTH, WIDTH, PLACES, ASM
                    )  # fmt: skip
    total = _total(sums, x_sums, WIDTH, PLACES, tl.bfloat16 == x.dtype.element_ty)
    return total * tl.load(steps + rows)[:, None]


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
