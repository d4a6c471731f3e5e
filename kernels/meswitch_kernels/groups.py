"""Tokens sorted by expert slot: made once per step on the device, read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dispatch import default_backend

if TYPE_CHECKING:
    from .prefill_plan import PrefillPlan

DECODE_TILES = ((17, 16), (0, 8))
"""(tokens from, tile size) of the decode kernel: 8 is the smallest a tensor core takes, and unpacks a weight for fewest
instructions; 16 unpacks half as often where one slot has many tokens."""


@dataclass(frozen=True)
class TokenGroups:
    """How the tokens of one step fall into slots. Every shape follows from tokens and slots alone.

    `order` int32 `[tokens]` lists the tokens group by group. A tile is up to `tile_size` neighbours in that
    order that share a slot: `tile_slot`, `tile_start` (a place in `order`) and `tile_count`, int32 `[tiles]`;
    tiles that are not needed have count 0. `slot_of_token` int32 `[tokens]` is what it was made from. `plan` shares the
    tokens between kernels, where the host knew their slots.
    """

    slot_of_token: Tensor
    order: Tensor
    tile_slot: Tensor
    tile_start: Tensor
    tile_count: Tensor
    tile_size: int
    slots: int
    plan: PrefillPlan | None = None


def tile_size_for(tokens: int) -> int:
    """Tokens per tile, from the number of tokens alone, so that a captured graph keeps its launch shape."""
    return next(size for least, size in DECODE_TILES if tokens >= least)


def max_tiles(tokens: int, slots: int, tile_size: int) -> int:
    """The most tiles that `tokens` tokens over `slots` slots and the base can need."""
    groups = min(slots + 1, tokens)
    return groups + (tokens - groups) // tile_size


def group_tokens(slot_of_token: Tensor, slots: int, tile_size: int | None = None) -> TokenGroups:
    """Group `slot_of_token` (int32 `[tokens]`, -1 for the base) by slot.

    Device operations of fixed shape only: nothing waits for the device, so it can be captured in a graph.
    Raises TypeError or ValueError for a tensor of another kind, and IndexError for a slot outside
    [-1, slots) where the tensor is on the CPU; on another device such tokens come out as NaN.
    """
    check_slot_tensor(slot_of_token)
    tokens = len(slot_of_token)
    tile_size = tile_size or tile_size_for(tokens)
    if tokens == 0:
        none = torch.zeros(0, dtype=torch.int32, device=slot_of_token.device)
        return TokenGroups(slot_of_token, none, none, none, none, tile_size, slots)
    if slot_of_token.device.type == "cpu":
        low, high = (int(value) for value in torch.aminmax(slot_of_token))
        if low < -1 or high >= slots:
            raise IndexError(f"slot_of_token spans {low} to {high}; the slots are -1 (base) to {slots - 1}")
    tiles = max_tiles(tokens, slots, tile_size)
    if default_backend(slot_of_token.device.type) == "triton":
        from .triton_groups import sort_tokens as sort
    else:
        sort = sort_tokens
    return TokenGroups(slot_of_token, *sort(slot_of_token, slots, tile_size, tiles), tile_size, slots)


def sort_tokens(slot_of_token: Tensor, slots: int, tile_size: int, tiles: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`order`, `tile_slot`, `tile_start` and `tile_count` of `TokenGroups`, for `tiles` tiles."""
    # An invalid slot stays in the last group so that its tokens are still visited (and poisoned).
    group_of_token = (slot_of_token + 1).clamp(0, slots)
    order = torch.sort(group_of_token, stable=True).indices.to(torch.int32)
    counts = torch.zeros(slots + 1, dtype=torch.int32, device=slot_of_token.device)
    counts.index_add_(0, group_of_token, torch.ones_like(slot_of_token))
    starts = torch.cumsum(counts, 0) - counts
    tiles_of_group = (counts + (tile_size - 1)) // tile_size
    last_tile = torch.cumsum(tiles_of_group, 0)
    tile = torch.arange(tiles, device=slot_of_token.device)
    group = torch.searchsorted(last_tile, tile, right=True)
    used = group <= slots
    group = group.clamp(max=slots)
    offset = (tile - (last_tile - tiles_of_group)[group]) * tile_size
    tile_slot = torch.where(used, group - 1, -1)
    tile_start = torch.where(used, starts[group] + offset, 0)
    tile_count = torch.where(used, (counts[group] - offset).clamp(max=tile_size), 0)
    return order, tile_slot.to(torch.int32), tile_start.to(torch.int32), tile_count.to(torch.int32)


def check_slot_tensor(slot_of_token: Tensor) -> None:
    """Raise where `slot_of_token` is not a one-dimensional int32 tensor."""
    if slot_of_token.dtype != torch.int32:
        raise TypeError(f"slot_of_token is {slot_of_token.dtype}; expected torch.int32")
    if slot_of_token.ndim != 1:
        raise ValueError(f"slot_of_token has shape {tuple(slot_of_token.shape)}; expected [tokens]")


def check_slots(slot_of_token: Tensor, loaded: Sequence[object]) -> None:
    """Raise IndexError where a slot is outside [-1, slots), ValueError where `loaded[slot]` is false.

    Slots on another device than the CPU are not looked at, since that would wait for the device; the kernels
    answer such tokens with NaN.
    """
    if slot_of_token.device.type != "cpu":
        return
    for slot in set(slot_of_token.tolist()):
        if not -1 <= slot < len(loaded):
            raise IndexError(f"slot_of_token holds {slot}; the slots are -1 (base) to {len(loaded) - 1}")
        if slot >= 0 and not loaded[slot]:
            raise ValueError(f"slot_of_token holds {slot}, which is empty")
