# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Tokens grouped by slot in one launch: `groups.sort_tokens` for a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_its_device

_TOKENS = 64
"""Tokens whose places a program finds, by comparing each with all, as many at once: no program waits for another."""
_COMPARISONS = 4096
"""Of tokens or tiles with groups, at once, where there are not more than 256 groups: what registers hold."""


@triton.jit
def _group_of(slot_of_token, token, tokens, slots):
    """The group of each token: its slot + 1. An invalid slot is in the last one, so that its tokens are visited."""
    slot = tl.load(slot_of_token + token, mask=token < tokens, other=0)
    return tl.minimum(tl.maximum(slot, -1), slots - 1) + 1


@triton.jit(do_not_specialize=["tokens", "slots", "tiles"])
def group_by_slot(
    slot_of_token,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    slots,
    tiles,
    TILE_TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The fields of `TokenGroups`. The first programs sort a block of tokens each, the others describe tiles.

    Each of the others counts the tokens of every group for itself.
    """
    program, sorters = tl.program_id(0), tl.cdiv(tokens, TOKENS)
    if program < sorters:
        token = program * TOKENS + tl.arange(0, TOKENS)
        group = _group_of(slot_of_token, token, tokens, slots)
        place = tl.zeros((TOKENS,), dtype=tl.int32)
        for start in range(0, tokens, TOKENS):
            other = start + tl.arange(0, TOKENS)
            others = _group_of(slot_of_token, other, tokens, slots)
            earlier = (others[None, :] == group[:, None]) & (other[None, :] < token[:, None])
            before = (earlier | (others[None, :] < group[:, None])) & (other < tokens)[None, :]
            place += tl.sum(before.to(tl.int32), 1)
        tl.store(order + place, token, mask=token < tokens)
    else:
        groups = tl.arange(0, GROUPS)
        counts = tl.zeros((GROUPS,), dtype=tl.int32)
        for start in range(0, tokens, TILES):
            other = start + tl.arange(0, TILES)
            others = _group_of(slot_of_token, other, tokens, slots)
            same = (others[None, :] == groups[:, None]) & (other < tokens)[None, :]
            counts += tl.sum(same.to(tl.int32), 1)
        needed = (counts + (TILE_TOKENS - 1)) // TILE_TOKENS
        last_tile = tl.cumsum(needed, 0)
        tile = (program - sorters) * TILES + tl.arange(0, TILES)
        # Tiles lie group by group: a tile's group is the first whose last tile comes after it.
        own = (tile[:, None] < last_tile[None, :]) & (tile[:, None] >= (last_tile - needed)[None, :])
        offset = (tile[:, None] - (last_tile - needed)[None, :]) * TILE_TOKENS
        start_of = (tl.cumsum(counts, 0) - counts)[None, :] + offset
        count_of = tl.minimum(counts[None, :] - offset, TILE_TOKENS)
        found = tl.sum(tl.where(own, groups[None, :], 0), 1) - 1
        inside = tile < tiles
        tl.store(tile_slot + tile, found, mask=inside)
        tl.store(tile_start + tile, tl.sum(tl.where(own, start_of, 0), 1), mask=inside)
        tl.store(tile_count + tile, tl.sum(tl.where(own, count_of, 0), 1), mask=inside)


def group_launch(slots: int) -> dict[str, int]:
    """Blocks and warps of a launch for `slots` slots and the base."""
    groups = triton.next_power_of_2(slots + 1)
    return {"GROUPS": groups, "TOKENS": _TOKENS, "TILES": max(16, min(64, _COMPARISONS // groups)), "num_warps": 4}


@on_its_device
def sort_tokens(slot_of_token: Tensor, slots: int, tile_size: int, tiles: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `groups.sort_tokens`."""
    tokens = slot_of_token.shape[0]

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=slot_of_token.device)

    fields = (empty(tokens), empty(tiles), empty(tiles), empty(tiles))
    launch = group_launch(slots)
    group_by_slot[(triton.cdiv(tokens, launch["TOKENS"]) + triton.cdiv(tiles, launch["TILES"]),)](
        slot_of_token.contiguous(),
        *fields,
        tokens,
        slots,
        tiles,
        TILE_TOKENS=tile_size,
        **launch,
    )
    return fields
