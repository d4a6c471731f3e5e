# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Prefill of many tokens of one slot: W + Δ̂ is merged once into scratch memory, then multiplied by cuBLAS."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bank import BankTensors
from .packing import widths_in
from .triton_tiles import code_values, load_codes, load_steps, slot_rows, words_per_row

MERGE_BYTES = 128 << 20
"""Merged weights held at once: the largest weight of a 7B model but for the head's, which comes in blocks of rows."""


@triton.jit(do_not_specialize=["slot", "first_row", "last_row"])
def merge_rows(
    weight,
    bias,
    merged,
    shift,
    codes,
    steps,
    channel_scale,
    bias_delta,
    salient_index,
    salient_value,
    left,
    right,
    slot_bits,
    slot_group,
    slot_rank,
    slot,
    first_row,
    last_row,
    in_features,
    out_features,
    weight_stride,
    codes_stride,
    steps_stride,
    max_salient,
    max_rank,
    WIDTHS: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """`merged` `[rows, in]` = W + Δ̂ of a slot's rows from `first_row` to `last_row`, and `shift` `[rows]` its bias.

    Both are rounded to the type of W, once. Those of an empty slot are NaN.
    """
    row = first_row + tl.program_id(0) * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < last_row - row
    rows = tl.minimum(rows, last_row - row - 1)
    slot = tl.full((), slot, tl.int32)
    bits, group_size = tl.load(slot_bits + slot), tl.load(slot_group + slot)
    codes += slot_rows(slot, codes_stride, row, words_per_row(in_features, bits))
    groups = tl.where(group_size > 0, tl.cdiv(in_features, tl.maximum(group_size, 1)), 1)
    steps += slot_rows(slot, steps_stride, row, groups)
    weight += row.to(tl.int64) * weight_stride
    target = merged + (row - first_row).to(tl.int64) * in_features
    row_step = tl.zeros((BLOCK_OUT,), dtype=tl.float32)
    if not GROUPED:
        row_step = tl.load(steps + rows)
    begin = tl.program_id(1) * CHUNK
    for k_start in range(begin, tl.minimum(begin + CHUNK, in_features), BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = k < in_features
        value = tl.full((BLOCK_OUT, BLOCK_K), float("nan"), dtype=tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            if bits == WIDTHS[i]:
                value = code_values(load_codes(codes, rows, k_start, in_features, WIDTHS[i], BLOCK_K, EVEN), WIDTHS[i])
        if GROUPED:
            value *= load_steps(steps, rows, k_start, group_size, in_features, BLOCK_K)
        else:
            value *= row_step[:, None]
        if SCALED:
            value *= tl.load(channel_scale + slot * in_features + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        for j in range(0, max_salient):
            channel = tl.load(salient_index + slot * max_salient + j)
            if (channel >= k_start) & (channel < k_start + BLOCK_K):
                own = salient_value + slot_rows(slot, out_features * max_salient, row, max_salient) + j
                residual = tl.load(own + rows * max_salient).to(tl.float32)
                value += tl.where((k == channel)[None, :], residual[:, None], 0.0)
        if LOW_RANK:
            rank = tl.load(slot_rank + slot)
            for start in tl.range(0, rank, BLOCK_RANK, num_stages=1):
                r = start + tl.arange(0, BLOCK_RANK)
                place = left + slot_rows(slot, out_features * max_rank, row, max_rank)
                of_row = tl.load(place + rows[:, None] * max_rank + r[None, :], mask=(r < rank)[None, :], other=0.0)
                place = right + slot.to(tl.int64) * max_rank * in_features
                present = (r < rank)[:, None] & inside[None, :]
                of_channel = tl.load(place + r[:, None] * in_features + k[None, :], mask=present, other=0.0)
                value = tl.dot(
                    of_row.to(merged.dtype.element_ty),
                    of_channel.to(merged.dtype.element_ty),
                    value,
                    input_precision="ieee",
                )
        given = inside[None, :] & row_mask[:, None]
        value += tl.load(weight + rows[:, None] * weight_stride + k[None, :], mask=given, other=0.0).to(tl.float32)
        tl.store(target + rows[:, None] * in_features + k[None, :], value.to(merged.dtype.element_ty), mask=given)
    if begin == 0:
        own_shift = tl.load(bias_delta + slot_rows(slot, out_features, row, 1) + rows)
        if HAS_BIAS:
            own_shift += tl.load(bias + row + rows).to(tl.float32)
        tl.store(shift + row - first_row + rows, own_shift.to(shift.dtype.element_ty), mask=row_mask)


def merge_launch(dtype: torch.dtype, max_rank: int) -> dict[str, int]:
    """Rows and channels of a tile, channels of a program; not measured on a card yet."""
    return {
        "BLOCK_OUT": 16 if dtype == torch.float32 else 32,
        "BLOCK_K": 64,
        "CHUNK": 256,
        "BLOCK_RANK": 16 if max_rank <= 16 else 32,
        "num_warps": 4,
    }


def merged_linear(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, bank: BankTensors, slot: int, even: bool
) -> None:
    """y `[tokens, out]` = x·(W + Δ̂)ᵀ + biases for tokens of one slot; of the base, slot -1, x·Wᵀ + bias.

    `even` says that rows of codes end with a whole block of planes.
    """
    if slot < 0:
        _multiply(y, x, weight, bias)
        return
    out_features, in_features = weight.shape
    launch = merge_launch(x.dtype, bank.left.shape[2])
    most = min(out_features, max(launch["BLOCK_OUT"], MERGE_BYTES // (in_features * x.element_size())))
    merged, shift = x.new_empty(most, in_features), x.new_empty(most)
    for first in range(0, out_features, most):
        last = min(first + most, out_features)
        grid = (triton.cdiv(last - first, launch["BLOCK_OUT"]), triton.cdiv(in_features, launch["CHUNK"]))
        merge_rows[grid](
            weight,
            weight if bias is None else bias,
            merged,
            shift,
            bank.codes,
            bank.steps,
            bank.channel_scale,
            bank.bias_delta,
            bank.salient_index,
            bank.salient_value,
            bank.left,
            bank.right,
            bank.slot_bits,
            bank.slot_group,
            bank.slot_rank,
            slot,
            first,
            last,
            in_features,
            out_features,
            weight.stride(0),
            bank.codes.stride(0),
            bank.steps.stride(0),
            bank.salient_index.shape[1],
            bank.left.shape[2],
            WIDTHS=widths_in(bank.bits),
            GROUPED=bank.group_size > 0,
            SCALED=bank.scaled,
            EVEN=even,
            HAS_BIAS=bias is not None,
            LOW_RANK=bank.left.shape[2] > 0,
            **launch,
        )
        _multiply(y[:, first:last], x, merged[: last - first], shift[: last - first])


def _multiply(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x·Wᵀ + bias, into memory that is there."""
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)
