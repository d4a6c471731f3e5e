# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Decode: few tokens a slot, bound by the bytes of weights and codes.

One launch holds programs for the base product of all tokens and programs for the delta product of each tile
of tokens that share a slot, so every weight and every code is read from device memory once however the
tokens mix. Programs also split the input channels, since few tokens leave the chip idle otherwise. Each
writes its partial sums to a place of its own and takes a ticket of its block of rows; the one with the last
ticket adds them all, in a fixed order, so that two runs give the same bytes. The programs of a slot's first
channels add what is not read from codes: salient channels, biases, the low-rank part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_delta import add_salient, delta_messages, delta_planes, delta_values
from .triton_low_rank import add_low_rank
from .triton_messages import is_among, is_message, row_words
from .triton_tiles import slot_rows


@triton.jit
def _base_partial(
    x,
    x_stride,
    weight,
    weight_stride,
    bias,
    rows,
    token,
    token_mask,
    split,
    splits,
    in_features,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[BLOCK_OUT, BLOCK_TOKENS]` float32: one split's share of the base product, the first with the bias."""
    per_split = tl.cdiv(tl.cdiv(in_features, BLOCK_K), splits) * BLOCK_K
    first = split * per_split
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    for k_start in range(first, tl.minimum(first + per_split, in_features), BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = (k < in_features)[None, :]
        given = tl.load(x + (token[:, None] * x_stride + k[None, :]), mask=token_mask[:, None] & inside, other=0.0)
        base = tl.load(weight + (rows[:, None] * weight_stride + k[None, :]), mask=inside, other=0.0)
        acc = tl.dot(base, tl.trans(given), acc, input_precision="ieee")
    if HAS_BIAS and split == 0:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    return acc


@triton.jit
def _sum_partials(
    partials,  # pointer to the first row's first partial sum
    y,  # pointer to the first row of the first token
    residual,  # likewise
    added,
    slot_of_token,
    slot_bits,
    tokens,
    slots,
    base_splits,
    delta_splits,
    out_features,
    row_mask,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """y of a block of rows and all tokens, if `added` with `residual`. Tokens whose slot cannot be served come out as
    NaN."""
    rows = tl.arange(0, BLOCK_OUT)
    for start in tl.range(0, tokens, BLOCK_TOKENS, num_stages=1):
        token = start + tl.arange(0, BLOCK_TOKENS)
        token_mask = token < tokens
        slot = tl.load(slot_of_token + token, mask=token_mask, other=-1)
        known = (slot >= 0) & (slot < slots)
        loaded = tl.load(slot_bits + slot, mask=known, other=0) > 0
        parts = base_splits + tl.where(loaded, delta_splits, 0)
        inside = token_mask[:, None] & row_mask[None, :]
        total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
        for part in tl.static_range(MOST_SPLITS):
            place = partials + ((part * tokens + token[:, None]) * out_features + rows[None, :])
            total += tl.load(place, mask=inside & (part < parts)[:, None], other=0.0, cache_modifier=".cg")
        total = tl.where((loaded | (slot == -1))[:, None], total, float("nan"))
        target = token[:, None] * out_features + rows[None, :]
        rounded = total.to(y.dtype.element_ty).to(tl.float32)
        before = tl.load(residual + target, mask=inside & (added > 0), other=0.0).to(tl.float32)
        tl.store(y + target, (rounded + before).to(y.dtype.element_ty), mask=inside)


@triton.jit
def decode_rows(
    row_block,
    program,
    x,
    scaled,
    weight,
    bias,
    y,
    residual,
    partials,
    tickets,
    codes,
    steps,
    bias_delta,
    salient_index,
    salient_value,
    z,
    offsets,
    left,
    slot_bits,
    slot_group,
    slot_rank,
    slot_of_token,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    tiles,
    base_tiles,
    base_splits,
    delta_splits,
    delta_programs,
    launch,
    launches,
    added,
    slots,
    in_features,
    out_features,
    x_stride,
    scaled_stride,
    weight_stride,
    codes_stride,
    steps_stride,
    max_salient,
    max_rank,
    NUMBERS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    MOST_TILES: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    OFFSET_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program of `decode`, for a linear whose tensors and widths are given."""
    row = row_block * BLOCK_OUT
    rows = tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_features - row
    rows = tl.minimum(rows, out_features - row - 1)
    partials += row
    all_base_programs = base_tiles * base_splits
    base_programs = tl.where(launch == 0, all_base_programs, 0)
    is_base = program < base_programs
    tile = tl.where(is_base, 0, program - base_programs) // delta_splits
    if is_base or tl.load(tile_count + tile) > 0:
        if is_base:
            split = program % base_splits
            token = program // base_splits * BASE_TOKENS + tl.arange(0, BASE_TOKENS)
            token_mask = token < tokens
            acc = _base_partial(
                x, x_stride, weight + row.to(tl.int64) * weight_stride, weight_stride, bias + row, rows, token,
                token_mask, split, base_splits, in_features, HAS_BIAS, BLOCK_OUT, BASE_TOKENS, BLOCK_K,
            )  # fmt: skip
            place = partials + ((split * tokens + token[:, None]) * out_features + rows[None, :])
            tl.store(place, tl.trans(acc), mask=token_mask[:, None] & row_mask[None, :])
        else:
            split = (program - base_programs) % delta_splits
            # What were taken out of the loop would be held through all of its inner ones, and spill beside tiles of 16.
            for own in tl.range(tile, tiles, delta_programs, num_stages=1, disable_licm=True):
                count, slot = tl.load(tile_count + own), tl.load(tile_slot + own)
                number = 0
                if (count > 0) & (slot >= 0) & (slot < slots):
                    number = tl.load(slot_bits + slot)
                if is_among(number, NUMBERS):
                    within = tl.arange(0, TILE_TOKENS)
                    token_mask = within < count
                    token = tl.load(order + tl.load(tile_start + own) + within, mask=token_mask, other=0)
                    group_size = tl.load(slot_group + slot)
                    slot_codes = codes + slot_rows(slot, codes_stride, row, row_words(in_features, number))
                    groups = tl.where(group_size > 0, tl.cdiv(in_features, tl.maximum(group_size, 1)), 1)
                    slot_steps = steps + slot_rows(slot, steps_stride, row, groups)
                    # Each kind of code that a launch serves is compiled with its own shifts.
                    acc = tl.zeros((BLOCK_OUT, TILE_TOKENS), dtype=tl.float32)
                    for i in tl.static_range(len(NUMBERS)):
                        if number == NUMBERS[i]:
                            if GROUPED or x.dtype.element_ty == tl.float32:
                                acc = delta_values(
                                    scaled, scaled_stride, token, token_mask, slot_codes, slot_steps, rows, split,
                                    delta_splits, in_features, group_size, NUMBERS[i], GROUPED, EVEN, BLOCK_OUT,
                                    TILE_TOKENS, BLOCK_K,
                                )  # fmt: skip
                            elif is_message(NUMBERS[i]):
                                acc = delta_messages(
                                    scaled, scaled_stride, offsets, token, token_mask, tokens, slot_codes, slot_steps,
                                    rows, split, delta_splits, in_features, NUMBERS[i], EVEN, BLOCK_OUT, TILE_TOKENS,
                                    OFFSET_SPLITS, ASM,
                                )  # fmt: skip
                            else:
                                acc = delta_planes(
                                    scaled, scaled_stride, offsets, token, token_mask, tokens, slot_codes, slot_steps,
                                    rows, split, delta_splits, in_features, NUMBERS[i], EVEN, BLOCK_OUT, TILE_TOKENS,
                                    OFFSET_SPLITS, ASM,
                                )  # fmt: skip
                    if split == 0:
                        acc = add_salient(
                            acc, x, x_stride, token, token_mask, salient_index + slot * max_salient,
                            salient_value + slot_rows(slot, out_features * max_salient, row, max_salient), rows,
                            max_salient,
                        )  # fmt: skip
                        acc += tl.load(bias_delta + slot_rows(slot, out_features, row, 1) + rows)[:, None]
                        if Z_SPLITS > 0:
                            acc = add_low_rank(
                                acc, z, left + slot_rows(slot, out_features * max_rank, row, max_rank), rows, token,
                                token_mask, tokens, tl.load(slot_rank + slot), max_rank, x.dtype.element_ty, Z_SPLITS,
                                BLOCK_RANK,
                            )  # fmt: skip
                    place = partials + (
                        ((base_splits + split) * tokens + token[:, None]) * out_features + rows[None, :]
                    )
                    tl.store(place, tl.trans(acc), mask=token_mask[:, None] & row_mask[None, :])
        every = tl.arange(0, MOST_TILES)
        used = tl.sum((tl.load(tile_count + every, mask=every < tiles, other=0) > 0).to(tl.int32), 0)
        expected = all_base_programs + launches * tl.minimum(used, delta_programs) * delta_splits
        # What all threads have written must lie in memory before one of them takes the ticket.
        tl.debug_barrier()
        if tl.atomic_add(tickets + row_block, 1, sem="acq_rel") == expected - 1:
            _sum_partials(
                partials, y + row, residual + row, added, slot_of_token, slot_bits, tokens, slots, base_splits,
                delta_splits, out_features, row_mask, BLOCK_OUT, 8, MOST_SPLITS,
            )  # fmt: skip
            # Zero again for the next launch, also where this one is replayed from a graph.
            tl.atomic_xchg(tickets + row_block, 0)


UNSPECIALIZED = [
    "tokens", "tiles", "base_tiles", "base_splits", "delta_splits", "delta_programs", "launch", "launches", "added",
]  # fmt: skip
"""Numbers by which no launch is compiled again."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode(
    x,
    scaled,
    weight,
    bias,
    y,
    residual,
    partials,
    tickets,
    codes,
    steps,
    bias_delta,
    salient_index,
    salient_value,
    z,
    offsets,
    left,
    slot_bits,
    slot_group,
    slot_rank,
    slot_of_token,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    tiles,
    base_tiles,
    base_splits,
    delta_splits,
    delta_programs,
    launch,
    launches,
    added,
    slots,
    in_features,
    out_features,
    x_stride,
    scaled_stride,
    weight_stride,
    codes_stride,
    steps_stride,
    max_salient,
    max_rank,
    NUMBERS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    MOST_TILES: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    Z_SPLITS: tl.constexpr,
    OFFSET_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ASM: tl.constexpr,
):
    """y `[tokens, out]`, through partial sums `[base_splits + delta_splits, tokens, out]`, the base's first.

    The first axis of the grid holds the base's tiles and splits, then `delta_programs` times `delta_splits` programs,
    which share the tiles that are in use; the second is the block of rows. So a card, which starts programs in this
    order, has some of either kind at any time: those of the base wait for memory, those of deltas unpack. `scaled` is x
    as its slot's codes want it (`prepare`), or x itself. `tickets`, one for each block of rows, are zero before and
    after.

    A launch serves the slots whose codes have one of NUMBERS. Where a bank holds others, there are `launches` of one
    product, which share partial sums and tickets: the first, 0, multiplies the base, the last program of all adds up.

    If `added`, `residual` `[tokens, out]` is added to y, which is rounded to its type before and after.
    """
    decode_rows(
        tl.program_id(1), tl.program_id(0), x, scaled, weight, bias, y, residual, partials, tickets, codes, steps,
        bias_delta, salient_index, salient_value, z, offsets, left, slot_bits, slot_group, slot_rank, slot_of_token,
        order, tile_slot, tile_start, tile_count, tokens, tiles, base_tiles, base_splits, delta_splits, delta_programs,
        launch, launches, added, slots, in_features, out_features, x_stride, scaled_stride, weight_stride, codes_stride,
        steps_stride, max_salient, max_rank, NUMBERS, GROUPED, EVEN, HAS_BIAS, BASE_TOKENS, TILE_TOKENS, MOST_TILES,
        MOST_SPLITS, BLOCK_OUT, BLOCK_K, Z_SPLITS, OFFSET_SPLITS, BLOCK_RANK, ASM,
    )  # fmt: skip
