# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""How the CPU kernels read codes: where they lie, and what they stand for. Nothing else there depends on the kind."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit

from . import packing
from .cpu_vector import (
    F32,
    HAS_BF16,
    I16,
    I32,
    I64,
    LANES,
    TABLE_LANES,
    V16F,
    V32H,
    bf16_bits,
    broadcast,
    constants,
    declare,
    dot_halves,
    dot_pairs,
    load,
    looked_up,
    read_i32,
    splat,
)

codes_per_word = njit(inline="always")(packing.codes_per_word)
words_per_row = njit(inline="always")(packing.words_per_row)


@njit(inline="always")
def code_at(codes, channel, bits):
    """The code of one channel of the row whose first word is at address `codes`."""
    per_word = codes_per_word(bits)
    word = read_i32(codes + 4 * (channel // per_word))
    return (word >> (channel % per_word * bits)) & ((1 << bits) - 1)


def code_pairs(builder: ir.IRBuilder, words: Any, bits: int, s: int) -> Any:
    """The values of codes s and s + 16 // bits of each of 16 words, for `add_pairs`.

    They are bfloat16 pairs (32 x i16) where the machine multiplies such, else the float32 of either code.
    """
    if not HAS_BF16:
        return code_values(builder, words, bits, s), code_values(builder, words, bits, s + 16 // bits)
    # One is from either half of a word, so that 16-bit shifts do.
    halves = builder.bitcast(words, V32H)
    per_lookup = 4 // bits
    shifted = builder.lshr(halves, splat(s // per_lookup * per_lookup * bits, I16, 32))
    # vpermw reads the low five bits: enough for `per_lookup` codes, one of which the table heeds.
    place = s % per_lookup * bits
    table = [bf16_bits((i >> place) % 2**bits - (2**bits - 1) / 2) for i in range(32)]
    name = "llvm.x86.avx512.permvar.hi.512"
    function = declare(builder, name, ir.FunctionType(V32H, [V32H, V32H]))
    return builder.call(function, [constants(table, I16), shifted])


def add_pairs(builder: ir.IRBuilder, total: Any, given: Any, values: Any) -> Any:
    """total + the products of 16 pairs of bfloat16 (32 x i16) with what `code_pairs` made."""
    return dot_pairs(builder, total, given, values) if HAS_BF16 else dot_halves(builder, total, given, values)


def code_values(builder: ir.IRBuilder, words: Any, bits: int, s: int) -> Any:
    """The float32 values of code s of each of 16 words."""
    return code_lanes(builder, builder.lshr(words, splat(s * bits, I32)), bits)


def code_lanes(builder: ir.IRBuilder, shifted: Any, bits: int) -> Any:
    """The float32 values of codes that lie in the low bits of 16 lanes of i32, whatever is above them."""
    middle = (2**bits - 1) / 2
    if 2**bits <= TABLE_LANES:
        return looked_up(builder, [i - middle for i in range(2**bits)], shifted)
    codes = builder.and_(shifted, splat(2**bits - 1, I32))
    return builder.fsub(builder.sitofp(codes, V16F), splat(middle, F32))


def word_of(builder: ir.IRBuilder, channel: Any, bits: int) -> Any:
    """The word of a row that a channel's code lies in."""
    return builder.udiv(channel, I64(packing.codes_per_word(bits)))


def values_of_channels(builder: ir.IRBuilder, codes: Any, channel: Any, last_word: Any, bits: int) -> Any:
    """The float32 values of 16 channels of a row, `channel` a multiple of 16 and `codes` the address of the first word.

    No word past the last is read: where channels reach beyond it, their values are any.
    """

    def word(index: Any) -> Any:
        within = builder.icmp_signed("<", index, last_word)
        place = builder.mul(builder.select(within, index, last_word), I64(4))
        return load(builder, builder.add(codes, place), I32)

    index = word_of(builder, channel, bits)
    if bits == 4:
        pair = builder.insert_element(ir.Constant(ir.VectorType(I32, 2), ir.Undefined), word(index), I32(0))
        pair = builder.insert_element(pair, word(builder.add(index, I64(1))), I32(1))
        words = builder.shuffle_vector(pair, pair, constants([0] * 8 + [1] * 8, I32))
        shifts = constants([4 * (lane % 8) for lane in range(LANES)], I32)
    else:
        whole = word(index)
        if bits == 1:
            whole = builder.lshr(whole, builder.trunc(builder.urem(channel, I64(32)), I32))
        words, shifts = broadcast(builder, whole), constants([bits * lane for lane in range(LANES)], I32)
    return code_lanes(builder, builder.lshr(words, shifts), bits)
