# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Attention of prompts over a paged cache and over themselves, all prompts of a batch in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .triton_attention import cache_rows, capped
from .triton_device import on_its_device

_LEAST_ROWS = 16
_WRITTEN = 16
"""Tokens whose keys and values a program writes."""


@triton.jit
def _find(prompts, block, TOKENS: tl.constexpr):
    """The prompt that a block of `TOKENS` neighbouring tokens belongs to, and the block's number in it."""
    prompt = 0
    blocks = tl.cdiv(tl.load(prompts + 1), TOKENS)
    while block >= blocks:
        block -= blocks
        prompt += 1
        blocks = tl.cdiv(tl.load(prompts + prompt * 4 + 1), TOKENS)
    return prompts + prompt * 4, block * TOKENS


@triton.jit
def _attended(q, keys, values, allowed, maximum, total, result, scale, softcap, CAPPED: tl.constexpr):
    scores = capped(tl.dot(q, tl.trans(keys), input_precision="ieee") * scale, softcap, CAPPED)
    scores = tl.where(allowed, scores, float("-inf"))
    larger = tl.maximum(maximum, tl.max(scores, 1))
    against = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see none of these keys
    shrink = tl.exp(maximum - against)
    weights = tl.exp(scores - against[:, None])
    product = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return larger, total * shrink + tl.sum(weights, 1), result * shrink[:, None] + product


@triton.jit
def prompt_pages(
    query,
    key,
    value,
    key_cache,
    value_cache,
    out,
    tables,
    prompts,
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
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """One key head, and a block of queries of one prompt: first the keys in the cache, then the prompt's own."""
    head = tl.program_id(0)
    prompt, begin = _find(prompts, tl.program_id(1), QUERIES)
    first, count, past = tl.load(prompt), tl.load(prompt + 1), tl.load(prompt + 2)
    table = tables + tl.load(prompt + 3) * table_stride
    row, column = tl.arange(0, QUERIES * PADDED), tl.arange(0, WIDTH)
    own = begin + row // PADDED
    of_row, of_width = (own < count) & (row % PADDED < SHARED), column < width
    mask = of_row[:, None] & of_width[None, :]
    place = (head * SHARED + row % PADDED)[:, None] * query_head + (first + own)[:, None] * query_token
    q = tl.load(query + place + column[None, :], mask=mask, other=0.0)
    maximum = tl.full([QUERIES * PADDED], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * PADDED], tl.float32)
    result = tl.zeros([QUERIES * PADDED, WIDTH], tl.float32)

    low = tl.maximum(past + begin + 1 - window, 0) if WINDOWED else 0
    for start in range(low, past, KEYS):
        position = start + tl.arange(0, KEYS)
        inside = position < past
        rows = cache_rows(table, position, inside, window, WINDOWED, PAGE) * cache_row + head * cache_head
        read = inside[:, None] & of_width[None, :]
        keys = tl.load(key_cache + rows[:, None] + column[None, :], mask=read, other=0.0)
        values = tl.load(value_cache + rows[:, None] + column[None, :], mask=read, other=0.0)
        allowed = inside[None, :]
        if WINDOWED:
            allowed = allowed & (position[None, :] > (past + own)[:, None] - window)
        maximum, total, result = _attended(
            q, keys, values, allowed, maximum, total, result, scale, softcap, CAPPED=CAPPED
        )

    low = tl.maximum(begin + 1 - window, 0) if WINDOWED else 0
    for start in range(low, tl.minimum(begin + QUERIES, count), KEYS):
        other = start + tl.arange(0, KEYS)
        read = (other < count)[:, None] & of_width[None, :]
        token = (first + other)[:, None]
        keys = tl.load(key + head * key_head + token * key_token + column[None, :], mask=read, other=0.0)
        values = tl.load(value + head * value_head + token * value_token + column[None, :], mask=read, other=0.0)
        allowed = other[None, :] <= own[:, None]
        if WINDOWED:
            allowed = allowed & (other[None, :] > own[:, None] - window)
        maximum, total, result = _attended(
            q, keys, values, allowed, maximum, total, result, scale, softcap, CAPPED=CAPPED
        )

    heads = tl.num_programs(0) * SHARED
    target = ((first + own) * heads + head * SHARED + row % PADDED) * width
    result = result / total[:, None]
    tl.store(out + target[:, None] + column[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def write_prompts(
    key,
    value,
    key_cache,
    value_cache,
    tables,
    prompts,
    key_head,
    key_token,
    value_head,
    value_token,
    cache_row,
    cache_head,
    table_stride,
    window,
    width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One key head, and a block of tokens of one prompt; of more than a window holds, the last."""
    head = tl.program_id(0)
    prompt, begin = _find(prompts, tl.program_id(1), TOKENS)
    first, count, past = tl.load(prompt), tl.load(prompt + 1), tl.load(prompt + 2)
    table = tables + tl.load(prompt + 3) * table_stride
    own, column = begin + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    written = own < count
    if WINDOWED:
        written = written & (own >= count - window)
    rows = cache_rows(table, past + own, written, window, WINDOWED, PAGE) * cache_row + head * cache_head
    mask, token = written[:, None] & (column < width)[None, :], (first + own)[:, None]
    keys = tl.load(key + head * key_head + token * key_token + column[None, :], mask=mask, other=0.0)
    values = tl.load(value + head * value_head + token * value_token + column[None, :], mask=mask, other=0.0)
    tl.store(key_cache + rows[:, None] + column[None, :], keys, mask=mask)
    tl.store(value_cache + rows[:, None] + column[None, :], values, mask=mask)


@on_its_device
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
    """As `naive.prompt_attention`, for float32, bfloat16 and float16. Nothing waits for the device."""
    query, key, value = (item if item.stride(2) == 1 else item.contiguous() for item in (query, key, value))
    (heads, _, width), key_heads = query.shape, key.shape[0]
    shared, padded = heads // key_heads, max(_LEAST_ROWS, triton.next_power_of_2(width))
    rows, keys, warps = _block(padded, query.element_size(), bool(softcap))
    packed = triton.next_power_of_2(shared)
    queries = max(1, rows // packed)
    common = {"WIDTH": padded, "PAGE": page_size, "WINDOWED": window is not None}
    prompt_pages[(key_heads, sum(triton.cdiv(count, queries) for count in counts))](
        query,
        key,
        value,
        key_cache,
        value_cache,
        out,
        tables,
        prompts,
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
        SHARED=shared,
        PADDED=packed,
        QUERIES=queries,
        KEYS=keys,
        CAPPED=bool(softcap),
        num_warps=warps,
        num_stages=2,
        **common,
    )
    write_prompts[(key_heads, sum(triton.cdiv(count, _WRITTEN) for count in counts))](
        key,
        value,
        key_cache,
        value_cache,
        tables,
        prompts,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        tables.stride(0),
        window or 0,
        width,
        TOKENS=_WRITTEN,
        num_warps=4,
        **common,
    )


def _block(width: int, itemsize: int, capped: bool) -> tuple[int, int, int]:
    """Rows of queries and keys that a program multiplies at once, and its warps: what fits the registers of sm_80 and
    sm_90 as compiled; not measured on a card yet."""
    if itemsize == 4:
        return (32, 16, 8) if width > 64 else (64, 32, 8)
    if width > 128:
        return 64, 32, 8
    return 128, 32 if capped else 64, 8
