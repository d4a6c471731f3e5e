# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""The CPU kernels: each a task that any number of threads may run at once, sharing work by a counter.

A task's one argument is the address of its int64 fields, named by the constants below.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from numba import carray, cfunc, njit, types

from . import cpu_attention_tiles, cpu_tiles, cpu_vector
from .cpu_tiles import base_tile, delta_tile, finish_tile, merge_tile
from .cpu_vector import (
    ROWS,
    bits_of,
    copy,
    fetch_add,
    prefetch,
    read_bf16,
    read_f16,
    read_f32,
    read_i16,
    read_i32,
    write_i16,
    write_i32,
)

# Fields of every task; SELF is their own address. Strides are in bytes, *_SLOT from one slot to the next.
(
    SELF, NEXT, THREAD, BF16, IN_FEATURES, OUT_FEATURES, WEIGHT, WEIGHT_STRIDE,
    CODES, CODES_SLOT, STEPS, STEPS_SLOT, SALIENT_INDEX, SALIENT_VALUE, MAX_SALIENT, SALIENT_KIND,
    CHANNEL_SCALE, BIAS_DELTA, SLOT_BITS, SLOT_GROUP, COMMON,
) = range(21)  # fmt: skip
# Fields of `spread` and `rows`: tokens are in the order of their slots, group by group.
(
    X, X_STRIDE, Y, Y_STRIDE, BIAS, TOKENS, ORDER, SLOT_OF, GROUPS, GROUP_COUNT, PLAIN, PLAIN_STRIDE,
    SPREAD, SPREAD_STRIDE, SALIENT, SALIENT_STRIDE, WORD_GROUP, WORD_GROUP_STRIDE, ACC, ACC_STRIDE, DECODE,
) = range(COMMON, COMMON + 21)  # fmt: skip
# Fields of `merge`.
MERGED, MERGED_STRIDE, FIRST_ROW, ROW_COUNT, SLOT, SCALE, MERGE = range(COMMON, COMMON + 7)

CHUNK_ROWS = 32
"""Rows a thread takes at a time: long enough to stream, short enough that two threads end together."""

MERGE_ROWS = 8

_ONE = 0x3C00
"""1 as float16, the scale of most channels."""

_INLINED = (cpu_attention_tiles, cpu_tiles, cpu_vector)
_SOURCES = f"{zlib.crc32(b''.join(Path(str(module.__file__)).read_bytes() for module in _INLINED)):08x}"

_base_bf16_1, _base_bf16_4 = base_tile(1, True), base_tile(4, True)
_base_f32_1, _base_f32_4 = base_tile(1, False), base_tile(4, False)
_delta_bf16_1_1, _delta_bf16_1_2, _delta_bf16_1_4 = (delta_tile(1, bits, False, True) for bits in (1, 2, 4))
_delta_bf16_4_1, _delta_bf16_4_2, _delta_bf16_4_4 = (delta_tile(4, bits, False, True) for bits in (1, 2, 4))
_group_bf16_1_1, _group_bf16_1_2, _group_bf16_1_4 = (delta_tile(1, bits, True, True) for bits in (1, 2, 4))
_delta_f32_1_1, _delta_f32_1_2, _delta_f32_1_4 = (delta_tile(1, bits, False, False) for bits in (1, 2, 4))
_group_f32_1_1, _group_f32_1_2, _group_f32_1_4 = (delta_tile(1, bits, True, False) for bits in (1, 2, 4))
_finish_bf16_bf16_1, _finish_bf16_f16_1, _finish_bf16_f32_1 = (
    finish_tile(1, kind, True) for kind in ("bfloat16", "float16", "float32")
)
_finish_bf16_bf16_4, _finish_bf16_f16_4, _finish_bf16_f32_4 = (
    finish_tile(4, kind, True) for kind in ("bfloat16", "float16", "float32")
)
_finish_f32_bf16_1, _finish_f32_f16_1, _finish_f32_f32_1 = (
    finish_tile(1, kind, False) for kind in ("bfloat16", "float16", "float32")
)
_finish_f32_bf16_4, _finish_f32_f16_4, _finish_f32_f32_4 = (
    finish_tile(4, kind, False) for kind in ("bfloat16", "float16", "float32")
)
_merge_bf16_1, _merge_bf16_2, _merge_bf16_4 = (merge_tile(bits, True) for bits in (1, 2, 4))
_merge_f32_1, _merge_f32_2, _merge_f32_4 = (merge_tile(bits, False) for bits in (1, 2, 4))


def versioned(task):
    """Rename a task after the code it inlines: Numba's disk cache looks only at the file of the task itself."""
    task.__qualname__ = f"{task.__qualname__}_{_SOURCES}"
    return task


@njit(inline="always")
def _to_bf16(value):
    """A float32 rounded to bfloat16, to nearest, ties to even, as an integer."""
    bits = bits_of(value)
    if value != value:
        return 0x7FC0
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@njit(inline="always")
def _read(address, bf16):
    return read_bf16(address) if bf16 else read_f32(address)


@njit(inline="always")
def _write(address, value, bf16):
    if bf16:
        write_i16(address, _to_bf16(value))
    else:
        write_i32(address, bits_of(value))


@njit
def _delta(bf16, bits, grouped, four, codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc):
    if bf16 and not grouped and four:
        if bits == 1:
            _delta_bf16_4_1(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        elif bits == 2:
            _delta_bf16_4_2(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        else:
            _delta_bf16_4_4(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
    elif bf16 and not grouped:
        if bits == 1:
            _delta_bf16_1_1(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        elif bits == 2:
            _delta_bf16_1_2(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        else:
            _delta_bf16_1_4(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
    elif bf16:
        if bits == 1:
            _group_bf16_1_1(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        elif bits == 2:
            _group_bf16_1_2(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        else:
            _group_bf16_1_4(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
    elif not grouped:
        if bits == 1:
            _delta_f32_1_1(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        elif bits == 2:
            _delta_f32_1_2(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        else:
            _delta_f32_1_4(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
    else:
        if bits == 1:
            _group_f32_1_1(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        elif bits == 2:
            _group_f32_1_2(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)
        else:
            _group_f32_1_4(codes, stride, valid, x, x_stride, words, steps, steps_stride, of_word, acc)


@njit(inline="always")
def _scaled_bf16(x, scale, channel, in_features):
    """x times the channel's scale as bfloat16 bits; 0 past the last channel."""
    if channel >= in_features:
        return 0
    if read_i16(scale + 2 * channel) == _ONE:
        return read_i16(x + 2 * channel)
    return _to_bf16(read_bf16(x + 2 * channel) * read_f16(scale + 2 * channel))


@njit
def _spread_to_codes(x, target, bf16, in_features, bits, scale):
    """x times its channel scales, permuted so that each vector meets the codes unpacked beside it."""
    per_word = 32 // bits
    half = per_word // 2
    blocks = (in_features * bits + 511) // 512
    for word in range(16 * blocks):
        block, lane, first = word >> 4, word & 15, word * per_word
        if bf16:
            place = target + 64 * block * half + 4 * lane
            for s in range(half):
                low = _scaled_bf16(x, scale, first + s, in_features)
                high = _scaled_bf16(x, scale, first + s + half, in_features)
                write_i32(place + 64 * s, low | (high << 16))
        else:
            place = target + 64 * block * per_word + 4 * lane
            for s in range(per_word):
                value, channel = 0, first + s
                if channel < in_features:
                    value = bits_of(read_f32(x + 4 * channel) * read_f16(scale + 2 * channel))
                write_i32(place + 64 * s, value)


@njit
def _name_groups(f, g):
    """Write which step each word of group g's slot takes."""
    slot = read_i32(f[GROUPS] + 12 * g)
    if slot < 0:
        return
    bits, group_size = read_i32(f[SLOT_BITS] + 4 * slot), read_i32(f[SLOT_GROUP] + 4 * slot)
    if group_size > 0:
        table = f[WORD_GROUP] + g * f[WORD_GROUP_STRIDE]
        for word in range(f[WORD_GROUP_STRIDE] // 4):
            write_i32(table + 4 * word, word * (32 // bits) // group_size)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
@versioned
def spread(fields):
    """Lay out each token's x as `rows` reads it: plain, zero-padded, and permuted to its slot's codes."""
    f = carray(fields, DECODE)
    bf16, in_features, k = f[BF16] != 0, f[IN_FEATURES], f[MAX_SALIENT]
    size = 2 if bf16 else 4
    while True:
        t = fetch_add(f[SELF] + 8 * NEXT, 1)
        if t >= f[TOKENS]:
            return
        if t < f[GROUP_COUNT] and f[WORD_GROUP_STRIDE] > 0:
            _name_groups(f, t)
        x = f[X] + read_i32(f[ORDER] + 4 * t) * f[X_STRIDE]
        plain = f[PLAIN] + t * f[PLAIN_STRIDE]
        copy(x, plain, in_features * size)
        for i in range(in_features * size, f[PLAIN_STRIDE], 2):
            write_i16(plain + i, 0)
        slot = read_i32(f[SLOT_OF] + 4 * t)
        if slot < 0:
            continue
        scale = f[CHANNEL_SCALE] + 2 * slot * in_features
        bits = read_i32(f[SLOT_BITS] + 4 * slot)
        _spread_to_codes(x, f[SPREAD] + t * f[SPREAD_STRIDE], bf16, in_features, bits, scale)
        salient = f[SALIENT] + t * f[SALIENT_STRIDE]
        for j in range(f[SALIENT_STRIDE] // 4):
            value = 0
            if j < k:
                channel = read_i32(f[SALIENT_INDEX] + 4 * (slot * k + j))
                value = bits_of(_read(x + size * channel, bf16))
            write_i32(salient + 4 * j, value)


@njit
def _add_group(f, bf16, g, row, valid, acc):
    """Add the delta products of group g's tokens to the accumulators of rows `row` and up."""
    entry = f[GROUPS] + 12 * g
    slot, first, count = read_i32(entry), read_i32(entry + 4), read_i32(entry + 8)
    if slot < 0:
        return
    in_features = f[IN_FEATURES]
    bits, group_size = read_i32(f[SLOT_BITS] + 4 * slot), read_i32(f[SLOT_GROUP] + 4 * slot)
    grouped = group_size > 0
    words = (in_features * bits + 31) // 32
    steps_stride = 4 * ((in_features + group_size - 1) // group_size if grouped else 1)
    codes = f[CODES] + slot * f[CODES_SLOT] + row * words * 4
    steps = f[STEPS] + slot * f[STEPS_SLOT] + row * steps_stride
    of_word = f[WORD_GROUP] + g * f[WORD_GROUP_STRIDE]
    t = first
    while t < first + count:
        four = bf16 and not grouped and t + 4 <= first + count
        _delta(
            bf16, bits, grouped, four, codes, 4 * words, valid, f[SPREAD] + t * f[SPREAD_STRIDE],
            f[SPREAD_STRIDE], words, steps, steps_stride, of_word, acc + t * 64 * ROWS,
        )  # fmt: skip
        t += 4 if four else 1


@njit
def _finish_tokens(bf16, kind, four, acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid):
    if bf16:
        if kind == 0 and four:
            _finish_bf16_bf16_4(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif kind == 0:
            _finish_bf16_bf16_1(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif kind == 1 and four:
            _finish_bf16_f16_4(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif kind == 1:
            _finish_bf16_f16_1(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif four:
            _finish_bf16_f32_4(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        else:
            _finish_bf16_f32_1(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
    else:
        if kind == 0 and four:
            _finish_f32_bf16_4(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif kind == 0:
            _finish_f32_bf16_1(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif kind == 1 and four:
            _finish_f32_f16_4(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif kind == 1:
            _finish_f32_f16_1(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        elif four:
            _finish_f32_f32_4(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)
        else:
            _finish_f32_f32_1(acc, values, x, x_stride, k, bias, shift, y, y_stride, order, valid)


@njit
def _finish(f, bf16, g, row, valid, acc):
    """Write y of group g's tokens for rows `row` and up."""
    out_features, k, kind = f[OUT_FEATURES], f[MAX_SALIENT], f[SALIENT_KIND]
    size = 2 if bf16 else 4
    entry = f[GROUPS] + 12 * g
    slot, first, count = read_i32(entry), read_i32(entry + 4), read_i32(entry + 8)
    y = f[Y] + size * row
    bias = f[BIAS] + size * row if f[BIAS] else 0
    shift, values = 0, 0
    if slot < 0:
        k = 0
    else:
        place = slot * out_features + row
        shift = f[BIAS_DELTA] + 4 * place
        values = f[SALIENT_VALUE] + (4 if kind == 2 else 2) * k * place
    t = first
    while t < first + count:
        four = t + 4 <= first + count
        _finish_tokens(
            bf16, kind, four, acc + t * ROWS * 64, values, f[SALIENT] + t * f[SALIENT_STRIDE], f[SALIENT_STRIDE], k,
            bias, shift, y, f[Y_STRIDE], f[ORDER] + 4 * t, valid,
        )  # fmt: skip
        t += 4 if four else 1


@njit
def _prefetch_group(f, g, row, valid):
    """Ask for the codes that `_add_group` will read; they arrive while the base product runs."""
    slot = read_i32(f[GROUPS] + 12 * g)
    if slot >= 0:
        row_bytes = (f[IN_FEATURES] * read_i32(f[SLOT_BITS] + 4 * slot) + 31) // 32 * 4
        prefetch(f[CODES] + slot * f[CODES_SLOT] + row * row_bytes, valid * row_bytes)


@njit
def _base(bf16, four, weight, stride, valid, x, x_stride, in_features, acc):
    if bf16 and four:
        _base_bf16_4(weight, stride, valid, x, x_stride, in_features, acc)
    elif bf16:
        _base_bf16_1(weight, stride, valid, x, x_stride, in_features, acc)
    elif four:
        _base_f32_4(weight, stride, valid, x, x_stride, in_features, acc)
    else:
        _base_f32_1(weight, stride, valid, x, x_stride, in_features, acc)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
@versioned
def rows(fields):
    """y for every token, a few weight rows at a time: each weight and code is read from memory once."""
    f = carray(fields, DECODE)
    bf16, tokens, out_features = f[BF16] != 0, f[TOKENS], f[OUT_FEATURES]
    acc = f[ACC] + fetch_add(f[SELF] + 8 * THREAD, 1) * f[ACC_STRIDE]
    while True:
        start = fetch_add(f[SELF] + 8 * NEXT, 1) * CHUNK_ROWS
        if start >= out_features:
            return
        for row in range(start, min(start + CHUNK_ROWS, out_features), ROWS):
            valid = min(ROWS, out_features - row)
            for g in range(f[GROUP_COUNT]):
                _prefetch_group(f, g, row, valid)
            t = 0
            while t < tokens:
                four = t + 4 <= tokens
                _base(
                    bf16, four, f[WEIGHT] + row * f[WEIGHT_STRIDE], f[WEIGHT_STRIDE], valid,
                    f[PLAIN] + t * f[PLAIN_STRIDE], f[PLAIN_STRIDE], f[IN_FEATURES], acc + t * 64 * ROWS,
                )  # fmt: skip
                t += 4 if four else 1
            for g in range(f[GROUP_COUNT]):
                _add_group(f, bf16, g, row, valid, acc)
            for g in range(f[GROUP_COUNT]):
                _finish(f, bf16, g, row, valid, acc)


@njit
def _merge(bf16, bits, weight, codes, step, scale, merged, first, last):
    if bf16 and bits == 1:
        _merge_bf16_1(weight, codes, step, scale, merged, first, last)
    elif bf16 and bits == 2:
        _merge_bf16_2(weight, codes, step, scale, merged, first, last)
    elif bf16:
        _merge_bf16_4(weight, codes, step, scale, merged, first, last)
    elif bits == 1:
        _merge_f32_1(weight, codes, step, scale, merged, first, last)
    elif bits == 2:
        _merge_f32_2(weight, codes, step, scale, merged, first, last)
    else:
        _merge_f32_4(weight, codes, step, scale, merged, first, last)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
@versioned
def merge(fields):
    """W + Δ̂ of one slot for `ROW_COUNT` rows from `FIRST_ROW` on, salient channels included."""
    f = carray(fields, MERGE)
    bf16, in_features, slot, k, kind = f[BF16] != 0, f[IN_FEATURES], f[SLOT], f[MAX_SALIENT], f[SALIENT_KIND]
    size = 2 if bf16 else 4
    bits, group_size = read_i32(f[SLOT_BITS] + 4 * slot), read_i32(f[SLOT_GROUP] + 4 * slot)
    span = group_size if group_size > 0 else in_features
    words, groups = (in_features * bits + 31) // 32, (in_features + span - 1) // span
    while True:
        start = fetch_add(f[SELF] + 8 * NEXT, 1) * MERGE_ROWS
        if start >= f[ROW_COUNT]:
            return
        for local in range(start, min(start + MERGE_ROWS, f[ROW_COUNT])):
            row = f[FIRST_ROW] + local
            weight, merged = f[WEIGHT] + row * f[WEIGHT_STRIDE], f[MERGED] + local * f[MERGED_STRIDE]
            codes = f[CODES] + slot * f[CODES_SLOT] + row * words * 4
            steps = f[STEPS] + slot * f[STEPS_SLOT] + row * groups * 4
            for g in range(groups):
                first = g * span
                _merge(
                    bf16,
                    bits,
                    weight,
                    codes,
                    steps + 4 * g,
                    f[SCALE],
                    merged,
                    first,
                    min(first + span, in_features),
                )
            for j in range(k):
                channel = read_i32(f[SALIENT_INDEX] + 4 * (slot * k + j))
                index = (slot * f[OUT_FEATURES] + row) * k + j
                if kind == 0:
                    residual = read_bf16(f[SALIENT_VALUE] + 2 * index)
                elif kind == 1:
                    residual = read_f16(f[SALIENT_VALUE] + 2 * index)
                else:
                    residual = read_f32(f[SALIENT_VALUE] + 4 * index)
                if residual != 0:
                    word = read_i32(codes + 4 * (channel * bits // 32))
                    code = (word >> (channel * bits % 32)) & ((1 << bits) - 1)
                    step = read_f32(steps + 4 * (channel // span)) * read_f32(f[SCALE] + 4 * channel)
                    value = _read(weight + size * channel, bf16) + (code - (2**bits - 1) / 2) * step + residual
                    _write(merged + size * channel, types.float32(value), bf16)
