"""From rows to a trellis code's messages: what the search sees of a row, and which search."""

from __future__ import annotations

import importlib.util

import torch

from meswitch_cli.delta import viterbi
from meswitch_cli.delta.codes import WORD_BITS, TrellisCode
from meswitch_cli.delta.trellis import Branches, branches

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


def encode(block: torch.Tensor, code: TrellisCode, channels: torch.Tensor) -> torch.Tensor:
    """The messages `[rows, words]` int32 whose codes are nearest a block's rows.

    Args:
        block: fp32 `[rows, in]`.
        channels: bool `[in]`, those that count; the others cost nothing, whatever code they get.
    """
    found = branches(code)
    values, costs = whole_numbers(block, code, channels, found)
    if block.device.type == "cpu" and importlib.util.find_spec("numba"):
        from meswitch_cli.delta import viterbi_cpu

        return viterbi_cpu.best_messages(values, costs, code, found, SEAM)
    return viterbi.best_messages(values, costs, code, found, SEAM)


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
