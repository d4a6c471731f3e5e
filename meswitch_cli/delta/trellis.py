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

import importlib.util
from typing import NamedTuple

import torch

from meswitch_cli.delta.codes import WORD_BITS, TrellisCode, packed_width

#: Rows that the search on a CPU takes at once.
ROWS_TOGETHER = 32
#: Steps on either side of the row's seam that decide in which state the circle begins.
SEAM = 32
#: Step of the four levels that the search tells apart, over a row's root mean square. The noise of a Gaussian is flat
#: around it, and a Laplacian's is least there too.
FOUR_LEVEL_STEP = 0.79
#: Bits of a row's largest weight while its root mean square is found: squares are then exact in fp32, and their sum in
#: float64, in whatever order it is taken.
_PEAK_BITS = 12
#: The clamp of a row's values, in root mean squares for signs and in half steps for four levels.
_CLAMP = {1: 6.0, 2: 10.0}


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


def encode(block: torch.Tensor, code: TrellisCode, channels: torch.Tensor) -> torch.Tensor:
    """The messages `[rows, words]` int32 whose codes are nearest a block's rows.

    Args:
        block: fp32 `[rows, in]`.
        channels: bool `[in]`, those that count; the others cost nothing, whatever code they get.
    """
    found = branches(code)
    values, costs = whole_numbers(block, code, channels, found)
    if block.device.type == "cpu" and importlib.util.find_spec("numba"):
        from meswitch_cli.delta.viterbi_cpu import best_messages
    else:
        from meswitch_cli.delta.viterbi import best_messages
    return best_messages(values, costs, code, found, SEAM)


def whole_numbers(
    block: torch.Tensor, code: TrellisCode, channels: torch.Tensor, found: Branches
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that the search sees, int16 `[rows, channels]` filled up to whole words, and what an outer level costs
    beside them, int16 `[channels]`.

    With y a weight in half steps, a level l of -3, -1, 1 or 3 wins l * y - (l * l - 1) / 2; a sign, its product with y.
    """
    counted = channels.to(block.dtype)
    masked = block * counted
    peak = masked.abs().amax(1, keepdim=True)
    exponent = torch.frexp(peak).exponent.clamp(min=-100, max=100)
    size = torch.ldexp(torch.ones_like(peak), _PEAK_BITS - exponent)  # a power of two: the product is exact
    coarse = (masked * size).round_()
    energy = coarse.square_().sum(1, keepdim=True, dtype=torch.float64)
    rms = (energy / counted.sum().clamp(min=1)).sqrt() / size
    unit = int(found.largest / _CLAMP[code.width])
    length = rms if code.width == 1 else rms * (FOUR_LEVEL_STEP / 2)
    factor = torch.where(length > 0, unit / length, 0.0).float()
    values = masked.mul_(factor).round_().clamp_(-found.largest, found.largest).to(torch.int16)
    costs = (counted * (4 * unit)).to(torch.int16)
    missing = code.words(block.shape[1]) * WORD_BITS * code.channels_a_bit - block.shape[1]
    if missing:
        values, costs = (torch.nn.functional.pad(item, (0, missing)) for item in (values, costs))
    return values, costs
