"""What a bank is given of one expert: its delta of one weight, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import BIT_WIDTHS, check_bits, group_count, words_per_row

GROUP_MULTIPLE = 32
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The most that any delta in a bank has: widest codes, finest groups (0: one step per row), and so on.

    Raises:
        ValueError: a number is impossible.
    """

    bits: int = BIT_WIDTHS[0]
    group_size: int = 0
    salient: int = 0
    added_rows: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for name in ("salient", "added_rows", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        check_group_size(self.group_size)

    def joined(self, other: Capacity) -> Capacity:
        """What holds either's deltas."""
        return Capacity(
            bits=max(self.bits, other.bits),
            group_size=min((size for size in (self.group_size, other.group_size) if size), default=0),
            salient=max(self.salient, other.salient),
            added_rows=max(self.added_rows, other.added_rows),
            rank=max(self.rank, other.rank),
        )


@dataclass(frozen=True, kw_only=True)
class ExpertDelta:
    """One expert's delta of one weight `[out, in]`, as an artifact stores it but for the low-rank part.

    Attributes:
        bits: width of the codes.
        codes: int32 `[out, ceil(in * bits / 32)]`, as `pack_codes` makes them.
        steps: float16 or float32 `[out, groups]`.
        group_size: input channels that share a step, a multiple of 32; 0 where there is one step per row.
        salient_index: int32 `[k]`, distinct channels.
        salient_value: `[out, k]`, the residual to the code's value.
        channel_scale: float16 `[in]`; None is all ones.
        bias_delta: `[out]`.
        added_rows: `[n, in]`, vocabulary rows beyond the base's.
        left, right: `[out, rank]` and `[rank, in]`, whose product is added.
    """

    bits: int
    codes: Tensor
    steps: Tensor
    group_size: int = 0
    salient_index: Tensor | None = None
    salient_value: Tensor | None = None
    channel_scale: Tensor | None = None
    bias_delta: Tensor | None = None
    added_rows: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def of_nothing(cls, in_features: int, out_features: int) -> ExpertDelta:
        """A delta of zeros."""
        bits = BIT_WIDTHS[0]
        words = words_per_row(in_features, bits)
        return cls(
            bits=bits,
            codes=torch.zeros(out_features, words, dtype=torch.int32),
            steps=torch.zeros(out_features, 1),
        )

    def check(self, in_features: int, out_features: int, capacity: Capacity) -> None:
        """Refuse a delta that is not one of a weight `[out_features, in_features]`, or more than a bank holds.

        Raises:
            ValueError, TypeError, IndexError: naming the tensor.
        """
        if check_bits(self.bits) > capacity.bits:
            raise ValueError(f"codes of {self.bits} bits do not fit a bank of {capacity.bits}")
        _check("codes", self.codes, (out_features, words_per_row(in_features, self.bits)), (torch.int32,))
        check_group_size(self.group_size)
        if self.group_size and not 0 < capacity.group_size <= self.group_size:
            raise ValueError(f"groups of {self.group_size} do not fit a bank of group_size {capacity.group_size}")
        groups = group_count(in_features, self.group_size)
        _check("steps", self.steps, (out_features, groups), (torch.float16, torch.float32))
        self._check_salient(in_features, out_features, capacity.salient)
        if self.channel_scale is not None:
            _check("channel_scale", self.channel_scale, (in_features,), (torch.float16,))
        if self.bias_delta is not None:
            _check("bias_delta", self.bias_delta, (out_features,), VALUE_DTYPES)
        if self.added_rows is not None:
            rows = self.added_rows
            if rows.ndim != 2 or rows.shape[0] > capacity.added_rows:
                raise ValueError(f"added_rows {tuple(rows.shape)} do not fit a bank of {capacity.added_rows} rows")
            _check("added_rows", rows, (rows.shape[0], in_features), VALUE_DTYPES)
        self._check_low_rank(in_features, out_features, capacity.rank)

    def _check_salient(self, in_features: int, out_features: int, most: int) -> None:
        index, value = self.salient_index, self.salient_value
        if index is None and value is None:
            return
        if index is None or value is None:
            raise ValueError("salient_index and salient_value come together")
        if index.ndim != 1 or len(index) > most:
            raise ValueError(f"salient_index {tuple(index.shape)} does not fit a bank of {most} channels")
        _check("salient_index", index, (len(index),), (torch.int32,))
        _check("salient_value", value, (out_features, len(index)), VALUE_DTYPES)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < in_features:
            raise IndexError(f"salient_index reaches outside the {in_features} input channels")

    def _check_low_rank(self, in_features: int, out_features: int, most: int) -> None:
        left, right = self.left, self.right
        if left is None and right is None:
            return
        if left is None or right is None:
            raise ValueError("left and right come together")
        rank = left.shape[-1] if left.ndim else 0
        if rank > most:
            raise ValueError(f"left {tuple(left.shape)} does not fit a bank of rank {most}")
        _check("left", left, (out_features, rank), VALUE_DTYPES)
        _check("right", right, (rank, in_features), VALUE_DTYPES)


def check_group_size(group_size: int) -> None:
    """Raise ValueError for a number of channels that no group can have."""
    if group_size < 0 or group_size % GROUP_MULTIPLE:
        raise ValueError(f"group_size must be 0 or a multiple of {GROUP_MULTIPLE}, not {group_size}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this bank and bit width need {shape}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
