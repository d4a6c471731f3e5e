"""Of which rank a delta is, where rounding to the expert's type hides it.

A merged LoRA is W + B·A, rounded to what the file holds. So its delta has full rank, but a product of few directions
explains it: the base plus that product, rounded, is the expert again. What the product leaves of the delta is then what
rounding moves, and no more. Both energies are summed over the very weights, so entries that rounding put back to the
base's cost what they should, and in fp32, where rounding is next to nothing, the rank must be exact. Directions of
noise do not help: they draw base plus product towards the expert's own grid, where rounding moves less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from meswitch_cli.delta.low_rank import HALF_BITS, leading_directions
from meswitch_cli.delta.sweep import FACTOR_BLOCK_ELEMENTS, RowBlocks

#: Ranks that are tried, in order.
RANKS = (4, 8, 16, 32, 64, 128)
#: Energy that a product leaves, over what rounding moves, up to which it explains all tensors, and any one of them. At
#: their own rank LoRAs are below 1.3 (random ones of rank 4 to 64 on matrices 72 to 1,024 wide; SmolLM2-135M's trained
#: ones of rank 16 and 64 have 1.06 and 1.12, their worst tensors 1.29 and 1.33); at 64 directions SmolLM2's full
#: fine-tunes are above 1.6, at 128 above 1.5, and its update of small steps at 2.0 and 1.6.
MOST_LEFT, MOST_LEFT_OF_ONE = 1.3, 1.5
#: Or over the delta's own: a tenth of what factors of 8 bits lose, and more than fp32 arithmetic does.
NEGLIGIBLE = 1e-5


class Left(NamedTuple):
    """What a product of some rank leaves of a delta.

    Attributes:
        energy: squared norm of the delta without the product.
        rounding: squared norm of what rounding base plus product to the expert's type moves.
        delta: squared norm of the delta.
    """

    energy: float
    rounding: float
    delta: float

    def __add__(self, other: Left) -> Left:  # type: ignore[override]
        return Left(*(own + its for own, its in zip(self, other, strict=True)))

    def is_rounding(self, most: float = MOST_LEFT) -> bool:
        """Whether rounding explains what is left."""
        return self.energy <= most * self.rounding + NEGLIGIBLE * self.delta


NOTHING = Left(0.0, 0.0, 0.0)


def left_by_rank(base: torch.Tensor, expert: torch.Tensor, ranks: Sequence[int] = RANKS) -> list[Left]:
    """What products of each of the ranks leave of `expert - base`, both `[out, in]`.

    Raises:
        FloatingPointError: a weight is NaN or infinite.
    """
    blocks, grid = RowBlocks(base, expert, "cpu"), coarsest_type(expert)
    found = leading_directions(blocks.tall, blocks.shape, min(ranks[-1], *blocks.shape), "cpu", HALF_BITS)
    delta = float(found.energy.sum())

    def left(place: slice) -> torch.Tensor:
        own, wanted = base[place].double(), expert[place].double()
        done, sums = 0, []
        for rank in ranks:
            own.addmm_(found.left[place, done:rank].double(), found.right[done:rank].double())
            done = rank
            rounded = own.to(grid).double()
            sums.append(torch.stack([(wanted - own).square().sum(), (rounded - own).square().sum()]))
        return torch.stack(sums)

    step = max(1, FACTOR_BLOCK_ELEMENTS // blocks.shape[1])
    total = sum(left(slice(row, row + step)) for row in range(0, blocks.shape[0], step))
    return [Left(energy, rounding, delta) for energy, rounding in torch.as_tensor(total).tolist()]


def coarsest_type(values: torch.Tensor) -> torch.dtype:
    """The coarsest floating type that holds all of the values: of a file in fp32 it may be what it was saved from."""
    for dtype in (torch.bfloat16, torch.float16):
        if values.dtype == dtype or bool((values.to(dtype).to(values.dtype) == values).all()):
            return dtype
    return values.dtype
