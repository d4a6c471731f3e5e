# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Attention of single new tokens over a paged cache, its keys split between programs where requests are few.

Flash-decoding (Dao et al., 2023): each program keeps a running maximum and sum of its share of the keys, and takes a
ticket of its head and request; the one with the last ticket joins the shares. The heads that share a key head are the
rows of one product, so every key is read once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_its_device

_LEAST_ROWS = 16
"""The smallest product of a tensor core."""
_KEYS_NBYTES = 64 * 128 * 2
"""Keys that a program takes at once, in bytes: more spill in float32. Not measured on a card yet."""
_LEAST_KEYS = 128
"""The fewest keys that are worth a program of their own."""
_MOST_SPLITS = 16
_PROGRAMS_PER_PROCESSOR = 2
_LEAST_TICKETS = 4096


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    return scores


@triton.jit
def cache_rows(table, positions, inside, window, WINDOWED: tl.constexpr, PAGE: tl.constexpr):
    """The row of each position's key, 64 bits wide."""
    if WINDOWED:
        positions = positions % window
    page = tl.load(table + positions // PAGE, mask=inside, other=0)
    return page.to(tl.int64) * PAGE + positions % PAGE


@triton.jit
def _join_shares(
    partials,  # pointer to the first row of the first share, as `maxima` and `sums`
    maxima,
    sums,
    between,  # rows between two shares
    width,
    of_head,
    of_width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """`[ROWS, WIDTH]` of all shares, in their order. A share without keys has the maximum -inf and the sum 0."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        own = tl.load(maxima + split * between + row, mask=of_head, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(highest, own)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    for split in tl.range(0, SPLITS, num_stages=1):
        place = split * between + row
        weight = tl.exp(tl.load(maxima + place, mask=of_head, other=0.0, cache_modifier=".cg") - highest)
        total += weight * tl.load(sums + place, mask=of_head, other=1.0, cache_modifier=".cg")
        mask = of_head[:, None] & of_width[None, :]
        values = partials + place[:, None] * width + column[None, :]
        result += weight[:, None] * tl.load(values, mask=mask, other=0.0, cache_modifier=".cg")
    return result / total[:, None]


@triton.jit
def decode_pages(
    query,
    key,
    value,
    key_cache,
    value_cache,
    out,
    partials,  # float32 [SPLITS, requests, heads, width]
    maxima,  # float32 [SPLITS, requests, heads], as `sums`
    sums,
    tickets,  # int32 [requests, key heads], zero before and after
    tables,
    positions,
    chosen,  # which token each request has, if GATHERED
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    cache_row,
    cache_head,
    table_stride,
    window,
    scale,
    softcap,
    width,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """One key head of one request, and a share of its keys; the first share writes the new key and value."""
    head, request, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(chosen + request) if GATHERED else request
    table = tables + request * table_stride
    live = tl.load(table) >= 0
    position = tl.where(live, tl.load(positions + token), 0)
    first = tl.maximum(position + 1 - window, 0) if WINDOWED else 0
    share = tl.cdiv(tl.cdiv(position - first, SPLITS), KEYS) * KEYS
    begin = first + split * share
    end = tl.minimum(begin + share, position)

    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    of_head, of_width = row < SHARED, column < width
    q = tl.load(
        query + (head * SHARED + row)[:, None] * query_head + token * query_token + column[None, :],
        mask=of_head[:, None] & of_width[None, :],
        other=0.0,
    )
    own_key = tl.load(key + head * key_head + token * key_token + column, mask=of_width, other=0.0)
    own_value = tl.load(value + head * value_head + token * value_token + column, mask=of_width, other=0.0)
    score = capped(tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * scale, softcap, CAPPED)
    maximum = tl.where(split == 0, score, float("-inf"))
    total = tl.where(split == 0, tl.full([ROWS], 1.0, tl.float32), 0.0)
    sum_of_values = tl.where(split == 0, own_value.to(tl.float32)[None, :] + tl.zeros([ROWS, WIDTH], tl.float32), 0.0)

    for start in range(begin, end, KEYS):
        place = start + tl.arange(0, KEYS)
        inside = place < end
        rows = cache_rows(table, place, inside, window, WINDOWED, PAGE) * cache_row + head * cache_head
        mask = inside[:, None] & of_width[None, :]
        keys = tl.load(key_cache + rows[:, None] + column[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], capped(scores, softcap, CAPPED), float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp(maximum - larger)
        weights = tl.exp(scores - larger[:, None])
        values = tl.load(value_cache + rows[:, None] + column[None, :], mask=mask, other=0.0)
        product = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        sum_of_values = sum_of_values * shrink[:, None] + product
        total = total * shrink + tl.sum(weights, 1)
        maximum = larger

    writes = of_width & live & (split == 0)
    target = cache_rows(table, position, live, window, WINDOWED, PAGE) * cache_row + head * cache_head
    tl.store(key_cache + target + column, own_key, mask=writes)
    tl.store(value_cache + target + column, own_value, mask=writes)
    heads = tl.num_programs(0) * SHARED
    mask = of_head[:, None] & of_width[None, :]
    target = (token * heads + head * SHARED + row) * width
    target = out + target[:, None] + column[None, :]
    if SPLITS == 1:
        tl.store(target, (sum_of_values / total[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        between, own = tl.num_programs(1) * heads, request * heads + head * SHARED
        place = split * between + own + row
        tl.store(partials + place[:, None] * width + column[None, :], sum_of_values, mask=mask)
        tl.store(maxima + place, maximum, mask=of_head)
        tl.store(sums + place, total, mask=of_head)
        # What all threads have written must lie in memory before one of them takes the ticket.
        tl.debug_barrier()
        ticket = tickets + request * tl.num_programs(0) + head
        if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1:
            result = _join_shares(
                partials + own * width, maxima + own, sums + own, between, width, of_head, of_width, ROWS, WIDTH,
                SPLITS,
            )  # fmt: skip
            tl.store(target, result.to(out.dtype.element_ty), mask=mask)
            # Zero again for the next launch, also where this one is replayed from a graph.
            tl.atomic_xchg(ticket, 0)


@on_its_device
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
    splits: int | None = None,
) -> Tensor:
    """As `naive.paged_attention`, for float32, bfloat16 and float16. Nothing waits for the device, and the launches
    follow from the shapes alone, so it can be captured. `splits` programs share a request's keys; None chooses."""
    query, key, value = (item if item.stride(2) == 1 else item.contiguous() for item in (query, key, value))
    (heads, total, width), key_heads, requests = query.shape, key.shape[0], tables.shape[0]
    if out is None:
        out = query.new_empty(total, heads, width)
    if not requests:
        return out
    splits = splits or _splits(requests * key_heads, tables.shape[1] * page_size, query.device)
    partials, stats = out, out
    if splits > 1:
        partials = torch.empty(splits, requests, heads, width, dtype=torch.float32, device=query.device)
        stats = torch.empty(2, splits, requests, heads, dtype=torch.float32, device=query.device)
    padded = max(_LEAST_ROWS, triton.next_power_of_2(width))
    gathered = tokens is not None
    tokens = positions if tokens is None else tokens
    decode_pages[(key_heads, requests, splits)](
        query,
        key,
        value,
        key_cache,
        value_cache,
        out,
        partials,
        stats[0],
        stats[-1],
        _tickets(requests * key_heads, query.device),
        tables,
        positions,
        tokens,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        tables.stride(0),
        window or 0,
        scale,
        softcap or 0.0,
        width,
        SHARED=heads // key_heads,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(heads // key_heads)),
        WIDTH=padded,
        PAGE=page_size,
        KEYS=max(_LEAST_ROWS, min(64, _KEYS_NBYTES // (padded * query.element_size()))),
        SPLITS=splits,
        WINDOWED=window is not None,
        CAPPED=bool(softcap),
        GATHERED=gathered,
        num_warps=4,
        num_stages=3 if query.element_size() == 2 else 2,
    )
    return out


def _splits(programs: int, longest: int, device: torch.device) -> int:
    """Programs that share the keys of a request: enough for every processor, and no more."""
    wanted = -(-_PROGRAMS_PER_PROCESSOR * _processors(device) // programs)
    return max(1, min(wanted, _MOST_SPLITS, -(-longest // _LEAST_KEYS)))


def _tickets(count: int, device: torch.device) -> Tensor:
    """At least `count` tickets for launches on the current stream, which come one after the other."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _tickets_of(triton.next_power_of_2(max(count, _LEAST_TICKETS)), device, stream)


@functools.cache
def _tickets_of(count: int, device: torch.device, stream: int) -> Tensor:
    """Never freed, since graphs hold their address: captured after a batch of their size has been computed, they do not
    zero them."""
    return torch.zeros(count, dtype=torch.int32, device=device)


@functools.cache
def _processors(device: torch.device) -> int:
    """Of a card; of the largest we know where Triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
