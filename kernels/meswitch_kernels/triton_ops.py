"""The Triton backend: which kernel serves a batch, and its launch. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import triton
from torch import Tensor

from . import codeless
from . import groups as _groups
from .bank import BankTensors
from .groups import TokenGroups
from .messages import FIRST_NUMBER
from .packing import to_planes, words_per_row
from .prefill_plan import PrefillPlan, Rows, Run, plan_prefill, plan_unknown
from .triton_attention import paged_attention as paged_attention
from .triton_device import on_its_device
from .triton_elementwise import rotate as rotate
from .triton_elementwise import silu_product as silu_product
from .triton_launch import launch_decode, launch_siblings
from .triton_launch import separate_products as separate_products
from .triton_merge import merged_at_once, merged_linear, merged_linears
from .triton_norm import base_norm as base_norm
from .triton_norm import rms_norm as rms_norm
from .triton_prompts import prompt_attention as prompt_attention
from .triton_rows import added_row_logits, embedding_rows
from .triton_siblings import Operand, sibling_table
from .tuning import merge_tokens

_ROW_BLOCK = 1024


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
    return _linear(None, x, weight, bias, bank, slot_of_token, groups)


@on_its_device
def summed_linear(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups,
) -> Tensor:
    """`residual` `[tokens, out]` plus `expert_linear`, which is rounded first: few tokens take no launch for a sum."""
    return _linear(residual.contiguous(), x, weight, bias, bank, slot_of_token, groups)


def _linear(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups | None,
) -> Tensor:
    x, weight = _dense(x), _dense(weight)
    y = x.new_empty(x.shape[0], weight.shape[0])
    if not y.numel():
        return y
    slot_of_token = slot_of_token.contiguous()
    if not bank.formats:
        y = codeless.expert_linear(x, weight, bias, bank, slot_of_token)
        return y if residual is None else residual + y
    bank = _in_planes(bank)
    groups = groups or _groups.group_tokens(slot_of_token, bank.slot_bits.shape[0])
    if plan := groups.plan or plan_unknown(groups):
        _by_plan([y], x, [(weight, bias, bank)], plan)
        return y if residual is None else y.add_(residual)
    launch_decode(y, x, weight, bias, bank, slot_of_token, groups, residual)
    return y


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


@on_its_device
def expert_linears(x: Tensor, operands: Sequence[Operand], slot_of_token: Tensor, groups: TokenGroups) -> list[Tensor]:
    """`expert_linear` of each weight, bias and bank with the same x."""
    x = _dense(x)
    if not all(bank.formats for _, _, bank in operands):
        return [expert_linear(x, *each, slot_of_token, groups) for each in operands]
    operands = [(_dense(weight), bias, _in_planes(bank)) for weight, bias, bank in operands]
    if plan := groups.plan or plan_unknown(groups):
        ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight, _, _ in operands]
        _by_plan(ys, x, operands, plan)
        return ys
    if x.shape[0]:
        return _decode_all(x, operands, slot_of_token.contiguous(), groups)
    return [x.new_empty(0, weight.shape[0]) for weight, _, _ in operands]


def group_tokens(slot_of_token: Tensor, slots: int, runs: Sequence[Run] | None = None) -> TokenGroups:
    """As `groups.group_tokens`. Where the host knows the slots, as `runs`, prefill is planned by them; else many tokens
    are shared out as they come.

    A captured graph must not know them: it is replayed with other slots. Raises ValueError or IndexError for `runs`
    that are not those of `slot_of_token`.
    """
    groups = _groups.group_tokens(slot_of_token, slots)
    if runs is None:
        return dataclasses.replace(groups, plan=plan_unknown(groups))
    return dataclasses.replace(groups, plan=plan_prefill(groups, runs, merge_tokens(slot_of_token.device)))


def _by_plan(ys: Sequence[Tensor], x: Tensor, operands: Sequence[Operand], plan: PrefillPlan) -> None:
    siblings = sibling_table(operands) if len(operands) > 1 else None
    for slot, rows in plan.merged:
        given = x[rows]
        if siblings and slot >= 0 and merged_at_once(siblings, x):
            with contextlib.ExitStack() as stack:
                targets = [stack.enter_context(_target(y, rows)) for y in ys]
                merged_linears(targets, given, operands, siblings, slot)
            continue
        for y, (weight, bias, bank) in zip(ys, operands, strict=True):
            with _target(y, rows) as target:
                merged_linear(target, given, weight, bias, bank, slot)
    for part in plan.parts:
        given, slots = x[part.rows], part.groups.slot_of_token
        if len(ys) > 1:
            for y, result in zip(ys, _decode_all(given, operands, slots, part.groups), strict=True):
                y[part.rows] = result
            continue
        ((weight, bias, bank),) = operands
        with _target(ys[0], part.rows) as target:
            launch_decode(target, given, weight, bias, bank, slots, part.groups)


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
        return launch_siblings(x, operands, table, slot_of_token, groups)
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight, _, _ in operands]
    for y, each in zip(ys, operands, strict=True):
        launch_decode(y, x, *each, slot_of_token, groups)
    return ys


def _in_planes(bank: BankTensors) -> BankTensors:
    """The bank with its codes in planes. On a GPU they lie so; only a test mixes backends on one bank."""
    if bank.planes:
        return bank
    if bank.codes.device.type != "cpu":
        raise ValueError("the triton backend reads codes in planes; make the bank with planes=True")
    codes, in_features = bank.codes.clone(), bank.channel_scale.shape[1]
    for own, bits in zip(codes, bank.slot_bits.tolist(), strict=True):
        if bits and bits < FIRST_NUMBER:
            words = words_per_row(in_features, bits)
            own = own[: bank.bias_delta.shape[1] * words].view(-1, words)
            own.copy_(to_planes(own, bits))
    return BankTensors._make(bank._replace(codes=codes, planes=True))


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
    if not bank.formats:
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
        bank.left,
        bank.right,
        added_rows,
        bank.slot_bits,
        bank.slot_group,
        bank.slot_rank,
        slot_of_token.contiguous(),
        bank.slot_bits.shape[0],
        hidden,
        vocab,
        bank.salient_index.shape[1],
        bank.right.shape[1],
        added_rows.shape[1],
        weight.stride(0),
        bank.codes.stride(0),
        bank.steps.stride(0),
        NUMBERS=bank.formats,
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
