# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""The CPU kernels: each a task that any number of threads may run at once, sharing work by a counter.

A task's one argument is the address of its int64 fields, named by the constants below.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from numba import carray, cfunc, njit, types

from . import cpu_attention_tiles, cpu_codes, cpu_tiles, cpu_vector, packing
from .cpu_codes import code_at, codes_per_word, words_per_row
from .cpu_tiles import finish_tile, merge_tile, product_tile, project_tile
from .cpu_vector import (
    ROWS,
    bits_of,
    chosen,
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
from .packing import BIT_WIDTHS

# Fields of every task; SELF is their own address. Strides are in bytes, *_SLOT from one slot to the next.
(
    SELF, NEXT, THREAD, BF16, IN_FEATURES, OUT_FEATURES, WEIGHT, WEIGHT_STRIDE,
    CODES, CODES_SLOT, STEPS, STEPS_SLOT, SALIENT_INDEX, SALIENT_VALUE, MAX_SALIENT, SALIENT_KIND,
    CHANNEL_SCALE, BIAS_DELTA, SLOT_BITS, SLOT_GROUP, LEFT, RIGHT, SLOT_RANK, MAX_RANK, COMMON,
) = range(25)  # fmt: skip
# Fields of `rows`: tokens are in the order of their slots, group by group.
(
    X, X_STRIDE, Y, Y_STRIDE, BIAS, TOKENS, ORDER, SLOT_OF, GROUPS, GROUP_COUNT, PLAIN, PLAIN_STRIDE,
    SPREAD, SPREAD_STRIDE, SALIENT, SALIENT_STRIDE, WORD_GROUP, WORD_GROUP_STRIDE, ACC, ACC_STRIDE,
    ROWS_TOGETHER, SPREAD_NEXT, SPREAD_DONE, Z, Z_STRIDE, PROJECT_NEXT, PROJECT_DONE, DECODE,
) = range(COMMON, COMMON + 28)  # fmt: skip
# Fields of `merge`.
MERGED, MERGED_STRIDE, FIRST_ROW, ROW_COUNT, SLOT, SCALE, MERGE = range(COMMON, COMMON + 7)

CHUNK_ROWS = 32
"""Rows a thread takes at a time: long enough to stream, short enough that two threads end together."""

CACHED_ROWS = 12 << 10
"""Bytes of weight rows that stay in a core's first-level cache while the tokens pass, four at a time."""

MERGE_ROWS = 8

_ONE = 0x3C00
"""1 as float16, the scale of most channels."""

_INLINED = (cpu_attention_tiles, cpu_codes, cpu_tiles, cpu_vector, packing)
_SOURCES = f"{zlib.crc32(b''.join(Path(str(module.__file__)).read_bytes() for module in _INLINED)):08x}"

# Variants by number: tokens and, for products, bits, groups and dtype; for merging, bits and dtype; for the others, the
# bank's dtype and x's.
_TOGETHER = (4, 2, 1)
_product = chosen(
    15,
    {
        64 * tokens + 8 * bits + 2 * grouped + bf16: product_tile(tokens, bits, grouped, bf16)
        for tokens in _TOGETHER
        for bits in (0, *BIT_WIDTHS)
        for grouped in (False, True)
        for bf16 in (False, True)
        # Two sets of sums for groups of channels: four tokens would not fit the registers.
        if not grouped or (bits and tokens < 4)
    },
)
_finish, _project_rows = (
    chosen(
        arguments,
        {
            64 * tokens + 8 * kind + bf16: tile(tokens, name, bf16)
            for tokens in _TOGETHER
            for kind, name in enumerate(("bfloat16", "float16", "float32"))
            for bf16 in (False, True)
        },
    )
    for arguments, tile in ((16, finish_tile), (8, project_tile))
)
_merge = chosen(7, {2 * bits + bf16: merge_tile(bits, bf16) for bits in BIT_WIDTHS for bf16 in (False, True)})


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
    per_word = codes_per_word(bits)
    half = per_word // 2
    blocks = (words_per_row(in_features, bits) + 15) // 16
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
            write_i32(table + 4 * word, word * codes_per_word(bits) // group_size)


@njit
def _spread(f, bf16, t):
    """Lay out token t's x as `rows` reads it: plain, zero-padded, and permuted to its slot's codes."""
    in_features, k = f[IN_FEATURES], f[MAX_SALIENT]
    size = 2 if bf16 else 4
    if t < f[GROUP_COUNT] and f[WORD_GROUP_STRIDE] > 0:
        _name_groups(f, t)
    x = f[X] + read_i32(f[ORDER] + 4 * t) * f[X_STRIDE]
    plain = f[PLAIN] + t * f[PLAIN_STRIDE]
    copy(x, plain, in_features * size)
    for i in range(in_features * size, f[PLAIN_STRIDE], 2):
        write_i16(plain + i, 0)
    slot = read_i32(f[SLOT_OF] + 4 * t)
    if slot < 0:
        return
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
def _spread_all(f):
    """Lay out all tokens, shared with the other threads, and return when the last is."""
    while True:
        t = fetch_add(f[SELF] + 8 * SPREAD_NEXT, 1)
        if t >= f[TOKENS]:
            break
        _spread(f, f[BF16] != 0, t)
        fetch_add(f[SELF] + 8 * SPREAD_DONE, 1)
    # Another thread may still be at its last token; a second launch would cost more than this wait.
    while fetch_add(f[SELF] + 8 * SPREAD_DONE, 0) < f[TOKENS]:
        pass


@njit
def _project(f, g, row):
    """z = x·Rᵀ of group g's tokens, for the ROWS rows of R from `row` on that its slot has."""
    entry = f[GROUPS] + 12 * g
    slot, t = read_i32(entry), read_i32(entry + 4)
    if slot < 0 or row >= read_i32(f[SLOT_RANK] + 4 * slot):
        return
    valid = min(ROWS, read_i32(f[SLOT_RANK] + 4 * slot) - row)
    stride = (4 if f[SALIENT_KIND] == 2 else 2) * f[IN_FEATURES]
    right, last = f[RIGHT] + (slot * f[MAX_RANK] + row) * stride, t + read_i32(entry + 8)
    while t < last:
        count = 4 if last - t >= 4 else min(2, last - t)
        _project_rows(
            64 * count + 8 * f[SALIENT_KIND] + f[BF16], right, stride, valid, f[PLAIN] + t * f[PLAIN_STRIDE],
            f[PLAIN_STRIDE], f[IN_FEATURES], f[Z] + t * f[Z_STRIDE] + 4 * row, f[Z_STRIDE],
        )  # fmt: skip
        t += count


@njit
def _project_all(f):
    """z of all tokens, shared with the other threads, and return when the last is there."""
    blocks = (f[MAX_RANK] + ROWS - 1) // ROWS
    units = f[GROUP_COUNT] * blocks
    while True:
        unit = fetch_add(f[SELF] + 8 * PROJECT_NEXT, 1)
        if unit >= units:
            break
        _project(f, unit // blocks, unit % blocks * ROWS)
        fetch_add(f[SELF] + 8 * PROJECT_DONE, 1)
    while fetch_add(f[SELF] + 8 * PROJECT_DONE, 0) < units:
        pass


@njit
def _multiply(f, slot, g, t, count, first_row, last_row, acc):
    """y of tokens `t` to `t + count`, which share group g and its slot, for some rows."""
    bf16, in_features, out_features, k, kind = f[BF16], f[IN_FEATURES], f[OUT_FEATURES], f[MAX_SALIENT], f[SALIENT_KIND]
    size = 4 - 2 * bf16
    bits, group_size, words, groups = 0, 0, 0, 1
    codes, steps, shifts, values, left, rank = 0, 0, 0, 0, 0, 0
    value_size = 4 if kind == 2 else 2
    left_stride = value_size * f[MAX_RANK]
    if slot < 0:
        k = 0
    else:
        bits, group_size = read_i32(f[SLOT_BITS] + 4 * slot), read_i32(f[SLOT_GROUP] + 4 * slot)
        words = words_per_row(in_features, bits)
        if group_size > 0:
            groups = (in_features + group_size - 1) // group_size
        codes, steps = f[CODES] + slot * f[CODES_SLOT], f[STEPS] + slot * f[STEPS_SLOT]
        shifts = f[BIAS_DELTA] + 4 * slot * out_features
        values = f[SALIENT_VALUE] + value_size * k * slot * out_features
        if left_stride > 0:
            left, rank = f[LEFT] + left_stride * slot * out_features, read_i32(f[SLOT_RANK] + 4 * slot)
    product = 64 * count + 8 * bits + (2 if group_size > 0 else 0) + bf16
    finish = 64 * count + 8 * kind + bf16
    for row in range(first_row, last_row, ROWS):
        valid = min(ROWS, last_row - row)
        _product(
            product, f[WEIGHT] + row * f[WEIGHT_STRIDE], f[WEIGHT_STRIDE], valid, f[PLAIN] + t * f[PLAIN_STRIDE],
            f[PLAIN_STRIDE], in_features, codes + 4 * row * words, 4 * words, f[SPREAD] + t * f[SPREAD_STRIDE],
            f[SPREAD_STRIDE], words, steps + 4 * row * groups, 4 * groups, f[WORD_GROUP] + g * f[WORD_GROUP_STRIDE],
            acc,
        )  # fmt: skip
        _finish(
            finish, acc, values + value_size * k * row, f[SALIENT] + t * f[SALIENT_STRIDE], f[SALIENT_STRIDE], k,
            left + left_stride * row, left_stride, f[Z] + t * f[Z_STRIDE], f[Z_STRIDE], rank,
            f[BIAS] + size * row if f[BIAS] else 0, shifts + 4 * row if slot >= 0 else 0,
            f[Y] + size * row, f[Y_STRIDE], f[ORDER] + 4 * t, valid,
        )  # fmt: skip


@njit
def _prefetch_group(f, slot, row, count):
    """Ask for the codes of some rows; they arrive while other slots' products run."""
    if slot >= 0:
        row_bytes = 4 * words_per_row(f[IN_FEATURES], read_i32(f[SLOT_BITS] + 4 * slot))
        prefetch(f[CODES] + slot * f[CODES_SLOT] + row * row_bytes, count * row_bytes)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
@versioned
def rows(fields):
    """y for every token, a few weight rows at a time: each weight and code is read from memory once."""
    f = carray(fields, DECODE)
    out_features, together, groups = f[OUT_FEATURES], f[ROWS_TOGETHER], f[GROUP_COUNT]
    acc = f[ACC] + fetch_add(f[SELF] + 8 * THREAD, 1) * f[ACC_STRIDE]
    _spread_all(f)
    if f[MAX_RANK] > 0:
        _project_all(f)
    while True:
        start = fetch_add(f[SELF] + 8 * NEXT, 1) * CHUNK_ROWS
        if start >= out_features:
            return
        end = min(start + CHUNK_ROWS, out_features)
        for row in range(start, end, together):
            last_row = min(row + together, end)
            for g in range(groups):
                _prefetch_group(f, read_i32(f[GROUPS] + 12 * g), row, last_row - row)
            for g in range(groups):
                entry = f[GROUPS] + 12 * g
                slot, t = read_i32(entry), read_i32(entry + 4)
                last = t + read_i32(entry + 8)
                most = 2 if slot >= 0 and read_i32(f[SLOT_GROUP] + 4 * slot) > 0 else 4
                while t < last:
                    count = 1
                    if most == 4 and last - t >= 4:
                        count = 4
                    elif last - t >= 2:
                        count = 2
                    _multiply(f, slot, g, t, count, row, last_row, acc)
                    t += count


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
@versioned
def merge(fields):
    """W + Δ̂ of one slot for `ROW_COUNT` rows from `FIRST_ROW` on, salient channels included."""
    f = carray(fields, MERGE)
    bf16, in_features, slot, k, kind = f[BF16] != 0, f[IN_FEATURES], f[SLOT], f[MAX_SALIENT], f[SALIENT_KIND]
    size = 2 if bf16 else 4
    bits, group_size = read_i32(f[SLOT_BITS] + 4 * slot), read_i32(f[SLOT_GROUP] + 4 * slot)
    span = group_size if group_size > 0 else in_features
    words, groups = words_per_row(in_features, bits), (in_features + span - 1) // span
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
                last = min(first + span, in_features)
                _merge(2 * bits + f[BF16], weight, codes, steps + 4 * g, f[SCALE], merged, first, last)
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
                    code = code_at(codes, channel, bits)
                    step = read_f32(steps + 4 * (channel // span)) * read_f32(f[SCALE] + 4 * channel)
                    value = _read(weight + size * channel, bf16) + (code - (2**bits - 1) / 2) * step + residual
                    _write(merged + size * channel, types.float32(value), bf16)
