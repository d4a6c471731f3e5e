"""Low-bit codes packed into 32-bit words: little-endian along the input dimension, or in planes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WORD_BITS = 32
BIT_WIDTHS = (1, 2, 4)
"""The widths a code may have, ascending. Each divides 32, so that no code straddles two words."""
PLANE_WORDS = 32
"""Words of a row that hold their codes in planes together; the last of a row may be fewer."""


def widths_in(bits: int) -> tuple[int, ...]:
    """The widths that slots of a bank of `bits` may have, widest first."""
    return tuple(width for width in reversed(BIT_WIDTHS) if width <= bits)


def check_bits(bits: int) -> int:
    """Return `bits`, or raise ValueError where it is not a width the kernels know."""
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits must be one of {BIT_WIDTHS}, not {bits!r}")
    return bits


def codes_per_word(bits: int) -> int:
    """Number of codes that an int32 word holds."""
    return WORD_BITS // bits


def words_per_row(in_features: int, bits: int) -> int:
    """Number of int32 words that hold one output row of `in_features` codes."""
    return (in_features * bits + WORD_BITS - 1) // WORD_BITS


def group_count(in_features: int, group_size: int) -> int:
    """Number of steps an output row has; `group_size` 0 means one for the whole row."""
    return 1 if group_size == 0 else -(-in_features // group_size)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes `[out, in]` (any integer dtype) into int32 words `[out, ceil(in*bits/32)]`.

    Code i of a row occupies bits `(i*bits) % 32` and up of word `(i*bits) // 32`; padding bits are zero.
    """
    check_bits(bits)
    out_features, in_features = codes.shape
    per_word = codes_per_word(bits)
    words = words_per_row(in_features, bits)
    padded = torch.zeros(out_features, words * per_word, dtype=torch.int64, device=codes.device)
    padded[:, :in_features] = codes
    shifts = torch.arange(per_word, device=codes.device) * bits
    packed = (padded.view(out_features, words, per_word) << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_codes(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Unpack int32 words `[out, words]` into uint8 codes `[out, in_features]`."""
    check_bits(bits)
    shifts = torch.arange(codes_per_word(bits), device=words.device, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :in_features].to(torch.uint8)


def to_planes(words: Tensor, bits: int) -> Tensor:
    """Words `[out, words]` of `pack_codes` with the codes of each `PLANE_WORDS` words rearranged in planes.

    Of n words together, plane j is bits `j*bits` and up of every half word, and holds 2n neighbouring channels: the
    words' channel `j*2n + 2w + h` lies in half h of word w. So one mask takes a pair of neighbours from each word.
    """
    check_bits(bits)
    return _by_blocks(words, lambda block: _block_to_planes(block, bits))


def from_planes(words: Tensor, bits: int) -> Tensor:
    """The inverse of `to_planes`."""
    check_bits(bits)
    return _by_blocks(words, lambda block: _block_from_planes(block, bits))


def _by_blocks(words: Tensor, rearrange: Callable[[Tensor], Tensor]) -> Tensor:
    """`rearrange` of `[out, blocks, words of each]`, the whole blocks at once and then the rest of each row."""
    out_features, count = words.shape
    whole = count // PLANE_WORDS * PLANE_WORDS
    result = torch.empty_like(words)
    for part, target in ((words[:, :whole], result[:, :whole]), (words[:, whole:], result[:, whole:])):
        if part.shape[1]:
            size = min(PLANE_WORDS, part.shape[1])
            target.copy_(rearrange(part.reshape(out_features, -1, size)).view(out_features, -1))
    return result


def _block_to_planes(words: Tensor, bits: int) -> Tensor:
    count, mask = words.shape[-1], (1 << bits) - 1
    pair = 2 * torch.arange(count, device=words.device)
    result = torch.zeros_like(words)
    for plane in range(WORD_BITS // 2 // bits):
        channel = plane * 2 * count + pair
        both = words[..., channel // codes_per_word(bits)] >> (channel % codes_per_word(bits) * bits).int()
        result |= ((both & mask) | ((both >> bits) & mask) << 16) << (plane * bits)
    return result


def _block_from_planes(words: Tensor, bits: int) -> Tensor:
    count, per_word, mask = words.shape[-1], codes_per_word(bits), (1 << bits) - 1
    first = per_word * torch.arange(count, device=words.device)
    result = torch.zeros_like(words)
    for code in range(per_word):
        plane, place = (first + code) // (2 * count), (first + code) % (2 * count)
        own = words[..., place // 2] >> (plane * bits + place % 2 * 16).int()
        result |= (own & mask) << (code * bits)
    return result
