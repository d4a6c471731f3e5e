"""Slot-stacked storage for the deltas that several experts add to one base weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .delta import VALUE_DTYPES, Capacity, ExpertDelta
from .dispatch import reads_planes
from .groups import check_slots
from .messages import FIRST_NUMBER, MESSAGES, code_width, decode_message, row_words
from .packing import BIT_WIDTHS, from_planes, group_count, to_planes, unpack_codes, widths_in

_Made = TypeVar("_Made")

TICKET_ROWS = 32
"""Output rows for which there is a ticket: the decode kernel's smallest block."""


class _BankTensors(NamedTuple):
    codes: Tensor
    """int32 `[slots, out * words]`."""
    steps: Tensor
    """float32 `[slots, out * groups]`."""
    salient_index: Tensor
    """int32 `[slots, max_salient]`, padded with channel 0."""
    salient_value: Tensor
    """`[slots, out, max_salient]`, padded with zeros."""
    channel_scale: Tensor
    """float16 `[slots, in]`, ones where an expert has none."""
    bias_delta: Tensor
    """float32 `[slots, out]`, zeros where an expert has none."""
    left: Tensor
    """`[slots, out, max_rank]`: L of the low-rank part L·R, padded with zeros."""
    right: Tensor
    """`[slots, max_rank, in]`: its R, padded with zeros."""
    slot_bits: Tensor
    """int32 `[slots]`: the number of a slot's codes, which is a scalar code's width; 0 marks an empty slot. An expert
    without codes has those that take least, and steps of 0 where the bank has any."""
    slot_group: Tensor
    """int32 `[slots]`: group size, 0 for one step per row."""
    slot_rank: Tensor
    """int32 `[slots]`: rank of the low-rank part, 0 where an expert has none. `[0]` in a bank without room for any."""
    tickets: Tensor
    """int32 `[blocks of rows]`, zeros: what the decode kernel counts its programs by, one launch at a time."""
    bits: int
    """The widest scalar code any slot may hold; 0 where none may."""
    messages: list[int]
    """Numbers of the trellis codes that a slot may hold."""
    group_size: int
    """The finest group any slot may have; 0 where all have one step per row."""
    scaled: bool
    """Whether a slot may have channel scales; all ones otherwise."""
    planes: bool
    """Whether codes lie in planes (`packing.to_planes`), as the Triton kernels read them, or little-endian."""


class BankTensors(_BankTensors):
    """What a backend reads of a bank. A slot's rows lie densely at the start of its share of a row here.

    A slot of fewer bits or coarser groups than the bank therefore occupies, and moves, its own bytes only.
    """

    @functools.cached_property
    def formats(self) -> tuple[int, ...]:
        """Numbers of the codes that a slot may hold, the shortest last; none in a bank without codes."""
        return bank_formats(self.bits, self.messages)

    @functools.cached_property
    def _made(self) -> dict[Callable[[BankTensors], Any], Any]:
        return {}

    def once(self, make: Callable[[BankTensors], _Made]) -> _Made:
        """What a function makes of the tensors' places, which never change: it is called the first time alone."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]  # type: ignore[no-any-return]


def bank_formats(bits: int, messages: Sequence[int]) -> tuple[int, ...]:
    """Numbers of codes that take as many bits and fewer, or are such messages, the shortest last."""
    return (*(widths_in(bits) if bits else ()), *reversed(messages))


def joined_formats(banks: Sequence[BankTensors]) -> tuple[int, ...]:
    """Numbers of the codes that a slot of any of some banks may hold."""
    held = {number for bank in banks for number in bank.messages}
    return bank_formats(max(bank.bits for bank in banks), [number for number in MESSAGES if number in held])


def dequantize_rows(
    tensors: BankTensors, slot: int, rows: Tensor | slice, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Output rows `rows` of a loaded slot's delta `[rows, in]`, in `dtype`: codes, salient residuals and L·R."""
    out, in_features = tensors.bias_delta.shape[1], tensors.channel_scale.shape[1]
    if not tensors.formats:
        count = len(range(out)[rows]) if isinstance(rows, slice) else len(rows)
        nothing = torch.zeros(count, in_features, dtype=dtype, device=tensors.left.device)
        return _with_low_rank(nothing, tensors, slot, rows)
    number, group_size = int(tensors.slot_bits[slot]), int(tensors.slot_group[slot])
    words, groups = row_words(in_features, number), group_count(in_features, group_size)
    codes = tensors.codes[slot, : out * words].view(out, words)[rows]
    steps = tensors.steps[slot, : out * groups].view(out, groups)[rows].to(dtype)
    if group_size:
        steps = steps.repeat_interleave(group_size, 1)[:, :in_features]
    if number > FIRST_NUMBER:
        codes = decode_message(codes, MESSAGES[number], in_features)
    else:
        codes = unpack_codes(from_planes(codes, number) if tensors.planes else codes, number, in_features)
    levels = codes.to(dtype) - (2 ** code_width(number) - 1) / 2
    delta: Tensor = levels * steps * tensors.channel_scale[slot].to(dtype)
    index = tensors.salient_index[slot].long().expand(len(delta), -1)
    delta.scatter_add_(1, index, tensors.salient_value[slot][rows].to(dtype))
    return _with_low_rank(delta, tensors, slot, rows)


def _with_low_rank(delta: Tensor, tensors: BankTensors, slot: int, rows: Tensor | slice) -> Tensor:
    """`delta` `[rows, in]`, to which a slot's L·R has been added."""
    if tensors.left.shape[2]:
        rank = int(tensors.slot_rank[slot])
        delta += tensors.left[slot, :, :rank][rows].to(delta.dtype) @ tensors.right[slot, :rank].to(delta.dtype)
    return delta


def _put_planes(slot: Tensor, words: Tensor, bits: int) -> None:
    if slot.device.type == "cuda":
        from .triton_planes import to_planes as put

        put(words, bits, slot)
    else:
        slot.copy_(to_planes(words, bits))


class ExpertBank:
    """The low-bit deltas of up to `slots` experts for one weight `[out_features, in_features]`.

    All memory is allocated here, once; on the device "meta" none is, and `nbytes` tells what there would be. `dtype` is
    how salient values, added rows and the low-rank part are stored: float32 holds either 16-bit type exactly. `planes`
    is how codes lie in words, by default as the kernels of the device read them. Raises ValueError or TypeError for
    settings it cannot hold.
    """

    def __init__(
        self,
        slots: int,
        in_features: int,
        out_features: int,
        capacity: Capacity,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        planes: bool | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if capacity.salient > in_features:
            raise ValueError(f"{capacity.salient} salient channels exceed the {in_features} input channels")
        if dtype not in VALUE_DTYPES:
            raise TypeError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
        self.slots, self.in_features, self.out_features = slots, in_features, out_features
        self.capacity, self.dtype = capacity, dtype

        def empty(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=of, device=device)

        numbers = bank_formats(capacity.bits, capacity.messages)
        groups = group_count(in_features, capacity.group_size) if numbers else 0
        words = max((row_words(in_features, number) for number in numbers), default=0)
        self.tensors = BankTensors(
            codes=empty(slots, out_features * words, of=torch.int32),
            steps=empty(slots, out_features * groups, of=torch.float32),
            salient_index=empty(slots, capacity.salient, of=torch.int32),
            salient_value=empty(slots, out_features, capacity.salient, of=dtype),
            channel_scale=empty(slots, in_features, of=torch.float16),
            bias_delta=empty(slots, out_features, of=torch.float32),
            left=empty(slots, out_features, capacity.rank, of=dtype),
            right=empty(slots, capacity.rank, in_features, of=dtype),
            slot_bits=empty(slots, of=torch.int32),
            slot_group=empty(slots, of=torch.int32),
            slot_rank=empty(slots if capacity.rank else 0, of=torch.int32),
            tickets=empty(-(-out_features // TICKET_ROWS), of=torch.int32),
            bits=capacity.bits,
            messages=list(capacity.messages),
            group_size=capacity.group_size,
            scaled=capacity.channel_scale,
            planes=reads_planes(torch.device(device).type) if planes is None else planes,
        )
        self.added_rows = empty(slots, capacity.added_rows, in_features, of=dtype)
        """`[slots, capacity.added_rows, in]`: vocabulary rows beyond the base's, for embeddings and heads."""
        self.added_counts = empty(slots, of=torch.int32)
        self._bits_of_slot = [0] * slots

    @property
    def device(self) -> torch.device:
        """Where the bank's tensors live."""
        return self.tensors.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the bank holds, whatever is loaded."""
        held = (*self.tensors, self.added_rows, self.added_counts)
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))

    def load(self, slot: int, delta: ExpertDelta) -> None:
        """Put an expert into `slot`.

        Everything is checked before anything is written: ValueError, TypeError or IndexError leaves the slot as it
        was.
        """
        delta.check(self.in_features, self.out_features, self.capacity)
        self.clear(slot)
        to = self.tensors
        shortest = to.formats[-1] if to.formats else BIT_WIDTHS[0]
        if delta.bits:
            codes = to.codes[slot, : delta.codes.numel()].view(delta.codes.shape)
            if to.planes and not delta.message:
                _put_planes(codes, delta.codes.to(self.device, non_blocking=True), delta.bits)
            else:
                codes.copy_(delta.codes, non_blocking=True)
            to.steps[slot, : delta.steps.numel()].copy_(delta.steps.reshape(-1), non_blocking=True)
        else:  # whatever codes an earlier expert left there, a step of 0 makes nothing of them
            to.steps[slot] = 0
        if delta.salient_index is not None and delta.salient_value is not None:
            k = len(delta.salient_index)
            to.salient_index[slot, :k].copy_(delta.salient_index, non_blocking=True)
            to.salient_value[slot, :, :k].copy_(delta.salient_value, non_blocking=True)
        if delta.channel_scale is not None:
            to.channel_scale[slot].copy_(delta.channel_scale, non_blocking=True)
        if delta.bias_delta is not None:
            to.bias_delta[slot].copy_(delta.bias_delta, non_blocking=True)
        if delta.added_rows is not None:
            self.added_rows[slot, : len(delta.added_rows)].copy_(delta.added_rows, non_blocking=True)
            self.added_counts[slot] = len(delta.added_rows)
        if delta.left is not None and delta.right is not None and len(delta.right):
            to.left[slot, :, : len(delta.right)].copy_(delta.left, non_blocking=True)
            to.right[slot, : len(delta.right)].copy_(delta.right, non_blocking=True)
            # In a bank without codes an infinity would reach other slots' tokens, which multiply it by 0.
            most = torch.finfo(self.dtype).max
            for factor in (to.left, to.right):
                factor[slot].clamp_(-most, most)
            to.slot_rank[slot] = len(delta.right)
        self._bits_of_slot[slot] = to.slot_bits[slot] = delta.number or shortest
        to.slot_group[slot] = delta.group_size

    def clear(self, slot: int) -> None:
        """Empty `slot`. Its memory stays allocated; a token sent to it is an error, never the base."""
        slot = self._slot(slot)
        self._bits_of_slot[slot] = 0
        to = self.tensors
        for tensor in (to.slot_bits, to.slot_group, to.salient_index, to.salient_value, to.bias_delta):
            tensor[slot] = 0
        if self.capacity.rank:
            for tensor in (to.slot_rank, to.left, to.right):
                tensor[slot] = 0
        to.channel_scale[slot] = 1
        self.added_counts[slot] = 0

    def dequantize(self, slot: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta `[out, in]` that `slot` adds to the base weight: codes, salient residuals and low-rank part.

        Computed in `dtype`. Raises ValueError where the slot is empty.
        """
        return self.dequantize_rows(slot, slice(None), dtype)

    def dequantize_rows(self, slot: int, rows: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """The chosen output rows of `dequantize(slot)`, without building the others."""
        slot = self._slot(slot)
        if not self._bits_of_slot[slot]:
            raise ValueError(f"slot {slot} is empty")
        return dequantize_rows(self.tensors, slot, rows, dtype)

    def check_slots(self, slot_of_token: Tensor) -> None:
        """Raise IndexError for a slot outside [-1, slots), ValueError for an empty one; see `groups`."""
        check_slots(slot_of_token, self._bits_of_slot)

    def _slot(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is not one of the bank's {self.slots}")
        return slot
