"""The CPU backend: Numba kernels for few tokens a slot, one BLAS product on merged weights for many."""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from . import codeless, naive
from . import cpu_kernels as kernels
from .bank import BankTensors
from .cpu_attention import decode_attention as decode_attention
from .cpu_groups import CpuGroups, Few, group_tokens
from .cpu_norm import rms_norm as rms_norm
from .cpu_threads import run_task
from .cpu_vector import ROWS
from .delta import VALUE_DTYPES
from .groups import TokenGroups
from .packing import codes_per_word, widths_in, words_per_row
from .scratch import scratch

MERGE_BYTES = 4 << 20
"""Merged weights held at once: what stays in a core's share of the last-level cache until BLAS reads it."""


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups | CpuGroups | None = None,
) -> Tensor:
    """As `naive.expert_linear`, for float32 and bfloat16 x. Groups other than `CpuGroups` are made again."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return naive.expert_linear(x, weight, bias, bank, slot_of_token)
    if bank.messages:
        raise ValueError("the cpu backend reads no messages of trellis codes; load codes into its banks")
    if not bank.formats:
        return codeless.expert_linear(x, weight, bias, bank, slot_of_token)
    if bank.planes:
        raise ValueError("the cpu backend reads codes as they are stored; make the bank with planes=False")
    if x.stride(1) != 1 or x.data_ptr() % x.element_size():
        x = x.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    parts = groups if isinstance(groups, CpuGroups) else group_tokens(slot_of_token)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    slot_bits = bank.slot_bits.tolist()
    empty = {slot for slot in parts.slots if not (slot == -1 or (0 <= slot < len(slot_bits) and slot_bits[slot]))}
    if empty:
        parts = group_tokens(slot_of_token, left_out=empty)
        y.fill_(torch.nan)
    for slot, rows in parts.many:
        if isinstance(rows, slice):
            _prefill(x[rows], weight, bias, bank, slot, y[rows])
        else:
            part = y.new_empty(len(rows), y.shape[1])
            _prefill(x[rows], weight, bias, bank, slot, part)
            y[rows] = part
    if parts.few:
        _decode(y, x, weight, bias, bank, parts.few)
    return y


expert_embedding = naive.expert_embedding
added_logits = naive.added_logits
base_norm = naive.base_norm


@dataclass(frozen=True)
class _Layout:
    """What `rows` prepares for itself, in bytes: strides and places by name, and the size of all of it.

    `rows` is how many weight rows are worked on at once.
    """

    stride: dict[str, int]
    place: dict[str, int]
    size: int
    rows: int


@functools.lru_cache(256)
def _layout(
    in_features: int,
    bits: int,
    grouped: bool,
    size: int,
    max_salient: int,
    max_rank: int,
    tokens: int,
    groups: int,
    threads: int,
) -> _Layout:
    # A slot of fewer bits packs more channels into the words that are padded to 16, so every width counts.
    padded = {width: -(-words_per_row(in_features, width) // 16) * 16 for width in widths_in(bits)}
    plain = -(-in_features * size // 64) * 64
    stride = {
        "plain": plain,
        "spread": max(words * codes_per_word(width) for width, words in padded.items()) * size,
        "salient": -(-max_salient // 16) * 64,
        "z": -(-max_rank // 16) * 64,
        "word_group": max(padded.values()) * 4 if grouped else 0,
        "acc": 4 * ROWS * 64,
    }
    counts = {"word_group": groups, "acc": threads}
    place, end = {}, 0
    for name, each in stride.items():
        place[name], end = end, end + each * counts.get(name, tokens)
    rows = max(ROWS, min(kernels.CHUNK_ROWS, kernels.CACHED_ROWS // plain // ROWS * ROWS))
    return _Layout(stride, place, end, rows)


def _bank_fields(bank: BankTensors) -> array[int]:
    """A task's fields, those set that are the bank's; strides in bytes."""
    fields = array("q", bytes(8 * max(kernels.DECODE, kernels.MERGE)))
    fields[kernels.CODES] = bank.codes.data_ptr()
    fields[kernels.CODES_SLOT] = bank.codes.shape[1] * 4
    fields[kernels.STEPS] = bank.steps.data_ptr()
    fields[kernels.STEPS_SLOT] = bank.steps.shape[1] * 4
    fields[kernels.SALIENT_INDEX] = bank.salient_index.data_ptr()
    fields[kernels.SALIENT_VALUE] = bank.salient_value.data_ptr()
    fields[kernels.MAX_SALIENT] = bank.salient_index.shape[1]
    fields[kernels.SALIENT_KIND] = VALUE_DTYPES.index(bank.salient_value.dtype)
    fields[kernels.CHANNEL_SCALE] = bank.channel_scale.data_ptr()
    fields[kernels.BIAS_DELTA] = bank.bias_delta.data_ptr()
    fields[kernels.SLOT_BITS] = bank.slot_bits.data_ptr()
    fields[kernels.SLOT_GROUP] = bank.slot_group.data_ptr()
    fields[kernels.LEFT] = bank.left.data_ptr()
    fields[kernels.RIGHT] = bank.right.data_ptr()
    fields[kernels.SLOT_RANK] = bank.slot_rank.data_ptr()
    fields[kernels.MAX_RANK] = bank.left.shape[2]
    return fields


def _fields(x: Tensor, weight: Tensor, bank: BankTensors) -> array[int]:
    """Fields of a task of this call; SELF is set by `_run`, the task's own by the caller."""
    fields = bank.once(_bank_fields)[:]
    fields[kernels.BF16] = x.dtype == torch.bfloat16
    fields[kernels.IN_FEATURES] = weight.shape[1]
    fields[kernels.OUT_FEATURES] = weight.shape[0]
    fields[kernels.WEIGHT] = weight.data_ptr()
    fields[kernels.WEIGHT_STRIDE] = weight.stride(0) * weight.element_size()
    return fields


def _run(task: int, fields: array[int], units: int) -> None:
    address = fields.buffer_info()[0]
    fields[kernels.SELF], fields[kernels.NEXT], fields[kernels.THREAD] = address, 0, 0
    run_task(task, address, units)


def _decode(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    few: Few,
) -> None:
    """Write the rows of y that belong to the given tokens, reading every weight and code once."""
    out_features, in_features = weight.shape
    size, count, groups = x.element_size(), few.tokens, few.groups
    ints_at = few.numbers.buffer_info()[0]
    layout = _layout(
        in_features,
        bank.bits,
        bank.group_size > 0,
        size,
        bank.salient_index.shape[1],
        bank.left.shape[2],
        count,
        groups,
        torch.get_num_threads(),
    )
    base, place, stride = scratch.take(layout.size), layout.place, layout.stride
    fields = _fields(x, weight, bank)
    fields[kernels.X] = x.data_ptr()
    fields[kernels.X_STRIDE] = x.stride(0) * size
    fields[kernels.Y] = y.data_ptr()
    fields[kernels.Y_STRIDE] = y.stride(0) * size
    fields[kernels.BIAS] = 0 if bias is None else bias.data_ptr()
    fields[kernels.TOKENS] = count
    fields[kernels.ORDER] = ints_at
    fields[kernels.SLOT_OF] = ints_at + 4 * count
    fields[kernels.GROUPS] = ints_at + 8 * count
    fields[kernels.GROUP_COUNT] = groups
    fields[kernels.PLAIN] = base + place["plain"]
    fields[kernels.PLAIN_STRIDE] = stride["plain"]
    fields[kernels.SPREAD] = base + place["spread"]
    fields[kernels.SPREAD_STRIDE] = stride["spread"]
    fields[kernels.SALIENT] = base + place["salient"]
    fields[kernels.SALIENT_STRIDE] = stride["salient"]
    fields[kernels.Z] = base + place["z"]
    fields[kernels.Z_STRIDE] = stride["z"]
    fields[kernels.WORD_GROUP] = base + place["word_group"]
    fields[kernels.WORD_GROUP_STRIDE] = stride["word_group"]
    fields[kernels.ACC] = base + place["acc"]
    fields[kernels.ACC_STRIDE] = stride["acc"]
    fields[kernels.ROWS_TOGETHER] = layout.rows
    _run(_tasks()[0], fields, -(-out_features // kernels.CHUNK_ROWS))


def _prefill(x: Tensor, weight: Tensor, bias: Tensor | None, bank: BankTensors, slot: int, y: Tensor) -> None:
    """y = x·(W + Δ̂)ᵀ and biases for tokens of one slot: a block of rows of W + Δ̂ is merged, then multiplied.

    A low-rank part is so many more input channels, x·Rᵀ with weights L: merging it would cost what that many
    more tokens do.
    """
    if slot < 0:
        _multiply(x, weight, bias, y)
        return
    out_features, in_features = weight.shape
    scale = bank.channel_scale[slot].float()
    if in_features % 16:
        scale = torch.nn.functional.pad(scale, (0, -in_features % 16))
    shift = bias
    if bank.bias_delta[slot].any():  # a bias of zeros would cost BLAS a pass over the product
        delta = bank.bias_delta[slot]
        shift = (delta if bias is None else delta + bias).to(x.dtype)
    rows = max(64, MERGE_BYTES // (in_features * x.element_size()) // 64 * 64)
    rank = int(bank.slot_rank[slot]) if bank.left.shape[2] else 0
    if rank:
        x = torch.cat([x, x @ bank.right[slot, :rank].to(x.dtype).T], 1)
    merged = scratch.tensor(min(rows, out_features), in_features + rank, x.dtype)
    fields = _fields(x, weight, bank)
    fields[kernels.MERGED] = merged.data_ptr()
    fields[kernels.MERGED_STRIDE] = merged.stride(0) * x.element_size()
    fields[kernels.SLOT] = slot
    fields[kernels.SCALE] = scale.data_ptr()
    merge_task = _tasks()[1]
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        fields[kernels.FIRST_ROW], fields[kernels.ROW_COUNT] = first, last - first
        _run(merge_task, fields, -(-(last - first) // kernels.MERGE_ROWS))
        if rank:
            merged[: last - first, in_features:] = bank.left[slot, first:last, :rank]
        part = None if shift is None else shift[first:last]
        _multiply(x, merged[: last - first], part, y[:, first:last])


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = x·Wᵀ + bias, into memory that is there; BLAS wants rows that lie one after another."""
    target = y if y.is_contiguous() else y.new_empty(y.shape)
    if bias is None:
        torch.mm(x, weight.T, out=target)
    else:
        torch.addmm(bias, x, weight.T, out=target)
    if target is not y:
        y.copy_(target)


@functools.cache
def _tasks() -> tuple[int, int]:
    """Addresses of the compiled `rows` and `merge`."""
    return kernels.rows.address, kernels.merge.address
