"""Numbers of codes, and of messages, as launches of the Triton kernels see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from .groups import DECODE_TILES
from .messages import FIRST_NUMBER, MESSAGES
from .packing import PLANE_WORDS, codes_per_word
from .triton_merge_blocks import block_channels
from .triton_messages import message_channels


def families(formats: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Formats of a bank by the launch that serves them: the scalar codes together, and each message alone.

    A kernel of all of them would spill and take a minute to compile, and each mixture of formats would be another one
    (docs/results/kernels-compile.md).
    """
    scalar = tuple(number for number in formats if number < FIRST_NUMBER)
    return (*([scalar] if scalar else []), *((number,) for number in formats if number > FIRST_NUMBER))


def family_constants(family: tuple[int, ...], in_features: int, *, grouped: bool) -> dict[str, Any]:
    """What a kernel is told of the codes that it serves. Messages have one step a row, in a bank of groups too."""
    return {
        "NUMBERS": family,
        "GROUPED": grouped and family[0] < FIRST_NUMBER,
        "EVEN": rows_are_whole(in_features, family),
    }


def rows_are_whole(in_features: int, formats: Sequence[int]) -> bool:
    """Whether rows of codes of any of these numbers end with a whole block of words."""
    return all(in_features % max(decoded_together(number), block_channels(number)) == 0 for number in formats)


def decoded_together(number: int) -> int:
    """The most channels of codes of a number that decode takes at once."""
    if number > FIRST_NUMBER:
        return int(message_channels(number, DECODE_TILES[-1][1]))
    return PLANE_WORDS * codes_per_word(number)


def reordered(formats: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """The messages among some formats that want x in another order: those that become planes."""
    return () if dtype == torch.float32 else tuple(number for number in formats if number > FIRST_NUMBER)


def placed(formats: Sequence[int], dtype: torch.dtype, *, grouped: bool) -> bool:
    """Whether scalar codes of a bank with such formats would be set into mantissas, for which x is prepared.

    The same for all banks that have any codes, so that there are fewer kernels.
    """
    return dtype != torch.float32 and not grouped and len(formats) > 0


def prepared(messages: Sequence[int]) -> tuple[int, ...]:
    """The messages that the kernel knows which writes x in their order: one alone, or all that there are."""
    return tuple(messages) if len(messages) < 2 else tuple(MESSAGES)


def reordered_width(in_features: int, messages: Sequence[int]) -> int:
    """Channels of a row of x in the order that some messages want, with zeros after the last."""
    blocks = map(decoded_together, messages)
    return max((triton.cdiv(in_features, block) * block for block in blocks), default=in_features)
