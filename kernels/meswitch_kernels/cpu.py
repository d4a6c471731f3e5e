"""The CPU backend: Numba kernels for few tokens a slot, one BLAS product on merged weights for many."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu_kernels as kernels
from . import naive
from .bank import BankTensors
from .cpu_threads import run_task
from .groups import TokenGroups
from .packing import words_per_row

PREFILL_TOKENS = 16
"""Tokens of one slot from which merging W + Δ̂ for BLAS pays; docs/results/kernels-cpu.md has the measurement."""
MERGE_BYTES = 4 << 20
"""Merged weights held at once: what stays in a core's share of the last-level cache until BLAS reads it."""

_SALIENT_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


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
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    if not y.numel():
        return y
    tokens_of: dict[int, list[int]] = {}
    for token, slot in enumerate(slot_of_token.tolist()):
        tokens_of.setdefault(slot, []).append(token)
    few = []
    slot_bits = bank.slot_bits.tolist()
    for slot, tokens in tokens_of.items():
        if slot >= len(slot_bits) or slot < -1 or (slot >= 0 and not slot_bits[slot]):
            y[tokens] = torch.nan
        elif len(tokens) < PREFILL_TOKENS:
            few.append((slot, tokens))
        else:
            _prefill(y, x, weight, bias, bank, slot, tokens)
    if few:
        _decode(y, x, weight, bias, bank, few)
    return y


expert_embedding = naive.expert_embedding
expert_norm_gain = naive.expert_norm_gain
added_logits = naive.added_logits


class _Scratch(threading.local):
    """Memory that a thread's calls reuse; it grows to the largest call."""

    buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, sizes: Sequence[int]) -> list[int]:
        """Addresses of areas of `sizes` bytes, each at a multiple of 64."""
        places, end = [], 0
        for size in sizes:
            places.append(end)
            end += -(-size // 64) * 64
        if end + 64 > len(self.buffer):
            self.buffer = torch.empty(end + 64, dtype=torch.uint8)
        base = -(-self.buffer.data_ptr() // 64) * 64
        return [base + place for place in places]


_scratch = _Scratch()


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
        bank.codes.data_ptr(),
        bank.codes.shape[1] * 4,
        bank.steps.data_ptr(),
        bank.steps.shape[1] * 4,
        bank.salient_index.data_ptr(),
        bank.salient_value.data_ptr(),
        bank.salient_index.shape[1],
        _SALIENT_KINDS[bank.salient_value.dtype],
        bank.channel_scale.data_ptr(),
        bank.bias_delta.data_ptr(),
        bank.slot_bits.data_ptr(),
        bank.slot_group.data_ptr(),
    )


def _run(task: int, fields: ctypes.Array[ctypes.c_int64], units: int) -> None:
    address = ctypes.addressof(fields)
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
    order = [token for _, tokens in tokens_of_slot for token in tokens]
    slots = [slot for slot, tokens in tokens_of_slot for _ in tokens]
    count, groups = len(order), len(tokens_of_slot)
    table: list[int] = [*order, *slots]
    first = 0
    for slot, tokens in tokens_of_slot:
        table += [slot, first, len(tokens)]
        first += len(tokens)
    words = words_per_row(in_features, bank.bits)
    padded_words = -(-words // 16) * 16
    plain = -(-in_features * size // 64) * 64
    # A slot of fewer bits needs no more: its words hold more channels each, padded to 16 words.
    spread = max(-(-words_per_row(in_features, bits) // 16) * 16 * (32 // bits) for bits in (1, bank.bits)) * size
    salient = -(-bank.salient_index.shape[1] // 16) * 64
    acc = count * kernels.ROWS * 64
    of_word = padded_words * 4 if bank.group_size else 0
    threads = torch.get_num_threads()
    places = _scratch.take((plain * count, spread * count, salient * count, acc * threads, of_word * groups))
    ints = (ctypes.c_int32 * len(table))(*table)
    ints_at = ctypes.addressof(ints)
    fields = (ctypes.c_int64 * kernels.DECODE)(
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
        places[0],
        plain,
        places[1],
        spread,
        places[2],
        salient,
        places[4],
        of_word,
        places[3],
        acc,
    )
    spread_task, rows_task, _ = _tasks()
    _run(spread_task, fields, count)
    _run(rows_task, fields, -(-out_features // kernels.CHUNK_ROWS))


def _prefill(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot: int,
    tokens: list[int],
) -> None:
    """Write the rows of y of one slot's tokens: W + Δ̂ for a block of output rows, then one BLAS product."""
    every = len(tokens) == len(x)
    own = x if every else x[tokens]
    if slot < 0:
        result = torch.nn.functional.linear(own, weight, bias)
        y.copy_(result) if every else y.__setitem__(tokens, result)
        return
    out_features, in_features = weight.shape
    scale = torch.zeros(-(-in_features // 16) * 16)
    scale[:in_features] = bank.channel_scale[slot]
    shift = bank.bias_delta[slot] if bias is None else bank.bias_delta[slot] + bias
    shift = shift.to(x.dtype)
    rows = max(64, MERGE_BYTES // (in_features * x.element_size()) // 64 * 64)
    merged = torch.empty(min(rows, out_features), in_features, dtype=x.dtype)
    target = y if every else y.new_empty(len(tokens), out_features)
    for first in range(0, out_features, rows):
        count = min(rows, out_features - first)
        fields = (ctypes.c_int64 * kernels.MERGE)(
            *_fields(x, weight, bank),
            merged.data_ptr(),
            in_features * x.element_size(),
            first,
            count,
            slot,
            scale.data_ptr(),
        )
        _run(_tasks()[2], fields, -(-count // kernels.MERGE_ROWS))
        target[:, first : first + count] = torch.nn.functional.linear(own, merged[:count], shift[first : first + count])
    if not every:
        y[tokens] = target


@functools.cache
def _tasks() -> tuple[int, int, int]:
    """Addresses of the compiled `spread`, `rows` and `merge`."""
    return kernels.spread.address, kernels.rows.address, kernels.merge.address
