"""The Triton backend: which kernel serves a batch, and its launch. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import codeless
from . import groups as _groups
from .bank import BankTensors
from .groups import PREFILL_TOKENS, TokenGroups
from .packing import PLANE_WORDS, codes_per_word, to_planes, widths_in, words_per_row
from .prefill_plan import PrefillPlan, Rows, Run, plan_prefill
from .triton_attention import paged_attention as paged_attention
from .triton_decode import decode
from .triton_device import on_its_device
from .triton_elementwise import rotate as rotate
from .triton_elementwise import silu_product as silu_product
from .triton_low_rank import prepare
from .triton_merge import merged_at_once, merged_linear, merged_linears
from .triton_norm import base_norm as base_norm
from .triton_norm import rms_norm as rms_norm
from .triton_prefill import prefill
from .triton_prompts import prompt_attention as prompt_attention
from .triton_rows import added_row_logits, embedding_rows
from .triton_siblings import (
    Operand,
    SiblingTable,
    decode_siblings,
    prepare_siblings,
    sibling_table,
)
from .tuning import LaunchSettings, launch_settings, merge_tokens, token_bucket

_ROW_BLOCK = 1024
_TILES_TOGETHER = 8
_PREPARE_CHANNELS = 512
"""Input channels that one program of x·Rᵀ takes at least; not measured on a card yet."""
PREPARE_SPLITS = 8
"""The most programs that share the input channels of one tile."""
PREPARE_OPTIONS = {"num_warps": 4, "num_stages": 3}
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
    if not bank.bits:
        return codeless.expert_linear(x, weight, bias, bank, slot_of_token)
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
    if not all(bank.bits for _, _, bank in operands):
        return [expert_linear(x, *each, slot_of_token, groups) for each in operands]
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
    siblings = sibling_table(operands) if len(operands) > 1 else None
    for slot, rows in plan.merged:
        given = x[rows]
        if siblings and slot >= 0 and merged_at_once(siblings, x):
            with contextlib.ExitStack() as stack:
                targets = [stack.enter_context(_target(y, rows)) for y in ys]
                merged_linears(targets, given, operands, siblings, slot, rows_are_whole(x.shape[1], siblings.bits))
            continue
        for y, (weight, bias, bank) in zip(ys, operands, strict=True):
            with _target(y, rows) as target:
                merged_linear(target, given, weight, bias, bank, slot, rows_are_whole(x.shape[1], bank.bits))
    for part in plan.parts:
        given, slots = x[part.rows], part.groups.slot_of_token
        if len(ys) > 1:
            for y, result in zip(ys, _decode_all(given, operands, slots, part.groups), strict=True):
                y[part.rows] = result
            continue
        ((weight, bias, bank),) = operands
        with _target(ys[0], part.rows) as target:
            _decode(target, given, weight, bias, bank, slots, part.groups)


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


def rank_block(max_rank: int) -> int:
    """Rows of R, and columns of L, that a program multiplies at once."""
    return 16 if max_rank <= 16 else 32


def prepare_block(tile_size: int) -> int:
    """Input channels that a program of x·Rᵀ multiplies at once."""
    return 128 if tile_size <= 16 else 64


def _prepare_splits(in_features: int, tile_size: int) -> tuple[int, int]:
    """Programs that share the input channels of x·Rᵀ, and channels of each."""
    block_k = prepare_block(tile_size)
    per_split = max(_PREPARE_CHANNELS, triton.cdiv(triton.cdiv(in_features, PREPARE_SPLITS), block_k) * block_k)
    return triton.cdiv(in_features, per_split), per_split


def _prepare(x: Tensor, bank: BankTensors, groups: TokenGroups, scaling: bool) -> tuple[Tensor, Tensor, int]:
    """x times channel scales, z = x·Rᵀ `[splits, tokens, max_rank]`, to be summed, and `splits`.

    Scales are multiplied in where `scaling`, and the bank has any; 0 splits, and no z, without a low-rank part.
    """
    (tokens, in_features), max_rank = x.shape, bank.right.shape[1]
    scaling = scaling and bank.scaled
    if not max_rank and not scaling:
        return x, bank.steps, 0
    splits, per_split = _prepare_splits(in_features, groups.tile_size)
    scaled = x.new_empty(tokens, in_features) if scaling else x
    z = torch.empty(splits, tokens, max_rank, dtype=torch.float32, device=x.device)
    prepare[(groups.tile_slot.shape[0], max(1, triton.cdiv(max_rank, rank_block(max_rank))), splits)](
        x,
        bank.channel_scale,
        bank.right,
        scaled,
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
        SCALED=scaling,
        RANKED=max_rank > 0,
        TILE_TOKENS=groups.tile_size,
        BLOCK_RANK=rank_block(max_rank),
        BLOCK_K=prepare_block(groups.tile_size),
        **PREPARE_OPTIONS,
    )
    return scaled, z, splits if max_rank else 0


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a decode launch is made of, apart from tensors."""

    settings: LaunchSettings
    base_tiles: int
    tiles: int
    constants: dict[str, Any]

    @classmethod
    def of(
        cls, x: Tensor, groups: TokenGroups, out_features: int, bits: int, max_rank: int, *, grouped: bool, biased: bool
    ) -> _Shape:
        tokens, in_features = x.shape
        settings = launch_settings("decode", out_features, in_features, tokens, x.dtype, x.device, grouped)
        base_tokens, tiles = token_bucket(tokens), groups.tile_slot.shape[0]
        constants = {
            "WIDTHS": widths_in(bits),
            "GROUPED": grouped,
            "EVEN": rows_are_whole(in_features, bits),
            "HAS_BIAS": biased,
            "BASE_TOKENS": base_tokens,
            "TILE_TOKENS": groups.tile_size,
            # The same for batches of most sizes, since each value is a kernel of its own to compile.
            "MOST_TILES": max(64, triton.next_power_of_2(tiles)),
            "MOST_SPLITS": max(4, triton.next_power_of_2(settings.splits + settings.delta_splits)),
            "BLOCK_OUT": settings.block_out,
            "BLOCK_K": settings.block_k,
            "BLOCK_RANK": rank_block(max_rank),
            "ASM": _ASM,
            "num_warps": settings.num_warps,
            "num_stages": settings.num_stages,
        }
        return cls(settings, triton.cdiv(tokens, base_tokens), tiles, constants)

    @property
    def delta_programs(self) -> int:
        """Programs that share the tiles of tokens, for each split."""
        return min(self.tiles, self.settings.delta_programs)

    @property
    def programs(self) -> int:
        """Programs of a block of rows."""
        return self.base_tiles * self.settings.splits + self.delta_programs * self.settings.delta_splits

    @property
    def sums(self) -> int:
        """Partial sums of an output."""
        return self.settings.splits + self.settings.delta_splits

    @property
    def counts(self) -> tuple[int, ...]:
        """The kernel's numbers from `tiles` on."""
        settings = self.settings
        return self.tiles, self.base_tiles, settings.splits, settings.delta_splits, self.delta_programs


def _decode(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups,
) -> None:
    tokens, (out_features, in_features) = x.shape[0], weight.shape
    shape = _Shape.of(
        x, groups, out_features, bank.bits, bank.left.shape[2], grouped=bank.group_size > 0, biased=bias is not None
    )
    scaled, z, z_splits = _prepare(x, bank, groups, scaling=True)
    partials = torch.empty(shape.sums, tokens, out_features, dtype=torch.float32, device=x.device)
    decode[(triton.cdiv(out_features, shape.settings.block_out), shape.programs)](
        x,
        scaled,
        weight,
        x if bias is None else bias,
        y,
        partials,
        bank.tickets,
        bank.codes,
        bank.steps,
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
        tokens,
        *shape.counts,
        bank.slot_bits.shape[0],
        in_features,
        out_features,
        x.stride(0),
        scaled.stride(0),
        weight.stride(0),
        bank.codes.stride(0),
        bank.steps.stride(0),
        bank.salient_index.shape[1],
        bank.left.shape[2],
        Z_SPLITS=z_splits,
        **shape.constants,
    )


def _decode_siblings(
    x: Tensor, operands: Sequence[Operand], siblings: SiblingTable, slot_of_token: Tensor, groups: TokenGroups
) -> list[Tensor]:
    (tokens, in_features), slots = x.shape, groups.slots
    shape = _Shape.of(
        x,
        groups,
        siblings.total,
        siblings.bits,
        siblings.most_rank,
        grouped=siblings.grouped,
        biased=operands[0][1] is not None,
    )
    parts, like = len(siblings.outs), operands[0][2].left
    tiles = (groups.order, groups.tile_slot, groups.tile_start, groups.tile_count)
    splits, scaled, z = 0, x, x
    if siblings.most_rank or siblings.scaled:
        splits, per_split = _prepare_splits(in_features, groups.tile_size)
        z = torch.empty(parts, splits, tokens, siblings.most_rank, dtype=torch.float32, device=x.device)
        if siblings.scaled:
            scaled = x.new_empty(parts * tokens, in_features)
        block = rank_block(siblings.most_rank)
        prepare_siblings[(tiles[1].shape[0], max(1, triton.cdiv(siblings.most_rank, block)), parts * splits)](
            siblings.table,
            like,
            x,
            scaled,
            z,
            *tiles,
            tokens,
            slots,
            in_features,
            siblings.most_rank,
            x.stride(0),
            per_split,
            SPLITS=splits,
            SCALED=siblings.scaled,
            RANKED=siblings.most_rank > 0,
            TILE_TOKENS=groups.tile_size,
            BLOCK_RANK=block,
            BLOCK_K=prepare_block(groups.tile_size),
            **PREPARE_OPTIONS,
        )
    partials = torch.empty(shape.sums * tokens * siblings.total, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens * siblings.total, dtype=x.dtype, device=x.device)
    decode_siblings[(triton.cdiv(max(siblings.outs), shape.settings.block_out), shape.programs, parts)](
        siblings.table,
        like,
        x,
        scaled,
        y,
        partials,
        z,
        slot_of_token,
        *tiles,
        tokens,
        *shape.counts,
        slots,
        in_features,
        x.stride(0),
        scaled.stride(0),
        siblings.most_rank,
        SCALED=siblings.scaled,
        Z_SPLITS=splits if siblings.most_rank else 0,
        **shape.constants,
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
    _, z, z_splits = _prepare(x, bank, groups, scaling=False)
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
        BLOCK_RANK=rank_block(bank.left.shape[2]),
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
    if not bank.bits:
        return codeless.expert_embedding(ids, weight, bank, added_rows, slot_of_token)
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
    if bank.right.shape[1]:
        y += codeless.low_rank_rows(ids, vocab, bank, slot_of_token).to(y.dtype)
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
