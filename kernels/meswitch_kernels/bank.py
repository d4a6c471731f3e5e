"""Slot-stacked storage for the deltas that several experts add to one base weight."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import check_slots
from .packing import check_bits, group_count, unpack_codes, words_per_row

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    """int32 `[slots]`; 0 marks an empty slot."""
    slot_group: Tensor
    """int32 `[slots]`: group size, 0 for one step per row."""
    slot_rank: Tensor
    """int32 `[slots]`: rank of the low-rank part, 0 where an expert has none. `[0]` in a bank without room for any."""
    bits: int
    """The widest code any slot may hold."""
    group_size: int
    """The finest group any slot may have; 0 where all have one step per row."""


class BankTensors(_BankTensors):
    """What a backend reads of a bank. A slot's rows lie densely at the start of its share of a row here.

    A slot of fewer bits or coarser groups than the bank therefore occupies, and moves, its own bytes only.
    """

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors lie and how far apart their slots are, in bytes; they never move."""
        return (
            self.codes.data_ptr(),
            self.codes.shape[1] * 4,
            self.steps.data_ptr(),
            self.steps.shape[1] * 4,
            self.salient_index.data_ptr(),
            self.salient_value.data_ptr(),
            self.salient_index.shape[1],
            VALUE_DTYPES.index(self.salient_value.dtype),
            self.channel_scale.data_ptr(),
            self.bias_delta.data_ptr(),
            self.slot_bits.data_ptr(),
            self.slot_group.data_ptr(),
            self.left.data_ptr(),
            self.right.data_ptr(),
            self.slot_rank.data_ptr(),
            self.left.shape[2],
        )


def dequantize_rows(
    tensors: BankTensors, slot: int, rows: Tensor | slice, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Output rows `rows` of a loaded slot's delta `[rows, in]`, in `dtype`: codes, salient residuals and L·R."""
    out, in_features = tensors.bias_delta.shape[1], tensors.channel_scale.shape[1]
    bits, group_size = int(tensors.slot_bits[slot]), int(tensors.slot_group[slot])
    words, groups = words_per_row(in_features, bits), group_count(in_features, group_size)
    codes = tensors.codes[slot, : out * words].view(out, words)[rows]
    steps = tensors.steps[slot, : out * groups].view(out, groups)[rows].to(dtype)
    if group_size:
        steps = steps.repeat_interleave(group_size, 1)[:, :in_features]
    levels = unpack_codes(codes, bits, in_features).to(dtype) - (2**bits - 1) / 2
    delta: Tensor = levels * steps * tensors.channel_scale[slot].to(dtype)
    index = tensors.salient_index[slot].long().expand(len(delta), -1)
    delta.scatter_add_(1, index, tensors.salient_value[slot][rows].to(dtype))
    if tensors.left.shape[2]:
        rank = int(tensors.slot_rank[slot])
        delta += tensors.left[slot, :, :rank][rows].to(dtype) @ tensors.right[slot, :rank].to(dtype)
    return delta


class ExpertBank:
    """The low-bit deltas of up to `slots` experts for one weight `[out_features, in_features]`.

    All memory is allocated here, once. `bits` is the widest code the bank holds, `group_size` the finest
    group (0: one step per row), `max_salient`, `max_added_rows` and `max_rank` the most salient channels,
    added vocabulary rows and rank of the low-rank part of an expert. `dtype` is how salient values, added
    rows and the low-rank part are stored: float32 holds either 16-bit type exactly. Raises ValueError or
    TypeError for settings it cannot hold.
    """

    def __init__(
        self,
        slots: int,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = 0,
        max_salient: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        *,
        max_added_rows: int = 0,
        max_rank: int = 0,
    ) -> None:
        for name, value in (("slots", slots), ("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        most = (("max_salient", max_salient), ("max_added_rows", max_added_rows), ("max_rank", max_rank))
        for name, value in most:
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        if max_salient > in_features:
            raise ValueError(f"max_salient {max_salient} exceeds the {in_features} input channels")
        if group_size < 0 or group_size % 32:
            raise ValueError(f"group_size must be 0 or a multiple of 32, not {group_size}")
        if dtype not in VALUE_DTYPES:
            raise TypeError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
        self.slots, self.in_features, self.out_features = slots, in_features, out_features
        self.bits, self.group_size, self.max_salient = check_bits(bits), group_size, max_salient
        self.max_added_rows, self.max_rank, self.dtype = max_added_rows, max_rank, dtype

        def empty(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=of, device=device)

        groups = group_count(in_features, group_size)
        self.tensors = BankTensors(
            codes=empty(slots, out_features * words_per_row(in_features, bits), of=torch.int32),
            steps=empty(slots, out_features * groups, of=torch.float32),
            salient_index=empty(slots, max_salient, of=torch.int32),
            salient_value=empty(slots, out_features, max_salient, of=dtype),
            channel_scale=empty(slots, in_features, of=torch.float16),
            bias_delta=empty(slots, out_features, of=torch.float32),
            left=empty(slots, out_features, max_rank, of=dtype),
            right=empty(slots, max_rank, in_features, of=dtype),
            slot_bits=empty(slots, of=torch.int32),
            slot_group=empty(slots, of=torch.int32),
            slot_rank=empty(slots if max_rank else 0, of=torch.int32),
            bits=bits,
            group_size=group_size,
        )
        self.added_rows = empty(slots, max_added_rows, in_features, of=dtype)
        """`[slots, max_added_rows, in]`: vocabulary rows beyond the base's, for embeddings and heads."""
        self.added_counts = empty(slots, of=torch.int32)
        self._bits_of_slot = [0] * slots
        self._group_of_slot = [0] * slots
        self._added_of_slot = [0] * slots

    @property
    def device(self) -> torch.device:
        """Where the bank's tensors live."""
        return self.tensors.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the bank holds, whatever is loaded."""
        held = (*self.tensors, self.added_rows, self.added_counts)
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))

    def is_loaded(self, slot: int) -> bool:
        """Whether `slot` holds an expert."""
        return self._bits_of_slot[self._slot(slot)] != 0

    def load(
        self,
        slot: int,
        codes: Tensor,
        steps: Tensor,
        salient_index: Tensor | None,
        salient_value: Tensor | None,
        channel_scale: Tensor | None = None,
        bias_delta: Tensor | None = None,
        bits: int | None = None,
        *,
        group_size: int | None = None,
        added_rows: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> None:
        """Put an expert into `slot`, from tensors as an artifact stores them.

        `codes` int32 `[out, ceil(in*bits/32)]`; `steps` `[out, groups]`; `salient_index` int32 `[k]` and
        `salient_value` `[out, k]` (the residual to the code's value); `channel_scale` `[in]`; `bias_delta`
        `[out]`; `added_rows` `[n, in]`; `left` `[out, rank]` and `right` `[rank, in]`, whose product is added
        to the delta. `bits` defaults to the bank's. `group_size` is needed only where `steps` has neither one
        column nor as many as the bank's own group size gives. Everything is checked before anything is
        written: ValueError, TypeError or IndexError leaves the slot as it was.
        """
        slot = self._slot(slot)
        bits = self.bits if bits is None else check_bits(bits)
        if bits > self.bits:
            raise ValueError(f"codes of {bits} bits do not fit a bank of {self.bits}")
        words = words_per_row(self.in_features, bits)
        self._check("codes", codes, (self.out_features, words), (torch.int32,))
        group_size = self._group_size(steps, group_size)
        groups = group_count(self.in_features, group_size)
        self._check("steps", steps, (self.out_features, groups), (torch.float16, torch.float32))
        k = self._check_salient(salient_index, salient_value)
        if channel_scale is not None:
            self._check("channel_scale", channel_scale, (self.in_features,), (torch.float16,))
        if bias_delta is not None:
            self._check("bias_delta", bias_delta, (self.out_features,), VALUE_DTYPES)
        if added_rows is not None:
            if added_rows.ndim != 2 or added_rows.shape[0] > self.max_added_rows:
                raise ValueError(
                    f"added_rows {tuple(added_rows.shape)} do not fit a bank of {self.max_added_rows} rows"
                )
            self._check("added_rows", added_rows, (added_rows.shape[0], self.in_features), VALUE_DTYPES)
        rank = self._check_low_rank(left, right)

        self.clear(slot)
        to = self.tensors
        to.codes[slot, : self.out_features * words].copy_(codes.reshape(-1), non_blocking=True)
        to.steps[slot, : self.out_features * groups].copy_(steps.reshape(-1), non_blocking=True)
        if k and salient_index is not None and salient_value is not None:
            to.salient_index[slot, :k].copy_(salient_index, non_blocking=True)
            to.salient_value[slot, :, :k].copy_(salient_value, non_blocking=True)
        if channel_scale is not None:
            to.channel_scale[slot].copy_(channel_scale, non_blocking=True)
        if bias_delta is not None:
            to.bias_delta[slot].copy_(bias_delta, non_blocking=True)
        if added_rows is not None:
            self._added_of_slot[slot] = added_rows.shape[0]
            self.added_rows[slot, : added_rows.shape[0]].copy_(added_rows, non_blocking=True)
            self.added_counts[slot] = added_rows.shape[0]
        if rank and left is not None and right is not None:
            to.left[slot, :, :rank].copy_(left, non_blocking=True)
            to.right[slot, :rank].copy_(right, non_blocking=True)
            to.slot_rank[slot] = rank
        self._group_of_slot[slot], self._bits_of_slot[slot] = group_size, bits
        to.slot_group[slot] = group_size
        to.slot_bits[slot] = bits

    def clear(self, slot: int) -> None:
        """Empty `slot`. Its memory stays allocated; a token sent to it is an error, never the base."""
        slot = self._slot(slot)
        self._bits_of_slot[slot] = self._group_of_slot[slot] = self._added_of_slot[slot] = 0
        to = self.tensors
        for tensor in (to.slot_bits, to.slot_group, to.salient_index, to.salient_value, to.bias_delta):
            tensor[slot] = 0
        if self.max_rank:
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

    def _group_size(self, steps: Tensor, group_size: int | None) -> int:
        if group_size is None:
            columns = steps.shape[-1] if steps.ndim == 2 else -1
            if columns == 1:
                return 0
            if self.group_size and columns == group_count(self.in_features, self.group_size):
                return self.group_size
            raise ValueError(
                f"steps {tuple(steps.shape)} fit neither one step per row nor groups of {self.group_size}: "
                "pass group_size"
            )
        if group_size < 0 or group_size % 32:
            raise ValueError(f"group_size must be 0 or a multiple of 32, not {group_size}")
        if group_size and not 0 < self.group_size <= group_size:
            raise ValueError(f"groups of {group_size} do not fit a bank of group_size {self.group_size}")
        return group_size

    def _check_salient(self, index: Tensor | None, value: Tensor | None) -> int:
        if index is None and value is None:
            return 0
        if index is None or value is None:
            raise ValueError("salient_index and salient_value come together")
        if index.ndim != 1 or len(index) > self.max_salient:
            raise ValueError(f"salient_index {tuple(index.shape)} does not fit a bank of {self.max_salient} channels")
        self._check("salient_index", index, (len(index),), (torch.int32,))
        self._check("salient_value", value, (self.out_features, len(index)), VALUE_DTYPES)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.in_features:
            raise IndexError(f"salient_index reaches outside the {self.in_features} input channels")
        return len(index)

    def _check_low_rank(self, left: Tensor | None, right: Tensor | None) -> int:
        if left is None and right is None:
            return 0
        if left is None or right is None:
            raise ValueError("left and right come together")
        rank = left.shape[-1] if left.ndim else 0
        if rank > self.max_rank:
            raise ValueError(f"left {tuple(left.shape)} does not fit a bank of max_rank {self.max_rank}")
        self._check("left", left, (self.out_features, rank), VALUE_DTYPES)
        self._check("right", right, (rank, self.in_features), VALUE_DTYPES)
        return rank

    @staticmethod
    def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this bank and bit width need {shape}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
