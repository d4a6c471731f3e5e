"""The inner loops of the CPU kernels, each for a few weight rows and tokens that stay in registers.

Accumulators are 16 float32 lanes per (token, row), at `acc + 64 * (token * ROWS + row)`; a lane's share of a
sum is arbitrary, and `finish` adds them up. Rows past `valid` repeat the last one and are thrown away later.
All arguments are int64: addresses, strides in bytes, counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .cpu_codes import add_pairs, code_pairs, code_values, values_of_channels, word_of
from .cpu_vector import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    ROWS,
    V16F,
    V16I,
    V32H,
    Emit,
    broadcast,
    chunks,
    constants,
    dot_pairs,
    fma,
    gather_floats,
    lanes_below,
    load,
    load_elements,
    load_masked,
    narrow_bf16,
    round_bf16,
    store,
    store_masked,
    sum_rows,
    widen_bf16,
    widen_f16,
)
from .packing import codes_per_word

Totals = list[list[Any]]
"""Where the sums of each token and row are kept."""


def _rows(builder: ir.IRBuilder, base: Any, stride: Any, valid: Any) -> list[Any]:
    """Addresses of ROWS rows, the last valid one repeated."""
    last = builder.sub(valid, I64(1))
    addresses = []
    for r in range(ROWS):
        within = builder.icmp_signed("<", I64(r), valid)
        addresses.append(builder.add(base, builder.mul(builder.select(within, I64(r), last), stride)))
    return addresses


def _accumulators(builder: ir.IRBuilder, tokens: int) -> Totals:
    slots = [[cgutils.alloca_once(builder, V16F) for _ in range(ROWS)] for _ in range(tokens)]
    for slot in (slot for row in slots for slot in row):
        builder.store(ir.Constant(V16F, None), slot)
    return slots


def _offset(builder: ir.IRBuilder, address: Any, index: Any, scale: int) -> Any:
    return builder.add(address, builder.mul(index, I64(scale)))


def product_tile(tokens: int, bits: int, grouped: bool, bf16: bool) -> Emit:
    """f(weight, weight_stride, valid, x, x_stride, in_features, codes, codes_stride, spread, spread_stride, words,
    steps, steps_stride, word_group, acc): acc = the rows' products with x, deltas of one slot included.

    `bits` 0: the base alone. `spread` is x as `_spread` lays it out for codes. `word_group` int32 `[words]`, padded to
    whole blocks, names each word's step; it is read only where `grouped`. Sums stay in registers from the first
    code to the last weight.
    """

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        weight, weight_stride, valid, x, x_stride, in_features, *delta, acc = args
        totals = _accumulators(builder, tokens)
        if bits:
            _add_codes(builder, totals, valid, delta, bits, grouped, bf16)
        _add_weights(builder, totals, _rows(builder, weight, weight_stride, valid), x, x_stride, in_features, bf16)
        for t in range(tokens):
            for r in range(ROWS):
                store(builder, builder.load(totals[t][r]), builder.add(acc, I64(64 * (t * ROWS + r))), 64)

    return emit


def _add_weights(
    builder: ir.IRBuilder, totals: Totals, rows: list[Any], x: Any, x_stride: Any, in_features: Any, bf16: bool
) -> None:
    width, kind = (32, V32H) if bf16 else (16, V16F)
    size, multiply = 64 // width, dot_pairs if bf16 else _fma_last
    inputs = [builder.add(x, builder.mul(I64(t), x_stride)) for t in range(len(totals))]

    def step(offset: Any, mask: Any) -> None:
        weights = []
        for row in rows:
            address = builder.add(row, offset)
            weights.append(load(builder, address, kind) if mask is None else load_masked(builder, address, kind, mask))
        for given, of_token in zip(inputs, totals, strict=True):
            values = load(builder, builder.add(given, offset), kind)
            for own, total in zip(weights, of_token, strict=True):
                builder.store(multiply(builder, builder.load(total), values, own), total)

    with cgutils.for_range(builder, builder.sdiv(in_features, I64(width))) as loop:
        step(builder.mul(loop.index, I64(64)), None)
    tail = builder.srem(in_features, I64(width))
    with cgutils.if_likely(builder, builder.icmp_signed(">", tail, I64(0))):
        step(builder.mul(builder.sub(in_features, tail), I64(size)), lanes_below(builder, tail, width))


def _add_codes(
    builder: ir.IRBuilder, totals: Totals, valid: Any, args: Sequence[Any], bits: int, grouped: bool, bf16: bool
) -> None:
    """Add step · (code values · x) to totals that are 0."""
    # One block is 16 words: a lane works on one word, so any group of 32 channels or more is whole lanes.
    per_word = codes_per_word(bits)
    block_bytes = LANES * per_word * (2 if bf16 else 4)
    unpack, multiply = (code_pairs, add_pairs) if bf16 else (code_values, _fma_last)
    codes, codes_stride, x, x_stride, words, steps, steps_stride, word_group = args
    rows = _rows(builder, codes, codes_stride, valid)
    row_steps = _rows(builder, steps, steps_stride, valid)
    tokens = range(len(totals))
    inputs = [builder.add(x, builder.mul(I64(t), x_stride)) for t in tokens]

    def block(index: Any, mask: Any) -> None:
        offset = builder.mul(index, I64(4 * LANES))
        packed = []
        for row in rows:
            address = builder.add(row, offset)
            packed.append(load(builder, address, V16I) if mask is None else load_masked(builder, address, V16I, mask))
        before = [[builder.load(total) for total in of_token] for of_token in totals]
        sums = [[ir.Constant(V16F, None)] * ROWS for _ in tokens] if grouped else before
        # All rows meet an input while it is in a register.
        for s in range(per_word // 2 if bf16 else per_word):
            values = [unpack(builder, words_of_row, bits, s) for words_of_row in packed]
            for t in tokens:
                place = builder.add(_offset(builder, inputs[t], index, block_bytes), I64(64 * s))
                given = load(builder, place, V32H if bf16 else V16F, 64)
                sums[t] = [multiply(builder, sums[t][r], given, values[r]) for r in range(ROWS)]
        if grouped:
            of_word = load(builder, builder.add(word_group, offset), V16I)
            every = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)
            for r in range(ROWS):
                scale = gather_floats(builder, row_steps[r], of_word, every if mask is None else mask)
                for t in tokens:
                    sums[t][r] = fma(builder, sums[t][r], scale, before[t][r])
        for t in tokens:
            for r in range(ROWS):
                builder.store(sums[t][r], totals[t][r])

    whole = builder.sdiv(words, I64(LANES))
    with cgutils.for_range(builder, whole) as loop:
        block(loop.index, None)
    tail = builder.srem(words, I64(LANES))
    with cgutils.if_likely(builder, builder.icmp_signed(">", tail, I64(0))):
        block(whole, lanes_below(builder, tail))
    if not grouped:
        for r in range(ROWS):
            step = broadcast(builder, load(builder, row_steps[r], F32))
            for t in tokens:
                builder.store(builder.fmul(step, builder.load(totals[t][r])), totals[t][r])


def _fma_last(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> Any:
    return fma(builder, a, b, total)


def _load_values(builder: ir.IRBuilder, address: Any, mask: Any, dtype: str) -> Any:
    kind = V16F if dtype == "float32" else ir.VectorType(I16, LANES)
    values = load(builder, address, kind) if mask is None else load_masked(builder, address, kind, mask)
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        return widen_bf16(builder, values)
    return widen_f16(builder, values)


def project_tile(tokens: int, values_dtype: str, bf16: bool) -> Emit:
    """f(right, right_stride, valid, x, x_stride, in_features, z, z_stride): z = x·Rᵀ float32 of ROWS rows of R.

    R is of the bank's type, x of the call's, so both are widened: few bytes are read here, whatever they are.
    """
    size = 4 if values_dtype == "float32" else 2

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        right, right_stride, valid, x, x_stride, in_features, z, z_stride = args
        totals = _accumulators(builder, tokens)
        rows = _rows(builder, right, right_stride, valid)

        def chunk(first: Any, mask: Any) -> None:
            values = [_load_values(builder, _offset(builder, row, first, size), mask, values_dtype) for row in rows]
            for t in range(tokens):
                own = builder.add(x, builder.mul(I64(t), x_stride))
                given = load_elements(builder, own, first, mask, bf16)
                for value, total in zip(values, totals[t], strict=True):
                    builder.store(fma(builder, value, given, builder.load(total)), total)

        chunks(builder, in_features, chunk)
        sums = sum_rows(builder, [builder.load(total) for of_token in totals for total in of_token])
        mask = lanes_below(builder, valid, ROWS)
        for t in range(tokens):
            own = builder.shuffle_vector(sums, sums, constants(range(t * ROWS, (t + 1) * ROWS), I32))
            store_masked(builder, own, builder.add(z, builder.mul(I64(t), z_stride)), mask)

    return emit


def finish_tile(tokens: int, values_dtype: str, bf16: bool) -> Emit:
    """f(acc, values, x, x_stride, k, left, left_stride, z, z_stride, rank, bias, bias_delta, y, y_stride, order,
    valid): y of ROWS rows, rounded, stored.

    Adds up the lanes, salient values `[rows, k]` times each token's salient channels float32 `[k]`, L `[rows, rank]`
    times each token's z float32 `[rank]`, and the biases whose address is not 0. Token t is row `order[t]` (int32)
    of y.
    """
    size, lanes = 4 if values_dtype == "float32" else 2, tokens * ROWS

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        acc, values, x, x_stride, k, left, left_stride, z, z_stride, rank, *rest = args
        bias, bias_delta, y, y_stride, order, valid = rest
        totals = [vector for of_token in _accumulators(builder, tokens) for vector in of_token]
        for i, total in enumerate(totals):
            builder.store(load(builder, builder.add(acc, I64(64 * i)), V16F, 64), total)

        # Once for the salient channels and, where the slot has one, once for its low-rank part.
        with cgutils.for_range(builder, builder.select(builder.icmp_signed(">", rank, I64(0)), I64(2), I64(1))) as part:
            second = builder.icmp_signed("==", part.index, I64(1))
            factors, stride, inputs, inputs_stride, width = (
                builder.select(second, low_rank, salient)
                for low_rank, salient in (
                    (left, values),
                    (left_stride, builder.mul(k, I64(size))),
                    (z, x),
                    (z_stride, x_stride),
                    (rank, k),
                )
            )
            rows = _rows(builder, factors, stride, valid)
            with cgutils.for_range(builder, builder.sdiv(builder.add(width, I64(LANES - 1)), I64(LANES))) as loop:
                first = builder.mul(loop.index, I64(LANES))
                mask = lanes_below(builder, builder.sub(width, first))
                own = [_load_values(builder, _offset(builder, row, first, size), mask, values_dtype) for row in rows]
                for t in range(tokens):
                    of_token = builder.add(inputs, builder.mul(I64(t), inputs_stride))
                    given = load_masked(builder, _offset(builder, of_token, first, 4), V16F, mask)
                    for value, total in zip(own, totals[t * ROWS : (t + 1) * ROWS], strict=True):
                        builder.store(fma(builder, value, given, builder.load(total)), total)

        result = cgutils.alloca_once_value(builder, sum_rows(builder, [builder.load(total) for total in totals]))
        mask = lanes_below(builder, valid, ROWS)

        def add(address: Any, halves: bool) -> None:
            with cgutils.if_unlikely(builder, builder.icmp_signed("!=", address, I64(0))):
                term = load_masked(builder, address, ir.VectorType(I16 if halves else F32, ROWS), mask)
                term = widen_bf16(builder, term) if halves else term
                every = constants([lane % ROWS for lane in range(lanes)], I32)
                term = builder.shuffle_vector(term, term, every)
                builder.store(builder.fadd(builder.load(result), term), result)

        add(bias, bf16)
        add(bias_delta, False)
        final = builder.load(result)
        final = round_bf16(builder, final) if bf16 else final
        for t in range(tokens):
            index = builder.sext(load(builder, _offset(builder, order, I64(t), 4), I32), I64)
            own = builder.shuffle_vector(final, final, constants(range(t * ROWS, (t + 1) * ROWS), I32))
            store_masked(builder, own, builder.add(y, builder.mul(index, y_stride)), mask)

    return emit


def merge_tile(bits: int, bf16: bool) -> Emit:
    """f(weight, codes, step, scale, merged, first, last): W + Δ̂ of one row's channels.

    Channels `first` to `last`, `first` a multiple of 32, share the step at address `step`; `scale` float32
    `[in]` padded to 16. Addresses are those of the row's channel 0.
    """
    size = 2 if bf16 else 4
    kind = ir.VectorType(I16, LANES) if bf16 else V16F

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        weight, codes, step, scale, merged, first, last = args
        step_vector = broadcast(builder, load(builder, step, F32))
        last_word = word_of(builder, builder.sub(last, I64(1)), bits)

        def chunk(channel: Any, mask: Any) -> None:
            value = values_of_channels(builder, codes, channel, last_word, bits)
            factor = builder.fmul(step_vector, load(builder, _offset(builder, scale, channel, 4), V16F))
            place = _offset(builder, weight, channel, size)
            base = load(builder, place, kind) if mask is None else load_masked(builder, place, kind, mask)
            total = fma(builder, value, factor, widen_bf16(builder, base) if bf16 else base)
            result = narrow_bf16(builder, total) if bf16 else total
            target = _offset(builder, merged, channel, size)
            if mask is None:
                store(builder, result, target)
            else:
                store_masked(builder, result, target, mask)

        count = builder.sub(last, first)
        whole_chunks = builder.sdiv(count, I64(LANES))
        with cgutils.for_range(builder, whole_chunks) as loop:
            chunk(builder.add(first, builder.mul(loop.index, I64(LANES))), None)
        tail = builder.srem(count, I64(LANES))
        with cgutils.if_likely(builder, builder.icmp_signed(">", tail, I64(0))):
            chunk(builder.sub(last, tail), lanes_below(builder, tail))

    return emit
