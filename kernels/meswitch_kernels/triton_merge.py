# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Prefill of many tokens of one slot: W + Δ̂ is merged once into scratch memory, then multiplied by cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bank import BankTensors
from .triton_formats import families, family_constants
from .triton_merge_blocks import block_channels, block_words, merge_block, merge_channel
from .triton_messages import FIRST_NUMBER, is_among, row_words
from .triton_siblings import (
    BEFORE,
    BIAS,
    BIAS_DELTA,
    CHANNEL_SCALE,
    CODES,
    CODES_STRIDE,
    FIELDS,
    LEFT,
    MAX_RANK,
    MAX_SALIENT,
    OUT,
    RIGHT,
    SALIENT_INDEX,
    SALIENT_VALUE,
    SLOT_BITS,
    SLOT_GROUP,
    SLOT_RANK,
    STEPS,
    STEPS_STRIDE,
    WEIGHT,
    WEIGHT_STRIDE,
    Operand,
    SiblingTable,
    table_multiple,
    table_pointer,
)
from .triton_tiles import PLANE_WORDS, slot_rows

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
    NUMBERS: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """`merged` `[rows, in]` = W + Δ̂ of a slot's rows from `first_row` to `last_row`, and `shift` `[rows]` its bias.

    A program takes some rows of one block of words. All is rounded to the type of W, once. A slot whose codes have none
    of NUMBERS is another launch's. The shift of an empty slot is NaN, and with it every answer.
    """
    row = first_row + tl.program_id(0) * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < last_row - row
    rows = tl.minimum(rows, last_row - row - 1)
    slot = tl.full((), slot, tl.int32)
    number, group_size, block = tl.load(slot_bits + slot), tl.load(slot_group + slot), tl.program_id(1)
    groups = tl.where(group_size > 0, tl.cdiv(in_features, tl.maximum(group_size, 1)), 1)
    codes += slot_rows(slot, codes_stride, row, row_words(in_features, number))
    steps += slot_rows(slot, steps_stride, row, groups)
    scale = channel_scale + slot.to(tl.int64) * in_features
    weight += row.to(tl.int64) * weight_stride
    target = merged + (row - first_row).to(tl.int64) * in_features
    rank = 0
    if LOW_RANK:
        rank = tl.load(slot_rank + slot)
        left += slot_rows(slot, out_features * max_rank, row, max_rank)
        right += slot.to(tl.int64) * max_rank * in_features
    served = is_among(number, NUMBERS)
    if (block == 0) & (served | (number == 0)):
        own_shift = tl.load(bias_delta + slot_rows(slot, out_features, row, 1) + rows)
        if HAS_BIAS:
            own_shift += tl.load(bias + row + rows).to(tl.float32)
        own_shift = tl.where(number > 0, own_shift, float("nan"))
        tl.store(shift + row - first_row + rows, own_shift.to(shift.dtype.element_ty), mask=row_mask)
    for i in tl.static_range(len(NUMBERS)):
        if (number == NUMBERS[i]) & (block * block_channels(NUMBERS[i]) < in_features):
            # Told to be a multiple of a block's words, so that these are read in wide loads.
            words_of_row = row_words(in_features, NUMBERS[i])
            if EVEN:
                words_of_row = in_features // block_channels(NUMBERS[i]) * block_words(NUMBERS[i])
            if EVEN or (block + 1) * block_channels(NUMBERS[i]) <= in_features:
                merge_block(
                    weight, weight_stride, target, codes, steps, scale, left, right, rows, row_mask, block,
                    words_of_row, in_features, group_size, groups, rank, max_rank,
                    NUMBERS[i], GROUPED, SCALED, LOW_RANK, BLOCK_RANK, True,
                )  # fmt: skip
            else:
                merge_block(
                    weight, weight_stride, target, codes, steps, scale, left, right, rows, row_mask, block,
                    words_of_row, in_features, group_size, groups, rank, max_rank,
                    NUMBERS[i], GROUPED, SCALED, LOW_RANK, BLOCK_RANK, False,
                )  # fmt: skip
    if served:
        tl.debug_barrier()  # salient channels are written again
        channels = PLANE_WORDS * 32 // tl.where(number > FIRST_NUMBER, 1, number)
        index, values = (
            salient_index + slot * max_salient,
            slot_rows(slot, out_features * max_salient, row, max_salient),
        )
        values += rows * max_salient
        previous = -1
        for j in range(0, max_salient):
            channel = tl.load(index + j)
            # Channel 0 also pads the list, with no residual.
            if (channel // channels == block) & (channel != previous):
                residual = tl.zeros((BLOCK_OUT,), dtype=tl.float32)
                for other in range(0, max_salient):
                    if tl.load(index + other) == channel:
                        residual += tl.load(salient_value + values + other).to(tl.float32)
                merge_channel(
                    weight, weight_stride, target, codes, steps, scale, left, right, residual, rows, row_mask, channel,
                    in_features, group_size, groups, rank, max_rank, number, NUMBERS, SCALED, LOW_RANK, BLOCK_RANK,
                )  # fmt: skip
            previous = channel


@triton.jit(do_not_specialize=["slot"])
def merge_siblings(
    linears,
    like,
    merged,
    shift,
    slot,
    in_features,
    NUMBERS: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """`merge_rows` of all rows of each linear of a `SiblingTable`, one after the other."""
    entry = linears + tl.program_id(2) * FIELDS
    out_features, before = table_multiple(entry, OUT), tl.load(entry + BEFORE)
    DTYPE: tl.constexpr = merged.dtype.element_ty
    VALUE: tl.constexpr = like.dtype.element_ty
    if tl.program_id(0) * BLOCK_OUT < out_features:
        merge_rows(
            table_pointer(entry, WEIGHT, DTYPE),
            table_pointer(entry, BIAS, DTYPE),
            merged + before * in_features,
            shift + before,
            table_pointer(entry, CODES, tl.int32),
            table_pointer(entry, STEPS, tl.float32),
            table_pointer(entry, CHANNEL_SCALE, tl.float16),
            table_pointer(entry, BIAS_DELTA, tl.float32),
            table_pointer(entry, SALIENT_INDEX, tl.int32),
            table_pointer(entry, SALIENT_VALUE, VALUE),
            table_pointer(entry, LEFT, VALUE),
            table_pointer(entry, RIGHT, VALUE),
            table_pointer(entry, SLOT_BITS, tl.int32),
            table_pointer(entry, SLOT_GROUP, tl.int32),
            table_pointer(entry, SLOT_RANK, tl.int32),
            slot,
            0,
            out_features,
            in_features,
            out_features,
            table_multiple(entry, WEIGHT_STRIDE),
            table_multiple(entry, CODES_STRIDE),
            table_multiple(entry, STEPS_STRIDE),
            tl.load(entry + MAX_SALIENT).to(tl.int32),
            table_multiple(entry, MAX_RANK),
            NUMBERS,
            GROUPED,
            SCALED,
            EVEN,
            HAS_BIAS,
            LOW_RANK,
            BLOCK_OUT,
            BLOCK_RANK,
        )


def merge_launch(dtype: torch.dtype, max_rank: int) -> dict[str, int]:
    """Rows of a program and its blocks; not measured on a card yet. Without directions 4 warps spill on sm_90."""
    return {
        "BLOCK_OUT": 16 if dtype == torch.float32 else 32,
        "BLOCK_RANK": 16 if max_rank <= 16 else 32,
        "num_warps": 4 if max_rank else 8,
    }


def merged_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, bank: BankTensors, slot: int) -> None:
    """y `[tokens, out]` = x·(W + Δ̂)ᵀ + biases for tokens of one slot; of the base, slot -1, x·Wᵀ + bias."""
    if slot < 0:
        _multiply(y, x, weight, bias)
        return
    out_features, in_features = weight.shape
    launch = merge_launch(x.dtype, bank.left.shape[2])
    most = min(out_features, max(launch["BLOCK_OUT"], MERGE_BYTES // (in_features * x.element_size())))
    merged, shift = x.new_empty(most, in_features), x.new_empty(most)
    for first in range(0, out_features, most):
        last = min(first + most, out_features)
        for family in families(bank.formats):
            merge_rows[(triton.cdiv(last - first, launch["BLOCK_OUT"]), _blocks(in_features, family))](
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
                SCALED=bank.scaled,
                HAS_BIAS=bias is not None,
                LOW_RANK=bank.left.shape[2] > 0,
                **family_constants(family, in_features, grouped=bank.group_size > 0),
                **launch,
            )
        _multiply(y[:, first:last], x, merged[: last - first], shift[: last - first])


def merged_linears(
    ys: Sequence[Tensor], x: Tensor, operands: Sequence[Operand], siblings: SiblingTable, slot: int
) -> None:
    """`merged_linear` of several linears of one x, their weights merged in one launch."""
    in_features, launch = x.shape[1], merge_launch(x.dtype, siblings.most_rank)
    merged, shift = x.new_empty(siblings.total, in_features), x.new_empty(siblings.total)
    row_blocks = triton.cdiv(max(siblings.outs), launch["BLOCK_OUT"])
    for family in families(siblings.formats):
        merge_siblings[(row_blocks, _blocks(in_features, family), len(siblings.outs))](
            siblings.table,
            operands[0][2].left,
            merged,
            shift,
            slot,
            in_features,
            SCALED=siblings.scaled,
            HAS_BIAS=operands[0][1] is not None,
            LOW_RANK=siblings.most_rank > 0,
            **family_constants(family, in_features, grouped=siblings.grouped),
            **launch,
        )
    for y, weight, bias in zip(ys, merged.split(siblings.outs), shift.split(siblings.outs), strict=True):
        _multiply(y, x, weight, bias)


def _blocks(in_features: int, family: Sequence[int]) -> int:
    """As many as the widest codes need; those of fewer bits have fewer blocks, and programs to spare."""
    return int(triton.cdiv(in_features, block_channels(family[0])))


def merged_at_once(siblings: SiblingTable, x: Tensor) -> bool:
    """Whether the weights of several linears may lie merged side by side."""
    return siblings.total * x.shape[1] * x.element_size() <= 2 * MERGE_BYTES


def _multiply(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x·Wᵀ + bias, into memory that is there."""
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)
