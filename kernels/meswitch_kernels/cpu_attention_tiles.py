# mypy: disable-error-code="no-untyped-call"
"""The inner loops of decode attention: sixteen keys of one head against one query, in float32.

All arguments are int64: addresses, counts, and the bits of float32 numbers. `places` int64 `[16]` are the keys'
offsets in a cache, in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .cpu_vector import (
    F32,
    I32,
    I64,
    LANES,
    V16F,
    V16I,
    broadcast,
    chunks,
    constants,
    emitted,
    fma,
    lanes_below,
    load,
    load_elements,
    splat,
    store,
    store_elements,
    sum_rows,
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
                values = load_elements(builder, key, first, mask, bf16)
                builder.store(fma(builder, given, values, builder.load(total)), total)

        chunks(builder, width, chunk)
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
                mixed = fma(builder, factor, load_elements(builder, value, first, mask, bf16), mixed)
            store(builder, mixed, address)

        chunks(builder, width, chunk)

    return emitted(5, emit)


def store_tile(bf16: bool) -> Any:
    """f(target, total, factor, width): target = factor * total, rounded."""

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        target, total, factor, width = args
        scale = _broadcast_bits(builder, factor)

        def chunk(first: Any, mask: Any) -> None:
            result = builder.fmul(scale, load_elements(builder, total, first, None, False))
            store_elements(builder, result, target, first, mask, bf16)

        chunks(builder, width, chunk)

    return emitted(4, emit)


def _keys(builder: ir.IRBuilder, places: Any, cache: Any) -> list[Any]:
    return [builder.add(cache, load(builder, builder.add(places, I64(8 * lane)), I64)) for lane in range(LANES)]


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
