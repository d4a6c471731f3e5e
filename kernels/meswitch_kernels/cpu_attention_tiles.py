# mypy: disable-error-code="no-untyped-call"
"""The inner loops of decode attention: sixteen keys of one head against one query, in float32.

All arguments are int64: addresses, counts, and the bits of float32 numbers. `places` int64 `[16]` are the keys'
offsets in a cache, in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .cpu_vector import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    V16F,
    V16I,
    broadcast,
    constants,
    emitted,
    fma,
    lanes_below,
    load,
    load_masked,
    round_bf16,
    splat,
    store,
    store_masked,
    sum_rows,
    widen_bf16,
)

_ZERO = ir.Constant(V16F, None)


def score_tile(bf16: bool) -> Any:
    """f(query, places, cache, width, cap, valid, scores): the products of 16 keys and a query.

    With a cap other than 0 they are squashed to it. Those from `valid` on are -inf.
    """

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        query, places, cache, width, cap, valid, scores = args
        keys = _keys(builder, places, cache)
        sums = [cgutils.alloca_once_value(builder, _ZERO) for _ in keys]

        def chunk(first: Any, mask: Any) -> None:
            given = load(builder, builder.add(query, builder.mul(first, I64(4))), V16F)
            for key, total in zip(keys, sums, strict=True):
                values = _elements(builder, key, first, mask, bf16)
                builder.store(fma(builder, given, values, builder.load(total)), total)

        _chunks(builder, width, chunk)
        result = cgutils.alloca_once_value(builder, sum_rows(builder, [builder.load(total) for total in sums]))
        with cgutils.if_unlikely(builder, builder.icmp_signed("!=", cap, I64(0))):
            limit = _broadcast_bits(builder, cap)
            builder.store(builder.fmul(limit, _tanh(builder, builder.fdiv(builder.load(result), limit))), result)
        nothing = splat(-math.inf, F32)
        store(builder, builder.select(lanes_below(builder, valid), builder.load(result), nothing), scores)

    return emitted(7, emit)


def softmax_tile() -> Any:
    """f(scores, blocks): replace `blocks` times 16 scores by exp(score - largest); return 1 / their sum."""

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> Any:
        scores, blocks = args
        largest = cgutils.alloca_once_value(builder, splat(-math.inf, F32))
        total = cgutils.alloca_once_value(builder, _ZERO)
        with cgutils.for_range(builder, blocks) as loop:
            values = load(builder, builder.add(scores, builder.mul(loop.index, I64(4 * LANES))), V16F)
            builder.store(_larger(builder, values, builder.load(largest)), largest)
        top, run = builder.load(largest), LANES // 2
        while run:
            turned = constants([(lane + run) % LANES for lane in range(LANES)], I32)
            top, run = _larger(builder, builder.shuffle_vector(top, top, turned), top), run // 2
        with cgutils.for_range(builder, blocks) as loop:
            address = builder.add(scores, builder.mul(loop.index, I64(4 * LANES)))
            weights = _exp(builder, builder.fsub(load(builder, address, V16F), top))
            store(builder, weights, address)
            builder.store(builder.fadd(builder.load(total), weights), total)
        whole = builder.extract_element(sum_rows(builder, [builder.load(total)]), I32(0))
        return builder.fdiv(F32(1.0), whole)

    return emitted(2, emit, types.float32)


def mix_tile(bf16: bool) -> Any:
    """f(total, weights, places, cache, width): total += the 16 values times their weights."""

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        total, weights, places, cache, width = args
        values = _keys(builder, places, cache)
        factors = [broadcast(builder, load(builder, builder.add(weights, I64(4 * lane)), F32)) for lane in range(LANES)]

        def chunk(first: Any, mask: Any) -> None:
            address = builder.add(total, builder.mul(first, I64(4)))
            mixed = load(builder, address, V16F)
            for value, factor in zip(values, factors, strict=True):
                mixed = fma(builder, factor, _elements(builder, value, first, mask, bf16), mixed)
            store(builder, mixed, address)

        _chunks(builder, width, chunk)

    return emitted(5, emit)


def store_tile(bf16: bool) -> Any:
    """f(target, total, factor, width): target = factor * total, rounded."""

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        target, total, factor, width = args
        scale = _broadcast_bits(builder, factor)

        def chunk(first: Any, mask: Any) -> None:
            result = builder.fmul(scale, load(builder, builder.add(total, builder.mul(first, I64(4))), V16F))
            stored = round_bf16(builder, result) if bf16 else result
            address = builder.add(target, builder.mul(first, I64(2 if bf16 else 4)))
            if mask is None:
                store(builder, stored, address)
            else:
                store_masked(builder, stored, address, mask)

        _chunks(builder, width, chunk)

    return emitted(4, emit)


def _keys(builder: ir.IRBuilder, places: Any, cache: Any) -> list[Any]:
    return [builder.add(cache, load(builder, builder.add(places, I64(8 * lane)), I64)) for lane in range(LANES)]


def _chunks(builder: ir.IRBuilder, width: Any, chunk: Callable[[Any, Any], None]) -> None:
    """Call `chunk(first, mask)` for every 16 of `width` elements; the mask is None but for the last few."""
    with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as loop:
        chunk(builder.mul(loop.index, I64(LANES)), None)
    tail = builder.srem(width, I64(LANES))
    with cgutils.if_unlikely(builder, builder.icmp_signed(">", tail, I64(0))):
        chunk(builder.sub(width, tail), lanes_below(builder, tail))


def _elements(builder: ir.IRBuilder, row: Any, first: Any, mask: Any, bf16: bool) -> Any:
    """16 elements of a row in memory from element `first` on, as float32."""
    kind = ir.VectorType(I16, LANES) if bf16 else V16F
    address = builder.add(row, builder.mul(first, I64(2 if bf16 else 4)))
    values = load(builder, address, kind) if mask is None else load_masked(builder, address, kind, mask)
    return widen_bf16(builder, values) if bf16 else values


def _broadcast_bits(builder: ir.IRBuilder, bits: Any) -> Any:
    return broadcast(builder, builder.bitcast(builder.trunc(bits, I32), F32))


def _larger(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _exp(builder: ir.IRBuilder, x: Any) -> Any:
    """exp of up to 88, to two units in the last place; 0 below -87 (Cephes' expf)."""
    lowest, highest = splat(-87.0, F32), splat(88.0, F32)
    inside = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    inside = builder.select(builder.fcmp_ordered(">", inside, highest), highest, inside)
    # Adding 1.5 * 2^23 rounds to an integer.
    shift = splat(12582912.0, F32)
    power = builder.fsub(fma(builder, inside, splat(1.44269504088896341, F32), shift), shift)
    rest = fma(builder, power, splat(-0.693359375, F32), inside)
    rest = fma(builder, power, splat(2.12194440e-4, F32), rest)
    series = splat(1.9875691500e-4, F32)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = fma(builder, series, rest, splat(term, F32))
    series = fma(builder, builder.fmul(series, rest), rest, builder.fadd(rest, splat(1.0, F32)))
    exponent = builder.shl(builder.add(builder.fptosi(power, V16I), splat(127, I32)), splat(23, I32))
    result = builder.fmul(series, builder.bitcast(exponent, V16F))
    return builder.select(builder.fcmp_ordered("<", x, lowest), _ZERO, result)


def _tanh(builder: ir.IRBuilder, x: Any) -> Any:
    """1 - 2 / (exp(2x) + 1), whose error is absolute: a few units in the last place of 1."""
    one, two = splat(1.0, F32), splat(2.0, F32)
    doubled = _exp(builder, builder.fmul(two, x))
    return builder.fsub(one, builder.fdiv(two, builder.fadd(doubled, one)))
