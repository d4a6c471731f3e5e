# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Decode attention on a CPU: one task for all requests of a step, which reads the cache where it lies.

A unit of work is one request and one key head. Its queries share that head, and sixteen keys are worked on at once.
"""

from __future__ import annotations

from array import array

import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from . import naive
from .cpu_attention_tiles import mix_tile, score_tile, softmax_tile, store_tile
from .cpu_kernels import versioned
from .cpu_threads import run_task
from .cpu_vector import (
    LANES,
    bits_of,
    copy,
    fetch_add,
    float_bits,
    prefetch,
    read_bf16,
    read_f32,
    read_i32,
    read_i64,
    write_i32,
    write_i64,
)
from .scratch import scratch

# Fields of the task; SELF is their own address. Strides are in bytes, SCALE and CAP the bits of a float32.
(
    SELF, NEXT, THREAD, BF16, REQUESTS, KEY_HEADS, SHARED, WIDTH,
    QUERY, QUERY_HEAD, QUERY_TOKEN, KEY, KEY_HEAD, KEY_TOKEN, VALUE, VALUE_HEAD, VALUE_TOKEN,
    KEY_CACHE, VALUE_CACHE, CACHE_ROW, CACHE_HEAD, ROWS, ENDS, WRITES, OUT, OUT_HEAD, OUT_TOKEN,
    SCALE, CAP, SCRATCH, SCRATCH_STRIDE, PADDED, BLOCKS, FIELDS,
) = range(34)  # fmt: skip

_UNSET = array("q", bytes(8 * FIELDS))
"""A task's fields, all 0: to copy them takes a third of what making them does."""

_score_bf16, _score_f32 = score_tile(True), score_tile(False)
_mix_bf16, _mix_f32 = mix_tile(True), mix_tile(False)
_store_bf16, _store_f32 = store_tile(True), store_tile(False)
_softmax = softmax_tile()


@njit
def _load_queries(f, r, h, target):
    """The queries of a unit, times the scale, as float32 rows padded to 16; the sums behind them, set to 0."""
    bf16, width, padded, scale = f[BF16] != 0, f[WIDTH], f[PADDED], read_f32(f[SELF] + 8 * SCALE)
    for g in range(f[SHARED]):
        source = f[QUERY] + r * f[QUERY_TOKEN] + (h * f[SHARED] + g) * f[QUERY_HEAD]
        query, total = target + 4 * g * padded, target + 4 * (f[SHARED] + g) * padded
        for i in range(padded):
            value = types.float32(0)
            if i < width:
                value = read_bf16(source + 2 * i) if bf16 else read_f32(source + 4 * i)
            write_i32(query + 4 * i, bits_of(types.float32(value * scale)))
            write_i32(total + 4 * i, 0)


@njit
def _place_rows(f, r, h, own, length, places):
    """Where the head's part of each key lies in the cache; the last, repeated to whole blocks, is the request's own.

    A sliding window's rows name it only by a sentinel.
    """
    first = read_i32(f[ENDS] + 4 * r)
    for j in range((length + LANES - 1) // LANES * LANES):
        row = read_i64(f[ROWS] + 8 * (first + j)) if j < length - 1 else own
        write_i64(places + 8 * j, row * f[CACHE_ROW] + h * f[CACHE_HEAD])


@njit
def _prefetch_rows(cache, places, size):
    """Ask for sixteen rows, which lie apart."""
    for lane in range(LANES):
        prefetch(cache + read_i64(places + 8 * lane), size)


@njit
def _attend(f, r, h, memory):
    """One request's queries of one key head; its own key and value go into the cache first."""
    bf16, shared, padded, width = f[BF16] != 0, f[SHARED], f[PADDED], f[WIDTH]
    length = read_i32(f[ENDS] + 4 * (r + 1)) - read_i32(f[ENDS] + 4 * r)
    own = read_i64(f[WRITES] + 8 * r)
    queries, totals = memory, memory + 4 * shared * padded
    places = totals + 4 * shared * padded
    scores, scores_stride = places + 8 * LANES * f[BLOCKS], 4 * LANES * f[BLOCKS]
    _load_queries(f, r, h, queries)
    _place_rows(f, r, h, own, length, places)
    place, size = own * f[CACHE_ROW] + h * f[CACHE_HEAD], width * (2 if bf16 else 4)
    copy(f[KEY] + r * f[KEY_TOKEN] + h * f[KEY_HEAD], f[KEY_CACHE] + place, size)
    copy(f[VALUE] + r * f[VALUE_TOKEN] + h * f[VALUE_HEAD], f[VALUE_CACHE] + place, size)
    blocks = (length + LANES - 1) // LANES
    for b in range(blocks):
        if b + 1 < blocks:
            _prefetch_rows(f[KEY_CACHE], places + 8 * LANES * (b + 1), size)
        _prefetch_rows(f[VALUE_CACHE], places + 8 * LANES * b, size)
        for g in range(shared):
            query, target = queries + 4 * g * padded, scores + g * scores_stride + 4 * LANES * b
            if bf16:
                _score_bf16(query, places + 8 * LANES * b, f[KEY_CACHE], width, f[CAP], length - LANES * b, target)
            else:
                _score_f32(query, places + 8 * LANES * b, f[KEY_CACHE], width, f[CAP], length - LANES * b, target)
    for g in range(shared):
        share = bits_of(_softmax(scores + g * scores_stride, blocks))
        total = totals + 4 * g * padded
        for b in range(blocks):
            weights = scores + g * scores_stride + 4 * LANES * b
            if bf16:
                _mix_bf16(total, weights, places + 8 * LANES * b, f[VALUE_CACHE], width)
            else:
                _mix_f32(total, weights, places + 8 * LANES * b, f[VALUE_CACHE], width)
        target = f[OUT] + r * f[OUT_TOKEN] + (h * shared + g) * f[OUT_HEAD]
        if bf16:
            _store_bf16(target, total, share, width)
        else:
            _store_f32(target, total, share, width)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
@versioned
def _attend_all(fields):
    f = carray(fields, FIELDS)
    memory = f[SCRATCH] + fetch_add(f[SELF] + 8 * THREAD, 1) * f[SCRATCH_STRIDE]
    while True:
        unit = fetch_add(f[SELF] + 8 * NEXT, 1)
        if unit >= f[REQUESTS] * f[KEY_HEADS]:
            return
        _attend(f, unit // f[KEY_HEADS], unit % f[KEY_HEADS], memory)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Tensor,
    ends: Tensor,
    writes: Tensor,
    longest: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """As `naive.decode_attention`, for float32 and bfloat16."""
    if query.dtype not in (torch.float32, torch.bfloat16):
        return naive.decode_attention(
            query, key, value, key_cache, value_cache, rows, ends, writes, longest, scale, softcap
        )
    query, key, value = (item if item.stride(2) == 1 else item.contiguous() for item in (query, key, value))
    heads, requests, width = query.shape
    key_heads, size, threads = key.shape[0], query.element_size(), torch.get_num_threads()
    shared, padded = heads // key_heads, -(-width // LANES) * LANES
    out = query.new_empty(requests, heads, width)
    blocks = -(-longest // LANES)
    memory = (4 * shared * (2 * padded + LANES * blocks) + 8 * LANES * blocks + 63) // 64 * 64
    fields = _UNSET[:]
    fields[BF16] = query.dtype == torch.bfloat16
    fields[REQUESTS] = requests
    fields[KEY_HEADS] = key_heads
    fields[SHARED] = shared
    fields[WIDTH] = width
    fields[QUERY] = query.data_ptr()
    fields[QUERY_HEAD] = query.stride(0) * size
    fields[QUERY_TOKEN] = query.stride(1) * size
    fields[KEY] = key.data_ptr()
    fields[KEY_HEAD] = key.stride(0) * size
    fields[KEY_TOKEN] = key.stride(1) * size
    fields[VALUE] = value.data_ptr()
    fields[VALUE_HEAD] = value.stride(0) * size
    fields[VALUE_TOKEN] = value.stride(1) * size
    fields[KEY_CACHE] = key_cache.data_ptr()
    fields[VALUE_CACHE] = value_cache.data_ptr()
    fields[CACHE_ROW] = key_cache.stride(0) * size
    fields[CACHE_HEAD] = key_cache.stride(1) * size
    fields[ROWS] = rows.data_ptr()
    fields[ENDS] = ends.data_ptr()
    fields[WRITES] = writes.data_ptr()
    fields[OUT] = out.data_ptr()
    fields[OUT_HEAD] = width * size
    fields[OUT_TOKEN] = heads * width * size
    fields[SCALE] = float_bits(scale)
    fields[CAP] = float_bits(softcap or 0.0)
    fields[SCRATCH] = scratch.take(memory * threads)
    fields[SCRATCH_STRIDE] = memory
    fields[PADDED] = padded
    fields[BLOCKS] = blocks
    address = fields.buffer_info()[0]
    fields[SELF] = address
    run_task(_attend_all.address, address, requests * key_heads)
    return out
