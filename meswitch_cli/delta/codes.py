"""The codes that a delta may be stored in, one entry a kind, and how a row of them lies in 32-bit words.

Scalar codes are mid-rise uniform: code c stands for c - (2^bits - 1) / 2 times the step, for -1.5, -0.5, 0.5 or 1.5 at
2 bits. Trellis codes decode to scalar ones, see `trellis`.
Torch is imported where it is used: the command line offers these codes, and its help must not wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

WORD_BITS = 32


class Code(NamedTuple):
    """One kind of code.

    Attributes:
        bits: that a weight takes.
        gaussian_step: step of the best such quantiser of a unit Gaussian (Max 1960, table II): where fitting starts.
        version: of the artifact's format, the first whose readers know the code.
    """

    bits: int
    gaussian_step: float
    version: int = 1

    @property
    def group_multiple(self) -> int:
        """What the size of a group of channels is a multiple of: of 32, and of whole words."""
        return math.lcm(32, WORD_BITS // self.bits)

    @property
    def width(self) -> int:
        """Bits of the scalar code that it decodes to: its own."""
        return self.bits

    @property
    def largest(self) -> float:
        """The largest multiple of the step."""
        return ((1 << self.bits) - 1) / 2


CODES = {code.bits: code for code in (Code(1, 1.5958), Code(2, 0.9957), Code(4, 0.3352))}


@dataclass(frozen=True)
class TrellisCode:
    """A code that stores fewer bits than it decodes to, see `trellis`.

    Attributes:
        bits: stored for a weight, one over a whole number.
        taps: the mask of each plane over the message's last `memory + 1` bits; bit 0 is the newest.
        states: of the search for a message, a power of two.
    """

    bits: float
    taps: tuple[int, ...]
    states: int

    @property
    def channels_a_bit(self) -> int:
        """Channels that a message bit stands for."""
        return round(1 / self.bits)

    @property
    def width(self) -> int:
        """Bits of the scalar code that it decodes to."""
        return len(self.taps) // self.channels_a_bit

    @property
    def memory(self) -> int:
        """Message bits before the newest that a plane sees."""
        return self.states.bit_length() - 1

    @property
    def least_noise(self) -> float:
        """What no unbiased code of this rate can be below on a Gaussian, over its energy: 1 / (2^(2 bits) - 1)."""
        return 1 / (math.exp2(2 * self.bits) - 1)

    def words(self, in_features: int) -> int:
        """Words that the message of a row takes."""
        return -(-in_features // (WORD_BITS * self.channels_a_bit))

    def problem(self) -> str | None:
        """What no code can be; None where it can be."""
        if not 1 / WORD_BITS <= self.bits <= 1 or self.bits * self.channels_a_bit != 1:
            return f"a trellis code cannot have {self.bits} bits"
        if self.states not in STATES:
            return f"{self.states} states are none of {', '.join(map(str, STATES))}"
        if len(self.taps) not in (self.channels_a_bit, 2 * self.channels_a_bit):
            return f"{len(self.taps)} taps do not go with {self.bits} bits"
        if not all(0 < mask < 2 * self.states for mask in self.taps):
            return f"taps reach beyond {self.states} states"
        return None


#: Of the artifact's format, the first whose readers know trellis codes.
TRELLIS_VERSION = 3
#: Numbers of states that a trellis code may have.
STATES = tuple(1 << memory for memory in range(4, 13))
#: Trellis codes by what they store for a weight; their taps are found by tests/benchmarks/trellis_taps.py.
TRELLIS_CODES = {
    code.bits: code
    for code in (
        TrellisCode(0.125, (0x49, 0x4D, 0x51, 0x55, 0x63, 0x6F, 0x73, 0x77), 64),
        TrellisCode(0.25, (0x49, 0x5D, 0x67, 0x7F), 64),
        TrellisCode(0.5, (0x57, 0x75), 64),
        TrellisCode(1, (0x22, 0x57), 64),
    )
}
CodeName = Literal["scalar", "trellis"]
#: What may be stored for a weight, by any code.
RATES = tuple(sorted({*CODES, *TRELLIS_CODES}))


def listed(rates: Iterable[float]) -> str:
    """Rates as messages list them."""
    return " or ".join(", ".join(map(str, rates)).rsplit(", ", 1))


def find_code(bits: float, name: CodeName | None = None) -> Code | TrellisCode:
    """The code of a rate: by default scalar where there is such a code.

    Raises:
        ValueError: there is none.
    """
    scalar = (name or default_code(bits)) == "scalar"
    codes: tuple[Code | TrellisCode, ...] = (*CODES.values(),) if scalar else (*TRELLIS_CODES.values(),)
    found = next((code for code in codes if code.bits == bits), None)
    if found is None:
        kind = f"{name} codes: " if name else ""
        raise ValueError(f"{kind}bits must be {listed((code.bits for code in codes) if name else RATES)}, not {bits}")
    return found


def default_code(bits: float) -> CodeName:
    return "trellis" if bits in TRELLIS_CODES and bits not in CODES else "scalar"


def packed_width(in_features: int, bits: int) -> int:
    """Words that one row of codes takes."""
    return -(-in_features * bits // WORD_BITS)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes `[out, in]` uint8 into `[out, ceil(in * bits / 32)]` int32; padding bits are zero.

    Code i of a row lies at bits (i * bits) % 32 and up of word (i * bits) // 32.
    """
    import torch

    rows, columns = codes.shape
    width = packed_width(columns, bits)
    padding = width * WORD_BITS // bits - columns
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    bytes_together = {1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]  # the codes of a packed byte, a byte each
    lanes = codes.contiguous().flatten().view(bytes_together)  # flat: a single row may have any stride
    joined = 1  # codes that lie side by side, without a gap, at the bottom of each byte
    while joined < 8 // bits:
        lanes = lanes | lanes >> (joined * (8 - bits))
        joined *= 2
    return (lanes & 0xFF).to(torch.uint8).view(torch.int32).view(rows, width)


def unpack(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Invert `pack`: `[out, words]` int32 to codes `[out, in_features]` uint8."""
    import torch

    as_bytes = packed.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    lanes = [(as_bytes >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(lanes, dim=-1).reshape(packed.shape[0], -1)[:, :in_features]
