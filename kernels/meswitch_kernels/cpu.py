"""The CPU backend: Numba kernels for few tokens a slot, one BLAS product on merged weights for many."""

from __future__ import annotations

import functools
import itertools
import threading
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu_kernels as kernels
from . import naive
from .bank import BankTensors
from .cpu_threads import run_task
from .cpu_vector import ROWS
from .groups import TokenGroups
from .packing import words_per_row

PREFILL_TOKENS = 16
"""Tokens of one slot from which merging W + Δ̂ for BLAS pays; see docs/results/kernels-cpu.md."""
MERGE_BYTES = 4 << 20
"""Merged weights held at once: what stays in a core's share of the last-level cache until BLAS reads it."""


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups | None = None,
) -> Tensor:
    """As `naive.expert_linear`, for float32 and bfloat16 x. `groups` is not needed here."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return naive.expert_linear(x, weight, bias, bank, slot_of_token)
    if x.stride(1) != 1 or x.data_ptr() % x.element_size():
        x = x.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    slots, slot_bits = slot_of_token.tolist(), bank.slot_bits.tolist()
    if len(slots) >= PREFILL_TOKENS and slots.count(slots[0]) == len(slots) and _servable(slots[0], slot_bits):
        return _prefill(x, weight, bias, bank, slots[0])
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    tokens_of: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        tokens_of.setdefault(slot, []).append(token)
    few = []
    for slot, tokens in tokens_of.items():
        if not _servable(slot, slot_bits):
            y[tokens] = torch.nan
        elif len(tokens) < PREFILL_TOKENS:
            few.append((slot, tokens))
        else:
            y[tokens] = _prefill(x[tokens], weight, bias, bank, slot)
    if few:
        _decode(y, x, weight, bias, bank, few)
    return y


def _servable(slot: int, slot_bits: list[int]) -> bool:
    return slot == -1 or (0 <= slot < len(slot_bits) and slot_bits[slot] > 0)


expert_embedding = naive.expert_embedding
expert_norm_gain = naive.expert_norm_gain
added_logits = naive.added_logits


class _Scratch(threading.local):
    """Memory that a thread's calls reuse; it grows to the largest call."""

    buffer = torch.empty(0, dtype=torch.uint8)
    address = 0

    def take(self, size: int) -> int:
        """The address, a multiple of 64, of at least `size` bytes."""
        if size + 64 > self.buffer.shape[0]:
            self.buffer = torch.empty(size + 64, dtype=torch.uint8)
            self.address = -(-self.buffer.data_ptr() // 64) * 64
        return self.address

    def tensor(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The same memory as an uninitialised `[rows, columns]` tensor: fresh pages cost more than merging."""
        size = rows * columns * dtype.itemsize
        first = self.take(size) - self.buffer.data_ptr()
        return self.buffer[first : first + size].view(dtype).view(rows, columns)


_scratch = _Scratch()


@dataclass(frozen=True)
class _Layout:
    """Strides and places, in bytes, of what `spread` prepares for `rows`."""

    plain: int
    spread: int
    salient: int
    of_word: int
    acc: int
    places: tuple[int, ...]
    size: int


@functools.lru_cache(256)
def _layout(
    in_features: int, bits: int, grouped: bool, size: int, max_salient: int, tokens: int, groups: int, threads: int
) -> _Layout:
    # A slot of fewer bits packs more channels into the words that are padded to 16, so both widths count.
    padded = {width: -(-words_per_row(in_features, width) // 16) * 16 for width in (1, bits)}
    plain = -(-in_features * size // 64) * 64
    spread = max(words * (32 // width) for width, words in padded.items()) * size
    salient = -(-max_salient // 16) * 64
    of_word = padded[bits] * 4 if grouped else 0
    acc = tokens * ROWS * 64
    sizes = (plain * tokens, spread * tokens, salient * tokens, of_word * groups, acc * threads)
    ends = tuple(itertools.accumulate(sizes, initial=0))
    return _Layout(plain, spread, salient, of_word, acc, ends[:5], ends[5])


def _fields(x: Tensor, weight: Tensor, bank: BankTensors) -> tuple[int, ...]:
    """The fields that every task begins with; SELF, NEXT and THREAD are set by `_run`."""
    return (
        0,
        0,
        0,
        x.dtype == torch.bfloat16,
        weight.shape[1],
        weight.shape[0],
        weight.data_ptr(),
        weight.stride(0) * weight.element_size(),
        *bank.addresses,
    )


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
    tokens_of_slot: list[tuple[int, list[int]]],
) -> None:
    """Write the rows of y that belong to the given tokens, reading every weight and code once."""
    out_features, in_features = weight.shape
    size = x.element_size()
    order: list[int] = []
    slots: list[int] = []
    table: list[int] = []
    for slot, tokens in tokens_of_slot:
        table += (slot, len(order), len(tokens))
        order += tokens
        slots += [slot] * len(tokens)
    count, groups = len(order), len(tokens_of_slot)
    layout = _layout(
        in_features,
        bank.bits,
        bank.group_size > 0,
        size,
        bank.salient_index.shape[1],
        count,
        groups,
        torch.get_num_threads(),
    )
    base = _scratch.take(layout.size)
    ints = array("i", order + slots + table)
    ints_at = ints.buffer_info()[0]
    fields = array(
        "q",
        (
            *_fields(x, weight, bank),
            x.data_ptr(),
            x.stride(0) * size,
            y.data_ptr(),
            y.stride(0) * size,
            0 if bias is None else bias.data_ptr(),
            count,
            ints_at,
            ints_at + 4 * count,
            ints_at + 8 * count,
            groups,
            base + layout.places[0],
            layout.plain,
            base + layout.places[1],
            layout.spread,
            base + layout.places[2],
            layout.salient,
            base + layout.places[3],
            layout.of_word,
            base + layout.places[4],
            layout.acc,
        ),
    )
    spread_task, rows_task, _ = _tasks()
    _run(spread_task, fields, count)
    _run(rows_task, fields, -(-out_features // kernels.CHUNK_ROWS))


def _prefill(x: Tensor, weight: Tensor, bias: Tensor | None, bank: BankTensors, slot: int) -> Tensor:
    """x·(W + Δ̂)ᵀ and biases for tokens of one slot: a block of rows of W + Δ̂ is merged, then multiplied."""
    if slot < 0:
        return torch.nn.functional.linear(x, weight, bias)
    out_features, in_features = weight.shape
    scale = bank.channel_scale[slot].float()
    if in_features % 16:
        scale = torch.nn.functional.pad(scale, (0, -in_features % 16))
    shift = bias
    if bank.bias_delta[slot].any():  # a bias of zeros would cost BLAS a pass over the product
        delta = bank.bias_delta[slot]
        shift = (delta if bias is None else delta + bias).to(x.dtype)
    rows = max(64, MERGE_BYTES // (in_features * x.element_size()) // 64 * 64)
    merged = _scratch.tensor(min(rows, out_features), in_features, x.dtype)
    fields = array(
        "q",
        (
            *_fields(x, weight, bank),
            merged.data_ptr(),
            in_features * x.element_size(),
            0,
            0,
            slot,
            scale.data_ptr(),
        ),
    )
    merge_task = _tasks()[2]
    if rows >= out_features:
        fields[kernels.ROW_COUNT] = out_features
        _run(merge_task, fields, -(-out_features // kernels.MERGE_ROWS))
        return torch.nn.functional.linear(x, merged, shift)
    y = x.new_empty(x.shape[0], out_features)
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        fields[kernels.FIRST_ROW], fields[kernels.ROW_COUNT] = first, last - first
        _run(merge_task, fields, -(-(last - first) // kernels.MERGE_ROWS))
        part = None if shift is None else shift[first:last]
        y[:, first:last] = torch.nn.functional.linear(x, merged[: last - first], part)
    return y


@functools.cache
def _tasks() -> tuple[int, int, int]:
    """Addresses of the compiled `spread`, `rows` and `merge`."""
    return kernels.spread.address, kernels.rows.address, kernels.merge.address
