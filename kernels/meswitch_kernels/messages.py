"""Trellis codes: messages of fewer bits than weights, of which XOR makes the signs or levels of a row.

One message bit stands for `channels_a_bit` channels. The message of a row is a circle of whole words; plane p is, bit
by bit, the parity of the message's last bits under the mask `taps[p]`. Of word w, planes `width * v` and up are the
bits of the codes of channels 32 * (w * channels_a_bit + v) and the 31 that follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .packing import WORD_BITS, words_per_row

FIRST_NUMBER = 16
"""What a message's number is above: the numbers below are widths of scalar codes."""


class Message(NamedTuple):
    """A trellis code: the masks of its planes over the message's last bits, bit 0 the newest."""

    channels_a_bit: int
    taps: tuple[int, ...]

    @property
    def number(self) -> int:
        """What a slot's codes are known by; a scalar code's number is its width."""
        return FIRST_NUMBER + self.channels_a_bit

    @property
    def width(self) -> int:
        """Bits of the scalar code that it makes."""
        return len(self.taps) // self.channels_a_bit

    @property
    def memory(self) -> int:
        """Message bits before the newest that a plane sees."""
        return max(mask.bit_length() for mask in self.taps) - 1


MESSAGES = {
    message.number: message
    for message in (
        Message(8, (0x49, 0x4D, 0x51, 0x55, 0x63, 0x6F, 0x73, 0x77)),
        Message(4, (0x49, 0x5D, 0x67, 0x7F)),
        Message(2, (0x57, 0x75)),
        Message(1, (0x22, 0x57)),
    )
}
"""The codes that kernels decode, by number, shortest first; any other is decoded before it is loaded."""


def find_message(channels_a_bit: int, taps: tuple[int, ...]) -> Message | None:
    """The message that kernels decode, if this is one."""
    found = MESSAGES.get(FIRST_NUMBER + channels_a_bit)
    return found if found is not None and found.taps == taps else None


def row_words(in_features: int, number: int) -> int:
    """Words of an output row whose codes, or message, have this number."""
    if number < FIRST_NUMBER:
        return words_per_row(in_features, number)
    return -(-in_features // (WORD_BITS * (number - FIRST_NUMBER)))


def code_width(number: int) -> int:
    """Bits of the code that codes of a number, or a message, are computed with."""
    return number if number < FIRST_NUMBER else MESSAGES[number].width


def decode_message(words: Tensor, message: Message, in_features: int) -> Tensor:
    """Messages int32 `[rows, words]` as codes uint8 `[rows, in_features]`."""
    before = words.roll(1, 1)
    bit = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    # Bits of the word before and of the word, in their order: bit i of the word is at 32 + i.
    both = torch.cat([(each.unsqueeze(-1) >> bit) & 1 for each in (before, words)], -1).to(torch.uint8)
    planes = []
    for mask in message.taps:
        shifts = [shift for shift in range(mask.bit_length()) if mask >> shift & 1]
        seen = (both[..., WORD_BITS - shift : 2 * WORD_BITS - shift] for shift in shifts)
        planes.append(sum(seen, torch.zeros_like(both[..., :WORD_BITS])) & 1)
    codes = sum(torch.stack(planes[bit :: message.width], -2) << bit for bit in range(message.width))
    assert isinstance(codes, Tensor)
    return codes.flatten(1)[:, :in_features]
