# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Decode of several linears of one input, as an attention's q, k and v, in the launches of a single one.

A table on the device holds what the linears do not share: where their weights and banks lie, and their widths. The last
axis of a grid is the linear; the kernels are decode's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bank import BankTensors, joined_formats
from .triton_decode import UNSPECIALIZED, decode_rows
from .triton_low_rank import prepare_tile

Operand = tuple[Tensor, Tensor | None, BankTensors]
"""Weight, bias and bank of a linear."""

# A linear's entries in the table: addresses of tensors, then numbers. BEFORE is the sum of OUT of the linears before.
WEIGHT, BIAS, CODES, STEPS, CHANNEL_SCALE, BIAS_DELTA = map(tl.constexpr, range(6))
SALIENT_INDEX, SALIENT_VALUE, LEFT, RIGHT = map(tl.constexpr, range(6, 10))
SLOT_BITS, SLOT_GROUP, SLOT_RANK = map(tl.constexpr, range(10, 13))
OUT, BEFORE, WEIGHT_STRIDE, CODES_STRIDE, STEPS_STRIDE = map(tl.constexpr, range(13, 18))
MAX_SALIENT, MAX_RANK, TICKETS, FIELDS = map(tl.constexpr, range(18, 22))


@triton.jit
def table_pointer(entry, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """The tensor of a linear whose entries in the table begin at `entry`."""
    return tl.multiple_of(tl.load(entry + FIELD).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def table_multiple(entry, FIELD: tl.constexpr):
    """A number that is a multiple of 16, as a launch would be told."""
    return tl.multiple_of(tl.load(entry + FIELD).to(tl.int32), 16)


@triton.jit(do_not_specialize=[*(name for name in UNSPECIALIZED if name != "added"), "scaled_rows"])
def decode_siblings(
    linears,
    like,
    x,
    scaled,
    y,
    partials,
    z,
    offsets,
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
    slots,
    in_features,
    x_stride,
    scaled_stride,
    scaled_rows,
    most_rank,
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
    """`decode` of each linear: y `[tokens, out]`, and partial sums, one linear's after the other's.

    `scaled` has `scaled_rows` for each linear, or is x, and has none.
    """
    part = tl.program_id(2)
    entry = linears + part * FIELDS
    out_features = table_multiple(entry, OUT)
    before = tl.load(entry + BEFORE) * tokens
    scaled += part * scaled_rows * scaled_stride
    if tl.program_id(1) * BLOCK_OUT < out_features:
        decode_rows(
            tl.program_id(1),
            tl.program_id(0),
            x,
            scaled,
            table_pointer(entry, WEIGHT, x.dtype.element_ty),
            table_pointer(entry, BIAS, x.dtype.element_ty),
            y + before,
            y + before,
            partials + before * (base_splits + delta_splits),
            table_pointer(entry, TICKETS, tl.int32),
            table_pointer(entry, CODES, tl.int32),
            table_pointer(entry, STEPS, tl.float32),
            table_pointer(entry, BIAS_DELTA, tl.float32),
            table_pointer(entry, SALIENT_INDEX, tl.int32),
            table_pointer(entry, SALIENT_VALUE, like.dtype.element_ty),
            z + part * Z_SPLITS * tokens * most_rank,
            offsets + part * OFFSET_SPLITS * tokens,
            table_pointer(entry, LEFT, like.dtype.element_ty),
            table_pointer(entry, SLOT_BITS, tl.int32),
            table_pointer(entry, SLOT_GROUP, tl.int32),
            table_pointer(entry, SLOT_RANK, tl.int32),
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
            0,
            slots,
            in_features,
            out_features,
            x_stride,
            scaled_stride,
            table_multiple(entry, WEIGHT_STRIDE),
            table_multiple(entry, CODES_STRIDE),
            table_multiple(entry, STEPS_STRIDE),
            tl.load(entry + MAX_SALIENT).to(tl.int32),
            table_multiple(entry, MAX_RANK),
            NUMBERS,
            GROUPED,
            EVEN,
            HAS_BIAS,
            BASE_TOKENS,
            TILE_TOKENS,
            MOST_TILES,
            MOST_SPLITS,
            BLOCK_OUT,
            BLOCK_K,
            Z_SPLITS,
            OFFSET_SPLITS,
            BLOCK_RANK,
            ASM,
        )


@triton.jit(do_not_specialize=["tokens"])
def prepare_siblings(
    linears,
    like,
    x,
    scaled,
    z,
    offsets,
    order,
    tile_slot,
    tile_start,
    tile_count,
    tokens,
    slots,
    in_features,
    most_rank,
    x_stride,
    scaled_stride,
    channels_per_split,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    PLACED: tl.constexpr,
    MESSAGES: tl.constexpr,
    RANKED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`prepare` of each linear: z `[SPLITS, tokens, its own most rank]` each in the memory of the largest."""
    part, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    entry = linears + part * FIELDS
    prepare_tile(
        tl.program_id(0),
        tl.program_id(1) * BLOCK_RANK,
        split,
        x,
        table_pointer(entry, CHANNEL_SCALE, tl.float16),
        table_pointer(entry, RIGHT, like.dtype.element_ty),
        scaled + part * tokens * scaled_stride,
        z + part * SPLITS * tokens * most_rank,
        offsets + part * SPLITS * tokens,
        table_pointer(entry, SLOT_BITS, tl.int32),
        table_pointer(entry, SLOT_RANK, tl.int32),
        order,
        tile_slot,
        tile_start,
        tile_count,
        tokens,
        slots,
        in_features,
        table_multiple(entry, MAX_RANK),
        x_stride,
        scaled_stride,
        channels_per_split,
        SCALED,
        PLACED,
        MESSAGES,
        RANKED,
        TILE_TOKENS,
        BLOCK_RANK,
        BLOCK_K,
    )


@dataclass(frozen=True)
class SiblingTable:
    """What the kernels are told of linears that share an input; `held` is what they may read."""

    table: Tensor
    held: tuple[object, ...]
    outs: tuple[int, ...]
    formats: tuple[int, ...]
    grouped: bool
    scaled: bool
    most_rank: int

    @property
    def total(self) -> int:
        """Outputs of all of them."""
        return sum(self.outs)


def sibling_table(operands: Sequence[Operand]) -> SiblingTable | None:
    """The table of some linears, made once; None where they have to be multiplied one by one.

    That is where a number is no multiple of 16, so that a kernel of their own would read more narrowly, or where some
    have a bias and some have not.
    """
    known = operands[0][2].once(_tables)
    key = tuple(id(tensor) for weight, bias, bank in operands for tensor in (weight, bias, bank))
    if key not in known:
        known[key] = _make_table(operands)
    return known[key]


def _tables(_: BankTensors) -> dict[tuple[int, ...], SiblingTable | None]:
    """The tables of which a bank is the first; their keys are objects that they hold."""
    return {}


def _make_table(operands: Sequence[Operand]) -> SiblingTable | None:
    banks = [bank for _, _, bank in operands]
    first = banks[0]
    no_rank = torch.zeros_like(first.slot_bits)
    rows, before = [], 0
    for weight, bias, bank in operands:
        tensors = (
            weight, weight if bias is None else bias, bank.codes, bank.steps, bank.channel_scale, bank.bias_delta,
            bank.salient_index, bank.salient_value, bank.left, bank.right, bank.slot_bits, bank.slot_group,
            bank.slot_rank if bank.left.shape[2] else no_rank,
        )  # fmt: skip
        places = [tensor.data_ptr() for tensor in tensors]
        numbers = [
            weight.shape[0], before, weight.stride(0), bank.codes.stride(0), bank.steps.stride(0),
            bank.salient_index.shape[1], bank.left.shape[2], bank.tickets.data_ptr(),
        ]  # fmt: skip
        multiples = numbers[:5] + numbers[6:] + places
        alike = (weight.dtype, bias is None, bank.left.dtype) == (
            operands[0][0].dtype,
            operands[0][1] is None,
            first.left.dtype,
        )
        if weight.stride(1) != 1 or not alike or any(number % 16 for number in multiples):
            return None
        rows.append(places + numbers)
        before += weight.shape[0]
    return SiblingTable(
        table=torch.tensor(rows, dtype=torch.int64, device=first.codes.device),
        # The first bank holds the table; were it held too, its memory would wait for the garbage collector.
        held=(no_rank, banks[1:], [(weight, bias) for weight, bias, _ in operands]),
        outs=tuple(weight.shape[0] for weight, _, _ in operands),
        formats=joined_formats(banks),
        grouped=any(bank.group_size for bank in banks),
        scaled=any(bank.scaled for bank in banks),
        most_rank=max(bank.left.shape[2] for bank in banks),
    )
