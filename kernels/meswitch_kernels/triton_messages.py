# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Pieces of the Triton kernels: messages of trellis codes (`messages`), decoded to planes of codes or one by one."""

from __future__ import annotations

import triton
import triton.language as tl

from . import messages as _messages

FIRST_NUMBER = tl.constexpr(_messages.FIRST_NUMBER)


@triton.constexpr_function
def is_message(number):
    return number > _messages.FIRST_NUMBER


@triton.constexpr_function
def channels_a_bit(number):
    return _messages.MESSAGES[number].channels_a_bit


@triton.constexpr_function
def code_width(number):
    return number if number < _messages.FIRST_NUMBER else _messages.MESSAGES[number].width


@triton.constexpr_function
def tap(number, plane):
    """The mask of a plane; bit k is the message bit k places before the newest."""
    return _messages.MESSAGES[number].taps[plane]


@triton.constexpr_function
def memory(number):
    return _messages.MESSAGES[number].memory


@triton.constexpr_function
def reversed_tap(number, plane):
    """The mask of a plane over the last bits as they lie in a word, the newest uppermost."""
    message = _messages.MESSAGES[number]
    return int(f"{message.taps[plane]:0{message.memory + 1}b}"[::-1], 2)


@triton.jit
def row_words(in_features, number):
    """Words that an output row takes whose codes have this number, which need not be known to the compiler."""
    for_message = tl.cdiv(in_features, 32 * tl.maximum(number - FIRST_NUMBER, 1))
    return tl.where(number > FIRST_NUMBER, for_message, (in_features * number + 31) // 32)


@triton.jit
def is_among(number, NUMBERS: tl.constexpr):
    """Whether a number is one of NUMBERS."""
    found = number == NUMBERS[0]
    for i in tl.static_range(1, len(NUMBERS)):
        found |= number == NUMBERS[i]
    return found


@triton.jit
def width_of(number, NUMBERS: tl.constexpr):
    """Bits of the code that codes of this number, one of NUMBERS, are computed with."""
    width = number
    for i in tl.static_range(len(NUMBERS)):
        if is_message(NUMBERS[i]):
            width = tl.where(number == NUMBERS[i], code_width(NUMBERS[i]), width)
    return width


@triton.jit
def message_plane(word, before, TAP: tl.constexpr):
    """32 channels' bits of a plane, from each word of a message and the one before it, uint32."""
    plane = tl.zeros_like(word)
    for shift in tl.static_range(13):
        if TAP >> shift & 1:
            if shift == 0:
                plane = plane ^ word
            else:
                plane = plane ^ ((word << shift) | (before >> (32 - shift)))
    return plane


@triton.constexpr_function
def _differs_little(number, plane):
    """Whether a plane is made of the one before it by fewer XORs than of the message."""
    taps = _messages.MESSAGES[number].taps
    return plane > 0 and (taps[plane] ^ taps[plane - 1]).bit_count() + 1 < taps[plane].bit_count()


@triton.jit
def next_plane(previous, word, before, NUMBER: tl.constexpr, PLANE: tl.constexpr):
    """`message_plane` of a plane, with the one before it at hand; `previous` is anything for the first."""
    if _differs_little(NUMBER, PLANE):
        plane = previous ^ message_plane(word, before, tap(NUMBER, PLANE) ^ tap(NUMBER, PLANE - 1))
    else:
        plane = message_plane(word, before, tap(NUMBER, PLANE))
    return plane


@triton.jit
def load_message(codes, place, words_of_row, inside, MASKED: tl.constexpr):
    """Words of messages at their places in a row, and those before them, uint32; `codes` points to the rows' first."""
    previous = tl.where(place == 0, words_of_row, place) - 1
    if MASKED:
        word = tl.load(codes + place, mask=inside, other=0)
        before = tl.load(codes + previous, mask=inside, other=0)
    else:
        word, before = tl.load(codes + place), tl.load(codes + previous)
    return word.to(tl.uint32, bitcast=True), before.to(tl.uint32, bitcast=True)


@triton.jit
def unit_codes(codes, unit, words_of_row, NUMBER: tl.constexpr, PART: tl.constexpr):
    """The words of bits, one for each bit of a code, of 32 neighbouring channels of each row: unit `unit` of a row.

    `codes` points to each row's first word. PART is the unit's place in its word of the message.
    """
    word = tl.minimum(unit // channels_a_bit(NUMBER), words_of_row - 1)
    word, before = load_message(codes, word, words_of_row, word >= 0, False)
    WIDTH: tl.constexpr = code_width(NUMBER)
    low = message_plane(word, before, tap(NUMBER, PART * WIDTH))
    high = low
    if WIDTH == 2:
        high = message_plane(word, before, tap(NUMBER, PART * WIDTH + 1))
    return low, high


@triton.jit
def message_codes(codes, k, inside, in_features, NUMBER: tl.constexpr):
    """Codes int32 of the channels `k`, each by its own window of a message; `codes` points to each one's row."""
    CHANNELS: tl.constexpr = channels_a_bit(NUMBER)
    WIDTH: tl.constexpr = code_width(NUMBER)
    words_of_row = tl.cdiv(in_features, 32 * CHANNELS)
    part, bit = k // 32 % CHANNELS, k % 32
    word, before = load_message(codes, k // (32 * CHANNELS), words_of_row, inside, True)
    both = (word.to(tl.uint64) << 32) | before.to(tl.uint64)
    window = (both >> (32 - memory(NUMBER) + bit).to(tl.uint64)).to(tl.int32)
    result = tl.zeros_like(window)
    for plane in tl.static_range(WIDTH):
        mask = tl.zeros_like(part)
        for own in tl.static_range(CHANNELS):
            mask = tl.where(part == own, reversed_tap(NUMBER, own * WIDTH + plane), mask)
        parity = window & mask
        for step in tl.static_range(4):
            parity = parity ^ (parity >> (8 >> step))
        result = result | ((parity & 1) << plane)
    return result


@triton.constexpr_function
def message_words(number, tokens):
    """Words of a row that decode takes at once beside tiles of so many tokens: as many as registers have room for."""
    return 16 if tokens <= 8 and number <= _messages.FIRST_NUMBER + 4 else 8


@triton.constexpr_function
def message_channels(number, tokens):
    """Channels of these words; a row of x is a multiple of them wide."""
    return 32 * message_words(number, tokens) * (number - _messages.FIRST_NUMBER)


@triton.jit
def message_row(k):
    """Which bit of either half of its word channel k has."""
    return k % 16


@triton.jit
def message_place(k, NUMBER: tl.constexpr, TOKENS: tl.constexpr):
    """Where decode wants channel k of x beside messages of this number.

    Of n words together, bits j and j + 16 of each word's plane v are two of 2n channels that lie side by side.
    """
    WORDS: tl.constexpr = message_words(NUMBER, TOKENS)
    CHANNELS: tl.constexpr = channels_a_bit(NUMBER)
    word, part = k // (32 * CHANNELS), k // 32 % CHANNELS
    block, within = word // WORDS, word % WORDS
    row = (block * CHANNELS + part) * 16 + message_row(k)
    return row * (2 * WORDS) + 2 * within + k % 32 // 16
