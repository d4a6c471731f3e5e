"""The Triton backend: which kernel serves a batch, and its launch. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from . import groups as _groups
from .bank import BankTensors
from .groups import DECODE_TILE, PREFILL_TOKENS, TokenGroups
from .packing import PLANE_WORDS, codes_per_word, to_planes, widths_in, words_per_row
from .prefill_plan import PrefillPlan, Rows, Run, plan_prefill
from .triton_attention import paged_attention as paged_attention
from .triton_decode import decode_partials, reduce_partials
from .triton_device import on_its_device
from .triton_elementwise import rotate as rotate
from .triton_elementwise import silu_product as silu_product
from .triton_low_rank import project
from .triton_merge import merged_linear
from .triton_norm import base_norm as base_norm
from .triton_norm import rms_norm as rms_norm
from .triton_prefill import prefill
from .triton_prompts import prompt_attention as prompt_attention
from .triton_rows import added_row_logits, embedding_rows
from .triton_siblings import (
    Operand,
    SiblingTable,
    project_siblings,
    reduce_siblings,
    sibling_partials,
    sibling_table,
)
from .tuning import launch_settings, merge_tokens, token_bucket

_REDUCE_BLOCK = 256
_ROW_BLOCK = 1024
_TILES_TOGETHER = 8
RANK_BLOCK = 32
"""Rows of R, and columns of L, that a program multiplies at once."""
_PROJECT_CHANNELS = 512
"""Input channels that one program of x·Rᵀ takes at least; not measured on a card yet."""
PROJECT_SPLITS = 8
"""The most programs that share the input channels of one tile."""
PROJECT_OPTIONS = {"num_warps": 4, "num_stages": 3}
_ASM = not triton.knobs.runtime.interpret


@on_its_device
def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups | None = None,
) -> Tensor:
    """As `naive.expert_linear`, for float32, bfloat16 and float16 x."""
    x, weight = _dense(x), _dense(weight)
    y = x.new_empty(x.shape[0], weight.shape[0])
    if not y.numel():
        return y
    slot_of_token = slot_of_token.contiguous()
    bank = _in_planes(bank)
    groups = groups or _groups.group_tokens(slot_of_token, bank.slot_bits.shape[0])
    if groups.plan is not None:
        _by_plan([y], x, [(weight, bias, bank)], groups.plan)
    elif x.shape[0] >= PREFILL_TOKENS:
        _prefill(y, x, weight, bias, bank, slot_of_token, groups)
    else:
        _decode(y, x, weight, bias, bank, slot_of_token, groups)
    return y


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


@on_its_device
def expert_linears(x: Tensor, operands: Sequence[Operand], slot_of_token: Tensor, groups: TokenGroups) -> list[Tensor]:
    """`expert_linear` of each weight, bias and bank with the same x."""
    x = _dense(x)
    operands = [(_dense(weight), bias, _in_planes(bank)) for weight, bias, bank in operands]
    if groups.plan is not None:
        ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight, _, _ in operands]
        _by_plan(ys, x, operands, groups.plan)
        return ys
    if 0 < x.shape[0] < PREFILL_TOKENS:
        return _decode_all(x, operands, slot_of_token.contiguous(), groups)
    return [expert_linear(x, *each, slot_of_token, groups) for each in operands]


def group_tokens(slot_of_token: Tensor, slots: int, runs: Sequence[Run] | None = None) -> TokenGroups:
    """As `groups.group_tokens`. Where the host knows the slots, as `runs`, prefill is planned by them.

    A captured graph must not be: it is replayed with other slots. Raises ValueError or IndexError for `runs` that are
    not those of `slot_of_token`.
    """
    groups = _groups.group_tokens(slot_of_token, slots)
    if runs is None:
        return groups
    return dataclasses.replace(groups, plan=plan_prefill(groups, runs, merge_tokens(slot_of_token.device)))


def _by_plan(ys: Sequence[Tensor], x: Tensor, operands: Sequence[Operand], plan: PrefillPlan) -> None:
    for slot, rows in plan.merged:
        given = x[rows]
        for y, (weight, bias, bank) in zip(ys, operands, strict=True):
            with _target(y, rows) as target:
                merged_linear(target, given, weight, bias, bank, slot, rows_are_whole(x.shape[1], bank.bits))
    for part in plan.parts:
        given, slots = x[part.rows], part.groups.slot_of_token
        if part.decode and len(ys) > 1:
            for y, result in zip(ys, _decode_all(given, operands, slots, part.groups), strict=True):
                y[part.rows] = result
            continue
        serve = _decode if part.decode else _prefill
        for y, (weight, bias, bank) in zip(ys, operands, strict=True):
            with _target(y, part.rows) as target:
                serve(target, given, weight, bias, bank, slots, part.groups)


@contextlib.contextmanager
def _target(y: Tensor, rows: Rows) -> Iterator[Tensor]:
    """Memory for chosen rows of y, which it is copied to unless it is theirs."""
    if isinstance(rows, slice):
        yield y[rows]
        return
    target = y.new_empty(rows.shape[0], y.shape[1])
    yield target
    y.index_copy_(0, rows, target)


def _decode_all(x: Tensor, operands: Sequence[Operand], slot_of_token: Tensor, groups: TokenGroups) -> list[Tensor]:
    """Decode of several linears, in the launches of one where that is possible."""
    if table := sibling_table(operands):
        return _decode_siblings(x, operands, table, slot_of_token, groups)
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight, _, _ in operands]
    for y, each in zip(ys, operands, strict=True):
        _decode(y, x, *each, slot_of_token, groups)
    return ys


def _in_planes(bank: BankTensors) -> BankTensors:
    """The bank with its codes in planes. On a GPU they lie so; only a test mixes backends on one bank."""
    if bank.planes:
        return bank
    if bank.codes.device.type != "cpu":
        raise ValueError("the triton backend reads codes in planes; make the bank with planes=True")
    codes, in_features = bank.codes.clone(), bank.channel_scale.shape[1]
    for own, bits in zip(codes, bank.slot_bits.tolist(), strict=True):
        if bits:
            words = words_per_row(in_features, bits)
            own = own[: bank.bias_delta.shape[1] * words].view(-1, words)
            own.copy_(to_planes(own, bits))
    return BankTensors._make(bank._replace(codes=codes, planes=True))


def rows_are_whole(in_features: int, bits: int) -> bool:
    """Whether rows of any width in a bank of `bits` end with a whole block of planes."""
    return all(in_features % (PLANE_WORDS * codes_per_word(width)) == 0 for width in widths_in(bits))


def project_block(tile_size: int) -> int:
    """Input channels that a program of x·Rᵀ multiplies at once."""
    return 128 if tile_size == DECODE_TILE else 64


def _project_splits(in_features: int, tile_size: int) -> tuple[int, int]:
    """Programs that share the input channels in x·Rᵀ, and channels of each."""
    block_k = project_block(tile_size)
    per_split = max(_PROJECT_CHANNELS, triton.cdiv(triton.cdiv(in_features, PROJECT_SPLITS), block_k) * block_k)
    return triton.cdiv(in_features, per_split), per_split


def _project(x: Tensor, bank: BankTensors, groups: TokenGroups) -> tuple[Tensor, int]:
    """z = x·Rᵀ `[splits, tokens, max_rank]`, to be summed, and `splits`; 0, and no launch, without a low-rank part."""
    (tokens, in_features), max_rank = x.shape, bank.right.shape[1]
    if not max_rank:
        return bank.steps, 0
    splits, per_split = _project_splits(in_features, groups.tile_size)
    z = torch.empty(splits, tokens, max_rank, dtype=torch.float32, device=x.device)
    project[(groups.tile_slot.shape[0], triton.cdiv(max_rank, RANK_BLOCK), splits)](
        x,
        bank.right,
        z,
        bank.slot_rank,
        groups.order,
        groups.tile_slot,
        groups.tile_start,
        groups.tile_count,
        tokens,
        bank.slot_bits.shape[0],
        in_features,
        max_rank,
        x.stride(0),
        per_split,
        TILE_TOKENS=groups.tile_size,
        BLOCK_RANK=RANK_BLOCK,
        BLOCK_K=project_block(groups.tile_size),
        **PROJECT_OPTIONS,
    )
    return z, splits


def _decode(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups,
) -> None:
    tokens, (out_features, in_features), slots = x.shape[0], weight.shape, bank.slot_bits.shape[0]
    settings = launch_settings("decode", out_features, in_features, tokens, x.dtype, x.device, bank.group_size > 0)
    base_tokens = token_bucket(tokens)
    base_tiles = triton.cdiv(tokens, base_tokens)
    z, z_splits = _project(x, bank, groups)
    partials = torch.empty(
        settings.splits + settings.delta_splits, tokens, out_features, dtype=torch.float32, device=x.device
    )
    programs = base_tiles * settings.splits + groups.tile_slot.shape[0] * settings.delta_splits
    grid = (triton.cdiv(out_features, settings.block_out), programs)
    decode_partials[grid](
        x,
        weight,
        partials,
        bank.codes,
        bank.steps,
        bank.channel_scale,
        z,
        bank.left,
        bank.slot_bits,
        bank.slot_group,
        bank.slot_rank,
        groups.order,
        groups.tile_slot,
        groups.tile_start,
        groups.tile_count,
        tokens,
        base_tiles,
        settings.splits,
        settings.delta_splits,
        slots,
        in_features,
        out_features,
        x.stride(0),
        weight.stride(0),
        bank.codes.stride(0),
        bank.steps.stride(0),
        bank.left.shape[2],
        WIDTHS=widths_in(bank.bits),
        GROUPED=bank.group_size > 0,
        SCALED=bank.scaled,
        EVEN=rows_are_whole(in_features, bank.bits),
        BASE_TOKENS=base_tokens,
        TILE_TOKENS=groups.tile_size,
        BLOCK_OUT=settings.block_out,
        BLOCK_K=settings.block_k,
        Z_SPLITS=z_splits,
        BLOCK_RANK=RANK_BLOCK,
        ASM=_ASM,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    reduce_partials[(tokens, triton.cdiv(out_features, _REDUCE_BLOCK))](
        partials,
        y,
        x,
        x if bias is None else bias,
        bank.bias_delta,
        bank.salient_index,
        bank.salient_value,
        slot_of_token,
        bank.slot_bits,
        tokens,
        slots,
        in_features,
        out_features,
        x.stride(0),
        bank.salient_index.shape[1],
        settings.splits,
        settings.delta_splits,
        HAS_BIAS=bias is not None,
        BLOCK=_REDUCE_BLOCK,
        num_warps=2,
    )


def _decode_siblings(
    x: Tensor, operands: Sequence[Operand], siblings: SiblingTable, slot_of_token: Tensor, groups: TokenGroups
) -> list[Tensor]:
    (tokens, in_features), slots = x.shape, groups.slots
    settings = launch_settings("decode", siblings.total, in_features, tokens, x.dtype, x.device, siblings.grouped)
    parts, like = len(siblings.outs), operands[0][2].left
    base_tokens = token_bucket(tokens)
    base_tiles = triton.cdiv(tokens, base_tokens)
    splits, per_split = _project_splits(in_features, groups.tile_size) if siblings.most_rank else (0, 0)
    tiles = (groups.order, groups.tile_slot, groups.tile_start, groups.tile_count)
    z = x
    if splits:
        z = torch.empty(parts, splits, tokens, siblings.most_rank, dtype=torch.float32, device=x.device)
        project_siblings[(groups.tile_slot.shape[0], triton.cdiv(siblings.most_rank, RANK_BLOCK), parts * splits)](
            siblings.table,
            like,
            x,
            z,
            *tiles,
            tokens,
            slots,
            in_features,
            siblings.most_rank,
            x.stride(0),
            per_split,
            SPLITS=splits,
            TILE_TOKENS=groups.tile_size,
            BLOCK_RANK=RANK_BLOCK,
            BLOCK_K=project_block(groups.tile_size),
            **PROJECT_OPTIONS,
        )
    sums = settings.splits + settings.delta_splits
    partials = torch.empty(sums * tokens * siblings.total, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens * siblings.total, dtype=x.dtype, device=x.device)
    programs = base_tiles * settings.splits + groups.tile_slot.shape[0] * settings.delta_splits
    sibling_partials[(triton.cdiv(max(siblings.outs), settings.block_out), programs, parts)](
        siblings.table,
        like,
        x,
        partials,
        z,
        *tiles,
        tokens,
        base_tiles,
        settings.splits,
        settings.delta_splits,
        slots,
        in_features,
        x.stride(0),
        siblings.most_rank,
        WIDTHS=widths_in(siblings.bits),
        GROUPED=siblings.grouped,
        SCALED=siblings.scaled,
        EVEN=rows_are_whole(in_features, siblings.bits),
        BASE_TOKENS=base_tokens,
        TILE_TOKENS=groups.tile_size,
        BLOCK_OUT=settings.block_out,
        BLOCK_K=settings.block_k,
        Z_SPLITS=splits,
        BLOCK_RANK=RANK_BLOCK,
        ASM=_ASM,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    reduce_siblings[(tokens, triton.cdiv(max(siblings.outs), _REDUCE_BLOCK), parts)](
        siblings.table,
        like,
        partials,
        y,
        x,
        slot_of_token,
        tokens,
        slots,
        in_features,
        x.stride(0),
        settings.splits,
        settings.delta_splits,
        HAS_BIAS=operands[0][1] is not None,
        BLOCK=_REDUCE_BLOCK,
        num_warps=2,
    )
    each = torch.split(y, [tokens * out for out in siblings.outs])
    return [part.view(tokens, out) for part, out in zip(each, siblings.outs, strict=True)]


def _prefill(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups,
) -> None:
    out_features, in_features = weight.shape
    settings = launch_settings("prefill", out_features, in_features, x.shape[0], x.dtype, x.device, bank.group_size > 0)
    tiles = groups.tile_slot.shape[0]
    z, z_splits = _project(x, bank, groups)
    if z_splits > 1:
        # Summed in the kernel, as decode does, the splits of a large tile would not fit its registers.
        z, z_splits = z.sum(0), 1
    prefill[(tiles * triton.cdiv(out_features, settings.block_out),)](
        x,
        weight,
        x if bias is None else bias,
        y,
        bank.codes,
        bank.steps,
        bank.channel_scale,
        bank.bias_delta,
        bank.salient_index,
        bank.salient_value,
        z,
        bank.left,
        bank.slot_bits,
        bank.slot_group,
        bank.slot_rank,
        slot_of_token,
        groups.order,
        groups.tile_slot,
        groups.tile_start,
        groups.tile_count,
        x.shape[0],
        tiles,
        bank.slot_bits.shape[0],
        in_features,
        out_features,
        x.stride(0),
        weight.stride(0),
        bank.codes.stride(0),
        bank.steps.stride(0),
        bank.salient_index.shape[1],
        bank.left.shape[2],
        WIDTHS=widths_in(bank.bits),
        GROUPED=bank.group_size > 0,
        EVEN=rows_are_whole(in_features, bank.bits),
        HAS_BIAS=bias is not None,
        TILE_TOKENS=groups.tile_size,
        BLOCK_OUT=settings.block_out,
        BLOCK_K=settings.block_k,
        TILES_TOGETHER=_TILES_TOGETHER,
        Z_SPLITS=z_splits,
        BLOCK_RANK=RANK_BLOCK,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )


@on_its_device
def expert_embedding(
    ids: Tensor, weight: Tensor, bank: BankTensors, added_rows: Tensor, slot_of_token: Tensor
) -> Tensor:
    """As `naive.expert_embedding`."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    vocab, hidden = weight.shape
    y = weight.new_empty(ids.shape[0], hidden)
    if not y.numel():
        return y
    bank = _in_planes(bank)
    embedding_rows[(ids.shape[0], triton.cdiv(hidden, _ROW_BLOCK))](
        ids.contiguous(),
        weight,
        y,
        bank.codes,
        bank.steps,
        bank.channel_scale,
        bank.salient_index,
        bank.salient_value,
        added_rows,
        bank.slot_bits,
        bank.slot_group,
        slot_of_token.contiguous(),
        bank.slot_bits.shape[0],
        hidden,
        vocab,
        bank.salient_index.shape[1],
        added_rows.shape[1],
        weight.stride(0),
        bank.codes.stride(0),
        bank.steps.stride(0),
        BLOCK=_ROW_BLOCK,
    )
    return y


@on_its_device
def added_logits(x: Tensor, added_rows: Tensor, added_counts: Tensor, slot_of_token: Tensor) -> Tensor:
    """As `naive.added_logits`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    slots, max_added, hidden = added_rows.shape
    y = x.new_empty(x.shape[0], max_added)
    if not y.numel():
        return y
    added_row_logits[(x.shape[0], max_added)](
        x,
        added_rows,
        added_counts,
        y,
        slot_of_token.contiguous(),
        slots,
        max_added,
        hidden,
        x.stride(0),
        BLOCK=_ROW_BLOCK,
    )
    return y
