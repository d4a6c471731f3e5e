"""Trellis codes: fewer stored bits than weights, decoded by XOR to the scalar codes that everything else knows.

One message bit stands for `channels_a_bit` channels. The message of a row is a circle of whole words; plane p is, bit
by bit, the parity of the message's last bits under the mask `taps[p]`, and the planes are the bits of the row's codes:
of word w, planes `width * v` and up make the codes of channels 32 * (w * channels_a_bit + v) and the 31 that follow. So
planes lie as packed 1-bit codes do, and a word decodes by itself, given a few bits of the one before it.

Which message suits a row best is found by the Viterbi algorithm, all in whole numbers, so that the bytes do not depend
on the machine. Convolutional codes as quantisers: Marcellin and Fischer, IEEE T-COM 38, 1990. Nearest kin among
quantisers of language models is QTIP (arXiv 2406.11235), whose codes are of whole weights at 2 bits and more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from meswitch_cli.delta.codes import WORD_BITS, TrellisCode, packed_width

#: Rows that the search on a CPU takes at once.
ROWS_TOGETHER = 32


class Branches(NamedTuple):
    """What the search knows of a code.

    Attributes:
        labels: `[states / 2, 2, 2]` int64, the planes' bits (plane p is bit p) on the branch to state 2j + m from state
            j and from state j + states / 2.
        largest: magnitude of a value that 16-bit path metrics have room for.
        handicap: what keeps a path from beginning anywhere but in its start state.
    """

    labels: torch.Tensor
    largest: int
    handicap: int


@functools.lru_cache(16)
def branches(code: TrellisCode) -> Branches:
    """Two path metrics differ by at most what `memory` steps can make of it, and at the start by the handicap too; the
    branches added, that must stay within 15 bits, so that differences of wrapped metrics have the right sign."""
    half = code.states // 2
    j = torch.arange(half)
    window = torch.stack(
        [torch.stack([((j + part * half) << 1) | bit for part in (0, 1)], -1) for bit in (0, 1)], dim=1
    )
    labels = sum(_parity(window & mask) << plane for plane, mask in enumerate(code.taps))
    span = {1: 2, 2: 6}[code.width] * code.channels_a_bit
    largest = ((1 << 15) - 2) // ((2 * code.memory + 1) * span)
    return Branches(torch.as_tensor(labels), largest, code.memory * span * largest)


def _parity(bits: torch.Tensor) -> torch.Tensor:
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return bits & 1


def decode(messages: torch.Tensor, code: TrellisCode, in_features: int) -> torch.Tensor:
    """Messages `[out, words]` int32 to packed scalar codes of `code.width` bits, int32, as `codes.pack` makes them."""
    before = messages.roll(1, 1)
    shifted = [messages]
    for shift in range(1, code.memory + 1):
        carried = (before >> (WORD_BITS - shift)) & ((1 << shift) - 1)  # the shift keeps the sign; the mask drops it
        shifted.append((messages << shift) | carried)
    planes = []
    for mask in code.taps:
        plane = torch.zeros_like(messages)
        for shift, word in enumerate(shifted):
            if mask >> shift & 1:
                plane ^= word
        planes.append(plane)
    if code.width == 2:
        planes = [half for low, high in zip(planes[::2], planes[1::2], strict=True) for half in _interleaved(low, high)]
    width = packed_width(in_features, code.width)
    words = torch.stack(planes, -1).flatten(1)[:, :width].contiguous()
    used = in_features * code.width - (width - 1) * WORD_BITS
    if used < WORD_BITS:
        words[:, -1] &= (1 << used) - 1
    return words


def _interleaved(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two planes' words as the two words of 2-bit codes that they make."""
    return tuple(_spread(low >> shift) | (_spread(high >> shift) << 1) for shift in (0, 16))  # type: ignore[return-value]


def _spread(words: torch.Tensor) -> torch.Tensor:
    """The lower 16 bits of each word, moved to its even bits."""
    words = words & 0xFFFF
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        words = (words | words << shift) & mask
    return words
