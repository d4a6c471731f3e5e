"""Launches of the decode kernel: what each is made of, x as the kernel wants it, one linear or siblings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .bank import BankTensors, joined_formats
from .groups import TokenGroups
from .messages import FIRST_NUMBER
from .triton_decode import decode
from .triton_formats import families, family_constants, placed, prepared, reordered, reordered_width
from .triton_low_rank import prepare
from .triton_siblings import Operand, SiblingTable, decode_siblings, prepare_siblings, sibling_table
from .tuning import LaunchSettings, launch_settings, token_bucket

_PREPARE_CHANNELS = 512
"""Input channels that one program of x·Rᵀ takes at least; not measured on a card yet."""
PREPARE_SPLITS = 8
"""The most programs that share the input channels of one tile."""
PREPARE_BLOCK = 128
"""Input channels that a program of x·Rᵀ multiplies at once."""
PREPARE_OPTIONS = {"num_warps": 4, "num_stages": 3}
MOST_REGISTERS = 255
"""Of a thread of decode. Left to itself the assembler aims at 128 now and then, and spills."""
_ASM = not triton.knobs.runtime.interpret


def rank_block(max_rank: int) -> int:
    """Rows of R, and columns of L, that a program multiplies at once."""
    return 16 if max_rank <= 16 else 32


def _prepare_splits(in_features: int, width: int) -> tuple[int, int]:
    """Programs that share the channels of x·Rᵀ, and channels of each; `width` is that of x as codes want it.

    How many there are does not depend on the codes: decode is compiled for their number.
    """
    share = triton.cdiv(triton.cdiv(in_features, PREPARE_SPLITS), PREPARE_BLOCK) * PREPARE_BLOCK
    splits = triton.cdiv(in_features, max(_PREPARE_CHANNELS, share))
    return splits, triton.cdiv(triton.cdiv(width, splits), PREPARE_BLOCK) * PREPARE_BLOCK


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """x as codes want it, and sums that decode is given; `z_splits` and `offset_splits` are 0 where there are none."""

    scaled: Tensor
    z: Tensor
    offsets: Tensor
    z_splits: int
    offset_splits: int


def _prepare(x: Tensor, bank: BankTensors, groups: TokenGroups) -> _Prepared:
    """x times channel scales, over what codes' places multiply, and in another order, where the bank has what wants it.

    z = x·Rᵀ `[splits, tokens, max_rank]` and `offsets` `[splits, tokens]` are to be summed.
    """
    (tokens, in_features), max_rank = x.shape, bank.right.shape[1]
    messages = reordered(bank.formats, x.dtype)
    scalar = placed(bank.formats, x.dtype, grouped=bank.group_size > 0)
    if not max_rank and not bank.scaled and not messages and not scalar:
        return _Prepared(x, bank.steps, bank.steps, 0, 0)
    width = reordered_width(in_features, messages)
    splits, per_split = _prepare_splits(in_features, width)
    scaled = x.new_empty(tokens, width) if bank.scaled or messages or scalar else x
    z = torch.empty(splits, tokens, max_rank, dtype=torch.float32, device=x.device)
    offsets = torch.empty(splits, tokens, dtype=torch.float32, device=x.device)
    prepare[(groups.tile_slot.shape[0], max(1, triton.cdiv(max_rank, rank_block(max_rank))), splits)](
        x,
        bank.channel_scale,
        bank.right,
        scaled,
        z,
        offsets,
        bank.slot_bits,
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
        scaled.stride(0),
        per_split,
        SCALED=bank.scaled,
        PLACED=scalar,
        MESSAGES=prepared(messages),
        RANKED=max_rank > 0,
        TILE_TOKENS=groups.tile_size,
        BLOCK_RANK=rank_block(max_rank),
        BLOCK_K=PREPARE_BLOCK,
        **PREPARE_OPTIONS,
    )
    return _Prepared(scaled, z, offsets, splits if max_rank else 0, splits if messages or scalar else 0)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a decode launch is made of, apart from tensors."""

    settings: LaunchSettings
    base_tiles: int
    tiles: int
    families: tuple[dict[str, Any], ...]
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        x: Tensor,
        groups: TokenGroups,
        out_features: int,
        formats: tuple[int, ...],
        max_rank: int,
        *,
        grouped: bool,
        biased: bool,
    ) -> _Shape:
        tokens, in_features = x.shape
        settings = launch_settings(out_features, in_features, tokens, x.dtype, x.device, grouped)
        base_tokens, tiles = token_bucket(tokens), groups.tile_slot.shape[0]
        constants = {
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
            "maxnreg": MOST_REGISTERS,
        }
        served = tuple(family_constants(each, in_features, grouped=grouped) for each in families(formats))
        return cls(settings, triton.cdiv(tokens, base_tokens), tiles, served, constants)

    @property
    def delta_programs(self) -> int:
        """Programs that share the tiles of tokens, for each split."""
        return min(self.tiles, self.settings.delta_programs)

    def programs(self, launch: int) -> int:
        """Programs of a block of rows in one launch; the first has those of the base."""
        of_base = 0 if launch else self.base_tiles * self.settings.splits
        return of_base + self.delta_programs * self.settings.delta_splits

    @property
    def sums(self) -> int:
        """Partial sums of an output."""
        return self.settings.splits + self.settings.delta_splits

    def counts(self, launch: int) -> tuple[int, ...]:
        """The kernel's numbers from `tiles` to `launches`."""
        settings = self.settings
        programs = self.base_tiles, settings.splits, settings.delta_splits, self.delta_programs
        return self.tiles, *programs, launch, len(self.families)


def separate_products(
    x: Tensor, operands: Sequence[Operand], groups: TokenGroups
) -> dict[tuple[object, ...], list[Operand]]:
    """Products of the same x with banks of one family of codes alone, by what their kernels are compiled for.

    Each is one launch of decode, the very one that the operands' own product has for that family.
    """
    formats = joined_formats([bank for _, _, bank in operands])
    found = {}
    for family in families(formats):
        bits = max((number for number in family if number < FIRST_NUMBER), default=0)
        messages = [number for number in family if number > FIRST_NUMBER]
        own = [
            (weight, bias, BankTensors._make(bank._replace(bits=bits, messages=messages)))
            for weight, bias, bank in operands
        ]
        table = sibling_table(own) if len(own) > 1 else None
        for each in [own] if table else [[alone] for alone in own]:
            banks = [bank for _, _, bank in each]
            rank = max(bank.left.shape[2] for bank in banks)
            grouped = any(bank.group_size for bank in banks)
            biased = each[0][1] is not None
            out_features = table.total if table else each[0][0].shape[0]
            shape = _Shape.of(x, groups, out_features, family, rank, grouped=grouped, biased=biased)
            splits = _prepare_splits(x.shape[1], x.shape[1])[0] if rank or x.dtype != torch.float32 else 0
            constants = tuple(sorted((shape.constants | shape.families[0]).items()))
            found[(table is not None, splits, rank > 0, x.dtype, banks[0].left.dtype, *constants)] = each
    return found


def launch_decode(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankTensors,
    slot_of_token: Tensor,
    groups: TokenGroups,
    residual: Tensor | None = None,
) -> None:
    """y, and `residual` with it: both `[tokens, out]`, and contiguous."""
    tokens, (out_features, in_features) = x.shape[0], weight.shape
    shape = _Shape.of(
        x, groups, out_features, bank.formats, bank.left.shape[2], grouped=bank.group_size > 0, biased=bias is not None
    )
    given = _prepare(x, bank, groups)
    partials = torch.empty(shape.sums, tokens, out_features, dtype=torch.float32, device=x.device)
    for launch, family in enumerate(shape.families):
        decode[(shape.programs(launch), triton.cdiv(out_features, shape.settings.block_out))](
            x,
            given.scaled,
            weight,
            x if bias is None else bias,
            y,
            y if residual is None else residual,
            partials,
            bank.tickets,
            bank.codes,
            bank.steps,
            bank.bias_delta,
            bank.salient_index,
            bank.salient_value,
            given.z,
            given.offsets,
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
            *shape.counts(launch),
            int(residual is not None),
            bank.slot_bits.shape[0],
            in_features,
            out_features,
            x.stride(0),
            given.scaled.stride(0),
            weight.stride(0),
            bank.codes.stride(0),
            bank.steps.stride(0),
            bank.salient_index.shape[1],
            bank.left.shape[2],
            Z_SPLITS=given.z_splits,
            OFFSET_SPLITS=given.offset_splits,
            **family,
            **shape.constants,
        )


def launch_siblings(
    x: Tensor, operands: Sequence[Operand], siblings: SiblingTable, slot_of_token: Tensor, groups: TokenGroups
) -> list[Tensor]:
    (tokens, in_features), slots = x.shape, groups.slots
    shape = _Shape.of(
        x,
        groups,
        siblings.total,
        siblings.formats,
        siblings.most_rank,
        grouped=siblings.grouped,
        biased=operands[0][1] is not None,
    )
    parts, like = len(siblings.outs), operands[0][2].left
    tiles = (groups.order, groups.tile_slot, groups.tile_start, groups.tile_count)
    splits, scaled, z, offsets = 0, x, x, x
    messages = reordered(siblings.formats, x.dtype)
    scalar = placed(siblings.formats, x.dtype, grouped=siblings.grouped)
    copied = siblings.scaled or scalar or len(messages) > 0
    if siblings.most_rank or copied:
        width = reordered_width(in_features, messages)
        splits, per_split = _prepare_splits(in_features, width)
        z = torch.empty(parts, splits, tokens, siblings.most_rank, dtype=torch.float32, device=x.device)
        offsets = torch.empty(parts, splits, tokens, dtype=torch.float32, device=x.device)
        if copied:
            scaled = x.new_empty(parts * tokens, width)
        block = rank_block(siblings.most_rank)
        prepare_siblings[(tiles[1].shape[0], max(1, triton.cdiv(siblings.most_rank, block)), parts * splits)](
            siblings.table,
            like,
            x,
            scaled,
            z,
            offsets,
            *tiles,
            tokens,
            slots,
            in_features,
            siblings.most_rank,
            x.stride(0),
            scaled.stride(0),
            per_split,
            SPLITS=splits,
            SCALED=siblings.scaled,
            PLACED=scalar,
            MESSAGES=prepared(messages),
            RANKED=siblings.most_rank > 0,
            TILE_TOKENS=groups.tile_size,
            BLOCK_RANK=block,
            BLOCK_K=PREPARE_BLOCK,
            **PREPARE_OPTIONS,
        )
    partials = torch.empty(shape.sums * tokens * siblings.total, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens * siblings.total, dtype=x.dtype, device=x.device)
    for launch, family in enumerate(shape.families):
        decode_siblings[(shape.programs(launch), triton.cdiv(max(siblings.outs), shape.settings.block_out), parts)](
            siblings.table,
            like,
            x,
            scaled,
            y,
            partials,
            z,
            offsets,
            slot_of_token,
            *tiles,
            tokens,
            *shape.counts(launch),
            slots,
            in_features,
            x.stride(0),
            scaled.stride(0),
            tokens if copied else 0,
            siblings.most_rank,
            Z_SPLITS=splits if siblings.most_rank else 0,
            OFFSET_SPLITS=splits if messages or scalar else 0,
            **family,
            **shape.constants,
        )
    each = torch.split(y, [tokens * out for out in siblings.outs])
    return [part.view(tokens, out) for part, out in zip(each, siblings.outs, strict=True)]
