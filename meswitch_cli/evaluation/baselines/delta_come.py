"""Delta-CoMe: singular directions in mixed precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method
from meswitch_cli.evaluation.baselines.rtn import round_to_nearest

#: Singular vectors that Delta-CoMe keeps at 8 and at 3 bits; the rest have 2 (its published run at 1/16 of the size).
COME_VECTORS = {8: 2, 3: 32}
COME_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class DeltaCome(Method):
    """`delta-come`: singular vectors at 8, 3 and 2 bits by their value (arXiv 2406.08903, section 3), to a budget.

    The two first at 8 bits, 32 at 3, as many as the budget of `bits` bits a weight allows at 2, in groups of 128 along
    a vector. Rounded to nearest; the authors round with GPTQ on calibration data. The budget counts codes alone, as
    theirs does; scales and zero points are in the bytes.
    """

    bits: float = 1.0

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        out, width = delta.shape
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        budget = self.bits * out * width / (out + width)
        ranks: list[tuple[int, int]] = []
        for precision, count in COME_VECTORS.items():
            taken = min(count, int(budget / precision))
            ranks.append((precision, taken))
            budget -= precision * taken
        ranks.append((2, int(budget / 2)))
        total, nbytes, start = torch.zeros_like(delta), 0, 0
        for precision, count in ranks:
            stop = min(start + count, len(values))
            if stop == start:
                continue
            root = values[start:stop].sqrt()
            columns = round_to_nearest((left[:, start:stop] * root).T.contiguous(), precision, COME_GROUP)
            rows = round_to_nearest(root[:, None] * right[start:stop], precision, COME_GROUP)
            total += columns.delta.T @ rows.delta
            nbytes += columns.nbytes + rows.nbytes
            start = stop
        return Approximation(total, nbytes)
