"""What a bank is given of one expert: its delta of one weight, as tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .messages import FIRST_NUMBER, MESSAGES, row_words
from .packing import check_bits, codes_per_word, group_count

GROUP_MULTIPLE = 32
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The most that any delta in a bank has: widest codes (0: none has any), finest groups (0: one step per row), ...

    `messages` are numbers of the trellis codes (`messages.MESSAGES`) that some may have. `channel_scale` says whether
    any has channel scales; kernels of a bank without them do not read any.

    Raises:
        ValueError: a number is impossible.
    """

    bits: int = 0
    messages: tuple[int, ...] = ()
    group_size: int = 0
    salient: int = 0
    added_rows: int = 0
    rank: int = 0
    channel_scale: bool = False

    def __post_init__(self) -> None:
        if self.bits:
            check_bits(self.bits)
        if self.messages != tuple(number for number in MESSAGES if number in self.messages):
            raise ValueError(f"messages {self.messages} are not some of {tuple(MESSAGES)}, in this order")
        for name in ("salient", "added_rows", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        check_group_size(self.group_size)

    def joined(self, other: Capacity) -> Capacity:
        """What holds either's deltas."""
        return Capacity(
            bits=max(self.bits, other.bits),
            messages=tuple(number for number in MESSAGES if number in self.messages + other.messages),
            group_size=min((size for size in (self.group_size, other.group_size) if size), default=0),
            salient=max(self.salient, other.salient),
            added_rows=max(self.added_rows, other.added_rows),
            rank=max(self.rank, other.rank),
            channel_scale=self.channel_scale or other.channel_scale,
        )


@dataclass(frozen=True, kw_only=True)
class ExpertDelta:
    """One expert's delta of one weight `[out, in]`, as an artifact stores it but for the low-rank part.

    Attributes:
        bits: width of the codes; 0 where there are none, and what is added is the rest alone.
        message: channels that a bit of a trellis code's message stands for, of a code in `messages.MESSAGES` whose
            width `bits` is; 0 where codes are stored themselves.
        codes: int32 `[out, ceil(in * bits / 32)]`, as `pack_codes` makes them, or messages.
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
    message: int = 0

    @property
    def number(self) -> int:
        """What its codes are known by: their width, or a message's number; 0 without codes."""
        return FIRST_NUMBER + self.message if self.message else self.bits

    @classmethod
    def of_nothing(cls, in_features: int, out_features: int) -> ExpertDelta:
        """A delta of zeros, without codes."""
        return cls(bits=0, codes=torch.zeros(out_features, 0, dtype=torch.int32), steps=torch.zeros(out_features, 1))

    def check(self, in_features: int, out_features: int, capacity: Capacity) -> None:
        """Refuse a delta that is not one of a weight `[out_features, in_features]`, or more than a bank holds.

        Raises:
            ValueError, TypeError, IndexError: naming the tensor.
        """
        check_group_size(self.group_size, codes_per_word(check_bits(self.bits)) if self.bits else 1)
        for one, other in (("salient_index", "salient_value"), ("left", "right")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"{one} and {other} come together")
        if not self.bits and (self.salient_index is not None or self.channel_scale is not None or self.group_size):
            raise ValueError("salient channels, channel scales and groups go with codes, of which there are none")
        salient = 0 if self.salient_index is None else self.salient_index.numel()
        added_rows = 0 if self.added_rows is None else self.added_rows.numel() // in_features
        rank = 0 if self.left is None else self.left.numel() // out_features
        if self.message and (self.number not in MESSAGES or MESSAGES[self.number].width != self.bits):
            raise ValueError(f"no message has a bit for {self.message} channels of {self.bits} bits")
        if self.message and self.number not in capacity.messages:
            raise ValueError(f"message {self.number} does not fit a bank of messages {capacity.messages}")
        if self.message and self.group_size:
            raise ValueError("a message has one step per row")
        own = {"bits": 0 if self.message else self.bits, "salient": salient, "added_rows": added_rows, "rank": rank}
        for name, most in own.items():
            if most > getattr(capacity, name):
                raise ValueError(f"{name} {most} does not fit a bank of {getattr(capacity, name)}")
        if self.channel_scale is not None and not capacity.channel_scale:
            raise ValueError("channel_scale does not fit a bank without channel scales")
        if self.group_size and not 0 < capacity.group_size <= self.group_size:
            raise ValueError(f"groups of {self.group_size} do not fit a bank of group_size {capacity.group_size}")
        expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "codes": ((out_features, row_words(in_features, self.number)), (torch.int32,)),
            "steps": ((out_features, group_count(in_features, self.group_size)), (torch.float16, torch.float32)),
            "salient_index": ((salient,), (torch.int32,)),
            "salient_value": ((out_features, salient), VALUE_DTYPES),
            "channel_scale": ((in_features,), (torch.float16,)),
            "bias_delta": ((out_features,), VALUE_DTYPES),
            "added_rows": ((added_rows, in_features), VALUE_DTYPES),
            "left": ((out_features, rank), VALUE_DTYPES),
            "right": ((rank, in_features), VALUE_DTYPES),
        }
        for name, (shape, dtypes) in expected.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this bank and bit width need {shape}")
            if tensor.dtype not in dtypes:
                raise TypeError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
        index = self.salient_index
        if index is not None and salient and not 0 <= int(index.min()) <= int(index.max()) < in_features:
            raise IndexError(f"salient_index reaches outside the {in_features} input channels")


def check_group_size(group_size: int, per_word: int = 1) -> None:
    """Raise ValueError for a number of channels that no group of codes, `per_word` in a word, can have."""
    multiple = math.lcm(GROUP_MULTIPLE, per_word)
    if group_size < 0 or group_size % multiple:
        raise ValueError(f"group_size must be 0 or a multiple of {multiple}, not {group_size}")
