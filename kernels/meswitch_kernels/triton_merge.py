# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Prefill of many tokens of one slot: W + Δ̂ is merged once into scratch memory, then multiplied by cuBLAS."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bank import BankTensors
from .packing import codes_per_word, widths_in
from .triton_tiles import PLANE_WORDS, codes_at, slot_rows, words_per_row

MERGE_BYTES = 128 << 20
"""Merged weights held at once: the largest weight of a 7B model but for the head's, which comes in blocks of rows."""


@triton.jit
def _plane_codes(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """`[rows, 2n]` float32 of a plane of words `[rows, n]`: codes less their middle, and what to multiply them by.

    A code is set into the mantissa of 2^23 where it lies, and taken out again with its middle: exactly, since it does
    not lie in the last place.
    """
    UP: tl.constexpr = 1 if PLANE == 0 else 0
    PLACE: tl.constexpr = PLANE * BITS + UP
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    both = tl.reshape(tl.join(words << UP, (words >> 16) << UP), (words.shape[0], 2 * words.shape[1]))
    value = ((both & MASK) | 0x4B000000).to(tl.float32, bitcast=True)
    return value - (8388608.0 + ((1 << BITS) - 1) / 2 * (1 << PLACE)), 0.5**PLACE


@triton.jit
def _low_rank_tile(
    left, right, rows, k, inside, rank, max_rank, in_features, DTYPE: tl.constexpr, BLOCK_RANK: tl.constexpr
):
    """`[rows, k]` of L·R."""
    value = tl.zeros((rows.shape[0], k.shape[0]), dtype=tl.float32)
    for start in tl.range(0, rank, BLOCK_RANK, num_stages=1):
        r = start + tl.arange(0, BLOCK_RANK)
        of_row = tl.load(left + (rows[:, None] * max_rank + r[None, :]), mask=(r < rank)[None, :], other=0.0)
        present = (r < rank)[:, None] & inside[None, :]
        of_channel = tl.load(right + (r[:, None] * in_features + k[None, :]), mask=present, other=0.0)
        value = tl.dot(of_row.to(DTYPE), of_channel.to(DTYPE), value, input_precision="ieee")
    return value


@triton.jit
def _merge_block(
    weight,
    weight_stride,
    target,
    codes,
    steps,
    scale,
    left,
    right,
    rows,
    row_mask,
    block,
    words_of_row,
    in_features,
    group_size,
    groups,
    rank,
    max_rank,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W plus codes and L·R of the channels of one block of words; WHOLE where the row has all of its channels."""
    CHANNELS: tl.constexpr = PLANE_WORDS * 32 // BITS
    DTYPE: tl.constexpr = target.dtype.element_ty
    word, channel = tl.arange(0, PLANE_WORDS), tl.arange(0, 2 * PLANE_WORDS)
    place = codes + (rows[:, None] * words_of_row + (block * PLANE_WORDS + word)[None, :])
    pairs = PLANE_WORDS
    if WHOLE:
        words = tl.load(place)
    else:
        pairs = words_of_row - block * PLANE_WORDS
        words = tl.load(place, mask=(word < pairs)[None, :], other=0)
    if not GROUPED:
        row_step = tl.load(steps + rows)
    for plane in tl.static_range(16 // BITS):
        k = block * CHANNELS + plane * 2 * pairs + channel
        given = row_mask[:, None]
        inside = channel < 2 * pairs
        if not WHOLE:
            inside = inside & (k < in_features)
            given = given & inside[None, :]
        value, place = _plane_codes(words, plane, BITS)
        if GROUPED:
            part = rows[:, None] * groups + (k // tl.where(group_size > 0, group_size, in_features))[None, :]
            value *= tl.load(steps + part, mask=given, other=0.0) * place
        else:
            value *= (row_step * place)[:, None]
        if SCALED:
            value *= tl.load(scale + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        if LOW_RANK:
            value += _low_rank_tile(left, right, rows, k, inside, rank, max_rank, in_features, DTYPE, BLOCK_RANK)
        base = tl.load(weight + (rows[:, None] * weight_stride + k[None, :]), mask=given, other=0.0)
        value += base.to(tl.float32)
        tl.store(target + (rows[:, None] * in_features + k[None, :]), value.to(DTYPE), mask=given)


@triton.jit
def _merge_channel(
    weight,
    weight_stride,
    target,
    codes,
    steps,
    scale,
    left,
    right,
    residual,
    rows,
    row_mask,
    channel,
    in_features,
    group_size,
    groups,
    rank,
    max_rank,
    bits,
    SCALED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """As `_merge_block`, of one salient channel alone, with its residual."""
    k = tl.zeros_like(rows) + channel
    packed = codes_at(codes + rows * words_per_row(in_features, bits), k, row_mask, in_features, bits)
    value = packed.to(tl.float32) - ((1 << bits) - 1).to(tl.float32) * 0.5
    value *= tl.load(steps + (rows * groups + channel // tl.where(group_size > 0, group_size, in_features)))
    if SCALED:
        value *= tl.load(scale + channel).to(tl.float32)
    value += residual
    if LOW_RANK:
        for start in tl.range(0, rank, BLOCK_RANK, num_stages=1):
            r = start + tl.arange(0, BLOCK_RANK)
            of_row = tl.load(left + (rows[:, None] * max_rank + r[None, :]), mask=(r < rank)[None, :], other=0.0)
            of_channel = tl.load(right + (r * in_features + channel), mask=r < rank, other=0.0)
            value += tl.sum(of_row.to(tl.float32) * of_channel.to(tl.float32)[None, :], 1)
    value += tl.load(weight + (rows * weight_stride + channel)).to(tl.float32)
    tl.store(target + (rows * in_features + channel), value.to(target.dtype.element_ty), mask=row_mask)


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
    BLOCK_RANK: tl.constexpr,
):
    """`merged` `[rows, in]` = W + Δ̂ of a slot's rows from `first_row` to `last_row`, and `shift` `[rows]` its bias.

    A program takes some rows of one block of words. All is rounded to the type of W, once. The shift of an empty slot
    is NaN, and with it every answer.
    """
    row = first_row + tl.program_id(0) * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < last_row - row
    rows = tl.minimum(rows, last_row - row - 1)
    slot = tl.full((), slot, tl.int32)
    bits, group_size, block = tl.load(slot_bits + slot), tl.load(slot_group + slot), tl.program_id(1)
    groups = tl.where(group_size > 0, tl.cdiv(in_features, tl.maximum(group_size, 1)), 1)
    codes += slot_rows(slot, codes_stride, row, words_per_row(in_features, bits))
    steps += slot_rows(slot, steps_stride, row, groups)
    scale = channel_scale + slot.to(tl.int64) * in_features
    weight += row.to(tl.int64) * weight_stride
    target = merged + (row - first_row).to(tl.int64) * in_features
    rank = 0
    if LOW_RANK:
        rank = tl.load(slot_rank + slot)
        left += slot_rows(slot, out_features * max_rank, row, max_rank)
        right += slot.to(tl.int64) * max_rank * in_features
    if block == 0:
        own_shift = tl.load(bias_delta + slot_rows(slot, out_features, row, 1) + rows)
        if HAS_BIAS:
            own_shift += tl.load(bias + row + rows).to(tl.float32)
        own_shift = tl.where(bits > 0, own_shift, float("nan"))
        tl.store(shift + row - first_row + rows, own_shift.to(shift.dtype.element_ty), mask=row_mask)
    for i in tl.static_range(len(WIDTHS)):
        if bits == WIDTHS[i]:
            if EVEN or (block + 1) * (PLANE_WORDS * 32 // WIDTHS[i]) <= in_features:
                # Told to be a multiple of a block's words, so that these are read in wide loads.
                words_of_row = words_per_row(in_features, WIDTHS[i])
                if EVEN:
                    words_of_row = in_features // (PLANE_WORDS * 32 // WIDTHS[i]) * PLANE_WORDS
                if block * (PLANE_WORDS * 32 // WIDTHS[i]) < in_features:
                    _merge_block(
                        weight, weight_stride, target, codes, steps, scale, left, right, rows, row_mask, block,
                        words_of_row, in_features, group_size, groups, rank, max_rank,
                        WIDTHS[i], GROUPED, SCALED, LOW_RANK, BLOCK_RANK, True,
                    )  # fmt: skip
            elif block * (PLANE_WORDS * 32 // WIDTHS[i]) < in_features:
                _merge_block(
                    weight, weight_stride, target, codes, steps, scale, left, right, rows, row_mask, block,
                    words_per_row(in_features, WIDTHS[i]), in_features, group_size, groups, rank, max_rank,
                    WIDTHS[i], GROUPED, SCALED, LOW_RANK, BLOCK_RANK, False,
                )  # fmt: skip
    if bits > 0:
        tl.debug_barrier()  # salient channels are written again
        channels = PLANE_WORDS * 32 // bits
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
                _merge_channel(
                    weight, weight_stride, target, codes, steps, scale, left, right, residual, rows, row_mask, channel,
                    in_features, group_size, groups, rank, max_rank, bits, SCALED, LOW_RANK, BLOCK_RANK,
                )  # fmt: skip
            previous = channel


def merge_launch(dtype: torch.dtype, max_rank: int) -> dict[str, int]:
    """Rows of a program and its blocks; not measured on a card yet."""
    return {
        "BLOCK_OUT": 16 if dtype == torch.float32 else 32,
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
    widths = widths_in(bank.bits)
    # As many as the widest codes need; those of fewer bits have fewer blocks, and programs to spare.
    blocks = triton.cdiv(in_features, PLANE_WORDS.value * codes_per_word(widths[0]))
    for first in range(0, out_features, most):
        last = min(first + most, out_features)
        merge_rows[(triton.cdiv(last - first, launch["BLOCK_OUT"]), blocks)](
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
            WIDTHS=widths,
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
