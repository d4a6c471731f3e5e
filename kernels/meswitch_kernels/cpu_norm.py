# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Root mean square norms on a CPU, each token with the gain of its own slot, in one pass over memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from torch import Tensor

from . import naive
from .cpu_kernels import versioned
from .cpu_threads import run_task
from .cpu_vector import (
    F32,
    I32,
    V16F,
    Emit,
    broadcast,
    chosen,
    chunks,
    fetch_add,
    float_bits,
    fma,
    load_elements,
    read_i64,
    round_bf16,
    square_root,
    store_elements,
    sum_rows,
    widen_bf16,
)

# Fields of the task; SELF is their own address. Strides are in bytes, EPSILON the bits of a float32.
(
    SELF, NEXT, ROWS, WIDTH, X, X_STRIDE, GAINS, GAINS_STRIDE, GAIN_ROWS, Y, Y_STRIDE, EPSILON, VARIANT, FIELDS,
) = range(14)  # fmt: skip

_UNSET = array("q", bytes(8 * FIELDS))
"""A task's fields, all 0: to copy them takes a third of what making them does."""

ROWS_TOGETHER = 8
"""Rows a thread takes at a time; fewer are not worth a second thread."""


def _row_tile(bf16: bool, bf16_gains: bool) -> Emit:
    """f(x, gains, y, width, epsilon): y = gains · x / rms(x), rounded as `naive.rms_norm` does."""

    def emit(builder: ir.IRBuilder, args: Sequence[Any]) -> None:
        x, gains, y, width, epsilon = args
        squares = cgutils.alloca_once(builder, V16F)
        builder.store(ir.Constant(V16F, None), squares)

        def add(first: Any, mask: Any) -> None:
            values = load_elements(builder, x, first, mask, bf16)
            builder.store(fma(builder, values, values, builder.load(squares)), squares)

        chunks(builder, width, add)
        total = builder.extract_element(sum_rows(builder, [builder.load(squares)]), I32(0))
        mean = builder.fdiv(total, builder.sitofp(width, F32))
        shifted = builder.fadd(mean, builder.bitcast(builder.trunc(epsilon, I32), F32))
        factor = broadcast(builder, builder.fdiv(F32(1.0), square_root(builder, shifted)))

        def scale(first: Any, mask: Any) -> None:
            normed = builder.fmul(load_elements(builder, x, first, mask, bf16), factor)
            if bf16 and bf16_gains:
                normed = widen_bf16(builder, round_bf16(builder, normed))
            result = builder.fmul(normed, load_elements(builder, gains, first, mask, bf16_gains))
            store_elements(builder, result, y, first, mask, bf16)

        chunks(builder, width, scale)

    return emit


_norm_row = chosen(5, {2 * gains + x: _row_tile(bool(x), bool(gains)) for gains in (0, 1) for x in (0, 1)})


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
@versioned
def _norm(fields):
    f = carray(fields, FIELDS)
    while True:
        start = fetch_add(f[SELF] + 8 * NEXT, 1) * ROWS_TOGETHER
        if start >= f[ROWS]:
            return
        for row in range(start, min(start + ROWS_TOGETHER, f[ROWS])):
            gains = f[GAINS] + read_i64(f[GAIN_ROWS] + 8 * row) * f[GAINS_STRIDE]
            _norm_row(f[VARIANT], f[X] + row * f[X_STRIDE], gains, f[Y] + row * f[Y_STRIDE], f[WIDTH], f[EPSILON])


def rms_norm(x: Tensor, epsilon: float, table: Tensor, gain_rows: Tensor) -> Tensor:
    """As `naive.rms_norm`, for float32 and bfloat16."""
    halves = (torch.float32, torch.bfloat16)
    if x.dtype not in halves or table.dtype not in halves:
        return naive.rms_norm(x, epsilon, table, gain_rows)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    y, size = x.new_empty(rows, width), x.element_size()
    fields = _UNSET[:]
    fields[ROWS] = rows
    fields[WIDTH] = width
    fields[X] = x.data_ptr()
    fields[X_STRIDE] = x.stride(0) * size
    fields[GAINS] = table.data_ptr()
    fields[GAINS_STRIDE] = width * table.element_size()
    fields[GAIN_ROWS] = gain_rows.data_ptr()
    fields[Y] = y.data_ptr()
    fields[Y_STRIDE] = width * size
    fields[EPSILON] = float_bits(epsilon)
    fields[VARIANT] = 2 * (table.dtype == torch.bfloat16) + (x.dtype == torch.bfloat16)
    address = fields.buffer_info()[0]
    fields[SELF] = address
    run_task(_norm.address, address, rows // ROWS_TOGETHER // 4)
    return y
