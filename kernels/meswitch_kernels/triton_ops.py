"""The Triton backend: which kernel serves a batch, and its launch. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .bank import BankTensors
from .groups import DECODE_TILE, PREFILL_TOKENS, TokenGroups, group_tokens
from .packing import widths_in
from .triton_attention import paged_attention as paged_attention
from .triton_decode import decode_partials, reduce_partials
from .triton_low_rank import project
from .triton_prefill import prefill
from .triton_prompts import prompt_attention as prompt_attention
from .triton_rows import added_row_logits, embedding_rows, norm_rows
from .tuning import launch_settings, token_bucket

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


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups | None = None,
) -> Tensor:
    """As `naive.expert_linear`, for float32, bfloat16 and float16 x."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    if not y.numel():
        return y
    slot_of_token = slot_of_token.contiguous()
    groups = groups or group_tokens(slot_of_token, bank.slot_bits.shape[0])
    if x.shape[0] >= PREFILL_TOKENS:
        _prefill(y, x, weight, bias, bank, slot_of_token, groups)
    else:
        _decode(y, x, weight, bias, bank, slot_of_token, groups)
    return y


def project_block(tile_size: int) -> int:
    """Input channels that a program of x·Rᵀ multiplies at once."""
    return 128 if tile_size == DECODE_TILE else 64


def _project(x: Tensor, bank: BankTensors, groups: TokenGroups) -> tuple[Tensor, int]:
    """z = x·Rᵀ `[splits, tokens, max_rank]`, to be summed, and `splits`; 0, and no launch, without a low-rank part."""
    (tokens, in_features), max_rank = x.shape, bank.right.shape[1]
    if not max_rank:
        return bank.steps, 0
    block_k = project_block(groups.tile_size)
    per_split = max(_PROJECT_CHANNELS, triton.cdiv(triton.cdiv(in_features, PROJECT_SPLITS), block_k) * block_k)
    splits = triton.cdiv(in_features, per_split)
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
        BLOCK_K=block_k,
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
    settings = launch_settings("decode", out_features, in_features, tokens, x.dtype, x.device)
    base_tokens = token_bucket(tokens)
    base_tiles = triton.cdiv(tokens, base_tokens)
    unit = max(settings.block_k, settings.delta_block_k)
    per_split = triton.cdiv(triton.cdiv(in_features, settings.splits), unit) * unit
    splits = triton.cdiv(in_features, per_split)
    z, z_splits = _project(x, bank, groups)
    partials = torch.empty(2 * splits, tokens, out_features, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(out_features, settings.block_out), splits, base_tiles + groups.tile_slot.shape[0])
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
        slots,
        in_features,
        out_features,
        x.stride(0),
        weight.stride(0),
        bank.codes.stride(0),
        bank.steps.stride(0),
        per_split,
        bank.left.shape[2],
        WIDTHS=widths_in(bank.bits),
        GROUPED=bank.group_size > 0,
        BASE_TOKENS=base_tokens,
        TILE_TOKENS=groups.tile_size,
        BLOCK_OUT=settings.block_out,
        BLOCK_K=settings.block_k,
        DELTA_BLOCK_K=settings.delta_block_k,
        Z_SPLITS=z_splits,
        BLOCK_RANK=RANK_BLOCK,
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
        splits,
        HAS_BIAS=bias is not None,
        BLOCK=_REDUCE_BLOCK,
        num_warps=2,
    )


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
    settings = launch_settings("prefill", out_features, in_features, x.shape[0], x.dtype, x.device)
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


def expert_embedding(
    ids: Tensor, weight: Tensor, bank: BankTensors, added_rows: Tensor, slot_of_token: Tensor
) -> Tensor:
    """As `naive.expert_embedding`."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    vocab, hidden = weight.shape
    y = weight.new_empty(ids.shape[0], hidden)
    if not y.numel():
        return y
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


def rms_norm(x: Tensor, epsilon: float, table: Tensor, gain_rows: Tensor) -> Tensor:
    """As `naive.rms_norm`; a row whose gains are outside the table comes out as NaN."""
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    rows, hidden = x.shape
    norm_rows[(rows,)](
        x, table, y, gain_rows.contiguous(), table.shape[0], hidden, x.stride(0), epsilon, BLOCK=_ROW_BLOCK
    )
    return y


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
