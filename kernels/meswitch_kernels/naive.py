"""The truth: what every backend computes, in plain PyTorch, one slot at a time.

Sums are in float32, or in float64 where `x` is float64. A token whose slot is empty or outside the bank
comes out as NaN here as in every backend; on the CPU `ops` refuses it before it gets this far.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import groups as _groups
from .bank import BankTensors, dequantize_rows
from .groups import TokenGroups


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups | None = None,
) -> Tensor:
    """y `[tokens, out]` = x·Wᵀ + bias, plus each token's delta product and bias delta."""
    wide = accumulation_dtype(x)
    y = torch.nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    for slot, tokens in tokens_by_slot(slot_of_token, bank.slot_bits):
        delta = dequantize_rows(bank, slot, slice(None), wide)
        y[tokens] += x[tokens].to(wide) @ delta.T + bank.bias_delta[slot].to(wide)
    y[unservable(slot_of_token, bank.slot_bits)] = torch.nan
    return y.to(x.dtype)


def group_tokens(slot_of_token: Tensor, slots: int, runs: Sequence[tuple[int, int]] | None = None) -> TokenGroups:
    """As `groups.group_tokens`. `runs`, by which the Triton backend plans prefill, do not matter here."""
    return _groups.group_tokens(slot_of_token, slots)


def expert_embedding(
    ids: Tensor, weight: Tensor, bank: BankTensors, added_rows: Tensor, slot_of_token: Tensor
) -> Tensor:
    """Row `ids[t]` of the base's `weight` `[vocab, hidden]` plus the delta of token t's slot.

    Ids from `vocab` on are the slot's added rows `[slots, max_added, hidden]`.
    """
    vocab, wide = len(weight), accumulation_dtype(weight)
    rows = weight[ids.clamp(max=vocab - 1)].to(wide)
    for slot, tokens in tokens_by_slot(slot_of_token, bank.slot_bits):
        delta = dequantize_rows(bank, slot, ids[tokens].clamp(max=vocab - 1), wide)
        rows[tokens] += delta
        added = (ids[tokens] - vocab).clamp(min=0)
        if added_rows.shape[1]:
            own = added_rows[slot, added.clamp(max=added_rows.shape[1] - 1)].to(wide)
            rows[tokens] = torch.where((ids[tokens] >= vocab).unsqueeze(1), own, rows[tokens])
    rows[unservable(slot_of_token, bank.slot_bits)] = torch.nan
    return rows.to(weight.dtype)


def added_logits(x: Tensor, added_rows: Tensor, added_counts: Tensor, slot_of_token: Tensor) -> Tensor:
    """x·Aᵀ `[tokens, max_added]` with the added vocabulary rows A of each token's slot; -inf where none."""
    wide = accumulation_dtype(x)
    y = x.new_full((len(x), added_rows.shape[1]), -torch.inf, dtype=wide)
    for slot, tokens in tokens_by_slot(slot_of_token, torch.ones_like(added_counts)):
        count = int(added_counts[slot])
        y[tokens, :count] = x[tokens].to(wide) @ added_rows[slot, :count].to(wide).T
    return y.to(x.dtype)


def rms_norm(x: Tensor, epsilon: float, table: Tensor, gain_rows: Tensor) -> Tensor:
    """x `[rows, width]` over its root mean square, then times the gains: row t's are `table[gain_rows[t]]` (int64).

    The quotient is rounded to the type of x before gains of that type, as Llama's norm does; gains of a wider type,
    Gemma's, are multiplied before anything is rounded, as there.
    """
    wide = x.to(accumulation_dtype(x))
    normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + epsilon)
    if table.dtype == x.dtype:
        normed = normed.to(x.dtype)
    return (normed * table[gain_rows]).to(x.dtype)


base_norm = None
"""A backend's norm of rows that all have one gain; without one, the model's own is as fast."""


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Tensor,
    ends: Tensor,
    writes: Tensor,
    longest: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention `[requests, heads, width]` of one new token of each request to a paged cache and to itself.

    Args:
        query: `[heads, requests, width]`; heads that share a key head are neighbours.
        key, value: the new tokens' own, `[key heads, requests, width]`; they are written to the caches first.
        key_cache, value_cache: `[rows, key heads, width]`, with equal strides.
        rows: int64, the cache rows of every request's keys in order, the new token's last. Its own entry
            is not read (a cache that is a ring has another row there), nor is any if no request has others.
        ends: int32 `[requests + 1]`, where each request's rows begin and end.
        writes: int64 `[requests]`, the row of each new token.
        longest: the most keys of a request.
        softcap: scores are squashed to +-softcap, as in Gemma 2.
    """
    key_cache[writes], value_cache[writes] = key.transpose(0, 1), value.transpose(0, 1)
    results = []
    for request, (first, last) in enumerate(itertools.pairwise(ends.tolist())):
        own = torch.cat([rows[first : last - 1], writes[request : request + 1]])
        results.append(_attended(query[:, request], key_cache[own], value_cache[own], scale, softcap))
    return torch.stack(results)


def _attended(query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention `[heads, width]` of one token's query `[heads, width]` to `[seen, key heads, width]`."""
    wide, shared = accumulation_dtype(query), query.shape[0] // keys.shape[1]
    keys, values = (held.to(wide).repeat_interleave(shared, 1).transpose(0, 1) for held in (keys, values))
    scores = _capped((keys @ (query.to(wide) * scale).unsqueeze(2)).squeeze(2), softcap)
    return (torch.softmax(scores, 1).unsqueeze(1) @ values).squeeze(1).to(query.dtype)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    positions: Tensor,
    page_size: int,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    tokens: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention `[total, heads, width]` of one new token of each request to the pages of a cache and to itself.

    Args:
        query: `[heads, total, width]`; heads that share a key head are neighbours.
        key, value: `[key heads, total, width]`; the new tokens' own are written to the caches.
        key_cache, value_cache: `[rows, key heads, width]`, with equal strides.
        tables: int32 `[requests, pages]`, the pages of each request's rows in order. A first entry of -1 is no
            request: nothing is written for it, and what comes out means nothing.
        positions: int32 `[total]`, how many tokens come before each.
        window: a token sees as many, itself included, and position p has row p % window of its request.
        softcap: scores are squashed to +-softcap, as in Gemma 2.
        tokens: int32 `[requests]`, the place of each request's token among `total`; None: its own number.
        out: what the rows are written to; those of other tokens stay as they are.
    """
    if out is None:
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    for request, table in enumerate(tables):
        token = request if tokens is None else int(tokens[request])
        if table[0] < 0:
            out[token] = 0
            continue
        last = int(positions[token])
        seen = torch.arange(0 if window is None else max(0, last + 1 - window), last + 1, device=query.device)
        rows = _rows_of(table, seen, page_size, window)
        key_cache[rows[-1]], value_cache[rows[-1]] = key[:, token], value[:, token]
        out[token] = _attended(query[:, token], key_cache[rows], value_cache[rows], scale, softcap)
    return out


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    prompts: Tensor,
    counts: Sequence[int],
    page_size: int,
    scale: float,
    out: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """As `paged_attention`, of several new tokens of each request, which see those before them too.

    Args:
        prompts: int32 `[prompts, 4]`: place of the first token among `total`, number of tokens, tokens before them in
            the cache, and the row of `tables`.
        counts: the numbers of tokens, known to the host.
        out: `[total, heads, width]`, which is written to.
    """
    wide, shared = accumulation_dtype(query), query.shape[0] // key.shape[0]
    for (first, count, past, request), known in zip(prompts.tolist(), counts, strict=True):
        if count != known:
            raise ValueError(f"a prompt of {count} tokens is said to have {known}")
        own = slice(first, first + count)
        seen = torch.arange(0 if window is None else max(0, past + 1 - window), past, device=query.device)
        rows = _rows_of(tables[request], seen, page_size, window)
        keys, values = (
            torch.cat([cache[rows].transpose(0, 1), new[:, own]], 1).to(wide).repeat_interleave(shared, 0)
            for cache, new in ((key_cache, key), (value_cache, value))
        )
        position = torch.arange(past, past + count, device=query.device)
        distance = position[:, None] - torch.cat([seen, position])
        scores = _capped((query[:, own].to(wide) * scale) @ keys.transpose(1, 2), softcap)
        scores = scores.masked_fill((distance < 0) | (distance >= (window or past + count)), -torch.inf)
        out[own] = (torch.softmax(scores, 2) @ values).transpose(0, 1).to(query.dtype)
        kept = min(count, window or count)
        rows = _rows_of(tables[request], position[count - kept :], page_size, window)
        for cache, new in ((key_cache, key), (value_cache, value)):
            cache[rows] = new[:, first + count - kept : first + count].transpose(0, 1)


def _rows_of(table: Tensor, positions: Tensor, page_size: int, window: int | None) -> Tensor:
    """Where the keys of positions lie, by a request's pages."""
    place = positions if window is None else positions % window
    return table[place // page_size].long() * page_size + place % page_size


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tokens_by_slot(slot_of_token: Tensor, slot_bits: Tensor) -> list[tuple[int, Tensor]]:
    """Each loaded slot in the batch with the indices of its tokens."""
    present = [int(slot) for slot in torch.unique(slot_of_token) if 0 <= slot < len(slot_bits)]
    return [(slot, torch.nonzero(slot_of_token == slot)[:, 0]) for slot in present if slot_bits[slot]]


def unservable(slot_of_token: Tensor, slot_bits: Tensor) -> Tensor:
    """Mask of the tokens whose slot is outside the bank or empty."""
    outside = (slot_of_token < -1) | (slot_of_token >= len(slot_bits))
    bits = slot_bits[slot_of_token.clamp(0, len(slot_bits) - 1).long()]
    return outside | ((slot_of_token >= 0) & (bits == 0))
