# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""What a decoder layer does between its linears: positions turned into queries and keys, the gate of an MLP.

Each is one launch for what transformers computes with two to twelve, and rounds where they round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_its_device

_HEADS = 8
"""Heads that a program turns."""
_BLOCK = 1024
"""Elements of a gate that a program takes."""


@triton.jit
def _turn(
    x,
    y,
    cos,
    sin,
    x_head,
    x_token,
    y_head,
    y_token,
    heads,
    first,
    token,
    width,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Heads `first` and up of one token: y = x·cos + (-second half, first half)·sin."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    head, k = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    half = width // 2
    given = (head < heads)[:, None] & (k < half)[None, :]
    x += token * x_token
    place = head[:, None] * x_head + k[None, :]
    low = tl.load(x + place, mask=given, other=0.0).to(tl.float32)
    high = tl.load(x + place + half, mask=given, other=0.0).to(tl.float32)
    inside = k < half
    at = token * width + k
    cos_low = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + at + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + at + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    own_low = (low * cos_low).to(DTYPE).to(tl.float32) + (-high * sin_low).to(DTYPE).to(tl.float32)
    own_high = (high * cos_high).to(DTYPE).to(tl.float32) + (low * sin_high).to(DTYPE).to(tl.float32)
    y += token * y_token
    place = head[:, None] * y_head + k[None, :]
    tl.store(y + place, own_low.to(DTYPE), mask=given)
    tl.store(y + place + half, own_high.to(DTYPE), mask=given)


@triton.jit
def turn_heads(
    query,
    key,
    new_query,
    new_key,
    cos,
    sin,
    query_heads,
    key_heads,
    width,
    query_head,
    query_token,
    key_head,
    key_token,
    new_query_head,
    new_query_token,
    new_key_head,
    new_key_token,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotary position embedding of some heads of one token: of the query's in the first programs, then of the key's."""
    token, block, of_query = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.cdiv(query_heads, HEADS)
    if block < of_query:
        _turn(
            query, new_query, cos, sin, query_head, query_token, new_query_head, new_query_token,
            query_heads, block * HEADS, token, width, HEADS, HALF,
        )  # fmt: skip
    else:
        _turn(
            key, new_key, cos, sin, key_head, key_token, new_key_head, new_key_token,
            key_heads, (block - of_query) * HEADS, token, width, HEADS, HALF,
        )  # fmt: skip


@on_its_device
def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key `[1, heads, tokens, width]` turned by `cos` and `sin` `[1, tokens, width]`, contiguous.

    x·cos + (-second half of x, first half)·sin, each product rounded to the type of x, as transformers' own.
    """
    (_, query_heads, tokens, width), key_heads = query.shape, key.shape[1]
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    new_query, new_key = torch.empty_like(query), torch.empty_like(key)
    if not query.numel():
        return new_query, new_key
    turn_heads[(tokens, triton.cdiv(query_heads, _HEADS) + triton.cdiv(key_heads, _HEADS))](
        query,
        key,
        new_query,
        new_key,
        cos.contiguous(),
        sin.contiguous(),
        query_heads,
        key_heads,
        width,
        query.stride(1),
        query.stride(2),
        key.stride(1),
        key.stride(2),
        new_query.stride(1),
        new_query.stride(2),
        new_key.stride(1),
        new_key.stride(2),
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(width // 2),
        num_warps=2,
    )
    return new_query, new_key


@triton.jit
def gate_rows(gate, up, y, size, BLOCK: tl.constexpr):
    """y = silu(gate)·up, silu(gate) rounded first."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    opened = (value / (1.0 + tl.exp(-value))).to(y.dtype.element_ty).to(tl.float32)
    given = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (opened * given).to(y.dtype.element_ty), mask=inside)


@on_its_device
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, elementwise; silu(gate) is rounded to the type of gate first, as transformers' own is."""
    gate, up = gate.contiguous(), up.contiguous()
    y = gate.new_empty(gate.shape)
    if y.numel():
        gate_rows[(triton.cdiv(y.numel(), _BLOCK),)](gate, up, y, y.numel(), BLOCK=_BLOCK, num_warps=4)
    return y
