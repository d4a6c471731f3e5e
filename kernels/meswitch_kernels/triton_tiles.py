# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Pieces of the Triton kernels: a tile of packed codes as values, and the salient channels."""

from __future__ import annotations

import triton
import triton.language as tl

from .packing import PLANE_WORDS as _PLANE_WORDS
from .triton_messages import FIRST_NUMBER, is_message, message_codes

PLANE_WORDS = tl.constexpr(_PLANE_WORDS)


@triton.constexpr_function
def places_for(bits):
    """How many places of bfloat16's mantissa codes are set into by turns, so that fewer words need a shift.

    A sign has an eighth: the exponent's lowest bit turns 128 into 256, as a mantissa's uppermost would.
    """
    return 8 if bits == 1 else 7 // bits


@triton.jit
def place_of(plane, bits):
    """The place that codes of a plane have in the mantissa; neither need be known to the compiler."""
    places = tl.where(bits == 1, 8, 7 // bits)
    return plane % places * bits


@triton.jit
def words_per_row(in_features, bits):
    """Words that an output row of codes takes."""
    return (in_features * bits + 31) // 32


@triton.jit
def codes_at(codes, k, inside, in_features, number, NUMBERS: tl.constexpr):
    """Codes int32 of the channels `k`, whose number is one of NUMBERS; `codes` points to the first word of each row."""
    packed = tl.zeros_like(k)
    if number < FIRST_NUMBER:
        packed = _scalar_codes_at(codes, k, inside, in_features, number)
    for i in tl.static_range(len(NUMBERS)):
        if is_message(NUMBERS[i]):  # noqa: SIM102 (the one is known to the compiler)
            if number == NUMBERS[i]:
                packed = message_codes(codes, k, inside, in_features, NUMBERS[i])
    return packed


@triton.jit
def _scalar_codes_at(codes, k, inside, in_features, bits):
    words = words_per_row(in_features, bits)
    channels = PLANE_WORDS * 32 // bits
    block = k // channels
    pairs = tl.maximum(tl.minimum(words - block * PLANE_WORDS, PLANE_WORDS), 1)
    plane, place = (k - block * channels) // (2 * pairs), (k - block * channels) % (2 * pairs)
    word = tl.load(codes + (block * PLANE_WORDS + place // 2), mask=inside, other=0)
    return (word >> (plane * bits + place % 2 * 16)) & ((1 << bits) - 1)


@triton.jit
def load_codes(
    codes,  # pointer to the first word of the first row
    rows,  # rows counted from there, [BLOCK_OUT]
    k_start,  # a multiple of BLOCK_K
    in_features,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr = False,
):
    """Codes `[BLOCK_OUT, BLOCK_K]` int32 of channels `k_start` and up; any past the last channel.

    EVEN says that every row ends with a whole block of words, which spares a second way to read them.
    """
    tl.static_assert(2 * PLANE_WORDS % BLOCK_K == 0)
    CHANNELS: tl.constexpr = PLANE_WORDS * 32 // BITS
    words = in_features // CHANNELS * PLANE_WORDS if EVEN else words_per_row(in_features, BITS)
    block = k_start // CHANNELS
    if EVEN or (block + 1) * PLANE_WORDS <= words:
        within = k_start - block * CHANNELS
        first = block * PLANE_WORDS + within % (2 * PLANE_WORDS) // 2
        pair = tl.load(codes + (rows[:, None] * words + first + tl.arange(0, BLOCK_K // 2)[None, :]))
        pair = pair >> (within // (2 * PLANE_WORDS) * BITS)
        both = tl.join(pair, pair >> 16) & ((1 << BITS) - 1)
        unpacked = tl.reshape(both, (rows.shape[0], BLOCK_K))
    else:
        k = k_start + tl.arange(0, BLOCK_K)[None, :]
        unpacked = _scalar_codes_at(codes + rows[:, None] * words, k, k < in_features, in_features, BITS)
    return unpacked


@triton.constexpr_function
def _pair_asm(bfloat):
    """A pair of codes set into mantissas; of float16 what that multiplies, and the 1024, come off at once."""
    if bfloat:
        return "lop3.b32 $0, $1, $3, $5, 0x6A;"
    return "{ .reg .b32 pair; lop3.b32 pair, $1, $3, 0x64006400, 0xEA; fma.rn.f16x2 $0, pair, $5, $7; }"


@triton.constexpr_function
def _half_pair(exponent, sign=0):
    """A pair of float16 numbers 2^exponent, less than 0 with `sign` 1, as an instruction takes it."""
    return ((sign << 15) | ((exponent + 15) << 10)) * 0x10001


@triton.jit
def plane_values(words, SHIFT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Two values of each word `[BLOCK_OUT, n]`, the codes SHIFT bits up in either half: `[BLOCK_OUT, 2n]` of DTYPE.

    In float16 they are the codes. In bfloat16 a code c in the lower half, p places up, is 128 + 2^p c; in the upper
    half it is that less 256 + 2^p (2^bits - 1). What is added to 2^p c has either sign by turns, so that its sums stay
    small whatever mean x has; 2^-p is in x, and what is added comes off at the end (`triton_low_rank.prepare`). With
    ASM one instruction makes the pair, two in float16, where Triton's own would take five.
    """
    BFLOAT: tl.constexpr = tl.bfloat16 == DTYPE
    PLACE: tl.constexpr = SHIFT // BITS % places_for(BITS) * BITS
    DOWN: tl.constexpr = SHIFT - PLACE
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    if DOWN > 0:
        words = words >> DOWN
    if ASM:
        # Two neighbours of a thread are the halves of one word, as in every operand of a tensor core.
        twice = tl.broadcast_to(words[:, :, None], (words.shape[0], words.shape[1], 2))
        twice = tl.reshape(twice, (words.shape[0], 2 * words.shape[1]))
        mask = (MASK << 16) | MASK
        if BFLOAT:
            value = tl.inline_asm_elementwise(
                _pair_asm(BFLOAT),
                "=r,r,r,r,r,r,r",
                [twice, mask, tl.full((), ((0xC300 | MASK) << 16) | 0x4300, tl.uint32)],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        else:
            value = tl.inline_asm_elementwise(
                _pair_asm(BFLOAT),
                "=r,r,r,r,r,r,r,r,r",
                [twice, mask, _half_pair(-PLACE), tl.full((), _half_pair(10 - PLACE, 1), tl.uint32)],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
    else:
        if BFLOAT:
            low = ((words & MASK) | 0x4300).to(tl.int16)
            high = ((words >> 16 & MASK) ^ (0xC300 | MASK)).to(tl.int16)
        else:
            low = ((words & MASK) | 0x6400).to(tl.int16)
            high = ((words >> 16 & MASK) | 0x6400).to(tl.int16)
        both = tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))
        value = both.to(DTYPE, bitcast=True)
        if not BFLOAT:
            value = ((value.to(tl.float32) - 1024.0) * 0.5**PLACE).to(DTYPE)
    return value


@triton.jit
def code_values(codes, BITS: tl.constexpr):
    """Codes as float32 values, (code - (2^bits - 1) / 2), exactly.

    Setting a code into the mantissa of 2^23 converts it at the rate of ordinary arithmetic; the conversion
    instruction runs at a fraction of that.
    """
    whole = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return whole - ((1 << BITS) - 1) / 2


@triton.jit
def load_steps(
    steps,  # pointer to the first step of the first row
    rows,  # rows counted from there, [BLOCK_OUT]
    k_start,
    group_size,
    in_features,
    BLOCK_K: tl.constexpr,
):
    """The step `[BLOCK_OUT, BLOCK_K]` of each channel, for groups of a multiple of 32 channels, or 0: one."""
    group_size = tl.where(group_size > 0, group_size, in_features + 31)
    groups = tl.cdiv(in_features, group_size)
    part = (k_start + 32 * tl.arange(0, BLOCK_K // 32)) // group_size
    step = tl.load(steps + (rows[:, None] * groups + part[None, :]), mask=(part < groups)[None, :], other=0.0)
    spread = tl.broadcast_to(step[:, :, None], (rows.shape[0], BLOCK_K // 32, 32))
    return tl.reshape(spread, (rows.shape[0], BLOCK_K))


@triton.jit
def slot_is_servable(slot, slot_bits, slots):
    """Whether `slot` is the base, or inside the bank and loaded."""
    inside = (slot >= 0) & (slot < slots)
    loaded = tl.load(slot_bits + tl.where(inside, slot, 0)) > 0
    return (slot == -1) | (inside & loaded)


@triton.jit
def slot_rows(slot, per_slot, row, per_row):
    """Offset of a slot's row in a stacked tensor, in 64 bits; what is added to it fits in 32."""
    return slot.to(tl.int64) * per_slot + row.to(tl.int64) * per_row
