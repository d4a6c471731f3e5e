# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""What an expert switches besides linears and norms: embedding rows, added vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_messages import row_words, width_of
from .triton_tiles import codes_at, slot_is_servable, slot_rows


@triton.jit
def embedding_rows(
    ids,
    weight,
    y,
    codes,
    steps,
    channel_scale,
    salient_index,
    salient_value,
    left,
    right,
    added_rows,
    slot_bits,
    slot_group,
    slot_rank,
    slot_of_token,
    slots,
    hidden,
    vocab,
    max_salient,
    max_rank,
    max_added,
    weight_stride,
    codes_stride,
    steps_stride,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y `[tokens, hidden]`: the base's row of each token's id plus its slot's delta row, or an added row."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < hidden
    slot = tl.load(slot_of_token + token)
    servable = slot_is_servable(slot, slot_bits, slots)
    index = tl.load(ids + token).to(tl.int64)
    row = tl.minimum(index, vocab - 1)
    value = tl.load(weight + row * weight_stride + k, mask=inside, other=0.0).to(tl.float32)
    if servable & (slot >= 0):
        if index >= vocab:
            added = (slot.to(tl.int64) * max_added + tl.minimum(index - vocab, max_added - 1)) * hidden + k
            value = tl.load(added_rows + added, mask=inside & (max_added > 0), other=float("nan")).to(tl.float32)
        else:
            number, group_size = tl.load(slot_bits + slot), tl.load(slot_group + slot)
            own = codes + slot_rows(slot, codes_stride, row, row_words(hidden, number))
            packed = codes_at(own, k, inside, hidden, number, NUMBERS)
            span = tl.where(group_size > 0, group_size, hidden)
            groups = (hidden + span - 1) // span
            group = slot.to(tl.int64) * steps_stride + row * groups + k // span
            step = tl.load(steps + group, mask=inside, other=0.0)
            scale = tl.load(channel_scale + slot * hidden + k, mask=inside, other=0.0).to(tl.float32)
            middle = ((1 << width_of(number, NUMBERS)) - 1).to(tl.float32) * 0.5
            value += (packed.to(tl.float32) - middle) * step * scale
            for j in range(0, max_salient):
                channel = tl.load(salient_index + slot * max_salient + j)
                residual = tl.load(salient_value + (slot.to(tl.int64) * vocab + row) * max_salient + j)
                value += tl.where(k == channel, residual.to(tl.float32), 0.0)
            rank = tl.load(slot_rank + slot, mask=max_rank > 0, other=0)  # a bank without ranks has none there
            for r in range(0, rank):
                share = tl.load(left + (slot.to(tl.int64) * vocab + row) * max_rank + r).to(tl.float32)
                direction = right + (slot * max_rank + r).to(tl.int64) * hidden + k
                value += share * tl.load(direction, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(servable, value, float("nan"))
    tl.store(y + token * hidden + k, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def added_row_logits(
    x, added_rows, added_counts, y, slot_of_token, slots, max_added, hidden, x_stride, BLOCK: tl.constexpr
):
    """y `[tokens, max_added]`: x times one added row of each token's slot, -inf where the slot has none."""
    token = tl.program_id(0).to(tl.int64)
    added = tl.program_id(1)
    slot = tl.load(slot_of_token + token)
    inside = (slot >= 0) & (slot < slots)
    count = tl.load(added_counts + tl.where(inside, slot, 0))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if inside & (added < count):
        row = added_rows + (slot.to(tl.int64) * max_added + added) * hidden
        for start in range(0, hidden, BLOCK):
            k = start + tl.arange(0, BLOCK)
            given = tl.load(x + token * x_stride + k, mask=k < hidden, other=0.0).to(tl.float32)
            total += given * tl.load(row + k, mask=k < hidden, other=0.0).to(tl.float32)
    logit = tl.where(inside & (added < count), tl.sum(total, 0), float("-inf"))
    tl.store(y + token * max_added + added, logit.to(y.dtype.element_ty))
